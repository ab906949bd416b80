//! Any bytes as a packet, from the network header on.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tproxy_common_fuzz::check_packet(input));
