#![no_main]
libfuzzer_sys::fuzz_target!(init: valar_fuzz::begin(), |data: &[u8]| valar_fuzz::rows_gz(data));
