//! Any bytes as the first of a TCP connection.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tproxy_user_fuzz::sniff::check::first_bytes(bytes));
