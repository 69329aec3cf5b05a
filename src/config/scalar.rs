//! The small words of the config file: durations, sizes, addresses, choices, secrets.
//!
//! Knows how each is written. Must not know which field it stands in. The invariant it
//! keeps: a word is either understood exactly or refused with what would be right, and
//! a secret never shows itself.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::Deserializer;

/// Text that must not appear in logs, metrics, status pages or errors.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the text, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

/// Returns the duration that `text` writes: `100ms`, `60s`, `5m`, `1h` or `1d`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let refusal = || format!("`{text}` is not a duration; write a whole number and a unit: 100ms, 60s, 5m, 1h or 1d");
    let (number, unit) = split(text).ok_or_else(refusal)?;
    let ms_per_unit = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(refusal()),
    };
    let ms = number.checked_mul(ms_per_unit).ok_or_else(|| format!("`{text}` is too long a duration"))?;
    Ok(Duration::from_millis(ms))
}

/// Returns the number of bytes that `text` writes: `512`, `512KiB`, `32MiB` or `1GiB`.
pub fn size(text: &str) -> Result<usize, String> {
    let refusal = || format!("`{text}` is not a size; write a whole number and a unit: 512KiB, 32MiB or 1GiB");
    let (number, unit) = split(text).ok_or_else(refusal)?;
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return Err(refusal()),
    };
    let bytes = number.checked_mul(1 << shift).and_then(|bytes| usize::try_from(bytes).ok());
    bytes.filter(|bytes| *bytes > 0).ok_or_else(|| format!("`{text}` is not a size that can be held"))
}

fn split(text: &str) -> Option<(u64, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    Some((text[..digits].parse().ok()?, text[digits..].trim_start()))
}

/// Returns the address that `text` writes: an IP and a port.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("`{text}` is not an address; write an IP and a port: 10.0.0.7:7946 or [::]:7946"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_whole_numbers_with_a_unit() {
        assert_eq!(duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        for wrong in ["", "5", "s", "-1s", "1.5s", "5 parsecs", "99999999999999999999s", "18446744073709551615d"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(size("32MiB"), Ok(32 << 20));
        assert_eq!(size("512"), Ok(512));
        for wrong in ["", "0", "MiB", "-1MiB", "1MB", "99999999999GiB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_secret_does_not_show_itself() {
        assert_eq!(format!("{:?}", Some(Secret::new("sk-1"))), "Some(Secret(..))");
    }
}
