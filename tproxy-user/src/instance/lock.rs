//! A lock file. The kernel lets go of the lock when the process ends, however
//! it ends; asking who holds it does not take it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::Error;

/// A lock that is held.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Removes the file and lets go.
    pub(super) fn remove(self) {
        // Removed while locked: who opened it meanwhile sees that it is gone.
        drop(fs::remove_file(&self.path));
        drop(self.file);
    }
}

/// A write lock on a whole file that belongs to the open file (Linux 3.15).
#[expect(
    clippy::cast_possible_truncation,
    reason = "small constants that C has as int and the struct as short"
)]
const fn whole_file() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn open(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(Error::io("open", path))
}

/// Whether the file is still the one with this name.
fn is_current(file: &File, path: &Path) -> bool {
    let (Ok(ours), Ok(named)) = (file.metadata(), fs::metadata(path)) else {
        return false;
    };
    (ours.dev(), ours.ino()) == (named.dev(), named.ino())
}

/// A process that was killed holds its lock until the kernel has closed its
/// files, and a child between fork and exec holds it too: worth another look.
const LOOKS: u32 = 5;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// Takes the lock and writes our PID; `Err(pid)` where another holds it.
pub(super) fn acquire(path: &Path) -> Result<Result<Lock, i32>, Error> {
    let mut looks = 0;
    loop {
        let mut file = open(path)?;
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file())) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => {
                looks += 1;
                if looks == LOOKS {
                    return Ok(Err(read_pid(&mut file)));
                }
                std::thread::sleep(BETWEEN_LOOKS);
                continue;
            }
            Err(error) => return Err(Error::io("lock", path)(error.into())),
        }
        // Its former holder may have removed it between our two calls.
        if is_current(&file, path) {
            file.set_len(0)
                .and_then(|()| writeln!(file, "{}", std::process::id()))
                .map_err(Error::io("write", path))?;
            return Ok(Ok(Lock { file, path: path.to_owned() }));
        }
    }
}

/// Waits for a lock that is only ever held for a moment.
pub(super) fn wait(path: &Path) -> Result<File, Error> {
    loop {
        let file = open(path)?;
        fcntl(&file, FcntlArg::F_OFD_SETLKW(&whole_file()))
            .map_err(|error| Error::io("lock", path)(error.into()))?;
        if is_current(&file, path) {
            return Ok(file);
        }
    }
}

/// The PID in a lock file; -1 for that moment between lock and write.
fn read_pid(file: &mut File) -> i32 {
    let mut text = String::new();
    // A PID that cannot be read is shown as an unknown one: the lock counts.
    file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok()).unwrap_or(-1)
}

/// Who holds the lock, without taking it.
pub(super) fn holder(path: &Path) -> Result<Option<i32>, Error> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut lock = whole_file();
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock))
        .map_err(|error| Error::io("look at the lock", path)(error.into()))?;
    let held = i32::from(lock.l_type) != libc::F_UNLCK;
    Ok(held.then(|| read_pid(&mut file)))
}
