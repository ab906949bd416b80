//! Pure parser of IPv4, IPv6, TCP and UDP headers.
//!
//! It reads through [`Load`], so that the kernel program runs it on a packet
//! buffer and tests run it on a slice. Offsets count from the network header:
//! the link layer (Ethernet, VLAN, none) does not matter here.

pub mod icmp;
mod load;
pub mod plain;

use core::hint::black_box;

pub use load::Load;
use load::{bits, byte, half};

use crate::abi::{Addr, Family, TCP, UDP, joined, mapped};

/// Why a packet is not one that can be proxied. All of these pass untouched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// Neither TCP nor UDP.
    Protocol,
    /// Headers are cut short.
    Truncated,
    /// Headers contradict themselves.
    Malformed,
}

/// Where a packet stands in its datagram.
///
/// The identification is not in here but in [`Packet::fragment_id`]: what only
/// some variants have is not initialised in the others, and the verifier of
/// Linux before 6.3 refuses to copy such a piece of the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// Not fragmented.
    Whole,
    /// The first fragment, which has the ports.
    First,
    /// A later fragment: no ports.
    Later,
}

/// TCP flags, with the values of the header's low byte (RFC 9293, section 3.1).
pub mod tcp_flag {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement field counts.
    pub const ACK: u8 = 0x10;

    /// Whether a segment with these flags opens a connection.
    #[inline(always)]
    #[must_use]
    pub const fn opens(flags: u8) -> bool {
        flags & (SYN | ACK | RST | FIN) == SYN
    }
}

/// What the programs need to know of a TCP or UDP packet.
///
/// Aligned, so that eBPF copies addresses by words of 8 bytes, not byte by byte.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Bytes of the IP packet by its own header, 0 where the header leaves it
    /// open (jumbograms and GRO packets above 64 KiB).
    pub ip_len: u32,
    /// Identification of the datagram; means nothing for a whole one.
    pub fragment_id: u32,
    /// Bytes of network and transport header together, which each segment of
    /// a GRO packet repeats.
    pub header_len: u16,
    /// Source port, host byte order; 0 in a later fragment.
    pub source_port: u16,
    /// Destination port, host byte order; 0 in a later fragment.
    pub destination_port: u16,
    /// Address family.
    pub family: Family,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// TCP flags ([`tcp_flag`]); 0 for UDP and in a later fragment.
    pub tcp_flags: u8,
    /// Where it stands in its datagram.
    pub fragment: Fragment,
    /// The DF bit: no router may fragment it. IPv6 has none.
    pub dont_fragment: bool,
    /// Zero: what is not initialised the verifier of Linux before 6.3 refuses to copy.
    pub pad: [u8; 5],
}

const _: () = assert!(size_of::<Packet>() == 56);

impl Packet {
    /// What a parser fills in.
    pub const EMPTY: Self = Self {
        source: [0; 16],
        destination: [0; 16],
        ip_len: 0,
        header_len: 0,
        source_port: 0,
        destination_port: 0,
        family: Family::V4,
        protocol: 0,
        tcp_flags: 0,
        fragment: Fragment::Whole,
        fragment_id: 0,
        dont_fragment: false,
        pad: [0; 5],
    };

    /// Turns it into a packet the other way.
    #[inline(always)]
    pub const fn reverse(&mut self) {
        core::mem::swap(&mut self.source, &mut self.destination);
        core::mem::swap(&mut self.source_port, &mut self.destination_port);
    }

    /// Takes both ports from the first word of a TCP or UDP header.
    #[inline(always)]
    const fn set_ports(&mut self, word: u32) {
        self.source_port = half(word, 0);
        self.destination_port = half(word, 1);
    }

    /// Whether it opens a TCP connection.
    #[inline(always)]
    #[must_use]
    pub const fn is_syn(&self) -> bool {
        tcp_flag::opens(self.tcp_flags)
    }
}

const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;
const UDP_HEADER: u32 = 8;
const TCP_HEADER: u32 = 20;

/// The most IPv6 extension headers that are followed; Linux hosts send one or
/// two, and RFC 9288 expects routers to drop long chains.
const MAX_EXTENSION_HEADERS: u32 = 6;

/// Protocol numbers of the extension headers that may precede TCP or UDP (RFC 8200, section 4).
mod next_header {
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const DESTINATION_OPTIONS: u8 = 60;

