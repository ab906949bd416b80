//! NAT on the way to the servers (MASQUERADE, SNAT) with `source = client`.
//!
//! The answers come for what NAT made of the source, and connection tracking
//! puts the socket's own address back after TC ingress. So TC egress notes what
//! was changed, and TC ingress finds the socket by that: marked, the packet is
//! delivered to this host once its destination is the socket's again.

use tproxy_common::abi::{Endpoint, UDP};
use tproxy_common::counter::Counter;
use tproxy_common::wire::{Fragment, Packet};

use crate::account::{count, down_key, up_key};
use crate::maps::NAT;
use crate::scratch;
use crate::skb::Skb;
use crate::sock::{self, Sock};
use crate::steer::{Mark, NEXT, to_socket};

/// TC egress of an upstream-facing interface: notes, changes nothing.
#[inline(always)]
pub(crate) fn egress(skb: &Skb) -> i32 {
    // Forwarded packets have no socket.
    if skb.has_socket()
        && !sock::is_source_plainly_kept(skb)
        && let Some(packet) = scratch::parsed()
        && skb.parse(packet).is_ok()
    {
        note(skb, packet);
    }
    NEXT
}

/// Notes that a leaving packet of the proxy has another source than its socket.
/// A packet without a socket (of a connection in `TIME_WAIT`) belongs to one
/// whose earlier packets had it.
#[inline(never)]
pub(crate) fn note(skb: &Skb, packet: &Packet) {
    let mut original = Endpoint::default();
    // Later fragments have no ports, and follow the first.
    if packet.fragment == Fragment::Later || !sock::is_source_changed(skb, packet, &mut original) {
        return;
    }
    let key = up_key(packet);
    // SAFETY: entries of an LRU map are never unmapped while a program runs.
    if NAT.get_ptr(&key).is_some_and(|known| unsafe { *known == original }) {
        return;
    }
    if NAT.insert(&key, &original, 0).is_err() {
        count(Counter::FlowInsertFailed);
    }
}

/// Hands an arriving packet to the proxy's socket that it answers; [`NEXT`]
/// where it is no such answer.
#[inline(never)]
pub(crate) fn steer(skb: &Skb, packet: &Packet) -> i32 {
    match receiver(skb, packet) {
        Some(sock) if packet.protocol == UDP => to_socket(skb, sock, Mark::Tproxy, Counter::SteeredUdpReturn),
        Some(sock) => to_socket(skb, sock, Mark::Tproxy, Counter::SteeredEstablished),
        None => NEXT,
    }
}

/// Whether an arriving packet, or a fragment with ports, answers a socket of the proxy.
#[inline(never)]
pub(crate) fn is_answer(skb: &Skb, packet: &Packet) -> bool {
    receiver(skb, packet).is_some()
}

/// The packet with the socket's address and port put back, as connection
/// tracking will.
#[inline(always)]
fn restored(packet: &Packet) -> Option<&'static mut Packet> {
    let original = NAT.get_ptr(&down_key(packet))?;
    let restored = scratch::altered()?;
    *restored = *packet;
    // SAFETY: entries of an LRU map are never unmapped while a program runs.
    unsafe {
        restored.destination = (*original).addr;
        restored.destination_port = (*original).port;
    }
    Some(restored)
}

/// The socket. A note may be older than its use: one counts only while the
/// socket is there, and no other connection of this host has got the port.
#[inline(always)]
fn receiver(skb: &Skb, packet: &Packet) -> Option<Sock> {
    let restored = restored(packet)?;
    if packet.protocol == UDP {
        return sock::own_udp(skb, restored);
    }
    if packet.is_syn() || sock::connection(skb, packet).is_some() {
        return None;
    }
    sock::connection(skb, restored)
}
