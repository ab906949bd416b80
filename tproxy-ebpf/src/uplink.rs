//! TC ingress of upstream-facing interfaces: with `source = client` the
//! servers answer to the client's address, and the answers belong to sockets
//! of the proxy, also where NAT stands between. Everything else passes.

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::macros::btf_map;
use tproxy_common::abi::{Decision, HostPair, UDP, Verdict};
use tproxy_common::counter::Counter;
use tproxy_common::wire::{Fragment, Packet};

use crate::account::{FlowRef, arrives_for_host, down_key};
use crate::capture::{admitted, note_request_to_host};
use crate::fragment::{self, Side};
use crate::maps::HOST_PAIRS;
use crate::nat;
use crate::policy;
use crate::settings;
use crate::skb::Skb;
use crate::sock;
use crate::steer::{Mark, NEXT, pass, to_connection, to_socket, to_stack};
use crate::trace::trace;

/// Decides over a packet.
#[inline(always)]
pub(crate) fn ingress(skb: &Skb) -> i32 {
    admitted(skb, |packet| {
        let action = match packet.fragment {
            Fragment::Whole => whole(skb, packet),
            Fragment::First | Fragment::Later => fragment::ingress::<Uplink>(skb, packet),
        };
        trace(skb, packet, "uplink", action);
        action
    })
}

#[inline(never)]
fn whole(skb: &Skb, packet: &Packet) -> i32 {
    let flow_table_first = last_passed();
    if flow_table_first && is_of_passed_connection(packet) {
        return pass(Counter::PassNoSocket);
    }
    if is_for_own_connection(skb, packet) {
        note_last_passed(false);
        return to_stack(skb, Mark::Tproxy, Counter::SteeredEstablished);
    }
    if !flow_table_first && is_of_passed_connection(packet) {
        note_last_passed(true);
        return pass(Counter::PassNoSocket);
    }
    if policy::is_local(&packet.destination) {
        let action = nat::steer(skb, packet);
        if action != NEXT {
            return action;
        }
        arrives_for_host(skb, packet);
        if packet.protocol == UDP {
            note_request_to_host(skb, packet);
        }
        return pass(Counter::PassLocal);
    }
    if packet.protocol == UDP {
        return udp(skb, packet);
    }
    match sock::connection(skb, packet) {
        Some(sock) if !packet.is_syn() => to_connection(skb, sock, Mark::Tproxy),
        _ => natted(skb, packet),
    }
}

/// Whether the last packet of a known TCP connection on this CPU was of one that passes. The next
/// is likely of that kind too, and which of the two lookups comes first is half its cost.
#[btf_map]
static LAST_PASSED: PerCpuArray<u32, 1> = PerCpuArray::new();

#[inline(always)]
fn last_passed() -> bool {
    LAST_PASSED.get(0).is_some_and(|passed| *passed != 0)
}

#[inline(always)]
fn note_last_passed(passed: bool) {
    if let Some(last) = LAST_PASSED.get_ptr_mut(0) {
        // SAFETY: the entry is valid and belongs to this CPU.
        unsafe { last.write(u32::from(passed)) };
    }
}

/// Whether the packet answers a client's connection that passes, by the flow table, so that no
/// socket need be looked for. While the connection lives, for the proxy may come to
/// use the client's port towards that server after it.
#[inline(never)]
fn is_of_passed_connection(packet: &Packet) -> bool {
    packet.protocol != UDP
        && !packet.is_syn()
        && FlowRef::find(&down_key(packet)).is_some_and(|flow| flow.is_passed_and_alive())
}

/// Whether a socket says by itself that the packet is the proxy's, as of nearly
/// every packet: it costs a fraction of the search among the host's own addresses.
/// Those are the source of the host's own flows, whose packets shall stay as they are.
#[inline(always)]
fn is_for_own_connection(skb: &Skb, packet: &Packet) -> bool {
    settings::early_demux() == 1
        && settings::own_traffic() == 0
        && packet.protocol != UDP
        && !packet.is_syn()
        && sock::connection(skb, packet).is_some_and(|sock| sock.is_own_full())
}

/// No socket owns the packet as it is.
#[inline(always)]
fn natted(skb: &Skb, packet: &Packet) -> i32 {
    match nat::steer(skb, packet) {
        NEXT => pass(Counter::PassNoSocket),
        action => action,
    }
}

#[inline(always)]
fn udp(skb: &Skb, packet: &Packet) -> i32 {
    // A passed flow of a client keeps its replies, even if a socket of the
    // proxy happens to have the client's port.
    if let Some(flow) = FlowRef::find(&down_key(packet))
        && !flow.is_proxied(UDP)
    {
        return pass(Counter::PassNoSocket);
    }
    if let Some(sock) = sock::own_udp(skb, packet) {
        return to_socket(skb, sock, Mark::Tproxy, Counter::SteeredUdpReturn);
    }
    natted(skb, packet)
}

/// Fragments of servers.
struct Uplink;

impl Side for Uplink {
    const COUNTS: bool = false;

    #[inline(always)]
    fn decision(skb: &Skb, packet: &Packet) -> Decision {
        let proxied = if packet.protocol == UDP {
            sock::own_udp(skb, packet).is_some()
        } else {
            !packet.is_syn() && sock::connection(skb, packet).is_some()
        };
        Decision::by_default(if proxied { Verdict::Proxy } else { Verdict::Pass })
    }

    #[inline(always)]
    fn might_take(_: &Skb, packet: &Packet) -> bool {
        let pair = HostPair { client: packet.destination, destination: packet.source };
        packet.protocol == UDP && HOST_PAIRS.get_ptr(&pair).is_some()
    }
}
