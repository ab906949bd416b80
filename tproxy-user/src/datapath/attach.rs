//! Attaches programs to interfaces and to the network namespace.
//!
//! tcx links are pinned and clsact filters stay by themselves, so that the
//! programs outlive a killed process and `fail` decides over new flows.

use std::fs::File;
use std::io;
use std::path::Path;

use aya::programs::links::{FdLink, LinkError};
use aya::programs::tc::{NlOptions, TcAttachOptions, TcAttachType, TcError, TcHandle, qdisc_add_clsact};
use aya::programs::{LinkOrder, ProgramError};
use serde::Serialize;
use tproxy_common::abi::program;

use crate::clsact::Filter;
use crate::instance::state::FilterMade;
use crate::plan::Role;

use super::bpffs;
use super::load::{Datapath, LoadError, lookup_program, tc_program};

/// The kernel hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// A tcx link (6.6).
    Tcx,
    /// A direct-action filter on a clsact qdisc (4.5).
    Clsact,
}

/// Which way packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    /// Arriving.
    Ingress,
    /// Leaving.
    Egress,
}

/// `pref` of our clsact filters: "tp". Where another has it, the next ones.
const PRIORITY: u16 = 0x7470;
/// How many priorities are tried.
const PRIORITIES: u16 = 32;
/// Handle of our clsact filters.
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Why an attachment failed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The object.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The attachment itself.
    #[error("cannot attach {program} to {interface} by {hook:?}: {source}")]
    Attach {
        /// Which program.
        program: &'static str,
        /// To what.
        interface: String,
        /// How.
        hook: Hook,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The network namespace's `sk_lookup` hook.
    #[error("cannot attach tproxy_lookup to the network namespace: {0}")]
    Lookup(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The programs of a role.
const fn programs(role: Role, own_traffic: bool) -> [(Direction, Option<&'static str>); 2] {
    let egress = if own_traffic { Some(program::OWN) } else { None };
    match (role, egress) {
        (Role::Capture, None) => {
            [(Direction::Ingress, Some(program::CAPTURE)), (Direction::Egress, Some(program::REPLY))]
        }
        (Role::Capture, egress) => {
            [(Direction::Ingress, Some(program::CAPTURE)), (Direction::Egress, egress)]
        }
        (Role::Uplink, egress) => [(Direction::Ingress, Some(program::UPLINK)), (Direction::Egress, egress)],
        (Role::Loopback, _) => {
            [(Direction::Ingress, Some(program::LOOPBACK)), (Direction::Egress, Some(program::REPLY))]
        }
    }
}

impl From<Direction> for TcAttachType {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Ingress => Self::Ingress,
            Direction::Egress => Self::Egress,
        }
    }
}

/// An interface to attach to.
#[derive(Clone, Debug)]
pub struct Target<'a> {
    /// Its name.
    pub interface: &'a str,
    /// Its index.
    pub ifindex: u32,
    /// What it is to the proxy.
    pub role: Role,
}

impl Datapath {
    /// Attaches the programs of a role to an interface. `journal` is told of
    /// each clsact filter before it is made.
    ///
    /// # Errors
    ///
    /// [`AttachError`]; what was attached before stays.
    pub fn attach(
        &mut self,
        target: &Target<'_>,
        hook: Hook,
        own_traffic: bool,
        pin: &Path,
        journal: &mut dyn FnMut(FilterMade) -> io::Result<()>,
    ) -> Result<(), AttachError> {
        for (direction, name) in programs(target.role, own_traffic) {
            let Some(name) = name else { continue };
            let result = match hook {
                Hook::Tcx => self.attach_tcx(target, direction, name, pin),
                Hook::Clsact => self.attach_clsact(target, direction, name, journal),
            };
            result.map_err(|source| AttachError::Attach {
                program: name,
                interface: target.interface.to_owned(),
                hook,
                source,
            })?;
        }
        Ok(())
    }

    fn attach_tcx(
        &mut self,
        target: &Target<'_>,
        direction: Direction,
        name: &'static str,
        pin: &Path,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let program = tc_program(&mut self.ebpf, name)?;
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        let id = program.attach_with_options(target.interface, direction.into(), options)?;
        let link: FdLink = program.take_link(id)?.try_into().map_err(|error: LinkError| error)?;
        // bpffs takes no dots, which VLAN names have: the index names the interface.
        link.pin(bpffs::links(pin).join(format!("{}_{name}", target.ifindex)))?;
        Ok(())
    }

    fn attach_clsact(
        &mut self,
        target: &Target<'_>,
        direction: Direction,
        name: &'static str,
        journal: &mut dyn FnMut(FilterMade) -> io::Result<()>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let program = tc_program(&mut self.ebpf, name)?;
        for priority in PRIORITY..PRIORITY + PRIORITIES {
            journal(FilterMade {
                ifindex: target.ifindex,
                ifname: target.interface.to_owned(),
                filter: Filter {
                    egress: direction == Direction::Egress,
                    priority,
                    handle: HANDLE.into(),
                    kind: "bpf".to_owned(),
                    name: Some(name.to_owned()),
                },
            })?;
            let options = NlOptions { priority, handle: HANDLE, classid: None };
            match program.attach_with_options(
                target.interface,
                direction.into(),
                TcAttachOptions::Netlink(options),
            ) {
                Ok(id) => {
                    // The filter is to stay when this process goes.
                    std::mem::forget(program.take_link(id)?);
                    return Ok(());
                }
                Err(error) if errno(&error) == Some(libc::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err("every priority is taken by another filter".into())
    }

    /// Attaches the `sk_lookup` program to this process's network namespace (5.9).
    ///
    /// # Errors
    ///
    /// [`AttachError::Lookup`].
    pub fn attach_lookup(&mut self, pin: &Path) -> Result<(), AttachError> {
        let attach = |ebpf: &mut aya::Ebpf| -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            let program = lookup_program(ebpf)?;
            let id = program.attach(File::open("/proc/self/ns/net")?)?;
            let link: FdLink = program.take_link(id)?.into();
            link.pin(bpffs::links(pin).join(program::LOOKUP))?;
            Ok(())
        };
        attach(&mut self.ebpf).map_err(AttachError::Lookup)
    }
}

/// The errno of a failed netlink request.
fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::TcError(TcError::NetlinkError(error)) => error.raw_os_error(),
        ProgramError::TcError(TcError::IoError(error)) => error.raw_os_error(),
        _ => None,
    }
}

/// Makes the clsact qdisc of an interface; it must not be there.
///
/// # Errors
///
/// As the kernel says.
pub fn add_clsact(interface: &str) -> Result<(), TcError> {
    qdisc_add_clsact(interface)
}
