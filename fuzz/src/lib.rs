//! What is done with bytes that somebody else wrote; shared by the fuzzer and by `tests/corpus.rs`.

mod decoders;

pub use decoders::{config, fragment, frame, kube, row, usage};
