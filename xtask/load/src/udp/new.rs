//! `tproxy-load udp-new`.

use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Read as _, Write as _};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::epoll::EpollFlags;
use serde::Serialize;
use socket2::Socket;

use crate::drive::{Case, Done, Exchanges, drive};
use crate::poller::Poller;
use crate::targets::Targets;
use crate::{Common, ECHO, MESSAGE, sockets};

/// New flows: every datagram from a new socket and port, which is closed after its answer
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Flows at one time
    #[arg(long, value_name = "N", value_parser = crate::at_least_1)]
    in_flight: usize,
}

#[derive(Serialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    done: Done,
    lost: u64,
}

/// What has no answer by then is lost.
const PATIENCE: Duration = Duration::from_millis(200);

/// The ports that the kernel itself would take, of both families.
const PORTS: &str = "/proc/sys/net/ipv4/ip_local_port_range";

struct New {
    tuples: Tuples,
    targets: Targets,
    begun: u64,
    poller: Poller,
    slots: Vec<Option<Flow>>,
    exchanges: Exchanges,
    lost: u64,
}

struct Flow {
    socket: Socket,
    sent: Instant,
}

/// Runs the case.
pub(crate) fn run(args: &Args) -> Result<Report> {
    let text = fs::read_to_string(PORTS).with_context(|| format!("cannot read {PORTS}"))?;
    let ports = ports(&text).with_context(|| format!("{PORTS}: expected two ports, not {text:?}"))?;
    let mut new = New {
        tuples: Tuples::new(&ports, args.common.targets.count()),
        targets: args.common.targets,
        // Not where the last run began: a proxy may still know its flows.
        begun: RandomState::new().hash_one(0) >> 16,
        poller: Poller::new()?,
        slots: std::iter::repeat_with(|| None).take(args.in_flight).collect(),
        exchanges: Exchanges::default(),
        lost: 0,
    };
    let done = drive(&mut new, args.common.seconds)?;
    Ok(Report { done, lost: new.lost })
}

fn ports(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.trim().split_once(char::is_whitespace)?;
    Some(first.parse().ok()?..=last.trim().parse().ok()?)
}

impl New {
    fn begin(&mut self, key: usize, now: Instant) -> Result<()> {
        let (port, target) = self.tuples.at(self.begun);
        self.begun += 1;
        let target = self.targets.at(target, ECHO);
        let socket = match sockets::udp(port, target) {
            Ok(socket) => socket,
            // The port is another socket's; the next tick tries the next one.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("a socket from {port} to {target}")),
        };
        self.poller.add(&socket, key, EpollFlags::EPOLLIN | EpollFlags::EPOLLET)?;
        match (&socket).write(&[b'q'; MESSAGE]) {
            // What was not sent is like what was lost.
            Err(error) if !sockets::passes(&error) => return Err(error).context("cannot send a datagram"),
            _ => {}
        }
        self.slots[key] = Some(Flow { socket, sent: now });
        self.exchanges.begin();
        Ok(())
    }
}

impl Case for New {
    fn poller(&self) -> &Poller {
        &self.poller
    }

    fn exchanges(&mut self) -> &mut Exchanges {
        &mut self.exchanges
    }

    fn advance(&mut self, key: usize) -> Result<()> {
        let Some(flow) = &self.slots[key] else { return Ok(()) };
        match (&flow.socket).read(&mut [0; MESSAGE]) {
            Ok(_) => {
                self.slots[key] = None;
                self.exchanges.complete();
                if self.exchanges.are_stopped() { Ok(()) } else { self.begin(key, Instant::now()) }
            }
            Err(error) if sockets::passes(&error) => Ok(()),
            Err(error) => Err(error).context("cannot receive a datagram"),
        }
    }

    fn tick(&mut self, now: Instant) -> Result<()> {
        for key in 0..self.slots.len() {
            if let Some(flow) = &self.slots[key]
                && now.saturating_duration_since(flow.sent) >= PATIENCE
            {
                self.slots[key] = None;
                self.exchanges.fail();
                self.lost += 1;
            }
            if self.slots[key].is_none() && !self.exchanges.are_stopped() {
                self.begin(key, now)?;
            }
        }
        Ok(())
    }
}

/// Pairs of source port and target: a pair comes again only after all others have. The kernel,
/// which picks at random, would take some a second time soon.
struct Tuples {
    first: u16,
    ports: u64,
}

impl Tuples {
    fn new(ports: &RangeInclusive<u16>, targets: u32) -> Self {
        let (first, last) = (*ports.start(), *ports.end());
        let mut ports = u64::from(last.saturating_sub(first)) + 1;
        // A port meets a target `ports + 1` further each time, and so every one of them.
        while ports > 1 && greatest_common_divisor(ports + 1, targets.into()) != 1 {
            ports -= 1;
        }
        Self { first, ports }
    }

    /// The `n`th: a port, and the number of a target.
    fn at(&self, n: u64) -> (u16, u64) {
        #[expect(clippy::cast_possible_truncation, reason = "there are no more ports than that")]
        let port = self.first + (n % self.ports) as u16;
        (port, n + n / self.ports)
    }
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_pair_comes_again_after_all_others() {
        for (last, targets) in [(1_007, 8), (1_008, 9), (1_030, 64), (1_000, 1), (65_535, 4)] {
            let tuples = Tuples::new(&(1_000..=last), targets);
            let all = tuples.ports * u64::from(targets);
            let pairs: BTreeSet<_> = (77..77 + all)
                .map(|n| tuples.at(n))
                .map(|(port, target)| (port, target % u64::from(targets)))
                .collect();
            assert_eq!(pairs.len() as u64, all, "{targets} targets");
            assert!(pairs.iter().all(|(port, _)| (1_000..=last).contains(port)));
            assert!(tuples.ports + 8 > u64::from(last - 1_000), "most ports are used");
        }
    }

    #[test]
    fn the_range_of_ports_is_read() {
        assert_eq!(ports("32768\t60999\n"), Some(32768..=60999));
        assert_eq!(ports("32768\n"), None);
    }
}
