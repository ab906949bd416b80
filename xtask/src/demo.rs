//! `cargo xtask demo`.

use anyhow::{Result, bail};

/// Flags of `cargo xtask demo`.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Runs the task.
pub(crate) fn run(_args: &Args) -> Result<()> {
    bail!("`cargo xtask demo` is not built yet")
}
