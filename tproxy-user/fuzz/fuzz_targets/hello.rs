//! Any bytes as a `ClientHello`, however it is carried.

#![no_main]

libfuzzer_sys::fuzz_target!(|message: &[u8]| tproxy_user_fuzz::sniff::check::hello(message));
