//! The compiler for the eBPF programs.
//!
//! The BPF target has no prebuilt standard library, so the compiler must come
//! with the library's source; and its LLVM must be one that bpf-linker knows.
//! Any such compiler from the workspace's minimum version on will do, nightly
//! or not (`RUSTC_BOOTSTRAP` unlocks `-Z build-std` on the others). Tried in
//! this order, what needs no installing first:
//!
//! 1. a rustup nightly with rust-src,
//! 2. the active toolchain with rust-src,
//! 3. the distribution's compiler with its library source,
//! 4. the active toolchain, after `rustup component add rust-src`,
//! 5. the distribution's compiler, after installing its packages.
//!
//! A nightly is never downloaded: the newest one may not build the eBPF crates
//! or may have an LLVM that bpf-linker does not know yet, and a component for
//! the toolchain that is there is a hundredth of the size.

use std::{
    cmp::Reverse,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Result, anyhow, bail};

use crate::{
    compiler::{Toolchain, Unfit, inspect, output, parse_version},
    packages,
    term::{self, Step},
    workspace,
};

/// What the compiler is called that `rustc` stands for in the checkout.
const ACTIVE: &str = "the active toolchain";

/// What the distribution's compilers are called.
const DISTRIBUTION: &str = "the distribution's compiler";

/// How long rustup may take for a component of about 3 MB before another way is taken.
const RUSTUP_LIMIT: Duration = Duration::from_mins(1);

/// Finds a toolchain for the BPF target, or installs what is missing.
///
/// # Errors
/// There is none and none can be installed; the message says what was tried
/// and what to install by hand.
pub(crate) fn ensure() -> Result<Toolchain> {
    if let Some(rustc) = env::var_os("TPROXY_BPF_RUSTC") {
        let rustc = PathBuf::from(rustc);
        return match inspect("TPROXY_BPF_RUSTC", &rustc) {
            Ok(toolchain) => Ok(toolchain),
            Err(unfit) => bail!("TPROXY_BPF_RUSTC={}: {unfit}", rustc.display()),
        };
    }
    let rustup = rustup_home();
    let mut tried = Vec::new();
    // A rustup toolchain that lacks nothing but the component.
    let mut extensible = None;
    for (origin, rustc) in candidates(&rustup) {
        match inspect(origin, &rustc) {
            Ok(toolchain) => return Ok(toolchain),
            Err(unfit) => {
                tried.push(format!("{origin} ({}): {unfit}", rustc.display()));
                if matches!(unfit, Unfit::NoSource) && origin == ACTIVE && rustc.starts_with(&rustup) {
                    extensible = Some(rustc);
                }
            }
        }
    }
    term::say("the eBPF build needs a Rust compiler with the source of its standard library;");
    for line in &tried {
        term::say(&format!("  {line}"));
    }
    if let Some(rustc) = extensible {
        match add_rust_src(&rustc) {
            Ok(toolchain) => return Ok(toolchain),
            Err(why) => {
                term::say(&format!("rustup cannot provide it: {why}"));
                tried.push(format!("rustup component add rust-src: {why}"));
            }
        }
    }
    install_distribution().map_err(|why| {
        anyhow!(
            "no compiler for the eBPF programs.\nTried:\n  {}\n  the distribution's packages: {why:#}\n\
             Install one by hand: `rustup component add rust-src`, or Rust {}+ of your distribution \
             with its library source (Debian: rustc-web cargo-web rust-web-src)",
            tried.join("\n  "),
            env!("CARGO_PKG_RUST_VERSION")
        )
    })
}

/// The compilers to look at, the preferred one first.
fn candidates(rustup: &Path) -> Vec<(&'static str, PathBuf)> {
    let mut all: Vec<(&'static str, PathBuf)> = Vec::new();
    all.extend(nightly(rustup).map(|rustc| ("rustup nightly", rustc)));
    all.extend(active().map(|rustc| (ACTIVE, rustc)));
    all.extend(distribution().into_iter().map(|rustc| (DISTRIBUTION, rustc)));
    all
}

fn rustup_home() -> PathBuf {
    env::var_os("RUSTUP_HOME")
        .map_or_else(|| PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".rustup"), PathBuf::from)
}

/// The compiler of the rustup channel "nightly" (not one with a date).
fn nightly(rustup: &Path) -> Option<PathBuf> {
    fs::read_dir(rustup.join("toolchains"))
        .ok()?
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            name.to_str()
                .and_then(|name| name.strip_prefix("nightly-"))
                .is_some_and(|host| !host.starts_with(|c: char| c.is_ascii_digit()))
        })
        .map(|entry| entry.path().join("bin/rustc"))
        .find(|rustc| rustc.is_file())
}

