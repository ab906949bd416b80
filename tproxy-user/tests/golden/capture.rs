//! What the capture program takes, and what it leaves.

use tproxy_user::config::Scope;

use crate::kernel::{Context, Kernel, PASS, STEERED, capture, usual};
use crate::packets as p;
use tproxy_common::abi::{Settings, Verdict, program};

tests![
    a_new_tcp_flow_goes_to_the_listener,
    a_new_udp_flow_goes_to_the_listener,
    a_merged_packet_counts_as_its_segments,
    mark_keeps_the_bits_outside_the_mask,
    own_addresses_pass,
    a_connection_that_is_older_passes,
    a_late_packet_of_a_proxied_connection_stays_here,
    with_early_demux_the_stack_finds_the_socket,
    answers_to_the_outside_are_not_captured,
    protocols_and_families_are_chosen,
    ports_are_chosen,
];

fn a_new_tcp_flow_goes_to_the_listener() {
    for packet in [p::syn_v4(), p::syn_v6()] {
        let mut kernel = Kernel::new(&usual());
        let outcome = kernel.run(program::CAPTURE, &packet);
        outcome.expect(STEERED, "assign_eopnotsupp");
        assert_eq!(outcome.mark, 1);
        let (key, flow) = kernel.only_flow();
        assert_eq!(
            (key.protocol, key.client_port, key.destination_port),
            (6, p::CLIENT_PORT, p::SERVER_PORT)
        );
        assert_eq!((flow.packets_up, flow.verdict), (1, Verdict::Proxy as u8));
        assert_eq!(flow.bytes_up, packet.len() as u64 - 14);
    }
}

fn a_new_udp_flow_goes_to_the_listener() {
    for payload in [0, 1, 512, 1400] {
        for packet in [p::udp_v4(payload), p::udp_v6(payload)] {
            capture(&packet).expect(STEERED, "assign_eopnotsupp");
        }
    }
}

fn mark_keeps_the_bits_outside_the_mask() {
    let settings = Settings { mark_value: 0x10, mark_mask: 0xf0, ..usual() };
    let outcome = Kernel::new(&settings).run_marked(program::CAPTURE, &p::syn_v4(), 0xabcd);
    assert_eq!(outcome.mark, 0xab1d);
}

fn own_addresses_pass() {
    for packet in [p::syn_v4(), p::udp_v4(10)] {
        let mut kernel = Kernel::new(&usual());
        kernel.add_local(p::SERVER_V4);
        kernel.run(program::CAPTURE, &packet).expect(PASS, "pass_local");
    }
}

fn a_connection_that_is_older_passes() {
    capture(&p::ack_v4()).expect(PASS, "pass_midstream");
    capture(&p::syn_ack_v4()).expect(PASS, "pass_midstream");
    capture(&p::rst_v4()).expect(PASS, "pass_midstream");
}

fn a_late_packet_of_a_proxied_connection_stays_here() {
    let mut kernel = Kernel::new(&usual());
    kernel.run(program::CAPTURE, &p::syn_v4());
    for late in [p::ack_v4(), p::fin_v4(), p::rst_v4()] {
        let outcome = kernel.run(program::CAPTURE, &late);
        outcome.expect(STEERED, "steered_late");
        assert_eq!(outcome.mark, 1);
    }
}

fn with_early_demux_the_stack_finds_the_socket() {
    let mut kernel = Kernel::new(&Settings { early_demux: 1, ..usual() });
    kernel.run(program::CAPTURE, &p::ack_v4()).expect(PASS, "pass_midstream");
    kernel.run(program::CAPTURE, &p::syn_v4());
    for packet in [p::ack_v4(), p::fin_v4(), p::rst_v4()] {
        let outcome = kernel.run(program::CAPTURE, &packet);
        outcome.expect(STEERED, "steered_established");
        assert_eq!(outcome.mark, 1);
    }
}

fn answers_to_the_outside_are_not_captured() {
    let mut kernel = Kernel::new(&usual());
    let request = p::udp_v4(20);
    kernel.run_forwarded(program::REPLY, &request);
    kernel.run(program::CAPTURE, &p::reply_of(&request)).expect(PASS, "pass_reply");
}

fn protocols_and_families_are_chosen() {
    let cases = [
        (Scope { tcp: false, ..Scope::default() }, p::syn_v4()),
        (Scope { udp: false, ..Scope::default() }, p::udp_v4(3)),
        (Scope { v4: false, ..Scope::default() }, p::syn_v4()),
        (Scope { v6: false, ..Scope::default() }, p::udp_v6(3)),
    ];
    for (scope, packet) in cases {
        let mut kernel = Kernel::new(&usual());
        kernel.select(&scope);
        kernel.run(program::CAPTURE, &packet).expect(PASS, "pass_policy");
        assert_eq!(kernel.only_flow().1.verdict, Verdict::Pass as u8);
    }
}

fn ports_are_chosen() {
    for (ports, steered) in
        [(vec![p::SERVER_PORT], true), (vec![p::SERVER_PORT - 1, p::SERVER_PORT + 1], false)]
    {
        let mut kernel = Kernel::new(&usual());
        let ports = ports.into_iter().map(|port| (port, port)).collect();
        kernel.select(&Scope { ports, ..Scope::default() });
        let outcome = kernel.run(program::CAPTURE, &p::syn_v4());
        if steered {
            outcome.expect(STEERED, "assign_eopnotsupp");
        } else {
            outcome.expect(PASS, "pass_policy");
        }
    }
}

fn a_merged_packet_counts_as_its_segments() {
    const HEADERS: u64 = 20 + 8;
    let segments = Context { gso_segs: 3, gso_size: 400, ..Context::default() };
    // A guest's packet, which nobody has counted.
    let uncounted = Context { gso_segs: 0, ..segments };
    for context in [segments, uncounted] {
        let mut kernel = Kernel::new(&usual());
        kernel.run_with(program::CAPTURE, &p::udp_v4(1000), context).expect(STEERED, "assign_eopnotsupp");
        let (_, flow) = kernel.only_flow();
        assert_eq!((flow.packets_up, flow.bytes_up), (3, 1000 + 3 * HEADERS));
    }
}
