//! The pinned flow table and counters.

use std::path::Path;

use tproxy_common::abi::{Flow, FlowKey};
use tproxy_common::counter::Counters;

/// Reads the flow table that is pinned in a directory.
///
/// # Errors
/// Where nothing is pinned there, or it is of another version.
pub fn read(_pin: &Path) -> anyhow::Result<Vec<(FlowKey, Flow)>> {
    anyhow::bail!("no flow table")
}

/// Reads the counters that are pinned in a directory, summed over the CPUs.
///
/// # Errors
/// Where nothing is pinned there, or it is of another version.
pub fn read_counters(_pin: &Path) -> anyhow::Result<Counters> {
    anyhow::bail!("no counters")
}
