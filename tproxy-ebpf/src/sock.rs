//! Socket lookups. A reference that a lookup took is given back when its
//! [`Sock`] goes out of scope, so no path can forget it.

use core::ptr::NonNull;

use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated::{
    bpf_sk_assign, bpf_sk_fullsock, bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp,
};
use tproxy_common::abi::{Addr, Endpoint, Family, TCP, joined, mapped};
use tproxy_common::wire::{Packet, plain};

use crate::scratch;
use crate::settings;
use crate::skb::Skb;

/// `BPF_F_CURRENT_NETNS`: the network namespace of the packet's device.
const CURRENT_NETNS: u64 = u64::MAX;
/// `include/net/tcp_states.h`.
const TCP_TIME_WAIT: u32 = 6;
const TCP_LISTEN: u32 = 10;

/// Reads a field of a socket by itself, as the verifier wants it.
macro_rules! read {
    ($sk:expr, $field:ident) => {
        core::ptr::read_volatile(&raw const (*$sk).$field)
    };
}

/// A socket with a reference that is released on drop.
pub(crate) struct Sock(NonNull<bpf_sock>);

impl Drop for Sock {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the lookup gave the reference, and it is released once.
        unsafe { bpf_sk_release(self.0.as_ptr().cast()) };
    }
}

/// What the kernel answered to an assignment: 0 or a negated errno.
pub(crate) type AssignResult = i64;

impl Sock {
    /// What a lookup has answered.
    ///
    /// # Safety
    ///
    /// `sk` is null, or a socket with a reference that nobody else gives back.
    #[inline(always)]
    pub(crate) unsafe fn found(sk: *mut bpf_sock) -> Option<Self> {
        NonNull::new(sk).map(Self)
    }

    /// Hands the packet to this socket (`bpf_sk_assign`, Linux 5.7).
    #[inline(always)]
    pub(crate) fn assign(self, skb: &Skb) -> AssignResult {
        // SAFETY: both pointers are valid; flags must be 0.
        unsafe { bpf_sk_assign(skb.ctx(), self.0.as_ptr().cast(), 0) }
    }

    #[inline(always)]
    fn state(&self) -> u32 {
        // SAFETY: `state` may be read from every kind of TCP socket.
        unsafe { core::ptr::read_volatile(&raw const (*self.0.as_ptr()).state) }
    }

    /// Whether it is no listener.
    #[inline(always)]
    fn is_connection(&self) -> bool {
        self.state() != TCP_LISTEN
    }

    /// Whether it is what remains of a closed connection.
    #[inline(always)]
    pub(crate) fn is_time_wait(&self) -> bool {
        self.state() == TCP_TIME_WAIT
    }

    /// Whether it is bound to exactly this address, not to a wildcard.
    #[inline(always)]
    fn is_bound_to(&self, addr: &Addr, family: Family) -> bool {
        // SAFETY: the fields may be read.
        unsafe { is_bound(self.0.as_ptr(), addr, family) }
    }

    /// Whether the proxy made it, and it is neither half-open nor in `TIME_WAIT`:
    /// those have no mark.
    #[inline(always)]
    pub(crate) fn is_own_full(&self) -> bool {
        // SAFETY: the socket is valid, and `mark` may be read from a full one.
        unsafe {
            let sk = bpf_sk_fullsock(self.0.as_ptr());
            !sk.is_null() && read!(sk, mark) == settings::own_mark()
        }
    }

    /// Whether the proxy made it. For full sockets only.
    #[inline(always)]
    fn is_own(&self) -> bool {
        // SAFETY: `mark` may be read from a full socket.
        unsafe { read!(self.0.as_ptr(), mark) == settings::own_mark() }
    }
}

/// Whether a socket is bound to exactly this address.
///
/// # Safety
///
/// `sk` is a socket whose addresses may be read.
#[inline(always)]
unsafe fn is_bound(sk: *const bpf_sock, addr: &Addr, family: Family) -> bool {
    match family {
        // SAFETY: by contract of this function; the address is in network byte order.
        Family::V4 => unsafe { read!(sk, src_ip4) == word(addr, 12) },
        Family::V6 => {
            // SAFETY: as above.
            let at = |i| unsafe { bound_word(sk, i) };
            at(0) == word(addr, 0)
                && at(1) == word(addr, 4)
                && at(2) == word(addr, 8)
                && at(3) == word(addr, 12)
        }
    }
}

