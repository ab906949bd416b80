//! Loads the object: settings in, maps pinned, programs verified.

use std::os::fd::AsRawFd;
use std::path::Path;

use aya::maps::SockMap;
use aya::programs::tc::SchedClassifierLink;
use aya::programs::{CgroupSock, ProgramError, SchedClassifier, SkLookup, SocketFilter};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use aya_log::EbpfLogger;
use tproxy_common::abi::{ListenerKind, Settings, listener_index, map, program};

use crate::failure::Failure;

use super::bpffs;
use super::features::Features;
use super::policy;

/// The object of the default build.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tproxy.o"));
/// The object of the debugging build, which logs each decision.
static OBJECT_LOG: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tproxy-log.o"));

/// Why the data path could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The pin directory.
    #[error(transparent)]
    Pin(#[from] bpffs::PinError),
    /// Creating a map or reading the object.
    #[error("cannot load the eBPF object: {0}")]
    Object(#[from] aya::EbpfError),
    /// The verifier or the kernel refused a program.
    #[error("the kernel refuses the eBPF program {name}: {source}")]
    Program {
        /// Which.
        name: &'static str,
        /// What it said.
        source: ProgramError,
    },
    /// A map operation.
    #[error("eBPF map {name}: {source}")]
    Map {
        /// Which.
        name: &'static str,
        /// Why.
        source: aya::maps::MapError,
    },
    /// The rules do not fit into the memory that this kernel lets them have.
    #[error("map POLICY")]
    RulesTooLarge(#[source] Failure),
    /// The object lacks a part: it was built from other sources.
    #[error("the embedded eBPF object has no {0}; build it again: cargo xtask build-ebpf")]
    Missing(&'static str),
}

/// The loaded object.
#[derive(Debug)]
pub struct Datapath {
    pub(super) ebpf: Ebpf,
    /// That of [`program::ADMIT`] to the tun device; it ends with this.
    pub(super) admit: Option<SchedClassifierLink>,
    /// Rules so far, see [`layout::NUMBER`](tproxy_common::policy::layout::NUMBER).
    pub(super) policies: u32,
    features: Features,
}

/// All TC programs.
const TC_PROGRAMS: [&str; 7] = [
    program::CAPTURE,
    program::UPLINK,
    program::NAT,
    program::REPLY,
    program::OWN,
    program::LOOPBACK,
    program::ADMIT,
];

impl Datapath {
    /// Loads the programs that the settings need and pins the maps below `pin`.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn load(
        settings: &Settings,
        features: Features,
        max_flows: u32,
        pin: &Path,
        log: bool,
    ) -> Result<Self, LoadError> {
        bpffs::create(pin)?;
        policy::create(features, pin)?;
        let mut ebpf = loader(settings, max_flows, Some(pin)).load(if log { OBJECT_LOG } else { OBJECT })?;
        for name in TC_PROGRAMS {
            let needed = match name {
                program::OWN | program::LOOPBACK => settings.own_traffic == 1,
                program::ADMIT => settings.handshake_ifindex != 0,
                _ => true,
            };
            if needed {
                tc_program(&mut ebpf, name)?.load().map_err(|source| LoadError::Program { name, source })?;
            }
        }
        if settings.handshake_ifindex != 0 {
            let name = program::QUEUE;
            queue_program(&mut ebpf)?.load().map_err(|source| LoadError::Program { name, source })?;
        }
        if features.sk_lookup() {
            let name = program::LOOKUP;
            lookup_program(&mut ebpf)?.load().map_err(|source| LoadError::Program { name, source })?;
        }
        Ok(Self { ebpf, admit: None, policies: 0, features })
    }

    /// Makes the maps alone: leaves nothing pinned and loads no program. For tests,
    /// which load what they run.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn maps_only(settings: &Settings, features: Features, log: bool) -> Result<Self, LoadError> {
        let pin = Path::new(bpffs::MOUNT_POINT).join(format!(
            "tproxy-maps-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        bpffs::create(&pin)?;
        let policy = policy::create(features, &pin);
        let mut loader = loader(settings, 1024, None);
        loader.map_pin_path(map::POLICY, pin.join(map::POLICY));
        let ebpf = loader.load(if log { OBJECT_LOG } else { OBJECT });
        bpffs::remove(&pin)?;
        policy?;
        let ebpf = ebpf?;
        Ok(Self { ebpf, admit: None, policies: 0, features })
    }

    /// What the kernel offers.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// The object, for reading maps and running programs in tests.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Puts a worker's listener where the programs find it.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`].
    pub fn set_listener(
        &mut self,
        kind: ListenerKind,
        worker: u32,
        socket: &impl AsRawFd,
    ) -> Result<(), LoadError> {
        let name = map::LISTENERS;
        self.listeners()?
            .set(listener_index(kind, worker), socket, 0)
            .map_err(|source| LoadError::Map { name, source })
    }

    /// Takes the listeners of one kind away: its new flows fail open or closed from here on.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`].
    pub fn clear_listeners(&mut self, kind: ListenerKind, workers: u32) -> Result<(), LoadError> {
        let mut listeners = self.listeners()?;
        for worker in 0..workers {
            // A family that the host does not have was never there.
            let _: Result<(), _> = listeners.clear_index(&listener_index(kind, worker));
        }
        Ok(())
    }

    fn listeners(&mut self) -> Result<SockMap<&mut aya::maps::MapData>, LoadError> {
        let name = map::LISTENERS;
        let map = self.ebpf.map_mut(name).ok_or(LoadError::Missing(name))?;
        SockMap::try_from(map).map_err(|source| LoadError::Map { name, source })
    }

    /// The reader of the debugging build's log lines, which go to `tracing`.
    ///
    /// # Errors
    ///
    /// The object has no log, or the kernel no ring buffer (5.8).
    pub fn logger(&mut self) -> Result<EbpfLogger<&'static dyn log::Log>, aya_log::Error> {
        EbpfLogger::init(&mut self.ebpf)
    }
}

fn loader<'a>(settings: &'a Settings, max_flows: u32, pin: Option<&Path>) -> EbpfLoader<'a> {
    let mut loader = EbpfLoader::new();
    loader.override_global("SETTINGS", settings, true).map_max_entries(map::FLOWS, max_flows);
    if let Some(pin) = pin {
        for name in map::ALL {
            loader.map_pin_path(name, pin.join(name));
        }
    }
    loader
}

pub(super) fn tc_program<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, LoadError> {
    ebpf.program_mut(name)
        .ok_or(LoadError::Missing(name))?
        .try_into()
        .map_err(|source| LoadError::Program { name, source })
}

pub(super) fn queue_program(ebpf: &mut Ebpf) -> Result<&mut SocketFilter, LoadError> {
    let name = program::QUEUE;
    ebpf.program_mut(name)
        .ok_or(LoadError::Missing(name))?
        .try_into()
        .map_err(|source| LoadError::Program { name, source })
}

pub(super) fn group_program(ebpf: &mut Ebpf) -> Result<&mut CgroupSock, LoadError> {
    let name = program::GROUP;
    ebpf.program_mut(name)
        .ok_or(LoadError::Missing(name))?
        .try_into()
        .map_err(|source| LoadError::Program { name, source })
}

pub(super) fn lookup_program(ebpf: &mut Ebpf) -> Result<&mut SkLookup, LoadError> {
    let name = program::LOOKUP;
    ebpf.program_mut(name)
        .ok_or(LoadError::Missing(name))?
        .try_into()
        .map_err(|source| LoadError::Program { name, source })
}
