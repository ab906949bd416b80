//! The rules, and this host's own addresses.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::macros::btf_map;
use tproxy_common::abi::{Addr, Decision, Family, Verdict};
use tproxy_common::policy::{
    Facts, Image, Known, Line, Work, decide, in_all, layout, long_class, settled, short_class,
};
use tproxy_common::wire::{Packet, dscp};

use crate::account::now;
use crate::group;
use crate::maps::{LOCAL, NAMES, POLICY, PolicyImage};
use crate::scratch;
use crate::settings;
use crate::skb::Skb;
use crate::sock;

/// Whether the address is one of this host's own.
#[inline(never)]
pub(crate) fn is_local(addr: &Addr) -> bool {
    // A number on both paths: of an `Option` the compiler makes a flag and a
    // value that is not initialised where there is none, which the verifier refuses.
    LOCAL.get(&Key::new(128, *addr)).map_or(0, |value| *value) == 1
}

/// What the rules say of the flow that the packet opens, the one which this run has parsed.
#[inline(always)]
pub(crate) fn decision(skb: &Skb) -> Decision {
    decide_by(skb, PORTS_KNOWN)
}

/// The same of a packet of this host itself.
#[inline(always)]
pub(crate) fn decision_on_own(skb: &Skb) -> Decision {
    decide_by(skb, PORTS_KNOWN | OWN)
}

/// Whether they might not let the packet pass, were its ports known. Where rules that ask for
/// ports have several verdicts it may be wrong: only the first and the last of the
/// rules that may match are asked.
#[inline(always)]
pub(crate) fn might_not_pass(skb: &Skb) -> bool {
    !passes(skb, PORTS_ABSENT) || !passes(skb, PORTS_UNKNOWN)
}

#[inline(always)]
fn passes(skb: &Skb, how: u32) -> bool {
    decide_by(skb, how).raw_verdict() == Verdict::Pass as u8
}

/// The decision, or that the proxy has to ask for the name: where the flow has one that is not
/// known here, and it is decided otherwise by rules that ask for names.
#[inline(always)]
fn decide_by(skb: &Skb, how: u32) -> Decision {
    let decision = Decision::from_word(tproxy_decide(skb.as_ptr(), how));
    if !decision.is_behind_names() {
        return decision;
    }
    let any = Decision::from_word(tproxy_decide(skb.as_ptr(), how | NAME_UNKNOWN));
    if any == decision { decision.settled() } else { decision.asked() }
}

/// The packet has its ports.
const PORTS_KNOWN: u32 = 0;
/// It has none, so that no rule which asks for one matches.
const PORTS_ABSENT: u32 = 1;
/// It may have any, so that every rule which asks for one matches.
const PORTS_UNKNOWN: u32 = 2;
/// Which of these it is.
const PORTS: u32 = 3;
/// Beside one of these: this host sends it.
const OWN: u32 = 4;
/// Beside these: where it is not known what its destination is called, it may have any
/// name. Without, it has none then.
const NAME_UNKNOWN: u32 = 8;

/// The [`Decision`] of the rules over the packet that this run has parsed; without rules it passes.
///
/// Global to the verifier, which so follows it once, whatever is known where it is
/// called (Linux 5.6). Such functions get the context and numbers, nothing else.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn tproxy_decide(context: *mut __sk_buff, how: u32) -> u32 {
    // That others take the place of the rules twice within two microseconds does not happen.
    answered(tproxy_try(context, how))
        .or_else(|| answered(tproxy_try(context, how)))
        .unwrap_or(Verdict::Drop as u32)
}

/// The same, or [`NONE`] where the rules were not the same from the begin to the end: each of the
/// functions that are called asks for those that hold then.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn tproxy_try(context: *mut __sk_buff, how: u32) -> u64 {
    const WITHOUT_RULES: u64 = Verdict::Pass as u64;
    let (Some(packet), Some(image), Some(work)) = (scratch::packet(), POLICY.get(0), WORK.get_ptr_mut(0))
    else {
        return WITHOUT_RULES;
    };
    // SAFETY: the entry is valid, belongs to this CPU, and no other run begins before this one
    // ends. [`tproxy_in_all`] reads it too, while nobody writes.
    let work = unsafe { &mut *work };
    let facts = Seen { skb: &Skb::from_ptr(context), packet, how };
    let decided = decide(&Rules(image), &facts, work);
    if POLICY.get(0).map_or(0, number_of) != number_of(image) {
        return NONE;
    }
    decided.map_or(WITHOUT_RULES, |(verdict, _)| u64::from(verdict))
}

/// What tells an image from those before and after it.
#[inline(always)]
fn number_of(image: &PolicyImage) -> u32 {
    image.get(0).map_or(0, |header| header[layout::NUMBER])
}

/// The rule that decides over a family (1: IPv6) and a protocol by themselves,
/// [`layout::UNSETTLED`] where there is none, or [`NONE`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn tproxy_settled(v6: u32, protocol: u32) -> u64 {
    let family = if v6 == 1 { Family::V6 } else { Family::V4 };
    answer(POLICY.get(0).and_then(|image| settled(&Rules(image), family, protocol as u8)))
}

/// The class of a value of one word in a dimension, or [`NONE`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn tproxy_short_class(dimension: u32, value: u32) -> u64 {
    answer(POLICY.get(0).and_then(|image| short_class(&Rules(image), dimension, value)))
}