/// A word of the IPv6 address that a socket is bound to, read by itself as the
/// verifier wants it.
///
/// # Safety
///
/// `sk` is a socket whose addresses may be read, and `i` is below 4.
#[inline(always)]
unsafe fn bound_word(sk: *const bpf_sock, i: usize) -> u32 {
    // SAFETY: by contract of this function.
    unsafe { core::ptr::read_volatile((&raw const (*sk).src_ip6).cast::<u32>().add(i)) }
}

/// The full socket that sends the packet.
#[inline(always)]
pub(crate) fn sender(skb: &Skb) -> Option<*const bpf_sock> {
    let sk = skb.sk();
    if sk.is_null() {
        return None;
    }
    // SAFETY: the socket is not null.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    if sk.is_null() { None } else { Some(sk) }
}

/// Whether one read shows that the packet has the source that its socket is bound
/// to, as nearly all have.
#[inline(always)]
pub(crate) fn is_source_plainly_kept(skb: &Skb) -> bool {
    let sk = skb.sk().cast_const();
    if sk.is_null() {
        return false;
    }
    // SAFETY: addresses and ports may be read from a socket of any kind.
    let is_source = |(addr, port): (Addr, u16), family| unsafe {
        read!(sk, src_port) == u32::from(port) && is_bound(sk, &addr, family)
    };
    match skb.family() {
        Some(Family::V4) => plain::source_v4(skb).is_some_and(|source| is_source(source, Family::V4)),
        Some(Family::V6) => plain::source_v6(skb).is_some_and(|source| is_source(source, Family::V6)),
        None => false,
    }
}

/// Whether the packet, which the proxy sends, has another source than its socket
/// is bound to; then `original` is the socket's.
#[inline(never)]
pub(crate) fn is_source_changed(skb: &Skb, packet: &Packet, original: &mut Endpoint) -> bool {
    /// A raw socket's source is what each message says.
    const SOCK_RAW: u32 = 3;
    let Some(sk) = sender(skb) else { return false };
    // SAFETY: a full socket, whose fields may be read.
    unsafe {
        if read!(sk, mark) != settings::own_mark() || read!(sk, type_) == SOCK_RAW {
            return false;
        }
        original.port = read!(sk, src_port) as u16;
        match packet.family {
            Family::V4 => bound_v4(sk, &mut original.addr),
            Family::V6 => bound_v6(sk, &mut original.addr),
        }
    }
    // Where it is bound to no address, routing chose this one.
    let bound = original.addr != mapped([0; 4]) && original.addr != [0; 16];
    bound && (original.port != packet.source_port || original.addr != packet.source)
}

/// The address that a socket is bound to. One function a family: merged, the
/// compiler would choose the field by a computed offset, which the verifier refuses.
///
/// # Safety
///
/// `sk` is a full socket.
#[inline(never)]
unsafe fn bound_v4(sk: *const bpf_sock, addr: &mut Addr) {
    // SAFETY: by contract of this function.
    *addr = mapped(unsafe { read!(sk, src_ip4) }.to_ne_bytes());
}

/// See [`bound_v4`].
///
/// # Safety
///
/// `sk` is a full socket.
#[inline(never)]
unsafe fn bound_v6(sk: *const bpf_sock, addr: &mut Addr) {
    // SAFETY: by contract of this function.
    *addr = joined([0, 1, 2, 3].map(|i| unsafe { bound_word(sk, i) }));
}

/// Four bytes of an address, as they stand.
#[inline(always)]
fn word(addr: &Addr, at: usize) -> u32 {
    u32::from_ne_bytes([addr[at], addr[at + 1], addr[at + 2], addr[at + 3]])
}

/// The lookup tuple for IPv4, as in `struct bpf_sock_tuple`.
#[repr(C)]
struct Tuple4 {
    source: u32,
    destination: u32,
    source_port: u16,
    destination_port: u16,
}

/// The lookup tuple for IPv6.
#[repr(C)]
struct Tuple6 {
    source: [u32; 4],
    destination: [u32; 4],
    source_port: u16,
    destination_port: u16,
}

#[inline(always)]
fn words(addr: &Addr) -> [u32; 4] {
    [word(addr, 0), word(addr, 4), word(addr, 8), word(addr, 12)]
}

