//! The BPF file system and the pin directory.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

/// A pin directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// No BPF file system, and none could be mounted.
    #[error("cannot mount the BPF file system on /sys/fs/bpf: {0}; mount it: mount -t bpf bpf /sys/fs/bpf")]
    Mount(#[source] nix::Error),
    /// The directory is on another file system.
    #[error("{0} is not on a BPF file system; choose a pin directory below /sys/fs/bpf")]
    NotBpf(PathBuf),
    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

const MOUNT_POINT: &str = "/sys/fs/bpf";

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// Makes the pin directory (mode 0700), mounting the BPF file system where the
/// host has not done so.
///
/// # Errors
///
/// [`PinError`].
pub fn create(pin: &Path) -> Result<(), PinError> {
    if pin.starts_with(MOUNT_POINT) && !is_bpffs(Path::new(MOUNT_POINT)) {
        mount(Some("bpf"), MOUNT_POINT, Some("bpf"), MsFlags::empty(), None::<&str>)
            .map_err(PinError::Mount)?;
    }
    let links = links(pin);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&links).map_err(error(&links))?;
    if is_bpffs(&links) { Ok(()) } else { Err(PinError::NotBpf(pin.to_owned())) }
}

/// Where the links are pinned.
#[must_use]
pub fn links(pin: &Path) -> PathBuf {
    pin.join("links")
}

/// Removes every pin below the directory and the directory. A link of which
/// this was the last reference detaches its program. Returns the pins in words;
/// a directory that does not exist has none.
///
/// # Errors
///
/// [`PinError::Io`] names the pin that would not go.
pub fn remove(pin: &Path) -> Result<Vec<String>, PinError> {
    if pin.exists() && !is_bpffs(pin) {
        return Err(PinError::NotBpf(pin.to_owned()));
    }
    // Programs first, then the maps that they use.
    let mut removed = remove_replaced(pin)?;
    removed.extend(remove_files(&links(pin), |_| true)?);
    remove_dir(&links(pin))?;
    removed.extend(remove_maps(pin)?);
    remove_dir(pin)?;
    Ok(removed)
}

/// Makes room for the pins of a new run. The programs of a killed one stay
/// attached, so that `fail = closed` has no gap, until [`remove_replaced`].
///
/// # Errors
///
/// [`PinError`].
pub fn set_aside(pin: &Path) -> Result<(), PinError> {
    if !pin.exists() {
        return Ok(());
    }
    if !is_bpffs(pin) {
        return Err(PinError::NotBpf(pin.to_owned()));
    }
    remove_replaced(pin)?;
    match std::fs::rename(links(pin), replaced(pin)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(error(&links(pin))(e)),
        _ => {}
    }
    remove_maps(pin)?;
    Ok(())
}

/// Removes the links that were set aside: their programs are detached.
///
/// # Errors
///
/// [`PinError::Io`] names the pin that would not go.
pub fn remove_replaced(pin: &Path) -> Result<Vec<String>, PinError> {
    let removed = remove_files(&replaced(pin), |_| true)?;
    remove_dir(&replaced(pin))?;
    Ok(removed)
}

fn replaced(pin: &Path) -> PathBuf {
    pin.join("replaced")
}

fn remove_maps(pin: &Path) -> Result<Vec<String>, PinError> {
    remove_files(pin, |name| name != "links" && name != "replaced")
}

/// Removes the pinned links of one interface, which is gone or has another part now.
///
/// # Errors
///
/// [`PinError::Io`] names the pin that would not go.
pub fn remove_links(pin: &Path, ifindex: u32) -> Result<Vec<String>, PinError> {
    let prefix = format!("{ifindex}_");
    remove_files(&links(pin), |name| name.starts_with(&prefix))
}

fn error(path: &Path) -> impl FnOnce(io::Error) -> PinError {
    let path = path.to_owned();
    move |source| PinError::Io { path, source }
}

fn remove_files(dir: &Path, which: impl Fn(&str) -> bool) -> Result<Vec<String>, PinError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(error(dir)(e)),
    };
    let mut removed = Vec::new();
    for entry in entries {
        let entry = entry.map_err(error(dir))?;
        if which(&entry.file_name().to_string_lossy()) {
            let path = entry.path();
            std::fs::remove_file(&path).map_err(error(&path))?;
            removed.push(format!("the pin {}", path.display()));
        }
    }
    Ok(removed)
}

fn remove_dir(dir: &Path) -> Result<(), PinError> {
    match std::fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(error(dir)(e)),
        _ => Ok(()),
    }
}