/// The class of a longer value in a dimension, or [`NONE`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn tproxy_long_class(dimension: u32, high: u64, low: u64) -> u64 {
    answer(POLICY.get(0).and_then(|image| long_class(&Rules(image), dimension, (high, low))))
}

/// The bits of a word that all vectors of the decision have, or [`NONE`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn tproxy_in_all(place: u32) -> u64 {
    let (Some(image), Some(work)) = (POLICY.get(0), WORK.get(0)) else { return NONE };
    answer(in_all(&Rules(image), work, place))
}

/// The answer of a function that gives no number of 32 bits.
const NONE: u64 = u64::MAX;

#[inline(always)]
fn answer(number: Option<u32>) -> u64 {
    number.map_or(NONE, u64::from)
}

#[inline(always)]
fn answered(number: u64) -> Option<u32> {
    (number != NONE).then_some(number as u32)
}

/// Memory of [`decide`].
#[btf_map]
static WORK: PerCpuArray<Work, 1> = PerCpuArray::new();

/// The word by which [`Rules::hidden`] passes numbers on.
#[btf_map]
static HIDDEN: PerCpuArray<u32, 1> = PerCpuArray::new();

/// An image.
struct Rules(&'static PolicyImage);

impl Image for Rules {
    #[inline(always)]
    fn line(&self, index: u32) -> Option<&Line> {
        self.0.get(index)
    }

    #[inline(always)]
    fn hidden(&self, number: u32) -> u32 {
        let Some(word) = HIDDEN.get_ptr_mut(0) else { return 0 };
        // SAFETY: the entry is valid and belongs to this CPU. The verifier does not
        // follow what is in maps.
        unsafe {
            core::ptr::write_volatile(word, number);
            core::ptr::read_volatile(word)
        }
    }

    #[inline(always)]
    fn opaque(&self, mut number: u64) -> u64 {
        // SAFETY: sets a register to itself.
        unsafe {
            core::arch::asm!("{0} = {0}", inlateout(reg) number, options(pure, nomem, nostack, preserves_flags));
        }
        number
    }

    #[inline(always)]
    fn settled(&self, family: Family, protocol: u8) -> Option<u32> {
        answered(tproxy_settled(u32::from(family == Family::V6), u32::from(protocol)))
    }

    #[inline(always)]
    fn short_class(&self, dimension: u32, value: u32) -> Option<u32> {
        answered(tproxy_short_class(dimension, value))
    }

    #[inline(always)]
    fn long_class(&self, dimension: u32, (high, low): (u64, u64)) -> Option<u32> {
        answered(tproxy_long_class(dimension, high, low))
    }

    #[inline(always)]
    fn in_all(&self, _: &Work, place: u32) -> Option<u32> {
        answered(tproxy_in_all(place))
    }
}

/// A packet as the rules see it.
struct Seen<'a> {
    skb: &'a Skb,
    packet: &'a Packet,
    how: u32,
}

impl Seen<'_> {
    /// Whether this host sends it.
    #[inline(always)]
    fn is_own(&self) -> bool {
        self.how & OWN != 0
    }

    /// Whether it may have a socket that rules ask about. Where own traffic is not
    /// captured the verifier sees that none has one, and so does not ask for the helpers:
    /// kernels without `CONFIG_SOCK_CGROUP_DATA` lack one.
    #[inline(always)]
    fn is_from_socket(&self) -> bool {
        settings::own_traffic() == 1 && self.is_own()
    }
}

impl Facts for Seen<'_> {
    #[inline(always)]
    fn family(&self) -> Family {
        self.packet.family
    }

    #[inline(always)]
    fn source(&self) -> &Addr {
        &self.packet.source
    }

    #[inline(always)]
    fn destination(&self) -> &Addr {
        &self.packet.destination
    }

    #[inline(always)]
    fn ports(&self) -> Known<(u16, u16)> {
        match self.how & PORTS {
            PORTS_ABSENT => Known::Absent,
            PORTS_UNKNOWN => Known::Unknown,
            _ => Known::Is((self.packet.source_port, self.packet.destination_port)),
        }
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        self.packet.protocol
    }

    #[inline(always)]
    fn interface(&self) -> Option<u32> {
        if self.is_own() { None } else { Some(self.skb.ifindex()) }
    }

    #[inline(always)]
    fn mac(&self) -> Option<u64> {
        if self.is_own() { None } else { self.skb.ethernet_source(self.packet) }
    }

    #[inline(always)]
    fn dscp(&self) -> u8 {
        // What has been parsed is there.
        dscp(self.skb, self.packet.family).unwrap_or(0)
    }

    #[inline(always)]
    fn mark(&self) -> u32 {
        self.skb.mark()
    }

    #[inline(always)]
    fn uid(&self) -> Option<u32> {
        if self.is_from_socket() { self.skb.uid() } else { None }
    }

    #[inline(always)]
    fn gid(&self) -> Option<u32> {
        if self.is_from_socket() { group::of(sock::sender(self.skb)?) } else { None }
    }

    #[inline(always)]
    fn cgroup(&self, depth: u32) -> Option<u64> {
        if self.is_from_socket() { self.skb.cgroup(depth) } else { None }
    }

    #[inline(always)]
    fn domain(&self) -> Known<u32> {
        match NAMES.get_ptr(&self.packet.destination) {
            // SAFETY: entries of an LRU map are never unmapped while a program runs.
            Some(name) if now() < unsafe { (*name).expires } => Known::Is(unsafe { (*name).set }),
            _ if self.how & NAME_UNKNOWN != 0 => Known::Unknown,
            _ => Known::Absent,
        }
    }
}
