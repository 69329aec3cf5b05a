//! `cargo +nightly fuzz run usage`: see `quotum_fuzz::usage`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| quotum_fuzz::usage(bytes));
