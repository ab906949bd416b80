//! An initramfs: a cpio archive in the format `newc`, see `cpio(5)` and the
//! kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// An archive under construction. Files bring their parent directories.
#[derive(Clone, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<PathBuf>,
}

impl Archive {
    /// Adds an empty directory; `name` is absolute, as in the guest.
    pub(crate) fn directory(&mut self, name: &Path) -> Result<()> {
        if name.parent().is_none() || !self.names.insert(name.to_owned()) {
            return Ok(());
        }
        self.parents(name)?;
        self.entry(name, DIRECTORY, &[])
    }

    /// Adds a file that is not to be run.
    pub(crate) fn file(&mut self, name: &Path, bytes: &[u8]) -> Result<()> {
        self.add(name, FILE, bytes)
    }

    /// Adds a file that may be run.
    pub(crate) fn program(&mut self, name: &Path, bytes: &[u8]) -> Result<()> {
        self.add(name, PROGRAM, bytes)
    }

    /// Adds a program of the host with the libraries that it needs, each once.
    pub(crate) fn host_program(&mut self, from: &Path, name: &Path) -> Result<()> {
        self.program(name, &read(from)?)?;
        let output = std::process::Command::new("ldd").arg(from).output().context("cannot run ldd")?;
        for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
            self.program(&library, &read(&library)?)?;
        }
        Ok(())
    }

    /// The archive, with the trailer that ends it.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry(Path::new("/TRAILER!!!"), 0, &[])?;
        Ok(self.bytes)
    }

    fn add(&mut self, name: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
        if !self.names.insert(name.to_owned()) {
            return Ok(());
        }
        self.parents(name)?;
        self.entry(name, mode, bytes)
    }

    fn parents(&mut self, name: &Path) -> Result<()> {
        name.parent().map_or(Ok(()), |parent| self.directory(parent))
    }

    fn entry(&mut self, name: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
        let name = name.strip_prefix("/")?.to_str().context("a file name that is no UTF-8")?;
        let inode = self.names.len();
        let length = u32::try_from(bytes.len()).with_context(|| format!("{name} is too large"))?;
        // Owner and group 0, one link, no time, no device, no checksum.
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{length:08x}{0:08x}{0:08x}{0:08x}{0:08x}{2:08x}{0:08x}",
            0,
            1,
            name.len() + 1
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(bytes);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The files that `ldd` names.
fn libraries(ldd: &str) -> Vec<PathBuf> {
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    ldd.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_bring_their_directories_and_are_aligned() {
        let mut archive = Archive::default();
        archive.file(Path::new("/etc/passwd"), b"root:").expect("a file");
        archive.file(Path::new("/etc/passwd"), b"again").expect("the first one stays");
        archive.directory(Path::new("/etc")).expect("is there already");
        let bytes = archive.finish().expect("an archive");
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("no {what}"));
        assert!(at("etc\0") < at("etc/passwd\0") && at("etc/passwd\0") < at("TRAILER!!!\0"));
        assert_eq!(text.matches("070701").count(), 3);
        // cpio(5): the header has 110 bytes; the size of the file is its seventh field.
        let header = at("etc/passwd\0") - 110;
        assert_eq!(&text[header + 54..header + 62], "00000005");
        assert!(text.contains("root:"));
    }

    #[test]
    fn libraries_are_found_by_path() {
        let ldd = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let paths = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(libraries(ldd), paths.map(PathBuf::from));
        assert_eq!(libraries("\tnot a dynamic executable\n"), Vec::<PathBuf>::new());
    }
}
