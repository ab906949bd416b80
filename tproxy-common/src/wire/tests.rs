//! The parser against packets built by hand; `tests/properties.rs` has it against a naive one.

use super::*;

extern crate std;
use std::vec::Vec;

fn v4(ihl: u8, total: u16, frag: u16, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut p = std::vec![0u8; usize::from(ihl) * 4];
    p[0] = 0x40 | ihl;
    p[2..4].copy_from_slice(&total.to_be_bytes());
    p[4..6].copy_from_slice(&0x1234u16.to_be_bytes());
    p[6..8].copy_from_slice(&frag.to_be_bytes());
    p[9] = protocol;
    p[12..16].copy_from_slice(&[10, 0, 0, 1]);
    p[16..20].copy_from_slice(&[192, 0, 2, 1]);
    p.extend_from_slice(payload);
    p
}

fn tcp(flags: u8, words: u8) -> Vec<u8> {
    let mut h = std::vec![0u8; usize::from(words) * 4];
    h[0..2].copy_from_slice(&40000u16.to_be_bytes());
    h[2..4].copy_from_slice(&443u16.to_be_bytes());
    h[12] = words << 4;
    h[13] = flags;
    h
}

const UDP_53: [u8; 8] = [0x9c, 0x40, 0, 53, 0, 8, 0, 0];

fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut p = std::vec![0u8; 40];
    p[0] = 0x60;
    p[4..6].copy_from_slice(&u16::try_from(payload.len()).expect("short").to_be_bytes());
    p[6] = next;
    p[8] = 0x20;
    p[24] = 0x20;
    p.extend_from_slice(payload);
    p
}

#[test]
fn ipv4_options_move_the_ports() {
    let packet = v4(7, 28 + 20, 0x4000, TCP, &tcp(tcp_flag::SYN, 5));
    let parsed = parse_v4(&packet.as_slice()).expect("valid");
    assert_eq!((parsed.source_port, parsed.destination_port), (40000, 443));
    assert_eq!(parsed.header_len, 48);
    assert!(parsed.is_syn());
}

#[test]
fn later_fragment_has_no_ports() {
    let parsed = parse_v4(&v4(5, 28, 0x00b9, UDP, &UDP_53).as_slice()).expect("valid");
    assert_eq!((parsed.fragment, parsed.fragment_id), (Fragment::Later, 0x1234));
    assert_eq!((parsed.source_port, parsed.destination_port), (0, 0));
    let parsed = parse_v4(&v4(5, 28, 0x2000, UDP, &UDP_53).as_slice()).expect("valid");
    assert_eq!((parsed.fragment, parsed.fragment_id), (Fragment::First, 0x1234));
    assert_eq!(parsed.destination_port, 53);
}

#[test]
fn dont_fragment_is_read_wherever_it_stands() {
    for (field, expected) in [(0, false), (0x4000, true), (0x2000, false), (0x6000, true), (0x80b9, false)] {
        let parsed = parse_v4(&v4(5, 28, field, UDP, &UDP_53).as_slice()).expect("valid");
        assert_eq!(parsed.dont_fragment, expected, "{field:#06x}");
    }
    assert!(!parse_v6(&v6(UDP, &UDP_53).as_slice()).expect("valid").dont_fragment);
}

#[test]
fn contradictions_are_malformed_and_short_ones_truncated() {
    assert_eq!(parse_v4(&&v4(5, 28, 0, UDP, &UDP_53)[..19]), Err(Skip::Truncated));
    let mut short_ihl = v4(5, 28, 0, UDP, &UDP_53);
    short_ihl[0] = 0x44;
    assert_eq!(parse_v4(&short_ihl.as_slice()), Err(Skip::Malformed));
    assert_eq!(parse_v4(&v4(5, 19, 0, UDP, &UDP_53).as_slice()), Err(Skip::Malformed));
    assert_eq!(parse_v4(&v4(5, 24, 0, UDP, &UDP_53).as_slice()), Err(Skip::Malformed));
    assert_eq!(parse_v4(&v4(5, 40, 0, TCP, &tcp(2, 5)[..10]).as_slice()), Err(Skip::Truncated));
    assert_eq!(parse_v4(&v4(5, 40, 0, 132, &tcp(2, 5)).as_slice()), Err(Skip::Protocol));
}

