//! The refusal of a connection: a SYN is made into the reset that answers it, and goes
//! back where it came from.
//!
//! A stack that refuses does the same, but this host's cannot: it sends no reset with the
//! address of another (`ip_send_unicast_reply` without a transparent socket).

use core::mem::MaybeUninit;

use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect, bpf_skb_load_bytes,
    bpf_skb_store_bytes,
};
use tproxy_common::abi::{Family, TCP};
use tproxy_common::counter::Counter;
use tproxy_common::wire::{Load as _, Packet, tcp_flag};

use crate::account::count;
use crate::skb::{ETHERNET_HEADER, Skb};
use crate::steer::drop;

/// Answers a SYN that has arrived.
#[inline(always)]
pub(crate) fn answer(skb: &Skb, packet: &Packet) -> i32 {
    send(skb, packet, 0)
}

/// Answers a SYN that this host is about to send: the reset arrives where it would leave.
#[inline(always)]
pub(crate) fn answer_own(skb: &Skb, packet: &Packet) -> i32 {
    send(skb, packet, u64::from(BPF_F_INGRESS))
}

#[inline(never)]
fn send(skb: &Skb, packet: &Packet, direction: u64) -> i32 {
    if turn(skb, packet).is_none() {
        return drop(Counter::PolicyDropped);
    }
    count(Counter::PolicyReset);
    // SAFETY: no preconditions.
    unsafe { bpf_redirect(skb.ifindex(), direction) as i32 }
}

/// Makes the packet its own answer. What it has of options and data stays: a reset may have both.
#[inline(always)]
fn turn(skb: &Skb, packet: &Packet) -> Option<()> {
    let network = network_header(skb)?;
    if network == ETHERNET_HEADER {
        swap::<3>(skb, 0)?;
    }
    let transport = match packet.family {
        Family::V4 => turn_v4(skb, network),
        Family::V6 => turn_v6(skb, network),
    }?;
    swap::<1>(skb, transport)?;
    refuse(skb, packet, transport)
}

/// Time to live of what this host sends (RFC 1700 and Linux).
const TTL: u8 = 64;

/// Swaps the addresses, which leaves the checksums. Where the next header begins.
#[inline(always)]
fn turn_v4(skb: &Skb, network: u32) -> Option<u32> {
    const TTL_AT: u32 = 8;
    const CHECKSUM_AT: u32 = 10;
    const ADDRESSES_AT: u32 = 12;
    swap::<2>(skb, network + ADDRESSES_AT)?;
    let [first] = load::<u8, 1>(skb, network)?;
    let [ttl, protocol] = load::<u8, 2>(skb, network + TTL_AT)?;
    let (old, new) = (u16::from_ne_bytes([ttl, protocol]), u16::from_ne_bytes([TTL, protocol]));
    // SAFETY: the context is valid, and no pointer into the packet is kept.
    let replaced =
        unsafe { bpf_l3_csum_replace(skb.as_ptr(), network + CHECKSUM_AT, old.into(), new.into(), 2) };
    if replaced != 0 {
        return None;
    }
    store(skb, network + TTL_AT, &[TTL])?;
    Some(network + u32::from(first & 0x0f) * 4)
}

/// The same. A SYN behind extension headers has no answer.
#[inline(always)]
fn turn_v6(skb: &Skb, network: u32) -> Option<u32> {
    const NEXT_HEADER_AT: u32 = 6;
    const HOP_LIMIT_AT: u32 = 7;
    const ADDRESSES_AT: u32 = 8;
    const HEADER: u32 = 40;
    let [next_header] = load::<u8, 1>(skb, network + NEXT_HEADER_AT)?;
    if next_header != TCP {
        return None;
    }
    swap::<8>(skb, network + ADDRESSES_AT)?;
    store(skb, network + HOP_LIMIT_AT, &[TTL])?;
    Some(network + HEADER)
}

/// Makes a SYN a reset that acknowledges it (RFC 9293, section 3.5.2).
#[inline(always)]
fn refuse(skb: &Skb, packet: &Packet, transport: u32) -> Option<()> {
    const SEQUENCE_AT: u32 = 4;
    const CHECKSUM_AT: u32 = 16;
    const SIZE: u32 = 12;
    const RESET: u32 = ((tcp_flag::RST | tcp_flag::ACK) as u32) << 16;
    const DATA_OFFSET: u32 = 0xf000_0000;
    let mut old: [u32; 3] = load(skb, transport + SEQUENCE_AT)?;
    let data = packet.ip_len.saturating_sub(packet.header_len.into());
    let expected = u32::from_be(old[0]).wrapping_add(1).wrapping_add(data);
    let mut new = [0, expected.to_be(), ((u32::from_be(old[2]) & DATA_OFFSET) | RESET).to_be()];
    // SAFETY: both arrays have so many bytes, the context is valid, and no pointer into
    // the packet is kept.
    let replaced = unsafe {
        let change = bpf_csum_diff(old.as_mut_ptr(), SIZE, new.as_mut_ptr(), SIZE, 0);
        bpf_l4_csum_replace(skb.as_ptr(), transport + CHECKSUM_AT, 0, change.cast_unsigned(), 0)
    };
    if replaced != 0 {
        return None;
    }
    store(skb, transport + SEQUENCE_AT, &new)
}

/// Where the network header is in the buffer: devices without link-layer headers have it at
/// the front. No helper tells, so it is where the same bytes are.
#[inline(always)]
fn network_header(skb: &Skb) -> Option<u32> {
    let header = skb.load::<3>(0)?;
    let mut offsets = [ETHERNET_HEADER, 0].into_iter();
    offsets.find(|offset| load::<u32, 3>(skb, *offset) == Some(header))
}

/// Swaps two neighbours of `N` half words each.
#[inline(always)]
fn swap<const N: usize>(skb: &Skb, offset: u32) -> Option<()> {
    let [first, second] = load::<[u16; N], 2>(skb, offset)?;
    store(skb, offset, &[second, first])
}

#[inline(always)]
fn load<T: Copy, const N: usize>(skb: &Skb, offset: u32) -> Option<[T; N]> {
    let mut values = MaybeUninit::<[T; N]>::uninit();
    let size = size_of::<[T; N]>() as u32;
    // SAFETY: the helper writes `size` bytes, also where it answers an error, and this module
    // asks for integers alone, which may have any bits.
    unsafe {
        let result = bpf_skb_load_bytes(skb.ctx(), offset, values.as_mut_ptr().cast(), size);
        if result == 0 { Some(values.assume_init()) } else { None }
    }
}

#[inline(always)]
fn store<T, const N: usize>(skb: &Skb, offset: u32, values: &[T; N]) -> Option<()> {
    let size = size_of::<[T; N]>() as u32;
    // SAFETY: the context is valid, the helper reads `size` bytes, and no pointer into the
    // packet is kept.
    let result = unsafe { bpf_skb_store_bytes(skb.as_ptr(), offset, values.as_ptr().cast(), size, 0) };
    if result == 0 { Some(()) } else { None }
}
