//! Runs a test executable: bounded in time, with what it prints shown and counted.

use std::io::{BufRead as _, BufReader};
use std::num::NonZero;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use xtask::lab::{proxy, reclaim};

use super::{Executable, Part};
use crate::recap::{Details, Recap};
use crate::totals::Totals;

/// Runs one executable and shows what it prints, once it has shown a test.
pub(super) fn execute(
    part: Part,
    executable: &Executable,
    filters: &[String],
    proxy: Option<&Path>,
    recap: &mut Recap,
) -> Result<Totals> {
    let mut command = Command::new(&executable.path);
    command.args(filters).current_dir(&executable.home).stdin(Stdio::null()).stdout(Stdio::piped());
    if part == Part::Netns {
        // What cargo alone ignores for want of root: here there is root.
        command.arg("--include-ignored");
        // libtest's own are as many as there are cores, and these wait most of their time.
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        command.env("RUST_TEST_THREADS", (3 * cores).to_string());
    }
    if let Some(proxy) = proxy {
        command.env(proxy::BINARY, proxy);
    }
    let started = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot run {}", executable.path.display()))?;
    let _signals = reclaim::supervise(child.id());
    let stdout = child.stdout.take().context("no output")?;
    let (tell, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if tell.send(line).is_err() {
                return;
            }
        }
    });
    let (mut totals, mut details) = (None, Details::default());
    let mut shown = false;
    loop {
        let left = part.limit().saturating_sub(started.elapsed());
        match lines.recv_timeout(left) {
            Ok(line) => {
                totals = Totals::parse(&line).or(totals);
                details.line(&line);
                let nothing =
                    line.is_empty() || line.starts_with("running ") || line.starts_with("test result:");
                if !shown && !nothing {
                    println!("\n{}: {}", part.name(), executable.name);
                    shown = true;
                }
                if shown {
                    println!("{line}");
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                end(&mut child)?;
                bail!("stopped: not done within {} s", part.limit().as_secs());
            }
        }
    }
    if let Some(details) = details.found() {
        recap.note(format!("{}: {}:\n{details}", part.name(), executable.name));
    }
    judge(child.wait()?, totals)
}

/// SIGTERM first: the end-to-end tests then remove their network namespaces.
fn end(child: &mut Child) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    for _ in 0..200 {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// An executable that ends otherwise than its tests say has not run them all.
fn judge(status: ExitStatus, totals: Option<Totals>) -> Result<Totals> {
    match totals {
        Some(totals) if status.success() == (totals.failed == 0) => Ok(totals),
        // `--list`, `--help`: no test was to run.
        None if status.success() => Ok(Totals::default()),
        _ => bail!("ended with {status} before its tests were done"),
    }
}
