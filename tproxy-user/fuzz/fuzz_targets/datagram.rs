//! Any bytes as a datagram of a SOCKS5 server.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tproxy_user_fuzz::check::datagram(bytes));
