//! What the parser tells of a packet, in memory of the CPU instead of on the
//! stack: that has 512 bytes for all functions that are under way, and kernels
//! before 6.8 round each of their frames up to 32. No other TC program runs on
//! the CPU before this one has ended: softirqs wait while one runs. `PREEMPT_RT`
//! gives that by the lock of `__local_bh_disable_ip`, where it is configured
//! (`CONFIG_PREEMPT_RT_NEEDS_BH_LOCK`).

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::macros::btf_map;
use tproxy_common::wire::Packet;

#[btf_map]
static PACKETS: PerCpuArray<Packet, 2> = PerCpuArray::new();

/// For the packet that the program runs on; asked for once a run.
#[inline(always)]
pub(crate) fn parsed() -> Option<&'static mut Packet> {
    entry(0)
}

/// For a copy of it with other addresses, which nobody keeps.
#[inline(always)]
pub(crate) fn altered() -> Option<&'static mut Packet> {
    entry(1)
}

#[inline(always)]
fn entry(index: u32) -> Option<&'static mut Packet> {
    let packet = PACKETS.get_ptr_mut(index)?;
    // SAFETY: entries of an array are never unmapped, this one belongs to this
    // CPU, and by contract of the two functions above nobody else refers to it.
    // At first it is zero, which is no `Packet`: so it is written before it is lent.
    unsafe {
        packet.write(Packet::EMPTY);
        Some(&mut *packet)
    }
}

/// The packet that [`parsed`] has lent, for a function that gets no references.
#[inline(always)]
pub(crate) fn packet() -> Option<&'static Packet> {
    let packet = PACKETS.get_ptr(0)?;
    // SAFETY: entries of an array are never unmapped, and this one belongs to this CPU.
    // A run parses before it decides, so it is a `Packet`, and nobody writes to it meanwhile.
    unsafe { Some(&*packet) }
}
