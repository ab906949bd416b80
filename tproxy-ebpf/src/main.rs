//! The eBPF programs of tproxy: entry points only.
//!
//! ```text
//! tproxy_capture  TC ingress, captured interfaces   classify, steer to the proxy
//! tproxy_uplink   TC ingress, upstream-facing ones  return traffic of `source = client`
//! tproxy_nat      TC egress, upstream-facing ones   note what NAT made of the proxy's packets
//! tproxy_reply    TC egress, captured interfaces    the same, and count replies
//! tproxy_own      TC egress, with own traffic       the same, and turn own flows back to lo
//! tproxy_lo       TC ingress of lo, own traffic     steer what was turned back
//! tproxy_admit    TC ingress of the tun device      faithful handshakes: SYNs that are let in
//! tproxy_queue    queue choice of the tun device    which worker gets a SYN that is set aside
//! tproxy_lookup   sk_lookup of the namespace        where the stack looks a listener up itself
//! tproxy_group    sock_create of the root cgroup    note the group of sockets that are made
//! ```
//!
//! The core (everything but the last four) needs Linux 5.7, `tproxy_admit` 5.8.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch, core_intrinsics)]
#![expect(internal_features, reason = "atomic addition, see `account.rs`")]
#![allow(missing_docs, unreachable_pub, reason = "the macros of the entry points expand to public items")]
// The verifier of Linux 5.7 follows one program best; a call also costs stack.
#![allow(clippy::inline_always, reason = "one flat program for the verifier")]
#![allow(
    clippy::needless_borrows_for_generic_args,
    clippy::trivially_copy_pass_by_ref,
    reason = "a value that is passed may be copied, and the stack has 512 bytes"
)]
#![allow(clippy::needless_pass_by_value, reason = "the macros of the entry points hand the context over")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "the kernel's context has ports and protocols in words of 32 bits, helpers answer in 64"
)]

mod account;
mod capture;
mod fast_path;
mod fragment;
mod group;
mod handshake;
mod icmp;
mod listener;
mod lookup;
mod maps;
mod nat;
mod own;
mod policy;
mod reset;
mod scratch;
mod settings;
mod skb;
mod sock;
mod steer;
mod trace;
mod uplink;

use aya_ebpf::macros::{cgroup_sock, classifier, sk_lookup, socket_filter};
use aya_ebpf::programs::{SkBuffContext, SkLookupContext, SockContext, TcContext};
use skb::Skb;

/// TC ingress of captured interfaces.
#[classifier]
pub fn tproxy_capture(ctx: TcContext) -> i32 {
    capture::ingress(&Skb::new(&ctx))
}

/// TC ingress of upstream-facing interfaces.
#[classifier]
pub fn tproxy_uplink(ctx: TcContext) -> i32 {
    uplink::ingress(&Skb::new(&ctx))
}

/// TC egress of upstream-facing interfaces.
#[classifier]
pub fn tproxy_nat(ctx: TcContext) -> i32 {
    nat::egress(&Skb::new(&ctx))
}

/// TC egress of captured interfaces.
#[classifier]
pub fn tproxy_reply(ctx: TcContext) -> i32 {
    account::egress(&Skb::new(&ctx))
}

/// TC egress of every interface while the host's own traffic is captured.
#[classifier]
pub fn tproxy_own(ctx: TcContext) -> i32 {
    own::egress(&Skb::new(&ctx))
}

/// TC ingress of the loopback device while the host's own traffic is captured.
#[classifier]
pub fn tproxy_lo(ctx: TcContext) -> i32 {
    own::loopback(&Skb::new(&ctx))
}

/// TC ingress of the tun device through which SYNs are set aside (Linux 5.8).
#[classifier]
pub fn tproxy_admit(ctx: TcContext) -> i32 {
    handshake::admit(&Skb::new(&ctx))
}

/// Choice of that device's queue (`TUNSETSTEERINGEBPF`, Linux 4.16).
#[socket_filter]
pub fn tproxy_queue(ctx: SkBuffContext) -> i64 {
    handshake::queue(ctx.skb.skb)
}

/// Socket lookup of the network namespace (Linux 5.9).
#[sk_lookup]
pub fn tproxy_lookup(ctx: SkLookupContext) -> u32 {
    lookup::lookup(&ctx)
}

/// Sockets that processes make, while rules ask for their group (Linux 5.9).
#[cgroup_sock(sock_create)]
pub fn tproxy_group(ctx: SockContext) -> i32 {
    /// The socket may be made.
    const ALLOWED: i32 = 1;
    group::note(ctx.sock);
    ALLOWED
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The kernel offers the helpers used here to GPL-compatible programs only;
/// the source is under MIT or Apache-2.0 as well.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
