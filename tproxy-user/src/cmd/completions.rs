//! `completions`.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::output;

/// Prints the completions of a shell.
///
/// # Errors
/// Where standard output cannot be written.
pub fn run(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tproxy-user", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(())
}
