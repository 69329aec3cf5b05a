//! Seeds that have failed once: they run before everything else, for ever.
//!
//! Knows `seeds.toml`. Must not know what a seed does. The invariant it keeps: an entry
//! that cannot be read is an error, never skipped.

/// One seed that has failed once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) scenario: String,
    pub(crate) seed: u64,
    /// What it found.
    pub(crate) why: String,
}

/// Returns the corpus, in the order in which it was written.
pub(crate) fn entries() -> Result<Vec<Entry>, String> {
    parse(include_str!("../seeds.toml"))
}

/// Reads the three keys an entry has; more of TOML is not needed here.
fn parse(text: &str) -> Result<Vec<Entry>, String> {
    let mut entries: Vec<Entry> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        let wrong = || format!("seeds.toml, line {}: {line:?}", number + 1);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if line == "[[seed]]" {
            entries.push(Entry { scenario: String::new(), seed: 0, why: String::new() });
            continue;
        }
        let (key, value) = line.split_once('=').ok_or_else(wrong)?;
        let entry = entries.last_mut().ok_or_else(wrong)?;
        let value = value.trim();
        let text = value.trim_matches('"').to_owned();
        match key.trim() {
            "scenario" => entry.scenario = text,
            "seed" => entry.seed = value.parse().map_err(|_| wrong())?,
            "why" => entry.why = text,
            _ => return Err(wrong()),
        }
    }
    match entries.iter().find(|entry| entry.scenario.is_empty() || entry.why.is_empty()) {
        Some(entry) => Err(format!("seeds.toml: seed {} lacks its scenario or its sentence", entry.seed)),
        None => Ok(entries),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_names_a_scenario_that_exists() {
        for entry in entries().expect("the corpus can be read") {
            assert!(crate::runner::scenario(&entry.scenario).is_some(), "{}", entry.scenario);
        }
    }

    #[test]
    fn an_entry_without_a_sentence_is_refused() {
        assert!(parse("[[seed]]\nscenario = \"swarm\"\nseed = 3\n").is_err());
    }
}
