//! `cargo xtask bench --quick`: what does not depend on the machine.
//!
//! Nothing here is a time: system calls, allocations, segments, descriptors, bytes and instructions
//! are counted, of one worker and, but for bulk transfers, with one client that waits for each
//! answer. So the figures are those of every machine, but for what two sides that run at once leave
//! to chance.

mod allocations;
mod calls;
mod checks;
mod instructions;

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use anyhow::{Context as _, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::sockets::Protocol;
use xtask::lab::{Daemon, Family, peer};

use self::allocations::Allocations;
use self::calls::{Calls, Counter};
use self::checks::{Check, Outcome};
use super::arena::{Arena, Programs, Run};
use super::generator::{Idle, PORT};
use super::limits;
use super::measure::FIRST;
use super::peers::{Peer, tproxy_start};
use super::processes::Processes;
use crate::build::{self, Profile};

/// How long the proxy may take to close what is no longer needed, and to give memory back: it
/// does after some two seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// Connections and flows of a check.
const MANY: u64 = 1000;

/// Those whose descriptors are counted.
const SOME: u16 = 100;

/// Idle connections whose memory is measured.
const IDLE: u64 = 3000;

/// After this time it gives back what opening connections took.
const GIVEN_BACK: Duration = Duration::from_secs(4);

/// Checks of the same traffic.
struct Probe {
    name: &'static str,
    run: fn(&mut Subject) -> Result<Vec<Outcome>>,
}

/// Memory first: what other traffic leaves behind is not that of idle connections.
const PROBES: [Probe; 9] = [
    Probe { name: "idle_memory", run: idle_memory },
    Probe { name: "descriptors", run: descriptors },
    Probe { name: "tcp_connections", run: tcp_connections },
    Probe { name: "tcp_exchanges", run: tcp_exchanges },
    Probe { name: "tcp_bulk", run: tcp_bulk },
    Probe { name: "udp_flows", run: udp_flows },
    Probe { name: "udp_exchanges", run: udp_exchanges },
    Probe { name: "udp_one_way", run: udp_one_way },
    Probe { name: "packet_instructions", run: |_| instructions::count() },
];

/// What came of the checks.
#[derive(Default)]
pub(crate) struct Results {
    outcomes: Vec<Outcome>,
    /// Probes that could not be run to their end.
    broken: Vec<String>,
}

impl Results {
    /// How many were as expected.
    pub(crate) fn passed(&self) -> u64 {
        self.outcomes.iter().filter(|outcome| outcome.failure().is_none()).count() as u64
    }

    /// A line for each that was not, and for each probe that failed.
    pub(crate) fn failures(&self) -> Vec<String> {
        self.outcomes.iter().filter_map(Outcome::failure).chain(self.broken.iter().cloned()).collect()
    }

    /// All figures, and their bounds.
    pub(crate) fn table(&self) -> String {
        checks::table(&self.outcomes)
    }
}

/// Runs the probes whose names contain one of the filters; all, where there is none.
///
/// # Errors
/// The lab or the proxy cannot be started.
pub(crate) fn run(tproxy_user: &Path, filters: &[String]) -> Result<Results> {
    let chosen = |probe: &&Probe| filters.is_empty() || filters.iter().any(|part| probe.name.contains(part));
    let probes: Vec<_> = PROBES.iter().filter(chosen).collect();
    let mut results = Results::default();
    if probes.is_empty() {
        return Ok(results);
    }
    limits::raise()?;
    let tproxy_load = build::program("tproxy-load", Profile::Dev)?;
    let programs = Programs { tproxy_user: tproxy_user.to_owned(), tproxy_load, experiments: None };
    let mut subject = Subject::start(&programs)?;
    for probe in probes {
        match subject.quiet().and_then(|()| (probe.run)(&mut subject)) {
            Ok(outcomes) => results.outcomes.extend(outcomes),
            Err(error) => results.broken.push(format!("{}: {error:#}", probe.name)),
        }
    }
    Ok(results)
}

/// The proxy in its lab, with one worker, and what drives it.
struct Subject {
    arena: Arena,
    /// Sockets that it has without traffic.
    sockets: usize,
}

impl Subject {
    fn start(programs: &Programs) -> Result<Self> {
        let mut sockets = 0;
        let arena = Arena::started(Peer::Ebpf, programs, &[Protocol::Tcp, Protocol::Udp], |lab| {
            let running = tproxy_start(lab, &programs.tproxy_user, "--iface lan --workers 1")?;
            sockets = Processes::of(&running.front())?.sockets().len();
            Ok(running)
        })?;
        Ok(Self { arena, sockets })
    }

    fn proxy(&self) -> Result<&Daemon> {
        Ok(&self.arena.running.proxy().context("no proxy")?.daemon)
    }

    fn open_files(&self) -> Result<u64> {
        Ok(self.proxy()?.open_files()? as u64)
    }

    /// Waits until the sockets of all connections and flows are closed.
    fn quiet(&self) -> Result<()> {
        wait_for("the proxy to close what is over", PATIENCE, || {
            Ok(Processes::of(&self.arena.running.front())?.sockets().len() <= self.sockets)
        })
    }

    /// Runs a load, and counts the system calls from before its start to the end of all it opened.
    fn traced(&mut self, words: &str, seconds: u64) -> Result<(Run, Calls)> {
        let counter = Counter::attach(&self.arena.lab, self.proxy()?.pid())?;
        let run = self.arena.run(words, seconds, true)?;
        self.quiet()?;
        Ok((run, counter.detach()?))
    }

    /// Runs a load, and counts what the proxy allocates from before its start to the end of all it opened.
    fn allocations(&mut self, words: &str, seconds: u64) -> Result<(Run, u64)> {
        let allocations = Allocations::attach(self.proxy()?.pid())?;
        let run = self.arena.run(words, seconds, false)?;
        self.quiet()?;
        let count = allocations.count()?;
        // Each connection and flow that begins takes some.
        ensure!(count > 0, "no call of the allocator was counted");
        Ok((run, count))
    }

    /// Connections that are open and have had an exchange.
    fn idle(&self, connections: u64) -> Result<Idle> {
        Idle::open(&self.arena.lab, &self.arena.programs.tproxy_load, connections)
    }

    /// Its resident memory once it has given back what it can: where all is slow that takes longer.
    fn settled_memory(&self, is_fine: impl Fn(u64) -> bool) -> Result<u64> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            thread::sleep(GIVEN_BACK);
            let memory = self.proxy()?.memory()?;
            if is_fine(memory) || Instant::now() >= deadline {
                return Ok(memory);
            }
        }
    }

    /// TCP segments that the router has sent, without those that were sent again.
    fn segments(&self) -> Result<u64> {
        let table = self.arena.lab.router.try_enter(|| fs::read_to_string("/proc/thread-self/net/snmp"))?;
        out_segments(&table).context("no OutSegs in /proc/net/snmp")
    }
}

