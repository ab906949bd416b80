//! Classification and accounting in the plainest way.

use std::net::{Ipv4Addr, Ipv6Addr};

use tproxy_common::abi::{Addr, Family, mapped};
use tproxy_common::classify::{is_special, on_the_wire, segments};

use super::Numbers;

/// Checks which addresses are special, on any bytes.
///
/// # Panics
/// The real function and the naive one disagree.
pub fn check_classification(bytes: &[u8]) {
    let mut numbers = Numbers::new(bytes);
    let mut address: Addr = numbers.array();
    if let Some(head) =
        numbers.one_of(&[None, Some("fe80::"), Some("ff02::"), Some("::"), Some("::ffff:0:0")])
    {
        let head: Ipv6Addr = head.parse().expect("an address");
        let kept = usize::from(numbers.u8()) % 17;
        address[..kept].copy_from_slice(&head.octets()[..kept]);
    }
    check_special(address);
}

fn check_special(address: Addr) {
    let v6 = Ipv6Addr::from(address);
    let expected = v6.is_unspecified()
        || v6.is_loopback()
        || v6.is_unicast_link_local()
        || v6.is_multicast()
        || v6.to_ipv4_mapped().is_some();
    assert_eq!(is_special(&address, Family::V6), expected, "{v6}");
    let tail: [u8; 4] = address[12..].try_into().expect("four bytes");
    let v4 = Ipv4Addr::from(tail);
    // All of 0.0.0.0/8 is "this network" (RFC 6890).
    let expected =
        tail[0] == 0 || v4.is_loopback() || v4.is_link_local() || v4.is_multicast() || v4.is_broadcast();
    assert_eq!(is_special(&mapped(tail), Family::V4), expected, "{v4}");
}

/// Checks the arithmetic of GRO and GSO packets, on any bytes: cut into the
/// packets that they are on the wire, and these added up.
///
/// # Panics
/// The sums differ, or the arithmetic overflows.
pub fn check_segments(bytes: &[u8]) {
    let mut numbers = Numbers::new(bytes);
    let (ip_len, header_len) = (numbers.u32(), numbers.u32());
    let (gso_segs, gso_size) = (numbers.u32(), numbers.u32());
    let (packets, bytes) = on_the_wire(ip_len, header_len, segments(ip_len, header_len, gso_segs, gso_size));
    assert!(packets >= 1 && bytes >= u64::from(ip_len), "{packets} packets, {bytes} bytes");

    let header = 28 + ip_len % 100;
    let size = 1 + gso_size % 9_000;
    let payload = numbers.u32() % (size * 300);
    let (mut packets, mut sum, mut left) = (0u32, 0u64, payload);
    while packets == 0 || left > 0 {
        let piece = left.min(size);
        packets += 1;
        sum += u64::from(header + piece);
        left -= piece;
    }
    let merged = header + payload;
    let expected = (u64::from(packets), sum);
    // The kernel has counted, or it has left that to us.
    for gso_segs in [packets, 0] {
        let counted = segments(merged, header, gso_segs, size);
        assert_eq!(on_the_wire(merged, header, counted), expected, "{payload} bytes in pieces of {size}");
    }
    assert_eq!(on_the_wire(merged, header, segments(merged, header, 0, 0)), (1, u64::from(merged)));
}
