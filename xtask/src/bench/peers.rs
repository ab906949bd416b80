//! The candidates, each set up as its documentation tells, in the router of a lab.

mod experiment;
mod haproxy;
mod nginx;
mod redsocks;
mod rules;
mod shadowsocks;
mod tproxy;
mod v2ray;

use anyhow::Result;
use clap::ValueEnum;
use xtask::lab::{Daemon, Lab, Proxy};

use super::arena::Programs;
use super::series::Role;
use crate::needs;
use crate::packages::Need;

/// Where those listen that iptables hands connections to.
const PORT: u16 = 15001;

/// Seconds after which a UDP flow without datagrams is forgotten: the thousands that a round makes
/// must not weigh on the next, nor meet the limit of open files.
const UDP_IDLE: u32 = 2;

/// The same, where it is for TCP as well, or cannot be shorter.
const IDLE: u32 = 10;

/// Who forwards or proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Peer {
    /// Nothing: plain forwarding
    Direct,
    /// tproxy-user, with its eBPF programs
    Ebpf,
    /// The same, with a policy that passes all
    Passing,
    /// Forwarding alone, with the routing rule that every way of steering by mark takes, and that
    /// nothing matches
    Ruled,
    /// tproxy-user, with `--workers 1`: compared where it is asked for
    OneWorker,
    /// tproxy-user, with `--handshake faithful`
    Faithful,
    /// tproxy-user behind iptables TPROXY: the same relay, steered by others
    Iptables,
    /// The same, with connection tracking that counts each flow's packets and bytes, as
    /// the eBPF programs do
    IptablesCounting,
    /// `HAProxy`, transparent, with splice, behind iptables TPROXY
    Haproxy,
    /// nginx's stream module, transparent, behind iptables TPROXY
    Nginx,
    /// redsocks, behind iptables REDIRECT, before a SOCKS5 server
    Redsocks,
    /// v2ray, behind iptables TPROXY
    V2ray,
    /// shadowsocks-libev: ss-redir, behind iptables REDIRECT and TPROXY, before its server
    Shadowsocks,
    /// An experiment, behind iptables TPROXY: read(2) and write(2)
    ExpCopy,
    /// Another: splice(2), pipes of 64 KiB
    ExpSplice64,
    /// Another: splice(2), pipes of 256 KiB
    ExpSplice256,
    /// Another: splice(2), pipes of 1 MiB
    ExpSplice1024,
    /// Another: send(2) with `MSG_ZEROCOPY`
    ExpZerocopy,
    /// Another: a socket map
    ExpSockmap,
    /// Another: receives and sends of `io_uring`
    ExpIoUring,
    /// Another: splices of `io_uring`
    ExpIoUringSplice,
    /// Another: new connections, by the fewest system calls
    ExpConnections,
    /// Another: new connections, a task for each on the runtime that tproxy has (tokio)
    ExpTasks,
    /// Another: UDP flows, with a socket for each and nothing else
    ExpFlows,
    /// Another, without iptables: a program at TC forwards, nothing is relayed
    ExpForward,
}

