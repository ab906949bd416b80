//! Counters and the flow table.

use core::hint::black_box;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use core::ptr::NonNull;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use tproxy_common::abi::{Decision, Flow, FlowKey, Origin, UDP, Verdict};
use tproxy_common::classify::is_reopened;
use tproxy_common::counter::Counter;
use tproxy_common::flow::tcp_seen;
use tproxy_common::wire::{Packet, Skip};

use crate::capture::note_host_pair;
use crate::fast_path;
use crate::fragment;
use crate::maps::{COUNTERS, DECIDED, FLOWS};
use crate::nat;
use crate::scratch;
use crate::settings;
use crate::skb::Skb;
use crate::steer::NEXT;

/// Adds one to a counter of this CPU.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: `Counters` is `repr(C)` of u64 only and `counter` indexes a
        // field of it; the entry belongs to this CPU.
        unsafe { *counters.cast::<u64>().add(counter as usize) += 1 };
    }
}

/// The counter of a packet that the parser does not take.
#[inline(always)]
pub(crate) fn skip_counter(skip: Skip) -> Counter {
    match skip {
        Skip::Protocol => Counter::PassProtocol,
        Skip::Truncated => Counter::Truncated,
        Skip::Malformed => Counter::Malformed,
    }
}

/// An entry of the flow table. Entries of an LRU map are never unmapped while
/// a program runs; at worst another flow has taken the slot, and the few
/// packets of that instant are counted there.
#[derive(Clone, Copy)]
pub(crate) struct FlowRef(NonNull<Flow>);

impl FlowRef {
    #[inline(always)]
    const fn entry(self) -> *mut Flow {
        self.0.as_ptr()
    }

    /// Finds a flow.
    #[inline(always)]
    pub(crate) fn find(key: &FlowKey) -> Option<Self> {
        FLOWS.get_ptr_mut(key).and_then(NonNull::new).map(Self)
    }

    /// Enters the flow of the packet that this run has parsed, with that packet: what was found of
    /// it before decides whether it is new. One that another CPU has just entered gets the packet
    /// too. An entry with another verdict, and a TCP entry that is over, is begun again.
    #[inline(never)]
    pub(crate) fn open(skb: &Skb, key: &FlowKey, found: Option<Self>, decision: Decision, origin: Origin) {
        let Some(packet) = scratch::packet() else { return };
        let flags = match found {
            Some(flow) if flow.is_decided(decision) && !flow.is_reopened(key.protocol) => {
                flow.arrives_on(skb);
                return flow.up(skb, packet);
            }
            Some(_) => BPF_ANY,
            None => BPF_NOEXIST,
        };
        let (packets, bytes) = skb.packet_on_the_wire(packet);
        let now = now();
        // Of zeros that it knows the compiler makes a call of `memset`, whose frame
        // is one too many where each takes a multiple of 32 bytes of the stack
        // (Linux before 6.8).
        let zero = black_box(0);
        let flow = Flow {
            packets_up: packets,
            bytes_up: bytes,
            packets_down: zero,
            bytes_down: zero,
            first_seen: now,
            last_seen: now,
            ifindex: skb.ifindex(),
            rule: decision.rule(),
            target: decision.target(),
            verdict: decision.raw_verdict(),
            fallback: decision.fallback(),
            origin: origin as u8,
            seen_up: packet.tcp_flags & tcp_seen::ALL,
            ..Flow::default()
        };
        if FLOWS.insert(key, &flow, u64::from(flags)).is_ok() {
            count(Counter::FlowsCreated);
        } else if let Some(flow) = Self::find(key) {
            flow.up(skb, packet);
        } else {
            count(Counter::FlowInsertFailed);
        }
    }

    #[inline(always)]
    fn is_reopened(&self, protocol: u8) -> bool {
        // SAFETY: see `FlowRef`; the two bytes are read, not kept.
        is_reopened(unsafe { self.0.as_ref() }, protocol)
    }

    /// The verdict as the map holds it.
    #[inline(always)]
    pub(crate) fn verdict(&self) -> u8 {
        // SAFETY: see `FlowRef`.
        unsafe { (*self.entry()).verdict }
    }

    /// What was decided of it.
    #[inline(always)]
    pub(crate) fn decision(&self) -> Decision {
        // SAFETY: see `FlowRef`.
        let (verdict, fallback) = unsafe { ((*self.entry()).verdict, (*self.entry()).fallback) };
        // SAFETY: see `FlowRef`.
        let (rule, target) = unsafe { ((*self.entry()).rule, (*self.entry()).target) };
        Decision::of_flow(verdict, fallback, rule, target)
    }

