//! `sk_lookup` (Linux 5.9): the stack looks a socket up by itself where a
//! SYN hits a TIME_WAIT socket, and after it has reassembled fragments. The
//! flow table says whether the packet is one that was steered; then the answer
//! is the same listener that the TC program would have assigned.

use aya_ebpf::bindings::bpf_sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use tproxy_common::abi::{Addr, Family, FlowKey, mapped};
use tproxy_common::counter::Counter;

use crate::account::{FlowRef, count};
use crate::maps::LISTENERS;
use crate::sock::listener_index_of;

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

/// Answers a lookup.
#[inline(always)]
pub(crate) fn lookup(ctx: &SkLookupContext) -> u32 {
    let (family, key) = flow_key(ctx.lookup);
    if FlowRef::find(&key).is_some_and(|flow| flow.is_proxied()) {
        let index = listener_index_of(family, key.protocol, &key.client, key.client_port);
        if LISTENERS.redirect_sk_lookup(ctx, index, 0).is_ok() {
            count(Counter::LookupAssigned);
        }
    }
    SK_PASS
}

#[inline(always)]
fn flow_key(ctx: *const bpf_sk_lookup) -> (Family, FlowKey) {
    let (family, remote, local) = if read!(ctx.family) == AF_INET {
        let remote = read!(ctx.remote_ip4).to_ne_bytes();
        let local = read!(ctx.local_ip4).to_ne_bytes();
        (Family::V4, mapped(remote), mapped(local))
    } else {
        // SAFETY: as above; both arrays have four words.
        let (remote, local) = unsafe {
            (words((&raw const (*ctx).remote_ip6).cast()), words((&raw const (*ctx).local_ip6).cast()))
        };
        (Family::V6, remote, local)
    };
    // The remote port is in network byte order, the local one in host byte order.
    let remote_port = u16::from_be(read!(ctx.remote_port));
    let local_port = read!(ctx.local_port) as u16;
    let protocol = read!(ctx.protocol) as u8;
    (family, FlowKey::up(protocol, remote, local, remote_port, local_port))
}

/// An IPv6 address, read word by word.
///
/// # Safety
///
/// `from` points to four readable words.
#[inline(always)]
unsafe fn words(from: *const u32) -> Addr {
    let mut addr = [0; 16];
    for i in 0..4 {
        // SAFETY: by contract of this function.
        let word = unsafe { core::ptr::read_volatile(from.add(i)) }.to_ne_bytes();
        addr[i * 4] = word[0];
        addr[i * 4 + 1] = word[1];
        addr[i * 4 + 2] = word[2];
        addr[i * 4 + 3] = word[3];
    }
    addr
}
