//! How far a long sweep has come, in a file.
//!
//! Knows the numbers that a sweep carries on. Must not know what they count. The invariant it
//! keeps: the file is whole at any time, and belongs to one scenario and one first seed.

use std::fmt;
use std::fs;
use std::path::Path;

/// What a sweep has done so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) scenario: String,
    pub(crate) start_seed: u64,
    /// The first seed that has not been run.
    pub(crate) next_seed: u64,
    pub(crate) violations: u64,
    /// The trace hash of all seeds so far, as one sweep of them has it.
    pub(crate) hash: u64,
    pub(crate) wall_ms: u64,
}

impl Progress {
    /// Returns what the file says, or that nothing is done yet if there is none.
    ///
    /// # Errors
    /// If it cannot be read, or is of another sweep; it is left as it is.
    pub(crate) fn read(file: &Path, scenario: &str, start_seed: u64) -> Result<Self, String> {
        let fresh =
            Self { scenario: scenario.into(), start_seed, next_seed: start_seed, violations: 0, hash: 0, wall_ms: 0 };
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(fresh),
            Err(error) => return Err(format!("{}: {error}", file.display())),
        };
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let number = |name: &str| field(name).and_then(|value| value.parse().ok());
        let found = || {
            Some(Self {
                scenario: field("scenario")?.into(),
                start_seed: number("start_seed")?,
                next_seed: number("next_seed")?,
                violations: number("violations")?,
                hash: u64::from_str_radix(field("hash")?, 16).ok()?,
                wall_ms: number("wall_ms")?,
            })
        };
        let found = found().ok_or_else(|| format!("{} does not say how far a sweep has come", file.display()))?;
        if (found.scenario.as_str(), found.start_seed) != (scenario, start_seed) {
            return Err(format!(
                "{} is of scenario {} from seed {} on; name another file, or sweep that one",
                file.display(),
                found.scenario,
                found.start_seed
            ));
        }
        Ok(found)
    }

    /// Writes the file; whoever reads it meanwhile, or after an end in between, finds the old one.
    ///
    /// # Errors
    /// If it cannot.
    pub(crate) fn write(&self, file: &Path) -> Result<(), String> {
        let mut beside = file.as_os_str().to_owned();
        beside.push(".new");
        let written = fs::write(&beside, self.to_string()).and_then(|()| fs::rename(&beside, file));
        written.map_err(|error| format!("{}: {error}", file.display()))
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "scenario {}\nstart_seed {}\nnext_seed {}", self.scenario, self.start_seed, self.next_seed)?;
        writeln!(f, "violations {}\nhash {:016x}\nwall_ms {}", self.violations, self.hash, self.wall_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_goes_on_where_its_file_says_and_takes_no_file_of_another() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("progress");
        let mut progress = Progress::read(&file, "swarm", 7).unwrap();
        assert_eq!(progress.next_seed, 7);
        (progress.next_seed, progress.violations, progress.hash, progress.wall_ms) = (1_007, 2, u64::MAX - 3, 5);
        progress.write(&file).unwrap();
        assert_eq!(Progress::read(&file, "swarm", 7), Ok(progress));
        assert!(Progress::read(&file, "swarm", 8).unwrap_err().contains("from seed 7"));
        assert!(Progress::read(&file, "edge", 7).unwrap_err().contains("swarm"));
        fs::write(&file, "scenario swarm\nstart_seed 7\n").unwrap();
        assert!(Progress::read(&file, "swarm", 7).is_err());
    }
}
