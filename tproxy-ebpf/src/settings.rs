//! Settings that userspace writes before the load. Read-only data: the
//! verifier knows the values and drops the branches that they exclude.

use tproxy_common::abi::{ABI_VERSION, ListenerPorts, MAX_LISTENERS, Settings};

#[unsafe(no_mangle)]
static SETTINGS: Settings = Settings {
    abi_version: ABI_VERSION,
    mark_value: 1,
    mark_mask: 1,
    own_mark: 2,
    workers: 1,
    lo_ifindex: 1,
    handshake_ifindex: 0,
    listen_v4: [0; 4],
    listen_v6: [0; 16],
    udp_timeout: 180_000_000_000,
    fail_open: 1,
    listener_by_tuple: 0,
    link_headers: 1,
    own_traffic: 0,
    sk_lookup: 1,
    client_port: 0,
    early_demux: 0,
    coarse_clock: 0,
    listener_ports: ListenerPorts([0; MAX_LISTENERS as usize]),
};

/// Reads one setting. Volatile, so that the compiler does not take the value
/// that stands here for the one that userspace writes.
macro_rules! setting {
    ($($field:ident: $type:ty,)+) => {
        $(
            #[inline(always)]
            pub(crate) fn $field() -> $type {
                // SAFETY: a valid, aligned, initialised static.
                unsafe { core::ptr::read_volatile(&raw const SETTINGS.$field) }
            }
        )+
    };
}

setting! {
    mark_value: u32,
    mark_mask: u32,
    own_mark: u32,
    workers: u32,
    lo_ifindex: u32,
    handshake_ifindex: u32,
    udp_timeout: u64,
    fail_open: u8,
    listener_by_tuple: u8,
    link_headers: u8,
    own_traffic: u8,
    sk_lookup: u8,
    client_port: u8,
    early_demux: u8,
    coarse_clock: u8,
    listen_v4: [u8; 4],
    listen_v6: [u8; 16],
}

/// Port of a listener by its index, host byte order.
#[inline(always)]
pub(crate) fn listener_port(index: u32) -> u16 {
    if index >= MAX_LISTENERS {
        return 0;
    }
    // SAFETY: a valid static, and the index is in bounds.
    unsafe {
        core::ptr::read_volatile((&raw const SETTINGS.listener_ports.0).cast::<u16>().add(index as usize))
    }
}
