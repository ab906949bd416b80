//! `cargo xtask lint`: format, lints, manifests, dependencies.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{build, compiler::Toolchain, linker, packages, term, workspace};

/// Flags of `cargo xtask lint`.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// The fuzz targets are workspaces of their own. What they share with the tests is linted there.
const FUZZ: [&str; 2] = ["tproxy-common/fuzz/Cargo.toml", "tproxy-user/fuzz/Cargo.toml"];

/// What came of one check.
enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

/// Runs the task: every check, also after one that fails.
pub(crate) fn run(_args: &Args) -> Result<()> {
    // tproxy-user does not compile without the object that it embeds.
    let (lock, toolchain) = build::prepare()?;
    let warned = build::objects(&toolchain)?.warned;
    drop(lock);
    let checks = [
        ("members opt into the lints", members()?),
        ("format", cargo(workspace::cargo("fmt").args(["--all", "--check"]))?),
        ("format of the fuzz targets", format(FUZZ[0])?),
        ("format of those of tproxy-user", format(FUZZ[1])?),
        (
            "clippy",
            cargo(workspace::cargo("clippy").args(["--locked", "--all-targets", "--", "-D", "warnings"]))?,
        ),
        ("what fuzz targets take of tproxy-user", fuzzed()?),
        ("eBPF programs", ebpf(&toolchain, warned)?),
        ("cargo-deny", deny()?),
    ];
    let mut failed = Vec::new();
    for (name, outcome) in checks {
        match outcome {
            Outcome::Passed => println!("lint: {name}: passed"),
            Outcome::Skipped(why) => println!("lint: {name}: skipped: {why}"),
            Outcome::Failed(why) => {
                println!("lint: {name}: FAILED: {why}");
                failed.push(name);
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    bail!("lint: {} failed: {}", failed.len(), failed.join(", "))
}

fn format(manifest: &str) -> Result<Outcome> {
    cargo(workspace::cargo("fmt").args(["--check", "--manifest-path", manifest]))
}

/// The fuzz targets compile files of tproxy-user by themselves, which nothing else does that is
/// run for each change. Checked without the fuzzer, which is C++ and takes longer than all the rest.
fn fuzzed() -> Result<Outcome> {
    cargo(
        workspace::cargo("check")
            .args(["--locked", "--lib", "--manifest-path", FUZZ[1], "--target-dir"])
            .arg(workspace::target().join("fuzz-check"))
            .env("RUSTFLAGS", "--cfg fuzzing")
            .env("CUSTOM_LIBFUZZER_PATH", "/libnone.a"),
    )
}

fn cargo(command: &mut Command) -> Result<Outcome> {
    term::say(&format!("lint: {}", shown(command)));
    let status =
        command.stdin(Stdio::null()).status().with_context(|| format!("cannot run {}", shown(command)))?;
    Ok(if status.success() {
        Outcome::Passed
    } else {
        Outcome::Failed(format!("{}: {status}", shown(command)))
    })
}

/// The command as one would type it.
fn shown(command: &Command) -> String {
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
    format!("cargo {}", arguments.join(" "))
}

/// Workspace lints bind only the members that say so, and cargo is silent
/// about the others.
fn members() -> Result<Outcome> {
    let metadata = workspace::cargo("metadata")
        .args(["--no-deps", "--format-version", "1", "--locked"])
        .output()
        .context("cannot run cargo metadata")?;
    if !metadata.status.success() {
        let why = String::from_utf8_lossy(&metadata.stderr);
        bail!("cargo metadata: {}", why.trim());
    }
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout)?;
    let mut without = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
        let text =
            fs::read_to_string(manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
        if !opts_in(&text) {
            without.push(package["name"].as_str().unwrap_or_default().to_owned());
        }
    }
    Ok(if without.is_empty() {
        Outcome::Passed
    } else {
        Outcome::Failed(format!("no `[lints] workspace = true` in {}", without.join(", ")))
    })
}

fn opts_in(manifest: &str) -> bool {
    manifest
        .lines()
        .map(str::trim)
        .skip_while(|line| *line != "[lints]")
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .any(|line| line.replace(' ', "") == "workspace=true")
}

/// The eBPF crate compiles for its own target only, so it is checked with its
/// own compiler: by clippy too where that compiler has one.
fn ebpf(toolchain: &Toolchain, warned: bool) -> Result<Outcome> {
    if warned {
        return Ok(Outcome::Failed("the compiler warns, see above".to_owned()));
    }
    if !toolchain.bin().join("cargo-clippy").is_file() {
        println!("lint: eBPF programs: by the compiler alone ({} has no clippy)", toolchain.label);
        return Ok(Outcome::Passed);
    }
    let linker = linker::ensure(toolchain)?;
    for features in [&[][..], &["--features", "log"]] {
        let mut command = build::bpf_cargo(toolchain, &linker, "clippy", &build::bpf_target())?;
        let outcome = cargo(command.args(features).args(["--", "-D", "warnings"]))?;
        if !matches!(outcome, Outcome::Passed) {
            return Ok(outcome);
        }
    }
    Ok(Outcome::Passed)
}

fn deny() -> Result<Outcome> {
    if packages::find("cargo-deny").is_none() {
        return Ok(Outcome::Skipped("it is not installed (cargo install cargo-deny)".to_owned()));
    }
    cargo(workspace::cargo("deny").args(["--locked", "check"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_opts_in_only_in_the_lints_table() {
        assert!(opts_in("[package]\nname = \"x\"\n\n[lints]\nworkspace = true\n"));
        assert!(opts_in("[lints]\nworkspace=true"));
        assert!(!opts_in("[package]\nversion.workspace = true\n"));
        assert!(!opts_in("[lints]\n[dependencies]\nworkspace = true\n"));
    }
}
