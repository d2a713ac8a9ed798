#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qkd_fuzz::clavis2::run(data));
