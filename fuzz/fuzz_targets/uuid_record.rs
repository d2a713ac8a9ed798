#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qkd_fuzz::uuid_record::run(data));
