//! Versions of Linux: which one runs, and which one a scenario needs.

use std::fmt;

use anyhow::{Context, Result};

/// Major and minor number of a Linux version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32);

impl Version {
    /// Reads what `uname -r` prints, and the version that a [`Lacking`] names.
    #[must_use]
    pub fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|other: char| !other.is_ascii_digit()).map(str::parse);
        Some(Self(numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    /// That of the running kernel.
    ///
    /// # Errors
    /// Where the kernel does not say.
    pub fn running() -> Result<Self> {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        Self::parse(&release).with_context(|| format!("no version: {release:?}"))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.0, self.1)
    }
}

/// Something that the kernel came to have with a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lacking {
    /// The first version that has it.
    pub since: Version,
    /// What it is.
    pub what: String,
}

impl Lacking {
    const NEEDS: &str = " needs Linux ";

    /// Reads what [`Display`](fmt::Display) writes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (what, version) = text.split_once(Self::NEEDS)?;
        Some(Self { since: Version::parse(version)?, what: what.to_owned() })
    }
}

impl fmt::Display for Lacking {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}{}{}", self.what, Self::NEEDS, self.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers() {
        assert_eq!(Version::parse("6.12.117+deb13-cloud-amd64\n"), Some(Version(6, 12)));
        assert_eq!(Version::parse("7.2-rc1"), Some(Version(7, 2)));
        assert_eq!(Version::parse("linux"), None);
        assert!(Version(5, 10) > Version(5, 9) && Version(6, 1) > Version(5, 19));
    }

    #[test]
    fn what_is_lacking_is_read_as_it_is_written() {
        let lacking = Lacking { since: Version(6, 6), what: "tcx".into() };
        assert_eq!(lacking.to_string(), "tcx needs Linux 6.6");
        assert_eq!(Lacking::parse("tcx needs Linux 6.6"), Some(lacking));
        assert_eq!(Lacking::parse("nft does not work"), None);
    }
}