/// Declares a lookup as a function of its own: the verifier must see which
/// helper a socket came from, for only full sockets (UDP) have a mark.
macro_rules! lookup {
    ($(#[$doc:meta])+ $name:ident, $helper:ident) => {
        $(#[$doc])+
        #[inline(never)]
        fn $name(skb: &Skb, packet: &Packet, destination: &Addr, destination_port: u16) -> *mut bpf_sock {
            let source_port = packet.source_port.to_be();
            let destination_port = destination_port.to_be();
            match packet.family {
                Family::V4 => {
                    let mut tuple = Tuple4 {
                        source: word(&packet.source, 12),
                        destination: word(destination, 12),
                        source_port,
                        destination_port,
                    };
                    let size = size_of::<Tuple4>() as u32;
                    // SAFETY: the helper reads `size` bytes of the tuple.
                    unsafe { $helper(skb.ctx(), (&raw mut tuple).cast(), size, CURRENT_NETNS, 0) }
                }
                Family::V6 => {
                    let mut tuple = Tuple6 {
                        source: words(&packet.source),
                        destination: words(destination),
                        source_port,
                        destination_port,
                    };
                    let size = size_of::<Tuple6>() as u32;
                    // SAFETY: the helper reads `size` bytes of the tuple.
                    unsafe { $helper(skb.ctx(), (&raw mut tuple).cast(), size, CURRENT_NETNS, 0) }
                }
            }
        }
    };
}

lookup!(
    /// A TCP socket of any state, listeners on wildcard addresses included.
    lookup_tcp,
    bpf_skc_lookup_tcp
);
lookup!(
    /// A UDP socket, those on wildcard addresses included.
    lookup_udp,
    bpf_sk_lookup_udp
);

/// The listener of the packet's protocol at exactly this address, or on its wildcard.
#[inline(always)]
pub(crate) fn listener_at(skb: &Skb, packet: &Packet, address: &Addr, port: u16) -> Option<Sock> {
    if packet.protocol != TCP {
        return NonNull::new(lookup_udp(skb, packet, address, port)).map(Sock);
    }
    let sock = NonNull::new(lookup_tcp(skb, packet, address, port)).map(Sock)?;
    if sock.is_connection() { None } else { Some(sock) }
}

#[inline(always)]
fn tcp(skb: &Skb, packet: &Packet) -> Option<Sock> {
    NonNull::new(lookup_tcp(skb, packet, &packet.destination, packet.destination_port)).map(Sock)
}

#[inline(always)]
fn udp(skb: &Skb, packet: &Packet) -> Option<Sock> {
    NonNull::new(lookup_udp(skb, packet, &packet.destination, packet.destination_port)).map(Sock)
}

/// The TCP socket that the packet belongs to: established, half-open or
/// `TIME_WAIT`. A listener is none: any service on this host that listens on
/// a wildcard address would match.
#[inline(always)]
pub(crate) fn connection(skb: &Skb, packet: &Packet) -> Option<Sock> {
    tcp(skb, packet).filter(Sock::is_connection)
}

/// The same by a tuple as it stands in a packet ([`Plain::tuple`](tproxy_common::wire::plain::Plain::tuple)).
#[inline(always)]
pub(crate) fn connection_of(skb: &Skb, tuple: &[u32]) -> Option<Sock> {
    let size = size_of_val(tuple) as u32;
    // SAFETY: the helper reads `size` bytes of the tuple.
    let sk =
        unsafe { bpf_skc_lookup_tcp(skb.ctx(), tuple.as_ptr().cast_mut().cast(), size, CURRENT_NETNS, 0) };
    NonNull::new(sk).map(Sock).filter(Sock::is_connection)
}

/// The proxy's own UDP socket that is bound to exactly the packet's
/// destination. Others do not count: any service on a wildcard address matches.
#[inline(always)]
pub(crate) fn own_udp(skb: &Skb, packet: &Packet) -> Option<Sock> {
    let sock = udp(skb, packet)?;
    if sock.is_own() && sock.is_bound_to(&packet.destination, packet.family) { Some(sock) } else { None }
}

/// Whether the proxy itself sent this UDP packet: the source is exactly what
/// one of its sockets is bound to.
#[inline(always)]
pub(crate) fn is_sent_by_own_udp(skb: &Skb, packet: &Packet) -> bool {
    let Some(reversed) = scratch::altered() else { return false };
    *reversed = *packet;
    reversed.reverse();
    own_udp(skb, reversed).is_some()
}

/// Whether a UDP packet for this host belongs to a socket of the proxy.
#[inline(always)]
pub(crate) fn is_for_own_udp(skb: &Skb, packet: &Packet) -> bool {
    udp(skb, packet).is_some_and(|sock| sock.is_own())
}
