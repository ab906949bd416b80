//! Any address.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tproxy_common_fuzz::check_classification(input));
