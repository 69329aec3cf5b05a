//! `cargo +nightly fuzz run kube`: see `quotum_fuzz::kube`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| quotum_fuzz::kube(bytes));
