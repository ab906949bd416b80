//! Runs a program to its end: bounded in time, with all that it said.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, killpg};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use super::namespace::Namespace;
use super::pace::patience;

/// How long a command may take unless it says otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// A command line, where it runs, and for how long at most.
#[derive(Debug)]
pub struct Cmd {
    place: Option<Namespace>,
    program: OsString,
    args: Vec<OsString>,
    variables: Vec<(OsString, OsString)>,
    stdin: Option<Vec<u8>>,
    timeout: Duration,
}

/// What a program that ended has left.
#[derive(Debug)]
pub struct Output {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it printed; bytes that are no UTF-8 are replaced.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// From start to end.
    pub elapsed: Duration,
    /// Where it ran, and its command line.
    described: String,
}

impl Output {
    /// The exit code; 128 + signal where a signal ended it.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Everything that is known of the run, for a message about its failure.
    #[must_use]
    pub fn describe(&self) -> String {
        format!(
            "{}\n  ended with {} after {:.1} s\n  stdout: {}\n  stderr: {}",
            self.described,
            self.status,
            self.elapsed.as_secs_f64(),
            indent(&self.stdout),
            indent(&self.stderr)
        )
    }

    /// Refuses any exit code but `expected`.
    ///
    /// # Errors
    /// Where it is another, with everything that is known of the run.
    pub fn expect_code(self, expected: i32) -> Result<Self> {
        if self.code() == expected {
            return Ok(self);
        }
        bail!("expected exit code {expected} of: {}", self.describe())
    }
}

/// Long texts are cut: a failure message must stay readable.
fn indent(text: &str) -> String {
    const KEPT: usize = 60;
    let lines: Vec<&str> = text.trim_end().lines().collect();
    match lines.as_slice() {
        [] => "(nothing)".into(),
        [one] => (*one).into(),
        many => {
            let skipped = many.len().saturating_sub(KEPT);
            let note =
                if skipped > 0 { format!("\n    … {skipped} lines left out …") } else { String::new() };
            format!("{note}\n    {}", many[skipped..].join("\n    "))
        }
    }
}

impl Cmd {
    /// A command in the namespace that this process runs in.
    #[must_use]
    pub fn host(program: impl AsRef<OsStr>) -> Self {
        Self {
            place: None,
            program: program.as_ref().into(),
            args: Vec::new(),
            variables: Vec::new(),
            stdin: None,
            timeout: TIMEOUT,
        }
    }

    /// A command in a network namespace.
    #[must_use]
    pub fn inside(namespace: &Namespace, program: impl AsRef<OsStr>) -> Self {
        Self { place: Some(namespace.clone()), ..Self::host(program) }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().into()));
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.variables.push((name.as_ref().into(), value.as_ref().into()));
        self
    }

    /// Gives bytes to its standard input; without, that is empty.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Kills it after this time.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// `on the router: tc qdisc show`.
    #[must_use]
    pub fn describe(&self) -> String {
        let place = self.place.as_ref().map_or("on this host", |ns| match ns.role() {
            "client" => "on the client",
            "router" => "on the router",
            "server" => "on the server",
            _ => "on the guest",
        });
        let words: Vec<_> =
            std::iter::once(&self.program).chain(&self.args).map(|word| word.to_string_lossy()).collect();
        format!("{place}: {}", words.join(" "))
    }

    /// Starts it, in a process group of its own.
    pub(crate) fn start(&self, stdin: Stdio, stdout: File, stderr: File) -> Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).stdin(stdin).stdout(stdout).stderr(stderr).process_group(0);
        // What programs print must not depend on the developer's language, nor their way on his proxy.
        command.env("LC_ALL", "C");
        for setting in ["http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(setting);
        }
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        let child = match &self.place {
            Some(namespace) => namespace.enter(|| command.spawn())?,
            None => command.spawn(),
        };
        child.with_context(|| format!("cannot start, {}", self.describe()))
    }

    /// Runs it to its end, whatever its exit status.
    ///
    /// # Errors
    /// Where it cannot be started, or has to be killed because its time is over.
    pub fn run(&self) -> Result<Output> {
        let (stdout, stderr) = (scratch()?, scratch()?);
        let stdin = match &self.stdin {
            None => Stdio::null(),
            Some(bytes) => {
                let mut file = scratch()?;
                file.write_all(bytes)?;
                file.seek(SeekFrom::Start(0))?;
                file.into()
            }
        };
        let started = Instant::now();
        let mut child = self.start(stdin, stdout.try_clone()?, stderr.try_clone()?)?;
        let ended = wait(&mut child, patience(self.timeout))?;
        if ended.is_none() {
            kill_group(&mut child);
        }
        let output = Output {
            status: match ended {
                Some(status) => status,
                None => child.wait()?,
            },
            stdout: contents(stdout)?,
            stderr: contents(stderr)?,
            elapsed: started.elapsed(),
            described: self.describe(),
        };
        if ended.is_none() {
            bail!("not done within {:?}, {}", patience(self.timeout), output.describe());
        }
        Ok(output)
    }

    /// Runs it; it must succeed.
    ///
    /// # Errors
    /// As [`run`](Self::run), and where the exit code is not 0.
    pub fn check(&self) -> Result<Output> {
        let output = self.run()?;
        if output.status.success() { Ok(output) } else { bail!("failed, {}", output.describe()) }
    }
}

/// Waits for a child for a bounded time.
pub(crate) fn wait(child: &mut Child, timeout: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Kills a child that leads its process group, and the group with it.
pub(crate) fn kill_group(child: &mut Child) {
    if let Ok(Some(_)) = child.try_wait() {
        return; // Its number may already be another's.
    }
    if let Ok(pid) = i32::try_from(child.id()) {
        // ESRCH: it ended meanwhile.
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = child.wait();
}

/// A file without a name: unlike a pipe it never fills up, a forgotten
/// grandchild that holds it open does not keep anybody waiting, and nothing is left of it.
///
/// # Errors
/// Where there is no room for temporary files.
pub fn scratch() -> Result<File> {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let file = nix::fcntl::open(&std::env::temp_dir(), flags, Mode::S_IRUSR | Mode::S_IWUSR);
    Ok(File::from(file.context("cannot make a temporary file")?))
}

fn contents(mut file: File) -> Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
