//! The corpus: packets of every shape, each with a name.

use etherparse::{IpNumber, TcpHeader, UdpHeader};

use crate::kernel::Context;
use crate::packets as p;

/// A packet of the corpus.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    /// From the Ethernet header on.
    pub(crate) frame: Vec<u8>,
    pub(crate) context: Context,
}

fn case(name: impl Into<String>, frame: Vec<u8>) -> Case {
    Case { name: name.into(), frame, context: Context::default() }
}

/// All of them.
pub(crate) fn all() -> Vec<Case> {
    let groups: [fn() -> Vec<Case>; 9] =
        [plain, link_layer, protocols, addresses, options, extensions, fragments, broken, merged];
    groups.iter().flat_map(|group| group()).chain(cut()).collect()
}

/// What most traffic is.
fn plain() -> Vec<Case> {
    let mut cases = vec![
        case("SYN, IPv4", p::syn_v4()),
        case("SYN, IPv6", p::syn_v6()),
        case("ACK", p::ack_v4()),
        case("SYN and ACK", p::syn_ack_v4()),
        case("FIN", p::fin_v4()),
        case("RST", p::rst_v4()),
    ];
    for payload in [0, 1, 512, 1472] {
        cases.push(case(format!("UDP of {payload} bytes, IPv4"), p::udp_v4(payload)));
        cases.push(case(format!("UDP of {payload} bytes, IPv6"), p::udp_v6(payload)));
    }
    for flags in 0..=0xff {
        let mut frame = p::syn_v4();
        frame[p::ETHERNET + 20 + 13] = flags;
        cases.push(case(format!("TCP flags {flags:#04x}"), frame));
    }
    let marked = Context { mark: 0xab02, ..Context::default() };
    cases.push(Case { context: marked, ..case("a mark", p::syn_v4()) });
    cases
}

/// Other frames: what the stack leaves of VLAN tags in a packet, too.
fn link_layer() -> Vec<Case> {
    const CVLAN: u16 = 0x8100;
    const SVLAN: u16 = 0x88a8;
    let mut cases = vec![
        case("a VLAN tag", p::tagged(&p::syn_v4(), &[(CVLAN, 5)])),
        case("a priority tag", p::tagged(&p::syn_v4(), &[(CVLAN, 0xe000)])),
        case("a service tag", p::tagged(&p::udp_v6(9), &[(SVLAN, 5)])),
        case("QinQ", p::tagged(&p::udp_v4(9), &[(SVLAN, 5), (CVLAN, 6)])),
        case("QinQ of C-tags", p::tagged(&p::udp_v4(9), &[(CVLAN, 5), (CVLAN, 6)])),
        case("IPv6 said to be IPv4", p::with_ethertype(p::syn_v6(), 0x0800)),
        case("IPv4 said to be IPv6", p::with_ethertype(p::syn_v4(), 0x86dd)),
    ];
    for ethertype in [0x0026, 0x0806, 0x22f0, 0x8035, 0x8847, 0x8863, 0x8864, 0x888e, 0x88cc, 0x9100, 0xffff]
    {
        cases.push(case(format!("EtherType {ethertype:#06x}"), p::with_ethertype(p::syn_v4(), ethertype)));
    }
    for (name, address) in [
        ("another host", [2, 0, 0, 0, 0, 9]),
        ("broadcast", [0xff; 6]),
        ("multicast", [1, 0, 0x5e, 1, 2, 3]),
        ("IPv6 multicast", [0x33, 0x33, 0, 0, 0, 1]),
    ] {
        let mut frame = p::udp_v4(4);
        frame[..6].copy_from_slice(&address);
        cases.push(case(format!("a frame to {name}"), frame));
    }
    cases
}

/// Every protocol number in every place.
fn protocols() -> Vec<Case> {
    let mut cases = vec![case("ICMP echo", p::icmp_v4()), case("neighbour solicitation", p::icmp_v6())];
    for protocol in 0..=0xff {
        cases.push(case(format!("protocol {protocol}"), p::with_protocol(p::syn_v4(), protocol)));
        let mut frame = p::udp_v6(64);
        frame[p::ETHERNET + 6] = protocol;
        cases.push(case(format!("next header {protocol}"), frame));
    }
    cases
}

