//! QEMU: the system's or, where that cannot be installed, one that is unpacked below `target/vm`.
//!
//! Other packages of QEMU that are of another version, as `qemu-utils` from elsewhere, keep it out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::packages::{self, find};
use crate::term::{Step, say};
use crate::{needs, workspace};

const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";
/// Where the packages keep what is loaded into a guest before its kernel.
const DATA: [&str; 3] = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];
const LIMIT: Duration = Duration::from_mins(5);

/// A QEMU that can be run.
#[derive(Clone, Debug)]
pub(crate) struct Qemu {
    /// Where it is unpacked; `None`: it is installed.
    root: Option<PathBuf>,
}

impl Qemu {
    /// Installs it, or unpacks it.
    ///
    /// # Errors
    /// Neither can be done.
    pub(crate) fn ensure() -> Result<Self> {
        let root = workspace::target().join("vm/qemu/root");
        if find(PROGRAM).is_none() && root.is_dir() {
            return Ok(Self { root: Some(root) });
        }
        match packages::ensure(&[needs::QEMU]) {
            Ok(()) => Ok(Self { root: None }),
            Err(error) => {
                say(&format!("QEMU is unpacked below {}, since {error:#}", root.display()));
                unpack(&root).context("cannot unpack QEMU")?;
                Ok(Self { root: Some(root) })
            }
        }
    }

    pub(crate) fn command(&self) -> Command {
        let Some(root) = &self.root else { return Command::new(PROGRAM) };
        let mut command = Command::new(root.join("usr/bin").join(PROGRAM));
        let libraries = ["usr/lib", "lib"].map(|lib| root.join(lib).join("x86_64-linux-gnu"));
        command.env("LD_LIBRARY_PATH", libraries.map(|path| path.display().to_string()).join(":"));
        for data in DATA {
            command.arg("-L").arg(root.join(data));
        }
        command
    }
}

/// Unpacks it with the libraries that this system does not have.
fn unpack(root: &Path) -> Result<()> {
    let dir = root.with_file_name("new");
    let debs = root.with_file_name("debs");
    for scratch in [&dir, &debs] {
        if scratch.exists() {
            fs::remove_dir_all(scratch)?;
        }
        fs::create_dir_all(scratch)?;
    }
    let missing = packages::missing_for(PACKAGE)?;
    let mut download = Command::new("apt-get");
    download.args(["-q", "-o", "APT::Sandbox::User=root", "download"]).args(&missing).current_dir(&debs);
    Step::new("downloading QEMU", "vm-qemu-download").limit(LIMIT).run(&mut download)?;
    for deb in fs::read_dir(&debs)? {
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("-x").arg(deb?.path()).arg(&dir);
        Step::new("unpacking QEMU", "vm-qemu-unpack").limit(LIMIT).run(&mut unpack)?;
    }
    fs::remove_dir_all(&debs)?;
    Ok(fs::rename(&dir, root)?)
}
