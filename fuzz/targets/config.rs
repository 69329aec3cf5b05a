//! `cargo +nightly fuzz run config`: see `quotum_fuzz::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| quotum_fuzz::config(bytes));
