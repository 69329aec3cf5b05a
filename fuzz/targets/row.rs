//! `cargo +nightly fuzz run row`: see `quotum_fuzz::row`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| quotum_fuzz::row(bytes));
