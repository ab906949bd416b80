//! Programs that go on until they are stopped, and how to wait for them.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::command::{Cmd, kill_group, wait};
use super::namespace::Namespace;
use super::pace::patience;
use super::{Lab, sockets};

/// How long a daemon may take to be ready.
pub const READY: Duration = Duration::from_secs(10);

/// A running program; killed, with its process group, when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    described: String,
    log: PathBuf,
}

impl Daemon {
    /// Starts a program; `name` is that of its log in the lab's directory.
    ///
    /// # Errors
    /// Where it cannot be started.
    pub fn start(lab: &Lab, name: &str, command: &Cmd) -> Result<Self> {
        let log = (1_u32..1000)
            .map(|n| lab.dir().join(format!("{name}.{n}.log")))
            .find(|path| !path.exists())
            .context("no free name for a log file")?;
        let out = File::options().create_new(true).append(true).open(&log)?;
        let child = command.start(Stdio::null(), out.try_clone()?, out)?;
        Ok(Self { child, described: command.describe(), log })
    }

    /// The process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything that it has printed.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The exit status, once it has ended.
    ///
    /// # Errors
    /// Where the kernel does not say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until `ready`, or fails with the log if the program ends before.
    ///
    /// # Errors
    /// Where it ends, or is not ready within [`READY`].
    pub fn wait_ready(&mut self, what: &str, mut ready: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        let limit = patience(READY);
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended()? {
                bail!("ended with {status} before {what}, {}", self.describe());
            }
            if ready(self)? {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "still waiting for {what} after {limit:?}, {}",
                self.describe()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a socket listens on a port; see [`sockets::is_bound`].
    ///
    /// # Errors
    /// As [`wait_ready`](Self::wait_ready).
    pub fn wait_bound(
        &mut self,
        namespace: &Namespace,
        protocol: sockets::Protocol,
        port: u16,
    ) -> Result<()> {
        self.wait_ready(&format!("it listened on {} port {port}", protocol.name()), |_| {
            sockets::is_bound(namespace, protocol, port)
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// Where the program has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if let Some(status) = self.ended()? {
            bail!("cannot send {signal}: it ended with {status}, {}", self.describe());
        }
        kill(Pid::from_raw(i32::try_from(self.pid())?), signal)
            .with_context(|| format!("cannot send {signal}, {}", self.described))
    }

    /// Sends a signal and waits for the end: gives the exit code and how long it took.
    ///
    /// # Errors
    /// Where it has not ended within `timeout`.
    pub fn stop(&mut self, signal: Signal, timeout: Duration) -> Result<(i32, Duration)> {
        let started = Instant::now();
        self.signal(signal)?;
        let timeout = patience(timeout);
        let status = wait(&mut self.child, timeout)?;
        let status =
            status.with_context(|| format!("still there {timeout:?} after {signal}, {}", self.describe()))?;
        Ok((status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)), started.elapsed()))
    }

    /// Processor time that it has used so far.
    ///
    /// # Errors
    /// Where the program has ended.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat =
            fs::read_to_string(format!("/proc/{}/stat", self.pid())).context("the program has ended")?;
        // proc(5): fields 14 and 15, in ticks of 1/100 s; field 2 is in parentheses and may hold blanks.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: u64 = fields.iter().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Ok(Duration::from_millis(ticks * 10))
    }

    /// Number of open files.
    ///
    /// # Errors
    /// Where the program has ended.
    pub fn open_files(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid())).context("the program has ended")?.count())
    }

    /// Number of open sockets.
    ///
    /// # Errors
    /// Where the program has ended.
    pub fn open_sockets(&self) -> Result<usize> {
        let files = fs::read_dir(format!("/proc/{}/fd", self.pid())).context("the program has ended")?;
        let targets = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
        Ok(targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count())
    }

    /// Bytes of memory that it occupies: its resident set.
    ///
    /// # Errors
    /// Where the program has ended.
    pub fn memory(&self) -> Result<u64> {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.pid())).context("the program has ended")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    }

    /// What it is and the end of its log, for a message about a failure.
    #[must_use]
    pub fn describe(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(40)..].join("\n    ");
        format!("{}\n  its log ends with:\n    {end}", self.described)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        kill_group(&mut self.child);
    }
}

/// Polls until `done` says so.
///
/// # Errors
/// Where that takes longer than `timeout`, or `done` fails.
pub fn wait_for(what: &str, timeout: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let timeout = patience(timeout);
    let deadline = Instant::now() + timeout;
    loop {
        let asked = Instant::now();
        if done()? {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "waited {timeout:?} in vain for {what}");
        // As long again: programs that ask must not keep the processor from what is waited for.
        // Not longer, for one that waits itself has not.
        thread::sleep(asked.elapsed().clamp(Duration::from_millis(10), Duration::from_millis(250)));
    }
}

/// An address and port as `ss` prints them: IPv6 in brackets.
#[must_use]
pub fn endpoint(address: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}
