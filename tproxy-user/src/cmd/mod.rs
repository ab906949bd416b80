//! The commands: one file each. Errors become one line and an exit code here.

pub mod check;
pub mod cleanup;
pub mod completions;
pub mod doctor;
pub mod flows;
pub mod import;
pub mod man;
pub mod reload;
pub mod schema;
pub mod status;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _};

use crate::cli::{Cli, Command, RunArgs, merge, resolve};
use crate::config::{AccessLog, Config};
use crate::failure::Failure;
use crate::{app, argv, instance, memory, privilege, telemetry};

/// Parses the command line, does what it says, and tells how that ended.
#[must_use]
pub fn main() -> ExitCode {
    memory::keep_little();
    let (mut cli, matches) = match parse() {
        Ok(parsed) => parsed,
        Err(error) => return usage(&error),
    };
    // Before logging starts: the file says how.
    if let Err(failure) = merge::config_file(&mut cli, &matches) {
        complain(&failure.to_string());
        return failure.exit_code().into();
    }
    let access_log = match &cli.command {
        None => cli.run.source.access_log,
        Some(Command::Run(run)) => run.source.access_log,
        Some(_) => AccessLog::Off,
    };
    let _guard = telemetry::init((&cli.logging).into(), access_log);
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            complain(&format!("{error:#}"));
            exit_code(&error).into()
        }
    }
}

fn parse() -> Result<(Cli, ArgMatches), clap::Error> {
    let matches = Cli::command().try_get_matches_from(argv::words())?;
    Ok((Cli::from_arg_matches(&matches)?, matches))
}

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let config = |run: &RunArgs| resolve::logged(run, &cli.logging);
    let done = match cli.command {
        None => start(&cli.run, &config(&cli.run)?),
        Some(Command::Run(run)) => start(&run, &config(&run)?),
        Some(Command::Check { run, packet: Some(packet), json, .. }) => {
            check::packet(&config(&run)?, &packet, json)
        }
        Some(Command::Check { run, diff: true, json, .. }) => check::diff(&config(&run)?, json),
        Some(Command::Check { run, json, .. }) => check::run(&config(&run)?, json),
        Some(Command::Doctor { run, json }) => return doctor::run(&config(&run)?, json),
        Some(Command::Flows(args)) => flows::run(&args),
        Some(Command::Status(args)) => status::run(&args),
        Some(Command::Reload { run, json }) => return reload::run(&run.steering.pin, json),
        Some(Command::Cleanup { pin }) => cleanup::run(&pin),
        Some(Command::Import { file }) => import::run(file.as_deref()),
        Some(Command::Completions { shell }) => completions::run(shell),
        Some(Command::Schema) => schema::run(),
        Some(Command::Man { dir }) => man::run(&dir),
    };
    done.map(|()| ExitCode::SUCCESS)
}

fn start(args: &RunArgs, config: &Config) -> anyhow::Result<()> {
    privilege::require(config)?;
    let reread: app::Reread = reread;
    app::run(config, args.config.is_some().then_some(reread))
}

/// The configuration by the same command line, and the file as it is now.
fn reread() -> anyhow::Result<Config> {
    let (mut cli, matches) = parse()?;
    merge::config_file(&mut cli, &matches)?;
    let run = match cli.command {
        Some(Command::Run(run)) => *run,
        _ => cli.run,
    };
    Ok(resolve::logged(&run, &cli.logging)?)
}

/// One line to standard error. That may be closed; there is nobody to tell then.
fn complain(message: &str) {
    use std::io::Write as _;
    let line =
        message.split('\n').map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    drop(writeln!(std::io::stderr(), "tproxy-user: {line}"));
}

/// Help and version go to standard output; of an error, the part that says
/// what is wrong is kept, without the usage summary.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // A reader that went away has read enough.
        drop(error.print());
        return ExitCode::SUCCESS;
    }
    complain(&clap_message(error));
    2.into()
}

fn clap_message(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let end = text.find("\n\nUsage:").or_else(|| text.find("\n\nFor more information")).unwrap_or(text.len());
    format!("{}; see --help", text[..end].trim_end())
}

/// The exit code of the contract.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error
        .chain()
        .find_map(|cause| match cause.downcast_ref::<instance::Error>() {
            Some(instance::Error::Running(failure)) => Some(failure),
            _ => cause.downcast_ref::<Failure>(),
        })
        .map_or(1, Failure::exit_code)
}

/// A runtime on this thread, for the commands that ask the kernel by netlink.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;
    use clap::Parser as _;

    #[test]
    fn exit_codes_survive_context() {
        let code = |error: anyhow::Error| exit_code(&error);
        assert_eq!(code(anyhow::anyhow!("x")), 1);
        assert_eq!(code(Failure::usage("x").into()), 2);
        assert_eq!(code(anyhow::Error::from(Failure::conflict("x")).context("y").context("z")), 5);
        assert_eq!(code(instance::Error::Running(Failure::conflict("x")).into()), 5);
        let wrapped: anyhow::Result<()> = Err(Failure::unsupported("x")).context("y");
        assert_eq!(code(wrapped.expect_err("failed")), 4);
    }

    #[test]
    fn usage_errors_are_one_message() {
        let error = Cli::try_parse_from(["tproxy-user", "--ifcae", "eth0"]).expect_err("unknown flag");
        let message = clap_message(&error);
        assert!(
            message.starts_with("unexpected argument '--ifcae' found") && message.contains("'--iface'"),
            "{message}"
        );
        assert!(!message.contains("Usage"), "{message}");
    }
}
