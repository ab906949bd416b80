//! Special addresses and wire accounting against the standard library and arithmetic.

use super::*;
use crate::abi::mapped;
use core::net::{Ipv4Addr, Ipv6Addr};
use proptest::prelude::*;

proptest! {
    #[test]
    fn special_v4(addr: [u8; 4]) {
        let ip = Ipv4Addr::from(addr);
        let expected = addr[0] == 0 || ip.is_loopback() || ip.is_link_local() || ip.is_multicast() || ip.is_broadcast();
        prop_assert_eq!(is_special(&mapped(addr), Family::V4), expected);
    }

    #[test]
    fn special_v6(head in prop_oneof![Just([0xfe, 0x80]), Just([0xff, 0x02]), Just([0, 0]), any::<[u8; 2]>()], tail in prop_oneof![Just([0u8; 14]), any::<[u8; 14]>()]) {
        let mut addr = [0; 16];
        addr[..2].copy_from_slice(&head);
        addr[2..].copy_from_slice(&tail);
        let ip = Ipv6Addr::from(addr);
        let expected = ip.is_unspecified() || ip.is_loopback() || ip.is_unicast_link_local() || ip.is_multicast();
        prop_assert_eq!(is_special(&addr, Family::V6), expected);
    }

    #[test]
    fn a_merged_packet_counts_as_its_segments(payloads in proptest::collection::vec(1u32..1400, 1..40), header in 40u32..100) {
        let merged: u32 = header + payloads.iter().sum::<u32>();
        let apart: u64 = payloads.iter().map(|p| u64::from(header + p)).sum();
        let segments = u32::try_from(payloads.len()).expect("few");
        prop_assert_eq!(on_the_wire(merged, header, segments), (u64::from(segments), apart));
    }
}

#[test]
fn edges_of_special() {
    assert!(is_special(&mapped([255, 255, 255, 255]), Family::V4));
    assert!(!is_special(&mapped([255, 255, 255, 254]), Family::V4));
    assert!(!is_special(&mapped([240, 0, 0, 1]), Family::V4));
    assert!(is_special(&Ipv6Addr::LOCALHOST.octets(), Family::V6));
    assert!(is_special(&Ipv6Addr::UNSPECIFIED.octets(), Family::V6));
    assert!(!is_special(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2], Family::V6));
}
