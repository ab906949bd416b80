//! `tproxy-load udp-exchange`.

use std::io::{self, Read as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::epoll::EpollFlags;
use serde::Serialize;
use socket2::Socket;

use crate::drive::{Case, Done, Exchanges, drive};
use crate::poller::Poller;
use crate::report::{Latency, Percentiles};
use crate::{Common, ECHO, sockets};

/// Datagrams that come back, one under way on each of many flows
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Connected sockets
    #[arg(long, value_name = "N", value_parser = crate::at_least_1)]
    flows: usize,
    /// Bytes of a datagram
    #[arg(long, value_name = "BYTES", default_value_t = 64, value_parser = clap::value_parser!(u16).range(8..=65_507))]
    size: u16,
}

#[derive(Serialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    done: Done,
    lost: u64,
    response_us: Percentiles,
}

/// A datagram that has not come back by then is sent again.
const PATIENCE: Duration = Duration::from_millis(200);

/// Bytes that tell datagrams apart.
const NUMBER: usize = size_of::<u64>();

struct Exchange {
    poller: Poller,
    flows: Vec<Flow>,
    /// Of the last datagram.
    number: u64,
    datagram: Vec<u8>,
    exchanges: Exchanges,
    lost: u64,
    response: Latency,
}

struct Flow {
    socket: Socket,
    /// Of the datagram that is under way.
    number: Option<u64>,
    /// When it was sent first.
    began: Instant,
    /// When it was sent last.
    sent: Instant,
}

/// Runs the case.
pub(crate) fn run(args: &Args) -> Result<Report> {
    let mut exchange = Exchange::new(args)?;
    let done = drive(&mut exchange, args.common.seconds)?;
    Ok(Report { done, lost: exchange.lost, response_us: exchange.response.percentiles() })
}

impl Exchange {
    fn new(args: &Args) -> Result<Self> {
        let poller = Poller::new()?;
        let now = Instant::now();
        let mut flows = Vec::with_capacity(args.flows);
        for key in 0..args.flows {
            let target = args.common.targets.at(key as u64, ECHO);
            let socket = sockets::udp(0, target).with_context(|| format!("a socket to {target}"))?;
            poller.add(&socket, key, EpollFlags::EPOLLIN | EpollFlags::EPOLLET)?;
            flows.push(Flow { socket, number: None, began: now, sent: now });
        }
        Ok(Self {
            poller,
            flows,
            number: 0,
            datagram: vec![0; args.size.into()],
            exchanges: Exchanges::default(),
            lost: 0,
            response: Latency::new()?,
        })
    }

    fn begin(&mut self, key: usize, now: Instant) -> Result<()> {
        self.number += 1;
        self.exchanges.begin();
        let flow = &mut self.flows[key];
        flow.number = Some(self.number);
        flow.began = now;
        self.send(key, self.number, now)
    }

    fn send(&mut self, key: usize, number: u64, now: Instant) -> Result<()> {
        let flow = &mut self.flows[key];
        flow.sent = now;
        self.datagram[..NUMBER].copy_from_slice(&number.to_ne_bytes());
        match (&flow.socket).write(&self.datagram) {
            // What was not sent is like what was lost.
            Err(error) if !sockets::passes(&error) => Err(error).context("cannot send a datagram"),
            _ => Ok(()),
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
        let mut number = [0; NUMBER];
        loop {
            let flow = &mut self.flows[key];
            match (&flow.socket).read(&mut number) {
                Ok(NUMBER) if flow.number == Some(u64::from_ne_bytes(number)) => break,
                // A datagram that was sent again, and has come back twice.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if sockets::passes(&error) => {}
                Err(error) => return Err(error).context("cannot receive a datagram"),
            }
        }
        let now = Instant::now();
        let flow = &mut self.flows[key];
        flow.number = None;
        self.response.record(now - flow.began);
        self.exchanges.complete();
        if self.exchanges.are_stopped() { Ok(()) } else { self.begin(key, now) }
    }

    /// Also begins each flow.
    fn tick(&mut self, now: Instant) -> Result<()> {
        for key in 0..self.flows.len() {
            let flow = &self.flows[key];
            match flow.number {
                Some(number) if now.saturating_duration_since(flow.sent) >= PATIENCE => {
                    self.lost += 1;
                    self.send(key, number, now)?;
                }
                None if !self.exchanges.are_stopped() => self.begin(key, now)?,
                _ => {}
            }
        }
        Ok(())
    }
}
