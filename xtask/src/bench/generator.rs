//! The load generator, `tproxy-load`: its server, and its clients.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use xtask::lab::{Lab, Namespace};

/// TCP 9000 and UDP 9000 answer, UDP 9001 discards.
pub(crate) const PORT: u16 = 9000;
/// Where the server takes datagrams.
pub(crate) const UDP_PORTS: [u16; 2] = [PORT, 9001];

/// Destinations: enough that no side runs out of ports while closed connections linger.
const TARGETS: &str = "198.18.0.1/64";

/// How long a program may take besides what it is to measure.
const PATIENCE: Duration = Duration::from_mins(1);

/// Percentiles, in microseconds.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Times {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// What a client reports; each case has some of it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Report {
    #[serde(default)]
    pub(crate) completed: u64,
    #[serde(default)]
    pub(crate) failed: u64,
    #[serde(default)]
    pub(crate) sent: u64,
    #[serde(default)]
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) connected_us: Option<Times>,
    pub(crate) first_byte_us: Option<Times>,
    pub(crate) response_us: Option<Times>,
}

/// What the server has counted so far.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Counts {
    pub(crate) tcp_received_bytes: u64,
    pub(crate) udp_received: u64,
    pub(crate) foreign: u64,
}

/// What a client holds.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Held {
    open: u64,
    failed: u64,
}

/// Runs a client to its end.
pub(crate) fn run(lab: &Lab, program: &Path, words: &str, seconds: u64) -> Result<Report> {
    let command = lab.client.cmd(program).args(words.split_whitespace());
    let command = command.args(["--targets", TARGETS, "--seconds", &seconds.to_string()]);
    let output = command.timeout(Duration::from_secs(seconds) + PATIENCE).check()?;
    let line = output.stdout.lines().last().unwrap_or_default();
    serde_json::from_str(line).with_context(|| format!("not the report of a load: {}", output.describe()))
}

/// A `tproxy-load` that talks by lines; killed when dropped.
struct Dialogue {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Dialogue {
    fn start(namespace: &Namespace, program: &Path, words: &[&str]) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = namespace.enter(|| command.spawn())?.context("cannot start tproxy-load")?;
        let stdin = child.stdin.take().context("no standard input")?;
        let stdout = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Self { child, stdin, stdout })
    }

    /// The next line.
    fn line(&mut self) -> Result<String> {
        if self.stdout.buffer().is_empty() {
            let limit = PollTimeout::try_from(PATIENCE)?;
            let mut wanted = [PollFd::new(self.stdout.get_ref().as_fd(), PollFlags::POLLIN)];
            if poll(&mut wanted, limit)? == 0 {
                bail!("tproxy-load said nothing for {PATIENCE:?}");
            }
        }
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        if line.is_empty() {
            bail!("tproxy-load ended: {}", self.child.wait()?);
        }
        Ok(line.trim_end().to_owned())
    }

    fn json<T: DeserializeOwned>(&mut self) -> Result<T> {
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("unexpected of tproxy-load: {line}"))
    }
}

impl Drop for Dialogue {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The server, in a lab's server namespace.
pub(crate) struct Server(Dialogue);

impl Server {
    /// Ready; senders other than `expected` are counted.
    pub(crate) fn start(lab: &Lab, program: &Path, expected: IpAddr) -> Result<Self> {
        let words = ["serve", "--family", "v4", "--expect", &expected.to_string()];
        let mut dialogue = Dialogue::start(&lab.server, program, &words)?;
        let line = dialogue.line()?;
        if line != "ready" {
            bail!("unexpected of tproxy-load: {line}");
        }
        Ok(Self(dialogue))
    }

    /// What it has counted so far.
    pub(crate) fn counts(&mut self) -> Result<Counts> {
        self.0.stdin.write_all(b"read\n").context("tproxy-load has ended")?;
        self.0.json()
    }
}

/// Connections that are open and idle, until dropped.
pub(crate) struct Idle(Dialogue);

impl Idle {
    /// Opens them, one exchange on each.
    pub(crate) fn open(lab: &Lab, program: &Path, connections: u64) -> Result<Self> {
        let count = connections.to_string();
        let words = ["idle", "--connections", &count, "--targets", TARGETS];
        let mut idle = Self(Dialogue::start(&lab.client, program, &words)?);
        let Held { open, failed } = idle.0.json()?;
        ensure!(open == connections, "{open} are held, {failed} failed");
        Ok(idle)
    }
}
