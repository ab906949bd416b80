//! `cargo xtask build-ebpf`: the eBPF objects, and `tproxy-user` that embeds them.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::{
    compiler::Toolchain,
    install, linker, packages,
    term::{self, Step},
    toolchain, workspace,
};

/// Flags of `cargo xtask build-ebpf`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build only the eBPF objects, not the tproxy-user that embeds them
    #[arg(long)]
    object_only: bool,
}

/// How the userspace is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "the quick build is for tests")]
pub(crate) enum Profile {
    /// Quick to build.
    Dev,
    /// Quick to run.
    Release,
}

/// What a build leaves.
#[derive(Debug)]
#[allow(dead_code, reason = "the objects are for tests")]
pub(crate) struct Artifacts {
    /// The userspace program, with both objects in it.
    pub(crate) tproxy_user: PathBuf,
    /// The default object: needs only what Linux 5.7 has.
    pub(crate) object: PathBuf,
    /// The object that logs each decision: needs Linux 5.8.
    pub(crate) object_log: PathBuf,
}

/// The two eBPF objects.
#[derive(Debug)]
pub(crate) struct Objects {
    default: PathBuf,
    log: PathBuf,
    /// The compiler had something to say, and it has been printed.
    pub(crate) warned: bool,
}

/// The C compiler links every build script, and bpf-linker.
const C_COMPILER: packages::Need = packages::Need::new("cc", "gcc", "linking");

/// Runs the task.
pub(crate) fn run(args: &Args) -> Result<()> {
    let (lock, toolchain) = prepare()?;
    let objects = objects(&toolchain)?;
    for object in [&objects.default, &objects.log] {
        println!("{}", describe(object)?);
    }
    println!("compiled by: {}", toolchain.label);
    if args.object_only {
        return Ok(());
    }
    let program = userspace(Profile::Release)?;
    drop(lock);
    install::into_path(&program)
}

/// Finds or installs what the build needs, builds everything, and returns where
/// it is. Quick when there is nothing to do.
///
/// # Errors
/// Nothing that can build is there or can be installed, or the build fails.
pub(crate) fn ensure_all(profile: Profile) -> Result<Artifacts> {
    let (_lock, toolchain) = prepare()?;
    let objects = objects(&toolchain)?;
    Ok(Artifacts { tproxy_user: userspace(profile)?, object: objects.default, object_log: objects.log })
}

/// Sets up the toolchain, alone among the tasks that run in this checkout.
pub(crate) fn prepare() -> Result<(File, Toolchain)> {
    let lock = lock()?;
    packages::ensure(&[C_COMPILER])?;
    Ok((lock, toolchain::ensure()?))
}

/// Keeps two tasks from installing or replacing the same files at once.
pub(crate) fn lock() -> Result<File> {
    let path = workspace::target().join("xtask.lock");
    fs::create_dir_all(workspace::target())?;
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            term::say("waiting for another `cargo xtask` in this checkout");
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    Ok(file)
}

/// Builds both objects.
pub(crate) fn objects(toolchain: &Toolchain) -> Result<Objects> {
    let linker = linker::ensure(toolchain)?;
    let target = bpf_target();
    let built = target.join("bpfel-unknown-none/release/tproxy");
    let directory = workspace::bpf_dir();
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let mut warned = false;
    let mut make = |file: &str, label: &str, features: &[&str]| -> Result<PathBuf> {
        let mut cargo = bpf_cargo(toolchain, &linker, "build", &target)?;
        let log = Step::new(label, "build-ebpf").run(cargo.args(features))?;
        warned |= show_warnings(&log)?;
        let object = directory.join(file);
        replace_if_changed(&object, &fs::read(&built)?)?;
        Ok(object)
    };
    let default = make("tproxy.o", "building the eBPF object", &[])?;
    let log = make("tproxy-log.o", "building the eBPF object that logs", &["--features", "log"])?;
    Ok(Objects { default, log, warned })
}

