//! The fast path: plain packets of flows that are known, as nearly all are.
//!
//! It decides as [`capture`](crate::capture), [`uplink`](crate::uplink) and
//! [`account`](crate::account) do, in few instructions that stand together: between the packets
//! of a busy host the processor's caches forget the programs, and what they fetch anew costs more
//! than what they compute. Nothing is changed before it is sure of a packet. The build that
//! logs goes the slow way with all, for it tells of each packet what was parsed.

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::macros::btf_map;
use tproxy_common::abi::{Family, TCP, UDP};
use tproxy_common::counter::Counter;
use tproxy_common::wire::plain::{Plain, PlainV4, PlainV6};

use crate::account::{FlowRef, now};
use crate::capture::unproxied;
use crate::listener;
use crate::settings;
use crate::skb::Skb;
use crate::sock;
use crate::steer::{Mark, NEXT, pass, to_socket, to_stack};

/// The packet goes the slow way.
pub(crate) const SLOW: i32 = i32::MIN;

/// Runs a function for the packet's family.
macro_rules! by_family {
    ($skb:ident, $function:ident) => {
        match $skb.family() {
            Some(Family::V4) if !cfg!(feature = "log") => $function::<PlainV4>($skb),
            Some(Family::V6) if !cfg!(feature = "log") => $function::<PlainV6>($skb),
            _ => SLOW,
        }
    };
}

/// TC ingress of captured interfaces.
#[inline(always)]
pub(crate) fn captured(skb: &Skb) -> i32 {
    by_family!(skb, captured_of)
}

/// TC ingress of upstream-facing interfaces.
#[inline(always)]
pub(crate) fn uplink(skb: &Skb) -> i32 {
    by_family!(skb, uplink_of)
}

/// TC egress of captured interfaces.
#[inline(always)]
pub(crate) fn reply(skb: &Skb) -> i32 {
    by_family!(skb, reply_of)
}

// A call: its variables do not fit beside those of the slow path, of which Linux before 6.8
// rounds each function's up to 32 bytes.
#[inline(never)]
fn captured_of<P: Plain>(skb: &Skb) -> i32 {
    let Some(packet) = P::read(skb) else { return SLOW };
    if packet.opens() {
        return SLOW;
    }
    let Some(flow) = FlowRef::find(&packet.up_key()) else { return SLOW };
    let now = now();
    if packet.protocol() == UDP {
        return datagram(skb, &packet, flow, now);
    }
    let proxied = flow.is_proxied(TCP);
    if proxied && (settings::early_demux() == 0 || !listener::was_just_there(now)) {
        return SLOW;
    }
    up(skb, &packet, flow, now);
    if proxied { to_stack(skb, Mark::Tproxy, Counter::SteeredEstablished) } else { unproxied(flow.verdict()) }
}

/// A datagram of a client. What is decided by its flow's name, the slow path looks up.
#[inline(never)]
fn datagram<P: Plain>(skb: &Skb, packet: &P, flow: FlowRef, now: u64) -> i32 {
    if flow.is_stale(now) {
        return SLOW;
    }
    if !flow.is_proxied(UDP) {
        up(skb, packet, flow, now);
        return unproxied(flow.verdict());
    }
    if flow.is_asked() || settings::listener_by_tuple() == 1 {
        return SLOW;
    }
    let ((source, _), (source_port, _)) = (packet.addresses(), packet.ports());
    let index = listener::index_of(P::FAMILY, UDP, packet.dont_fragment(), &source, source_port);
    let Some(listener) = listener::at(index) else { return SLOW };
    up(skb, packet, flow, now);
    to_socket(skb, listener, Mark::Tproxy, Counter::SteeredUdp)
}

#[inline(always)]
fn up(skb: &Skb, packet: &impl Plain, flow: FlowRef, now: u64) {
    let (packets, bytes) = skb.on_the_wire(packet.ip_len(), packet.header_len());
    flow.add_up(now, packets, bytes, packet.tcp_flags());
}

#[inline(always)]
fn reply_of<P: Plain>(skb: &Skb) -> i32 {
    let Some(packet) = P::read(skb) else { return SLOW };
    let Some(flow) = FlowRef::find(&packet.down_key()) else { return SLOW };
    let (packets, bytes) = skb.on_the_wire(packet.ip_len(), packet.header_len());
    flow.add_down(now(), packets, bytes, packet.tcp_flags());
    NEXT
}

#[inline(always)]
fn uplink_of<P: Plain>(skb: &Skb) -> i32 {
    let Some(packet) = P::read(skb) else { return SLOW };
    if packet.opens() {
        return SLOW;
    }
    if packet.protocol() == UDP {
        // A passed flow of a client keeps its replies. Those of the host's own are counted here.
        let passed =
            FlowRef::find(&packet.down_key()).is_some_and(|flow| !flow.is_proxied(UDP) && !flow.is_own());
        return if passed { pass(Counter::PassNoSocket) } else { SLOW };
    }
    let flow_table_first = last_passed();
    if flow_table_first && is_of_passed_connection(&packet) {
        return pass(Counter::PassNoSocket);
    }
    if is_for_own_connection(skb, &packet) {
        note_last_passed(false);
        return to_stack(skb, Mark::Tproxy, Counter::SteeredEstablished);
    }
    if !flow_table_first && is_of_passed_connection(&packet) {
        note_last_passed(true);
        return pass(Counter::PassNoSocket);
    }
    SLOW
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

/// Whether the segment answers a client's connection that passes, by the flow table, so that no
/// socket need be looked for. While the connection lives, for the proxy may come to
/// use the client's port towards that server after it.
#[inline(always)]
fn is_of_passed_connection(packet: &impl Plain) -> bool {
    FlowRef::find(&packet.down_key()).is_some_and(|flow| flow.is_passed_and_alive())
}

/// Whether a socket says by itself that the segment is the proxy's, as of nearly
/// every one: it costs a fraction of the search among the host's own addresses.
/// Those are the source of the host's own flows, whose packets shall stay as they are.
#[inline(always)]
fn is_for_own_connection(skb: &Skb, packet: &impl Plain) -> bool {
    settings::early_demux() == 1
        && settings::own_traffic() == 0
        && sock::connection_of(skb, packet.tuple()).is_some_and(|sock| sock.is_own_full())
}
