//! Logging, to standard error.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

use crate::cli::LoggingArgs;

/// Environment variable with a filter that goes before `-v` and `-q`, such as
/// `tproxy_user::relay=trace` (syntax of `tracing_subscriber::EnvFilter`).
pub const VARIABLE: &str = "TPROXY_LOG";

/// The filter of the flags. Libraries are heard one step later than the program.
fn filter(verbose: u8, quiet: u8) -> &'static str {
    match (verbose, quiet) {
        (0, 0) => "warn,tproxy_user=info",
        (0, 1) => "warn",
        (0, _) => "error",
        (1, _) => "info,tproxy_user=debug",
        (_, _) => "debug,tproxy_user=trace",
    }
}

/// Starts logging. A second call in one process changes nothing.
pub fn init(args: &LoggingArgs) {
    let filter = match EnvFilter::try_from_env(VARIABLE) {
        Ok(filter) => filter,
        Err(_) => EnvFilter::new(filter(args.verbose, args.quiet)),
    };
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Fails only where a logger is there already, as in tests.
    drop(if args.log_format {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_ansi(std::io::stderr().is_terminal()).with_target(false).try_init()
    });
}
