//! The state file: who runs, and what is to be undone.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::clsact::Filter;
use crate::config::{Config, Steer};

/// A claim on a routing table and mark; undone by removing our rules and routes of that table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutingClaim {
    /// Routing table.
    pub table: u32,
    /// Value of the mark.
    pub mark: u32,
    /// Its mask.
    pub mask: u32,
}

/// A kernel setting that was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SysctlChange {
    /// Name, as by `sysctl`.
    pub name: String,
    /// Value before.
    pub old: String,
    /// Value that we wrote; another one now is somebody else's, and stays.
    pub new: String,
}

/// A clsact filter that we attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterMade {
    /// ifindex.
    pub ifindex: u32,
    /// Name of the interface.
    pub ifname: String,
    /// The filter.
    pub filter: Filter,
}

/// A clsact qdisc that we made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QdiscMade {
    /// ifindex.
    pub ifindex: u32,
    /// Name of the interface.
    pub ifname: String,
}

/// What is to be undone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Journal {
    /// Rules and routes.
    pub routing: Option<RoutingClaim>,
    /// Kernel settings.
    pub sysctls: Vec<SysctlChange>,
    /// clsact filters.
    pub filters: Vec<FilterMade>,
    /// clsact qdiscs.
    pub qdiscs: Vec<QdiscMade>,
}

impl Journal {
    /// Notes a filter that is about to be made. What was noted for that side of
    /// the interface before was found taken by another, or removed by one.
    pub fn attaching(&mut self, made: FilterMade) {
        let side = |made: &FilterMade| (made.ifindex, made.filter.egress);
        self.filters.retain(|earlier| side(earlier) != side(&made));
        self.filters.push(made);
    }

    /// Notes a clsact qdisc that is about to be made.
    pub fn adding(&mut self, made: QdiscMade) {
        self.qdiscs.retain(|earlier| earlier.ifindex != made.ifindex);
        self.qdiscs.push(made);
    }

    /// The filter at one side of an interface.
    #[must_use]
    pub fn filter(&self, ifindex: u32, egress: bool) -> Option<&Filter> {
        let at = |made: &&FilterMade| made.ifindex == ifindex && made.filter.egress == egress;
        self.filters.iter().find(at).map(|made| &made.filter)
    }

    /// Notes a setting that is about to be changed. What another program wrote
    /// over ours is what is to be there in the end.
    pub fn setting(&mut self, change: SysctlChange) {
        self.sysctls.retain(|earlier| earlier.name != change.name);
        self.sysctls.push(change);
    }

    /// Forgets the filters of an interface. `name` is what it is called now;
    /// `None`: it is gone, and its qdisc went with it.
    pub fn detached(&mut self, ifindex: u32, name: Option<&str>) {
        self.filters.retain(|made| made.ifindex != ifindex);
        self.qdiscs.retain(|made| name.is_some() || made.ifindex != ifindex);
        self.called(ifindex, name.unwrap_or_default());
    }

    /// Notes what an interface is called now. By another name its qdisc would not be known again.
    pub fn called(&mut self, ifindex: u32, name: &str) {
        for made in self.qdiscs.iter_mut().filter(|made| made.ifindex == ifindex) {
            name.clone_into(&mut made.ifname);
        }
    }
}

/// The content of the state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Process that wrote it.
    pub pid: u32,
    /// Version of the program.
    pub version: String,
    /// Start, RFC 3339 in UTC.
    pub since: String,
    /// Inode of the network namespace.
    pub netns: u64,
    /// Pin directory.
    pub pin: PathBuf,
    /// The configuration in short, for `status`.
    pub config: Summary,
    /// What is to be undone.
    #[serde(default)]
    pub journal: Journal,
    /// Inode of the network namespace in which the journal counts.
    pub journal_netns: u64,
}

/// A configuration in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// `--iface`.
    pub interfaces: Vec<String>,
    /// `ebpf` or `none`.
    pub steer: String,
    /// `--tproxy-mark`.
    pub tproxy_mark: String,
    /// `--table`.
    pub table: u32,
    /// `--on-port`.
    pub on_port: u16,
    /// `--own-traffic`.
    pub own_traffic: bool,
}

impl State {
    pub(super) fn new(config: &Config) -> Self {
        let netns = netns();
        let steering = &config.steering;
        Self {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            since: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            netns,
            pin: config.pin.clone(),
            config: Summary {
                interfaces: config.capture.interfaces.clone(),
                steer: if steering.by == Steer::Ebpf { "ebpf" } else { "none" }.to_owned(),
                tproxy_mark: steering.mark.to_string(),
                table: steering.table,
                on_port: steering.on_port,
                own_traffic: config.capture.own_traffic,
            },
            journal: Journal::default(),
            journal_netns: netns,
        }
    }
}

/// Inode of the calling thread's network namespace; 0 where there is no `/proc`.
#[must_use]
pub fn netns() -> u64 {
    fs::metadata("/proc/thread-self/ns/net").map_or(0, |namespace| namespace.ino())
}

pub(super) fn read(path: &Path) -> Result<Option<State>, Error> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let state = serde_json::from_str(&text);
    state.map(Some).map_err(|source| Error::Damaged { path: path.to_owned(), source })
}

/// Replaces the file as a whole: a reader, or a kill, finds the old or the new one.
pub(super) fn write(path: &Path, state: &State) -> Result<(), Error> {
    let new = path.with_extension("json.new");
    let text = serde_json::to_string_pretty(state)
        .map_err(|source| Error::Damaged { path: path.to_owned(), source })?;
    let written = fs::File::create(&new).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(Error::io("write", &new))?;
    fs::rename(&new, path).map_err(Error::io("replace", path))
}
