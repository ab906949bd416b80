//! System calls of a process, counted by strace.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use xtask::lab::{Cmd, Daemon, Lab};

use super::checks::{Check, Outcome};

const PATIENCE: Duration = Duration::from_secs(10);

/// A strace that counts.
pub(super) struct Counter {
    strace: Daemon,
    report: PathBuf,
}

impl Counter {
    /// Counts from now on what all threads of a process call.
    pub(super) fn attach(lab: &Lab, pid: u32) -> Result<Self> {
        let report = lab.dir().join("strace");
        let command = Cmd::host("strace").args(["-f", "-c", "-p", &pid.to_string(), "-o"]).arg(&report);
        let mut strace = Daemon::start(lab, "strace", &command)?;
        strace.wait_ready("it traced all threads", |_| are_traced(pid))?;
        Ok(Self { strace, report })
    }

    /// What was called until now.
    pub(super) fn detach(mut self) -> Result<Calls> {
        self.strace.stop(Signal::SIGINT, PATIENCE)?;
        let report = fs::read_to_string(&self.report)?;
        let calls = Calls::parse(&report);
        ensure!(calls.all() > 0, "strace has counted nothing, {}", self.strace.describe());
        Ok(calls)
    }
}

fn are_traced(pid: u32) -> Result<bool> {
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("it has ended")? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        if status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|by| by.trim() == "0")) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// How often each system call was made.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Calls(BTreeMap<String, u64>);

impl Calls {
    /// Reads lines `% time, seconds, usecs/call, calls, errors or nothing, name`.
    fn parse(report: &str) -> Self {
        let line = |line: &str| {
            let words: Vec<_> = line.split_whitespace().collect();
            let name = words.last().filter(|name| **name != "total")?;
            Some(((*name).to_owned(), words.get(3)?.parse().ok()?))
        };
        Self(report.lines().filter_map(line).collect())
    }

    /// Those that wait for events: how many come at a time is left to chance.
    pub(super) fn waits(&self) -> u64 {
        self.of(&["epoll_wait", "epoll_pwait", "epoll_pwait2"])
    }

    pub(super) fn all(&self) -> u64 {
        self.0.values().sum()
    }

    /// Two checks: of those that wait, and of all others, for one of so many.
    pub(super) fn outcomes(&self, calls: &'static Check, waits: &'static Check, count: u64) -> Vec<Outcome> {
        let others = super::each(self.all() - self.waits(), count);
        vec![calls.of(others, self.each(count)), waits.of(super::each(self.waits(), count), self.each(count))]
    }

    pub(super) fn of(&self, names: &[&str]) -> u64 {
        names.iter().filter_map(|name| self.0.get(*name)).sum()
    }

    /// Each for one of so many, the most frequent first.
    pub(super) fn each(&self, count: u64) -> String {
        let mut calls: Vec<_> =
            self.0.iter().map(|(name, calls)| (super::each(*calls, count), name)).collect();
        calls.retain(|(calls, _)| *calls >= 0.005);
        calls.sort_by(|a, b| b.0.total_cmp(&a.0));
        calls.iter().map(|(calls, name)| format!("{name} {calls:.2}")).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.001000           1      1000       500 recvfrom
 40.00    0.000500           1       500           sendto
  0.00    0.000000           0         1           brk
------ ----------- ----------- --------- --------- ----------------
100.00    0.001500           1      1501       500 total
";

    #[test]
    fn the_report_of_strace_is_read() {
        let calls = Calls::parse(REPORT);
        assert_eq!(calls.all(), 1501);
        assert_eq!(calls.of(&["recvfrom", "sendto", "splice"]), 1500);
        assert_eq!(calls.each(500), "recvfrom 2.00, sendto 1.00");
        assert_eq!(Calls::parse(""), Calls::default());
    }
}
