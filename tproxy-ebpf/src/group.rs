//! The group of a socket, which no helper tells a TC program. It is noted at the socket when a
//! process makes it, and read when that sends.

use core::ptr::null_mut;

use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_get_current_uid_gid, bpf_sk_storage_get};
use aya_ebpf::macros::btf_map;

/// What is noted at sockets. Those that accept a connection do not hand it on: what is sent by
/// such a connection opens no flow.
#[btf_map]
static GROUPS: SkStorage<u32> = SkStorage::new();

/// Notes the group of the process that makes a socket (Linux 5.9): its real one, as the initial
/// user namespace has it. Sockets that the kernel makes for itself do not come here.
#[inline(always)]
pub(crate) fn note(sock: *mut bpf_sock) {
    // SAFETY: there is a process, and the helper takes nothing.
    let mut gid = (unsafe { bpf_get_current_uid_gid() } >> 32) as u32;
    // SAFETY: the context of such a program is the socket, and the value is copied. Where there is
    // no memory for it, the socket has no known group.
    unsafe { storage(sock, &raw mut gid, BPF_SK_STORAGE_GET_F_CREATE.into()) };
}

/// The group of a full socket; `None` where none was noted: it is older than the program that
/// notes it, or made by the kernel.
#[inline(always)]
pub(crate) fn of(sock: *const bpf_sock) -> Option<u32> {
    // SAFETY: the socket is valid. What is noted at it stays while it is there.
    unsafe {
        let gid = storage(sock.cast_mut(), null_mut(), 0);
        if gid.is_null() { None } else { Some(*gid) }
    }
}

/// What is noted at a socket; null where nothing is.
///
/// # Safety
///
/// The socket must be the context or a full one, and the value readable or null.
#[inline(always)]
unsafe fn storage(sock: *mut bpf_sock, value: *mut u32, flags: u64) -> *mut u32 {
    // SAFETY: as above; the map is one of sockets' storage.
    unsafe {
        bpf_sk_storage_get((&raw const GROUPS).cast_mut().cast::<c_void>(), sock.cast(), value.cast(), flags)
    }
    .cast()
}