    /// Whether it is one of these.
    #[inline(always)]
    pub(super) const fn is_extension(next: u8) -> bool {
        matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS)
    }
}

/// Parses an IPv4 packet (RFC 791).
///
/// # Errors
///
/// [`Skip`] says why the packet is to be left alone.
pub fn parse_v4(from: &impl Load) -> Result<Packet, Skip> {
    let mut packet = Packet::EMPTY;
    read_v4(from, &mut packet)?;
    Ok(packet)
}

/// Parses an IPv6 packet and its extension headers (RFC 8200).
///
/// A routing header with segments left is [`Skip::Protocol`]: this hop is not
/// the one to decide over the packet.
///
/// # Errors
///
/// [`Skip`] says why the packet is to be left alone.
pub fn parse_v6(from: &impl Load) -> Result<Packet, Skip> {
    let mut packet = Packet::EMPTY;
    read_v6(from, &mut packet)?;
    Ok(packet)
}

/// What [`parse_v4`] does, to memory of the caller, which has been
/// [`Packet::EMPTY`]: a packet that is handed on by value costs eBPF a copy,
/// byte by byte, and most of its registers.
///
/// # Errors
///
/// As [`parse_v4`]; then the packet is of no use.
#[inline(always)]
pub fn read_v4(from: &impl Load, packet: &mut Packet) -> Result<(), Skip> {
    let h: [u32; 5] = from.load(0).ok_or(Skip::Truncated)?;
    let header_len = header_len_v4(h[0])?;
    let ip_len = u32::from(half(h[0], 1));
    if ip_len != 0 && ip_len < header_len {
        return Err(Skip::Malformed);
    }
    packet.source = mapped(h[3].to_ne_bytes());
    packet.destination = mapped(h[4].to_ne_bytes());
    packet.family = Family::V4;
    packet.protocol = byte(h[2], 1);
    packet.ip_len = ip_len;
    packet.fragment_id = u32::from(half(h[1], 0));
    packet.dont_fragment = bits(h[1], 17, 1) == 1;
    packet.fragment = match (bits(h[1], 18, 1), bits(h[1], 19, 13)) {
        (0, 0) => Fragment::Whole,
        (_, 0) => Fragment::First,
        _ => Fragment::Later,
    };
    read_transport(from, header_len, packet)
}

/// What [`parse_v6`] does; see [`read_v4`].
///
/// # Errors
///
/// As [`parse_v6`]; then the packet is of no use.
#[inline(always)]
pub fn read_v6(from: &impl Load, packet: &mut Packet) -> Result<(), Skip> {
    let h: [u32; 10] = from.load(0).ok_or(Skip::Truncated)?;
    if bits(h[0], 0, 4) != 6 {
        return Err(Skip::Malformed);
    }
    packet.source = joined([h[2], h[3], h[4], h[5]]);
    packet.destination = joined([h[6], h[7], h[8], h[9]]);
    packet.family = Family::V6;
    packet.ip_len = match u32::from(half(h[1], 0)) {
        0 => 0,
        payload => payload + IPV6_HEADER,
    };
    let mut next = byte(h[1], 2);
    let mut offset = IPV6_HEADER;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if has_ports(next) {
            break;
        }
        if !next_header::is_extension(next) {
            return Err(Skip::Protocol);
        }
        // None is shorter. One read for all of them: each is a fork on the
        // verifier's way, and the loop multiplies them.
        let h: [u32; 2] = from.load(offset).ok_or(Skip::Truncated)?;
        let units = u32::from(byte(h[0], 1));
        let len = match next {
            // In units of 4 bytes, not counting the first 8 (RFC 4302, section 2.2).
            next_header::AUTHENTICATION => (units + 2) * 4,
            next_header::FRAGMENT => {
                packet.fragment_id = u32::from_be(h[1]);
                match (bits(h[0], 16, 13), bits(h[0], 31, 1)) {
                    // Nobody sends a fragment of a fragment; its first one would
                    // not have the identification that the others have.
                    _ if packet.fragment == Fragment::First => return Err(Skip::Malformed),
                    // An atomic fragment is a whole datagram (RFC 6946).
                    (0, 0) => {}
                    (0, _) => packet.fragment = Fragment::First,
                    // What follows is the middle of a datagram, not headers.
                    _ => {
                        packet.fragment = Fragment::Later;
                        packet.protocol = byte(h[0], 0);
                        return read_transport(from, offset + 8, packet);
                    }
                }
                8
            }
            next_header::ROUTING if byte(h[0], 3) != 0 => return Err(Skip::Protocol),
            _ => (units + 1) * 8,
        };
        next = byte(h[0], 0);
        // The verifier follows each path through the loop on its own for as long
        // as it knows values that differ. It forgets them in memory, and the
        // paths meet here: without this they are tens of thousands.
        offset = black_box(offset + len);
    }
    packet.protocol = next;
    read_transport(from, offset, packet)
}