/// The compiler that `rustc` stands for in the checkout, past rustup's proxy.
fn active() -> Option<PathBuf> {
    let mut command = Command::new("rustc");
    command.args(["--print", "sysroot"]).current_dir(workspace::root());
    let rustc = PathBuf::from(output(&mut command).ok()?.trim()).join("bin/rustc");
    rustc.is_file().then_some(rustc)
}

/// The distribution's compilers: the one in /usr/bin, and Ubuntu's, which has
/// a directory for each version, the newest first.
fn distribution() -> Vec<PathBuf> {
    let mut versioned: Vec<(Reverse<(u32, u32)>, PathBuf)> = fs::read_dir("/usr/lib")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let version = parse_version(name.to_str()?.strip_prefix("rust-")?)?;
            Some((Reverse(version), entry.path().join("bin/rustc")))
        })
        .collect();
    versioned.sort();
    std::iter::once(PathBuf::from("/usr/bin/rustc"))
        .chain(versioned.into_iter().map(|(_, rustc)| rustc))
        .filter(|rustc| rustc.is_file())
        .collect()
}

/// Adds the component rust-src to a rustup toolchain.
fn add_rust_src(rustc: &Path) -> Result<Toolchain, String> {
    let name = rustc
        .ancestors()
        .nth(2)
        .and_then(Path::file_name)
        .and_then(|name| name.to_str())
        .ok_or("the toolchain has no name")?;
    term::say(&format!("adding it to rustup's {name} (component rust-src, about 3 MB)"));
    Step::new("rustup component add rust-src", "rustup")
        .limit(RUSTUP_LIMIT)
        .may_fail()
        .run(
            Command::new("rustup")
                .args(["component", "add", "rust-src", "--toolchain", name])
                .env_remove("RUSTUP_TOOLCHAIN"),
        )
        .map_err(|error| format!("{error:#}"))?;
    inspect(ACTIVE, rustc).map_err(|unfit| unfit.to_string())
}

/// Installs the distribution's compiler.
fn install_distribution() -> Result<Toolchain> {
    let mut names = distribution_packages();
    if names.is_none() && packages::find("apt-get").is_some() {
        packages::authenticate()?;
        packages::update();
        names = distribution_packages();
    }
    let Some(names) = names else {
        bail!(
            "this system has no package of Rust {} or later with its library source",
            env!("CARGO_PKG_RUST_VERSION")
        );
    };
    term::say(&format!(
        "installing the distribution's packages {}: compiler, cargo and library source for the eBPF programs",
        names.join(" ")
    ));
    packages::install(&names.iter().map(String::as_str).collect::<Vec<_>>())?;
    let mut why = Vec::new();
    for rustc in distribution() {
        match inspect(DISTRIBUTION, &rustc) {
            Ok(toolchain) => return Ok(toolchain),
            Err(unfit) => why.push(format!("{}: {unfit}", rustc.display())),
        }
    }
    bail!("installed, but still unfit: {}", why.join("; "))
}

/// The packages of a compiler that is new enough: Debian's for its browsers in
/// stable releases, the plain ones, or Ubuntu's of one version each.
fn distribution_packages() -> Option<[String; 3]> {
    let mut versions: Vec<(u32, u32)> = packages::names("rustc-1.")
        .iter()
        .filter_map(|name| {
            let version = name.strip_prefix("rustc-")?;
            version
                .bytes()
                .all(|byte| byte.is_ascii_digit() || byte == b'.')
                .then(|| parse_version(version))?
        })
        .collect();
    versions.sort_unstable_by_key(|version| Reverse(*version));
    let fixed = ["-web", ""].map(|suffix| {
        let source = if suffix.is_empty() { "rust-src".to_owned() } else { format!("rust{suffix}-src") };
        [format!("rustc{suffix}"), format!("cargo{suffix}"), source]
    });
    let versioned = versions.into_iter().map(|(major, minor)| {
        let version = format!("{major}.{minor}");
        [format!("rustc-{version}"), format!("cargo-{version}"), format!("rust-{version}-src")]
    });
    fixed.into_iter().chain(versioned).find(|names| {
        packages::candidate(&names[0])
            .is_some_and(|version| parse_version(&version) >= parse_version(env!("CARGO_PKG_RUST_VERSION")))
    })
}
