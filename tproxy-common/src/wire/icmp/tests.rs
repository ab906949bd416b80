//! Errors built by hand.

use super::*;
use crate::abi::UDP;
use proptest::prelude::*;

extern crate std;
use std::vec::Vec;

const ROUTER: [u8; 4] = [10, 9, 9, 9];
const CLIENT: [u8; 4] = [10, 0, 0, 1];
const SERVER: [u8; 4] = [192, 0, 2, 1];
/// 40000 → 53, and no more than these 8 bytes of it, as RFC 792 has it.
const UDP_53: [u8; 8] = [0x9c, 0x40, 0, 53, 0, 8, 0, 0];

fn v4(protocol: u8, source: [u8; 4], destination: [u8; 4], options: usize, payload: &[u8]) -> Vec<u8> {
    let mut p = std::vec![0u8; 20 + options];
    p[0] = 0x45 + u8::try_from(options / 4).expect("short");
    p[9] = protocol;
    p[12..16].copy_from_slice(&source);
    p[16..20].copy_from_slice(&destination);
    p.extend_from_slice(payload);
    p
}

fn unreachable_v4(kind: u8, inner: &[u8]) -> Vec<u8> {
    let icmp = [&[kind, 4, 0, 0, 0, 0, 5, 0], inner].concat();
    v4(1, ROUTER, CLIENT, 0, &icmp)
}

fn v6(next: u8, source: u8, destination: u8, payload: &[u8]) -> Vec<u8> {
    let mut p = std::vec![0u8; 40];
    p[0] = 0x60;
    p[6] = next;
    (p[8], p[23], p[24], p[39]) = (0x20, source, 0x20, destination);
    p.extend_from_slice(payload);
    p
}

fn error_about_v6(kind: u8, inner: &[u8]) -> Vec<u8> {
    v6(58, 9, 1, &[&[kind, 0, 0, 0, 0, 0, 5, 0], inner].concat())
}

#[test]
fn v4_errors_tell_the_packet_that_was_sent() {
    for options in [0, 8] {
        for kind in [3, 11, 12] {
            let packet = unreachable_v4(kind, &v4(UDP, CLIENT, SERVER, options, &UDP_53));
            let sent = error_v4(&packet.as_slice()).expect("an error");
            assert_eq!((sent.source, sent.destination), (mapped(CLIENT), mapped(SERVER)));
            assert_eq!((sent.source_port, sent.destination_port, sent.protocol), (40_000, 53, UDP));
        }
    }
}

#[test]
fn v6_errors_tell_the_packet_that_was_sent() {
    let first_fragment = [&[UDP, 0, 0, 1, 0, 0, 0, 7], UDP_53.as_slice()].concat();
    for inner in [v6(UDP, 1, 2, &UDP_53), v6(44, 1, 2, &first_fragment)] {
        for kind in 1..=4 {
            let packet = error_about_v6(kind, &inner);
            let sent = error_v6(&packet.as_slice()).expect("an error");
            assert_eq!((sent.source[15], sent.destination[15]), (1, 2));
            assert_eq!((sent.source_port, sent.destination_port, sent.protocol), (40_000, 53, UDP));
        }
    }
}

#[test]
fn what_is_no_error_is_left_alone() {
    let inner = v4(UDP, CLIENT, SERVER, 0, &UDP_53);
    // Echo, its reply, redirect.
    for kind in [0, 5, 8, 13] {
        assert_eq!(error_v4(&unreachable_v4(kind, &inner).as_slice()), Err(Skip::Protocol));
    }
    let inner = v6(UDP, 1, 2, &UDP_53);
    // Echo, neighbour discovery, redirect.
    for kind in [0, 5, 128, 129, 133, 135, 136, 137] {
        assert_eq!(error_v6(&error_about_v6(kind, &inner).as_slice()), Err(Skip::Protocol));
    }
}

#[test]
fn errors_about_packets_without_ports_are_left_alone() {
    let mut later = v4(UDP, CLIENT, SERVER, 0, &UDP_53);
    later[7] = 1;
    assert_eq!(error_v4(&unreachable_v4(3, &later).as_slice()), Err(Skip::Protocol));
    assert_eq!(
        error_v4(&unreachable_v4(3, &v4(1, CLIENT, SERVER, 0, &UDP_53)).as_slice()),
        Err(Skip::Protocol)
    );
    let later = [&[UDP, 0, 0, 8, 0, 0, 0, 7], UDP_53.as_slice()].concat();
    assert_eq!(error_v6(&error_about_v6(1, &v6(44, 1, 2, &later)).as_slice()), Err(Skip::Protocol));
}

/// Who forges one must at least send it to where the packet came from.
#[test]
fn an_error_for_another_than_the_sender_is_left_alone() {
    let inner = v4(UDP, [10, 0, 0, 2], SERVER, 0, &UDP_53);
    assert_eq!(error_v4(&unreachable_v4(3, &inner).as_slice()), Err(Skip::Malformed));
    assert_eq!(error_v6(&error_about_v6(1, &v6(UDP, 3, 2, &UDP_53)).as_slice()), Err(Skip::Malformed));
}

#[test]
fn errors_that_are_cut_short_are_left_alone() {
    let whole = unreachable_v4(3, &v4(UDP, CLIENT, SERVER, 0, &UDP_53));
    for length in 0..whole.len() - 4 {
        assert_eq!(error_v4(&&whole[..length]), Err(Skip::Truncated), "{length} bytes");
    }
    let whole = error_about_v6(1, &v6(UDP, 1, 2, &UDP_53));
    for length in 0..whole.len() - 4 {
        assert_eq!(error_v6(&&whole[..length]), Err(Skip::Truncated), "{length} bytes");
    }
}

proptest! {
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = error_v4(&bytes.as_slice());
        let _ = error_v6(&bytes.as_slice());
    }
}