/// Special addresses and their neighbours, as destination and as source.
fn addresses() -> Vec<Case> {
    const V4: [&str; 16] = [
        "0.0.0.0",
        "0.1.2.3",
        "1.0.0.0",
        "10.0.0.1",
        "126.255.255.255",
        "127.0.0.1",
        "127.255.255.255",
        "128.0.0.0",
        "169.253.255.255",
        "169.254.1.1",
        "169.255.0.0",
        "223.255.255.255",
        "224.0.0.251",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
    ];
    const V6: [&str; 17] = [
        "::",
        "::1",
        "::2",
        "::c000:201",
        "::ffff:127.0.0.1",
        "::ffff:192.0.2.1",
        "::1:ffff:192.0.2.1",
        "64:ff9b::c000:201",
        "2001:db8::1",
        "fc00::1",
        "fe7f::1",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "feff::1",
        "ff02::fb",
        "ff0e::1",
    ];
    let mut cases = Vec::new();
    for (addresses, frame, width) in [(&V4[..], p::udp_v4(4), 4), (&V6[..], p::udp_v6(4), 16)] {
        let source = p::ETHERNET + if width == 4 { 12 } else { 8 };
        for (what, at) in [("from", source), ("to", source + width)] {
            for address in addresses {
                let mut frame = frame.clone();
                frame[at..at + width].copy_from_slice(&p::octets(address));
                cases.push(case(format!("{what} {address}"), frame));
            }
        }
    }
    cases
}

/// IPv4 options and TCP options of every length.
fn options() -> Vec<Case> {
    let mut cases = Vec::new();
    for words in 0..=10 {
        for (name, plain) in [("SYN", p::syn_v4()), ("UDP", p::udp_v4(20))] {
            cases.push(case(
                format!("{name} behind {words} words of options"),
                p::with_options(&plain, words),
            ));
        }
        let mut tcp = TcpHeader::new(p::CLIENT_PORT, p::SERVER_PORT, 1, 1000);
        tcp.syn = true;
        tcp.set_options_raw(&vec![1; words * 4]).expect("no more than 40 bytes");
        let header = tcp.to_bytes();
        cases.push(case(format!("TCP with {words} words of options"), p::v4_with(IpNumber::TCP, &header)));
    }
    cases
}

/// Extension headers: every two of them, all five in every order, and more
/// than are followed.
fn extensions() -> Vec<Case> {
    use p::Extension::{self, Authentication, Destination, Fragment, HopByHop, Routing};
    const KINDS: [Extension; 5] = [HopByHop, Routing, Fragment, Authentication, Destination];
    let udp =
        UdpHeader { source_port: p::CLIENT_PORT, destination_port: p::SERVER_PORT, length: 8, checksum: 0 };
    let behind = |chain: &[Extension]| p::v6_with(chain, IpNumber::UDP, &udp.to_bytes());
    let mut chains: Vec<Vec<Extension>> = Vec::new();
    for first in KINDS {
        chains.push(vec![first]);
        chains.extend(KINDS.map(|second| vec![first, second]));
        for count in 3..=9 {
            chains.push(vec![first; count]);
        }
    }
    chains.extend(permutations(&KINDS));
    let mut cases: Vec<_> = chains.iter().map(|chain| case(format!("{chain:?}"), behind(chain))).collect();
    // The second word of the header has the length in its second byte, a routing header the segments left in its fourth.
    for (name, chain, at, value) in [
        ("a routing header with segments left", [Routing], 3, 1),
        ("a long header", [Destination], 1, 0xff),
        ("a long authentication header", [Authentication], 1, 0xff),
        ("a header that is longer than it says", [HopByHop], 1, 1),
    ] {
        let mut frame = behind(&chain);
        frame[p::ETHERNET + 40 + at] = value;
        cases.push(case(name, frame));
    }
    let mut jumbo = behind(&[HopByHop]);
    jumbo[p::ETHERNET + 4..p::ETHERNET + 6].fill(0);
    jumbo[p::ETHERNET + 42..p::ETHERNET + 48].copy_from_slice(&[0xc2, 4, 0, 1, 0x11, 0x70]);
    cases.push(case("a jumbogram", jumbo));
    cases
}

