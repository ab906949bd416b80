//! Headers: what passes for what they say, and what they must not hide.

use etherparse::IpNumber;

use tproxy_user::config::Scope;

use crate::kernel::{Kernel, PASS, STEERED, capture, usual};
use crate::packets::{self as p, Extension};
use tproxy_common::abi::program;

tests![
    what_is_not_for_a_proxy_passes_untouched,
    ip_options_and_extension_headers_do_not_hide_the_ports,
    cut_and_contradictory_headers_pass,
    so_many_extension_headers_are_followed,
    a_packet_that_another_hop_is_to_route_passes,
    a_length_that_ends_within_the_headers_is_malformed,
];

fn what_is_not_for_a_proxy_passes_untouched() {
    let cases: [(&str, Vec<u8>, &str); 18] = [
        ("ICMP", p::icmp_v4(), "pass_protocol"),
        ("ICMPv6 neighbour solicitation", p::icmp_v6(), "pass_protocol"),
        ("SCTP", p::with_protocol(p::syn_v4(), 132), "pass_protocol"),
        ("ESP", p::with_protocol(p::syn_v4(), 50), "pass_protocol"),
        ("IGMP", p::with_protocol(p::syn_v4(), 2), "pass_protocol"),
        ("an unknown protocol", p::with_protocol(p::syn_v4(), 253), "pass_protocol"),
        ("ARP", p::with_ethertype(p::syn_v4(), 0x0806), "pass_protocol"),
        ("MPLS", p::with_ethertype(p::syn_v4(), 0x8847), "pass_protocol"),
        ("multicast", p::udp_to_v4([239, 1, 2, 3]), "pass_special"),
        ("limited broadcast", p::udp_to_v4([255, 255, 255, 255]), "pass_special"),
        ("link-local", p::udp_to_v4([169, 254, 0, 1]), "pass_special"),
        ("loopback", p::udp_to_v4([127, 0, 0, 1]), "pass_special"),
        ("IPv6 multicast", p::udp_to_v6("ff02::fb"), "pass_special"),
        ("IPv6 link-local", p::udp_to_v6("fe80::1"), "pass_special"),
        // A proxy's socket would take it for 127.0.0.1.
        ("IPv4-mapped", p::udp_to_v6("::ffff:127.0.0.1"), "pass_special"),
        ("a VLAN tag in the frame", p::tagged(&p::syn_v4(), &[(0x8100, 5)]), "pass_protocol"),
        ("QinQ", p::tagged(&p::syn_v4(), &[(0x88a8, 5), (0x8100, 6)]), "pass_protocol"),
        ("another host's frame", p::to_other_host(p::syn_v4()), "pass_not_for_us"),
    ];
    for (what, packet, counter) in cases {
        let outcome = capture(&packet);
        assert_eq!((outcome.action, outcome.only_counter()), (PASS, counter), "{what}");
        assert_eq!((outcome.mark, outcome.packet == packet), (0, true), "{what} was changed");
    }
}

fn ip_options_and_extension_headers_do_not_hide_the_ports() {
    for packet in [p::syn_v4_with_options(), p::udp_v6_with_extensions()] {
        let mut kernel = Kernel::new(&usual());
        kernel.select(&Scope { ports: vec![(p::SERVER_PORT, p::SERVER_PORT)], ..Scope::default() });
        kernel.run(program::CAPTURE, &packet).expect(STEERED, "assign_eopnotsupp");
    }
}

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

fn so_many_extension_headers_are_followed() {
    let behind = |count| p::v6_with(&vec![Extension::Destination; count], IpNumber::UDP, &p::udp_v6(0)[54..]);
    capture(&behind(6)).expect(STEERED, "assign_eopnotsupp");
    capture(&behind(7)).expect(PASS, "pass_protocol");
}

fn a_packet_that_another_hop_is_to_route_passes() {
    let mut packet = p::v6_with(&[Extension::Routing], IpNumber::UDP, &p::udp_v6(0)[54..]);
    capture(&packet).expect(STEERED, "assign_eopnotsupp");
    packet[p::ETHERNET + 40 + 3] = 1;
    capture(&packet).expect(PASS, "pass_protocol");
}

fn a_length_that_ends_within_the_headers_is_malformed() {
    for (mut packet, at) in [(p::syn_v4(), 3), (p::syn_v6(), 5)] {
        packet[p::ETHERNET + at] -= 1;
        capture(&packet).expect(PASS, "malformed");
    }
}
