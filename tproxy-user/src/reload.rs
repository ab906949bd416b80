//! What a reload can change, what it cannot, when files have changed, and when one that failed is
//! tried again. Nothing here touches the kernel.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::config::{Capture, Config, Log, Scope};

/// A configuration that was read again, as far as it can be had without a restart.
#[derive(Clone, Debug)]
pub struct Reloaded {
    /// The old one with what can change: interfaces, ports, networks, upstreams, rules and the log's level.
    pub config: Config,
    /// Keys whose change needs a restart.
    pub restart: Vec<&'static str>,
}

impl Reloaded {
    /// Joins what runs with what was read.
    #[must_use]
    pub fn new(running: &Config, read: &Config) -> Self {
        let (old, new) = (&running.capture.scope, &read.capture.scope);
        let scope = Scope { tcp: old.tcp, udp: old.udp, v4: old.v4, v6: old.v6, ..new.clone() };
        let config = Config {
            capture: Capture {
                interfaces: read.capture.interfaces.clone(),
                scope,
                rules: read.capture.rules.clone(),
                ..running.capture.clone()
            },
            upstream: read.upstream.clone(),
            log: Log { level: read.log.level, ..running.log },
            files: read.files.clone(),
            ..running.clone()
        };
        // In sockets, in loaded programs, or in what the network was told.
        let wanted = read.keys();
        let restart = config.keys().into_iter().zip(wanted).filter(|(is, wanted)| is != wanted);
        let restart = restart.map(|((key, _), _)| key).collect();
        Self { config, restart }
    }
}

/// Files that are looked at for changes.
#[derive(Debug)]
pub struct Watched {
    /// As they were when the configuration was read.
    read: Vec<(PathBuf, Stamp)>,
    /// As they were at the latest look.
    seen: Vec<(PathBuf, Stamp)>,
}

/// What changes when a file is written or replaced; `None`: it is not there.
type Stamp = Option<(u64, u64, i64, i64)>;

impl Watched {
    /// Looks at files now.
    #[must_use]
    pub fn new(files: &[PathBuf]) -> Self {
        let read: Vec<_> = files.iter().map(|file| (file.clone(), stamp(file))).collect();
        Self { seen: read.clone(), read }
    }

    /// Looks at the files of a configuration that has just been read. Of those that are
    /// here already this look counts, which was before: what has been written since
    /// may not have been read.
    #[must_use]
    pub fn joined(&self, files: &[PathBuf]) -> Self {
        let read: Vec<_> = files
            .iter()
            .map(|file| match self.read.iter().find(|(known, _)| known == file) {
                Some(known) => known.clone(),
                None => (file.clone(), stamp(file)),
            })
            .collect();
        Self { seen: read.clone(), read }
    }

    /// Whether files have changed, and not since the look before: who writes them is done.
    pub fn changed(&mut self) -> bool {
        let now: Vec<_> = self.read.iter().map(|(file, _)| (file.clone(), stamp(file))).collect();
        let settled = now == self.seen;
        self.seen = now;
        let changed = settled && self.seen != self.read;
        if changed {
            self.read.clone_from(&self.seen);
        }
        changed
    }
}