    /// Whether this was decided of it.
    #[inline(always)]
    fn is_decided(&self, decision: Decision) -> bool {
        self.decision() == decision
    }

    /// Whether the flow, of this protocol, goes to the proxy.
    #[inline(always)]
    pub(crate) fn is_proxied(&self, protocol: u8) -> bool {
        Verdict::is_for_proxy(self.verdict(), protocol)
    }

    /// Whether the proxy decides over it, by its name.
    #[inline(always)]
    pub(crate) fn is_asked(&self) -> bool {
        self.verdict() == Verdict::Ask as u8
    }

    /// Whether the proxy was asked about the flow, which has this key, and has decided that it
    /// is thrown away: then what follows need not be handed to it.
    #[inline(always)]
    pub(crate) fn is_dropped_by_name(&self, key: &FlowKey) -> bool {
        self.is_asked()
            && DECIDED.get_ptr(key).is_some_and(|decided| {
                // SAFETY: see `FlowRef`, for both entries.
                unsafe {
                    (*decided).verdict == Verdict::Drop as u8
                        && (*decided).first_seen == (*self.entry()).first_seen
                }
            })
    }

    /// Whether a UDP flow has been quiet for so long that it is over.
    #[inline(always)]
    pub(crate) fn is_stale(&self, now: u64) -> bool {
        now.saturating_sub(self.last_seen()) > settings::udp_timeout()
    }

    /// Whether it came in on an upstream-facing interface.
    #[inline(always)]
    pub(crate) fn is_from_uplink(&self) -> bool {
        // SAFETY: see `FlowRef`.
        unsafe { (*self.entry()).origin == Origin::Uplink as u8 }
    }

    /// Whether this host itself sends it.
    #[inline(always)]
    pub(crate) fn is_own(&self) -> bool {
        // SAFETY: see `FlowRef`.
        unsafe { (*self.entry()).origin == Origin::Own as u8 }
    }

    /// The interface that it arrived on (own traffic: leaves by).
    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        // SAFETY: see `FlowRef`.
        unsafe { (*self.entry()).ifindex }
    }

    /// Notes that the client is behind this packet's interface now.
    #[inline(always)]
    pub(crate) fn arrives_on(&self, skb: &Skb) {
        // SAFETY: see `FlowRef`; the field is valid and aligned.
        unsafe { (*self.entry()).ifindex = skb.ifindex() };
    }

    /// When a packet of it was seen last, as [`now`].
    #[inline(always)]
    pub(crate) fn last_seen(&self) -> u64 {
        // SAFETY: see `FlowRef`.
        unsafe { (*self.entry()).last_seen }
    }

    /// Whether a packet of it was seen within the time that connection tracking
    /// gives a UDP stream (`nf_conntrack_udp_timeout_stream`, 120 s).
    #[inline(always)]
    pub(crate) fn is_recent(&self) -> bool {
        const UDP_STREAM: u64 = 120_000_000_000;
        now().saturating_sub(self.last_seen()) < UDP_STREAM
    }

    /// Whether a client's TCP connection passes, has not ended and was heard of just now.
    #[inline(always)]
    pub(crate) fn is_passed_and_alive(&self) -> bool {
        const JUST_NOW: u64 = 1_000_000_000;
        // SAFETY: see `FlowRef`; the fields are read, not kept.
        let flow = unsafe { self.0.as_ref() };
        flow.verdict == Verdict::Pass as u8
            && flow.origin == Origin::Captured as u8
            && !flow.is_over()
            && now().saturating_sub(flow.last_seen) < JUST_NOW
    }

    /// Counts a packet of the client.
    #[inline(always)]
    pub(crate) fn up(self, skb: &Skb, packet: &Packet) {
        let (packets, bytes) = skb.packet_on_the_wire(packet);
        self.add_up(now(), packets, bytes, packet.tcp_flags);
    }

    /// Counts packets of the client, which are seen [`now`].
    #[inline(always)]
    pub(crate) fn add_up(self, now: u64, packets: u64, bytes: u64, tcp_flags: u8) {
        // SAFETY: see `FlowRef`; the fields are valid and aligned.
        unsafe {
            add(&raw mut (*self.entry()).packets_up, packets);
            add(&raw mut (*self.entry()).bytes_up, bytes);
            see(&raw mut (*self.entry()).seen_up, tcp_flags);
            (*self.entry()).last_seen = now;
        }
    }

    /// Counts a packet to the client.
    #[inline(always)]
    pub(crate) fn down(self, skb: &Skb, packet: &Packet) {
        let (packets, bytes) = skb.packet_on_the_wire(packet);
        self.add_down(now(), packets, bytes, packet.tcp_flags);
    }

    /// Counts packets to the client, which are seen [`now`].
    #[inline(always)]
    pub(crate) fn add_down(self, now: u64, packets: u64, bytes: u64, tcp_flags: u8) {
        // SAFETY: see `FlowRef`; the fields are valid and aligned.
        unsafe {
            add(&raw mut (*self.entry()).packets_down, packets);
            add(&raw mut (*self.entry()).bytes_down, bytes);
            see(&raw mut (*self.entry()).seen_down, tcp_flags);
            (*self.entry()).last_seen = now;
        }
    }
}

