//! Pure parser of IPv4, IPv6, TCP and UDP headers.
//!
//! It reads through [`Load`], so that the kernel program runs it on a packet
//! buffer and tests run it on a slice. Offsets count from the network header:
//! the link layer (Ethernet, VLAN, none) does not matter here.

pub mod icmp;

use core::hint::black_box;

use crate::abi::{Addr, Family, TCP, UDP, mapped};

/// Source of packet bytes.
pub trait Load {
    /// Copies `N` bytes from `offset` bytes after the start of the network
    /// header; `None` where the packet is shorter.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

impl Load for &[u8] {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }
}

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
}

/// What the programs need to know of a TCP or UDP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Bytes of the IP packet by its own header, 0 where the header leaves it
    /// open (jumbograms and GRO packets above 64 KiB).
    pub ip_len: u32,
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
    /// Identification of the datagram; means nothing for a whole one.
    pub fragment_id: u32,
    /// The DF bit: no router may fragment it. IPv6 has none.
    pub dont_fragment: bool,
    /// Zero: what is not initialised the verifier of Linux before 6.3 refuses to copy.
    pub pad: u8,
}

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
        pad: 0,
    };

    /// Turns it into a packet the other way.
    #[inline(always)]
    pub const fn reverse(&mut self) {
        core::mem::swap(&mut self.source, &mut self.destination);
        core::mem::swap(&mut self.source_port, &mut self.destination_port);
    }

    /// Whether it opens a TCP connection.
    #[inline(always)]
    #[must_use]
    pub const fn is_syn(&self) -> bool {
        self.tcp_flags & (tcp_flag::SYN | tcp_flag::ACK | tcp_flag::RST | tcp_flag::FIN) == tcp_flag::SYN
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
#[inline(always)]
pub fn parse_v4(from: &impl Load) -> Result<Packet, Skip> {
    let h: [u8; IPV4_HEADER as usize] = from.load(0).ok_or(Skip::Truncated)?;
    let header_len = u32::from(h[0] & 0x0f) * 4;
    if h[0] >> 4 != 4 || header_len < IPV4_HEADER {
        return Err(Skip::Malformed);
    }
    let ip_len = u32::from(u16::from_be_bytes([h[2], h[3]]));
    if ip_len != 0 && ip_len < header_len {
        return Err(Skip::Malformed);
    }
    let id = u32::from(u16::from_be_bytes([h[4], h[5]]));
    let field = u16::from_be_bytes([h[6], h[7]]);
    let fragment = if field & 0x1fff != 0 {
        Fragment::Later
    } else if field & 0x2000 != 0 {
        Fragment::First
    } else {
        Fragment::Whole
    };
    let ip = Ip {
        source: mapped([h[12], h[13], h[14], h[15]]),
        destination: mapped([h[16], h[17], h[18], h[19]]),
        total_len: ip_len,
        family: Family::V4,
        dont_fragment: field & 0x4000 != 0,
    };
    transport(from, &ip, h[9], header_len, fragment, id)
}

/// Parses an IPv6 packet and its extension headers (RFC 8200).
///
/// A routing header with segments left is [`Skip::Protocol`]: this hop is not
/// the one to decide over the packet.
///
/// # Errors
///
/// [`Skip`] says why the packet is to be left alone.
#[inline(always)]
pub fn parse_v6(from: &impl Load) -> Result<Packet, Skip> {
    let fixed: [u8; 8] = from.load(0).ok_or(Skip::Truncated)?;
    if fixed[0] >> 4 != 6 {
        return Err(Skip::Malformed);
    }
    let ip = Ip {
        source: from.load(8).ok_or(Skip::Truncated)?,
        destination: from.load(24).ok_or(Skip::Truncated)?,
        total_len: match u32::from(u16::from_be_bytes([fixed[4], fixed[5]])) {
            0 => 0,
            payload => payload + IPV6_HEADER,
        },
        family: Family::V6,
        dont_fragment: false,
    };
    let mut next = fixed[6];
    let mut offset = IPV6_HEADER;
    let mut fragment = Fragment::Whole;
    let mut id = 0;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if next == TCP || next == UDP {
            break;
        }
        if !next_header::is_extension(next) {
            return Err(Skip::Protocol);
        }
        // None is shorter. One read for all of them: each is a fork on the
        // verifier's way, and the loop multiplies them.
        let h: [u8; 8] = from.load(offset).ok_or(Skip::Truncated)?;
        let len = match next {
            // In units of 4 bytes, not counting the first 8 (RFC 4302, section 2.2).
            next_header::AUTHENTICATION => (u32::from(h[1]) + 2) * 4,
            next_header::FRAGMENT => {
                id = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
                match u16::from_be_bytes([h[2], h[3]]) {
                    // Nobody sends a fragment of a fragment; its first one would
                    // not have the identification that the others have.
                    _ if fragment == Fragment::First => return Err(Skip::Malformed),
                    // What follows is the middle of a datagram, not headers.
                    field if field & 0xfff8 != 0 => {
                        return transport(from, &ip, h[0], offset + 8, Fragment::Later, id);
                    }
                    field if field & 1 != 0 => fragment = Fragment::First,
                    // An atomic fragment is a whole datagram (RFC 6946).
                    _ => {}
                }
                8
            }
            next_header::ROUTING if h[3] != 0 => return Err(Skip::Protocol),
            _ => (u32::from(h[1]) + 1) * 8,
        };
        next = h[0];
        // The verifier follows each path through the loop on its own for as long
        // as it knows values that differ. It forgets them in memory, and the
        // paths meet here: without this they are tens of thousands.
        offset = black_box(offset + len);
        fragment = black_box(fragment);
        id = black_box(id);
    }
    transport(from, &ip, next, offset, fragment, id)
}