#[test]
fn ipv6_extension_headers_are_followed() {
    // Hop-by-hop (8 bytes), destination options (16 bytes), then UDP.
    let mut payload = std::vec![60, 0, 0, 0, 0, 0, 0, 0];
    payload.extend_from_slice(&[UDP, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    payload.extend_from_slice(&UDP_53);
    let parsed = parse_v6(&v6(0, &payload).as_slice()).expect("valid");
    assert_eq!((parsed.destination_port, parsed.header_len), (53, 72));
}

#[test]
fn ipv6_fragments() {
    let fragment = |field: u16| {
        let mut payload = std::vec![UDP, 0, 0, 0, 0, 0, 0, 7];
        payload[2..4].copy_from_slice(&field.to_be_bytes());
        payload.extend_from_slice(&UDP_53);
        parse_v6(&v6(44, &payload).as_slice()).expect("valid")
    };
    assert_eq!(fragment(0).fragment, Fragment::Whole);
    assert_eq!((fragment(1).fragment, fragment(1).fragment_id), (Fragment::First, 7));
    assert_eq!(fragment(1).destination_port, 53);
    assert_eq!((fragment(8).fragment, fragment(8).fragment_id), (Fragment::Later, 7));
    assert_eq!(fragment(9).destination_port, 0);
}

#[test]
fn routing_header_with_segments_left_is_not_ours() {
    let mut payload = std::vec![UDP, 0, 4, 1, 0, 0, 0, 0];
    payload.extend_from_slice(&UDP_53);
    assert_eq!(parse_v6(&v6(43, &payload).as_slice()), Err(Skip::Protocol));
    payload[3] = 0;
    assert!(parse_v6(&v6(43, &payload).as_slice()).is_ok());
}

#[test]
fn endless_extension_headers_end() {
    let mut payload = Vec::new();
    for _ in 0..64 {
        payload.extend_from_slice(&[60, 0, 0, 0, 0, 0, 0, 0]);
    }
    assert_eq!(parse_v6(&v6(60, &payload).as_slice()), Err(Skip::Protocol));
}

#[test]
fn a_later_fragment_ends_behind_its_headers() {
    let mut packet = v6(44, &[UDP, 0, 0, 8, 0, 0, 0, 7]);
    assert_eq!(parse_v6(&packet.as_slice()).map(|p| p.fragment), Ok(Fragment::Later));
    packet[5] = 7;
    assert_eq!(parse_v6(&packet.as_slice()), Err(Skip::Malformed));
}

#[test]
fn a_fragment_in_a_fragment_is_malformed() {
    let nested = |outer: u8, inner: u8| {
        let mut payload = std::vec![44, 0, 0, outer, 0, 0, 0, 7, UDP, 0, 0, inner, 0, 0, 0, 9];
        payload.extend_from_slice(&UDP_53);
        parse_v6(&v6(44, &payload).as_slice()).map(|p| (p.fragment, p.fragment_id))
    };
    // The stack puts it together by the outer identification: with the inner
    // one the later fragments would be taken for those of another datagram.
    for inner in [0, 1, 8] {
        assert_eq!(nested(1, inner), Err(Skip::Malformed));
    }
    assert_eq!(nested(0, 1), Ok((Fragment::First, 9)));
}

#[test]
fn the_hop_limit_is_read_wherever_it_stands() {
    let (mut v4, mut v6) = ([0; 20], [0; 40]);
    (v4[8], v6[7]) = (63, 64);
    assert_eq!(hop_limit(&v4.as_slice(), Family::V4), Some(63));
    assert_eq!(hop_limit(&v6.as_slice(), Family::V6), Some(64));
}

#[test]
fn the_codepoint_is_the_upper_six_bits_of_its_octet() {
    for (octet, expected) in [(0, 0), (3, 0), (4, 1), (0xb8, 46), (0xff, 63)] {
        let v4 = [0x45, octet, 0, 20];
        let v6 = [0x60 | octet >> 4, octet << 4 | 0x0f, 0xff, 0xff];
        assert_eq!(dscp(&v4.as_slice(), Family::V4), Some(expected));
        assert_eq!(dscp(&v6.as_slice(), Family::V6), Some(expected));
    }
}

#[test]
fn an_ethernet_header_is_told_by_its_type() {
    let frame = |ethertype: [u8; 2]| {
        let addresses = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 4, 6, 8, 10, 12];
        let mut frame = addresses.to_vec();
        frame.extend_from_slice(&ethertype);
        frame.extend_from_slice(&[0x45, 0, 0, 20]);
        frame
    };
    let source = |ethertype, family| ethernet_source(&frame(ethertype).as_slice(), family);
    assert_eq!(source([0x08, 0], Family::V4), Some(0x0204_0608_0a0c));
    assert_eq!(source([0x86, 0xdd], Family::V6), Some(0x0204_0608_0a0c));
    assert_eq!(source([0x08, 0], Family::V6), None);
    assert_eq!(source([0x86, 0xdd], Family::V4), None);
}
