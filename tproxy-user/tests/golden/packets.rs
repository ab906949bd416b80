//! Packets as they stand on an Ethernet link.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{IpNumber, PacketBuilder};
use tproxy_common::abi::{Family, TCP};
use tproxy_common::policy::Known;
use tproxy_user::policy::facts;

pub(crate) const CLIENT_V4: [u8; 4] = [192, 0, 2, 2];
pub(crate) const SERVER_V4: [u8; 4] = [203, 0, 113, 7];
const CLIENT_V6: &str = "2001:db8:1::2";
const SERVER_V6: &str = "2001:db8:2::7";
pub(crate) const CLIENT_PORT: u16 = 40_000;
pub(crate) const SERVER_PORT: u16 = 4_433;

/// Length of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;

fn v6(text: &str) -> [u8; 16] {
    text.parse::<Ipv6Addr>().expect("an IPv6 address").octets()
}

/// In a test run the device is the loopback device, whose address is all zero.
fn ethernet() -> etherparse::PacketBuilderStep<etherparse::Ethernet2Header> {
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [0; 6])
}

fn v4_to(destination: [u8; 4]) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    ethernet().ipv4(CLIENT_V4, destination, 64)
}

fn v6_to(destination: &str) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    ethernet().ipv6(v6(CLIENT_V6), v6(destination), 64)
}

fn tcp(
    ip: etherparse::PacketBuilderStep<etherparse::IpHeaders>,
    flags: impl FnOnce(
        etherparse::PacketBuilderStep<etherparse::TcpHeader>,
    ) -> etherparse::PacketBuilderStep<etherparse::TcpHeader>,
) -> Vec<u8> {
    let builder = flags(ip.tcp(CLIENT_PORT, SERVER_PORT, 1000, 65_000));
    let mut packet = Vec::new();
    builder.write(&mut packet, &[]).expect("a valid packet");
    packet
}

fn udp(ip: etherparse::PacketBuilderStep<etherparse::IpHeaders>, payload: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    ip.udp(CLIENT_PORT, SERVER_PORT).write(&mut packet, &vec![0x5a; payload]).expect("a valid packet");
    packet
}

pub(crate) fn syn_v4() -> Vec<u8> {
    tcp(v4_to(SERVER_V4), etherparse::PacketBuilderStep::syn)
}

pub(crate) fn syn_v6() -> Vec<u8> {
    tcp(v6_to(SERVER_V6), etherparse::PacketBuilderStep::syn)
}

pub(crate) fn ack_v4() -> Vec<u8> {
    tcp(v4_to(SERVER_V4), |t| t.ack(7))
}

pub(crate) fn syn_ack_v4() -> Vec<u8> {
    tcp(v4_to(SERVER_V4), |t| t.syn().ack(7))
}

pub(crate) fn fin_v4() -> Vec<u8> {
    tcp(v4_to(SERVER_V4), |t| t.fin().ack(7))
}

pub(crate) fn rst_v4() -> Vec<u8> {
    tcp(v4_to(SERVER_V4), etherparse::PacketBuilderStep::rst)
}

pub(crate) fn udp_v4(payload: usize) -> Vec<u8> {
    udp(v4_to(SERVER_V4), payload)
}

pub(crate) fn udp_v6(payload: usize) -> Vec<u8> {
    udp(v6_to(SERVER_V6), payload)
}

pub(crate) fn udp_to_v4(destination: [u8; 4]) -> Vec<u8> {
    udp(v4_to(destination), 4)
}

pub(crate) fn udp_to_v6(destination: &str) -> Vec<u8> {
    udp(v6_to(destination), 4)
}

pub(crate) fn icmp_v4() -> Vec<u8> {
    let mut packet = Vec::new();
    v4_to(SERVER_V4).icmpv4_echo_request(1, 1).write(&mut packet, &[0; 32]).expect("a valid packet");
    packet
}

pub(crate) fn icmp_v6() -> Vec<u8> {
    let mut packet = Vec::new();
    v6_to("2001:db8:2::7").icmpv6_raw(135, 0, [0; 4]).write(&mut packet, &[0; 16]).expect("a valid packet");
    packet
}

pub(crate) fn with_protocol(mut packet: Vec<u8>, protocol: u8) -> Vec<u8> {
    packet[ETHERNET + 9] = protocol;
    packet
}

pub(crate) fn with_ethertype(mut packet: Vec<u8>, ethertype: u16) -> Vec<u8> {
    packet[12..14].copy_from_slice(&ethertype.to_be_bytes());
    packet
}

/// To another address (IPv4).
pub(crate) fn with_destination(mut packet: Vec<u8>, destination: [u8; 4]) -> Vec<u8> {
    packet[ETHERNET + 16..ETHERNET + 20].copy_from_slice(&destination);
    packet
}