/// The part of [`Packet`] that the IP header gives.
struct Ip {
    source: Addr,
    destination: Addr,
    total_len: u32,
    family: Family,
    dont_fragment: bool,
}

#[expect(clippy::cast_possible_truncation, reason = "a few extension headers of at most 2,048 bytes each")]
#[inline(always)]
fn transport(
    from: &impl Load,
    ip: &Ip,
    protocol: u8,
    offset: u32,
    fragment: Fragment,
    fragment_id: u32,
) -> Result<Packet, Skip> {
    let mut packet = Packet {
        source: ip.source,
        destination: ip.destination,
        ip_len: ip.total_len,
        header_len: 0,
        source_port: 0,
        destination_port: 0,
        family: ip.family,
        protocol,
        tcp_flags: 0,
        fragment,
        fragment_id,
        dont_fragment: ip.dont_fragment,
        pad: 0,
    };
    if protocol != TCP && protocol != UDP {
        return Err(Skip::Protocol);
    }
    let mut header_len = offset;
    if fragment != Fragment::Later {
        header_len += ports_and_flags(from, offset, &mut packet)?;
    }
    if packet.ip_len != 0 && header_len > packet.ip_len {
        return Err(Skip::Malformed);
    }
    packet.header_len = header_len as u16;
    Ok(packet)
}

/// Reads the transport header, which every packet but a later fragment has; its length in bytes.
#[inline(always)]
fn ports_and_flags(from: &impl Load, offset: u32, packet: &mut Packet) -> Result<u32, Skip> {
    let ports: [u8; 4] = from.load(offset).ok_or(Skip::Truncated)?;
    packet.source_port = u16::from_be_bytes([ports[0], ports[1]]);
    packet.destination_port = u16::from_be_bytes([ports[2], ports[3]]);
    if packet.protocol == UDP {
        return Ok(UDP_HEADER);
    }
    let h: [u8; 2] = from.load(offset + 12).ok_or(Skip::Truncated)?;
    let tcp_len = u32::from(h[0] >> 4) * 4;
    if tcp_len < TCP_HEADER {
        return Err(Skip::Malformed);
    }
    packet.tcp_flags = h[1];
    Ok(tcp_len)
}

#[cfg(test)]
mod tests;
