//! The kernels of the matrix.

use clap::ValueEnum;
use xtask::lab::Family;
use xtask::lab::selection::Selection;

/// A kernel of Debian's, by its upstream version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Kernel {
    /// Part `vm` on Linux 5.10 (Debian 11) only
    #[value(name = "5.10")]
    V5_10,
    /// Part `vm` on Linux 6.1 (Debian 12) only
    #[value(name = "6.1")]
    V6_1,
    /// Part `vm` on Linux 6.12 (Debian 13) only
    #[value(name = "6.12")]
    V6_12,
    /// Part `vm` on the newest kernel (Debian unstable) only
    #[value(name = "newest")]
    Newest,
}

impl Kernel {
    /// All of them, oldest first.
    pub(crate) const ALL: [Self; 4] = [Self::V5_10, Self::V6_1, Self::V6_12, Self::Newest];

    /// All of them, those first whose guests take longest, so that none runs alone at the end.
    pub(crate) const LONGEST_FIRST: [Self; 4] = [Self::Newest, Self::V5_10, Self::V6_1, Self::V6_12];

    /// As it is named on the command line and in the table.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Newest => "newest",
        }
    }

    /// The suite of Debian's archive that has it.
    pub(crate) const fn suite(self) -> &'static str {
        match self {
            Self::V5_10 => "bullseye",
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::Newest => "sid",
        }
    }

    /// The scenarios that run in the whole matrix: of those whose outcome a kernel can
    /// change a quarter on each, besides the core, which runs on all. Everything
    /// everywhere takes an hour or more.
    pub(crate) const fn selection(self) -> Selection {
        let (family, part) = match self {
            Self::V5_10 => (Family::V4, 0),
            Self::V6_1 => (Family::V6, 1),
            Self::V6_12 => (Family::V4, 2),
            Self::Newest => (Family::V6, 3),
        };
        Selection { family, part, parts: Self::ALL.len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_is_forgotten() {
        let mut kernels = Kernel::LONGEST_FIRST;
        kernels.sort();
        assert_eq!(kernels, Kernel::ALL);
    }
}
