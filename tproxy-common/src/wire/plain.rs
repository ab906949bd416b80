//! Plain packets: what nearly all are, told by one read.
//!
//! No IP options, no extension headers, no fragments. `None` of a reader does not say what a
//! packet is: [`parse_v4`](super::parse_v4) and [`parse_v6`](super::parse_v6) do.

use super::{IPV4_HEADER, IPV6_HEADER, Load, TCP_HEADER, UDP_HEADER, bits, byte, half, has_ports, tcp_flag};
use crate::abi::{Addr, Family, FlowKey, TCP, UDP, joined, mapped};

/// First byte of an IPv4 header without options: version and length (RFC 791).
const V4_WITHOUT_OPTIONS: u8 = 0x45;

/// A plain TCP or UDP packet, of which the parsers tell the same. A datagram of a few bytes is
/// shorter than what is read.
pub trait Plain: Sized {
    /// The family.
    const FAMILY: Family;

    /// Reads it.
    fn read(from: &impl Load) -> Option<Self>;

    /// Source and destination address and port as they stand, which is how
    /// `struct bpf_sock_tuple` has them.
    fn tuple(&self) -> &[u32];

    /// Source and destination address.
    fn addresses(&self) -> (Addr, Addr);

    /// [`TCP`] or [`UDP`].
    fn protocol(&self) -> u8;

    /// The DF bit; IPv6 has none.
    fn dont_fragment(&self) -> bool;

    /// Bytes of the IP packet, not 0.
    fn ip_len(&self) -> u32;

    /// Bytes of both headers.
    fn header_len(&self) -> u32;

    /// TCP flags ([`tcp_flag`]); 0 for UDP.
    fn tcp_flags(&self) -> u8;

    /// Whether it opens a connection.
    #[inline(always)]
    fn opens(&self) -> bool {
        tcp_flag::opens(self.tcp_flags())
    }

    /// Source and destination port, host byte order.
    #[inline(always)]
    fn ports(&self) -> (u16, u16) {
        let word = self.tuple()[self.tuple().len() - 1];
        (half(word, 0), half(word, 1))
    }

    /// The key of the flow, where the client sends it.
    #[inline(always)]
    fn up_key(&self) -> FlowKey {
        let ((source, destination), (source_port, destination_port)) = (self.addresses(), self.ports());
        FlowKey::up(self.protocol(), source, destination, source_port, destination_port)
    }

    /// The key of the flow, where the client gets it.
    #[inline(always)]
    fn down_key(&self) -> FlowKey {
        let ((source, destination), (source_port, destination_port)) = (self.addresses(), self.ports());
        FlowKey::down(self.protocol(), source, destination, source_port, destination_port)
    }
}

/// Bytes of the transport header; of TCP's the fourth word tells, which of UDP's is payload.
#[inline(always)]
const fn transport_len(protocol: u8, control: u32) -> u32 {
    if protocol == UDP { UDP_HEADER } else { bits(control, 0, 4) * 4 }
}

/// Whether a header of this protocol can be so long.
#[inline(always)]
const fn is_transport(protocol: u8, control: u32) -> bool {
    protocol == UDP || (protocol == TCP && transport_len(protocol, control) >= TCP_HEADER)
}

#[inline(always)]
const fn flags(protocol: u8, control: u32) -> u8 {
    if protocol == TCP { byte(control, 1) } else { 0 }
}

/// Whether an IPv6 address that begins so may be a [special](crate::classify::is_special) one. In
/// `::/32` are, among others, IPv4 addresses that are mapped: the flow table would take them for
/// those of an IPv4 packet.
#[inline(always)]
const fn may_be_special(begin: u32) -> bool {
    begin == 0 || byte(begin, 0) >= 0xfe
}

/// IPv4: five words of its header, four behind it.
pub struct PlainV4([u32; 9]);

impl Plain for PlainV4 {
    const FAMILY: Family = Family::V4;