fn stamp(file: &Path) -> Stamp {
    let meta = file.metadata().ok()?;
    Some((meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
}

/// When a reload that failed is tried again where files are watched: what was wrong may be mended
/// without a change of them. An interface comes, or a file is written that only the new configuration
/// names.
#[derive(Debug, Default)]
pub struct Retry(Option<Failed>);

#[derive(Debug)]
struct Failed {
    error: String,
    again: Instant,
    pause: Duration,
}

impl Retry {
    /// From a failure to the next attempt; doubled after each.
    const FIRST_PAUSE: Duration = Duration::from_secs(2);
    /// The longest pause. An attempt may read a million networks, which takes about a second.
    const LONGEST_PAUSE: Duration = Duration::from_secs(30);

    /// Whether it is time.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        self.0.as_ref().is_some_and(|failed| failed.again <= now)
    }

    /// Notes that it failed, by an attempt `again` or for another reason. Whether that is to be
    /// told: of attempts that fail as the one before nobody wants to hear.
    pub fn failed(&mut self, error: &str, again: bool, now: Instant) -> bool {
        let before = self.0.take().filter(|_| again);
        let known = before.as_ref().is_some_and(|before| before.error == error);
        let pause = before.map_or(Self::FIRST_PAUSE, |before| (before.pause * 2).min(Self::LONGEST_PAUSE));
        self.0 = Some(Failed { error: error.to_owned(), again: now + pause, pause });
        !known
    }

    /// Notes that it went well.
    pub fn done(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, resolve};
    use crate::config::file::value::{Level, LogForm};

    fn config(flags: &str) -> Config {
        let argv = std::iter::once("tproxy-user").chain(flags.split_whitespace());
        resolve::config(&Cli::try_parse_from(argv).expect("flags").run).expect("valid")
    }

    #[test]
    fn what_cannot_change_is_named_and_stays() {
        let running = config("-i eth0 --on-port 1000 --proto tcp");
        let mut read = config("-i eth1 --on-port 2000 --to 10.0.0.0/8 --table 7 --udp-timeout 9s");
        read.log = Log { level: Level::Debug, form: LogForm::Json };
        let reloaded = Reloaded::new(&running, &read);
        assert_eq!(
            reloaded.restart,
            ["capture.protocols", "steer.on_port", "steer.table", "log.format", "timeouts.udp"]
        );
        let mut expected = config("-i eth1 --on-port 1000 --proto tcp --to 10.0.0.0/8");
        expected.log.level = Level::Debug;
        assert_eq!(reloaded.config, expected);
        assert!(Reloaded::new(&running, &running).restart.is_empty());
    }

    #[test]
    fn files_have_changed_once_they_are_written() {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("rules");
        let write = |content: &str| std::fs::write(&file, content).expect("written");
        write("1");
        let mut watched = Watched::new(std::slice::from_ref(&file));
        assert!(!watched.changed());
        write("12");
        assert!(!watched.changed(), "perhaps it is still being written");
        assert!(watched.changed());
        assert!(!watched.changed());
        std::fs::remove_file(&file).expect("removed");
        assert!(!watched.changed());
        assert!(watched.changed());
    }

    #[test]
    fn what_failed_is_tried_again_at_growing_intervals() {
        let mut retry = Retry::default();
        let mut now = Instant::now();
        assert!(!retry.is_due(now));
        assert!(retry.failed("no such file", false, now));
        for pause in [2, 4, 8, 16, 30, 30] {
            let due = now + Duration::from_secs(pause);
            assert!(!retry.is_due(due.checked_sub(Duration::from_millis(1)).expect("later")));
            assert!(retry.is_due(due), "{pause}");
            now = due;
            assert!(!retry.failed("no such file", true, now), "it was told");
        }
        assert!(retry.failed("line 3", true, now));
        assert!(retry.failed("line 3", false, now), "somebody has asked for it");
        assert!(retry.is_due(now + Duration::from_secs(2)));
        retry.done();
        assert!(!retry.is_due(now + Duration::from_hours(1)));
    }

    #[test]
    fn what_is_written_while_the_configuration_is_read_is_a_change() {
        let directory = tempfile::tempdir().expect("directory");
        let [known, new] = ["known", "new"].map(|name| directory.path().join(name));
        std::fs::write(&known, "1").expect("written");
        std::fs::write(&new, "1").expect("written");
        let before = Watched::new(std::slice::from_ref(&known));
        std::fs::write(&known, "12").expect("written");
        let mut watched = before.joined(&[known.clone(), new]);
        assert!(!watched.changed());
        assert!(watched.changed());
        assert!(!before.joined(&[known]).joined(&[]).changed(), "no file, no change");
    }
}
