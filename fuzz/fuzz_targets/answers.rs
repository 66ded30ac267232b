//! For cargo-fuzz.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| overfill_fuzz::answers(data));
