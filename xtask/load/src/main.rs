//! The load of tproxy's benchmarks: a server, and clients that ask it for as much as it can give.
//!
//! One thread, one epoll, and nothing allocated for an exchange: what is measured is to be the way
//! between client and server. Each case prints one JSON object.

mod drive;
mod mmsg;
mod pace;
mod poller;
mod report;
mod serve;
mod sockets;
mod targets;
mod tcp {
    pub(crate) mod bulk;
    pub(crate) mod connect;
    pub(crate) mod connector;
    pub(crate) mod exchange;
    pub(crate) mod idle;
}
mod udp {
    pub(crate) mod exchange;
    pub(crate) mod new;
    pub(crate) mod send;
}

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;

use crate::targets::Targets;

/// Asked for by 64 bytes, answered by 64 bytes; datagrams come back.
const ECHO: u16 = 9000;

/// What arrives is counted and thrown away.
const SINK: u16 = 9001;

/// Whoever connects is sent bytes until it closes.
const SOURCE: u16 = 9002;

/// Bytes of a request, and of its response.
const MESSAGE: usize = 64;

/// Bytes of one write of a bulk transfer.
const CHUNK: usize = 128 << 10;

/// The load of tproxy's benchmarks.
#[derive(Parser)]
enum Load {
    Serve(serve::Args),
    Connect(tcp::connect::Args),
    Exchange(tcp::exchange::Args),
    Bulk(tcp::bulk::Args),
    UdpExchange(udp::exchange::Args),
    UdpSend(udp::send::Args),
    UdpNew(udp::new::Args),
    Idle(tcp::idle::Args),
}

/// What every client is told.
#[derive(clap::Args)]
struct Common {
    /// The first of consecutive addresses and their number, taken in turn, as 198.18.0.1/64
    #[arg(long, value_name = "FIRST_ADDR/COUNT")]
    targets: Targets,
    /// How long it lasts
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    seconds: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds
        .filter(|seconds| (Duration::from_millis(1)..=Duration::from_hours(1)).contains(seconds))
        .ok_or_else(|| "expected seconds, from 0.001 to 3600".to_owned())
}

fn at_least_1(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "expected a number, 1 or more".to_owned())
}

fn main() -> ExitCode {
    match run(Load::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tproxy-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(load: Load) -> Result<()> {
    sockets::raise_open_files()?;
    match load {
        Load::Serve(args) => serve::run(&args),
        Load::Connect(args) => report::print(&tcp::connect::run(&args)?),
        Load::Exchange(args) => report::print(&tcp::exchange::run(&args)?),
        Load::Bulk(args) => report::print(&tcp::bulk::run(&args)?),
        Load::UdpExchange(args) => report::print(&udp::exchange::run(&args)?),
        Load::UdpSend(args) => report::print(&udp::send::run(&args)?),
        Load::UdpNew(args) => report::print(&udp::new::run(&args)?),
        Load::Idle(args) => tcp::idle::run(&args),
    }
}
