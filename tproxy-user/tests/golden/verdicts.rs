//! What becomes of a flow by the rule that decides over it.

use std::net::SocketAddr;

use etherparse::{NetSlice, SlicedPacket, TcpSlice, TransportSlice};
use tproxy_common::abi::{Settings, Verdict, program};
use tproxy_user::config::Scope;
use tproxy_user::config::rule::{Action, Conditions, Rule};
use tproxy_user::config::upstream::Upstream;
use tproxy_user::policy::names::Names;
use tproxy_user::policy::rules::{Written, rule_set};
use tproxy_user::policy::targets::{Target, Targets};

use crate::kernel::{DROP, Kernel, PASS, REDIRECTED, STEERED, usual};
use crate::packets as p;

tests![
    a_flow_knows_its_rule,
    dropped_flows_are_dropped_and_counted,
    a_refused_connection_is_answered_with_a_reset,
    a_refused_connection_of_this_host_is_answered_too,
    a_refused_datagram_goes_to_the_proxy,
    without_a_proxy_what_is_refused_stays_refused,
    a_diverted_flow_knows_its_target,
    the_verdict_of_a_flow_outlives_its_rule,
    a_quiet_datagram_flow_is_decided_over_anew,
    fragments_share_the_verdict_of_their_datagram,
];

/// Rules, of which the second has the action.
fn rules(kernel: &mut Kernel, action: Action) {
    let other = Conditions { to_ports: vec![(1, 1)], ..Conditions::default() };
    let rules = [
        Rule { conditions: other, action: Action::Pass },
        Rule { conditions: Conditions::default(), action },
    ];
    let set = rule_set(
        Written { scope: &Scope::default(), upstream: &Upstream::Direct, rules: &rules },
        &Names::default(),
        &Targets::default(),
    )
    .expect("few targets");
    kernel.set_rules(&set);
}

fn with(action: Action) -> Kernel {
    let mut kernel = Kernel::new(&usual());
    rules(&mut kernel, action);
    kernel
}

fn a_flow_knows_its_rule() {
    let mut kernel = with(Action::Proxy(None));
    kernel.run(program::CAPTURE, &p::syn_v4()).expect(STEERED, "assign_eopnotsupp");
    assert_eq!(kernel.only_flow().1.rule, 2);
    let mut kernel = Kernel::new(&usual());
    kernel.run(program::CAPTURE, &p::syn_v4());
    assert_eq!(kernel.only_flow().1.rule, 0);
}

fn dropped_flows_are_dropped_and_counted() {
    for packets in [[p::syn_v4(), p::ack_v4()], [p::udp_v6(3), p::udp_v6(3)]] {
        let mut kernel = with(Action::Drop);
        for packet in &packets {
            kernel.run(program::CAPTURE, packet).expect(DROP, "policy_dropped");
        }
        let (_, flow) = kernel.only_flow();
        assert_eq!((flow.verdict, flow.rule, flow.packets_up), (Verdict::Drop as u8, 2, 2));
    }
}

/// Makes sure that a packet is the reset of the SYN that was sent.
fn expect_reset(reset: &[u8], syn: &[u8]) {
    let [reset, syn] = [reset, syn].map(|packet| SlicedPacket::from_ethernet(packet).expect("a packet"));
    let ethernet =
        |packet: &SlicedPacket<'_>| packet.link.as_ref().and_then(etherparse::LinkSlice::to_header);
    let (to, from) = (ethernet(&reset).expect("a header"), ethernet(&syn).expect("a header"));
    let (to, from) = (to.ethernet2().expect("Ethernet"), from.ethernet2().expect("Ethernet"));
    assert_eq!((to.destination, to.source), (from.source, from.destination));
    let [answer, asked] = [&reset, &syn].map(tcp);
    assert_eq!(
        (answer.source_port(), answer.destination_port()),
        (asked.destination_port(), asked.source_port())
    );
    assert!(answer.rst() && answer.ack() && !answer.syn() && !answer.fin());
    let occupied = 1 + u32::try_from(asked.payload().len()).expect("small");
    assert_eq!(answer.acknowledgment_number(), asked.sequence_number().wrapping_add(occupied));
    assert_eq!((answer.sequence_number(), answer.window_size()), (0, 0));
    match (reset.net.as_ref().expect("IP"), syn.net.as_ref().expect("IP")) {
        (NetSlice::Ipv4(answer_ip), NetSlice::Ipv4(asked_ip)) => {
            let (header, asked) = (answer_ip.header(), asked_ip.header());
            assert_eq!((header.source(), header.destination()), (asked.destination(), asked.source()));
            assert_eq!(header.ttl(), 64);
            assert_eq!(header.to_header().calc_header_checksum(), header.header_checksum());
            let sum = answer.calc_checksum_ipv4(header.source(), header.destination());
            assert_eq!(answer.checksum(), sum.expect("short"));
        }
        (NetSlice::Ipv6(answer_ip), NetSlice::Ipv6(asked_ip)) => {
            let (header, asked) = (answer_ip.header(), asked_ip.header());
            assert_eq!((header.source(), header.destination()), (asked.destination(), asked.source()));
            assert_eq!(header.hop_limit(), 64);
            let sum = answer.calc_checksum_ipv6(header.source(), header.destination());
            assert_eq!(answer.checksum(), sum.expect("short"));
        }
        _ => panic!("another family"),
    }
}

fn tcp<'a>(packet: &SlicedPacket<'a>) -> TcpSlice<'a> {
    match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => tcp.clone(),
        other => panic!("no TCP: {other:?}"),
    }
}

/// SYNs as clients send them.
fn syns() -> [Vec<u8>; 4] {
    let options = with_checksums(&p::syn_v4_with_options());
    [p::syn_v4(), p::syn_v6(), options, with_checksums(&p::with_payload(p::syn_v4(), 5))]
}

