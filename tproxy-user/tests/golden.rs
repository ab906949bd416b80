//! Golden packets: the programs run on them in the kernel, by
//! `BPF_PROG_TEST_RUN`, and counters, mark and return code tell what was decided.
//!
//! Each test has a network namespace of its own, so it needs root. In a test
//! run the packet is not "at ingress", so that `bpf_sk_assign` answers
//! EOPNOTSUPP: this counter stands for "was handed to a socket".

mod golden {
    pub(crate) mod kernel;
    pub(crate) mod packets;
}

use golden::kernel::{DROP, Kernel, Outcome, PASS, STEERED, usual};
use golden::packets::{self as p, fragment_v4, fragment_v6};
use tproxy_common::abi::{Settings, Verdict, program};

const CAPTURE: &str = program::CAPTURE;
const UPLINK: &str = program::UPLINK;

/// Runs one packet through the capture program with the usual settings.
fn capture(packet: &[u8]) -> Outcome {
    Kernel::new(&usual()).run(CAPTURE, packet)
}

#[test]
fn the_verifier_takes_every_program_of_both_builds() {
    for log in [false, true] {
        for own_traffic in [0, 1] {
            golden::kernel::load_all(&Settings { own_traffic, ..usual() }, log);
        }
    }
}

#[test]
fn a_new_tcp_flow_goes_to_the_listener() {
    for packet in [p::syn_v4(), p::syn_v6()] {
        let mut kernel = Kernel::new(&usual());
        let outcome = kernel.run(CAPTURE, &packet);
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

#[test]
fn a_new_udp_flow_goes_to_the_listener() {
    for payload in [0, 1, 512, 1400] {
        for packet in [p::udp_v4(payload), p::udp_v6(payload)] {
            capture(&packet).expect(STEERED, "assign_eopnotsupp");
        }
    }
}

#[test]
fn mark_keeps_the_bits_outside_the_mask() {
    let settings = Settings { mark_value: 0x10, mark_mask: 0xf0, ..usual() };
    let outcome = Kernel::new(&settings).run_marked(CAPTURE, &p::syn_v4(), 0xabcd);
    assert_eq!(outcome.mark, 0xab1d);
}

#[test]
fn what_is_not_for_a_proxy_passes_untouched() {
    let cases: [(&str, Vec<u8>, &str); 16] = [
        ("ICMP", p::icmp_v4(), "pass_protocol"),
        ("ICMPv6 neighbour solicitation", p::icmp_v6(), "pass_protocol"),
        ("SCTP", p::with_protocol(p::syn_v4(), 132), "pass_protocol"),
        ("ESP", p::with_protocol(p::syn_v4(), 50), "pass_protocol"),
        ("IGMP", p::with_protocol(p::syn_v4(), 2), "pass_protocol"),
        ("an unknown protocol", p::with_protocol(p::syn_v4(), 253), "pass_protocol"),
        ("ARP", p::with_ethertype(p::syn_v4(), 0x0806), "pass_protocol"),
        ("MPLS", p::with_ethertype(p::syn_v4(), 0x8847), "pass_protocol"),
        ("an 802.1Q tag inside", p::with_ethertype(p::syn_v4(), 0x88a8), "pass_protocol"),
        ("multicast", p::udp_to_v4([239, 1, 2, 3]), "pass_special"),
        ("limited broadcast", p::udp_to_v4([255, 255, 255, 255]), "pass_special"),
        ("link-local", p::udp_to_v4([169, 254, 0, 1]), "pass_special"),
        ("loopback", p::udp_to_v4([127, 0, 0, 1]), "pass_special"),
        ("IPv6 multicast", p::udp_to_v6("ff02::fb"), "pass_special"),
        ("IPv6 link-local", p::udp_to_v6("fe80::1"), "pass_special"),
        ("another host's frame", p::to_other_host(p::syn_v4()), "pass_not_for_us"),
    ];
    for (what, packet, counter) in cases {
        let outcome = capture(&packet);
        assert_eq!((outcome.action, outcome.only_counter()), (PASS, counter), "{what}");
        assert_eq!((outcome.mark, outcome.packet == packet), (0, true), "{what} was changed");
    }
}

#[test]
fn own_addresses_pass() {
    for packet in [p::syn_v4(), p::udp_v4(10)] {
        let mut kernel = Kernel::new(&usual());
        kernel.add_local(p::SERVER_V4);
        kernel.run(CAPTURE, &packet).expect(PASS, "pass_local");
    }
}

#[test]
fn a_connection_that_is_older_passes() {
    capture(&p::ack_v4()).expect(PASS, "pass_midstream");
    capture(&p::syn_ack_v4()).expect(PASS, "pass_midstream");
    capture(&p::rst_v4()).expect(PASS, "pass_midstream");
}

#[test]
fn a_late_packet_of_a_proxied_connection_stays_here() {
    let mut kernel = Kernel::new(&usual());
    kernel.run(CAPTURE, &p::syn_v4());
    for late in [p::ack_v4(), p::fin_v4(), p::rst_v4()] {
        let outcome = kernel.run(CAPTURE, &late);
        outcome.expect(STEERED, "steered_late");
        assert_eq!(outcome.mark, 1);
    }
}

#[test]
fn without_a_listener_fail_decides() {
    for (fail_open, action, counter) in [(1, PASS, "fail_open"), (0, DROP, "fail_closed")] {
        for packet in [p::syn_v4(), p::syn_v6(), p::udp_v4(3), p::udp_v6(3)] {
            let mut kernel = Kernel::without_listeners(&Settings { fail_open, ..usual() });
            kernel.run(CAPTURE, &packet).expect(action, counter);
        }
    }
}

#[test]
fn a_port_used_again_while_no_proxy_listens_stays_passed() {
    let mut kernel = Kernel::new(&usual());
    kernel.run(CAPTURE, &p::syn_v4());
    kernel.run(CAPTURE, &p::rst_v4());
    kernel.remove_listeners();
    kernel.run(CAPTURE, &p::syn_v4()).expect(PASS, "fail_open");
    // Were it still taken for a proxied one, the client would get a reset.
    kernel.run(CAPTURE, &p::ack_v4()).expect(PASS, "pass_policy");
}

#[test]
fn listeners_are_found_by_port_too() {
    // What Linux 5.7 does; the listeners of this kernel answer as well.
    for packet in [p::syn_v4(), p::syn_v6(), p::udp_v4(3), p::udp_v6(3)] {
        let mut kernel = Kernel::by_tuple();
        kernel.run(CAPTURE, &packet).expect(STEERED, "assign_eopnotsupp");
    }
}

#[test]
fn protocols_and_families_are_chosen() {
    let base = usual();
    let cases = [
        (Settings { tcp: 0, ..base }, p::syn_v4()),
        (Settings { udp: 0, ..base }, p::udp_v4(3)),
        (Settings { v4: 0, ..base }, p::syn_v4()),
        (Settings { v6: 0, ..base }, p::udp_v6(3)),
    ];
    for (settings, packet) in cases {
        let mut kernel = Kernel::new(&settings);
        kernel.run(CAPTURE, &packet).expect(PASS, "pass_policy");
        assert_eq!(kernel.only_flow().1.verdict, Verdict::Pass as u8);
    }
}

#[test]
fn ports_are_chosen() {
    let settings = Settings { any_port: 0, ..usual() };
    for (ports, steered) in
        [(vec![p::SERVER_PORT], true), (vec![p::SERVER_PORT - 1, p::SERVER_PORT + 1], false)]
    {
        let mut kernel = Kernel::new(&settings);
        kernel.set_ports(&ports);
        let outcome = kernel.run(CAPTURE, &p::syn_v4());
        if steered {
            outcome.expect(STEERED, "assign_eopnotsupp");
        } else {
            outcome.expect(PASS, "pass_policy");
        }
    }
}

#[test]
fn ip_options_and_extension_headers_do_not_hide_the_ports() {
    for packet in [p::syn_v4_with_options(), p::udp_v6_with_extensions()] {
        let mut kernel = Kernel::new(&Settings { any_port: 0, ..usual() });
        kernel.set_ports(&[p::SERVER_PORT]);
        kernel.run(CAPTURE, &packet).expect(STEERED, "assign_eopnotsupp");
    }
}

#[test]
fn cut_and_contradictory_headers_pass() {
    let syn = p::syn_v4();
    capture(&syn[..14 + 20 + 8]).expect(PASS, "truncated");
    capture(&p::udp_v6(0)[..14 + 40 + 2]).expect(PASS, "truncated");
    let mut short_ihl = p::syn_v4();
    short_ihl[14] = 0x44;
    capture(&short_ihl).expect(PASS, "malformed");
    let mut no_tcp_header = p::syn_v4();
    no_tcp_header[14 + 20 + 12] = 0x10;
    capture(&no_tcp_header).expect(PASS, "malformed");
}

#[test]
fn fragments_are_marked_alike_in_any_order() {
    for whole in [p::udp_v4(3000), p::udp_v6(3000)] {
        let fragments =
            if whole[12] == 0x08 { fragment_v4(&whole, 1480, 77) } else { fragment_v6(&whole, 1432, 77) };
        assert_eq!(fragments.len(), 3);
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
            let mut kernel = Kernel::new(&usual());
            let mut bytes = 0;
            for i in order {
                let outcome = kernel.run(CAPTURE, &fragments[i]);
                assert_eq!((outcome.action, outcome.mark), (STEERED, 1), "fragment {i} of {order:?}");
                bytes += fragments[i].len() as u64 - 14;
            }
            let (key, flow) = kernel.only_flow();
            assert_eq!(key.destination_port, p::SERVER_PORT);
            assert_eq!((flow.packets_up, flow.bytes_up), (3, bytes), "{order:?}");
        }
    }
}

#[test]
fn fragments_of_what_is_not_captured_pass() {
    let mut kernel = Kernel::new(&Settings { udp: 0, ..usual() });
    for fragment in fragment_v4(&p::udp_v4(3000), 1480, 5) {
        let outcome = kernel.run(CAPTURE, &fragment);
        assert_eq!((outcome.action, outcome.mark), (PASS, 0));
    }
}

#[test]
fn answers_to_the_outside_are_not_captured() {
    let mut kernel = Kernel::new(&usual());
    let request = p::udp_v4(20);
    kernel.run_forwarded(program::REPLY, &request);
    kernel.run(CAPTURE, &p::reply_of(&request)).expect(PASS, "pass_reply");
}

#[test]
fn fragments_too_ask_whether_a_proxy_listens() {
    for (fail_open, action, counter) in [(1, PASS, "fail_open"), (0, DROP, "fail_closed")] {
        let mut kernel = Kernel::without_listeners(&Settings { fail_open, ..usual() });
        for fragment in fragment_v4(&p::udp_v4(3000), 1480, 6) {
            kernel.run(CAPTURE, &fragment).expect(action, counter);
        }
    }
}

#[test]
fn without_a_proxy_late_packets_go_their_way() {
    let mut kernel = Kernel::new(&usual());
    kernel.run(CAPTURE, &p::syn_v4());
    kernel.remove_listeners();
    kernel.run(CAPTURE, &p::ack_v4()).expect(PASS, "fail_open");
}

#[test]
fn before_sk_lookup_fragments_are_forwarded() {
    let mut kernel = Kernel::new(&Settings { sk_lookup: 0, ..usual() });
    for fragment in fragment_v6(&p::udp_v6(3000), 1432, 6) {
        kernel.run(CAPTURE, &fragment).expect(PASS, "pass_policy");
    }
}

#[test]
fn upstream_side_takes_nothing_without_a_socket() {
    for packet in [p::syn_v4(), p::ack_v4(), p::udp_v6(9)] {
        Kernel::new(&usual()).run(UPLINK, &packet).expect(PASS, "pass_no_socket");
    }
}

#[test]
fn replies_are_counted() {
    let mut kernel = Kernel::new(&usual());
    let request = p::udp_v4(20);
    kernel.run(CAPTURE, &request);
    kernel.run(program::REPLY, &p::reply_of(&request));
    let (_, flow) = kernel.only_flow();
    assert_eq!((flow.packets_down, flow.bytes_down), (1, request.len() as u64 - 14));
}

#[test]
fn own_packets_are_turned_back_and_those_of_the_proxy_are_not() {
    let settings = Settings { own_traffic: 1, ..usual() };
    let mut kernel = Kernel::new(&settings);
    kernel.run_marked(program::OWN, &p::syn_v4(), 2).expect(PASS, "pass_own_mark");
    let outcome = kernel.run(program::OWN, &p::syn_v4());
    assert_eq!(outcome.counters, [("own_redirected", 1), ("flows_created", 1)]);
    let outcome = kernel.run(program::LOOPBACK, &p::syn_v4());
    assert_eq!((outcome.action, outcome.mark), (STEERED, 3));
}

#[test]
fn plain_loopback_traffic_is_left_alone() {
    let mut kernel = Kernel::new(&Settings { own_traffic: 1, ..usual() });
    kernel.add_local(p::SERVER_V4);
    kernel.run(program::LOOPBACK, &p::syn_v4()).expect(PASS, "pass_local");
    kernel.run(program::LOOPBACK, &p::udp_to_v4([127, 0, 0, 53])).expect(PASS, "pass_special");
}
