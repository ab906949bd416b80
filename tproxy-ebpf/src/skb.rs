//! Access to the packet buffer.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{
    bpf_get_socket_uid, bpf_skb_ancestor_cgroup_id, bpf_skb_load_bytes_relative, bpf_skb_pull_data,
};
use aya_ebpf::programs::TcContext;
use tproxy_common::abi::Family;
use tproxy_common::classify::{on_the_wire, segments};
use tproxy_common::wire::{Load, Packet, Skip, ethernet_source, icmp, read_v4, read_v6};

/// `BPF_HDR_START_MAC`: offsets count from the link-layer header.
const FROM_LINK_HEADER: u32 = 0;
/// `BPF_HDR_START_NET`: offsets count from the network header.
const FROM_NETWORK_HEADER: u32 = 1;
/// `pkt_type` of a frame addressed to this host (`include/uapi/linux/if_packet.h`).
const PACKET_HOST: u32 = 0;
const ETH_P_IP: u32 = 0x0800;
const ETH_P_IPV6: u32 = 0x86dd;
/// Bytes of an Ethernet header.
pub(crate) const ETHERNET_HEADER: u32 = 14;

/// A packet on its way through TC.
pub(crate) struct Skb(*mut __sk_buff);

/// Declares readers of context fields. Volatile: the verifier wants each field
/// read by itself, at its own width.
macro_rules! fields {
    ($($(#[$doc:meta])+ $field:ident,)+) => {
        $(
            $(#[$doc])+
            #[inline(always)]
            pub(crate) fn $field(&self) -> u32 {
                // SAFETY: the context is valid while the program runs.
                unsafe { core::ptr::read_volatile(&raw const (*self.0).$field) }
            }
        )+
    };
}

impl Skb {
    pub(crate) fn new(ctx: &TcContext) -> Self {
        Self(ctx.skb.skb)
    }

    /// Of the context that the kernel has handed over.
    pub(crate) fn from_ptr(context: *mut __sk_buff) -> Self {
        Self(context)
    }

    pub(crate) fn as_ptr(&self) -> *mut __sk_buff {
        self.0
    }

    pub(crate) fn ctx(&self) -> *mut c_void {
        self.0.cast()
    }

    fields! {
        /// Bytes from the link-layer header on.
        len,
        /// See `PACKET_HOST`.
        pkt_type,
        /// The packet mark.
        mark,
        /// `EtherType`, network byte order.
        protocol,
        /// 1 where an outer VLAN tag was taken off.
        vlan_present,
        /// The tag that was taken off.
        vlan_tci,
        /// Interface that it arrived on, 0 for what this host sends.
        ingress_ifindex,
        /// Interface that the program is attached to.
        ifindex,
        /// Segments of a GRO or GSO packet.
        gso_segs,
        /// Payload bytes of each of them (Linux 5.7).
        gso_size,
    }

    /// The socket that sends or gets the packet, of any kind; null where there is none (Linux 5.1).
    #[inline(always)]
    pub(crate) fn sk(&self) -> *mut bpf_sock {
        // SAFETY: the context is valid, and the union has but this field in use.
        unsafe { core::ptr::read_volatile(&raw const (*self.0).__bindgen_anon_2.sk) }
    }

    /// Whether a socket sends or gets the packet.
    #[inline(always)]
    pub(crate) fn has_socket(&self) -> bool {
        !self.sk().is_null()
    }

    /// User that owns the socket that sends the packet; `None` where there is no socket.
    #[inline(always)]
    pub(crate) fn uid(&self) -> Option<u32> {
        // Without one the helper answers as for a user that has no number here.
        // SAFETY: the context is valid.
        if self.has_socket() { Some(unsafe { bpf_get_socket_uid(self.0) }) } else { None }
    }

    /// Control group at this depth that the socket which sends the packet is in or below.
    #[inline(always)]
    pub(crate) fn cgroup(&self, depth: u32) -> Option<u64> {
        // SAFETY: the context is valid.
        match unsafe { bpf_skb_ancestor_cgroup_id(self.0, depth.cast_signed()) } {
            0 => None,
            id => Some(id),
        }
    }

    /// Link-layer address that the packet comes from, as a number; `None` where it has
    /// no Ethernet header.
    #[inline(always)]
    pub(crate) fn ethernet_source(&self, packet: &Packet) -> Option<u64> {
        // Without a header the packet itself is there, which may look like one.
        if packet.ip_len != 0 && self.len() <= packet.ip_len {
            return None;
        }
        ethernet_source(&LinkHeader(self), packet.family)
    }

    /// Whether the frame is addressed to this host at the link layer.
    #[inline(always)]
    pub(crate) fn is_for_host(&self) -> bool {
        self.pkt_type() == PACKET_HOST
    }

    /// Parses IPv4 or IPv6 by the `EtherType`.
    ///
    /// The helper that reads sees the linear part of the buffer alone. The
    /// headers of most packets are there, but not of all: a large datagram of
    /// a raw socket has only its IP header in it. What looks cut short is
    /// pulled together and read once more.
    #[inline(always)]
    pub(crate) fn parse(&self, packet: &mut Packet) -> Result<(), Skip> {
        match self.parse_linear(packet) {
            Err(Skip::Truncated) if self.pull_headers() => {
                *packet = Packet::EMPTY;
                self.parse_linear(packet)
            }
            parsed => parsed,
        }
    }

    /// An answer to the packet that this ICMP error is about.
    #[inline(always)]
    pub(crate) fn parse_icmp_error(&self, packet: &mut Packet) -> Result<(), Skip> {
        match self.parse_icmp_linear(packet) {
            Err(Skip::Truncated) if self.pull_headers() => self.parse_icmp_linear(packet),
            parsed => parsed,
        }
    }

    /// Writes to memory of the caller: a `Result<Packet, _>` keeps its tag in a
    /// gap of `Packet`, and the kernel refuses type information of such a union.
    #[inline(never)]
    fn parse_icmp_linear(&self, packet: &mut Packet) -> Result<(), Skip> {
        *packet = match self.family() {
            Some(Family::V4) => icmp::error_v4(self),
            Some(Family::V6) => icmp::error_v6(self),
            None => Err(Skip::Protocol),
        }?;
        packet.reverse();
        Ok(())
    }

    /// The family by the `EtherType`; none for what is not IP.
    #[inline(always)]
    pub(crate) fn family(&self) -> Option<Family> {
        match u32::from((self.protocol() as u16).swap_bytes()) {
            ETH_P_IP => Some(Family::V4),
            ETH_P_IPV6 => Some(Family::V6),
            _ => None,
        }
    }

    /// Makes the headers part of the linear buffer (Linux 4.9). Whether it worked.
    #[inline(always)]
    fn pull_headers(&self) -> bool {
        // Ethernet, IPv6 with some extension headers or IPv4 with options, TCP with options.
        const MOST: u32 = 256;
        let len = self.len().min(MOST);
        // SAFETY: the context is valid; no pointer into the packet is kept.
        unsafe { bpf_skb_pull_data(self.0, len) == 0 }
    }

    #[inline(never)]
    fn parse_linear(&self, packet: &mut Packet) -> Result<(), Skip> {
        match self.family() {
            Some(Family::V4) => read_v4(self, packet),
            Some(Family::V6) => read_v6(self, packet),
            None => Err(Skip::Protocol),
        }
    }

    /// Packets and IP-layer bytes that this buffer is on the wire.
    #[inline(always)]
    pub(crate) fn packet_on_the_wire(&self, packet: &Packet) -> (u64, u64) {
        // Above 64 KiB the IP header has no length; only Ethernet devices build such packets.
        let ip_len =
            if packet.ip_len == 0 { self.len().saturating_sub(ETHERNET_HEADER) } else { packet.ip_len };
        self.on_the_wire(ip_len, u32::from(packet.header_len))
    }

    /// The same of an IP packet of so many bytes, with headers of so many.
    #[inline(always)]
    pub(crate) fn on_the_wire(&self, ip_len: u32, header_len: u32) -> (u64, u64) {
        let segments = segments(ip_len, header_len, self.gso_segs(), self.gso_size());
        on_the_wire(ip_len, header_len, segments)
    }
}

impl Load for Skb {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        load(self, offset, FROM_NETWORK_HEADER)
    }
}

/// Bytes of a packet, counted from its link-layer header.
struct LinkHeader<'a>(&'a Skb);

impl Load for LinkHeader<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        load(self.0, offset, FROM_LINK_HEADER)
    }
}

#[inline(always)]
fn load<const N: usize>(skb: &Skb, offset: u32, from: u32) -> Option<[u32; N]> {
    let mut words = MaybeUninit::<[u32; N]>::uninit();
    // SAFETY: the helper writes `size` bytes to `words`, also where it answers an error.
    unsafe {
        let (to, size) = (words.as_mut_ptr().cast(), size_of::<[u32; N]>() as u32);
        let result = bpf_skb_load_bytes_relative(skb.ctx(), offset, to, size, from);
        if result == 0 { Some(words.assume_init()) } else { None }
    }
}
