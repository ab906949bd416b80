//! What the tasks print, and commands that run under a progress line.

use std::{
    fs::{self, File},
    io::{IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::workspace;

/// How many lines of a failed command's output are shown.
const TAIL_LINES: usize = 40;

/// Prints one line about what is being done.
pub(crate) fn say(line: &str) {
    // A closed pipe is no reason to stop half-way through a set-up.
    drop(writeln!(std::io::stderr(), "{line}"));
}

/// A command with a progress line; its output goes to `target/log/<log>.log`.
pub(crate) struct Step<'a> {
    label: &'a str,
    log: &'a str,
    limit: Option<Duration>,
    stdout: Option<&'a Path>,
    quiet_failure: bool,
}

impl<'a> Step<'a> {
    /// A step that is called `label` on the terminal, and logs to `target/log/<log>.log`.
    pub(crate) const fn new(label: &'a str, log: &'a str) -> Self {
        Self { label, log, limit: None, stdout: None, quiet_failure: false }
    }

    /// Kills the command and fails after this time.
    pub(crate) const fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Puts standard output into a file of its own instead of the log.
    pub(crate) const fn stdout(mut self, path: &'a Path) -> Self {
        self.stdout = Some(path);
        self
    }

    /// Does not print the end of the log on failure: another way will be tried.
    pub(crate) const fn may_fail(mut self) -> Self {
        self.quiet_failure = true;
        self
    }

    /// Runs the command and returns the path of its log.
    ///
    /// # Errors
    /// The command cannot be started, fails, or takes longer than the limit.
    /// The end of its output has been printed then.
    pub(crate) fn run(&self, command: &mut Command) -> Result<PathBuf> {
        let program = command.get_program().to_string_lossy().into_owned();
        let directory = workspace::target().join("log");
        fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let log = directory.join(format!("{}.log", self.log));
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let stdout = match self.stdout {
            Some(path) => File::create(path).with_context(|| format!("cannot write {}", path.display()))?,
            None => output.try_clone()?,
        };
        let child = command
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(output)
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        match self.wait(child, &log)? {
            Some(status) if status.success() => Ok(log),
            ended => {
                if !self.quiet_failure {
                    say(&format!("--- end of {}\n{}\n---", log.display(), tail(&log, TAIL_LINES)));
                }
                match ended {
                    Some(status) => {
                        bail!("{}: {program}: {status}; see {}", self.label, log.display())
                    }
                    None => bail!(
                        "{}: {program} was stopped after {} s; see {}",
                        self.label,
                        self.limit.unwrap_or_default().as_secs(),
                        log.display()
                    ),
                }
            }
        }
    }

    /// Waits under a progress line. `None`: the limit was reached.
    fn wait(&self, mut child: Child, log: &Path) -> Result<Option<ExitStatus>> {
        let start = Instant::now();
        let mut progress = Progress::new(self.label);
        loop {
            if let Some(status) = child.try_wait()? {
                progress.finish(start.elapsed(), status.success());
                return Ok(Some(status));
            }
            if self.limit.is_some_and(|limit| start.elapsed() >= limit) {
                child.kill()?;
                child.wait()?;
                progress.finish(start.elapsed(), false);
                return Ok(None);
            }
            // Short at first: most commands of a second run end at once.
            let early = start.elapsed() < Duration::from_millis(500);
            thread::sleep(Duration::from_millis(if early { 10 } else { 100 }));
            progress.tick(start.elapsed(), || tail(log, 1));
        }
    }
}

/// One line that says what is going on: redrawn on a terminal, printed once
/// elsewhere. Nothing is printed for what takes less than a second.
pub(crate) struct Progress<'a> {
    label: &'a str,
    terminal: bool,
    shown: bool,
    drawn_at: Duration,
}

impl<'a> Progress<'a> {
    /// Nothing is shown yet.
    pub(crate) fn new(label: &'a str) -> Self {
        Self { label, terminal: std::io::stderr().is_terminal(), shown: false, drawn_at: Duration::ZERO }
    }

    /// Draws the line with a note on what is done at the moment.
    pub(crate) fn tick(&mut self, elapsed: Duration, note: impl FnOnce() -> String) {
        let due = self.drawn_at + Duration::from_millis(200);
        if elapsed < Duration::from_secs(1) || elapsed < due {
            return;
        }
        self.drawn_at = elapsed;
        if self.terminal {
            let frame = ['|', '/', '-', '\\'][(elapsed.as_millis() / 200 % 4) as usize];
            let last: String = note().trim().chars().take(60).collect();
            let mut stderr = std::io::stderr();
            drop(write!(stderr, "\r\x1b[K{frame} {} ({} s) {last}", self.label, elapsed.as_secs()));
            drop(stderr.flush());
        } else if !self.shown {
            say(&format!("{} …", self.label));
        }
        self.shown = true;
    }

    /// Says how long it took.
    pub(crate) fn finish(&self, elapsed: Duration, success: bool) {
        if !self.shown {
            return;
        }
        if self.terminal {
            drop(write!(std::io::stderr(), "\r\x1b[K"));
        }
        let how = if success { "done in" } else { "failed after" };
        say(&format!("{}: {how} {} s", self.label, elapsed.as_secs()));
    }
}

/// The last lines of a file; empty when it cannot be read.
fn tail(path: &Path, lines: usize) -> String {
    /// Enough for the lines asked for, whatever the size of the file.
    const BYTES: u64 = 16 * 1024;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
        let mut bytes = Vec::new();
        file.take(BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.split(['\n', '\r']).filter(|line| !line.trim().is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_over_its_limit_is_stopped() {
        let error = Step::new("sleeping", "test-limit")
            .limit(Duration::from_millis(50))
            .may_fail()
            .run(Command::new("sleep").arg("60"))
            .expect_err("must be stopped");
        assert!(error.to_string().contains("was stopped"), "{error}");
    }

    #[test]
    fn a_failure_names_the_log() {
        let error = Step::new("failing", "test-failure")
            .may_fail()
            .run(Command::new("sh").args(["-c", "echo why >&2; exit 3"]))
            .expect_err("must fail");
        let log = workspace::target().join("log/test-failure.log");
        assert!(error.to_string().contains(&*log.to_string_lossy()));
        assert_eq!(tail(&log, 1), "why");
    }
}
