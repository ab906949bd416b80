//! Pure parser of ICMP errors (RFC 792, RFC 4443): which packet an error is about.

use super::{IPV6_HEADER, Load, Packet, Skip, bits, byte, has_ports, header_len_v4, next_header};
use crate::abi::{Addr, Family, joined, mapped};

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
    let outer: [u32; 5] = from.load(0).ok_or(Skip::Truncated)?;
    if byte(outer[2], 1) != ICMPV4 || bits(outer[1], 18, 14) != 0 {
        return Err(Skip::Protocol);
    }
    let offset = header_len_v4(outer[0])?;
    let [header] = from.load(offset).ok_or(Skip::Truncated)?;
    if !matches!(byte(header, 0), UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM) {
        return Err(Skip::Protocol);
    }
    let offset = offset + ICMP_HEADER;
    let inner: [u32; 5] = from.load(offset).ok_or(Skip::Truncated)?;
    let ports = offset + header_len_v4(inner[0])?;
    // Only the first fragment has ports.
    if bits(inner[1], 19, 13) != 0 {
        return Err(Skip::Protocol);
    }
    if inner[3] != outer[4] {
        return Err(Skip::Malformed);
    }
    let (source, destination) = (mapped(inner[3].to_ne_bytes()), mapped(inner[4].to_ne_bytes()));
    about(from, Family::V4, source, destination, byte(inner[2], 1), ports)
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
    let outer: [u32; 10] = from.load(0).ok_or(Skip::Truncated)?;
    if byte(outer[1], 2) != ICMPV6 {
        return Err(Skip::Protocol);
    }
    let [header] = from.load(IPV6_HEADER).ok_or(Skip::Truncated)?;
    if !matches!(byte(header, 0), UNREACHABLE..=PARAMETER_PROBLEM) {
        return Err(Skip::Protocol);
    }
    let inner_at = IPV6_HEADER + ICMP_HEADER;
    let inner: [u32; 10] = from.load(inner_at).ok_or(Skip::Truncated)?;
    if bits(inner[0], 0, 4) != 6 {
        return Err(Skip::Malformed);
    }
    let source = joined([inner[2], inner[3], inner[4], inner[5]]);
    let destination = joined([inner[6], inner[7], inner[8], inner[9]]);
    if source != joined([outer[6], outer[7], outer[8], outer[9]]) {
        return Err(Skip::Malformed);
    }
    let mut protocol = byte(inner[1], 2);
    let mut ports = inner_at + IPV6_HEADER;
    if protocol == next_header::FRAGMENT {
        let [h, _identification] = from.load(ports).ok_or(Skip::Truncated)?;
        if bits(h, 16, 13) != 0 {
            return Err(Skip::Protocol);
        }
        protocol = byte(h, 0);
        ports += FRAGMENT_HEADER;
    }
    about(from, Family::V6, source, destination, protocol, ports)
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
    if !has_ports(protocol) {
        return Err(Skip::Protocol);
    }
    let [ports] = from.load(ports).ok_or(Skip::Truncated)?;
    let mut packet = Packet { source, destination, family, protocol, ..Packet::EMPTY };
    packet.set_ports(ports);
    Ok(packet)
}

#[cfg(test)]
mod tests;
