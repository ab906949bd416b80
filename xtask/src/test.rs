//! `cargo xtask test`.

use anyhow::{Result, bail};

/// Flags of `cargo xtask test`.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Runs the task.
pub(crate) fn run(_args: &Args) -> Result<()> {
    bail!("`cargo xtask test` is not built yet")
}
