#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qkd_fuzz::r10::run(data));
