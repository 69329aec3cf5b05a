//! `cargo +nightly fuzz run fragment`: see `quotum_fuzz::fragment`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| quotum_fuzz::fragment(bytes));
