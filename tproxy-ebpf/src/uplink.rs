//! TC ingress of upstream-facing interfaces: with `source = client` the
//! servers answer to the client's address, and the answers belong to sockets
//! of the proxy, also where NAT stands between. Everything else passes.

use tproxy_common::abi::{Decision, HostPair, UDP, Verdict};
use tproxy_common::counter::Counter;
use tproxy_common::wire::{Fragment, Packet};

use crate::account::{FlowRef, arrives_for_host, down_key};
use crate::capture::{admitted, note_request_to_host};
use crate::fast_path;
use crate::fragment::{self, Side};
use crate::maps::HOST_PAIRS;
use crate::nat;
use crate::policy;
use crate::skb::Skb;
use crate::sock;
use crate::steer::{Mark, NEXT, pass, to_connection, to_socket};
use crate::trace::trace;

/// Decides over a packet.
#[inline(always)]
pub(crate) fn ingress(skb: &Skb) -> i32 {
    admitted(skb, fast_path::uplink, |packet| {
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
