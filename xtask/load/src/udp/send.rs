//! `tproxy-load udp-send`.

use std::io::{self, Write as _};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;
use socket2::Socket;

use crate::mmsg::Batch;
use crate::pace::Pace;
use crate::report::{per_second, seconds};
use crate::{Common, SINK, sockets};

/// Datagrams one way, without a limit or at an even rate; the server counts what arrives
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Connected sockets; each sends a batch, one after the other
    #[arg(long, value_name = "N", value_parser = crate::at_least_1)]
    flows: usize,
    /// Bytes of a datagram
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(1..=65_507))]
    size: u16,
    /// Datagrams a second
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Lets the kernel cut each batch into datagrams (`UDP_SEGMENT`)
    #[arg(long)]
    gso: bool,
}

#[derive(Serialize)]
pub(crate) struct Report {
    sent: u64,
    seconds: f64,
    per_second: f64,
}

/// Datagrams of a batch.
const BATCH: usize = 32;

/// Bytes of a batch that the kernel cuts.
const SEGMENTED: usize = 65_507;

/// At a rate, datagrams that are due within this time go together: a shorter sleep costs
/// more than what is sent after it.
const TOGETHER: Duration = Duration::from_micros(100);

/// How a batch is sent.
enum Sender {
    Plain(Batch),
    Segmented { datagrams: Vec<u8>, size: usize },
}

/// Runs the case.
pub(crate) fn run(args: &Args) -> Result<Report> {
    let size = usize::from(args.size);
    let sockets = (0..args.flows).map(|flow| open(args, flow)).collect::<Result<Vec<_>>>()?;
    let (mut sender, batch) = if args.gso {
        let batch = BATCH.min(SEGMENTED / size);
        (Sender::Segmented { datagrams: vec![0; batch * size], size }, batch)
    } else {
        (Sender::Plain(Batch::new(BATCH, size)), BATCH)
    };
    let pace = args.rate.map(Pace::new);
    let mut sent = 0;
    let mut flows = sockets.iter().cycle();
    let started = Instant::now();
    let elapsed = loop {
        let elapsed = started.elapsed();
        if elapsed >= args.common.seconds {
            break elapsed;
        }
        let due = pace.map_or(u64::MAX, |pace| pace.due(elapsed).saturating_sub(sent));
        let count = usize::try_from(due).unwrap_or(usize::MAX).min(batch);
        if let (0, Some(pace)) = (count, pace) {
            let next = pace.time_of(sent).min(args.common.seconds);
            thread::sleep(next.saturating_sub(elapsed).max(TOGETHER));
            continue;
        }
        let Some(flow) = flows.next() else { break elapsed };
        match sender.send(flow, count) {
            Ok(count) => sent += count as u64,
            Err(error) if sockets::passes(&error) => {}
            Err(error) => return Err(error).context("cannot send datagrams"),
        }
    };
    Ok(Report { sent, seconds: seconds(elapsed), per_second: per_second(sent, elapsed) })
}

fn open(args: &Args, flow: usize) -> Result<Socket> {
    let target = args.common.targets.at(flow as u64, SINK);
    let socket = sockets::udp(0, target).with_context(|| format!("a socket to {target}"))?;
    // Waiting for room costs nothing but the time that it takes.
    socket.set_nonblocking(false)?;
    if args.gso {
        setsockopt(&socket, sockopt::UdpGsoSegment, &args.size.into()).context("UDP_SEGMENT")?;
    }
    Ok(socket)
}

impl Sender {
    /// Sends so many datagrams; tells how many the kernel took.
    fn send(&mut self, mut socket: &Socket, count: usize) -> io::Result<usize> {
        match self {
            Self::Plain(batch) => batch.send(socket, 0..count),
            Self::Segmented { datagrams, size } => Ok(socket.write(&datagrams[..count * *size])? / *size),
        }
    }
}
