//! `tproxy-load connect`.

use anyhow::Result;
use serde::Serialize;

use super::connector::Connector;
use crate::Common;
use crate::drive::{Done, drive};
use crate::report::Percentiles;

/// New connections: connect, request, response, close
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Connections at one time
    #[arg(long, value_name = "N", value_parser = crate::at_least_1)]
    concurrency: usize,
    /// Ends after this number of connections
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
}

#[derive(Serialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    done: Done,
    failed: u64,
    connected_us: Percentiles,
    first_byte_us: Percentiles,
}

/// Runs the case.
pub(crate) fn run(args: &Args) -> Result<Report> {
    let limit = args.limit.unwrap_or(u64::MAX);
    let mut connector = Connector::new(args.common.targets, args.concurrency, limit)?;
    let done = drive(&mut connector, args.common.seconds)?;
    Ok(Report {
        done,
        failed: connector.failed(),
        connected_us: connector.connected.percentiles(),
        first_byte_us: connector.first_byte.percentiles(),
    })
}
