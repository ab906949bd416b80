//! What the running kernel offers.

use crate::config::Kernel;
use crate::failure::Failure;

/// `bpf_sk_assign` at TC ingress; the floor.
pub const STEERING: Kernel = Kernel { major: 5, minor: 7 };
/// Socket maps can be read from TC programs, and there is a ring buffer.
const LISTENERS_FROM_TC: Kernel = Kernel { major: 5, minor: 8 };
/// `sk_lookup` programs.
const SK_LOOKUP: Kernel = Kernel { major: 5, minor: 9 };
/// tcx links.
const TCX: Kernel = Kernel { major: 6, minor: 6 };

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
    /// The ring buffer (5.8), which the debugging build logs by.
    pub ring_buffer: bool,
}

impl Features {
    /// The features of a kernel.
    ///
    /// # Errors
    ///
    /// [`Failure::Unsupported`] below the floor.
    pub fn of(kernel: Kernel) -> Result<Self, Failure> {
        if kernel < STEERING {
            return Err(Failure::unsupported(format!(
                "Linux {kernel} has no bpf_sk_assign for TC programs; tproxy needs Linux {STEERING} or later"
            )));
        }
        Ok(Self {
            tcx: kernel >= TCX,
            sk_lookup: kernel >= SK_LOOKUP,
            listeners_from_tc: kernel >= LISTENERS_FROM_TC,
            ring_buffer: kernel >= LISTENERS_FROM_TC,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(major: u32, minor: u32) -> Result<Features, Failure> {
        Features::of(Kernel { major, minor })
    }

    #[test]
    fn features_come_with_their_versions() {
        assert!(of(5, 6).is_err());
        let oldest = of(5, 7).expect("the floor");
        assert_eq!(oldest, Features { tcx: false, sk_lookup: false, listeners_from_tc: false, ring_buffer: false });
        assert!(of(5, 10).expect("newer").sk_lookup);
        assert!(!of(6, 5).expect("newer").tcx);
        assert!(of(6, 6).expect("newer").tcx);
    }
}
