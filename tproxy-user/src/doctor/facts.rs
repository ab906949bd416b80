//! Looks at the host: everything that the checks judge, and nothing is changed
//! (but that nft and the tun driver are loaded where they are asked for).

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use ipnet::IpNet;
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{AccessFlags, access};
use rtnetlink::Handle;
use tproxy_common::abi::program;

use crate::cmd::status;
use crate::config::{Config, Handshake, Kernel, Mark, Steer};
use crate::datapath::bpffs;
use crate::datapath::group;
use crate::datapath::query::{self, Place};
use crate::instance::{self, Paths};
use crate::interfaces::{self, Host, Interface, LinkDetail};
use crate::plan::{Plan, Role};
use crate::routing::conflict::{self, Earlier};
use crate::{clsact, netlink, owner, privilege, sysctl, tun};

use super::nft::Ruleset;

/// What the pin directory is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BpfFs {
    /// A BPF file system.
    Mounted,
    /// None, but `run` mounts one.
    Mountable,
    /// Another file system.
    Other,
}

/// The tun driver, which `--handshake faithful` needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TunDriver {
    /// It is there, or nobody asks for it.
    Usable,
    /// There is none; what `run` says then.
    Absent(String),
    /// This process may not use it; what `run` says then.
    Refused(String),
}

/// What is at an interface besides our programs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Its name.
    pub interface: String,
    /// An `ingress` qdisc.
    pub ingress_qdisc: bool,
    /// clsact filters of others, in words.
    pub filters: Vec<String>,
    /// tcx programs of others, in words; `None`: they cannot be listed.
    pub tcx: Option<Vec<String>>,
    /// An XDP program.
    pub xdp: bool,
}

/// A host, and what is to run on it.
#[derive(Clone, Debug)]
pub struct Facts {
    /// What is to run.
    pub config: Config,
    /// What that would set up.
    pub plan: Plan,
    /// Interfaces, addresses, routes.
    pub host: Host,
    /// More of the interfaces.
    pub links: Vec<LinkDetail>,
    /// The kernel's version.
    pub kernel: Option<Kernel>,
    /// Effective capabilities, a bit each.
    pub capabilities: u64,
    /// Hard limit of open files.
    pub open_files: u64,
    /// Hard limit of locked memory in bytes; `None`: there is none.
    pub memlock: Option<u64>,
    /// The kernel shows its types.
    pub btf: bool,
    /// `net.core.bpf_jit_enable`, where it is visible.
    pub jit: Option<String>,
    /// The pin directory.
    pub bpffs: BpfFs,
    /// The root of the control groups is mounted.
    pub control_groups: bool,
    /// The tun driver.
    pub tun: TunDriver,
    /// Sockets that `run` needs and others have: what, and who.
    pub taken: Vec<(String, String)>,
    /// A port that nobody has.
    pub free_port: u16,
    /// Process that runs with the same pin directory.
    pub running: Option<i32>,
    /// What a killed run left.
    pub left: Vec<String>,
    /// Who has the table or the mark.
    pub conflict: Option<String>,
    /// Flags that choose others.
    pub alternative: Option<String>,
    /// Rules of others before ours.
    pub earlier: Vec<Earlier>,
    /// At each interface of the plan.
    pub hooks: Vec<Hooks>,
    /// Forwarding of IPv4 and IPv6.
    pub forwards: (bool, bool),
    /// Interfaces with IPv6 disabled.
    pub without_ipv6: Vec<String>,
    /// `accept_local` of lo, and whether it can be written.
    pub accept_local: (String, bool),
    /// Bridged packets go through iptables.
    pub bridge_filter: bool,
    /// Networks behind the captured interfaces.
    pub clients: Vec<IpNet>,
    /// Rules of nft and iptables-nft, or why they are not known.
    pub nft: Result<Ruleset, String>,
    /// Tables that iptables-legacy uses.
    pub legacy: Vec<String>,
    /// Tracked connections, and how many there can be.
    pub conntrack: Option<(u64, u64)>,
}

impl Facts {
    /// Whether the eBPF programs are to steer.
    #[must_use]
    pub fn steers(&self) -> bool {
        self.config.steering.by == Steer::Ebpf
    }

    /// Whether this process has a capability, by its number.
    #[must_use]
    pub fn has_capability(&self, number: u32) -> bool {
        self.capabilities >> number & 1 == 1
    }

    /// Interfaces that would be captured.
    pub fn captured(&self) -> impl Iterator<Item = &Interface> {
        let captured = self.plan.interfaces.iter().filter(|interface| interface.role == Role::Capture);
        captured.filter_map(|interface| self.host.by_index(interface.index))
    }

    /// Names of the interfaces towards servers.
    pub fn uplinks(&self) -> impl Iterator<Item = &str> {
        self.plan.interfaces.iter().filter(|i| i.role == Role::Uplink).map(|interface| &*interface.name)
    }
}

