//! The real `tproxy-user`, running in a lab's router.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde::Deserialize;
use serde_json::Value;

use super::command::{Cmd, Output};
use super::daemon::Daemon;
use super::namespace::Namespace;
use super::{Lab, reclaim};

/// Environment variable with the path of the `tproxy-user` to be tested.
pub const BINARY: &str = "TPROXY_USER";

/// Environment variable that disables the proxy: for checking that a scenario's
/// expectations hold for plain forwarding, wherever they should.
pub const DIRECT: &str = "TPROXY_LAB_DIRECT";

/// Finds `tproxy-user`: [`BINARY`], else beside or above this program.
///
/// # Errors
/// Where there is none.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(BINARY) {
        return Ok(path.into());
    }
    let this = std::env::current_exe()?;
    let mut candidates = this.ancestors().skip(1).take(2).map(|dir| dir.join("tproxy-user"));
    candidates
        .find(|path| path.is_file())
        .context("tproxy-user is not built: run `cargo xtask test netns`, or set TPROXY_USER to its path")
}

/// Whether scenarios are to run without a proxy.
#[must_use]
pub fn is_direct() -> bool {
    std::env::var_os(DIRECT).is_some()
}

/// The file of a lab that has the certificates of whom its system trusts.
pub const AUTHORITIES: &str = "authorities.pem";

/// How a proxy is to be started.
#[derive(Debug)]
pub struct Launch<'lab> {
    lab: &'lab Lab,
    binary: Option<PathBuf>,
    pin: PathBuf,
    args: Vec<String>,
    open_files: Option<u32>,
}

impl<'lab> Launch<'lab> {
    /// A proxy in the lab's router, with flags as on a command line.
    #[must_use]
    pub fn new(lab: &'lab Lab, flags: &str) -> Self {
        let args = flags.split_whitespace().map(Into::into).collect();
        Self { lab, binary: None, pin: lab.pin(), args, open_files: None }
    }

    /// Another program than [`binary`] finds.
    #[must_use]
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Self {
        self.binary = Some(path.into());
        self
    }

    /// Another instance beside the usual one.
    #[must_use]
    pub fn instance(mut self, suffix: &str) -> Self {
        self.pin = reclaim::pin(&format!("{}-{suffix}", self.lab.name()));
        self
    }

    /// Pins elsewhere than under the lab's name.
    #[must_use]
    pub fn pin(mut self, path: impl Into<PathBuf>) -> Self {
        self.pin = path.into();
        self
    }

    /// Sets its limit of open files, as `ulimit -n` does.
    #[must_use]
    pub fn open_files(mut self, limit: u32) -> Self {
        self.open_files = Some(limit);
        self
    }

    fn program(&self) -> Result<PathBuf> {
        self.binary.clone().map_or_else(binary, Ok)
    }

    /// The command line.
    ///
    /// # Errors
    /// Where `tproxy-user` is not built.
    pub fn command(&self) -> Result<Cmd> {
        let binary = self.program()?;
        let command = match self.open_files {
            None => self.lab.router.cmd(binary),
            // `exec`: the process number that is known must be the proxy's.
            Some(limit) => {
                let script = format!("ulimit -n {limit}; exec \"$0\" \"$@\"");
                self.lab.router.cmd("sh").arg("-c").arg(script).arg(binary)
            }
        };
        // Of the lab's system: not those of this host.
        let command = command.env("SSL_CERT_FILE", self.lab.dir().join(AUTHORITIES)).env("SSL_CERT_DIR", "");
        Ok(command.args(&self.args).arg("--pin").arg(&self.pin))
    }

    /// Starts it and waits until it says that it runs.
    ///
    /// # Errors
    /// Where it ends or does not say so in time.
    pub fn start(self) -> Result<Proxy> {
        let daemon = Daemon::start(self.lab, "tproxy-user", &self.command()?)?;
        let binary = self.program()?;
        let mut proxy = Proxy { daemon, binary, router: self.lab.router.clone(), pin: self.pin };
        // It says so last of all: from then on it captures.
        proxy.daemon.wait_ready("it said that it is ready", |daemon| Ok(daemon.log().contains("ready: ")))?;
        Ok(proxy)
    }
}

