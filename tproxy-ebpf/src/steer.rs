//! What becomes of a packet: with [`reset`](crate::reset) the only file that changes one.

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::{
    bpf_redirect, bpf_skb_change_head, bpf_skb_change_type, bpf_skb_store_bytes,
};
use tproxy_common::counter::Counter;
use tproxy_common::wire::Packet;

use crate::account::count;
use crate::settings;
use crate::skb::{ETHERNET_HEADER, Skb};
use crate::sock::Sock;

/// On to the next program of the interface, or into the stack (`TCX_NEXT`;
/// for a direct-action filter: the next filter).
pub(crate) const NEXT: i32 = TC_ACT_UNSPEC;

const ACCEPT: i32 = TC_ACT_OK;
const DROP: i32 = TC_ACT_SHOT;

// Negated errnos of `bpf_sk_assign` (net/core/filter.c).
const ENOENT: i64 = -2;
const EINVAL: i64 = -22;
const ESOCKTNOSUPPORT: i64 = -94;
const EOPNOTSUPP: i64 = -95;
const ENETUNREACH: i64 = -101;

/// Leaves the packet alone.
#[inline(always)]
pub(crate) fn pass(reason: Counter) -> i32 {
    count(reason);
    NEXT
}

/// No proxy is there to take a matching flow: the user's choice.
#[inline(always)]
pub(crate) fn fail() -> i32 {
    if settings::fail_open() == 1 { pass(Counter::FailOpen) } else { drop(Counter::FailClosed) }
}

/// Throws the packet away.
#[inline(always)]
pub(crate) fn drop(reason: Counter) -> i32 {
    count(reason);
    DROP
}

/// Which mark a steered packet gets.
#[derive(Clone, Copy)]
pub(crate) enum Mark {
    /// The tproxy mark, for packets that arrived on an interface.
    Tproxy,
    /// The tproxy mark and the own mark together, for the host's own packets
    /// at `lo`. With one mark for both, the routing rule of `lo` would match
    /// the reverse path check of other interfaces under `src_valid_mark=1`
    /// (`__fib_validate_source` asks with iif = lo) and drop their packets.
    Own,
}

#[inline(always)]
fn set_mark(skb: &Skb, mark: Mark) {
    let steered = (skb.mark() & !settings::mark_mask()) | settings::mark_value();
    let value = match mark {
        Mark::Tproxy => steered,
        Mark::Own => steered | settings::own_mark(),
    };
    write_mark(skb, value);
}

/// Gives the packet exactly this mark.
#[inline(always)]
pub(crate) fn write_mark(skb: &Skb, value: u32) {
    // SAFETY: the context is valid, and `mark` may be written.
    unsafe { core::ptr::write_volatile(&raw mut (*skb.as_ptr()).mark, value) };
}

/// Hands the packet to a socket of the proxy and marks it, so that routing
/// delivers it to this host.
#[inline(always)]
pub(crate) fn to_socket(skb: &Skb, sock: Sock, mark: Mark, outcome: Counter) -> i32 {
    let result = sock.assign(skb);
    count(match result {
        0 => outcome,
        EINVAL => Counter::AssignInvalid,
        ENOENT => Counter::AssignNoEntry,
        ENETUNREACH => Counter::AssignNetUnreach,
        EOPNOTSUPP => Counter::AssignNotSupported,
        ESOCKTNOSUPPORT => Counter::AssignSocketType,
        _ => Counter::AssignOther,
    });
    set_mark(skb, mark);
    ACCEPT
}

/// Hands the packet to the socket of a TCP connection, which a lookup has found.
///
/// The stack finds that socket as well, and with it the route that the socket
/// keeps (`tcp_v4_early_demux`, `tcp_v6_early_demux`). Of a packet with an assigned
/// socket it asks routing anew, which costs more than the second lookup
/// (`ip_rcv_finish_core`, `ip6_rcv_finish_core`). In either case a packet with a
/// socket is not forwarded while the routing rule is gone (`ip_forward`): without
/// early demux that takes the assignment.
#[inline(always)]
pub(crate) fn to_connection(skb: &Skb, sock: Sock, mark: Mark) -> i32 {
    if settings::early_demux() == 1 {
        to_stack(skb, mark, Counter::SteeredEstablished)
    } else {
        to_socket(skb, sock, mark, Counter::SteeredEstablished)
    }
}

/// Marks the packet without a socket: routing delivers it to this host, and
/// the stack looks for the socket (fragments), or answers with a reset.
#[inline(always)]
pub(crate) fn to_stack(skb: &Skb, mark: Mark, outcome: Counter) -> i32 {
    count(outcome);
    set_mark(skb, mark);
    ACCEPT
}

/// Says that the packet is for this host, whatever its link-layer address.
#[inline(always)]
pub(crate) fn accept_frame(skb: &Skb) {
    const PACKET_HOST: u32 = 0;
    // SAFETY: the context is valid. It fails only where the type is already so.
    unsafe { bpf_skb_change_type(skb.as_ptr(), PACKET_HOST) };
}

/// Turns a packet that is leaving back to the loopback device.
#[inline(always)]
pub(crate) fn to_loopback(skb: &Skb, packet: &Packet) -> i32 {
    if !has_link_header(skb, packet) && (settings::link_headers() == 0 || !add_link_header(skb)) {
        return drop(Counter::OwnNoHeader);
    }
    count(Counter::OwnRedirected);
    // SAFETY: no preconditions.
    unsafe { bpf_redirect(settings::lo_ifindex(), u64::from(BPF_F_INGRESS)) as i32 }
}

/// Whether a leaving packet has a link-layer header: not on a tun device,
/// `WireGuard` or PPP. Packets above 64 KiB (no length in the IP header) are
/// built for Ethernet devices alone.
#[inline(always)]
fn has_link_header(skb: &Skb, packet: &Packet) -> bool {
    packet.ip_len == 0 || skb.len() > packet.ip_len
}

/// Gives a packet the Ethernet header without which a device that has such
/// headers refuses it, as `lo` does (`__bpf_redirect_common`). TC programs may
/// do so from Linux 5.8 on; before 5.12 the kernel does not add one to a packet
/// as long as the device's MTU.
#[inline(always)]
pub(crate) fn add_link_header(skb: &Skb) -> bool {
    const ETHERTYPE_AT: u32 = 12;
    let ethertype = skb.protocol() as u16;
    // SAFETY: the context is valid, no pointer into the packet is kept, and the
    // helper reads the two bytes of `ethertype`. The rest of the header is zero.
    unsafe {
        bpf_skb_change_head(skb.as_ptr(), ETHERNET_HEADER, 0) == 0
            && bpf_skb_store_bytes(skb.as_ptr(), ETHERTYPE_AT, (&raw const ethertype).cast(), 2, 0) == 0
    }
}
