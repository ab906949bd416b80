//! How many connections the programs may have open.

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Enough for 100,000 connections, two sockets each, and pipes.
const WANTED: u64 = 524_288;

/// Descriptors for everything else, in each program.
const OTHERS: u64 = 512;

/// Raises the limit of open files of this process, which all programs inherit.
pub(crate) fn raise() -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft >= WANTED {
        return Ok(());
    }
    match setrlimit(Resource::RLIMIT_NOFILE, WANTED, hard.max(WANTED)) {
        // Root in a container may not be allowed to have more than it was given.
        Err(Errno::EPERM) => Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?),
        other => Ok(other?),
    }
}

/// Relayed connections that one process can have open.
pub(crate) fn connections() -> Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0.saturating_sub(OTHERS) / 2)
}
