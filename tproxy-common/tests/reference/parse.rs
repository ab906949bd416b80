//! A naive parser of IPv4 and IPv6, and what the real one must have in common with it.

use std::cell::Cell;

use tproxy_common::abi::{Family, TCP, UDP};
use tproxy_common::classify::is_special;
use tproxy_common::wire::plain::{self, Plain, PlainV4, PlainV6};
use tproxy_common::wire::{Fragment, Load, Packet, Skip, parse_v4, parse_v6};

/// Checks both parsers on bytes from the network header on.
///
/// # Panics
/// They do not agree with the naive ones, read where they must not, or find
/// another packet in a piece of it than in all of it.
pub fn check_packet(bytes: &[u8]) {
    check(bytes, |from| parse_v4(from), v4);
    check(bytes, |from| parse_v6(from), v6);
    for (plain, parsed) in
        [(plain::source_v4(&bytes), parse_v4(&bytes)), (plain::source_v6(&bytes), parse_v6(&bytes))]
    {
        if let (Some(source), Ok(packet)) = (plain, parsed) {
            assert_eq!(source, (packet.source, packet.source_port), "the plain source of {bytes:02x?}");
        }
    }
    let of_v4 = |packet: &Packet| {
        let is_usual = |address: &[u8; 16]| ![0, 127, 169].contains(&address[12]) && address[12] < 224;
        let is_whole = bytes[0] == 0x45 && bytes.len() >= 36;
        is_whole && is_usual(&packet.source) && is_usual(&packet.destination)
    };
    check_plain(bytes, PlainV4::read(&bytes), parse_v4(&bytes), of_v4);
    let of_v6 = |packet: &Packet| {
        let is_usual = |address: &[u8; 16]| address[..4] != [0; 4] && address[0] < 0xfe;
        let follows_at_once = bytes[6] == packet.protocol && bytes.len() >= 56;
        follows_at_once && is_usual(&packet.source) && is_usual(&packet.destination)
    };
    check_plain(bytes, PlainV6::read(&bytes), parse_v6(&bytes), of_v6);
}

/// What is plain is read at once, and nothing else, and told as the parsers tell it.
fn check_plain<P: Plain>(bytes: &[u8], plain: Option<P>, parsed: Parsed, is_plain: impl Fn(&Packet) -> bool) {
    let is_whole = |packet: &Packet| packet.fragment == Fragment::Whole && packet.ip_len > 0;
    let parsed = parsed.ok().filter(|packet| is_whole(packet) && is_plain(packet));
    assert_eq!(plain.is_some(), parsed.is_some(), "whether it is plain: {bytes:02x?}");
    let (Some(plain), Some(packet)) = (plain, parsed) else { return };
    for address in [&packet.source, &packet.destination] {
        assert!(!is_special(address, packet.family), "a special address: {bytes:02x?}");
    }
    assert_eq!(plain.protocol(), packet.protocol, "{bytes:02x?}");
    assert_eq!(plain.addresses(), (packet.source, packet.destination), "{bytes:02x?}");
    assert_eq!(plain.ports(), (packet.source_port, packet.destination_port), "{bytes:02x?}");
    assert_eq!(plain.ip_len(), packet.ip_len, "{bytes:02x?}");
    assert_eq!(plain.header_len(), u32::from(packet.header_len), "{bytes:02x?}");
    assert_eq!(plain.tcp_flags(), packet.tcp_flags, "{bytes:02x?}");
    assert_eq!(plain.opens(), packet.is_syn(), "{bytes:02x?}");
    assert_eq!(plain.dont_fragment(), packet.dont_fragment, "{bytes:02x?}");
    let (up, down) = (plain.up_key(), plain.down_key());
    assert_eq!(
        (up.client, up.client_port, up.protocol),
        (packet.source, packet.source_port, packet.protocol)
    );
    assert_eq!((down.client, down.client_port), (packet.destination, packet.destination_port));
    let tuple: Vec<u8> = plain.tuple().iter().flat_map(|word| word.to_ne_bytes()).collect();
    let (at, len) = if packet.family == Family::V4 { (12, 12) } else { (8, 36) };
    assert_eq!(tuple, bytes[at..at + len], "{bytes:02x?}");
}

type Parsed = Result<Packet, Skip>;

fn check(bytes: &[u8], parse: fn(&Watched) -> Parsed, naive: fn(&[u8]) -> Parsed) {
    let parsed = parse(&Watched::new(bytes)).map(without_idle_id);
    assert_eq!(parsed, naive(bytes), "the parser and the naive one on {bytes:02x?}");
    for end in 0..bytes.len() {
        let of_piece = parse(&Watched::new(&bytes[..end])).map(without_idle_id);
        assert!(
            of_piece == parsed || of_piece == Err(Skip::Truncated),
            "{of_piece:?} in the first {end} bytes of {parsed:?}: {bytes:02x?}"
        );
    }
}

/// The identification means nothing for a whole datagram.
fn without_idle_id(mut packet: Packet) -> Packet {
    if packet.fragment == Fragment::Whole {
        packet.fragment_id = 0;
    }
    packet
}

/// A packet that watches how it is read.
struct Watched<'a> {
    bytes: &'a [u8],
    ended: Cell<bool>,
}

impl<'a> Watched<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, ended: Cell::new(false) }
    }
}

