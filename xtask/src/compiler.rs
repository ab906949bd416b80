//! A Rust compiler, and whether it can build for the BPF target.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::workspace;

/// The LLVM versions that the chosen bpf-linker has a feature for.
const LLVM_VERSIONS: std::ops::RangeInclusive<u32> = 21..=23;

/// A compiler that can build for the BPF target.
#[derive(Debug)]
pub(crate) struct Toolchain {
    /// What it is, for people: origin, version, LLVM.
    pub(crate) label: String,
    /// The LLVM whose bitcode it emits.
    pub(crate) llvm: Llvm,
    rustc: PathBuf,
    cargo: PathBuf,
    sysroot: PathBuf,
}

/// The LLVM of a compiler.
#[derive(Debug)]
pub(crate) struct Llvm {
    /// The major version.
    pub(crate) major: u32,
    /// The shared library that the compiler itself runs with.
    pub(crate) library: PathBuf,
}

impl Toolchain {
    /// This toolchain's cargo, with an environment that holds nothing of the
    /// cargo that runs this task and no setting that changes the code.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.cargo);
        command.arg(subcommand).current_dir(workspace::root());
        for (name, _) in env::vars_os() {
            if name.to_str().is_some_and(changes_the_build) {
                command.env_remove(name);
            }
        }
        command.env("RUSTC", &self.rustc).env("RUSTC_BOOTSTRAP", "1");
        command
    }

    /// Where the compiler and its library source lie.
    pub(crate) fn sysroot(&self) -> &Path {
        &self.sysroot
    }

    /// The directory of the compiler's own programs, clippy among them.
    pub(crate) fn bin(&self) -> &Path {
        self.rustc.parent().unwrap_or(&self.sysroot)
    }
}

fn changes_the_build(name: &str) -> bool {
    const PREFIXES: [&str; 5] =
        ["RUST", "CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_UNSTABLE_"];
    const KEPT: [&str; 4] = ["CARGO_BUILD_JOBS", "RUSTUP_HOME", "RUST_BACKTRACE", "RUST_LOG"];
    !KEPT.contains(&name)
        && (workspace::is_of_outer_run(name)
            || matches!(name, "CARGO_ENCODED_RUSTFLAGS" | "CARGO_INCREMENTAL")
            || PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
}

/// Why a compiler will not do.
#[derive(Debug)]
pub(crate) enum Unfit {
    Absent,
    NoSource,
    Other(String),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("not there"),
            Self::NoSource => f.write_str("without the library source"),
            Self::Other(why) => f.write_str(why),
        }
    }
}

/// Looks whether a compiler will do.
pub(crate) fn inspect(origin: &str, rustc: &Path) -> Result<Toolchain, Unfit> {
    if !rustc.is_file() {
        return Err(Unfit::Absent);
    }
    let cargo = rustc.with_file_name("cargo");
    let verbose = output(Command::new(rustc).arg("-vV")).map_err(Unfit::Other)?;
    let release = field(&verbose, "release: ")?;
    let minimum = parse_version(env!("CARGO_PKG_RUST_VERSION"));
    if parse_version(release) < minimum {
        let needed = env!("CARGO_PKG_RUST_VERSION");
        return Err(Unfit::Other(format!("version {release}, {needed} is needed")));
    }
    let version = field(&verbose, "LLVM version: ")?;
    let major = parse_version(version).map_or(0, |(major, _)| major);
    if !LLVM_VERSIONS.contains(&major) {
        return Err(Unfit::Other(format!(
            "its LLVM {version} is none that bpf-linker knows ({} to {})",
            LLVM_VERSIONS.start(),
            LLVM_VERSIONS.end()
        )));
    }
    let sysroot = output(Command::new(rustc).args(["--print", "sysroot"])).map_err(Unfit::Other)?;
    // Debian's prints "/.": the real one is where its rustlib lies.
    let sysroot = Path::new(sysroot.trim());
    let sysroot = [sysroot, Path::new("/usr")]
        .into_iter()
        .find(|root| root.join("lib/rustlib").is_dir())
        .unwrap_or(sysroot)
        .to_owned();
    if !sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file() {
        return Err(Unfit::NoSource);
    }
    if !cargo.is_file() {
        return Err(Unfit::Other(format!("{} is not there", cargo.display())));
    }
    let library = llvm_library(rustc)?;
    Ok(Toolchain {
        label: format!("{origin}, Rust {release}, LLVM {version}"),
        llvm: Llvm { major, library },
        rustc: rustc.to_owned(),
        cargo,
        sysroot,
    })
}

/// The LLVM library that the compiler is linked with, as the loader finds it.
fn llvm_library(rustc: &Path) -> Result<PathBuf, Unfit> {
    let loaded = output(Command::new("ldd").arg(rustc)).map_err(Unfit::Other)?;
    parse_ldd(&loaded).ok_or_else(|| {
        Unfit::Other("LLVM is built into it, so that bpf-linker cannot use the same one".to_owned())
    })
}

fn parse_ldd(output: &str) -> Option<PathBuf> {
    output.lines().map(str::trim).filter(|line| line.starts_with("libLLVM")).find_map(|line| {
        let (_, path) = line.split_once(" => ")?;
        let (path, _) = path.rsplit_once(" (")?;
        Some(PathBuf::from(path))
    })
}

/// Major and minor of a version such as `1.96.0+dfsg1-1`.
pub(crate) fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn field<'a>(text: &'a str, name: &str) -> Result<&'a str, Unfit> {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .ok_or_else(|| Unfit::Other(format!("`rustc -vV` prints no `{}`", name.trim())))
}

pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    // The outer cargo's library path would lead a compiler to another's libraries.
    let output = command
        .env_remove("LD_LIBRARY_PATH")
        .env_remove("RUSTC")
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{program}: {}", output.status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        assert_eq!(parse_version("1.96.0+dfsg1-1~deb12u2"), Some((1, 96)));
        assert_eq!(parse_version("1.101.0-nightly"), Some((1, 101)));
        assert_eq!(parse_version("22.1.8"), Some((22, 1)));
        assert_eq!(parse_version("unknown"), None);
        assert!(parse_version("1.9.0") < parse_version("1.95"));
    }

    #[test]
    fn the_llvm_of_a_compiler_is_read_from_ldd() {
        let output = "\tlibz.so.1 => /lib/libz.so.1 (0x1)\n\
                      \tlibLLVM.so.22.1 => /lib/x86_64-linux-gnu/libLLVM.so.22.1 (0x00007fa0d1a00000)\n";
        assert_eq!(parse_ldd(output), Some(PathBuf::from("/lib/x86_64-linux-gnu/libLLVM.so.22.1")));
        assert_eq!(parse_ldd("\tlibLLVM.so.22.1 => not found\n"), None);
    }

    #[test]
    fn settings_that_change_code_do_not_reach_the_build() {
        for name in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTUP_TOOLCHAIN", "CARGO_TARGET_DIR"] {
            assert!(changes_the_build(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_BUILD_JOBS", "PATH", "HOME"] {
            assert!(!changes_the_build(name), "{name}");
        }
    }
}
