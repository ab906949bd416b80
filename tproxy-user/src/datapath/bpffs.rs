//! The BPF file system and the pin directory.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use tproxy_common::abi::{map, program};

use crate::failure::Failure;

/// A pin directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// No BPF file system, and none could be mounted.
    #[error("cannot mount the BPF file system on /sys/fs/bpf: {0}; mount it: mount -t bpf bpf /sys/fs/bpf")]
    Mount(#[source] nix::Error),
    /// The directory is on another file system.
    #[error("--pin")]
    NotBpf(#[source] Failure),
    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Where the BPF file system belongs.
pub(crate) const MOUNT_POINT: &str = "/sys/fs/bpf";

/// Whether a path is on a BPF file system.
pub(crate) fn is_bpffs(path: &Path) -> bool {
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
    // Before anything is made.
    if !pin.ancestors().find(|path| path.exists()).is_some_and(is_bpffs) {
        return Err(PinError::NotBpf(Failure::usage(format_args!(
            "{} is not on a BPF file system; choose a directory below {MOUNT_POINT}",
            pin.display()
        ))));
    }
    let links = links(pin);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&links).map_err(error(&links))
}

/// Where the links are pinned.
#[must_use]
pub fn links(pin: &Path) -> PathBuf {
    pin.join("links")
}

/// Removes all that this program pins below the directory, and the directory
/// once it is empty. A link of which this was the last reference detaches its
/// program. Returns the pins in words; a directory that does not exist, or is
/// on another file system, has none.
///
/// # Errors
///
/// [`PinError::Io`] names the pin that would not go.
pub fn remove(pin: &Path) -> Result<Vec<String>, PinError> {
    if !is_bpffs(pin) {
        return Ok(Vec::new());
    }
    // Programs first, then the maps that they use.
    let mut removed = remove_replaced(pin)?;
    removed.extend(remove_files(&links(pin), is_link)?);
    remove_dir(&links(pin))?;
    removed.extend(remove_maps(pin)?);
    remove_dir(pin)?;
    Ok(removed)
}

/// Whether a pin has a name as [`attach`](super::attach) gives: the user may
/// name a directory in which others have pins too.
fn is_link(name: &str) -> bool {
    let program = match name.split_once('_') {
        Some((index, program)) if index.parse::<u32>().is_ok() => program,
        _ => return [program::LOOKUP, program::GROUP].contains(&name),
    };
    [program::CAPTURE, program::UPLINK, program::NAT, program::REPLY, program::OWN, program::LOOPBACK]
        .contains(&program)
}

/// Makes room for the pins of a new run. The programs of a killed one stay
/// attached, so that `fail = closed` has no gap, until [`remove_replaced`].
///
/// # Errors
///
/// [`PinError`].
pub fn set_aside(pin: &Path) -> Result<(), PinError> {
    if !is_bpffs(pin) {
        return Ok(());
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
    let removed = remove_files(&replaced(pin), is_link)?;
    remove_dir(&replaced(pin))?;
    Ok(removed)
}

fn replaced(pin: &Path) -> PathBuf {
    pin.join("replaced")
}

fn remove_maps(pin: &Path) -> Result<Vec<String>, PinError> {
    remove_files(pin, |name| map::ALL.contains(&name))
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

/// Removes the pinned link of a program that is attached once; none is no error.
///
/// # Errors
///
/// [`PinError::Io`] where the pin would not go.
pub fn remove_link(pin: &Path, program: &str) -> Result<(), PinError> {
    let path = links(pin).join(program);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(error(&path)(e)),
        _ => Ok(()),
    }
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

/// Removes a directory, unless it is not there, holds pins of others, or is the mount point.
fn remove_dir(dir: &Path) -> Result<(), PinError> {
    use io::ErrorKind::{DirectoryNotEmpty, NotFound, ResourceBusy};
    match std::fs::remove_dir(dir) {
        Err(e) if !matches!(e.kind(), NotFound | DirectoryNotEmpty | ResourceBusy) => Err(error(dir)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_links_are_told_from_others() {
        for own in
            ["tproxy_lookup", "tproxy_group", "2_tproxy_capture", "4294967295_tproxy_lo", "7_tproxy_own"]
        {
            assert!(is_link(own), "{own}");
        }
        for other in ["", "_", "2_", "lookup", "x_tproxy_capture", "2_tproxy_captured", "2_tproxy_lookup"] {
            assert!(!is_link(other), "{other}");
        }
    }
}