impl Load for Watched<'_> {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        // Six extension headers of the greatest length, and TCP's flags behind them.
        const FARTHEST: usize = 40 + 6 * 2048 + 16;
        let offset = usize::try_from(offset).expect("64 bits");
        assert!(offset + 4 * N <= FARTHEST, "read at {offset}");
        assert!(!self.ended.get(), "read on at {offset} when the packet had ended");
        let read = self.bytes.get(offset..offset + 4 * N);
        self.ended.set(read.is_none());
        read.map(|bytes| {
            std::array::from_fn(|i| u32::from_ne_bytes(bytes[4 * i..][..4].try_into().expect("four")))
        })
    }
}

fn be16(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) * 256 + usize::from(bytes[at + 1])
}

/// What the headers before the transport header say.
struct Network {
    packet: Packet,
    /// Where it ends.
    end: usize,
    /// The length of the IP packet, where its header gives one.
    len: Option<usize>,
}

/// RFC 791, section 3.1.
fn v4(bytes: &[u8]) -> Parsed {
    if bytes.len() < 20 {
        return Err(Skip::Truncated);
    }
    let (version, words) = (bytes[0] / 16, usize::from(bytes[0] % 16));
    let len = Some(be16(bytes, 2)).filter(|len| *len != 0);
    if version != 4 || words < 5 || len.is_some_and(|len| len < words * 4) {
        return Err(Skip::Malformed);
    }
    let (flags, offset) = (be16(bytes, 6) / 8192, be16(bytes, 6) % 8192);
    let mut packet = Packet { family: Family::V4, protocol: bytes[9], ..Packet::EMPTY };
    for (address, at) in [(&mut packet.source, 12), (&mut packet.destination, 16)] {
        address[10..12].fill(0xff);
        address[12..].copy_from_slice(&bytes[at..at + 4]);
    }
    packet.dont_fragment = flags / 2 % 2 == 1;
    packet.fragment = match (offset, flags % 2) {
        (0, 0) => Fragment::Whole,
        (0, _) => Fragment::First,
        _ => Fragment::Later,
    };
    if packet.fragment != Fragment::Whole {
        packet.fragment_id = u32::try_from(be16(bytes, 4)).expect("16 bits");
    }
    transport(bytes, &Network { packet, end: words * 4, len })
}

/// RFC 8200, section 3.
fn v6(bytes: &[u8]) -> Parsed {
    if bytes.len() < 40 {
        return Err(Skip::Truncated);
    }
    if bytes[0] / 16 != 6 {
        return Err(Skip::Malformed);
    }
    let mut packet = Packet { family: Family::V6, ..Packet::EMPTY };
    packet.source.copy_from_slice(&bytes[8..24]);
    packet.destination.copy_from_slice(&bytes[24..40]);
    let len = Some(be16(bytes, 4)).filter(|len| *len != 0).map(|len| len + 40);
    extensions(bytes, bytes[6], Network { packet, end: 40, len }, 6)
}

/// RFC 8200, section 4, and RFC 4302, section 2, header by header.
fn extensions(bytes: &[u8], kind: u8, mut so_far: Network, left: usize) -> Parsed {
    if left == 0 || ![0, 43, 44, 51, 60].contains(&kind) {
        so_far.packet.protocol = kind;
        return transport(bytes, &so_far);
    }
    let Some(header) = bytes.get(so_far.end..so_far.end + 8) else { return Err(Skip::Truncated) };
    let words = usize::from(header[1]);
    so_far.end += match kind {
        43 if header[3] > 0 => return Err(Skip::Protocol),
        44 => {
            if so_far.packet.fragment == Fragment::First {
                return Err(Skip::Malformed);
            }
            let (offset, more) = (be16(header, 2) / 8, header[3] % 2 == 1);
            if offset > 0 || more {
                so_far.packet.fragment_id =
                    u32::try_from(be16(header, 4) * 65_536 + be16(header, 6)).expect("32 bits");
                so_far.packet.fragment = if offset > 0 { Fragment::Later } else { Fragment::First };
            }
            8
        }
        51 => 8 + words * 4,
        _ => 8 + words * 8,
    };
    let is_later = so_far.packet.fragment == Fragment::Later;
    extensions(bytes, header[0], so_far, if is_later { 0 } else { left - 1 })
}

/// RFC 9293, section 3.1, and RFC 768.
fn transport(bytes: &[u8], network: &Network) -> Parsed {
    let Network { mut packet, end, len } = *network;
    if packet.protocol != TCP && packet.protocol != UDP {
        return Err(Skip::Protocol);
    }
    let mut header_len = end;
    if packet.fragment != Fragment::Later {
        let rest = &bytes[end.min(bytes.len())..];
        if rest.len() < if packet.protocol == TCP { 16 } else { 4 } {
            return Err(Skip::Truncated);
        }
        packet.source_port = u16::try_from(be16(rest, 0)).expect("16 bits");
        packet.destination_port = u16::try_from(be16(rest, 2)).expect("16 bits");
        header_len += if packet.protocol == UDP {
            8
        } else if rest[12] < 5 << 4 {
            return Err(Skip::Malformed);
        } else {
            packet.tcp_flags = rest[13];
            usize::from(rest[12] / 16) * 4
        };
    }
    if len.is_some_and(|len| len < header_len) {
        return Err(Skip::Malformed);
    }
    packet.header_len = u16::try_from(header_len).expect("short");
    packet.ip_len = u32::try_from(len.unwrap_or(0)).expect("short");
    Ok(packet)
}
