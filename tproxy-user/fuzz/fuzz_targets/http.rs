//! Any bytes as the answer of an HTTP proxy server.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tproxy_user_fuzz::check::http(bytes));
