//! Log lines of the debugging build; the default build has none of it.

use tproxy_common::wire::Packet;

use crate::skb::Skb;

/// Logs what was decided over a packet.
#[cfg(feature = "log")]
#[inline(never)]
pub(crate) fn trace(skb: &Skb, packet: &Packet, at: &str, action: i32) {
    use aya_ebpf::programs::TcContext;
    let ctx = TcContext::new(skb.as_ptr());
    aya_log_ebpf::debug!(
        &ctx,
        "{} if={} proto={} [{:i}]:{} > [{:i}]:{} flags={:x} mark={:x} action={}",
        at,
        skb.ifindex(),
        packet.protocol,
        packet.source,
        packet.source_port,
        packet.destination,
        packet.destination_port,
        packet.tcp_flags,
        skb.mark(),
        action
    );
}

#[cfg(not(feature = "log"))]
#[inline(always)]
pub(crate) fn trace(_: &Skb, _: &Packet, _: &str, _: i32) {}
