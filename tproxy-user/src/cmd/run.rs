//! `run`.

use crate::app;
use crate::config::Config;

/// Runs the proxy.
///
/// # Errors
/// Those of [`app::run`].
pub fn run(config: &Config) -> anyhow::Result<()> {
    app::run(config)
}
