//! A SOCKS5 server that says any bytes, behind one that says what it is asked for.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tproxy_user_fuzz::check::socks5(bytes));