/// A running proxy; killed when dropped.
#[derive(Debug)]
pub struct Proxy {
    /// The process.
    pub daemon: Daemon,
    binary: PathBuf,
    router: Namespace,
    pin: PathBuf,
}

/// One flow, as `flows --json` prints it; the fields of the contract.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct FlowRecord {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The client's address and port.
    pub client: String,
    /// The address and port that it sent to.
    pub destination: String,
    /// Interface that the flow arrived on.
    pub iface: Option<String>,
    /// `proxy`, `pass`, …
    pub action: String,
    /// Number of the rule that decided.
    pub rule: Value,
    /// The upstream that it goes by.
    pub upstream: Value,
    /// Packets from the client.
    pub packets_up: u64,
    /// IP-layer bytes from the client.
    pub bytes_up: u64,
    /// Packets to the client.
    pub packets_down: u64,
    /// IP-layer bytes to the client.
    pub bytes_down: u64,
    /// When the first packet was seen.
    pub first_seen: Value,
    /// When the latest was.
    pub last_seen: Value,
    /// `new`, `established`, `closing`, `closed`.
    pub state: String,
}

impl Proxy {
    /// `tproxy-user WORDS --pin …` for this instance.
    ///
    /// # Errors
    /// Where `tproxy-user` is not built.
    pub fn cmd(&self, words: &str) -> Result<Cmd> {
        Ok(self.router.cmd(&self.binary).args(words.split_whitespace()).arg("--pin").arg(&self.pin))
    }

    /// The flows.
    ///
    /// # Errors
    /// Where the command fails or a field of the contract is missing.
    pub fn flows(&self) -> Result<Vec<FlowRecord>> {
        let output = self.cmd("flows --json")?.check()?;
        serde_json::from_str(&output.stdout)
            .with_context(|| format!("`flows --json` is not as documented: {}", output.describe()))
    }

    /// The flow of a client and destination.
    ///
    /// # Errors
    /// As [`flows`](Self::flows), and where there is no such flow.
    pub fn flow(&self, protocol: &str, client: &str, destination: &str) -> Result<FlowRecord> {
        let flows = self.flows()?;
        let found = flows.iter().find(|flow| {
            flow.protocol == protocol && flow.client == client && flow.destination == destination
        });
        found
            .cloned()
            .with_context(|| format!("no flow {protocol} {client} → {destination} among {flows:#?}"))
    }

    /// What `status --json` prints.
    ///
    /// # Errors
    /// Where the command fails.
    pub fn status(&self) -> Result<Value> {
        let output = self.cmd("status --json")?.check()?;
        serde_json::from_str(&output.stdout).with_context(|| format!("not JSON: {}", output.describe()))
    }

    /// One counter of `status`.
    ///
    /// # Errors
    /// Where there is no counter of that name.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let status = self.status()?;
        let counters = &status["counters"];
        counters[name].as_u64().with_context(|| format!("no counter {name} among {counters:#}"))
    }

    /// Ends it with SIGTERM; it must drain, clean up and exit 0.
    ///
    /// # Errors
    /// Where it does not within `timeout`.
    pub fn terminate(mut self, timeout: Duration) -> Result<Duration> {
        let (code, elapsed) = self.daemon.stop(Signal::SIGTERM, timeout)?;
        ensure!(code == 0, "exit code {code} after SIGTERM, {}", self.daemon.describe());
        Ok(elapsed)
    }

    /// Kills it so that it cannot clean up.
    ///
    /// # Errors
    /// Where it has ended by itself.
    pub fn kill(mut self) -> Result<()> {
        self.daemon.stop(Signal::SIGKILL, Duration::from_secs(5)).map(drop)
    }
}

/// `tproxy-user cleanup` of the lab's usual instance.
///
/// # Errors
/// Where it fails.
pub fn cleanup(lab: &Lab) -> Result<Output> {
    Launch::new(lab, "cleanup").command()?.check()
}
