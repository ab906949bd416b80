//! TC ingress of captured interfaces: classify a new flow once, steer.

use tproxy_common::abi::{Decision, HostPair, Origin, TCP, UDP, Verdict};
use tproxy_common::classify::is_special;
use tproxy_common::counter::Counter;
use tproxy_common::wire::{Fragment, Packet, Skip, hop_limit};

use crate::account::{FlowRef, arrives_for_host, count, down_key, now, skip_counter, up_key};
use crate::fast_path;
use crate::fragment::{self, Side};
use crate::handshake;
use crate::icmp;
use crate::listener;
use crate::maps::HOST_PAIRS;
use crate::nat;
use crate::policy;
use crate::reset;
use crate::scratch;
use crate::settings;
use crate::skb::Skb;
use crate::sock;
use crate::steer::{Mark, NEXT, drop, fail, pass, to_connection, to_socket, to_stack};
use crate::trace::trace;

/// The identifier in a VLAN tag (IEEE 802.1Q).
const VLAN_ID: u32 = 0x0fff;

/// Decides over a packet.
#[inline(always)]
pub(crate) fn ingress(skb: &Skb) -> i32 {
    handshake::accept_let_in(skb);
    admitted(skb, fast_path::captured, |packet| {
        let action = match packet.fragment {
            Fragment::Whole if packet.protocol == UDP => udp(skb, packet),
            Fragment::Whole => tcp(skb, packet),
            Fragment::First | Fragment::Later => fragment::ingress::<Captured>(skb, packet),
        };
        trace(skb, packet, "capture", action);
        action
    })
}

/// Makes the checks that need no lookup, then lets `decide` decide over what the fast path
/// leaves. The packet is handed on by reference: a copy costs an eighth of the stack.
#[inline(always)]
pub(crate) fn admitted(skb: &Skb, fast: fn(&Skb) -> i32, decide: impl FnOnce(&Packet) -> i32) -> i32 {
    if !skb.is_for_host() {
        return pass(Counter::PassNotForUs);
    }
    // Identifier 0 carries a priority alone; the stack takes it off.
    if skb.vlan_present() != 0 && skb.vlan_tci() & VLAN_ID != 0 {
        return pass(Counter::PassVlan);
    }
    let action = fast(skb);
    if action != fast_path::SLOW {
        return action;
    }
    let Some(packet) = scratch::parsed() else { return NEXT };
    match skb.parse(packet) {
        Ok(())
            if is_special(&packet.destination, packet.family)
                || is_special(&packet.source, packet.family) =>
        {
            pass(Counter::PassSpecial)
        }
        Ok(()) => decide(packet),
        Err(Skip::Protocol) if skb.parse_icmp_error(packet).is_ok() => icmp::ingress(skb, packet),
        Err(skip) => pass(skip_counter(skip)),
    }
}

#[inline(never)]
fn tcp(skb: &Skb, packet: &Packet) -> i32 {
    let key = up_key(packet);
    let flow = FlowRef::find(&key);
    let proxied = flow.is_some_and(|flow| flow.is_proxied(TCP));
    if let Some(flow) = flow
        && !packet.is_syn()
    {
        if proxied {
            return known(skb, packet, flow);
        }
        flow.up(skb, packet);
        return unproxied(flow.verdict());
    }
    if !proxied && policy::is_local(&packet.destination) {
        arrives_for_host(skb, packet);
        return natted(skb, packet, Counter::PassLocal);
    }
    let mut time_wait = None;
    if let Some(sock) = sock::connection(skb, packet) {
        if !(packet.is_syn() && sock.is_time_wait()) {
            return to_connection(skb, sock, Mark::Tproxy);
        }
        time_wait = Some(sock);
    }
    if !packet.is_syn() {
        return natted(skb, packet, Counter::PassMidstream);
    }
    // One that was set aside was counted, and decided over, then: it has not all of
    // what rules may ask for any more.
    let let_in = handshake::take_admission(skb);
    let mut decision = match flow {
        Some(flow) if let_in => flow.decision(),
        // The flow table has lost it. Its client sends another.
        None if let_in => return drop(Counter::SynNotAdmitted),
        _ => policy::decision(skb),
    };
    // The rules have changed since the connection before it. The stack will find the socket
    // of that one, and drop what it was to forward (`ip_forward`), for a minute.
    if decision.raw_verdict() == Verdict::Pass as u8 && time_wait.is_some() {
        decision = Decision::by_default(Verdict::Proxy);
    }
    if !Verdict::is_for_proxy(decision.raw_verdict(), TCP) {
        FlowRef::open(skb, &key, flow, decision, Origin::Captured);
        return if decision.raw_verdict() == Verdict::Reject as u8 {
            reset::answer(skb, packet)
        } else {
            unproxied(decision.raw_verdict())
        };
    }
    let Some(listener) = listener::of(skb, packet) else {
        // An entry of an earlier, proxied connection would have the packets
        // that follow answered with a reset.
        if proxied && settings::fail_open() == 1 {
            FlowRef::open(skb, &key, flow, Decision::by_default(Verdict::Pass), Origin::Captured);
        }
        return fail();
    };
    if !let_in {
        FlowRef::open(skb, &key, flow, decision, Origin::Captured);
    }
    // Of a flow that is asked about, the first bytes say where it goes, and a client sends
    // them once it is answered.
    if handshake::is_faithful() && !let_in && decision.raw_verdict() != Verdict::Ask as u8 {
        return handshake::set_aside(skb, packet);
    }
    // A SYN on a TIME_WAIT socket goes to that socket: the stack checks the
    // sequence number, then looks for a listener, where `tproxy_lookup` answers.
    // The listener instead would refuse the duplicate and time the client out.
    to_socket(skb, time_wait.unwrap_or(listener), Mark::Tproxy, Counter::SteeredTcpNew)
}