/// With or without the DF bit (IPv4).
pub(crate) fn with_dont_fragment(mut packet: Vec<u8>, dont_fragment: bool) -> Vec<u8> {
    packet[ETHERNET + 6] = packet[ETHERNET + 6] & !0x40 | if dont_fragment { 0x40 } else { 0 };
    packet
}

pub(crate) fn to_other_host(mut packet: Vec<u8>) -> Vec<u8> {
    packet[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    packet
}

/// The packet with addresses and ports swapped (IPv4, no options).
pub(crate) fn reply_of(packet: &[u8]) -> Vec<u8> {
    let mut reply = packet.to_vec();
    let (source, destination, ports) = (ETHERNET + 12, ETHERNET + 16, ETHERNET + 20);
    reply[source..source + 4].copy_from_slice(&packet[destination..destination + 4]);
    reply[destination..destination + 4].copy_from_slice(&packet[source..source + 4]);
    reply[ports..ports + 2].copy_from_slice(&packet[ports + 2..ports + 4]);
    reply[ports + 2..ports + 4].copy_from_slice(&packet[ports..ports + 2]);
    reply
}

/// An IPv4 packet with so many words of options put into its header.
pub(crate) fn with_options(packet: &[u8], words: usize) -> Vec<u8> {
    let (header, rest) = packet.split_at(ETHERNET + 20);
    let mut packet = [header, &vec![1; words * 4], rest].concat();
    packet[ETHERNET] += u8::try_from(words).expect("ten at most");
    set_length(&mut packet);
    packet
}

/// The first packet of the flow of which this is known.
pub(crate) fn opening(seen: &facts::Packet) -> Vec<u8> {
    let Known::Is((source_port, destination_port)) = seen.ports else { panic!("no ports") };
    let v4 = seen.family == Family::V4;
    let mut frame = match (v4, seen.protocol == TCP) {
        (true, true) => syn_v4(),
        (true, false) => udp_v4(4),
        (false, true) => syn_v6(),
        (false, false) => udp_v6(4),
    };
    let (addresses, length, ports) = if v4 { (12, 4, 20) } else { (8, 16, 40) };
    let mut put = |at: usize, bytes: &[u8]| frame[ETHERNET + at..][..bytes.len()].copy_from_slice(bytes);
    put(addresses, &seen.source[16 - length..]);
    put(addresses + length, &seen.destination[16 - length..]);
    put(ports, &source_port.to_be_bytes());
    put(ports + 2, &destination_port.to_be_bytes());
    // Each family has its octet elsewhere; the two bits below are set, so that they are told apart.
    let services = seen.dscp << 2 | 3;
    if v4 {
        put(1, &[services]);
    } else {
        put(0, &[0x60 | services >> 4, services << 4]);
    }
    if let Some(mac) = seen.mac {
        frame[6..12].copy_from_slice(&mac.to_be_bytes()[2..]);
    }
    frame
}

/// Record route, 40 bytes of options (RFC 791).
pub(crate) fn syn_v4_with_options() -> Vec<u8> {
    let mut packet = with_options(&syn_v4(), 10);
    packet[ETHERNET + 20..ETHERNET + 23].copy_from_slice(&[7, 39, 4]);
    packet
}

/// With some payload behind it (IPv4).
pub(crate) fn with_payload(mut packet: Vec<u8>, bytes: usize) -> Vec<u8> {
    packet.resize(packet.len() + bytes, 0x5a);
    set_length(&mut packet);
    packet
}

/// Makes the length in the IP header that of the packet.
fn set_length(packet: &mut [u8]) {
    let (at, before) = if packet[ETHERNET] >> 4 == 4 { (2, ETHERNET) } else { (4, ETHERNET + 40) };
    let length = u16::try_from(packet.len() - before).expect("short");
    packet[ETHERNET + at..ETHERNET + at + 2].copy_from_slice(&length.to_be_bytes());
}

/// With VLAN tags (type and control information, the outer first) in the frame.
pub(crate) fn tagged(packet: &[u8], tags: &[(u16, u16)]) -> Vec<u8> {
    let (addresses, rest) = packet.split_at(12);
    let tags = tags.iter().flat_map(|(kind, tci)| [kind.to_be_bytes(), tci.to_be_bytes()]).flatten();
    addresses.iter().copied().chain(tags).chain(rest.iter().copied()).collect()
}

/// An IPv4 packet with this behind its header.
pub(crate) fn v4_with(protocol: IpNumber, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    v4_to(SERVER_V4).write(&mut packet, protocol, payload).expect("a valid packet");
    packet
}

/// An IPv6 extension header.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Extension {
    HopByHop,
    /// All segments used up.
    Routing,
    /// An atomic fragment.
    Fragment,
    Authentication,
    Destination,
}

