//! Attaches programs to interfaces and to the network namespace.
//!
//! tcx links are pinned and clsact filters stay by themselves, so that the
//! programs outlive a killed process and `fail` decides over new flows.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::programs::links::{FdLink, LinkError};
use aya::programs::tc::{NlOptions, TcAttachOptions, TcAttachType, TcError, TcHandle};
use aya::programs::{LinkOrder, ProgramError};
use serde::Serialize;
use tproxy_common::abi::program;

use crate::clsact::Filter;
use crate::failure::Failure;
use crate::instance::state::FilterMade;
use crate::interfaces::is_still;
use crate::plan::Role;
use crate::tun::Tun;

use super::bpffs;
use super::load::{Datapath, LoadError, lookup_program, queue_program, tc_program};
use super::query::{self, Place};

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
pub enum Direction {
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
    /// The root of the control groups.
    #[error("rules with `gid`")]
    Group(#[source] Failure),
    /// What is attached cannot be told.
    #[error("cannot look which programs are attached: {0}")]
    Query(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The programs of a role, with the side of the interface that each is for.
#[must_use]
pub const fn programs(role: Role, own_traffic: bool) -> [(Direction, &'static str); 2] {
    let (ingress, egress) = match role {
        Role::Capture => (program::CAPTURE, program::REPLY),
        Role::Uplink => (program::UPLINK, program::NAT),
        Role::Loopback => (program::LOOPBACK, program::REPLY),
    };
    let egress = match role {
        Role::Capture | Role::Uplink if own_traffic => program::OWN,
        _ => egress,
    };
    [(Direction::Ingress, ingress), (Direction::Egress, egress)]
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
}

impl Target<'_> {
    /// aya attaches by name, and that may be another interface's by now. Links detach what they
    /// hold when they are dropped.
    fn is_there(&self) -> Result<(), &'static str> {
        if is_still(self.interface, self.ifindex) { Ok(()) } else { Err("it is gone") }
    }
}

impl Datapath {
    /// Attaches one of the [`programs`] of an interface. `journal` is told of a
    /// clsact filter before it is made.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn attach(
        &mut self,
        target: &Target<'_>,
        (direction, name): (Direction, &'static str),
        hook: Hook,
        pin: &Path,
        journal: &mut dyn FnMut(FilterMade) -> io::Result<()>,
    ) -> Result<(), AttachError> {
        let result = match hook {
            Hook::Tcx => self.attach_tcx(target, direction, name, pin),
            Hook::Clsact => self.attach_clsact(target, direction, name, journal),
        };
        result.map_err(|source| AttachError::Attach {
            program: name,
            interface: target.interface.to_owned(),
            hook,
            source,
        })
    }

    /// Whether a tcx link still holds a program at an interface. Nothing tells
    /// when another program detaches it.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses the query.
    pub fn has_tcx(
        &mut self,
        ifindex: u32,
        (direction, name): (Direction, &'static str),
    ) -> Result<bool, AttachError> {
        let id = tc_program(&mut self.ebpf, name)?.info().map_err(query_failed)?.id();
        let place = match direction {
            Direction::Ingress => Place::TcxIngress(ifindex),
            Direction::Egress => Place::TcxEgress(ifindex),
        };
        Ok(query::programs(place).map_err(query_failed)?.contains(&id))
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
        target.is_there()?;
        // bpffs takes no dots, which VLAN names have: the index names the interface.
        pin_anew(link, &bpffs::links(pin).join(format!("{}_{name}", target.ifindex)))
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
                    let link = program.take_link(id)?;
                    target.is_there()?;
                    // The filter is to stay when this process goes.
                    std::mem::forget(link);
                    return Ok(());
                }
                Err(error) if errno(&error) == Some(libc::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err("every priority is taken by another filter".into())
    }

    /// Attaches the programs of faithful handshakes to their device. They go with
    /// it, and it with this process: nothing is pinned and nothing to be undone.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn attach_handshakes(&mut self, tun: &Tun, hook: Hook) -> Result<(), AttachError> {
        let choose = |ebpf: &mut aya::Ebpf| -> Result<(), AnyError> {
            tun.choose_queue_by(queue_program(ebpf)?.fd()?.as_fd())?;
            Ok(())
        };
        choose(&mut self.ebpf).map_err(|source| admit_failed(&tun.link.name, hook, source))?;
        self.attach_admit(&tun.link.name, hook)
    }

    /// Attaches [`program::ADMIT`] to that device, again where it was; its clsact qdisc is there.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn attach_admit(&mut self, interface: &str, hook: Hook) -> Result<(), AttachError> {
        // First: it would take off what has the same place.
        self.admit = None;
        let options = match hook {
            Hook::Tcx => TcAttachOptions::TcxOrder(LinkOrder::default()),
            Hook::Clsact => TcAttachOptions::Netlink(NlOptions::default()),
        };
        let attach = |ebpf: &mut aya::Ebpf| -> Result<_, AnyError> {
            let program = tc_program(ebpf, program::ADMIT)?;
            let id = program.attach_with_options(interface, TcAttachType::Ingress, options)?;
            Ok(program.take_link(id)?)
        };
        let link = attach(&mut self.ebpf).map_err(|source| admit_failed(interface, hook, source))?;
        self.admit = Some(link);
        Ok(())
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
            pin_anew(link, &bpffs::links(pin).join(program::LOOKUP))
        };
        attach(&mut self.ebpf).map_err(AttachError::Lookup)
    }

    /// Whether the `sk_lookup` link still holds its program.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses the query.
    pub fn has_lookup(&mut self) -> Result<bool, AttachError> {
        let id = lookup_program(&mut self.ebpf)?.info().map_err(query_failed)?.id();
        let netns = File::open("/proc/self/ns/net").map_err(query_failed)?;
        Ok(query::programs(Place::SkLookup(netns.as_fd())).map_err(query_failed)?.contains(&id))
    }
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

fn admit_failed(interface: &str, hook: Hook, source: AnyError) -> AttachError {
    AttachError::Attach { program: program::ADMIT, interface: interface.to_owned(), hook, source }
}

/// Pins a link where the pin of one that another program detached may still be.
pub(super) fn pin_anew(link: FdLink, path: &Path) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    link.pin(path)?;
    Ok(())
}

pub(super) fn query_failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> AttachError {
    AttachError::Query(error.into())
}

/// The errno of a failed netlink request.
fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::TcError(TcError::NetlinkError(error)) => error.raw_os_error(),
        ProgramError::TcError(TcError::IoError(error)) => error.raw_os_error(),
        _ => None,
    }
}
