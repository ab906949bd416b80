//! `tproxy-load idle`, and how other cases come to their connections.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;
use socket2::Socket;

use super::connector::Connector;
use crate::drive::drive;
use crate::report;
use crate::targets::Targets;

/// Opens connections, asks once on each, and holds them until stdin ends
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The first of consecutive addresses and their number, taken in turn, as 198.18.0.1/64
    #[arg(long, value_name = "FIRST_ADDR/COUNT")]
    targets: Targets,
    /// How long all of them may take to open
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = crate::seconds)]
    seconds: Duration,
    /// Connections
    #[arg(long, value_name = "N", value_parser = crate::at_least_1)]
    connections: usize,
}

#[derive(Serialize)]
struct Report {
    open: usize,
    failed: usize,
}

/// Connections that are opened at one time.
const AT_ONE_TIME: usize = 128;

/// Connections that had a response each; fewer than asked for where some failed.
pub(crate) fn open(targets: Targets, connections: usize, within: Duration) -> Result<Vec<Socket>> {
    let mut connector = Connector::new(targets, connections.min(AT_ONE_TIME), connections as u64)?.keep();
    drive(&mut connector, within)?;
    connector.failed();
    Ok(connector.kept())
}

/// Runs the case.
pub(crate) fn run(args: &Args) -> Result<()> {
    let open = open(args.targets, args.connections, args.seconds)?;
    report::print(&Report { open: open.len(), failed: args.connections - open.len() })?;
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).context("cannot read stdin")?;
    Ok(())
}
