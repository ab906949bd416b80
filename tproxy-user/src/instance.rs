//! One running proxy: its lock, what it must undo, and its control socket.
//!
//! Everything is under `/run/tproxy/<name>/`, where the name is the last part
//! of the pin directory: `lock` (held while it runs), `state.json` (written
//! before each effect, so that the next start or `cleanup` can undo what a
//! killed run left) and `control.sock`.

pub mod control;
mod lock;
pub mod state;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::config::{Config, Mark};
use crate::failure::Failure;
use lock::Lock;
use state::{Journal, RoutingClaim, State};

/// Where instances keep their state.
pub const RUN_DIR: &str = "/run/tproxy";

/// A state directory that could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried, as in "cannot …".
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The state file is not one.
    #[error("{} is damaged; it says what a killed run left: look at it, then remove it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        #[source]
        source: serde_json::Error,
    },
    /// Another process is this instance.
    #[error(transparent)]
    Running(Failure),
}

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, path: path.to_owned(), source }
    }
}

/// Names of the files of one instance; nothing need be there.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Directory of all instances.
    pub base: PathBuf,
    /// Name of this one.
    pub name: String,
}

impl Paths {
    /// The files of the instance with this pin directory.
    #[must_use]
    pub fn of(pin: &Path) -> Self {
        Self::under(Path::new(RUN_DIR), pin)
    }

    /// The same, in another directory than [`RUN_DIR`].
    #[must_use]
    pub fn under(base: &Path, pin: &Path) -> Self {
        let name = pin.file_name().unwrap_or(pin.as_os_str()).to_string_lossy().into_owned();
        Self { base: base.to_owned(), name }
    }

    /// The instance's directory.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.base.join(&self.name)
    }

    /// The lock file.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.dir().join("lock")
    }

    /// The state file.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir().join("state.json")
    }

    /// The control socket.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.dir().join("control.sock")
    }

    /// The PID of the process that is this instance; `None`: it is not running.
    ///
    /// # Errors
    /// Where the lock file cannot be read.
    pub fn running(&self) -> Result<Option<i32>, Error> {
        lock::holder(&self.lock())
    }

    /// What the instance wrote: it runs, or was killed.
    ///
    /// # Errors
    /// Where the file cannot be read or is damaged.
    pub fn read_state(&self) -> Result<Option<State>, Error> {
        state::read(&self.state())
    }
}

/// This process, as an instance. Dropped without [`Instance::finish`], it
/// leaves its state for the next start, as a kill would.
#[derive(Debug)]
pub struct Instance {
    paths: Paths,
    state: State,
    /// State of the run before, where that was killed.
    leftover: Option<State>,
    lock: Lock,
}

impl Instance {
    /// Becomes the instance that the configuration names.
    ///
    /// # Errors
    /// [`Error::Running`] (exit code 5) where another process is, else where
    /// the directory cannot be written.
    pub fn acquire(config: &Config) -> Result<Self, Error> {
        Self::acquire_in(Path::new(RUN_DIR), config)
    }

    /// The same, in another directory than [`RUN_DIR`].
    ///
    /// # Errors
    /// As [`Instance::acquire`].
    pub fn acquire_in(base: &Path, config: &Config) -> Result<Self, Error> {
        Self::acquire_with(Paths::under(base, &config.pin), State::new(config))
    }

    /// Becomes an instance to remove what its killed run left; `None` where
    /// there is nothing of it.
    ///
    /// # Errors
    /// As [`Instance::acquire`].
    pub fn acquire_leftover(paths: Paths) -> Result<Option<Self>, Error> {
        if !paths.dir().exists() {
            return Ok(None);
        }
        let lock = lock::acquire(&paths.lock())?.map_err(|pid| {
            let name = &paths.name;
            Error::Running(Failure::Conflict(format!(
                "instance '{name}' is running as pid {pid}, so nothing was left behind; to stop it: kill {pid}"
            )))
        })?;
        if let Some(state) = paths.read_state()? {
            return Ok(Some(Self { paths, state, leftover: None, lock }));
        }
        // Killed before its first write, or after its last.
        lock.remove();
        remove_empty(&paths);
        Ok(None)
    }

    fn acquire_with(paths: Paths, mut state: State) -> Result<Self, Error> {
        fs::create_dir_all(paths.dir()).map_err(Error::io("make the directory", &paths.dir()))?;
        let lock = lock::acquire(&paths.lock())?.map_err(|pid| already_running(&paths, pid))?;
        let leftover = paths.read_state()?;
        // Kept until it is undone, should this run be killed before that.
        if let Some(leftover) = &leftover {
            state.journal = leftover.journal.clone();
            state.journal_netns = leftover.journal_netns;
        }
        let instance = Self { paths, state, leftover, lock };
        instance.write()?;
        Ok(instance)
    }

