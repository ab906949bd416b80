//! The proxy's listeners: which serves a packet, and whether it is there.

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::bpf_map_lookup_elem;
use aya_ebpf::macros::btf_map;
use tproxy_common::abi::{Addr, Family, ListenerKind, TCP, listener_index, mapped};
use tproxy_common::flow;
use tproxy_common::wire::Packet;

use crate::maps::LISTENERS;
use crate::settings;
use crate::skb::Skb;
use crate::sock::{self, Sock};

/// Index of the listener that serves a client. The DF bit matters for UDP over IPv4 alone.
#[inline(always)]
pub(crate) fn index_of(
    family: Family,
    protocol: u8,
    dont_fragment: bool,
    client: &Addr,
    client_port: u16,
) -> u32 {
    let kind = match (protocol == TCP, family) {
        (true, Family::V4) => ListenerKind::Tcp4,
        (true, Family::V6) => ListenerKind::Tcp6,
        (false, Family::V4) if dont_fragment => ListenerKind::Udp4Df,
        (false, Family::V4) => ListenerKind::Udp4,
        (false, Family::V6) => ListenerKind::Udp6,
    };
    listener_index(kind, flow::worker(client, client_port, settings::workers()))
}

/// The listener that serves the packet's sender.
#[inline(always)]
pub(crate) fn of(skb: &Skb, packet: &Packet) -> Option<Sock> {
    let index =
        index_of(packet.family, packet.protocol, packet.dont_fragment, &packet.source, packet.source_port);
    if settings::listener_by_tuple() == 1 {
        return by_tuple(skb, packet, index);
    }
    at(index)
}

/// The listener of this index (from TC: Linux 5.8).
#[inline(always)]
pub(crate) fn at(index: u32) -> Option<Sock> {
    // SAFETY: the map takes a u32 key and answers a referenced socket or null.
    unsafe {
        let sk = bpf_map_lookup_elem(
            (&raw const LISTENERS).cast_mut().cast(),
            (&raw const index).cast::<c_void>(),
        );
        Sock::found(sk.cast())
    }
}

/// The same as [`of`] where TC programs cannot read a socket map (Linux 5.7).
#[inline(never)]
fn by_tuple(skb: &Skb, packet: &Packet, index: u32) -> Option<Sock> {
    let address = match packet.family {
        Family::V4 => mapped(settings::listen_v4()),
        Family::V6 => settings::listen_v6(),
    };
    sock::listener_at(skb, packet, &address, settings::listener_port(index))
}

/// When [`of`] was there last, as this CPU has seen.
#[btf_map]
static LISTENED: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Whether the proxy listens, or did 10 ms ago, which spares most packets of established
/// connections the lookup. A client that is wrong about the proxy for that long sends its
/// segment again.
#[inline(always)]
pub(crate) fn is_there(skb: &Skb, packet: &Packet, now: u64) -> bool {
    if was_just_there(now) {
        return true;
    }
    let listens = of(skb, packet).is_some();
    if listens && let Some(listened) = LISTENED.get_ptr_mut(0) {
        // SAFETY: the entry is valid and belongs to this CPU.
        unsafe { *listened = now };
    }
    listens
}

/// Whether [`is_there`] need not ask.
#[inline(always)]
pub(crate) fn was_just_there(now: u64) -> bool {
    const JUST_NOW: u64 = 10_000_000;
    LISTENED.get(0).is_some_and(|listened| now.saturating_sub(*listened) < JUST_NOW)
}
