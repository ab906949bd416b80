//! One network namespace: enter it, run programs in it, change its sysctls.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, setns};

use super::command::{Cmd, Output};
use super::daemon::wait_for;

/// A named network namespace, as `ip netns` keeps them.
///
/// Programs are started from a thread that has entered the namespace, and
/// inherit it. `ip netns exec` would hide `/sys/fs/bpf` behind a mount
/// namespace of its own.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
    role: &'static str,
}

impl Namespace {
    /// A handle; the namespace itself need not exist yet.
    pub(crate) fn new(lab: &str, role: &'static str) -> Self {
        Self { name: format!("{lab}-{}", &role[..1]), role }
    }

    /// The name, as `ip netns list` prints it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `client`, `router`, `server` or `guest`.
    #[must_use]
    pub fn role(&self) -> &'static str {
        self.role
    }

    /// The file that stands for the namespace.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Moves the calling thread into the namespace, for good.
    fn join(&self) -> Result<()> {
        let path = self.path();
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        setns(file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter namespace {} (needs root)", self.name))
    }

    /// Runs `work` inside the namespace, on a thread of its own. Sockets made
    /// there stay in the namespace wherever they are used afterwards.
    ///
    /// # Errors
    /// Where the namespace cannot be entered.
    ///
    /// # Panics
    /// Where `work` does.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| self.join().map(|()| work()));
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// As [`enter`](Self::enter), for work that fails with an I/O error.
    ///
    /// # Errors
    /// The error of `work`, with the namespace's name.
    pub fn try_enter<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
        self.enter(work)?.with_context(|| format!("on the {}", self.role))
    }

    /// Starts `work` inside the namespace, on a thread that outlives this call.
    ///
    /// # Errors
    /// Where the namespace cannot be entered or no thread be started.
    pub fn spawn(&self, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
        let namespace = self.clone();
        let (tell, entered) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name(self.name.clone()).spawn(move || {
            let joined = namespace.join();
            let go = joined.is_ok();
            if tell.send(joined).is_ok() && go {
                work();
            }
        })?;
        entered.recv().context("the thread ended before it entered the namespace")??;
        Ok(thread)
    }

    /// A command to be run in the namespace.
    #[must_use]
    pub fn cmd(&self, program: impl AsRef<std::ffi::OsStr>) -> Cmd {
        Cmd::inside(self, program)
    }

    /// Runs a command line, split at blanks, that must succeed.
    ///
    /// # Errors
    /// Where it cannot be started, takes too long or fails.
    pub fn sh(&self, line: &str) -> Result<Output> {
        let mut words = line.split_whitespace();
        self.cmd(words.next().context("empty command line")?).args(words).check()
    }

    /// Runs lines of `ip -batch`; the first that fails ends it.
    ///
    /// # Errors
    /// Where one of them fails.
    pub fn ip_batch(&self, lines: &str) -> Result<()> {
        self.cmd("ip").args(["-batch", "-"]).stdin(lines).check().map(drop)
    }

    /// Reads a sysctl; `key` is a path under `/proc/sys`.
    ///
    /// # Errors
    /// Where there is no such sysctl.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let path = Path::new("/proc/sys").join(key);
        let value =
            self.enter(|| fs::read_to_string(&path))?.with_context(|| format!("cannot read sysctl {key}"))?;
        Ok(value.trim().replace('\t', " "))
    }

    /// Sets sysctls; keys are paths under `/proc/sys`.
    ///
    /// # Errors
    /// Where there is no such sysctl, or it refuses the value.
    pub fn set_sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            for (key, value) in settings {
                let path = Path::new("/proc/sys").join(key);
                fs::write(&path, value)
                    .with_context(|| format!("cannot set sysctl {key} to {value} on the {}", self.role))?;
            }
            Ok(())
        })?
    }

    /// Waits until every interface that is up has its carrier, and every IPv6
    /// address may be used.
    pub(crate) fn wait_until_up(&self) -> Result<()> {
        wait_for(&format!("links of the {} to come up", self.role), Duration::from_secs(5), || {
            self.try_enter(|| Ok(has_carriers()? && has_no_tentative_address()?))
        })
    }

    /// Inode of the namespace: what `/proc/PID/ns/net` of its processes shows.
    ///
    /// # Errors
    /// Where the namespace does not exist.
    pub fn inode(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        let inode = fs::metadata(self.path())?.ino();
        ensure!(inode != 0, "namespace {} has no inode", self.name);
        Ok(inode)
    }
}

/// Whether every interface of the calling thread's namespace that is up has its carrier.
fn has_carriers() -> io::Result<bool> {
    let (up, running) = (InterfaceFlags::IFF_UP, InterfaceFlags::IFF_RUNNING);
    Ok(getifaddrs()?.all(|interface| !interface.flags.contains(up) || interface.flags.contains(running)))
}

/// Whether no IPv6 address of the calling thread's namespace still has to be found unique.
fn has_no_tentative_address() -> io::Result<bool> {
    // Address, index, prefix length, scope, flags, name (`if6_seq_show` in net/ipv6/addrconf.c).
    const TENTATIVE: u32 = 0x40;
    let addresses = fs::read_to_string("/proc/thread-self/net/if_inet6")?;
    let mut flags = addresses.lines().filter_map(|line| line.split_whitespace().nth(4));
    Ok(flags.all(|flags| u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & TENTATIVE == 0)))
}
