//! What is done with bytes that somebody else wrote; shared by the fuzzer and by `tests/corpus.rs`.

mod decoders;

pub use decoders::{fragment, frame, row, usage};

use quotum::config as configured;

/// A config file, ours or LiteLLM's: understood or refused with a place, and shown without secrets.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    // It may name files, and some of those of a machine never end.
    if text.contains("/dev") || text.contains("/proc") || text.contains("/sys") {
        return;
    }
    match configured::parse(text, "fuzz.yaml", &|_| None, &configured::Flags::default()) {
        Ok(config) => assert!(!config.deployments.is_empty()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
