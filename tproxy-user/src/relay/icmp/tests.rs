//! Messages read back by another parser.

use etherparse::{Icmpv4Slice, Icmpv4Type, Icmpv6Slice, Icmpv6Type, LaxSlicedPacket, TransportSlice};
use etherparse::{icmpv4, icmpv6};

use super::*;

const ROUTER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 9, 9, 9));

fn addresses(client: &str, destination: &str) -> (ClientAddr, OrigDst) {
    let parse = |text: &str| text.parse::<SocketAddr>().expect("an address");
    (parse(client).into(), parse(destination).into())
}

/// The quoted packet must be the client's.
fn expect_quote(quoted: &[u8], ports: (u16, u16)) {
    let packet = LaxSlicedPacket::from_ip(quoted).expect("an IP packet");
    if let Some(etherparse::LaxNetSlice::Ipv4(ip)) = &packet.net {
        let header = ip.header().to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
    }
    match packet.transport {
        Some(TransportSlice::Udp(udp)) => assert_eq!((udp.source_port(), udp.destination_port()), ports),
        other => panic!("{other:?}"),
    }
}

#[test]
fn fragmentation_needed_tells_the_mtu() {
    let (client, destination) = addresses("192.0.2.2:4000", "198.51.100.7:53");
    let error = IcmpError { offender: ROUTER, kind: 3, code: 4, info: 1280 };
    for length in [0, 1, 8, 519, 520, 521, 1400] {
        let message = error.message(client, destination, &vec![0x5a; length]).expect("one family");
        let icmp = Icmpv4Slice::from_slice(&message).expect("ICMP");
        let header = icmp.icmp_type().calc_checksum(icmp.payload());
        assert_eq!(header, icmp.checksum());
        let expected = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1280 };
        assert_eq!(icmp.icmp_type(), Icmpv4Type::DestinationUnreachable(expected));
        assert_eq!(message.len(), (8 + 28 + length).min(576 - 20));
        expect_quote(icmp.payload(), (4000, 53));
    }
}

#[test]
fn packet_too_big_tells_the_mtu() {
    let (client, destination) = addresses("[2001:db8::2]:4000", "[2001:db8:1::7]:53");
    let error = IcmpError { offender: ROUTER, kind: 2, code: 0, info: 1400 };
    let message = error.message(client, destination, &[0x5a; 1400]).expect("one family");
    let icmp = Icmpv6Slice::from_slice(&message).expect("ICMP");
    assert_eq!(icmp.icmp_type(), Icmpv6Type::PacketTooBig { mtu: 1400 });
    assert_eq!(message.len(), 1280 - 40);
    expect_quote(icmp.payload(), (4000, 53));
}

#[test]
fn errors_of_sending_are_those_of_a_router() {
    let of = |errno, here: IpAddr| IcmpError::of_send(errno, here).map(|error| (error.kind, error.code));
    let v6: IpAddr = "2001:db8::1".parse().expect("an address");
    assert_eq!(of(libc::ENETUNREACH, ROUTER), Some((3, 0)));
    assert_eq!(of(libc::EHOSTUNREACH, ROUTER), Some((3, 1)));
    assert_eq!(of(libc::EACCES, ROUTER), Some((3, 13)));
    assert_eq!(of(libc::ENETUNREACH, v6), Some((1, 0)));
    assert_eq!(of(libc::EACCES, v6), Some((1, 1)));
    assert_eq!(of(libc::EINVAL, ROUTER), None, "a blackhole route is silent");
    assert_eq!(of(libc::ENOBUFS, v6), None);
    let (v6, v4) = addresses("[2001:db8::2]:1", "192.0.2.1:1");
    let error = IcmpError { offender: ROUTER, kind: 3, code: 1, info: 0 };
    assert_eq!(error.message(v6, v4, &[]), None);
    assert_eq!(icmpv6::TYPE_DST_UNREACH, UNREACHABLE_V6);
}

#[test]
fn a_flood_of_errors_is_thinned() {
    let budget = Budget::new();
    let start = Instant::now();
    let sent = (0..10_000).filter(|_| budget.take(start)).count();
    assert_eq!(sent, 50);
    let later = start + Duration::from_secs(5);
    assert_eq!((0..10_000).filter(|_| budget.take(later)).count(), 50);
    let spread = (1..=1000).filter(|i| budget.take(later + Duration::from_millis(*i))).count();
    assert_eq!(spread, 1000);
}

#[test]
fn an_error_about_a_target_is_one_about_the_destination() {
    let [v4, v6]: [IpAddr; 2] =
        ["192.0.2.1", "2001:db8::1"].map(|address| address.parse().expect("an address"));
    let error = |offender, kind, code, info| IcmpError { offender, kind, code, info };
    let here: IpAddr = "::1".parse().expect("an address");
    for refusal in [IcmpError::port_unreachable(ROUTER), IcmpError::port_unreachable(here)] {
        assert_eq!(refusal.of_target(v4), Some(error(v4, 3, 3, 0)));
        assert_eq!(refusal.of_target(v6), Some(error(v6, 1, 4, 0)));
    }
    assert_eq!(error(ROUTER, 3, 4, 1300).of_target(v4), Some(error(v4, 3, 4, 1300)));
    assert_eq!(error(ROUTER, 3, 4, 1300).of_target(v6), None);
}
