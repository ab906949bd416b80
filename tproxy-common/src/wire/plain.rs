//! Plain packets: what nearly all are, told by one read.
//!
//! No IP options, no extension headers, no fragments. `None` of a reader does not say what a
//! packet is: [`parse_v4`](super::parse_v4) and [`parse_v6`](super::parse_v6) do.

use super::{IPV4_HEADER, IPV6_HEADER, Load, TCP_HEADER, UDP_HEADER, bits, byte, half, has_ports, tcp_flag};
use crate::abi::{Addr, Family, FlowKey, TCP, UDP, joined, mapped};

/// First byte of an IPv4 header without options: version and length (RFC 791).
const V4_WITHOUT_OPTIONS: u8 = 0x45;

/// A plain TCP or UDP packet, of which the parsers tell the same; between addresses that are
/// not special. A datagram of a few bytes is shorter than what is read.
pub trait Plain: Sized {
    /// The family.
    const FAMILY: Family;

    /// Bytes of its IP header.
    const IP_HEADER: u32;

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

    /// The fourth word behind the IP header: of TCP its length and flags, of UDP payload.
    fn control(&self) -> u32;

    /// Bytes of both headers.
    #[inline(always)]
    fn header_len(&self) -> u32 {
        Self::IP_HEADER + transport_len(self.protocol(), self.control())
    }

    /// TCP flags ([`tcp_flag`]); 0 for UDP.
    #[inline(always)]
    fn tcp_flags(&self) -> u8 {
        if self.protocol() == TCP { byte(self.control(), 1) } else { 0 }
    }

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

/// Bytes of the transport header, by [`Plain::control`].
#[inline(always)]
const fn transport_len(protocol: u8, control: u32) -> u32 {
    if protocol == UDP { UDP_HEADER } else { bits(control, 0, 4) * 4 }
}

/// Whether a header of this protocol can be so long.
#[inline(always)]
const fn is_transport(protocol: u8, control: u32) -> bool {
    protocol == UDP || (protocol == TCP && transport_len(protocol, control) >= TCP_HEADER)
}

/// Whether an IPv4 address that begins so may be a [special](crate::classify::is_special) one.
#[inline(always)]
const fn may_be_special_v4(addr: u32) -> bool {
    matches!(byte(addr, 0), 0 | 127 | 169 | 224..)
}

/// Whether an IPv6 address that begins so may be a [special](crate::classify::is_special) one. In
/// `::/32` are, among others, IPv4 addresses that are mapped: the flow table would take them for
/// those of an IPv4 packet.
#[inline(always)]
const fn may_be_special_v6(begin: u32) -> bool {
    begin == 0 || byte(begin, 0) >= 0xfe
}

/// IPv4: five words of its header, four behind it.
pub struct PlainV4([u32; 9]);

impl Plain for PlainV4 {
    const FAMILY: Family = Family::V4;
    const IP_HEADER: u32 = IPV4_HEADER;

    #[inline(always)]
    fn read(from: &impl Load) -> Option<Self> {
        let packet = Self(from.load(0)?);
        let h = &packet.0;
        // A fragment has an offset, or says that more follow.
        let plain = byte(h[0], 0) == V4_WITHOUT_OPTIONS
            && bits(h[1], 18, 14) == 0
            && is_transport(packet.protocol(), packet.control())
            && !may_be_special_v4(h[3])
            && !may_be_special_v4(h[4])
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
    fn control(&self) -> u32 {
        self.0[8]
    }
}

/// IPv6: ten words of its header, four behind it.
pub struct PlainV6([u32; 14]);

impl Plain for PlainV6 {
    const FAMILY: Family = Family::V6;
    const IP_HEADER: u32 = IPV6_HEADER;

    #[inline(always)]
    fn read(from: &impl Load) -> Option<Self> {
        let packet = Self(from.load(0)?);
        let h = &packet.0;
        let plain = bits(h[0], 0, 4) == 6
            && is_transport(packet.protocol(), packet.control())
            && !may_be_special_v6(h[2])
            && !may_be_special_v6(h[6])
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
    fn control(&self) -> u32 {
        self.0[13]
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
