//! What is pure of a decision, beside the rules of [`policy`](crate::policy).

use crate::abi::{Addr, Family, TCP};

/// Whether an address can never be proxied, as source or destination:
/// unspecified, loopback, link-local, multicast, limited broadcast, and in an
/// IPv6 packet an IPv4-mapped address (RFC 6890): to a socket it is the IPv4
/// address, so that `::ffff:127.0.0.1` is a way to this host. IPv4 addresses
/// are given mapped.
#[inline(always)]
#[must_use]
pub const fn is_special(addr: &Addr, family: Family) -> bool {
    match family {
        Family::V4 => match (addr[12], addr[13]) {
            (0 | 127 | 224..=239, _) | (169, 254) => true,
            (255, 255) => addr[14] == 255 && addr[15] == 255,
            _ => false,
        },
        Family::V6 => {
            let high =
                u64::from_be_bytes([addr[0], addr[1], addr[2], addr[3], addr[4], addr[5], addr[6], addr[7]]);
            let low = u64::from_be_bytes([
                addr[8], addr[9], addr[10], addr[11], addr[12], addr[13], addr[14], addr[15],
            ]);
            // ff00::/8, fe80::/10, ::/127 (unspecified and loopback), ::ffff:0:0/96.
            addr[0] == 0xff
                || (addr[0] == 0xfe && addr[1] & 0xc0 == 0x80)
                || (high == 0 && (low <= 1 || low >> 32 == 0xffff))
        }
    }
}

/// The segments that a GRO or GSO packet is on the wire; 0 or 1 for a plain one.
///
/// `gso_segs` and `gso_size` as in `struct __sk_buff`: guests and taps leave
/// the count to whoever sends the packet on, and give the size alone.
#[inline(always)]
#[must_use]
pub const fn segments(ip_len: u32, header_len: u32, gso_segs: u32, gso_size: u32) -> u32 {
    if gso_segs == 0 && gso_size != 0 {
        return ip_len.saturating_sub(header_len).div_ceil(gso_size);
    }
    gso_segs
}

/// Packets and IP-layer bytes on the wire of what may be a GRO or GSO packet.
///
/// `ip_len` and `header_len` as in [`Packet`](crate::wire::Packet); `segments`
/// as [`segments`] says.
#[inline(always)]
#[must_use]
pub const fn on_the_wire(ip_len: u32, header_len: u32, segments: u32) -> (u64, u64) {
    if segments <= 1 {
        return (1, ip_len as u64);
    }
    (segments as u64, ip_len as u64 + (segments as u64 - 1) * header_len as u64)
}

/// Whether a TCP flow table entry of the same key belongs to an earlier
/// connection, so that a new opening starts its counters again.
#[inline(always)]
#[must_use]
pub const fn is_reopened(flow: &crate::abi::Flow, protocol: u8) -> bool {
    protocol == TCP && flow.is_over()
}

#[cfg(test)]
mod tests;
