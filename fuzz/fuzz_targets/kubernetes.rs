#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| nsm_fuzz_targets::kubernetes(bytes));