impl Extension {
    const fn number(self) -> IpNumber {
        match self {
            Self::HopByHop => IpNumber::IPV6_HEADER_HOP_BY_HOP,
            Self::Routing => IpNumber::IPV6_ROUTE_HEADER,
            Self::Fragment => IpNumber::IPV6_FRAGMENTATION_HEADER,
            Self::Authentication => IpNumber::AUTHENTICATION_HEADER,
            Self::Destination => IpNumber::IPV6_DESTINATION_OPTIONS,
        }
    }

    /// The header itself, which says what is next.
    fn bytes(self, next: IpNumber) -> Vec<u8> {
        match self {
            // PadN; the length of the authentication header is in units of 4, but for the first 8 bytes.
            Self::HopByHop | Self::Destination => vec![next.0, 0, 1, 4, 0, 0, 0, 0],
            Self::Routing => vec![next.0, 0, 4, 0, 0, 0, 0, 0],
            Self::Fragment => vec![next.0, 0, 0, 0, 0, 0, 0, 99],
            Self::Authentication => {
                vec![next.0, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
            }
        }
    }
}

/// An IPv6 packet with these extension headers, and this behind them.
pub(crate) fn v6_with(chain: &[Extension], protocol: IpNumber, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    v6_to(SERVER_V6).write(&mut packet, protocol, payload).expect("a valid packet");
    for (i, extension) in chain.iter().enumerate().rev() {
        let next = chain.get(i + 1).map_or(protocol, |next| next.number());
        packet.splice(ETHERNET + 40..ETHERNET + 40, extension.bytes(next));
        packet[ETHERNET + 6] = extension.number().0;
    }
    set_length(&mut packet);
    packet
}

/// Hop-by-hop options, a used-up routing header and destination options before UDP.
pub(crate) fn udp_v6_with_extensions() -> Vec<u8> {
    let plain = udp_v6(16);
    let mut packet = plain[..ETHERNET + 40].to_vec();
    packet[ETHERNET + 6] = 0;
    packet.extend_from_slice(&[43, 0, 1, 4, 0, 0, 0, 0]);
    packet.extend_from_slice(&[60, 0, 4, 0, 0, 0, 0, 0]);
    packet.extend_from_slice(&[17, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    packet.extend_from_slice(&plain[ETHERNET + 40..]);
    set_length(&mut packet);
    packet
}

/// Cuts an IPv4 packet into fragments with `size` bytes of payload (a multiple of 8).
pub(crate) fn fragment_v4(packet: &[u8], size: usize, id: u16) -> Vec<Vec<u8>> {
    let (header, payload) = packet.split_at(ETHERNET + 20);
    let pieces: Vec<_> = payload.chunks(size).collect();
    (0..pieces.len())
        .map(|i| {
            let mut fragment = header.to_vec();
            let more = if i + 1 < pieces.len() { 0x2000 } else { 0 };
            let field = u16::try_from(i * size / 8).expect("short") | more;
            let total = u16::try_from(20 + pieces[i].len()).expect("short");
            fragment[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&total.to_be_bytes());
            fragment[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&id.to_be_bytes());
            fragment[ETHERNET + 6..ETHERNET + 8].copy_from_slice(&field.to_be_bytes());
            fragment.extend_from_slice(pieces[i]);
            fragment
        })
        .collect()
}

/// Cuts an IPv6 packet into fragments with `size` bytes of payload (a multiple of 8).
pub(crate) fn fragment_v6(packet: &[u8], size: usize, id: u32) -> Vec<Vec<u8>> {
    let (header, payload) = packet.split_at(ETHERNET + 40);
    let pieces: Vec<_> = payload.chunks(size).collect();
    (0..pieces.len())
        .map(|i| {
            let mut fragment = header.to_vec();
            let field = u16::try_from(i * size).expect("short") | u16::from(i + 1 < pieces.len());
            let length = u16::try_from(8 + pieces[i].len()).expect("short");
            fragment[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&length.to_be_bytes());
            fragment[ETHERNET + 6] = 44;
            fragment.extend_from_slice(&[header[ETHERNET + 6], 0]);
            fragment.extend_from_slice(&field.to_be_bytes());
            fragment.extend_from_slice(&id.to_be_bytes());
            fragment.extend_from_slice(pieces[i]);
            fragment
        })
        .collect()
}

/// The bytes of an address of either family.
pub(crate) fn octets(address: &str) -> Vec<u8> {
    match address.parse::<IpAddr>().expect("an address") {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

pub(crate) fn mapped(v4: [u8; 4]) -> [u8; 16] {
    Ipv4Addr::from(v4).to_ipv6_mapped().octets()
}
