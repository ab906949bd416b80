//! Any bytes as datagrams, and as what protected ones carry.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tproxy_user_fuzz::sniff::check::datagrams(bytes));
