//! Removes labs: dropped ones, interrupted ones, those of a process that died.
//!
//! Everything is found by the lab's name alone, so all three ways are one.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind as Kind, signal};

/// One directory a lab; whoever holds the lock in it owns the lab.
const ROOT: &str = "/run/tproxy-lab";
const LOCK: &str = "lock";
const BPFFS: &str = "/sys/fs/bpf";
const INSTANCES: &str = "/run/tproxy";

/// Labs and child processes of this process, for [`on_signals`].
static LABS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static CHILDREN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// The pin directory of a lab's proxy.
pub(crate) fn pin(name: &str) -> PathBuf {
    Path::new(BPFFS).join(name)
}

/// Makes a lab's directory, after removing the labs that nobody owns any more.
pub(crate) fn claim(name: &str) -> Result<(PathBuf, File)> {
    fs::create_dir_all(ROOT).with_context(|| format!("cannot make {ROOT} (needs root)"))?;
    // Held while a directory exists whose lock is not yet taken.
    let making = File::create(Path::new(ROOT).join(".making"))?;
    making.lock()?;
    for abandoned in abandoned()? {
        remove(&abandoned);
    }
    let dir = Path::new(ROOT).join(name);
    fs::create_dir_all(&dir)?;
    let claim = File::create(dir.join(LOCK))?;
    claim.lock()?;
    held(&LABS).insert(name.to_owned());
    Ok((dir, claim))
}

fn abandoned() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(ROOT)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        let owned = match File::open(entry.path().join(LOCK)) {
            Ok(lock) => matches!(lock.try_lock(), Err(TryLockError::WouldBlock)),
            Err(_) => false,
        };
        if !owned {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// Removes a lab: its processes, namespaces, pins and files. What is already
/// gone is no error; what cannot be removed is reported, for nobody could act on it.
pub(crate) fn remove(name: &str) {
    let namespaces: Vec<PathBuf> = ["c", "r", "s", "g"]
        .iter()
        .map(|role| Path::new("/run/netns").join(format!("{name}-{role}")))
        .filter(|path| path.exists())
        .collect();
    kill_inside(&namespaces);
    for namespace in &namespaces {
        match delete(namespace) {
            // Both a signal and the end of what was interrupted remove a lab.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                eprintln!("cannot delete namespace {}: {error}", namespace.display());
            }
            _ => {}
        }
    }
    let mut leftovers = vec![Path::new(ROOT).join(name)];
    for place in [BPFFS, INSTANCES] {
        // A lab may run several instances of the proxy: NAME, NAME-b, …
        let entries = fs::read_dir(place).into_iter().flatten().filter_map(Result::ok);
        leftovers.extend(entries.map(|entry| entry.path()).filter(|path| {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            file == name || file.strip_prefix(name).is_some_and(|rest| rest.starts_with('-'))
        }));
    }
    for path in leftovers {
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                eprintln!("cannot remove {}: {error}", path.display());
            }
            _ => {}
        }
    }
    held(&LABS).remove(name);
}

/// As `ip netns delete` does. EINVAL: it was never mounted.
fn delete(namespace: &Path) -> io::Result<()> {
    match umount2(namespace, MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL) => fs::remove_file(namespace),
        Err(error) => Err(error.into()),
    }
}

/// Kills every process whose network namespace is one of these.
fn kill_inside(namespaces: &[PathBuf]) {
    let inodes: Vec<u64> =
        namespaces.iter().filter_map(|path| fs::metadata(path).ok()).map(|file| file.ino()).collect();
    for _ in 0..100 {
        let inside: Vec<i32> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|file| inodes.contains(&file.ino()))
            })
            .collect();
        if inside.is_empty() {
            return;
        }
        for pid in inside {
            // ESRCH: it ended meanwhile.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(20));
    }
    eprintln!("some processes of the lab do not end");
}

/// Has SIGINT, SIGTERM and SIGHUP end the children of [`supervise`] and remove
/// the labs before they end this process. To be called first thing in `main`.
///
/// # Errors
/// Where the signals cannot be caught.
pub fn on_signals() -> Result<()> {
    static ONCE: OnceLock<()> = OnceLock::new();
    if ONCE.set(()).is_err() {
        return Ok(());
    }
    // Handlers, not a blocked mask: children would inherit that.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let context = runtime.enter();
    let mut caught = (signal(Kind::interrupt())?, signal(Kind::terminate())?, signal(Kind::hangup())?);
    drop(context);
    thread::Builder::new().name("signals".into()).spawn(move || {
        let number = runtime.block_on(async {
            tokio::select! {
                _ = caught.0.recv() => Signal::SIGINT,
                _ = caught.1.recv() => Signal::SIGTERM,
                _ = caught.2.recv() => Signal::SIGHUP,
            }
        });
        end(number);
    })?;
    Ok(())
}

fn end(signal: Signal) -> ! {
    let children: Vec<u32> = held(&CHILDREN).iter().copied().collect();
    for pid in children.iter().filter_map(|pid| i32::try_from(*pid).ok()) {
        // ESRCH: it ended meanwhile.
        let _ = kill(Pid::from_raw(pid), signal);
    }
    let labs: Vec<String> = held(&LABS).iter().cloned().collect();
    for lab in &labs {
        eprintln!("{signal}: removing network lab {lab}");
        remove(lab);
    }
    // A child removes its own labs; it is given the time to.
    for _ in 0..100 {
        if children.iter().all(|pid| !held(&CHILDREN).contains(pid)) {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    std::process::exit(128 + signal as i32);
}

/// A child process that gets this process's signals too, while the value lives.
#[derive(Debug)]
pub struct Supervised(u32);

/// Passes SIGINT, SIGTERM and SIGHUP on to a child from now on.
#[must_use]
pub fn supervise(pid: u32) -> Supervised {
    held(&CHILDREN).insert(pid);
    Supervised(pid)
}

impl Drop for Supervised {
    fn drop(&mut self) {
        held(&CHILDREN).remove(&self.0);
    }
}

/// The sets stay consistent whatever panics: each change is one call.
fn held<T>(set: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    set.lock().unwrap_or_else(PoisonError::into_inner)
}