/// Looks at this host and network namespace.
///
/// # Errors
/// Where the kernel refuses what needs no privilege, or a flag makes no sense here.
pub async fn collect(config: &Config) -> anyhow::Result<Facts> {
    let handle = netlink::connect()?;
    let (table, mark) = (config.steering.table, config.steering.mark);
    let host = interfaces::snapshot(&handle, table).await?;
    let plan = Plan::new(config, &host)?;
    let paths = Paths::of(&config.pin);
    let running = paths.running()?;
    let conflict = who_has(&handle, config, &paths, table, mark).await?;
    let alternative = match conflict {
        Some(_) => alternative(&handle, config, &paths).await?,
        None => None,
    };
    let links = interfaces::details(&handle).await?;
    let mut hooks = Vec::new();
    for interface in &plan.interfaces {
        let xdp = links.iter().any(|link| link.index == interface.index && link.xdp);
        hooks.push(at(&handle, &interface.name, interface.index, xdp).await?);
    }
    let without_ipv6 = host.interfaces.iter().map(|interface| interface.name.clone());
    let captured = plan.interfaces.iter().filter(|interface| interface.role == Role::Capture);
    let behind: Vec<_> = captured.map(|interface| interface.index).collect();
    Ok(Facts {
        kernel: privilege::kernel(config).ok(),
        capabilities: privilege::effective()?,
        open_files: getrlimit(Resource::RLIMIT_NOFILE)?.1,
        memlock: Some(getrlimit(Resource::RLIMIT_MEMLOCK)?.1).filter(|limit| *limit != libc::RLIM_INFINITY),
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        jit: sysctl::read("net.core.bpf_jit_enable").ok(),
        bpffs: bpf_fs(&config.pin),
        control_groups: group::root().is_ok(),
        tun: tun_driver(config),
        taken: if running.is_some() { Vec::new() } else { taken(config, &plan) },
        free_port: free_port(config, &plan),
        left: status::leftovers(&config.pin, paths.read_state()?.as_ref()),
        running,
        conflict,
        alternative,
        earlier: conflict::earlier(&handle, config.steering.rule_priority).await?,
        hooks,
        forwards: (is_on("net.ipv4.ip_forward"), is_on("net.ipv6.conf.all.forwarding")),
        without_ipv6: without_ipv6.filter(|name| ipv6_is_off(name)).collect(),
        accept_local: (
            sysctl::read(sysctl::ACCEPT_LOCAL).unwrap_or_default(),
            access("/proc/sys/net/ipv4/conf/lo/accept_local", AccessFlags::W_OK).is_ok(),
        ),
        bridge_filter: is_on("net.bridge.bridge-nf-call-iptables")
            || is_on("net.bridge.bridge-nf-call-ip6tables"),
        clients: interfaces::networks(&handle, &behind).await?,
        nft: ruleset(),
        legacy: legacy(),
        conntrack: conntrack(),
        config: config.clone(),
        plan,
        host,
        links,
    })
}

fn is_on(name: &str) -> bool {
    sysctl::read(name).is_ok_and(|value| value != "0")
}

/// Names of interfaces may have dots, so this is no name of sysctl(8).
fn ipv6_is_off(interface: &str) -> bool {
    let path = Path::new("/proc/sys/net/ipv6/conf").join(interface).join("disable_ipv6");
    fs::read_to_string(path).is_ok_and(|value| value.trim() == "1")
}

fn bpf_fs(pin: &Path) -> BpfFs {
    let existing = pin.ancestors().find(|path| path.exists());
    if existing.is_some_and(bpffs::is_bpffs) {
        BpfFs::Mounted
    } else if pin.starts_with(bpffs::MOUNT_POINT) && !bpffs::is_bpffs(Path::new(bpffs::MOUNT_POINT)) {
        BpfFs::Mountable
    } else {
        BpfFs::Other
    }
}

fn tun_driver(config: &Config) -> TunDriver {
    if config.steering.handshake == Handshake::Eager {
        return TunDriver::Usable;
    }
    match tun::probe() {
        Ok(()) => TunDriver::Usable,
        Err(error) if tun::is_absent(&error) => TunDriver::Absent(tun::explain(error).to_string()),
        Err(error) => TunDriver::Refused(tun::explain(error).to_string()),
    }
}

async fn who_has(
    handle: &Handle,
    config: &Config,
    paths: &Paths,
    table: u32,
    mark: Mark,
) -> anyhow::Result<Option<String>> {
    if config.steering.by == Steer::None {
        return Ok(None);
    }
    match instance::claimed_by_another(paths, table, mark)? {
        Some(conflict) => Ok(Some(conflict)),
        None => Ok(conflict::find(handle, table, mark).await?),
    }
}

