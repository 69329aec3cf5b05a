//! Dates as HTTP and the APIs write them.
//!
//! Knows the calendar. Must not know what time it is. The invariant it keeps: a date
//! that cannot be is not read.

/// Returns a time as RFC 3339 writes it, in whole seconds of UTC.
pub fn rfc3339(unix_ms: u64) -> String {
    let seconds = unix_ms / 1_000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3_600, rest / 60 % 60, rest % 60)
}

/// Reads a date as HTTP writes it (`Sun, 06 Nov 1994 08:49:37 GMT`, RFC 9110, 5.6.7), in
/// seconds of the Unix epoch.
pub fn http(text: &str) -> Option<u64> {
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let [_, day, month, year, time, "GMT"] = words[..] else { return None };
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let (day, year): (u64, u64) = (day.parse().ok()?, year.parse().ok()?);
    let time: Vec<u64> = time.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let [hour, minute, second] = time[..] else { return None };
    let is_date = (1..=31).contains(&day) && (1970..=9999).contains(&year);
    if !is_date || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    Some(days(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second)
}

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// Days from year 0, March 1, to the Unix epoch.
const EPOCH: u64 = 719_468;

/// The days of 400 years.
const ERA: u64 = 146_097;

/// Returns the days since the Unix epoch (Hinnant, "chrono-compatible low-level date
/// algorithms": years begin in March, so that the leap day is a year's last).
fn days(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let of_era = year % 400 * 365 + year % 400 / 4 - year % 400 / 100 + of_year;
    year / 400 * ERA + of_era - EPOCH
}

/// Returns year, month and day: the inverse of [`days`].
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + EPOCH;
    let of_era = days % ERA;
    let of_400 = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * of_400 + of_400 / 4 - of_400 / 100);
    let march_month = (5 * of_year + 2) / 153;
    let month = (march_month + 2) % 12 + 1;
    let year = of_400 + days / ERA * 400 + u64::from(month <= 2);
    (year, month, of_year - (153 * march_month + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (1_700_000_010_999, "2023-11-14T22:13:30Z"),
            (4_102_444_799_000, "2099-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(ms), text);
        }
    }

    #[test]
    fn dates_are_read() {
        assert_eq!(http("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(http("Tue, 29 Feb 2000 00:00:00 GMT"), Some(951_782_400));
        for wrong in ["", "7", "Sun, 06 Nov 1994 08:49:37 CET", "Sun, 06 Abc 1994 08:49:37 GMT", "a, 0 Jan 1 1:1:1 GMT"]
        {
            assert_eq!(http(wrong), None, "{wrong}");
        }
    }
}
