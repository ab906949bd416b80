//! What the running kernel offers.

use std::fmt;

use crate::failure::Failure;

/// A kernel release, as far as features go by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The 6 of 6.18.
    pub major: u32,
    /// The 18 of 6.18.
    pub minor: u32,
}

impl Version {
    /// `bpf_sk_assign` at TC ingress; the floor.
    pub const STEERING: Self = Self::new(5, 7);
    /// Socket maps can be read from TC programs.
    pub const LISTENERS_FROM_TC: Self = Self::new(5, 8);
    /// `sk_lookup` programs, and the ring buffer (5.8) that `--bpf-log` needs.
    pub const SK_LOOKUP: Self = Self::new(5, 9);
    /// tcx links.
    pub const TCX: Self = Self::new(6, 6);

    /// A version by its two numbers.
    #[must_use]
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// Reads `5.10`, `6.1.0-13-amd64`, `6.18+`.
    #[must_use]
    pub fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Some(Self::new(major, minor)),
            _ => None,
        }
    }

    /// The running kernel, by `uname`.
    ///
    /// # Errors
    ///
    /// [`Failure::Unsupported`] where the release cannot be read.
    pub fn running() -> Result<Self, Failure> {
        let release = nix::sys::utsname::uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        Self::parse(&release).ok_or_else(|| {
            Failure::unsupported(format!("cannot tell the kernel version from its release {release:?}"))
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What the kernel can do for the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// tcx links (6.6); without them, filters on a clsact qdisc.
    pub tcx: bool,
    /// `sk_lookup` (5.9); without it, TIME_WAIT reuse costs the client a reset
    /// and a retry, and fragmented datagrams are lost.
    pub sk_lookup: bool,
    /// Socket maps can be read from TC (5.8); without it, listeners are found by port.
    pub listeners_from_tc: bool,
}

impl Features {
    /// The features of a kernel.
    ///
    /// # Errors
    ///
    /// [`Failure::Unsupported`] below the floor.
    pub fn of(version: Version) -> Result<Self, Failure> {
        if version < Version::STEERING {
            return Err(Failure::unsupported(format!(
                "Linux {version} has no bpf_sk_assign for TC programs; tproxy needs Linux {} or later",
                Version::STEERING
            )));
        }
        Ok(Self {
            tcx: version >= Version::TCX,
            sk_lookup: version >= Version::SK_LOOKUP,
            listeners_from_tc: version >= Version::LISTENERS_FROM_TC,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions() {
        assert_eq!(Version::parse("6.18.44-fc"), Some(Version::new(6, 18)));
        assert_eq!(Version::parse("5.10.0-30-cloud-amd64"), Some(Version::new(5, 10)));
        assert_eq!(Version::parse("7.2"), Some(Version::new(7, 2)));
        assert_eq!(Version::parse("six"), None);
        assert!(Version::new(5, 10) > Version::new(5, 9));
    }

    #[test]
    fn features_come_with_their_versions() {
        assert!(Features::of(Version::new(5, 6)).is_err());
        let oldest = Features::of(Version::new(5, 7)).expect("the floor");
        assert_eq!(oldest, Features { tcx: false, sk_lookup: false, listeners_from_tc: false });
        assert!(Features::of(Version::new(5, 10)).expect("newer").sk_lookup);
        assert!(!Features::of(Version::new(6, 5)).expect("newer").tcx);
        assert!(Features::of(Version::new(6, 6)).expect("newer").tcx);
    }
}