impl Peer {
    pub(crate) const fn key(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ebpf => "ebpf",
            Self::Passing => "passing",
            Self::Ruled => "rule",
            Self::OneWorker => "one-worker",
            Self::Faithful => "faithful",
            Self::Iptables => "iptables",
            Self::IptablesCounting => "iptables-counting",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::Redsocks => "redsocks",
            Self::V2ray => "v2ray",
            Self::Shadowsocks => "shadowsocks",
            Self::ExpCopy => "exp-copy",
            Self::ExpSplice64 => "exp-splice64",
            Self::ExpSplice256 => "exp-splice256",
            Self::ExpSplice1024 => "exp-splice1024",
            Self::ExpZerocopy => "exp-zerocopy",
            Self::ExpSockmap => "exp-sockmap",
            Self::ExpIoUring => "exp-io-uring",
            Self::ExpIoUringSplice => "exp-io-uring-splice",
            Self::ExpConnections => "exp-connections",
            Self::ExpTasks => "exp-tasks",
            Self::ExpFlows => "exp-flows",
            Self::ExpForward => "exp-forward",
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ebpf | Self::Passing => "tproxy",
            Self::Ruled => "direct, with an ip rule",
            Self::OneWorker => "tproxy, one worker",
            Self::Faithful => "tproxy, faithful",
            Self::Iptables => "iptables TPROXY, same relay",
            Self::IptablesCounting => "iptables TPROXY, flows counted",
            Self::Haproxy => "HAProxy",
            Self::Nginx => "nginx",
            Self::Redsocks => "redsocks",
            Self::V2ray => "v2ray",
            Self::Shadowsocks => "shadowsocks-libev",
            _ => self.key(),
        }
    }

    /// Whether it is one that shows a way to move bytes, and no proxy to use.
    pub(crate) const fn is_experiment(self) -> bool {
        matches!(
            self,
            Self::ExpCopy
                | Self::ExpSplice64
                | Self::ExpSplice256
                | Self::ExpSplice1024
                | Self::ExpZerocopy
                | Self::ExpSockmap
                | Self::ExpIoUring
                | Self::ExpIoUringSplice
                | Self::ExpConnections
                | Self::ExpTasks
                | Self::ExpFlows
                | Self::ExpForward
        )
    }

    pub(crate) const fn role(self) -> Role {
        match self {
            Self::Ebpf | Self::Passing => Role::Ours,
            Self::Haproxy | Self::Nginx | Self::Redsocks | Self::V2ray | Self::Shadowsocks => Role::Peer,
            _ => Role::Reference,
        }
    }

    /// Whether packets go through a program at all.
    pub(crate) const fn relays(self) -> bool {
        !matches!(self, Self::Direct | Self::Passing | Self::Ruled | Self::ExpForward)
    }

    /// Whether UDP does.
    pub(crate) const fn relays_udp(self) -> bool {
        match self {
            Self::ExpFlows => true,
            Self::Haproxy | Self::Redsocks => false,
            _ => self.relays() && !self.is_experiment(),
        }
    }

    /// Whether servers see the client's address.
    pub(crate) const fn keeps_source(self) -> bool {
        match self {
            Self::Redsocks | Self::V2ray | Self::Shadowsocks => false,
            Self::ExpConnections | Self::ExpTasks | Self::ExpFlows => true,
            _ => !self.is_experiment(),
        }
    }

    /// What it runs.
    pub(crate) const fn needs(self) -> &'static [Need] {
        match self {
            Self::Direct | Self::Ebpf | Self::Passing | Self::Ruled | Self::Faithful | Self::ExpForward => {
                &[]
            }
            Self::Haproxy => needs::BENCH_HAPROXY,
            Self::Nginx => needs::BENCH_NGINX,
            Self::Redsocks => needs::BENCH_REDSOCKS,
            Self::V2ray => needs::BENCH_V2RAY,
            Self::Shadowsocks => needs::BENCH_SHADOWSOCKS,
            _ => needs::BENCH_IPTABLES,
        }
    }

    /// Starts it in a lab's router.
    pub(crate) fn start(self, lab: &Lab, programs: &Programs) -> Result<Running> {
        let tproxy_user = &programs.tproxy_user;
        match self {
            Self::Direct => Ok(Running::default()),
            Self::Ebpf => tproxy::start(lab, tproxy_user, "--iface lan"),
            Self::Passing => {
                tproxy::start(lab, tproxy_user, "--iface lan --proto tcp --not-to 198.18.0.0/15")
            }
            Self::Ruled => rules::routing(lab).map(|()| Running::default()),
            Self::OneWorker => tproxy::start(lab, tproxy_user, "--iface lan --workers 1"),
            Self::Faithful => tproxy::start(lab, tproxy_user, "--iface lan --handshake faithful"),
            Self::Iptables => {
                rules::tproxy(lab)?;
                tproxy::start(lab, tproxy_user, "--steer none")
            }
            Self::IptablesCounting => {
                rules::tproxy(lab)?;
                rules::count_flows(lab)?;
                tproxy::start(lab, tproxy_user, "--steer none")
            }
            Self::Haproxy => haproxy::start(lab),
            Self::Nginx => nginx::start(lab),
            Self::Redsocks => redsocks::start(lab),
            Self::V2ray => v2ray::start(lab),
            Self::Shadowsocks => shadowsocks::start(lab),
            Self::ExpCopy => experiment::relay(lab, programs, "copy"),
            Self::ExpSplice64 => experiment::relay(lab, programs, "splice --pipe 64"),
            Self::ExpSplice256 => experiment::relay(lab, programs, "splice --pipe 256"),
            Self::ExpSplice1024 => experiment::relay(lab, programs, "splice --pipe 1024"),
            Self::ExpZerocopy => experiment::relay(lab, programs, "zerocopy"),
            Self::ExpSockmap => experiment::relay(lab, programs, "sockmap"),
            Self::ExpIoUring => experiment::relay(lab, programs, "io-uring"),
            Self::ExpIoUringSplice => experiment::relay(lab, programs, "io-uring-splice"),
            Self::ExpConnections => experiment::connections(lab, programs, &[]),
            Self::ExpTasks => experiment::connections(lab, programs, &["--tasks"]),
            Self::ExpFlows => experiment::flows(lab, programs),
            Self::ExpForward => experiment::forward(lab, programs),
        }
    }
}

pub(crate) use tproxy::{flags as tproxy_flags, start as tproxy_start};

/// The programs of a candidate; killed when dropped.
#[derive(Default)]
pub(crate) struct Running {
    proxy: Option<Proxy>,
    /// What connections are handed to.
    front: Option<Daemon>,
    /// What that needs behind it: a part of the work, but not of the memory, for it may as well be
    /// on another host.
    behind: Option<Daemon>,
}

impl Running {
    fn of(front: Daemon) -> Self {
        Self { front: Some(front), ..Self::default() }
    }

    /// The process groups that the router hands connections to.
    pub(crate) fn front(&self) -> Vec<u32> {
        let proxy = self.proxy.as_ref().map(|proxy| &proxy.daemon);
        proxy.into_iter().chain(&self.front).map(Daemon::pid).collect()
    }

    /// All process groups.
    pub(crate) fn all(&self) -> Vec<u32> {
        self.front().into_iter().chain(self.behind.as_ref().map(Daemon::pid)).collect()
    }

    /// The `tproxy-user`.
    pub(crate) fn proxy(&self) -> Option<&Proxy> {
        self.proxy.as_ref()
    }

    /// What they said last, for a message about a failure.
    pub(crate) fn describe(&self) -> String {
        let proxy = self.proxy.as_ref().map(|proxy| &proxy.daemon);
        let daemons = proxy.into_iter().chain(&self.front).chain(&self.behind);
        daemons.map(Daemon::describe).collect::<Vec<_>>().join("\n")
    }
}
