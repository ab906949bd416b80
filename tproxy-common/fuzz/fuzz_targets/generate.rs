//! Any bytes as the recipe of a nearly valid packet.

#![no_main]

use tproxy_common_fuzz::{check_packet, packet};

libfuzzer_sys::fuzz_target!(|recipe: &[u8]| check_packet(&packet(recipe)));
