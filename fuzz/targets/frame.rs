//! `cargo +nightly fuzz run frame`: see `quotum_fuzz::frame`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| quotum_fuzz::frame(bytes));