/// Differentiated services codepoint (RFC 2474): of the type of service octet, or of the
/// traffic class. It is no part of [`Packet`], because hardly anybody asks for it.
#[inline(always)]
#[must_use]
pub fn dscp(from: &impl Load, family: Family) -> Option<u8> {
    let [first] = from.load(0)?;
    let octet = match family {
        Family::V4 => byte(first, 1),
        Family::V6 => byte(first, 0) << 4 | byte(first, 1) >> 4,
    };
    // Below are the two bits of explicit congestion notification (RFC 3168).
    Some(octet >> 2)
}

/// Hops that a packet may still make (TTL, hop limit). It is no part of [`Packet`] either.
#[inline(always)]
#[must_use]
pub fn hop_limit(from: &impl Load, family: Family) -> Option<u8> {
    let [_, second, third] = from.load(0)?;
    Some(match family {
        Family::V4 => byte(third, 0),
        Family::V6 => byte(second, 3),
    })
}

/// Source address of an Ethernet header, as a number. `from` counts from where such a
/// header would begin; `None` where its type is not that of an IP packet of this family.
#[inline(always)]
#[must_use]
pub fn ethernet_source(from: &impl Load, family: Family) -> Option<u64> {
    // The last two bytes of the destination, the source, the type.
    let [high, low, behind] = from.load(4)?;
    let ethertype = match family {
        Family::V4 => 0x0800,
        Family::V6 => 0x86dd,
    };
    let source = u64::from(half(high, 1)) << 32 | u64::from(u32::from_be(low));
    (half(behind, 0) == ethertype).then_some(source)
}

#[inline(always)]
const fn has_ports(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP
}

/// Reads the transport header that begins at `offset`, which every packet but a
/// later fragment has.
#[expect(clippy::cast_possible_truncation, reason = "a few extension headers of at most 2,048 bytes each")]
#[inline(always)]
fn read_transport(from: &impl Load, offset: u32, packet: &mut Packet) -> Result<(), Skip> {
    if !has_ports(packet.protocol) {
        return Err(Skip::Protocol);
    }
    let mut header_len = offset;
    if packet.fragment != Fragment::Later {
        header_len += read_ports_and_flags(from, offset, packet)?;
    }
    if packet.ip_len != 0 && header_len > packet.ip_len {
        return Err(Skip::Malformed);
    }
    packet.header_len = header_len as u16;
    Ok(())
}

/// Reads ports and TCP flags; the header's length in bytes.
#[inline(always)]
fn read_ports_and_flags(from: &impl Load, offset: u32, packet: &mut Packet) -> Result<u32, Skip> {
    if packet.protocol == UDP {
        let [ports] = from.load(offset).ok_or(Skip::Truncated)?;
        packet.set_ports(ports);
        return Ok(UDP_HEADER);
    }
    // As far as offset and flags; what follows is not read.
    let [ports, _sequence, _acknowledgement, control] = from.load(offset).ok_or(Skip::Truncated)?;
    packet.set_ports(ports);
    packet.tcp_flags = byte(control, 1);
    let tcp_len = bits(control, 0, 4) * 4;
    if tcp_len < TCP_HEADER { Err(Skip::Malformed) } else { Ok(tcp_len) }
}

/// Bytes of an IPv4 header by its first word.
#[inline(always)]
const fn header_len_v4(first: u32) -> Result<u32, Skip> {
    let len = bits(first, 4, 4) * 4;
    if bits(first, 0, 4) == 4 && len >= IPV4_HEADER { Ok(len) } else { Err(Skip::Malformed) }
}

#[cfg(test)]
mod tests;
