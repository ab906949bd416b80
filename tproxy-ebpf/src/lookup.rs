//! `sk_lookup` (Linux 5.9): the stack looks a socket up by itself where a
//! SYN hits a `TIME_WAIT` socket, and after it has reassembled fragments. The
//! flow table says whether the packet is one that was steered; then the answer
//! is the same listener that the TC program would have assigned.

use aya_ebpf::bindings::bpf_sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use tproxy_common::abi::{Addr, Family, FlowKey, joined, mapped};
use tproxy_common::counter::Counter;

use crate::account::{FlowRef, count};
use crate::listener;
use crate::maps::LISTENERS;

/// `SK_PASS`: take the assigned socket, or go on with the usual lookup.
const SK_PASS: u32 = 1;
const AF_INET: u32 = 2;

/// Reads a context field by itself, as the verifier wants it.
macro_rules! read {
    ($ctx:ident . $field:ident) => {
        // SAFETY: the context is valid while the program runs.
        unsafe { core::ptr::read_volatile(&raw const (*$ctx).$field) }
    };
}

/// Answers a lookup. One function a family: merged, the compiler would choose
/// the field to read by a computed offset, which the verifier refuses.
#[inline(always)]
pub(crate) fn lookup(ctx: &SkLookupContext) -> u32 {
    let sk = ctx.lookup.cast_const();
    if read!(sk.family) == AF_INET {
        v4(ctx, sk);
    } else {
        v6(ctx, sk);
    }
    SK_PASS
}

#[inline(never)]
fn v4(ctx: &SkLookupContext, sk: *const bpf_sk_lookup) {
    let remote = mapped(read!(sk.remote_ip4).to_ne_bytes());
    let local = mapped(read!(sk.local_ip4).to_ne_bytes());
    assign(ctx, Family::V4, &key(sk, remote, local));
}

#[inline(never)]
fn v6(ctx: &SkLookupContext, sk: *const bpf_sk_lookup) {
    // SAFETY: the context is valid; both arrays have four words.
    let (remote, local) =
        unsafe { (words((&raw const (*sk).remote_ip6).cast()), words((&raw const (*sk).local_ip6).cast())) };
    assign(ctx, Family::V6, &key(sk, remote, local));
}

/// The key of the flow. The remote port is in network byte order, the local
/// one in host byte order.
#[inline(always)]
fn key(sk: *const bpf_sk_lookup, remote: Addr, local: Addr) -> FlowKey {
    let remote_port = u16::from_be(read!(sk.remote_port));
    FlowKey::up(read!(sk.protocol) as u8, remote, local, remote_port, read!(sk.local_port) as u16)
}

#[inline(never)]
fn assign(ctx: &SkLookupContext, family: Family, key: &FlowKey) {
    if FlowRef::find(key).is_some_and(|flow| flow.is_proxied(key.protocol)) {
        // A datagram without a socket was reassembled: its sender allows fragments.
        let index = listener::index_of(family, key.protocol, false, &key.client, key.client_port);
        if LISTENERS.redirect_sk_lookup(ctx, index, 0).is_ok() {
            count(Counter::LookupAssigned);
        }
    }
}

/// An IPv6 address, read word by word.
///
/// # Safety
///
/// `from` points to four readable words.
#[inline(always)]
unsafe fn words(from: *const u32) -> Addr {
    // SAFETY: by contract of this function.
    let word = |i| unsafe { core::ptr::read_volatile(from.add(i)) };
    joined([word(0), word(1), word(2), word(3)])
}
