//! The program that notes the group of sockets, at the root of the control groups.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::maps::{MapError, SkStorage};
use aya::programs::links::{FdLink, LinkError};
use aya::programs::{CgroupAttachMode, ProgramError};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};
use socket2::{Domain, Socket, Type};
use tproxy_common::abi::{map, program};

use crate::failure::Failure;

use super::attach::{AttachError, pin_anew, query_failed};
use super::bpffs;
use super::load::{Datapath, LoadError, group_program};
use super::query::{self, Place};

/// A link to a control group lets other programs be there, and is refused where it asks for that
/// (`cgroup_bpf_link_attach`, kernel/bpf/cgroup.c).
pub const BESIDE_OTHERS: CgroupAttachMode = CgroupAttachMode::Single;

impl Datapath {
    /// Attaches the program to the root of the control groups, beside those of others (5.9).
    /// Loads it first: most runs never need it.
    ///
    /// # Errors
    ///
    /// [`AttachError::Group`] where there is no such root or another program has it for itself,
    /// or as the kernel says.
    pub fn attach_group(&mut self, pin: &Path) -> Result<(), AttachError> {
        let root = root().map_err(AttachError::Group)?;
        let name = program::GROUP;
        let program = group_program(&mut self.ebpf)?;
        if program.fd().is_err() {
            program.load().map_err(|source| LoadError::Program { name, source })?;
        }
        let id = program.attach(root, BESIDE_OTHERS).map_err(attach_failed)?;
        let link = program.take_link(id).map_err(attach_failed)?;
        let link: FdLink = link.try_into().map_err(|error: LinkError| query_failed(error))?;
        self.require_note()?;
        pin_anew(link, &bpffs::links(pin).join(name)).map_err(AttachError::Query)
    }

    /// Makes sure that a socket which is made now has its note. Where the kernel has no room for it
    /// the program says nothing, and rules with `gid` would match nobody: since Linux 6.19 it comes
    /// from `kmalloc_nolock` (`bpf_local_storage_alloc`), which needs a processor that compares and
    /// exchanges 16 bytes at once.
    fn require_note(&self) -> Result<(), AttachError> {
        let failed = |source| LoadError::Map { name: map::GROUPS, source };
        let groups = self.ebpf.map(map::GROUPS).ok_or(LoadError::Missing(map::GROUPS))?;
        let groups = SkStorage::<_, u32>::try_from(groups).map_err(failed)?;
        let socket =
            Socket::new(Domain::IPV4, Type::DGRAM, None).map_err(|error| failed(MapError::IoError(error)))?;
        match groups.get(&socket, 0) {
            Ok(_) => Ok(()),
            Err(MapError::KeyNotFound) => Err(AttachError::Group(Failure::unsupported(
                "the kernel keeps no note at sockets, so no such rule would match: since Linux 6.19 it takes a processor \
                 with cmpxchg16b (/proc/cpuinfo: cx16), or the boot parameter slab_debug=F,kmalloc-*",
            ))),
            Err(error) => Err(failed(error).into()),
        }
    }

    /// Whether it is attached.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses the query.
    pub fn has_group(&mut self) -> Result<bool, AttachError> {
        let program = group_program(&mut self.ebpf)?;
        if program.fd().is_err() {
            return Ok(false);
        }
        let id = program.info().map_err(query_failed)?.id();
        let root = root().map_err(AttachError::Group)?;
        Ok(query::programs(Place::SocketCreation(root.as_fd())).map_err(query_failed)?.contains(&id))
    }
}

/// What mounts the control groups where they are in nobody's way.
pub const MOUNT: &str = "mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2";

/// The root of the control groups (version 2), wherever it is mounted.
///
/// # Errors
///
/// [`Failure::Unsupported`] where it is not.
pub fn root() -> Result<File, Failure> {
    let mounts = procfs::process::Process::myself().and_then(|process| process.mountinfo());
    let mounts =
        mounts.map_err(|error| Failure::unsupported(format_args!("cannot read what is mounted: {error}")))?;
    let roots = mounts.0.into_iter().filter(|mount| mount.fs_type == "cgroup2" && mount.root == "/");
    // Another file system may be mounted over it.
    let is_there = |root: &File| fstatfs(root).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    roots.filter_map(|mount| File::open(mount.mount_point).ok()).find(is_there).ok_or_else(|| {
        Failure::unsupported(format_args!(
            "the control groups (version 2) are not mounted; mount them: {MOUNT}"
        ))
    })
}

fn attach_failed(error: ProgramError) -> AttachError {
    match &error {
        // hierarchy_allows_attach and its caller, kernel/bpf/cgroup.c.
        ProgramError::SyscallError(call) if call.io_error.raw_os_error() == Some(libc::EPERM) => {
            AttachError::Group(Failure::conflict(
                "a program that allows no other is attached to the root of the control groups (bpftool cgroup tree)",
            ))
        }
        _ => LoadError::Program { name: program::GROUP, source: error }.into(),
    }
}
