//! Maps of sockets, and programs: bpf(2), on little-endian machines.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd};

use libc::{c_int, c_long};
use socket2::Socket;

// linux/bpf.h.
const MAP_CREATE: c_long = 0;
const MAP_UPDATE_ELEM: c_long = 2;
const PROG_LOAD: c_long = 5;
const PROG_ATTACH: c_long = 8;
const LINK_CREATE: c_long = 28;
const PROG_TYPE_SCHED_CLS: u32 = 3;
const PROG_TYPE_SK_SKB: u32 = 14;
const SK_SKB_STREAM_VERDICT: u32 = 5;
const TCX_INGRESS: u32 = 46;
const MAP_TYPE_SOCKHASH: u32 = 18;

/// Sockets by the cookie of a socket. One that is closed leaves the map.
pub(crate) struct SocketHash(OwnedFd);

impl SocketHash {
    pub(crate) fn new(entries: u32) -> io::Result<Self> {
        made(MAP_CREATE, &[pair(MAP_TYPE_SOCKHASH, 8), pair(4, entries)]).map(Self)
    }

    pub(crate) fn put(&self, cookie: u64, socket: &Socket) -> io::Result<()> {
        let value = number(socket);
        let (key, value) = (address(&raw const cookie), address(&raw const value));
        bpf(MAP_UPDATE_ELEM, &[pair(number(&self.0), 0), key, value, 0]).map(drop)
    }
}

/// Has what the sockets of `sources` receive sent from those that `targets` has for their cookies.
pub(crate) fn attach_verdict(sources: &SocketHash, targets: &SocketHash) -> io::Result<()> {
    const MAP: u64 = 1;
    const SOCKET_COOKIE: u64 = 46;
    const REDIRECT_HASH: u64 = 72;
    const SK_DROP: u64 = 0;
    let minus_eight = u64::from((-8_i32).cast_unsigned());
    let loaded = load(
        PROG_TYPE_SK_SKB,
        &[
            // A FIN that came alone has no bytes, and is not for the target: the kernel takes a send of
            // none for a broken pipe, and sends nothing more (`sk_psock_backlog`).
            op(0xb7, R0, 0, 0, SK_DROP),
            op(0x61, R2, R1, 0, 0),
            op(0x15, R2, 0, 10, 0),
            op(0xbf, R6, R1, 0, 0),
            call_helper(SOCKET_COOKIE),
            op(0x7b, R10, R0, -8, 0),
            op(0xbf, R1, R6, 0, 0),
            op(0x18, R2, MAP, 0, u64::from(number(&targets.0))),
            0,
            op(0xbf, R3, R10, 0, 0),
            op(0x07, R3, 0, 0, minus_eight),
            op(0xb7, R4, 0, 0, 0),
            call_helper(REDIRECT_HASH),
            op(0x95, 0, 0, 0, 0),
        ],
    )?;
    let attach = [pair(number(&sources.0), number(&loaded)), pair(SK_SKB_STREAM_VERDICT, 0)];
    bpf(PROG_ATTACH, &attach).map(drop)
}

/// Has IPv4 packets that arrive on one device, by their numbers, leave by another (Linux 6.6), as
/// long as the descriptor is open.
pub(crate) fn attach_redirect(from: u32, to: u32) -> io::Result<OwnedFd> {
    const PROTOCOL: i16 = 16;
    const ETH_P_IP: u64 = 0x0008;
    const REDIRECT_NEIGH: u64 = 152;
    let next = u64::from((-1_i32).cast_unsigned());
    let loaded = load(
        PROG_TYPE_SCHED_CLS,
        &[
            op(0xb7, R0, 0, 0, next),
            op(0x61, R2, R1, PROTOCOL, 0),
            op(0x55, R2, 0, 5, ETH_P_IP),
            op(0xb7, R1, 0, 0, u64::from(to)),
            op(0xb7, R2, 0, 0, 0),
            op(0xb7, R3, 0, 0, 0),
            op(0xb7, R4, 0, 0, 0),
            call_helper(REDIRECT_NEIGH),
            op(0x95, 0, 0, 0, 0),
        ],
    )?;
    made(LINK_CREATE, &[pair(number(&loaded), from), pair(TCX_INGRESS, 0)])
}

const R0: u64 = 0;
const R1: u64 = 1;
const R2: u64 = 2;
const R3: u64 = 3;
const R4: u64 = 4;
const R6: u64 = 6;
const R10: u64 = 10;

/// An instruction: `struct bpf_insn` of linux/bpf.h.
fn op(code: u64, to: u64, from: u64, offset: i16, number: u64) -> u64 {
    code | to << 8 | from << 12 | u64::from(offset.cast_unsigned()) << 16 | number << 32
}

fn call_helper(helper: u64) -> u64 {
    op(0x85, 0, 0, 0, helper)
}

fn load(kind: u32, program: &[u64]) -> io::Result<OwnedFd> {
    let count = u32::try_from(program.len()).map_err(io::Error::other)?;
    let license = c"Dual MIT/GPL";
    made(PROG_LOAD, &[pair(kind, count), address(program.as_ptr()), address(license.as_ptr())])
}

fn number(descriptor: &impl AsRawFd) -> u32 {
    descriptor.as_raw_fd().cast_unsigned()
}

/// Two words, one after the other in memory.
fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

fn address<T>(of: *const T) -> u64 {
    of.expose_provenance() as u64
}

/// A call that makes a descriptor.
fn made(command: c_long, attributes: &[u64]) -> io::Result<OwnedFd> {
    let descriptor = c_int::try_from(bpf(command, attributes)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn bpf(command: c_long, attributes: &[u64]) -> io::Result<c_long> {
    // SAFETY: the kernel only reads: the attributes, whose size it is told, and the keys, values and
    // program that they point to, which outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