/// A TCP packet over IPv4 with the checksums that it should have.
fn with_checksums(packet: &[u8]) -> Vec<u8> {
    let mut valid = packet.to_vec();
    let parsed = SlicedPacket::from_ethernet(packet).expect("a packet");
    let Some(NetSlice::Ipv4(ip)) = &parsed.net else { panic!("no IPv4") };
    let header = ip.header();
    let sum = tcp(&parsed).calc_checksum_ipv4(header.source(), header.destination()).expect("short");
    let (at, of_header) = (header.slice().len(), header.to_header().calc_header_checksum());
    for (at, sum) in [(10, of_header), (at + 16, sum)] {
        valid[p::ETHERNET + at..][..2].copy_from_slice(&sum.to_be_bytes());
    }
    valid
}

fn a_refused_connection_is_answered_with_a_reset() {
    for syn in syns() {
        let mut kernel = with(Action::Reject);
        let outcome = kernel.run(program::CAPTURE, &syn);
        outcome.expect(REDIRECTED, "policy_reset");
        expect_reset(&outcome.packet, &syn);
        assert_eq!(kernel.only_flow().1.verdict, Verdict::Reject as u8);
    }
}

fn a_refused_connection_of_this_host_is_answered_too() {
    for syn in syns() {
        let mut kernel = Kernel::new(&Settings { own_traffic: 1, ..usual() });
        rules(&mut kernel, Action::Reject);
        let outcome = kernel.run(program::OWN, &syn);
        outcome.expect(REDIRECTED, "policy_reset");
        expect_reset(&outcome.packet, &syn);
    }
}

fn a_refused_datagram_goes_to_the_proxy() {
    let mut kernel = with(Action::Reject);
    for _ in 0..2 {
        kernel.run(program::CAPTURE, &p::udp_v4(3)).expect(STEERED, "assign_eopnotsupp");
    }
    assert_eq!(kernel.only_flow().1.verdict, Verdict::Reject as u8);
}

fn without_a_proxy_what_is_refused_stays_refused() {
    let own = Settings { own_traffic: 1, ..usual() };
    for (program, settings) in [(program::CAPTURE, usual()), (program::OWN, own)] {
        let mut kernel = Kernel::without_listeners(&settings);
        rules(&mut kernel, Action::Reject);
        for _ in 0..2 {
            kernel.run(program, &p::udp_v4(3)).expect(DROP, "policy_dropped");
        }
        kernel.run(program, &p::syn_v4()).expect(REDIRECTED, "policy_reset");
    }
}

fn a_diverted_flow_knows_its_target() {
    let mut kernel = Kernel::new(&usual());
    let targets = Targets::default();
    let [first, second] = [53, 54].map(|port| SocketAddr::from(([127, 0, 0, 53], port)));
    assert_eq!(targets.of_address(first.into()), Ok(1));
    let rule = Rule { conditions: Conditions::default(), action: Action::Divert(second.into()) };
    kernel.set_rules(
        &rule_set(
            Written { scope: &Scope::default(), upstream: &Upstream::Direct, rules: &[rule] },
            &Names::default(),
            &targets,
        )
        .expect("few targets"),
    );
    for packet in [p::udp_v4(3), p::udp_v4(3)] {
        kernel.run(program::CAPTURE, &packet).expect(STEERED, "assign_eopnotsupp");
    }
    let (_, flow) = kernel.only_flow();
    assert_eq!((flow.verdict, flow.rule, flow.target), (Verdict::Divert as u8, 1, 2));
    assert!(matches!(targets.get(flow.target), Some(Target::Address(address)) if address.target == second));
}

fn the_verdict_of_a_flow_outlives_its_rule() {
    let mut kernel = with(Action::Pass);
    kernel.run(program::CAPTURE, &p::syn_v4()).expect(PASS, "pass_policy");
    rules(&mut kernel, Action::Drop);
    kernel.run(program::CAPTURE, &p::ack_v4()).expect(PASS, "pass_policy");
    // A new connection is another flow, if from the same port.
    kernel.run(program::CAPTURE, &p::syn_v4()).expect(DROP, "policy_dropped");

    let mut kernel = with(Action::Proxy(None));
    kernel.run(program::CAPTURE, &p::udp_v4(3)).expect(STEERED, "assign_eopnotsupp");
    rules(&mut kernel, Action::Drop);
    kernel.run(program::CAPTURE, &p::udp_v4(3)).expect(STEERED, "assign_eopnotsupp");
}

fn a_quiet_datagram_flow_is_decided_over_anew() {
    let mut kernel = Kernel::new(&Settings { udp_timeout: 1_000_000_000, ..usual() });
    rules(&mut kernel, Action::Drop);
    kernel.run(program::CAPTURE, &p::udp_v4(3)).expect(DROP, "policy_dropped");
    rules(&mut kernel, Action::Proxy(None));
    kernel.run(program::CAPTURE, &p::udp_v4(3)).expect(DROP, "policy_dropped");
    std::thread::sleep(std::time::Duration::from_millis(1200));
    kernel.run(program::CAPTURE, &p::udp_v4(3)).expect(STEERED, "assign_eopnotsupp");
}

fn fragments_share_the_verdict_of_their_datagram() {
    for (action, outcome) in [
        (Action::Drop, (DROP, "policy_dropped")),
        (Action::Pass, (PASS, "pass_policy")),
        (Action::Reject, (STEERED, "steered_fragment")),
    ] {
        let mut kernel = with(action);
        for fragment in p::fragment_v4(&p::udp_v4(3000), 1480, 7) {
            kernel.run(program::CAPTURE, &fragment).expect(outcome.0, outcome.1);
        }
    }
}
