#![no_main]
libfuzzer_sys::fuzz_target!(init: valar_fuzz::begin_parquet(), |data: &[u8]| valar_fuzz::rows_parquet(data));
