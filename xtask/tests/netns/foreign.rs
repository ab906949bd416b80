//! A TC program that is not ours: two instructions, `return VERDICT`.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use anyhow::{Context as _, Result};
use xtask::lab::Namespace;

/// What the program says of every packet (include/uapi/linux/bpf.h, `enum tcx_action_base`).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Verdict {
    /// The next program is asked.
    Next = -1,
    /// The packet is dropped.
    Drop = 2,
}

/// An attached program; detached when dropped.
#[derive(Debug)]
pub(crate) struct Foreign {
    _link: OwnedFd,
}

impl Foreign {
    /// Attaches one to what arrives on an interface, by tcx, after all that are there.
    ///
    /// # Errors
    /// Where the kernel has no tcx (before 6.6), or no such interface.
    pub(crate) fn attach(namespace: &Namespace, interface: &str, verdict: Verdict) -> Result<Self> {
        let attached = namespace.enter(|| -> Result<OwnedFd> {
            let ifindex = nix::net::if_::if_nametoindex(interface)?;
            Ok(link(&load(verdict).context("cannot load a program")?, ifindex)?)
        })?;
        Ok(Self { _link: attached.with_context(|| format!("cannot attach a program to {interface}"))? })
    }
}

/// Commands and types of include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;

/// The first fields of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log: [u32; 4],
}

/// The first fields of `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct Create {
    prog_fd: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    /// Relative program or link, and the revision that is expected: none.
    place: [u64; 2],
}

fn load(verdict: Verdict) -> io::Result<OwnedFd> {
    // r0 = verdict (BPF_ALU64 | BPF_MOV | BPF_K); exit (BPF_JMP | BPF_EXIT). `struct bpf_insn` on a
    // little-endian machine: the immediate above, the code in the lowest byte.
    let immediate = u64::from((verdict as i32).cast_unsigned());
    let instructions = [immediate << 32 | 0xb7, 0x95];
    let attributes = Load {
        prog_type: BPF_PROG_TYPE_SCHED_CLS,
        insn_cnt: 2,
        insns: instructions.as_ptr().expose_provenance() as u64,
        license: c"GPL".as_ptr().expose_provenance() as u64,
        log: [0; 4],
    };
    bpf(BPF_PROG_LOAD, &attributes)
}

fn link(program: &OwnedFd, ifindex: u32) -> io::Result<OwnedFd> {
    let attributes = Create {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        ifindex,
        attach_type: BPF_TCX_INGRESS,
        flags: 0,
        place: [0; 2],
    };
    bpf(BPF_LINK_CREATE, &attributes)
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: both commands only read the attributes, of the size given; what these point to lives
    // until the caller returns.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    let descriptor = RawFd::try_from(result).map_err(io::Error::other)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both commands return a descriptor that is new.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
