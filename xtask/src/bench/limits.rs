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

/// Sockets and pipes that one process can have open.
fn descriptors() -> Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0.saturating_sub(OTHERS))
}

/// UDP flows that one process can have: a socket each.
pub(crate) fn flows() -> Result<u64> {
    descriptors()
}

/// TCP connections that one process can relay: two sockets each.
pub(crate) fn connections() -> Result<u64> {
    Ok(descriptors()? / 2)
}

/// The same, of one that has two pipes for each connection, idle or not, as redsocks does.
pub(crate) fn piped_connections() -> Result<u64> {
    Ok(descriptors()? / 6)
}