/// Adds atomically: several CPUs may carry packets of one flow.
///
/// By the intrinsic: the BPF target has no compare-and-swap before Linux 5.12,
/// so `AtomicU64` has no `fetch_add` there, but `BPF_XADD` is as old as maps.
///
/// # Safety
///
/// `to` is valid and aligned.
#[inline(always)]
unsafe fn add(to: *mut u64, value: u64) {
    // SAFETY: by contract of this function.
    unsafe { atomic_xadd::<_, _, { AtomicOrdering::Relaxed }>(to, value) };
}

/// Remembers TCP flags. Packets of one direction of a flow meet on one CPU
/// (RSS, or the sender's), so a plain store is enough; a bit that is lost to a
/// race comes again with the next segment.
///
/// # Safety
///
/// `seen` is valid.
#[inline(always)]
unsafe fn see(seen: *mut u8, tcp_flags: u8) {
    let bits = tcp_flags & tcp_seen::ALL;
    // SAFETY: by contract of this function.
    unsafe {
        if *seen & bits != bits {
            *seen |= bits;
        }
    }
}

/// `CLOCK_MONOTONIC`, to the timer tick (1 to 10 ms) where that clock may be read
/// (Linux 5.11): the other costs a fifth of what is spent on a reply.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: no preconditions.
    unsafe { if settings::coarse_clock() == 1 { bpf_ktime_get_coarse_ns() } else { bpf_ktime_get_ns() } }
}

/// The key of the flow that an up-going packet belongs to.
#[inline(always)]
pub(crate) fn up_key(packet: &Packet) -> FlowKey {
    FlowKey::up(
        packet.protocol,
        packet.source,
        packet.destination,
        packet.source_port,
        packet.destination_port,
    )
}

/// The key of the flow that the packet is a reply of.
#[inline(always)]
pub(crate) fn down_key(packet: &Packet) -> FlowKey {
    FlowKey::down(
        packet.protocol,
        packet.source,
        packet.destination,
        packet.source_port,
        packet.destination_port,
    )
}

/// TC egress of a captured interface, which may face servers as well: notes
/// NAT, counts replies, changes nothing.
#[inline(always)]
pub(crate) fn egress(skb: &Skb) -> i32 {
    let action = fast_path::reply(skb);
    if action != fast_path::SLOW {
        return action;
    }
    if let Some(packet) = scratch::parsed()
        && skb.parse(packet).is_ok()
        && fragment::resolve_ports(packet)
    {
        leaves(skb, packet);
    }
    NEXT
}

/// Counts a packet that is a reply; of others notes what has to be known for theirs.
#[inline(never)]
pub(crate) fn leaves(skb: &Skb, packet: &Packet) {
    if let Some(flow) = FlowRef::find(&down_key(packet)) {
        flow.down(skb, packet);
    } else if skb.ingress_ifindex() == 0 {
        nat::note(skb, packet);
    } else if packet.protocol == UDP {
        note_request_from_outside(skb, packet);
    }
}

/// Counts what arrives for a flow of this host's own that passes; what the proxy sends for
/// others is counted where it leaves.
#[inline(never)]
pub(crate) fn arrives_for_host(skb: &Skb, packet: &Packet) {
    if settings::own_traffic() == 1
        && let Some(flow) = FlowRef::find(&down_key(packet))
        && flow.is_own()
        && !flow.is_proxied(packet.protocol)
    {
        flow.down(skb, packet);
    }
}

/// Remembers that an outside host asked a UDP server behind this one: the
/// server's answers are no flows of a client. Here, where the request leaves,
/// its destination is the server's own address, whatever NAT there is.
#[inline(never)]
fn note_request_from_outside(skb: &Skb, packet: &Packet) {
    let key = up_key(packet);
    let found = FlowRef::find(&key);
    // A client's flow, on its way out.
    if found.is_some_and(|flow| !flow.is_from_uplink()) {
        return;
    }
    FlowRef::open(skb, &key, found, Decision::by_default(Verdict::Pass), Origin::Uplink);
    note_host_pair(packet);
}
