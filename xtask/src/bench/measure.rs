//! One measurement of one candidate.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use xtask::lab::Family;
use xtask::lab::daemon::Daemon;
use xtask::lab::proxy::Launch;

use super::arena::{Arena, Programs, Run, lab};
use super::generator::{Idle, PORT, Server, Times};
use super::peers::tproxy_flags;
use super::processes::{Processes, kernel_memory};

/// What is done to a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    Bulk {
        streams: u32,
        up: bool,
        plain: bool,
    },
    Connect {
        concurrency: u32,
    },
    Exchange {
        connections: u32,
    },
    UdpExchange {
        flows: u32,
    },
    UdpSend {
        flows: u32,
        size: u32,
    },
    /// At half of what reaches the server without a proxy.
    UdpHalf {
        flows: u32,
        size: u32,
    },
    UdpNew {
        in_flight: u32,
    },
    Idle {
        connections: u64,
    },
    Start,
}

/// More failures than one in so many, and a rate says nothing.
const TOLERATED: u64 = 100;

impl Load {
    /// Puts it on a candidate that goes on from round to round. Values are those of the measure's
    /// metrics; `None`: this candidate has no such thing. `half` is the rate for [`Load::UdpHalf`].
    pub(crate) fn measure(self, arena: &mut Arena, seconds: u64, half: u64) -> Result<Vec<Option<f64>>> {
        match self {
            Self::Bulk { streams, up, plain } => {
                if plain {
                    arena.switch_offloads_off()?;
                }
                let direction = if up { "up" } else { "down" };
                let words = format!("bulk --streams {streams} --direction {direction}");
                let run = arena.run(&words, seconds, false)?;
                let bytes = if up { run.received_bytes } else { run.report.bytes };
                ensure!(bytes > 0, "nothing arrived");
                let gigabytes = float(bytes) / 1e9;
                let rate = gigabytes * 8.0 / run.report.seconds;
                let cpu = run.cpu_seconds.map(|seconds| seconds / gigabytes);
                Ok(vec![Some(rate), cpu, Some(run.busy * 100.0)])
            }
            Self::Connect { concurrency } => {
                let run = arena.run(&format!("connect --concurrency {concurrency}"), seconds, false)?;
                let rate = rate(&run)?;
                let connected = run.report.connected_us.context("no times until connected")?;
                let Times { p50, p99 } = run.report.first_byte_us.context("no times of first bytes")?;
                if concurrency == 1 {
                    return Ok(vec![Some(p50), Some(p99), Some(connected.p50)]);
                }
                let cpu = run.cpu_seconds.map(|seconds| seconds * 1000.0 / float(run.report.completed));
                Ok(vec![Some(rate), Some(p50), Some(p99), cpu])
            }
            Self::Exchange { connections } => {
                let run = arena.run(&format!("exchange --connections {connections}"), seconds, false)?;
                let rate = rate(&run)?;
                let Times { p50, p99 } = run.report.response_us.context("no times of responses")?;
                let times = [Some(p50), Some(p99)];
                Ok(if connections == 1 { times.into() } else { [&[Some(rate)], &times[..]].concat() })
            }
            Self::UdpExchange { flows } => {
                let run = arena.run(&format!("udp-exchange --flows {flows}"), seconds, false)?;
                let rate = rate(&run)?;
                let Times { p50, p99 } = run.report.response_us.context("no times of responses")?;
                Ok(vec![Some(rate), Some(p50), Some(p99)])
            }
            Self::UdpSend { flows, size } => {
                let run = arena.run(&format!("udp-send --flows {flows} --size {size}"), seconds, false)?;
                ensure!(run.received_datagrams > 0, "nothing arrived");
                Ok(vec![Some(float(run.received_datagrams) / run.report.seconds)])
            }
            Self::UdpHalf { flows, size } => {
                let words = format!("udp-send --flows {flows} --size {size} --rate {half}");
                let run = arena.run(&words, seconds, true)?;
                let lost = 1.0 - float(run.received_datagrams) / float(run.report.sent);
                Ok(vec![Some(lost * 100.0)])
            }
            Self::UdpNew { in_flight } => {
                let run = arena.run(&format!("udp-new --in-flight {in_flight}"), seconds, false)?;
                Ok(vec![Some(rate(&run)?)])
            }
            Self::Idle { .. } | Self::Start => unreachable!("{self:?} is of what was just started"),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}

/// What was completed in a second.
fn rate(run: &Run) -> Result<f64> {
    let report = &run.report;
    ensure!(
        report.completed > 0 && report.failed <= report.completed / TOLERATED,
        "{} completed, {} failed",
        report.completed,
        report.failed
    );
    Ok(float(report.completed) / report.seconds)
}

/// How long nothing has been said on connections that count as idle. What opening them took is
/// given back by then.
const IDLE: Duration = Duration::from_secs(5);

/// How long they may take to end.
const ENDING: Duration = Duration::from_secs(2);

/// Idle connections before those that are counted. They have a proxy give back what its start has
/// left: megabytes, which else hide what connections take.
pub(crate) const FIRST: u64 = 1000;

/// Bytes for each connection that is open and idle besides the first, of a candidate that was just
/// started: of its own, and of the kernel's, those of client and server among them.
pub(crate) fn memory(arena: &Arena, connections: u64) -> Result<Vec<Option<f64>>> {
    ensure!(connections > FIRST, "room for {connections} connections, expected more than {FIRST}");
    let groups = arena.running.front();
    let now = || -> Result<[Option<u64>; 2]> {
        let own = if groups.is_empty() { None } else { Some(Processes::of(&groups)?.memory()?) };
        Ok([own, kernel_memory()])
    };
    let open = |connections| Idle::open(&arena.lab, &arena.programs.tproxy_load, connections);
    let first = open(FIRST)?;
    thread::sleep(IDLE);
    let before = now()?;
    let others = open(connections - FIRST)?;
    thread::sleep(IDLE);
    let after = now()?;
    drop((first, others));
    // What has no time to end with its namespaces there would end in the time of the next candidate.
    thread::sleep(ENDING);
    // It may be less: what the start has left was not all given back before.
    let grown = |(before, after)| Some((float(after?) - float(before?)) / float(connections - FIRST));
    Ok(before.into_iter().zip(after).map(grown).collect())
}

/// Milliseconds from the start of `tproxy-user` until it says that it is ready, and until a
/// client has an answer through it.
pub(crate) fn start(programs: &Programs) -> Result<Vec<Option<f64>>> {
    let lab = lab()?;
    let _server = Server::start(&lab, &programs.tproxy_load, Family::V4.client())?;
    let launch = Launch::new(&lab, &tproxy_flags("--iface lan")?).binary(&programs.tproxy_user);
    let command = launch.command()?;
    let begun = Instant::now();
    let mut daemon = Daemon::start(&lab, "tproxy-user", &command)?;
    while !daemon.log().contains("ready: ") {
        ensure!(daemon.ended()?.is_none(), "it ended, {}", daemon.describe());
        ensure!(begun.elapsed() < Duration::from_secs(10), "it is not ready, {}", daemon.describe());
        thread::sleep(Duration::from_millis(1));
    }
    let ready = begun.elapsed();
    let client = lab.client.try_enter(|| {
        let mut client = TcpStream::connect(SocketAddr::new(Family::V4.anywhere(1), PORT))?;
        client.set_read_timeout(Some(Duration::from_secs(5)))?;
        client.write_all(&[0; 64])?;
        client.read_exact(&mut [0; 64])?;
        Ok(client)
    })?;
    let answered = begun.elapsed();
    super::proof::accepted(&lab, &[daemon.pid()], client.local_addr()?)?;
    daemon.stop(Signal::SIGTERM, Duration::from_secs(10))?;
    Ok([ready, answered].map(|time| Some(time.as_secs_f64() * 1e3)).into())
}
