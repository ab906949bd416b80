//! Any bytes as a DNS answer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tproxy_user_fuzz::sniff::check::answer(bytes));
