//! The composition root: configuration → running proxy.

use crate::config::Config;

/// Sets up, relays until a signal, and cleans up.
///
/// # Errors
/// Where something cannot be set up; nothing is left behind then.
pub fn run(_config: Config) -> anyhow::Result<()> {
    anyhow::bail!("not built in")
}