/// Flags for a table and a mark that nobody has, as few as do.
async fn alternative(handle: &Handle, config: &Config, paths: &Paths) -> anyhow::Result<Option<String>> {
    let steering = &config.steering;
    let bits = (0..31).map(|bit| Mark { value: 1 << bit, mask: 1 << bit });
    let marks: Vec<_> =
        bits.filter(|mark| mark.value & (steering.own_mark | steering.mark.mask) == 0).collect();
    for mark in std::iter::once(steering.mark).chain(marks) {
        for table in steering.table..steering.table.saturating_add(8) {
            if who_has(handle, config, paths, table, mark).await?.is_none() {
                let table = (table != steering.table).then(|| format!("--table {table}"));
                let mark = (mark != steering.mark).then(|| format!("--tproxy-mark {mark}"));
                return Ok(Some([table, mark].into_iter().flatten().collect::<Vec<_>>().join(" ")));
            }
        }
    }
    Ok(None)
}

fn owner_of(protocol: &str, address: SocketAddr) -> Option<String> {
    let protocol = if protocol == "tcp" { owner::Protocol::Tcp } else { owner::Protocol::Udp };
    owner::of_port(protocol, address)
}

fn taken(config: &Config, plan: &Plan) -> Vec<(String, String)> {
    let wanted = plan.sockets.iter().filter(|_| config.steering.on_port != 0);
    wanted
        .filter_map(|socket| {
            let owner = owner_of(socket.protocol, socket.address)?;
            Some((format!("{} {}", socket.protocol, socket.address), owner))
        })
        .collect()
}

fn free_port(config: &Config, plan: &Plan) -> u16 {
    let first = config.steering.on_port.saturating_add(1);
    let is_free = |port: &u16| {
        plan.sockets
            .iter()
            .all(|socket| owner_of(socket.protocol, SocketAddr::new(socket.address.ip(), *port)).is_none())
    };
    (first..first.saturating_add(16)).find(is_free).unwrap_or(first)
}

async fn at(handle: &Handle, interface: &str, ifindex: u32, xdp: bool) -> anyhow::Result<Hooks> {
    let filters = clsact::filters(handle, ifindex).await?;
    let foreign =
        filters.iter().filter(|filter| !filter.egress && !filter.name.as_deref().is_some_and(is_ours));
    Ok(Hooks {
        interface: interface.to_owned(),
        ingress_qdisc: clsact::qdisc(handle, ifindex).await? == clsact::Qdisc::Ingress,
        filters: foreign
            .map(|filter| {
                let name = filter.name.as_deref().unwrap_or(&filter.kind);
                format!("the filter {name} (tc, pref {})", filter.priority)
            })
            .collect(),
        tcx: tcx(ifindex),
        xdp,
    })
}

fn is_ours(name: &str) -> bool {
    [program::CAPTURE, program::UPLINK, program::REPLY, program::OWN, program::LOOPBACK]
        .iter()
        // The kernel keeps 15 characters of a program's name.
        .any(|own| name == *own || (name.len() == 15 && own.starts_with(name)))
}

/// tcx programs of others; none where the kernel has no tcx.
fn tcx(ifindex: u32) -> Option<Vec<String>> {
    let ids = match query::programs(Place::TcxIngress(ifindex)) {
        Ok(ids) => ids,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Some(Vec::new()),
        Err(_) => return None,
    };
    let loaded: Vec<_> = aya::programs::loaded_programs().flatten().collect();
    let name = |id: u32| {
        let program = loaded.iter().find(|program| program.id() == id);
        program.and_then(|program| program.name_as_str()).unwrap_or_default().to_owned()
    };
    let named = ids.into_iter().map(|id| (id, name(id))).filter(|(_, name)| !is_ours(name));
    Some(
        named
            .map(|(id, name)| format!("the program {name} (tcx, id {id})").replace("program  ", "program "))
            .collect(),
    )
}

/// The one tool is asked that shows the rules of nft and of iptables-nft alike.
fn ruleset() -> Result<Ruleset, String> {
    let output = Command::new("nft")
        .args(["-j", "list", "ruleset"])
        .output()
        .map_err(|error| format!("nft: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("nft: {}", said.lines().next().unwrap_or("failed")));
    }
    serde_json::from_slice(&output.stdout)
        .map(|json| Ruleset::parse(&json))
        .map_err(|error| format!("nft: {error}"))
}

/// Tables that the old modules have been given rules for. Root alone can read that.
fn legacy() -> Vec<String> {
    ["ip_tables_names", "ip6_tables_names"]
        .iter()
        .filter_map(|name| fs::read_to_string(PathBuf::from("/proc/thread-self/net").join(name)).ok())
        .flat_map(|names| names.lines().map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

fn conntrack() -> Option<(u64, u64)> {
    let read = |name: &str| sysctl::read(name).ok()?.parse().ok();
    Some((read("net.netfilter.nf_conntrack_count")?, read("net.netfilter.nf_conntrack_max")?))
}