fn permutations<T: Copy>(items: &[T]) -> Vec<Vec<T>> {
    if items.is_empty() {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for at in 0..items.len() {
        let mut rest = items.to_vec();
        let first = rest.remove(at);
        all.extend(permutations(&rest).into_iter().map(|rest| [&[first][..], &rest].concat()));
    }
    all
}

/// Fragments: first, later, atomic, of TCP and UDP, overlapping, nested.
fn fragments() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, pieces) in [
        ("IPv4", p::fragment_v4(&p::udp_v4(3000), 1480, 77)),
        ("IPv6", p::fragment_v6(&p::udp_v6(3000), 1432, 77)),
        ("IPv4, SYN", p::fragment_v4(&p::syn_v4(), 8, 78)),
        ("IPv6, SYN", p::fragment_v6(&p::syn_v6(), 8, 78)),
        ("IPv4, ACK", p::fragment_v4(&p::with_payload(p::ack_v4(), 200), 40, 79)),
    ] {
        let named = |(i, piece)| case(format!("fragment {i}, {name}"), piece);
        cases.extend(pieces.into_iter().enumerate().map(named));
    }
    for field in [0x0000, 0x0001, 0x1fff, 0x2000, 0x2001, 0x3fff, 0x4000, 0x6000, 0x8000, 0xffffu16] {
        let mut frame = p::udp_v4(32);
        frame[p::ETHERNET + 6..p::ETHERNET + 8].copy_from_slice(&field.to_be_bytes());
        cases.push(case(format!("IPv4 fragment field {field:#06x}"), frame));
    }
    for field in [0x0000, 0x0001, 0x0006, 0x0008, 0x0009, 0xfff8, 0xffffu16] {
        let mut frame = p::fragment_v6(&p::udp_v6(32), 2000, 80).remove(0);
        frame[p::ETHERNET + 42..p::ETHERNET + 44].copy_from_slice(&field.to_be_bytes());
        cases.push(case(format!("IPv6 fragment field {field:#06x}"), frame.clone()));
        // In a first fragment.
        let nested = p::fragment_v6(&frame, 40, 81).remove(0);
        cases.push(case(format!("the same in a fragment, {field:#06x}"), nested));
    }
    let mut short = p::fragment_v6(&p::udp_v6(3000), 1432, 82).remove(1);
    short[p::ETHERNET + 4..p::ETHERNET + 6].copy_from_slice(&[0, 7]);
    cases.push(case("a later fragment without room for its header", short));
    cases
}

/// Fields that contradict each other.
fn broken() -> Vec<Case> {
    let mut cases = Vec::new();
    for byte in 0..=0xff {
        let mut frame = p::syn_v4();
        frame[p::ETHERNET] = byte;
        cases.push(case(format!("IPv4 begins with {byte:#04x}"), frame));
    }
    for version in 0..16 {
        let mut frame = p::udp_v6(8);
        frame[p::ETHERNET] = version << 4;
        cases.push(case(format!("IPv6 of version {version}"), frame));
        let mut frame = p::syn_v6();
        frame[p::ETHERNET + 40 + 12] = version << 4;
        cases.push(case(format!("TCP of {version} words"), frame));
    }
    for length in [0, 1, 19, 20, 27, 28, 39, 40, 41, 0xffffu16] {
        for (name, mut frame) in [("TCP", p::syn_v4()), ("UDP", p::udp_v4(12))] {
            frame[p::ETHERNET + 2..p::ETHERNET + 4].copy_from_slice(&length.to_be_bytes());
            cases.push(case(format!("{name}, total length {length}"), frame));
        }
        for (name, mut frame) in [("TCP", p::syn_v6()), ("UDP", p::udp_v6(12))] {
            frame[p::ETHERNET + 4..p::ETHERNET + 6].copy_from_slice(&length.to_be_bytes());
            cases.push(case(format!("{name}, payload length {length}"), frame));
        }
        let mut frame = p::udp_v4(12);
        frame[p::ETHERNET + 24..p::ETHERNET + 26].copy_from_slice(&length.to_be_bytes());
        cases.push(case(format!("UDP length {length}"), frame));
    }
    cases
}

/// Packets that GRO has merged, or a guest has left to be cut: longer on the
/// wire than the bytes that a test run takes.
fn merged() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, frame, at) in [
        ("SYN, IPv4", p::syn_v4(), 2),
        ("SYN, IPv6", p::syn_v6(), 4),
        ("UDP, IPv4", p::udp_v4(100), 2),
        ("UDP, IPv6", p::udp_v6(100), 4),
    ] {
        for length in [None, Some(0), Some(2_000), Some(65_000u16)] {
            for (gso_segs, gso_size) in [(0, 0), (1, 1448), (2, 1448), (45, 1448), (0, 1448), (0, 1), (9, 0)]
            {
                let mut frame = frame.clone();
                if let Some(length) = length {
                    frame[p::ETHERNET + at..p::ETHERNET + at + 2].copy_from_slice(&length.to_be_bytes());
                }
                cases.push(Case {
                    context: Context { gso_segs, gso_size, ..Context::default() },
                    ..case(format!("{name}, length {length:?}, {gso_segs} segments of {gso_size}"), frame)
                });
            }
        }
    }
    cases
}

/// Some packets cut behind every byte.
fn cut() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, frame) in [
        ("SYN with IPv4 options", p::with_options(&p::syn_v4(), 10)),
        ("UDP, IPv4", p::udp_v4(3)),
        ("SYN, IPv6", p::syn_v6()),
        ("UDP with extension headers", p::udp_v6_with_extensions()),
        ("a later fragment", p::fragment_v6(&p::udp_v6(3000), 1432, 83).remove(1)[..80].to_vec()),
    ] {
        for end in p::ETHERNET..frame.len() {
            cases.push(case(format!("{name}, cut at {end}"), frame[..end].to_vec()));
        }
    }
    cases
}
