//! Pure parser of ICMP errors (RFC 792, RFC 4443): which packet an error is about.

use super::{Fragment, IPV4_HEADER, IPV6_HEADER, Load, Packet, Skip, next_header};
use crate::abi::{Addr, Family, TCP, UDP, mapped};

/// Protocol number of ICMP.
const ICMPV4: u8 = 1;
/// Protocol number of ICMP for IPv6.
const ICMPV6: u8 = 58;
/// Bytes of an error before the packet that it is about, in both versions.
const ICMP_HEADER: u32 = 8;
/// Bytes of the IPv6 fragment header.
const FRAGMENT_HEADER: u32 = 8;

/// The TCP or UDP packet that an ICMP error is about over IPv4, as it was sent: its
/// addresses, ports and protocol, the rest as in [`Packet::EMPTY`].
///
/// Errors are destination unreachable, time exceeded and parameter problem.
///
/// # Errors
///
/// [`Skip`] for everything else, and where the error did not go to the sender of that packet.
#[inline(always)]
pub fn error_v4(from: &impl Load) -> Result<Packet, Skip> {
    const UNREACHABLE: u8 = 3;
    const TIME_EXCEEDED: u8 = 11;
    const PARAMETER_PROBLEM: u8 = 12;
    const FRAGMENT_FIELD: u16 = 0x3fff;
    let outer: [u8; IPV4_HEADER as usize] = from.load(0).ok_or(Skip::Truncated)?;
    if outer[9] != ICMPV4 || u16::from_be_bytes([outer[6], outer[7]]) & FRAGMENT_FIELD != 0 {
        return Err(Skip::Protocol);
    }
    let offset = header_len_v4(outer[0])?;
    let [kind]: [u8; 1] = from.load(offset).ok_or(Skip::Truncated)?;
    if !matches!(kind, UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM) {
        return Err(Skip::Protocol);
    }
    let offset = offset + ICMP_HEADER;
    let inner: [u8; IPV4_HEADER as usize] = from.load(offset).ok_or(Skip::Truncated)?;
    let ports = offset + header_len_v4(inner[0])?;
    // Only the first fragment has ports.
    if u16::from_be_bytes([inner[6], inner[7]]) & 0x1fff != 0 {
        return Err(Skip::Protocol);
    }
    let source = mapped([inner[12], inner[13], inner[14], inner[15]]);
    let destination = mapped([inner[16], inner[17], inner[18], inner[19]]);
    if source != mapped([outer[16], outer[17], outer[18], outer[19]]) {
        return Err(Skip::Malformed);
    }
    about(from, Family::V4, source, destination, inner[9], ports)
}

/// The TCP or UDP packet that an ICMP error is about over IPv6; see [`error_v4`].
///
/// Errors are destination unreachable, packet too big, time exceeded and parameter problem.
/// The error has no extension headers, the packet at most a fragment header: the proxy's
/// own have no other.
///
/// # Errors
///
/// As [`error_v4`].
#[inline(always)]
pub fn error_v6(from: &impl Load) -> Result<Packet, Skip> {
    const UNREACHABLE: u8 = 1;
    const PARAMETER_PROBLEM: u8 = 4;
    let [next]: [u8; 1] = from.load(6).ok_or(Skip::Truncated)?;
    if next != ICMPV6 {
        return Err(Skip::Protocol);
    }
    let [kind]: [u8; 1] = from.load(IPV6_HEADER).ok_or(Skip::Truncated)?;
    if !matches!(kind, UNREACHABLE..=PARAMETER_PROBLEM) {
        return Err(Skip::Protocol);
    }
    let inner = IPV6_HEADER + ICMP_HEADER;
    let fixed: [u8; 8] = from.load(inner).ok_or(Skip::Truncated)?;
    if fixed[0] >> 4 != 6 {
        return Err(Skip::Malformed);
    }
    let receiver: Addr = from.load(24).ok_or(Skip::Truncated)?;
    let source: Addr = from.load(inner + 8).ok_or(Skip::Truncated)?;
    let destination: Addr = from.load(inner + 24).ok_or(Skip::Truncated)?;
    if source != receiver {
        return Err(Skip::Malformed);
    }
    let mut protocol = fixed[6];
    let mut ports = inner + IPV6_HEADER;
    if protocol == next_header::FRAGMENT {
        let h: [u8; FRAGMENT_HEADER as usize] = from.load(ports).ok_or(Skip::Truncated)?;
        if u16::from_be_bytes([h[2], h[3]]) & 0xfff8 != 0 {
            return Err(Skip::Protocol);
        }
        protocol = h[0];
        ports += FRAGMENT_HEADER;
    }
    about(from, Family::V6, source, destination, protocol, ports)
}

/// Bytes of an IPv4 header by its first byte.
#[inline(always)]
const fn header_len_v4(first: u8) -> Result<u32, Skip> {
    let len = (first & 0x0f) as u32 * 4;
    if first >> 4 == 4 && len >= IPV4_HEADER { Ok(len) } else { Err(Skip::Malformed) }
}

#[inline(always)]
fn about(
    from: &impl Load,
    family: Family,
    source: Addr,
    destination: Addr,
    protocol: u8,
    ports: u32,
) -> Result<Packet, Skip> {
    if protocol != TCP && protocol != UDP {
        return Err(Skip::Protocol);
    }
    let ports: [u8; 4] = from.load(ports).ok_or(Skip::Truncated)?;
    Ok(Packet {
        source,
        destination,
        source_port: u16::from_be_bytes([ports[0], ports[1]]),
        destination_port: u16::from_be_bytes([ports[2], ports[3]]),
        family,
        protocol,
        fragment: Fragment::Whole,
        ..Packet::EMPTY
    })
}

#[cfg(test)]
mod tests;
