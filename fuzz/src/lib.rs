//! What is done with bytes that somebody else wrote; shared by the fuzzer and by `tests/corpus.rs`.

mod decoders;

pub use decoders::{fragment, frame, row, usage};

#[allow(dead_code, unreachable_pub, reason = "the command uses the rest")]
#[path = "../../src/config/mod.rs"]
mod config;

/// A config file, ours or LiteLLM's: understood or refused with a place, and shown without secrets.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    // It may name files, and some of those of a machine never end.
    if text.contains("/dev") || text.contains("/proc") || text.contains("/sys") {
        return;
    }
    match config::parse(text, "fuzz.yaml", &|_| None, &config::Flags::default()) {
        Ok(config) => assert!(!config.deployments.is_empty()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