/// A line of names, and one of values.
fn out_segments(table: &str) -> Option<u64> {
    let mut lines = table.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next()?, lines.next()?);
    let mut pairs = names.split(' ').zip(values.split(' '));
    pairs.find(|(name, _)| *name == "OutSegs")?.1.parse().ok()
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn each(all: u64, count: u64) -> f64 {
    all as f64 / count as f64
}

/// What was completed, where nothing failed.
fn completed(run: &Run) -> Result<u64> {
    let report = &run.report;
    ensure!(
        report.completed > 0 && report.failed == 0,
        "{} completed, {} failed",
        report.completed,
        report.failed
    );
    Ok(report.completed)
}

fn idle_memory(subject: &mut Subject) -> Result<Vec<Outcome>> {
    let connections = limits::connections()?.saturating_sub(FIRST).min(IDLE);
    let _first = subject.idle(FIRST)?;
    thread::sleep(GIVEN_BACK);
    let before = subject.proxy()?.memory()?;
    let idle = subject.idle(connections)?;
    let each_after = |after: u64| each(after, connections) - each(before, connections);
    let opened = subject.settled_memory(|after| checks::IDLE_MEMORY.allows(each_after(after)))?;
    drop(idle);
    let ended = subject.settled_memory(|after| checks::ENDED_MEMORY.allows(each_after(after)))?;
    let outcome = |check: &'static Check, after: u64| {
        check.of(each_after(after), format!("{connections} connections: from {before} to {after} bytes"))
    };
    Ok(vec![outcome(&checks::IDLE_MEMORY, opened), outcome(&checks::ENDED_MEMORY, ended)])
}

fn descriptors(subject: &mut Subject) -> Result<Vec<Outcome>> {
    let before = subject.open_files()?;
    let idle = subject.idle(SOME.into())?;
    let tcp = subject.open_files()? - before;
    drop(idle);
    subject.quiet()?;
    let clients = subject.arena.lab.client.try_enter(|| {
        (0..SOME)
            .map(|_| UdpSocket::bind(SocketAddr::new(Family::V4.client(), 0)))
            .collect::<io::Result<Vec<_>>>()
    })?;
    let before = subject.open_files()?;
    ask(&clients, 1)?;
    let one = subject.open_files()?;
    for server in 2..=5 {
        ask(&clients, server)?;
    }
    let more = subject.open_files()?;
    Ok(vec![
        checks::TCP_FILES.seen(each(tcp, SOME.into())),
        checks::UDP_FILES.seen(each(one - before, SOME.into())),
        checks::UDP_MORE_SERVERS.seen(each(more.saturating_sub(one), SOME.into())),
    ])
}

/// Each client asks a server, and has its answer.
fn ask(clients: &[UdpSocket], server: u16) -> Result<()> {
    let server = SocketAddr::new(Family::V4.anywhere(server), PORT);
    for client in clients {
        client.set_read_timeout(Some(Duration::from_secs(5)))?;
        client.send_to(b"?", server)?;
        let (_, from) = peer::receive(client, &mut [0; 64]).context("no answer")?;
        ensure!(from == server, "{from} has answered in place of {server}");
    }
    Ok(())
}

