//! Programs and libraries from the distribution's packages.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::term::{self, Step};

/// Something that a task needs from the distribution.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    probe: &'static str,
    package: &'static str,
    why: &'static str,
    service: Option<&'static str>,
}

impl Need {
    /// `probe` is a program's name, searched in `PATH` and the `sbin`
    /// directories, or an absolute path; where it is missing, the Debian
    /// package `package` brings it; `why` completes "needed for …".
    pub(crate) const fn new(probe: &'static str, package: &'static str, why: &'static str) -> Self {
        Self { probe, package, why, service: None }
    }

    /// The program's name, or the absolute path.
    pub(crate) const fn probe(&self) -> &'static str {
        self.probe
    }

    /// The package starts this systemd service when it is installed. It is
    /// stopped and disabled again: the machine is to offer no more than before.
    #[allow(dead_code, reason = "for the servers of the tests")]
    pub(crate) const fn service(mut self, unit: &'static str) -> Self {
        self.service = Some(unit);
        self
    }
}

/// Finds a program by its name in `PATH` and the `sbin` directories, which are
/// not in every user's `PATH`. An absolute path is only looked at.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(sbin)
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Installs the packages of those needs that are not there. Instant when
/// nothing is missing.
///
/// # Errors
/// Packages are missing and cannot be installed: not an apt system, no
/// privilege, no such package, no network. The message says what to do by hand.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    let missing: Vec<Need> = needs.iter().filter(|need| find(need.probe).is_none()).copied().collect();
    if missing.is_empty() {
        return Ok(());
    }
    for need in &missing {
        term::say(&format!("needed: {} (package {}) for {}", need.probe, need.package, need.why));
    }
    let mut packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    packages.sort_unstable();
    packages.dedup();
    install(&packages)?;
    for unit in missing.iter().filter_map(|need| need.service) {
        stop_service(unit)?;
    }
    match missing.iter().find(|need| find(need.probe).is_none()) {
        Some(need) => bail!("package {} is installed, but {} is still not there", need.package, need.probe),
        None => Ok(()),
    }
}

/// Installs packages with apt, by sudo where this is not root. The package
/// lists are fetched only when a package is not in them or cannot be had.
///
/// # Errors
/// See [`ensure`].
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if find("apt-get").is_none() {
        bail!("this system has no apt-get: install what Debian calls `{list}` by hand, and try again");
    }
    let by_hand = format!("install by hand: apt-get install {list}");
    authenticate().context(by_hand.clone())?;
    let mut updated = false;
    if packages.iter().any(|package| candidate(package).is_none()) {
        update();
        updated = true;
        if let Some(unknown) = packages.iter().find(|package| candidate(package).is_none()) {
            bail!("this system's package sources have no package {unknown}; {by_hand}");
        }
    }
    let label = format!("installing {list}");
    let arguments = [&["install", "--no-install-recommends", "--no-remove"], packages].concat();
    let first = Step::new(&label, "apt-install");
    let first = if updated { first } else { first.may_fail() };
    match first.run(&mut apt_get(&arguments)) {
        Ok(_) => Ok(()),
        Err(error) if updated => Err(error).context(by_hand),
        Err(_) => {
            update();
            Step::new(&label, "apt-install").run(&mut apt_get(&arguments)).map(drop).context(by_hand)
        }
    }
}

/// The version that apt would install, `None` when it knows no such package.
pub(crate) fn candidate(package: &str) -> Option<String> {
    let output = Command::new("apt-cache")
        .args(["policy", package])
        .env("LC_ALL", "C")
        .stderr(Stdio::null())
        .output()
        .ok()?;
    parse_candidate(&String::from_utf8_lossy(&output.stdout))
}

/// What apt would install with a package, and the package itself, whatever that would remove.
///
/// # Errors
/// apt does not say.
pub(crate) fn missing_for(package: &str) -> Result<Vec<String>> {
    let output = Command::new("apt-get")
        .args(["install", "--print-uris", "--yes", "-q", "--no-install-recommends", package])
        .env("LC_ALL", "C")
        .output()?;
    let names = parse_uris(&String::from_utf8_lossy(&output.stdout));
    if names.is_empty() {
        bail!("apt-get names no packages for {package}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(names)
}

/// Names of packages in lines `'URI' NAME_VERSION_ARCHITECTURE.deb SIZE HASH`.
fn parse_uris(lines: &str) -> Vec<String> {
    let name = |line: &str| {
        let file = line.strip_prefix('\'')?.split_whitespace().nth(1)?;
        Some(file.split_once('_')?.0.to_owned())
    };
    lines.lines().filter_map(name).collect()
}

/// The packages whose name starts so.
pub(crate) fn names(prefix: &str) -> Vec<String> {
    Command::new("apt-cache")
        .args(["pkgnames", prefix])
        .stderr(Stdio::null())
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
        .unwrap_or_default()
}

fn parse_candidate(policy: &str) -> Option<String> {
    policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .filter(|version| *version != "(none)")
        .map(str::to_owned)
}

/// Fetches the package lists. Not an error when it fails: one source of many
/// that cannot be reached is enough for that, and may have nothing we need.
pub(crate) fn update() {
    if let Err(error) =
        Step::new("fetching the package lists", "apt-update").may_fail().run(&mut apt_get(&["update"]))
    {
        term::say(&format!("going on with the package lists there are: {error:#}"));
    }
}

fn apt_get(arguments: &[&str]) -> Command {
    let mut command = privileged("env");
    command
        .args(["DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_SUSPEND=1", "apt-get", "--yes", "-q"])
        .args(["-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=120"])
        .args(arguments);
    command
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A command run as root: directly, or by sudo.
fn privileged(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// Lets sudo ask for its password while the terminal is still free for it.
///
/// # Errors
/// Not root, and no sudo or it refuses.
pub(crate) fn authenticate() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    if find("sudo").is_none() {
        bail!("installing packages takes root, and there is no sudo");
    }
    let status = Command::new("sudo").arg("-v").status()?;
    if !status.success() {
        bail!("installing packages takes root, and sudo refused");
    }
    Ok(())
}

fn stop_service(unit: &str) -> Result<()> {
    // Without systemd as init there is nothing that could have been started.
    if !Path::new("/run/systemd/system").is_dir() {
        return Ok(());
    }
    term::say(&format!("stopping and disabling {unit}, which its package has just started"));
    let label = format!("stopping {unit}");
    Step::new(&label, "systemctl").run(privileged("systemctl").args(["disable", "--now", unit])).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found_by_name_and_by_path() {
        assert!(find("sh").is_some());
        assert!(find("/bin/sh").is_some());
        assert!(find("/bin/no-such-program").is_none());
        ensure(&[Need::new("sh", "dash", "this test")]).expect("nothing to install");
    }

    #[test]
    fn packages_are_read() {
        let lines = "Reading package lists...\nThe following packages will be REMOVED:\n  qemu-utils\n\
                     'http://deb.example/pool/libcacard0_2.8.0-3_amd64.deb' libcacard0_1%3a2.8.0-3_amd64.deb 38212 SHA256:00\n";
        assert_eq!(parse_uris(lines), ["libcacard0"]);
    }

    #[test]
    fn candidates_are_read() {
        let known = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n";
        assert_eq!(parse_candidate(known).as_deref(), Some("1.96.0+dfsg1-1~deb12u2"));
        assert_eq!(parse_candidate("x:\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
    }
}