/// A packet that does not go to the proxy, by the verdict over its flow.
#[inline(always)]
pub(crate) fn unproxied(verdict: u8) -> i32 {
    if verdict == Verdict::Drop as u8 || verdict == Verdict::Reject as u8 {
        drop(Counter::PolicyDropped)
    } else {
        pass(Counter::PassPolicy)
    }
}

/// A packet that goes to the proxy by this verdict over its flow, while no proxy is there.
/// What the rules refuse is no flow of the proxy's, whose choice it were.
#[inline(always)]
pub(crate) fn unheard(verdict: u8) -> i32 {
    if verdict == Verdict::Reject as u8 { drop(Counter::PolicyDropped) } else { fail() }
}

/// A packet of a proxied connection that is no SYN. Where the connection has ended,
/// to pass it on would show the server a client that it does not know; the stack
/// answers with a reset, over IPv4 by the listener that `tproxy_lookup` gives it.
#[inline(always)]
fn known(skb: &Skb, packet: &Packet, flow: FlowRef) -> i32 {
    flow.up(skb, packet);
    let proxy_listens = listener::is_there(skb, packet, flow.last_seen());
    if proxy_listens && settings::early_demux() == 1 {
        return to_stack(skb, Mark::Tproxy, Counter::SteeredEstablished);
    }
    match sock::connection(skb, packet) {
        Some(sock) => to_connection(skb, sock, Mark::Tproxy),
        None if proxy_listens => to_stack(skb, Mark::Tproxy, Counter::SteeredLate),
        None => fail(),
    }
}

/// One interface may be captured and upstream-facing at once: the packet may
/// be an answer to what NAT has changed, else it passes.
#[inline(always)]
fn natted(skb: &Skb, packet: &Packet, reason: Counter) -> i32 {
    match nat::steer(skb, packet) {
        NEXT => pass(reason),
        action => action,
    }
}

