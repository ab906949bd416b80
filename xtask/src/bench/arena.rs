//! One candidate in its lab, ready to be measured again and again.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use xtask::lab::sockets::Protocol;
use xtask::lab::{Family, Lab};

use super::generator::{self, Counts, Report, Server};
use super::peers::{Peer, Running};
use super::processes::{Processes, Processors};
use super::proof;

/// The programs under test, and what drives them.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) tproxy_user: PathBuf,
    pub(crate) tproxy_load: PathBuf,
    /// Where an experiment takes part.
    pub(crate) experiments: Option<PathBuf>,
}

/// A lab with a candidate in its router, proven to do its work, and a server.
pub(crate) struct Arena {
    pub(crate) peer: Peer,
    pub(crate) programs: Programs,
    pub(crate) running: Running,
    pub(crate) server: Server,
    // Dropped last.
    pub(crate) lab: Lab,
}

/// What a load took.
pub(crate) struct Run {
    pub(crate) report: Report,
    /// Processor time of the candidate, where it has any.
    pub(crate) cpu_seconds: Option<f64>,
    /// What share of their time all processors of the machine were busy meanwhile.
    pub(crate) busy: f64,
    /// Bytes and datagrams that reached the server by the end.
    pub(crate) received_bytes: u64,
    pub(crate) received_datagrams: u64,
}

impl Arena {
    /// Starts a candidate, and proves it.
    pub(crate) fn new(peer: Peer, programs: &Programs, protocols: &[Protocol]) -> Result<Self> {
        Self::started(peer, programs, protocols, |lab| peer.start(lab, programs))
    }

    /// The same, of one that is started in its own way.
    pub(crate) fn started(
        peer: Peer,
        programs: &Programs,
        protocols: &[Protocol],
        start: impl FnOnce(&Lab) -> Result<Running>,
    ) -> Result<Self> {
        let lab = lab()?;
        let running = start(&lab).with_context(|| format!("cannot start {}", peer.name()))?;
        for protocol in protocols {
            proof::prove(peer, &lab, &running, *protocol)?;
        }
        let server = Server::start(&lab, &programs.tproxy_load, Family::V4.client())?;
        Ok(Self { peer, programs: programs.clone(), running, server, lab })
    }

    /// Runs a load; `late`: what is still on its way at the end counts as well.
    pub(crate) fn run(&mut self, words: &str, seconds: u64, late: bool) -> Result<Run> {
        let before = self.server.counts()?;
        let (cpu_before, all_before) = (self.cpu_seconds()?, Processors::now()?);
        let report = generator::run(&self.lab, &self.programs.tproxy_load, words, seconds)?;
        let busy = Processors::now()?.busy_since(all_before);
        let cpu_seconds = self.cpu_seconds()?.zip(cpu_before).map(|(after, before)| after - before);
        let mut after = self.server.counts()?;
        if late {
            after = self.settled(after)?;
        }
        if self.peer.keeps_source() {
            ensure!(after.foreign == 0, "the server saw {} senders that are not the client", after.foreign);
        }
        Ok(Run {
            report,
            cpu_seconds,
            busy,
            received_bytes: after.tcp_received_bytes - before.tcp_received_bytes,
            received_datagrams: after.udp_received - before.udp_received,
        })
    }

    /// The counts once no more datagrams come.
    fn settled(&mut self, mut counts: Counts) -> Result<Counts> {
        loop {
            thread::sleep(Duration::from_millis(50));
            let now = self.server.counts()?;
            if now.udp_received == counts.udp_received {
                return Ok(now);
            }
            counts = now;
        }
    }

    fn cpu_seconds(&self) -> Result<Option<f64>> {
        let groups = self.running.all();
        if groups.is_empty() {
            return Ok(None);
        }
        Ok(Some(Processes::of(&groups)?.cpu_seconds()))
    }

    /// Every packet on the way is of the size of a wire's.
    pub(crate) fn switch_offloads_off(&self) -> Result<()> {
        let (client, router, server) = (&self.lab.client, &self.lab.router, &self.lab.server);
        for (namespace, device) in [(client, "eth0"), (router, "lan"), (router, "wan"), (server, "eth0")] {
            namespace.sh(&format!("ethtool -K {device} tso off gso off gro off"))?;
        }
        Ok(())
    }
}

/// A lab with room for as many connections as are made.
pub(crate) fn lab() -> Result<Lab> {
    let lab = Lab::new()?;
    for namespace in [&lab.client, &lab.router, &lab.server] {
        namespace.set_sysctls(&[
            ("net/ipv4/ip_local_port_range", "10000 65535"),
            ("net/core/somaxconn", "16384"),
            ("net/ipv4/tcp_max_syn_backlog", "16384"),
        ])?;
    }
    Ok(lab)
}
