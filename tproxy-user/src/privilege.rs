//! What `run` needs of the process and of the kernel, told before anything is touched.

use nix::sys::utsname::uname;

use crate::config::{Config, Kernel, Steer};
use crate::failure::Failure;

/// The oldest kernel that can steer: `bpf_sk_assign` came with it.
pub const OLDEST: Kernel = Kernel { major: 5, minor: 7 };

/// Numbers of include/uapi/linux/capability.h.
const NET_ADMIN: u32 = 12;
const NET_RAW: u32 = 13;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

/// The kernel that runs.
///
/// # Errors
/// Where its release is not a version.
pub fn running_kernel() -> Result<Kernel, Failure> {
    let release = uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .map_err(|error| Failure::unsupported(format_args!("uname: {error}")))?;
    parse_release(&release)
        .ok_or_else(|| Failure::unsupported(format_args!("kernel release '{release}' is not a version")))
}

fn parse_release(release: &str) -> Option<Kernel> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some(Kernel { major: numbers.next()?.parse().ok()?, minor: numbers.next()?.parse().ok()? })
}

/// The kernel by which features are chosen: the one that runs, or the one that
/// `--assume-kernel` says.
///
/// # Errors
/// Where its release is not a version.
pub fn kernel(config: &Config) -> Result<Kernel, Failure> {
    config.assume_kernel.map_or_else(running_kernel, Ok)
}

/// Checks kernel version and capabilities for `run`.
///
/// # Errors
/// [`Failure::Unsupported`], naming what is missing.
pub fn require(config: &Config) -> Result<(), Failure> {
    check(config, kernel(config)?, effective()?)
}

/// Checks that this process may undo what `run` set up.
///
/// # Errors
/// [`Failure::Unsupported`], naming what is missing.
pub fn require_admin(command: &str) -> Result<(), Failure> {
    if effective()? >> NET_ADMIN & 1 == 1 {
        return Ok(());
    }
    Err(Failure::unsupported(format_args!("{command}: missing CAP_NET_ADMIN; run as root")))
}

/// The effective capabilities of this process, a bit each.
pub(crate) fn effective() -> Result<u64, Failure> {
    procfs::process::Process::myself()
        .and_then(|process| process.status())
        .map(|status| status.capeff)
        .map_err(|error| {
            Failure::unsupported(format_args!("cannot read the capabilities of this process: {error}"))
        })
}

fn check(config: &Config, kernel: Kernel, capabilities: u64) -> Result<(), Failure> {
    let steers = config.steering.by == Steer::Ebpf;
    if steers && kernel < OLDEST {
        return Err(Failure::unsupported(format_args!(
            "this kernel is {kernel}; steering needs Linux {OLDEST} or later (bpf_sk_assign); \
             with rules of your own (iptables -j TPROXY) there is --steer none"
        )));
    }
    let missing = missing(config, kernel, capabilities);
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::unsupported(format_args!(
        "missing {}; run as root, or give the service these capabilities",
        missing.join(", ")
    )))
}

/// The capabilities that `run` needs and does not have, with what for.
pub(crate) fn missing(config: &Config, kernel: Kernel, capabilities: u64) -> Vec<&'static str> {
    let steers = config.steering.by == Steer::Ebpf;
    let has = |capability: u32| capabilities >> capability & 1 == 1;
    let mut missing = Vec::new();
    if !has(NET_ADMIN) {
        missing.push("CAP_NET_ADMIN (transparent sockets, rules, attaching programs)");
    }
    if !has(NET_RAW) {
        missing.push("CAP_NET_RAW (UDP replies from the original destination)");
    }
    // Both split off from CAP_SYS_ADMIN in 5.8.
    let split = kernel >= Kernel { major: 5, minor: 8 };
    if steers && !has(SYS_ADMIN) && !(split && has(BPF) && has(PERFMON)) {
        missing.push("CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN before Linux 5.8 (loading programs)");
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, resolve};
    use clap::Parser as _;

    #[test]
    fn names_what_is_missing() {
        let config =
            |flags: &[&str]| resolve::config(&Cli::try_parse_from(flags).expect("flags").run).expect("valid");
        let ebpf = config(&["tproxy-user", "-i", "eth0"]);
        let none = config(&["tproxy-user", "--steer", "none"]);
        let new = Kernel { major: 6, minor: 1 };
        let error = check(&ebpf, new, 0).expect_err("nobody");
        assert_eq!(error.exit_code(), 4);
        for name in ["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF"] {
            assert!(error.to_string().contains(name), "{error}");
        }
        let net = 1 << NET_ADMIN | 1 << NET_RAW;
        assert!(check(&none, new, net).is_ok());
        assert!(check(&ebpf, new, net | 1 << BPF).is_err());
        assert!(check(&ebpf, new, net | 1 << BPF | 1 << PERFMON).is_ok());
        assert!(check(&ebpf, OLDEST, net | 1 << BPF).is_err());
        assert!(check(&ebpf, OLDEST, net | 1 << SYS_ADMIN).is_ok());
        let old = Kernel { major: 5, minor: 4 };
        assert!(check(&ebpf, old, u64::MAX).expect_err("old").to_string().contains("5.7"));
        assert!(check(&none, old, u64::MAX).is_ok());
    }

    #[test]
    fn releases() {
        assert_eq!(parse_release("6.18.44-fc-v595"), Some(Kernel { major: 6, minor: 18 }));
        assert_eq!(parse_release("5.10.0"), Some(Kernel { major: 5, minor: 10 }));
        assert_eq!(parse_release("7.0-rc1"), Some(Kernel { major: 7, minor: 0 }));
        assert_eq!(parse_release("next"), None);
    }
}
