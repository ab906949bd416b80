//! Known flows, whose plain packets go the fast path: others of their packets are
//! decided over and counted in the same way.

use etherparse::IpNumber;
use tproxy_common::abi::{Flow, Settings, Verdict, program};
use tproxy_user::policy::compile::RuleSet;

use crate::kernel::{Kernel, PASS, usual};
use crate::packets::{self as p, ETHERNET, Extension};
use crate::predict::parse;

tests![
    what_is_not_plain_is_decided_over_alike,
    replies_are_counted_alike,
    replies_of_what_passes_pass_alike,
    replies_to_the_host_itself_are_counted_where_they_arrive,
    an_ipv4_address_in_an_ipv6_packet_is_not_of_an_ipv4_connection,
];

const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// A packet that opens a connection, made one of its later ones.
fn later(opening: &[u8]) -> Vec<u8> {
    let header = if opening[ETHERNET] >> 4 == 4 { V4_HEADER } else { V6_HEADER };
    let mut packet = opening.to_vec();
    packet[ETHERNET + header + 13] = ACK;
    packet
}

/// A flow's first packet, a later one that is plain, and the same with options or
/// an extension header.
fn flows() -> [[Vec<u8>; 3]; 4] {
    let with_extension = |packet: &[u8], protocol| {
        p::v6_with(&[Extension::HopByHop], protocol, &packet[ETHERNET + V6_HEADER..])
    };
    let (tcp4, tcp6) = (later(&p::syn_v4()), later(&p::syn_v6()));
    let (udp4, udp6) = (p::udp_v4(50), p::udp_v6(50));
    [
        [p::syn_v4(), tcp4.clone(), p::with_options(&tcp4, 2)],
        [p::syn_v6(), tcp6.clone(), with_extension(&tcp6, IpNumber::TCP)],
        [udp4.clone(), udp4.clone(), p::with_options(&udp4, 2)],
        [udp6.clone(), udp6.clone(), with_extension(&udp6, IpNumber::UDP)],
    ]
}

/// What a packet has added to the flow, if it was seen as one of so many bytes.
fn added(before: Flow, after: Flow, packet: &[u8]) -> [(u64, u64); 2] {
    let bytes = (packet.len() - ETHERNET) as u64;
    [
        (after.packets_up - before.packets_up, (after.bytes_up - before.bytes_up) / bytes),
        (after.packets_down - before.packets_down, (after.bytes_down - before.bytes_down) / bytes),
    ]
}

fn what_is_not_plain_is_decided_over_alike() {
    for early_demux in [0, 1] {
        let mut kernel = Kernel::new(&Settings { early_demux, ..usual() });
        for verdict in [Verdict::Proxy, Verdict::Pass, Verdict::Drop] {
            kernel.set_rules(&RuleSet { rules: Vec::new(), otherwise: verdict as u32 });
            for [opening, plain, other] in flows() {
                kernel.run(program::CAPTURE, &opening);
                let mut outcomes = Vec::new();
                // The first asks whether the proxy listens.
                for packet in [&plain, &plain, &other, &plain] {
                    let (_, before) = kernel.only_flow();
                    let outcome = kernel.run(program::CAPTURE, packet);
                    let (_, after) = kernel.only_flow();
                    assert_eq!(added(before, after, packet), [(1, 1), (0, 0)], "{verdict:?}");
                    outcomes.push((outcome.action, outcome.mark, outcome.only_counter()));
                }
                assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]), "{outcomes:?}");
                kernel.forget(&parse(&opening).expect("a packet"));
            }
        }
    }
}

fn replies_are_counted_alike() {
    for (opening, plain, seen) in [
        (p::syn_v4(), p::reply_of(&p::syn_ack_v4()), SYN | ACK),
        (p::udp_v4(50), p::reply_of(&p::udp_v4(50)), 0),
    ] {
        let mut kernel = Kernel::new(&usual());
        kernel.run(program::CAPTURE, &opening);
        for packet in [&plain, &p::with_options(&plain, 2)] {
            let (_, before) = kernel.only_flow();
            kernel.run(program::REPLY, packet);
            let (_, after) = kernel.only_flow();
            assert_eq!(added(before, after, packet), [(0, 0), (1, 1)]);
            assert_eq!(after.seen_down, seen);
        }
    }
}

/// Replies to what passes go on to the client, at the side of the servers.
fn replies_of_what_passes_pass_alike() {
    for (opening, plain) in
        [(p::syn_v4(), p::reply_of(&later(&p::syn_v4()))), (p::udp_v4(50), p::reply_of(&p::udp_v4(50)))]
    {
        let mut kernel = Kernel::new(&usual());
        kernel.set_rules(&RuleSet { rules: Vec::new(), otherwise: Verdict::Pass as u32 });
        kernel.run(program::CAPTURE, &opening);
        for packet in [&plain, &plain, &p::with_options(&plain, 2)] {
            kernel.run(program::UPLINK, packet).expect(PASS, "pass_no_socket");
        }
    }
}

fn replies_to_the_host_itself_are_counted_where_they_arrive() {
    let mut kernel = Kernel::new(&Settings { own_traffic: 1, ..usual() });
    kernel.add_local(p::CLIENT_V4);
    kernel.set_rules(&RuleSet { rules: Vec::new(), otherwise: Verdict::Pass as u32 });
    kernel.run(program::OWN, &p::udp_v4(50));
    kernel.run(program::UPLINK, &p::reply_of(&p::udp_v4(50))).expect(PASS, "pass_local");
    assert_eq!(kernel.only_flow().1.packets_down, 1);
}

/// In the flow table both have the same key.
fn an_ipv4_address_in_an_ipv6_packet_is_not_of_an_ipv4_connection() {
    let mut kernel = Kernel::new(&Settings { early_demux: 1, ..usual() });
    kernel.run(program::CAPTURE, &p::syn_v4());
    kernel.run(program::CAPTURE, &later(&p::syn_v4()));
    let (_, before) = kernel.only_flow();
    let mut packet = later(&p::syn_v6());
    packet[ETHERNET + 8..][..16].copy_from_slice(&p::mapped(p::CLIENT_V4));
    packet[ETHERNET + 24..][..16].copy_from_slice(&p::mapped(p::SERVER_V4));
    kernel.run(program::CAPTURE, &packet).expect(PASS, "pass_special");
    assert_eq!(kernel.only_flow().1, before);
}
