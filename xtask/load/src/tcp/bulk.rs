//! `tproxy-load bulk`.

use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, recv};
use serde::Serialize;

use crate::poller::Poller;
use crate::report::{gigabits_per_second, seconds};
use crate::{CHUNK, Common, SINK, SOURCE};

/// As many bytes as possible, on open connections
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Connections
    #[arg(long, value_name = "N", value_parser = crate::at_least_1)]
    streams: usize,
    /// From here to the server, or from there
    #[arg(long)]
    direction: Direction,
}

#[derive(Clone, Copy, ValueEnum)]
enum Direction {
    Up,
    Down,
}

#[derive(Serialize)]
pub(crate) struct Report {
    bytes: u64,
    seconds: f64,
    gbit_per_second: f64,
}

/// How long one connect may take.
const CONNECT: Duration = Duration::from_secs(10);

/// How often the end is looked for where nothing moves.
const GLANCE: Duration = Duration::from_millis(10);

/// Bytes that one call may receive. They are not copied, so there may be many.
const RECEIVED: usize = 4 << 20;

/// Runs the case.
pub(crate) fn run(args: &Args) -> Result<Report> {
    let (port, event) = match args.direction {
        Direction::Up => (SINK, EpollFlags::EPOLLOUT),
        Direction::Down => (SOURCE, EpollFlags::EPOLLIN),
    };
    let poller = Poller::new()?;
    let mut streams = Vec::with_capacity(args.streams);
    for key in 0..args.streams {
        let target = args.common.targets.at(key as u64, port);
        let stream = connect(target).with_context(|| format!("cannot connect to {target}"))?;
        // Level-triggered, and one call for an event: all streams have their turn.
        poller.add(&stream, key, event)?;
        streams.push(stream);
    }
    let mut buffer = vec![0; CHUNK.max(RECEIVED)];
    let mut room = Poller::room();
    let mut bytes = 0;
    let started = Instant::now();
    while started.elapsed() < args.common.seconds {
        for key in poller.wait(&mut room, Some(GLANCE))? {
            let stream = &mut streams[key];
            let moved = match args.direction {
                Direction::Up => stream.write(&buffer[..CHUNK]),
                // The kernel throws the bytes away, which costs less than a copy.
                Direction::Down => {
                    recv(stream.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC).map_err(io::Error::from)
                }
            };
            match moved {
                Ok(0) => bail!("stream {key} was closed by the other side"),
                Ok(count) => bytes += count as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).with_context(|| format!("stream {key}")),
            }
        }
    }
    let elapsed = started.elapsed();
    Ok(Report { bytes, seconds: seconds(elapsed), gbit_per_second: gigabits_per_second(bytes, elapsed) })
}

fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, CONNECT)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}
