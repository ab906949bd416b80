//! bpf-linker: the linker of the BPF target.
//!
//! It reads the compiler's bitcode, so it has to use the same LLVM. It is
//! therefore linked with the very library that the compiler runs with: that
//! needs no development package of LLVM, and no two versions can differ.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

use crate::{
    compiler::{Llvm, Toolchain},
    term::{self, Step},
    workspace,
};

/// The version that was tried with this workspace's eBPF crates.
const VERSION: &str = "0.13.0";

/// Finds or builds the bpf-linker that suits a toolchain; returns the directory
/// of the program.
///
/// # Errors
/// It cannot be built: no network to the crate registry, no C compiler.
pub(crate) fn ensure(toolchain: &Toolchain) -> Result<PathBuf> {
    let soname = toolchain
        .llvm
        .library
        .file_name()
        .and_then(|name| name.to_str())
        .context("the LLVM library has no file name")?;
    let directory = workspace::target().join("tools").join(format!("bpf-linker-{VERSION}-{soname}"));
    let prefix = directory.join("llvm");
    point_to(&prefix.join("lib"), &toolchain.llvm, soname)
        .with_context(|| format!("cannot set up {}", prefix.display()))?;
    let bin = directory.join("bin");
    if works(&bin.join("bpf-linker")) {
        return Ok(bin);
    }
    term::say(&format!(
        "building bpf-linker {VERSION}, the linker of the eBPF programs, against LLVM {} (once, about a minute)",
        toolchain.llvm.major
    ));
    let build = workspace::target().join("tools/build");
    Step::new("building bpf-linker", "bpf-linker").run(
        workspace::cargo("install")
            .args(["bpf-linker", "--version", VERSION, "--locked", "--force"])
            .args(["--no-default-features", "--features"])
            .arg(format!("llvm-{}", toolchain.llvm.major))
            .arg("--root")
            .arg(&directory)
            .arg("--target-dir")
            .arg(&build)
            .env("LLVM_PREFIX", &prefix)
            // Its time goes into LLVM's code; this halves the time to build it.
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
    )?;
    fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))?;
    Ok(bin)
}

/// Makes a directory with the LLVM library under the name that the linker of
/// the host asks for, and under the one that the loader does.
fn point_to(directory: &Path, llvm: &Llvm, soname: &str) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for name in ["libLLVM.so", soname] {
        let link = directory.join(name);
        if fs::read_link(&link).is_ok_and(|target| target == llvm.library) {
            continue;
        }
        match fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => symlink(&llvm.library, &link)?,
        }
    }
    Ok(())
}

/// Whether the program is there and finds its libraries: the compiler may have
/// been replaced, or the checkout moved, since it was built.
fn works(program: &Path) -> bool {
    Command::new(program)
        .arg("--version")
        .env_remove("LD_LIBRARY_PATH")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
