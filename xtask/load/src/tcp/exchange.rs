//! `tproxy-load exchange`.

use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::epoll::EpollFlags;
use serde::Serialize;
use socket2::Socket;

use super::idle;
use crate::drive::{Case, Done, Exchanges, GRACE, drive};
use crate::poller::Poller;
use crate::report::{Failures, Latency, Percentiles};
use crate::{Common, sockets};

/// Request and response on open connections, one under way on each
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Connections
    #[arg(long, value_name = "N", value_parser = crate::at_least_1)]
    connections: usize,
}

#[derive(Serialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    done: Done,
    failed: u64,
    response_us: Percentiles,
}

/// How long the connections may take to open.
const OPENING: Duration = Duration::from_mins(1);

struct Exchange {
    poller: Poller,
    connections: Vec<Connection>,
    exchanges: Exchanges,
    response: Latency,
    failures: Failures,
}

struct Connection {
    /// None once it has failed.
    socket: Option<Socket>,
    asked: Instant,
    received: usize,
}

/// Runs the case.
pub(crate) fn run(args: &Args) -> Result<Report> {
    let sockets = idle::open(args.common.targets, args.connections, OPENING)?;
    let unopened = args.connections - sockets.len();
    let mut exchange = Exchange::new(sockets)?;
    let done = drive(&mut exchange, args.common.seconds)?;
    for _ in 0..exchange.exchanges.under_way() {
        exchange.failures.add(format_args!("no response {} s after the end", GRACE.as_secs()));
    }
    Ok(Report {
        done,
        failed: unopened as u64 + exchange.failures.tell(),
        response_us: exchange.response.percentiles(),
    })
}

impl Exchange {
    fn new(sockets: Vec<Socket>) -> Result<Self> {
        let poller = Poller::new()?;
        let mut exchange = Self {
            poller,
            connections: Vec::with_capacity(sockets.len()),
            exchanges: Exchanges::default(),
            response: Latency::new()?,
            failures: Failures::default(),
        };
        for (key, socket) in sockets.into_iter().enumerate() {
            exchange.poller.add(&socket, key, EpollFlags::EPOLLIN | EpollFlags::EPOLLET)?;
            exchange.connections.push(Connection {
                socket: Some(socket),
                asked: Instant::now(),
                received: 0,
            });
            exchange.ask(key, Instant::now());
        }
        Ok(exchange)
    }

    fn ask(&mut self, key: usize, now: Instant) {
        let connection = &mut self.connections[key];
        let Some(socket) = &connection.socket else { return };
        connection.asked = now;
        connection.received = 0;
        match sockets::ask(socket) {
            Ok(()) => self.exchanges.begin(),
            Err(error) => {
                connection.socket = None;
                self.failures.add(error);
            }
        }
    }
}

impl Case for Exchange {
    fn poller(&self) -> &Poller {
        &self.poller
    }

    fn exchanges(&mut self) -> &mut Exchanges {
        &mut self.exchanges
    }

    fn advance(&mut self, key: usize) -> Result<()> {
        let connection = &mut self.connections[key];
        let Some(socket) = &connection.socket else { return Ok(()) };
        match sockets::answer(socket, &mut connection.received) {
            Ok(false) => {}
            Ok(true) => {
                let now = Instant::now();
                self.response.record(now - connection.asked);
                self.exchanges.complete();
                if !self.exchanges.are_stopped() {
                    self.ask(key, now);
                }
            }
            Err(error) => {
                connection.socket = None;
                self.exchanges.fail();
                self.failures.add(error);
            }
        }
        Ok(())
    }

    fn tick(&mut self, _now: Instant) -> Result<()> {
        Ok(())
    }

    fn is_done(&mut self) -> bool {
        self.exchanges.under_way() == 0
    }
}
