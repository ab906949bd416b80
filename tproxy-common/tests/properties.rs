//! Parser and classification against naive ones, on random and on mutated input.

mod reference;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use tproxy_common::abi::{Addr, Family, mapped};
use tproxy_common::wire::{Fragment, Skip, parse_v4, parse_v6};

fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..most)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn random_bytes_are_parsed_as_the_naive_parser_does(packet in bytes(200)) {
        reference::check_packet(&packet);
    }

    #[test]
    fn nearly_valid_packets_are_parsed_as_the_naive_parser_does(recipe in bytes(300)) {
        reference::check_packet(&reference::packet(&recipe));
    }

    #[test]
    fn etherparse_sees_the_same_ports(recipe in bytes(300)) {
        check_with_etherparse(&reference::packet(&recipe));
    }

    #[test]
    fn classification_is_that_of_the_naive_model(input in bytes(60)) {
        reference::check_classification(&input);
    }

    #[test]
    fn merged_packets_count_as_on_the_wire(input in bytes(24)) {
        reference::check_segments(&input);
    }
}

/// What etherparse takes for a whole TCP or UDP packet, with every length
/// checked, is one, with the same addresses and ports. The reverse does not
/// hold: it is stricter about lengths and about the order of extension headers.
fn check_with_etherparse(packet: &[u8]) {
    let Ok(sliced) = SlicedPacket::from_ip(packet) else { return };
    let (family, source, destination): (_, Addr, Addr) = match &sliced.net {
        Some(NetSlice::Ipv4(ip)) => {
            (Family::V4, mapped(ip.header().source()), mapped(ip.header().destination()))
        }
        Some(NetSlice::Ipv6(ip)) => (Family::V6, ip.header().source(), ip.header().destination()),
        _ => return,
    };
    let ports = match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
        Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
        _ => return,
    };
    let parsed = if family == Family::V4 { parse_v4(&packet) } else { parse_v6(&packet) };
    match parsed {
        Ok(ours) => {
            assert_eq!((ours.source, ours.destination), (source, destination));
            assert_eq!((ours.source_port, ours.destination_port), ports);
            assert_eq!(ours.fragment, Fragment::Whole);
        }
        // It follows any number of extension headers, and routing headers with segments left.
        Err(skip) => assert_eq!((family, skip), (Family::V6, Skip::Protocol)),
    }
}

/// Were most packets refused, the other properties would show little.
#[test]
fn recipes_give_packets_of_every_kind() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut kinds = std::collections::BTreeMap::new();
    for _ in 0..2000 {
        let recipe = bytes(300).new_tree(&mut runner).expect("bytes").current();
        let packet = reference::packet(&recipe);
        for parsed in [parse_v4(&packet.as_slice()), parse_v6(&packet.as_slice())] {
            let kind = parsed.map_or_else(
                |skip| format!("{skip:?}"),
                |packet| format!("{:?} {} {:?}", packet.family, packet.protocol, packet.fragment),
            );
            *kinds.entry(kind).or_insert(0) += 1;
        }
    }
    // Three reasons to skip; two families and protocols, whole, first and later.
    assert_eq!(kinds.len(), 3 + 2 * 2 * 3, "{kinds:?}");
    assert!(kinds.values().all(|count| *count >= 20), "{kinds:?}");
}
