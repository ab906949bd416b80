//! The host's own traffic: TC egress turns its flows back to `lo`, and TC
//! ingress of `lo` steers them. The application keeps its source address, and
//! no packet filter takes part.

use tproxy_common::abi::{Decision, Origin, UDP, Verdict};
use tproxy_common::classify::is_special;
use tproxy_common::counter::Counter;
use tproxy_common::wire::{Fragment, Packet};

use crate::account::{FlowRef, down_key, leaves, now, skip_counter, up_key};
use crate::capture::{unheard, unproxied};
use crate::fragment::resolve_ports;
use crate::handshake;
use crate::listener;
use crate::policy;
use crate::reset;
use crate::scratch;
use crate::settings;
use crate::skb::Skb;
use crate::sock;
use crate::steer::{Mark, NEXT, accept_frame, fail, pass, to_connection, to_loopback, to_socket, to_stack};
use crate::trace::trace;

/// TC egress of every interface that the host's own traffic may leave by.
#[inline(always)]
pub(crate) fn egress(skb: &Skb) -> i32 {
    let Some(packet) = scratch::parsed() else { return NEXT };
    match skb.parse(packet) {
        Ok(()) => leaving(skb, packet),
        Err(_) => NEXT,
    }
}

#[inline(always)]
fn leaving(skb: &Skb, packet: &mut Packet) -> i32 {
    let known = resolve_ports(packet);
    let packet: &Packet = packet;
    if known {
        leaves(skb, packet);
    }
    // Forwarded packets have arrived on an interface.
    if skb.ingress_ifindex() != 0 {
        return NEXT;
    }
    if skb.mark() & settings::own_mark() == settings::own_mark() {
        return pass(Counter::PassOwnMark);
    }
    if is_special(&packet.destination, packet.family) || is_special(&packet.source, packet.family) {
        return pass(Counter::PassSpecial);
    }
    if !known {
        return pass(Counter::FragmentUnknown);
    }
    let action = own(skb, packet);
    trace(skb, packet, "own", action);
    action
}

#[inline(never)]
fn own(skb: &Skb, packet: &Packet) -> i32 {
    let key = up_key(packet);
    let found = FlowRef::find(&key);
    if let Some(flow) = found
        && !packet.is_syn()
        && (packet.protocol != UDP || !flow.is_stale(now()))
    {
        flow.up(skb, packet);
        if !flow.is_proxied(packet.protocol) {
            return unproxied(flow.verdict());
        }
        // While the proxy drains its connections nobody listens.
        let taken = listener::of(skb, packet).is_some()
            || (packet.protocol != UDP && sock::connection(skb, packet).is_some());
        return if taken { to_loopback(skb, packet) } else { unheard(flow.verdict()) };
    }
    if packet.protocol == UDP {
        // An answer of a service on this host.
        if FlowRef::find(&down_key(packet)).is_some() {
            return pass(Counter::PassReply);
        }
    } else if !packet.is_syn() {
        // The flow table may have lost a long idle flow; its socket has not.
        return if sock::connection(skb, packet).is_some() {
            to_loopback(skb, packet)
        } else {
            pass(Counter::PassMidstream)
        };
    }
    // Multicast and broadcast routes of subnets are local prefixes too.
    if policy::is_local(&packet.destination) {
        return pass(Counter::PassLocal);
    }
    let decision = policy::decision_on_own(skb);
    let captured = Verdict::is_for_proxy(decision.raw_verdict(), packet.protocol);
    if captured && listener::of(skb, packet).is_none() {
        if decision.raw_verdict() == Verdict::Reject as u8 {
            return unheard(decision.raw_verdict());
        }
        // See `capture`: an entry of an earlier, proxied connection.
        if found.is_some() && settings::fail_open() == 1 {
            FlowRef::open(skb, &key, found, Decision::by_default(Verdict::Pass), Origin::Own);
        }
        return fail();
    }
    FlowRef::open(skb, &key, found, decision, Origin::Own);
    if captured {
        to_loopback(skb, packet)
    } else if decision.raw_verdict() == Verdict::Reject as u8 {
        reset::answer_own(skb, packet)
    } else {
        unproxied(decision.raw_verdict())
    }
}

/// TC ingress of `lo`. Packets for addresses of this host are plain loopback
/// traffic; the others were turned back.
#[inline(always)]
pub(crate) fn loopback(skb: &Skb) -> i32 {
    let Some(packet) = scratch::parsed() else { return NEXT };
    match skb.parse(packet) {
        Ok(()) if is_special(&packet.destination, packet.family) => pass(Counter::PassSpecial),
        Ok(()) if policy::is_local(&packet.destination) => pass(Counter::PassLocal),
        Ok(()) => {
            let action = turned_back(skb, packet);
            trace(skb, packet, "lo", action);
            action
        }
        Err(skip) => pass(skip_counter(skip)),
    }
}

#[inline(never)]
fn turned_back(skb: &Skb, packet: &Packet) -> i32 {
    let let_in = handshake::take_admission(skb);
    // The frame still has the link-layer address of the uplink's next hop.
    accept_frame(skb);
    if packet.fragment != Fragment::Whole {
        return to_stack(skb, Mark::Own, Counter::SteeredFragment);
    }
    if packet.protocol == UDP {
        return match listener::of(skb, packet) {
            Some(sock) => to_socket(skb, sock, Mark::Own, Counter::SteeredUdp),
            None => fail(),
        };
    }
    let sock = sock::connection(skb, packet);
    if handshake::is_faithful()
        && !let_in
        && packet.is_syn()
        && sock.as_ref().is_none_or(sock::Sock::is_time_wait)
        // See `capture`: its client is to send its first bytes.
        && !FlowRef::find(&up_key(packet)).is_some_and(|flow| flow.is_asked())
    {
        if listener::of(skb, packet).is_none() {
            return fail();
        }
        return handshake::set_aside(skb, packet);
    }
    match sock {
        // See `capture`: a SYN on a TIME_WAIT socket goes to that socket.
        Some(sock) => to_connection(skb, sock, Mark::Own),
        None if packet.is_syn() => match listener::of(skb, packet) {
            Some(sock) => to_socket(skb, sock, Mark::Own, Counter::SteeredTcpNew),
            None => fail(),
        },
        None => to_stack(skb, Mark::Own, Counter::SteeredLate),
    }
}