    /// The files of this instance.
    #[must_use]
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// What is written down.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What the run before left, where that was killed.
    #[must_use]
    pub fn leftover(&self) -> Option<&State> {
        self.leftover.as_ref()
    }

    /// Changes the journal and writes it. To be called *before* the effect
    /// that an entry undoes.
    ///
    /// # Errors
    /// Where the file cannot be written; the effect must then be left out.
    pub fn record(&mut self, change: impl FnOnce(&mut Journal)) -> Result<(), Error> {
        change(&mut self.state.journal);
        self.write()
    }

    /// Forgets the journal of the run before, once it is undone, but for the
    /// `routing` that this run takes over: it is this run's to undo from here on.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn forget_leftover(&mut self, routing: Option<RoutingClaim>) -> Result<(), Error> {
        self.leftover = None;
        self.state.journal = Journal { routing, ..Journal::default() };
        self.state.journal_netns = state::netns();
        self.write()
    }

    /// Claims a routing table and mark against the other running instances of
    /// this network namespace, and records the claim.
    ///
    /// # Errors
    /// [`Error::Running`] (exit code 5), naming the other one.
    pub fn claim_routing(&mut self, table: u32, mark: Mark) -> Result<(), Error> {
        // Two that start at one time must not both look before either writes.
        let path = self.paths.base.join(".claim");
        let guard = lock::wait(&path)?;
        if let Some(conflict) = claimed_by_another(&self.paths, table, mark)? {
            return Err(Error::Running(Failure::Conflict(conflict)));
        }
        self.record(|journal| {
            journal.routing = Some(RoutingClaim { table, mark: mark.value, mask: mark.mask });
        })?;
        drop(guard);
        Ok(())
    }

    /// Sets a kernel setting, its old value recorded first.
    ///
    /// # Errors
    /// Where the state or the setting cannot be written.
    pub fn set_sysctl(&mut self, name: &str, value: &str) -> anyhow::Result<()> {
        let old = crate::sysctl::read(name)?;
        if old == value {
            return Ok(());
        }
        self.record(|journal| {
            journal.setting(state::SysctlChange { name: name.to_owned(), old, new: value.to_owned() });
        })?;
        crate::sysctl::write(name, value)?;
        Ok(())
    }

    fn write(&self) -> Result<(), Error> {
        state::write(&self.paths.state(), &self.state)
    }

    /// Removes the files: everything is undone.
    ///
    /// # Errors
    /// Where a file cannot be removed.
    pub fn finish(self) -> Result<(), Error> {
        for path in [self.paths.control(), self.paths.state()] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", &path)(error));
                }
                _ => {}
            }
        }
        self.lock.remove();
        remove_empty(&self.paths);
        Ok(())
    }
}

/// Removes the directories that hold nothing any more.
fn remove_empty(paths: &Paths) {
    // Another instance may be starting in them: that one wins (ENOTEMPTY).
    if fs::remove_dir(paths.dir()).is_ok() && others(paths).is_empty() {
        drop(fs::remove_file(paths.base.join(".claim")));
        drop(fs::remove_dir(&paths.base));
    }
}

fn already_running(paths: &Paths, pid: i32) -> Error {
    let name = &paths.name;
    let same_netns =
        fs::metadata(format!("/proc/{pid}/ns/net")).map_or(true, |theirs| theirs.ino() == state::netns());
    Error::Running(Failure::Conflict(if same_netns {
        format!(
            "instance '{name}' is already running as pid {pid}; for a second one choose another --pin, --table and --tproxy-mark"
        )
    } else {
        format!(
            "instance '{name}' is already running as pid {pid} in another network namespace; choose another --pin for this one"
        )
    }))
}

/// The other instances, running or killed.
fn others(own: &Paths) -> Vec<Paths> {
    let Ok(entries) = fs::read_dir(&own.base) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| Paths { base: own.base.clone(), name: entry.file_name().to_string_lossy().into_owned() })
        .filter(|paths| paths.name != own.name)
        .collect()
}

/// Which running instance of this network namespace has a claim on this table or mark.
///
/// # Errors
/// Where the state of another instance cannot be read.
pub fn claimed_by_another(own: &Paths, table: u32, mark: Mark) -> Result<Option<String>, Error> {
    for other in others(own) {
        let Some(pid) = other.running()? else {
            continue;
        };
        let Some(state) = other.read_state()? else {
            continue;
        };
        let Some(claim) = state.journal.routing.filter(|_| state.netns == state::netns()) else {
            continue;
        };
        let their_mark = Mark { value: claim.mark, mask: claim.mask };
        let name = &other.name;
        if claim.table == table {
            return Ok(Some(format!(
                "routing table {table} is used by instance '{name}' (pid {pid}); choose another with --table"
            )));
        }
        if their_mark.overlaps(mark) {
            return Ok(Some(format!(
                "mark {mark} overlaps mark {their_mark} of instance '{name}' (pid {pid}); choose other bits with --tproxy-mark"
            )));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