#[inline(never)]
fn udp(skb: &Skb, packet: &Packet) -> i32 {
    let key = up_key(packet);
    let found = FlowRef::find(&key);
    let flow = match found.filter(|flow| !flow.is_stale(now())) {
        Some(flow) if flow.is_proxied(UDP) => {
            if flow.is_dropped_by_name(&key) {
                flow.up(skb, packet);
                return unproxied(Verdict::Drop as u8);
            }
            flow
        }
        Some(flow) => {
            flow.up(skb, packet);
            return unproxied(flow.verdict());
        }
        None => {
            // One interface may be captured and upstream-facing at once.
            let action = nat::steer(skb, packet);
            if action != NEXT {
                return action;
            }
            if policy::is_local(&packet.destination) {
                arrives_for_host(skb, packet);
                note_request_to_host(skb, packet);
                return pass(Counter::PassLocal);
            }
            if let Some(sock) = sock::own_udp(skb, packet) {
                return to_socket(skb, sock, Mark::Tproxy, Counter::SteeredUdpReturn);
            }
            if let Some(request) = answered_request(packet) {
                request.down(skb, packet);
                return pass(Counter::PassReply);
            }
            let decision = policy::decision(skb);
            if !Verdict::is_for_proxy(decision.raw_verdict(), UDP) {
                FlowRef::open(skb, &key, found, decision, Origin::Captured);
                return unproxied(decision.raw_verdict());
            }
            let Some(sock) = listener::of(skb, packet) else { return unheard(decision.raw_verdict()) };
            // The route of its destination leads back in here. Taken again it
            // would be sent again, with a new TTL and without end.
            if settings::client_port() == 0
                && sock::is_sent_by_own_udp(skb, packet)
                && has_been_forwarded(skb, packet)
            {
                return drop(Counter::LoopDropped);
            }
            note_host_pair(packet);
            FlowRef::open(skb, &key, found, decision, Origin::Captured);
            return to_socket(skb, sock, Mark::Tproxy, Counter::SteeredUdp);
        }
    };
    let Some(sock) = listener::of(skb, packet) else { return unheard(flow.verdict()) };
    flow.up(skb, packet);
    to_socket(skb, sock, Mark::Tproxy, Counter::SteeredUdp)
}

/// Whether a router has had the packet, so far as that can be seen: its hop limit is none that
/// systems begin with. A client of this link may use a port that the proxy uses for it too.
#[inline(always)]
fn has_been_forwarded(skb: &Skb, packet: &Packet) -> bool {
    !matches!(hop_limit(skb, packet.family), Some(64 | 128 | 255))
}

/// The request from outside that a datagram of a client answers: the client is
/// a server, and its answers are no flows of its own.
#[inline(always)]
pub(crate) fn answered_request(packet: &Packet) -> Option<FlowRef> {
    FlowRef::find(&down_key(packet)).filter(|request| request.is_from_uplink() && request.is_recent())
}

/// Remembers that a peer asked a UDP service of this host, so that
/// [`own`](crate::own) does not take the service's answers for flows of the host.
#[inline(never)]
pub(crate) fn note_request_to_host(skb: &Skb, packet: &Packet) {
    if settings::own_traffic() == 0
        || FlowRef::find(&down_key(packet)).is_some()
        || sock::is_for_own_udp(skb, packet)
    {
        return;
    }
    let key = up_key(packet);
    FlowRef::open(skb, &key, FlowRef::find(&key), Decision::by_default(Verdict::Pass), Origin::Uplink);
}

/// Remembers who asked whom, for replies whose fragments arrive before their first.
#[inline(never)]
pub(crate) fn note_host_pair(packet: &Packet) {
    let pair = HostPair { client: packet.source, destination: packet.destination };
    if HOST_PAIRS.get_ptr(&pair).is_none() && HOST_PAIRS.insert(&pair, 1, 0).is_err() {
        count(Counter::FlowInsertFailed);
    }
}

/// Fragments of clients.
struct Captured;

impl Side for Captured {
    const COUNTS: bool = true;

    #[inline(always)]
    fn decision(skb: &Skb, packet: &Packet) -> Decision {
        let (proxy, pass) = (Decision::by_default(Verdict::Proxy), Decision::by_default(Verdict::Pass));
        if let Some(flow) = FlowRef::find(&up_key(packet))
            && ((packet.protocol == UDP && !flow.is_stale(now()))
                || (packet.protocol != UDP && !packet.is_syn()))
        {
            return flow.decision();
        }
        if packet.protocol == UDP {
            if sock::own_udp(skb, packet).is_some() {
                return proxy;
            }
            return if answered_request(packet).is_some() { pass } else { policy::decision(skb) };
        }
        if sock::connection(skb, packet).is_some() {
            return proxy;
        }
        if packet.is_syn() { policy::decision(skb) } else { pass }
    }

    #[inline(always)]
    fn might_take(skb: &Skb, packet: &Packet) -> bool {
        let asks = HostPair { client: packet.source, destination: packet.destination };
        let answers = HostPair { client: packet.destination, destination: packet.source };
        // Between two hosts that have asked each other it is more likely a client's.
        (HOST_PAIRS.get_ptr(&answers).is_none() || HOST_PAIRS.get_ptr(&asks).is_some())
            && policy::might_not_pass(skb)
    }
}
