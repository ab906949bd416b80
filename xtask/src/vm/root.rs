//! What is in a guest: the tests, and the host's programs that they run.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use xtask::lab::selection::{self, Selection};
use xtask::lab::{pace, proxy};

use super::archive::Archive;
use crate::{needs, packages};

const INIT: &str = include_str!("init.sh");
const PROXY: &str = "/tests/tproxy-user";
/// What `init.sh` runs.
const RUN: &str = "/tests/run";
/// How much longer a guest may take than the machine itself, without
/// acceleration and beside another guest.
const SLOWDOWN: u32 = 10;
/// Tests at a time in a guest: some wait, while others use its processors.
const THREADS: usize = 6;
/// Programs that come with the packages of those that are asked for.
const COMPANIONS: &[&str] =
    &["tc", "ss", "ip6tables", "iptables-restore", "ip6tables-restore", "mount", "umount"];
/// Golden tests of whose kind the differential ones run a whole corpus (they load a
/// program for each packet, and in a guest that takes seconds), and what needs two processors.
const COVERED: [&str; 5] = ["capture::", "headers::", "link::", "sides::", "exchange::"];
/// Golden tests that are shared out: each kernel of the matrix runs the group of its part,
/// besides the tests that are in neither list.
const SHARED: [&str; 4] = ["listeners::", "fragments::", "names::", "verdicts::"];
/// Files that a program opens by itself: libraries that are not linked, tables.
const DATA: &[&str] = &[
    "/etc/protocols",
    "/etc/services",
    "/etc/ethertypes",
    "/usr/lib/x86_64-linux-gnu/xtables",
    "/usr/lib/x86_64-linux-gnu/libnss_files.so.2",
];

/// A test executable.
pub(crate) struct Test {
    /// `golden`, `netns`.
    pub(crate) name: String,
    /// Where cargo has put it.
    pub(crate) path: PathBuf,
}

/// What boots, and has a shell with its tools.
fn base() -> Result<Archive> {
    let mut archive = Archive::default();
    for dir in ["/proc", "/sys", "/dev", "/tmp", "/run", "/root"] {
        archive.directory(Path::new(dir))?;
    }
    archive.program(Path::new("/init"), INIT.as_bytes())?;
    archive
        .file(Path::new("/etc/passwd"), b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")?;
    archive.file(Path::new("/etc/group"), b"root:x:0:\nnogroup:x:65534:\n")?;
    archive.file(Path::new("/etc/nsswitch.conf"), b"passwd: files\ngroup: files\nhosts: files\n")?;
    // Not busybox's shell: Debian's runs its own `ip` whatever PATH says.
    archive.host_program(&found("dash")?, Path::new("/bin/sh"))?;
    archive.host_program(&found("busybox")?, Path::new("/bin/busybox"))?;
    Ok(archive)
}

/// A guest that runs one program, by a script in its directory.
pub(crate) fn of_program(program: &Path, script: &str) -> Result<Archive> {
    let mut archive = base()?;
    let name = program.file_name().context("a program without a name")?;
    archive.host_program(program, &Path::new("/tests").join(name))?;
    archive.program(Path::new(RUN), format!("cd /tests\n{script}").as_bytes())?;
    Ok(archive)
}

/// Everything but the modules and the choice of tests: the same for all kernels.
pub(crate) fn common(tests: &[Test], proxy: &Path) -> Result<Archive> {
    let mut archive = base()?;
    for dir in ["/var/log/nginx", "/var/lib/nginx"] {
        archive.directory(Path::new(dir))?;
    }
    for program in needs::NETNS.iter().map(packages::Need::probe).chain(COMPANIONS.iter().copied()) {
        let path = found(program)?;
        // Before the directory of busybox's own.
        let name = path.file_name().context("a program without a name")?;
        archive.host_program(&fs::canonicalize(&path)?, &Path::new("/usr/sbin").join(name))?;
    }
    for data in DATA.iter().map(Path::new) {
        add_data(&mut archive, data)?;
    }
    archive.host_program(proxy, Path::new(PROXY))?;
    for test in tests {
        archive.host_program(&test.path, &Path::new("/tests").join(&test.name))?;
    }
    Ok(archive)
}

fn found(program: &str) -> Result<PathBuf> {
    packages::find(program).with_context(|| format!("no {program} on this system"))
}

/// Adds a file, or the files of a directory; what this system has not is left out.
fn add_data(archive: &mut Archive, path: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            add_data(archive, &entry?.path())?;
        }
        return Ok(());
    }
    if path.is_file() { archive.program(path, &fs::read(path)?) } else { Ok(()) }
}

/// Adds the script that runs the tests; without a selection all of them.
pub(crate) fn add_run(
    archive: &mut Archive,
    tests: &[Test],
    filters: &[String],
    selection: Option<Selection>,
) -> Result<()> {
    let mut script = format!("cd /tests\nexport {}={PROXY} {}={SLOWDOWN}\n", proxy::BINARY, pace::SLOWDOWN);
    if let Some(selection) = selection {
        writeln!(script, "export {}='{selection}'", selection::VARIABLE)?;
    }
    // No other test has names that begin so.
    let skipped: String = match selection {
        Some(Selection { part, .. }) => {
            let others = SHARED.iter().enumerate().filter(|(number, _)| *number != part % SHARED.len());
            let others = others.map(|(_, module)| module);
            COVERED.iter().chain(others).flat_map(|module| [" --skip ", *module]).collect()
        }
        None => String::new(),
    };
    for Test { name, .. } in tests {
        let filters: Vec<String> = filters.iter().map(|filter| quoted(filter)).collect();
        let filters = filters.join(" ");
        writeln!(
            script,
            "echo 'begin {name}'; ./{name} --test-threads {THREADS}{skipped} {filters}; echo \"end {name} $?\""
        )?;
    }
    archive.program(Path::new(RUN), script.as_bytes())
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_reach_the_tests_as_they_are() {
        assert_eq!(quoted("T7"), "'T7'");
        assert_eq!(quoted("a'b; c"), r"'a'\''b; c'");
    }
}
