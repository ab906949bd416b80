//! The edges of what is special; `tests/properties.rs` has all else against a naive model.

use super::*;
use crate::abi::mapped;
use core::net::Ipv6Addr;

#[test]
fn edges_of_special() {
    assert!(is_special(&mapped([255, 255, 255, 255]), Family::V4));
    assert!(!is_special(&mapped([255, 255, 255, 254]), Family::V4));
    assert!(!is_special(&mapped([240, 0, 0, 1]), Family::V4));
    assert!(is_special(&Ipv6Addr::LOCALHOST.octets(), Family::V6));
    assert!(is_special(&Ipv6Addr::UNSPECIFIED.octets(), Family::V6));
    assert!(!is_special(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2], Family::V6));
}

/// On the wire they never are what they look like (RFC 6890), and a proxy that
/// opens a socket towards one talks IPv4: `::ffff:127.0.0.1` is this host.
#[test]
fn mapped_addresses_in_ipv6_packets_are_special() {
    assert!(is_special(&mapped([127, 0, 0, 1]), Family::V6));
    assert!(is_special(&mapped([192, 0, 2, 1]), Family::V6));
    assert!(!is_special(&mapped([192, 0, 2, 1]), Family::V4));
    assert!(!is_special(&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0xff, 0xff, 192, 0, 2, 1], Family::V6));
}
