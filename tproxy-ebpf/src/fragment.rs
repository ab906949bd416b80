//! Fragments: only the first has ports, a socket that is assigned to one is
//! lost at reassembly. So all fragments of a datagram are marked alike, this
//! host reassembles it, and `tproxy_lookup` picks the socket.

use tproxy_common::abi::{Decision, FragmentInfo, FragmentKey, Origin, UDP, Verdict};
use tproxy_common::counter::Counter;
use tproxy_common::wire::{Fragment, Packet};

use crate::account::{FlowRef, count, now, up_key};
use crate::capture::{answered_request, note_host_pair, note_request_to_host, unheard, unproxied};
use crate::listener;
use crate::maps::FRAGMENTS;
use crate::nat;
use crate::policy;
use crate::scratch;
use crate::settings;
use crate::skb::Skb;
use crate::steer::{Mark, pass, to_stack};

/// What differs between the two sides of the proxy. Neither is asked about
/// packets for this host.
pub(crate) trait Side {
    /// Whether the packets are counted in the flow table.
    const COUNTS: bool;
    /// What becomes of the datagram, told by its first fragment.
    fn decision(skb: &Skb, packet: &Packet) -> Decision;
    /// Whether it belongs to the proxy, before the ports are known. A wrong yes takes a flow
    /// that the rules would pass; a wrong no loses a datagram.
    fn might_take(skb: &Skb, packet: &Packet) -> bool;
}

#[inline(always)]
fn key(packet: &Packet) -> FragmentKey {
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        id: packet.fragment_id,
        protocol: packet.protocol,
        pad: [0; 3],
    }
}

/// Decides over a fragment at TC ingress.
#[inline(never)]
pub(crate) fn ingress<S: Side>(skb: &Skb, packet: &Packet) -> i32 {
    let is_first = packet.fragment == Fragment::First;
    // Where there is NAT, connection tracking reassembles first, and a datagram
    // has the mark of its first fragment.
    if is_first && nat::is_answer(skb, packet) {
        return to_stack(skb, Mark::Tproxy, Counter::SteeredFragment);
    }
    if policy::is_local(&packet.destination) {
        if is_first && packet.protocol == UDP {
            note_request_to_host(skb, packet);
        }
        return pass(Counter::PassLocal);
    }
    // After reassembly nothing would hand the datagram to the proxy.
    if settings::sk_lookup() == 0 {
        return pass(Counter::PassPolicy);
    }
    let key = key(packet);
    let known = FRAGMENTS.get_ptr_mut(&key);
    let verdict =
        if is_first { first::<S>(skb, packet, &key, known) } else { later::<S>(skb, packet, &key, known) };
    if !Verdict::is_for_proxy(verdict, packet.protocol) {
        return unproxied(verdict);
    }
    // All workers listen, or none does: the port does not matter here.
    if S::COUNTS && listener::of(skb, packet).is_none() {
        return unheard(verdict);
    }
    to_stack(skb, Mark::Tproxy, Counter::SteeredFragment)
}

/// The request from outside that a datagram answers which is no flow of a client.
#[inline(always)]
fn request_of(packet: &Packet) -> Option<FlowRef> {
    if packet.protocol == UDP && FlowRef::find(&up_key(packet)).is_none() {
        answered_request(packet)
    } else {
        None
    }
}

/// Answers with a [`Verdict`] as maps hold it.
#[inline(never)]
fn first<S: Side>(skb: &Skb, packet: &Packet, key: &FragmentKey, known: Option<*mut FragmentInfo>) -> u8 {
    let (mut pending_packets, mut pending_bytes) = (0, 0);
    let mut early = false;
    if let Some(info) = known {
        // SAFETY: entries of an LRU map are never unmapped while a program runs.
        unsafe {
            if (*info).has_ports == 0 {
                early = (*info).verdict == Verdict::Proxy as u8;
                pending_packets = (*info).pending_packets;
                pending_bytes = (*info).pending_bytes;
            }
        }
    }
    // The later ones are here already and wait for this one.
    let mut decision = S::decision(skb, packet);
    if early && decision.raw_verdict() == Verdict::Pass as u8 {
        decision = Decision::by_default(Verdict::Proxy);
    }
    let verdict = decision.raw_verdict();
    let proxied = Verdict::is_for_proxy(verdict, packet.protocol);
    let info = FragmentInfo {
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        has_ports: 1,
        verdict,
        ..FragmentInfo::default()
    };
    if FRAGMENTS.insert(key, &info, 0).is_err() {
        count(Counter::FlowInsertFailed);
    }
    if S::COUNTS {
        if proxied && packet.protocol == UDP {
            note_host_pair(packet);
        }
        if let Some(request) = request_of(packet)
            && !proxied
        {
            request.down(skb, packet);
            request.add_down(now(), pending_packets, pending_bytes, 0);
        } else {
            let key = up_key(packet);
            FlowRef::open(skb, &key, FlowRef::find(&key), decision, Origin::Captured);
            if pending_packets != 0
                && let Some(flow) = FlowRef::find(&key)
            {
                flow.add_up(now(), pending_packets, pending_bytes, 0);
            }
        }
    }
    verdict
}

/// Likewise.
#[inline(never)]
fn later<S: Side>(skb: &Skb, packet: &Packet, key: &FragmentKey, known: Option<*mut FragmentInfo>) -> u8 {
    let (packets, bytes) = skb.packet_on_the_wire(packet);
    let Some(info) = known else {
        count(Counter::FragmentUnknown);
        let verdict = if S::might_take(skb, packet) { Verdict::Proxy } else { Verdict::Pass };
        let info = FragmentInfo {
            pending_packets: packets,
            pending_bytes: bytes,
            verdict: verdict as u8,
            ..FragmentInfo::default()
        };
        if FRAGMENTS.insert(key, &info, 0).is_err() {
            count(Counter::FlowInsertFailed);
        }
        return verdict as u8;
    };
    // SAFETY: entries of an LRU map are never unmapped while a program runs.
    // The fragments of one datagram follow each other on one CPU.
    unsafe {
        if (*info).has_ports == 0 {
            (*info).pending_packets += packets;
            (*info).pending_bytes += bytes;
        } else if S::COUNTS {
            let Some(whole) = scratch::altered() else { return Verdict::Pass as u8 };
            *whole = *packet;
            whole.source_port = (*info).source_port;
            whole.destination_port = (*info).destination_port;
            if let Some(request) = request_of(whole) {
                request.add_down(now(), packets, bytes, 0);
            } else if let Some(flow) = FlowRef::find(&up_key(whole)) {
                flow.add_up(now(), packets, bytes, 0);
            }
        }
        (*info).verdict
    }
}

/// Fills in the ports of a leaving fragment. The stack sends the first one
/// first. `false`: they are not known.
#[inline(never)]
pub(crate) fn resolve_ports(packet: &mut Packet) -> bool {
    match packet.fragment {
        Fragment::Whole => true,
        Fragment::First => {
            let info = FragmentInfo {
                source_port: packet.source_port,
                destination_port: packet.destination_port,
                has_ports: 1,
                ..FragmentInfo::default()
            };
            if FRAGMENTS.insert(&key(packet), &info, 0).is_err() {
                count(Counter::FlowInsertFailed);
            }
            true
        }
        Fragment::Later => match FRAGMENTS.get_ptr(&key(packet)) {
            // SAFETY: entries of an LRU map are never unmapped while a program runs.
            Some(info) => unsafe {
                packet.source_port = (*info).source_port;
                packet.destination_port = (*info).destination_port;
                (*info).has_ports == 1
            },
            None => false,
        },
    }
}