/// The toolchain's cargo, set up to compile the eBPF crate for its target.
///
/// The object must not depend on where the checkout, the crate registry or the
/// compiler lie: their paths are cut out of the debug information.
pub(crate) fn bpf_cargo(
    toolchain: &Toolchain,
    linker: &Path,
    subcommand: &str,
    target: &Path,
) -> Result<std::process::Command> {
    let mut flags: Vec<String> =
        ["-C", "debuginfo=2", "-C", "link-arg=--btf", "-C", "link-arg=--disable-expand-memcpy-in-order"]
            .map(str::to_owned)
            .into();
    let library = toolchain.sysroot().join("lib/rustlib/src/rust");
    let real_library = library.canonicalize().unwrap_or_else(|_| library.clone());
    let mut moved = vec![
        (workspace::root().to_owned(), "/tproxy"),
        (cargo_home().join("registry/src"), "/registry"),
        (library.clone(), "/rust"),
    ];
    if real_library != library {
        moved.push((real_library, "/rust"));
    }
    for (from, to) in moved {
        let from = from.to_str().with_context(|| format!("{} is not UTF-8", from.display()))?;
        flags.push(format!("--remap-path-prefix={from}={to}"));
    }
    let mut path = linker.as_os_str().to_owned();
    path.push(":");
    path.push(toolchain.bin());
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    let mut command = toolchain.cargo(subcommand);
    command
        .args(["--locked", "--release", "--package", "tproxy-ebpf"])
        .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"])
        .arg("--target-dir")
        .arg(target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("PATH", path);
    Ok(command)
}

/// The target directory of the eBPF build. It is one of its own: the outer
/// cargo may hold the lock of the usual one.
pub(crate) fn bpf_target() -> PathBuf {
    workspace::target().join("bpf-build")
}

fn cargo_home() -> PathBuf {
    std::env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    )
}

/// Builds `tproxy-user` and returns where cargo put it.
pub(crate) fn userspace(profile: Profile) -> Result<PathBuf> {
    program("tproxy-user", profile)
}

/// Builds the program of a package of the same name, and returns where cargo put it.
pub(crate) fn program(name: &str, profile: Profile) -> Result<PathBuf> {
    let mut cargo = workspace::cargo("build");
    cargo.args(["--package", name, "--bin", name]);
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    executable_of(cargo, name)
}

/// Builds a benchmark of `tproxy-user`, as tests are built, and returns where cargo put it.
pub(crate) fn benchmark(name: &str) -> Result<PathBuf> {
    let mut cargo = workspace::cargo("test");
    cargo.args(["--no-run", "--package", "tproxy-user", "--bench", name]);
    executable_of(cargo, name)
}

/// Runs a build of cargo's, and returns where it put this program.
fn executable_of(mut cargo: Command, name: &str) -> Result<PathBuf> {
    let messages = workspace::target().join(format!("log/{name}.json"));
    cargo.args(["--locked", "--message-format", "json-render-diagnostics"]);
    if let Some(parent) = messages.parent() {
        fs::create_dir_all(parent)?;
    }
    let log = Step::new(&format!("building {name}"), name).stdout(&messages).run(&mut cargo)?;
    show_warnings(&log)?;
    let messages = fs::read_to_string(&messages)?;
    executable(&messages, name).with_context(|| format!("cargo built no {name}"))
}

/// Finds the program among cargo's messages.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

/// A build that succeeds says nothing, but for its warnings; whether it had any.
fn show_warnings(log: &Path) -> Result<bool> {
    let text = fs::read_to_string(log)?;
    let warned = text.lines().any(|line| line.starts_with("warning"));
    if warned {
        let shown: Vec<&str> = text.lines().filter(|line| !is_status(line)).collect();
        term::say(shown.join("\n").trim_end());
    }
    Ok(warned)
}

/// Whether this is one of cargo's lines about its progress: a verb, right-aligned
/// to twelve columns.
fn is_status(line: &str) -> bool {
    line.get(..12).is_some_and(|verb| {
        verb.starts_with(' ')
            && verb.trim_start().starts_with(|c: char| c.is_ascii_uppercase())
            && verb.trim_start().chars().all(char::is_alphabetic)
    })
}

/// Writes a file at once or not at all, and not when it holds that already:
/// its time decides whether cargo builds what embeds it again.
fn replace_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let new = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file = File::create(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// One line: path, size, hash.
fn describe(path: &Path) -> Result<String> {
    use std::fmt::Write as _;
    let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if content.is_empty() {
        bail!("{} is empty", path.display());
    }
    let mut hash = String::new();
    for byte in Sha256::digest(&content) {
        write!(hash, "{byte:02x}")?;
    }
    let shown = path.strip_prefix(workspace::root()).unwrap_or(path);
    Ok(format!("{} {} bytes sha256:{hash}", shown.display(), content.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_from_warnings() {
        assert!(is_status("   Compiling syn v2.0.119"));
        assert!(is_status("    Finished `release` profile [optimized]"));
        assert!(!is_status("warning: unreachable `pub` item"));
        assert!(!is_status("  --> tproxy-ebpf/src/main.rs:10:1"));
        assert!(!is_status("   | |"));
    }

    #[test]
    fn the_program_is_found_among_the_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"anyhow"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"tproxy-user"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"tproxy-user"},"executable":"/t/debug/tproxy-user"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "tproxy-user"), Some(PathBuf::from("/t/debug/tproxy-user")));
        assert_eq!(executable("no json", "tproxy-user"), None);
    }
}