/// One after the other: each event wakes the proxy by itself, the most that it can cost.
fn tcp_connections(subject: &mut Subject) -> Result<Vec<Outcome>> {
    let words = format!("connect --concurrency 1 --limit {MANY}");
    let (run, calls) = subject.traced(&words, 60)?;
    let connections = completed(&run)?;
    // Not traced: who is slow acknowledges what would else go with an answer.
    let before = subject.segments()?;
    let run = subject.arena.run(&words, 60, false)?;
    subject.quiet()?;
    let segments = subject.segments()? - before;
    let mut outcomes = calls.outcomes(&checks::TCP_CALLS, &checks::TCP_WAITS, connections);
    outcomes.push(checks::TCP_SEGMENTS.seen(each(segments, completed(&run)?)));
    let (run, allocations) = subject.allocations(&words, 60)?;
    outcomes.push(checks::TCP_ALLOCATIONS.seen(each(allocations, completed(&run)?)));
    Ok(outcomes)
}

fn tcp_exchanges(subject: &mut Subject) -> Result<Vec<Outcome>> {
    let (run, calls) = subject.traced("exchange --connections 1", 1)?;
    let mut outcomes = calls.outcomes(&checks::EXCHANGE_CALLS, &checks::EXCHANGE_WAITS, completed(&run)?);
    let (run, allocations) = subject.allocations("exchange --connections 1", 1)?;
    outcomes.push(checks::EXCHANGE_ALLOCATIONS.seen(each(allocations, completed(&run)?)));
    Ok(outcomes)
}

/// Calls that take bytes out of the kernel, or into it.
const COPYING: [&str; 8] = ["read", "readv", "recvfrom", "recvmsg", "write", "writev", "sendto", "sendmsg"];

fn tcp_bulk(subject: &mut Subject) -> Result<Vec<Outcome>> {
    let before = subject.open_files()?;
    let (run, up) = subject.traced("bulk --streams 1 --direction up", 1)?;
    let up_bytes = run.received_bytes;
    let (run, down) = subject.traced("bulk --streams 1 --direction down", 1)?;
    let copies = up.of(&COPYING).max(down.of(&COPYING));
    // Up: those that the client ends while bytes are on the way keep no pipe.
    subject.arena.run("bulk --streams 16 --direction up", 1, false)?;
    subject.quiet()?;
    let left = subject.open_files()?.saturating_sub(before);
    Ok(vec![
        checks::BULK_UP.of(each(up_bytes, up.all()), up.each(1)),
        checks::BULK_DOWN.of(each(run.report.bytes, down.all()), down.each(1)),
        checks::BULK_COPIES.of(each(copies, 1), format!("up: {}; down: {}", up.each(1), down.each(1))),
        checks::BULK_PIPES.seen(each(left, 1)),
    ])
}

fn udp_flows(subject: &mut Subject) -> Result<Vec<Outcome>> {
    let (run, calls) = subject.traced("udp-new --in-flight 1", 3)?;
    let mut outcomes = calls.outcomes(&checks::UDP_FLOW_CALLS, &checks::UDP_FLOW_WAITS, completed(&run)?);
    let (run, allocations) = subject.allocations("udp-new --in-flight 1", 3)?;
    outcomes.push(checks::UDP_FLOW_ALLOCATIONS.seen(each(allocations, completed(&run)?)));
    Ok(outcomes)
}

fn udp_exchanges(subject: &mut Subject) -> Result<Vec<Outcome>> {
    let (run, calls) = subject.traced("udp-exchange --flows 1", 1)?;
    let mut outcomes =
        calls.outcomes(&checks::UDP_EXCHANGE_CALLS, &checks::UDP_EXCHANGE_WAITS, completed(&run)?);
    let (run, allocations) = subject.allocations("udp-exchange --flows 1", 1)?;
    outcomes.push(checks::UDP_EXCHANGE_ALLOCATIONS.seen(each(allocations, completed(&run)?)));
    Ok(outcomes)
}

fn udp_one_way(subject: &mut Subject) -> Result<Vec<Outcome>> {
    let (run, calls) = subject.traced("udp-send --flows 1 --size 64", 1)?;
    let datagrams = run.received_datagrams;
    ensure!(datagrams > 0, "nothing arrived");
    Ok(vec![checks::UDP_SEND_CALLS.of(each(calls.all(), datagrams), calls.each(datagrams))])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_read() {
        let table = "Icmp: InMsgs\nIcmp: 1\nTcp: RtoAlgorithm InSegs OutSegs RetransSegs\nTcp: 1 20 30 4\n";
        assert_eq!(out_segments(table), Some(30));
        assert_eq!(out_segments("Tcp: InSegs\nTcp: 1\n"), None);
    }
}
