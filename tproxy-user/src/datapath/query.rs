//! Which programs are attached where, asked of the kernel (`BPF_PROG_QUERY`).
//!
//! aya asks for tcx alone, and opens each program; here numbers are enough.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// `BPF_PROG_QUERY` of `enum bpf_cmd` (include/uapi/linux/bpf.h).
const BPF_PROG_QUERY: libc::c_long = 16;
/// `enum bpf_attach_type`.
const BPF_CGROUP_INET_SOCK_CREATE: u32 = 2;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;

/// Programs that one place can have (`BPF_MPROG_MAX`, and as many in a namespace or control group).
const MOST: u32 = 64;

/// A place for programs.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// tcx of what arrives on the interface with this index (6.6).
    TcxIngress(u32),
    /// tcx of what leaves by it (6.6).
    TcxEgress(u32),
    /// `sk_lookup` of a network namespace (5.9).
    SkLookup(BorrowedFd<'a>),
    /// Creation of sockets in a control group (4.10, and asked for since 4.15).
    SocketCreation(BorrowedFd<'a>),
}

/// The `query` part of `union bpf_attr` with all that the kernel writes to, the
/// last of it in 6.6. An older kernel wants what it does not know to be zero.
#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    attach_type: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    pad: u32,
    attach_flags_of_programs: u64,
    link_ids: u64,
    attach_flags_of_links: u64,
    revision: u64,
}

const _: () = assert!(size_of::<Query>() == 64, "the query part of union bpf_attr");

/// The numbers (`bpftool prog show id N`) of the programs at a place, in the
/// order in which they run. Needs `CAP_NET_ADMIN`.
///
/// # Errors
/// As bpf(2) says; `EINVAL` where the kernel does not have the place.
pub fn programs(place: Place<'_>) -> io::Result<Vec<u32>> {
    let (target, attach_type) = match place {
        Place::TcxIngress(ifindex) => (ifindex, BPF_TCX_INGRESS),
        Place::TcxEgress(ifindex) => (ifindex, BPF_TCX_EGRESS),
        Place::SkLookup(netns) => (netns.as_raw_fd().cast_unsigned(), BPF_SK_LOOKUP),
        Place::SocketCreation(group) => (group.as_raw_fd().cast_unsigned(), BPF_CGROUP_INET_SOCK_CREATE),
    };
    let mut ids = [0_u32; MOST as usize];
    let mut query = Query { target, attach_type, count: MOST, ..Query::default() };
    query.ids = ids.as_mut_ptr().expose_provenance() as u64;
    // SAFETY: the kernel reads and writes `query`, of the size given, and writes
    // at most `count` numbers to `ids`; both outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        // Before anything was attached there, tcx answers so.
        return if error.raw_os_error() == Some(libc::ENOENT) { Ok(Vec::new()) } else { Err(error) };
    }
    Ok(ids.into_iter().take(query.count as usize).collect())
}
