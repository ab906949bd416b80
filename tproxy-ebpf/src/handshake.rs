//! `--handshake faithful`: a SYN for the proxy is set aside until upstream has
//! answered. It goes through a tun device to userspace, which writes it back
//! once there is a connection to its destination; then it arrives on its own
//! interface again, as it did the first time, and gets its listener.
//!
//! What waits is the packet itself, and the stack has not seen it: no socket,
//! no connection tracking and no answer to the client exist before that.

use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS};
use aya_ebpf::helpers::generated::bpf_redirect;
use tproxy_common::counter::Counter;
use tproxy_common::flow::worker;
use tproxy_common::wire::Packet;

use crate::account::{FlowRef, count, up_key};
use crate::scratch;
use crate::settings;
use crate::skb::Skb;
use crate::steer::{accept_frame, add_link_header, drop, write_mark};

/// Whether SYNs are set aside.
#[inline(always)]
pub(crate) fn is_faithful() -> bool {
    settings::handshake_ifindex() != 0
}

/// The mark of a SYN that userspace has let in. No packet of another origin has
/// it on the interfaces where it is looked for: the host's own packets get both
/// marks at `lo` only after that.
#[inline(always)]
fn admitted_mark() -> u32 {
    settings::mark_value() | settings::own_mark()
}

/// Whether this is a SYN that userspace has let in. Its frame has no link-layer
/// addresses, and the mark that it had is lost.
#[inline(always)]
fn is_let_in(skb: &Skb) -> bool {
    is_faithful() && skb.mark() == admitted_mark()
}

/// Says of a SYN that userspace has let in that it is for this host: its frame
/// has no link-layer addresses.
#[inline(always)]
pub(crate) fn accept_let_in(skb: &Skb) {
    if is_let_in(skb) {
        accept_frame(skb);
    }
}

/// Whether userspace has let this SYN in. Takes the sign of it off.
#[inline(always)]
pub(crate) fn take_admission(skb: &Skb) -> bool {
    let let_in = is_let_in(skb);
    if let_in {
        write_mark(skb, 0);
    }
    let_in
}

/// Sends a SYN to the worker that serves its client. A call, or its variables
/// would stand beside those of the way to a socket.
#[inline(never)]
pub(crate) fn set_aside(skb: &Skb, packet: &Packet) -> i32 {
    count(Counter::SynSetAside);
    // For [`queue`]; the mark of a packet that arrives is 0 but for what other programs do.
    write_mark(skb, worker(&packet.source, packet.source_port, settings::workers()));
    // SAFETY: no preconditions. The kernel takes the link-layer header off, which
    // the device has not.
    unsafe { bpf_redirect(settings::handshake_ifindex(), 0) as i32 }
}

/// The queue of the tun device, one a worker, that a packet goes to.
#[inline(always)]
pub(crate) fn queue(skb: *mut __sk_buff) -> i64 {
    // SAFETY: the context is valid while the program runs.
    i64::from(unsafe { core::ptr::read_volatile(&raw const (*skb).mark) })
}

/// TC ingress of the tun device: what userspace writes arrives on the interface
/// that it came from.
#[inline(always)]
pub(crate) fn admit(skb: &Skb) -> i32 {
    let Some(packet) = scratch::parsed() else { return drop(Counter::SynNotAdmitted) };
    if skb.parse(packet).is_err() {
        return drop(Counter::SynNotAdmitted);
    }
    // The flow table may have lost it in a flood. The client sends another.
    let Some(flow) = FlowRef::find(&up_key(packet)) else { return drop(Counter::SynNotAdmitted) };
    let arrived_on = if flow.is_own() { settings::lo_ifindex() } else { flow.ifindex() };
    // For a device that has such headers; on the way to one that has none the
    // kernel takes it off again (`__bpf_redirect_no_mac`).
    if !add_link_header(skb) {
        return drop(Counter::SynNotAdmitted);
    }
    count(Counter::SynAdmitted);
    write_mark(skb, admitted_mark());
    // SAFETY: no preconditions.
    unsafe { bpf_redirect(arrived_on, u64::from(BPF_F_INGRESS)) as i32 }
}