    #[inline(always)]
    fn read(from: &impl Load) -> Option<Self> {
        let packet = Self(from.load(0)?);
        let h = &packet.0;
        // A fragment has an offset, or says that more follow.
        let plain = byte(h[0], 0) == V4_WITHOUT_OPTIONS
            && bits(h[1], 18, 14) == 0
            && is_transport(packet.protocol(), h[8])
            && packet.ip_len() >= packet.header_len();
        plain.then_some(packet)
    }

    #[inline(always)]
    fn tuple(&self) -> &[u32] {
        &self.0[3..6]
    }

    #[inline(always)]
    fn addresses(&self) -> (Addr, Addr) {
        (mapped(self.0[3].to_ne_bytes()), mapped(self.0[4].to_ne_bytes()))
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        byte(self.0[2], 1)
    }

    #[inline(always)]
    fn dont_fragment(&self) -> bool {
        bits(self.0[1], 17, 1) == 1
    }

    #[inline(always)]
    fn ip_len(&self) -> u32 {
        u32::from(half(self.0[0], 1))
    }

    #[inline(always)]
    fn header_len(&self) -> u32 {
        IPV4_HEADER + transport_len(self.protocol(), self.0[8])
    }

    #[inline(always)]
    fn tcp_flags(&self) -> u8 {
        flags(self.protocol(), self.0[8])
    }
}

/// IPv6: ten words of its header, four behind it.
pub struct PlainV6([u32; 14]);

impl Plain for PlainV6 {
    const FAMILY: Family = Family::V6;

    #[inline(always)]
    fn read(from: &impl Load) -> Option<Self> {
        let packet = Self(from.load(0)?);
        let h = &packet.0;
        let plain = bits(h[0], 0, 4) == 6
            && is_transport(packet.protocol(), h[13])
            && !may_be_special(h[2])
            && !may_be_special(h[6])
            && half(h[1], 0) != 0
            && packet.ip_len() >= packet.header_len();
        plain.then_some(packet)
    }

    #[inline(always)]
    fn tuple(&self) -> &[u32] {
        &self.0[2..11]
    }

    #[inline(always)]
    fn addresses(&self) -> (Addr, Addr) {
        let h = &self.0;
        (joined([h[2], h[3], h[4], h[5]]), joined([h[6], h[7], h[8], h[9]]))
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        byte(self.0[1], 2)
    }

    #[inline(always)]
    fn dont_fragment(&self) -> bool {
        false
    }

    #[inline(always)]
    fn ip_len(&self) -> u32 {
        u32::from(half(self.0[1], 0)) + IPV6_HEADER
    }

    #[inline(always)]
    fn header_len(&self) -> u32 {
        IPV6_HEADER + transport_len(self.protocol(), self.0[13])
    }

    #[inline(always)]
    fn tcp_flags(&self) -> u8 {
        flags(self.protocol(), self.0[13])
    }
}

/// Source address and port of an IPv4 packet that is no later fragment. For TCP and UDP.
#[inline(always)]
#[must_use]
pub fn source_v4(from: &impl Load) -> Option<(Addr, u16)> {
    let [first, fragment, control, source, _, ports] = from.load(0)?;
    let plain =
        byte(first, 0) == V4_WITHOUT_OPTIONS && bits(fragment, 19, 13) == 0 && has_ports(byte(control, 1));
    plain.then(|| (mapped(source.to_ne_bytes()), half(ports, 0)))
}

/// The same of an IPv6 packet.
#[inline(always)]
#[must_use]
pub fn source_v6(from: &impl Load) -> Option<(Addr, u16)> {
    let [first, fixed, a, b, c, d, _, _, _, _, ports] = from.load(0)?;
    let plain = bits(first, 0, 4) == 6 && has_ports(byte(fixed, 2));
    plain.then(|| (joined([a, b, c, d]), half(ports, 0)))
}
