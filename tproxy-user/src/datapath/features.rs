//! What the kernel offers, by its version.

use crate::config::Kernel;
use crate::failure::Failure;

/// `bpf_sk_assign` at TC ingress; the floor.
const STEERING: Kernel = Kernel { major: 5, minor: 7 };
/// Socket maps can be read from TC programs.
const LISTENERS_FROM_TC: Kernel = Kernel { major: 5, minor: 8 };
/// TC programs can add a link-layer header (`bpf_skb_change_head`).
const LINK_HEADERS: Kernel = Kernel { major: 5, minor: 8 };
/// The ring buffer.
const RING_BUFFER: Kernel = Kernel { major: 5, minor: 8 };
/// `sk_lookup` programs.
const SK_LOOKUP: Kernel = Kernel { major: 5, minor: 9 };
/// Programs of control groups can note something at a socket (`bpf_sk_storage_get`).
const SOCKET_NOTES: Kernel = Kernel { major: 5, minor: 9 };
/// Maps in an array of maps may differ in size.
const INNER_MAPS_OF_ANY_SIZE: Kernel = Kernel { major: 5, minor: 10 };
/// `bpf_ktime_get_coarse_ns`.
const COARSE_CLOCK: Kernel = Kernel { major: 5, minor: 11 };
/// tcx links.
const TCX: Kernel = Kernel { major: 6, minor: 6 };

/// A kernel that can steer, and what else it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(Kernel);

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
        Ok(Self(kernel))
    }

    /// tcx links (6.6); without them, filters on a clsact qdisc.
    #[must_use]
    pub fn tcx(self) -> bool {
        self.0 >= TCX
    }

    /// `sk_lookup` (5.9); without it, a client port that meets a `TIME_WAIT`
    /// socket costs a reset and a retry, and fragmented datagrams are forwarded.
    #[must_use]
    pub fn sk_lookup(self) -> bool {
        self.0 >= SK_LOOKUP
    }

    /// Socket maps can be read from TC (5.8); without it, listeners are found by port.
    #[must_use]
    pub fn listeners_from_tc(self) -> bool {
        self.0 >= LISTENERS_FROM_TC
    }

    /// TC programs can hand a packet from a device without a link-layer header to
    /// one that has it (5.8), as own traffic by such a device and
    /// `--handshake faithful` need.
    #[must_use]
    pub fn link_headers(self) -> bool {
        self.0 >= LINK_HEADERS
    }

    /// The group that makes a socket can be noted at it (5.9), as rules with `gid` need.
    #[must_use]
    pub fn socket_notes(self) -> bool {
        self.0 >= SOCKET_NOTES
    }

    /// The rules may take as much memory as they need (5.10); without it, 8 MiB.
    #[must_use]
    pub fn inner_maps_of_any_size(self) -> bool {
        self.0 >= INNER_MAPS_OF_ANY_SIZE
    }

    /// Programs can read the clock of the timer tick (5.11); without it, times in the
    /// flow table are exact and cost a read of the clock source.
    #[must_use]
    pub fn coarse_clock(self) -> bool {
        self.0 >= COARSE_CLOCK
    }

    /// The ring buffer (5.8), which the debugging build of the object logs by.
    #[must_use]
    pub fn ring_buffer(self) -> bool {
        self.0 >= RING_BUFFER
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
        assert!(!oldest.link_headers() && !oldest.socket_notes());
        assert!(!oldest.listeners_from_tc() && !oldest.ring_buffer() && !oldest.sk_lookup() && !oldest.tcx());
        assert!(of(5, 10).expect("newer").sk_lookup());
        assert!(!of(5, 8).expect("newer").socket_notes());
        assert!(of(5, 9).expect("newer").socket_notes());
        assert!(!of(5, 10).expect("newer").coarse_clock());
        assert!(of(5, 11).expect("newer").coarse_clock());
        assert!(!of(6, 5).expect("newer").tcx());
        assert!(of(6, 6).expect("newer").tcx());
    }
}
