//! One run of a program: what it is told of a packet, and what came of it.

use aya::programs::ProgramError;
use nix::errno::Errno;

/// What a program is told of a packet besides its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Context {
    pub(crate) mark: u32,
    /// 0 for a packet that this host sends; another since Linux 5.16.
    pub(crate) ingress_ifindex: u32,
    /// Segments of a merged packet, 0 where nobody has counted.
    pub(crate) gso_segs: u32,
    /// Payload bytes of each.
    pub(crate) gso_size: u32,
}

impl Context {
    /// `struct __sk_buff`.
    pub(super) const LEN: usize = 192;
    const MARK: usize = 8;
    const INGRESS_IFINDEX: usize = 36;
    const GSO_SEGS: usize = 164;
    const GSO_SIZE: usize = 176;

    pub(super) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        for (at, value) in [
            (Self::MARK, self.mark),
            (Self::INGRESS_IFINDEX, self.ingress_ifindex),
            (Self::GSO_SEGS, self.gso_segs),
            (Self::GSO_SIZE, self.gso_size),
        ] {
            bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        bytes
    }

    pub(super) fn mark_of(bytes: &[u8; Self::LEN]) -> u32 {
        u32::from_ne_bytes(std::array::from_fn(|i| bytes[Self::MARK + i]))
    }
}

pub(super) fn errno(error: &ProgramError) -> Errno {
    let system = match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    };
    system.map_or_else(|| panic!("{error}"), Errno::from_raw)
}

/// What a program did with a packet.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) action: i32,
    pub(crate) mark: u32,
    pub(crate) packet: Vec<u8>,
    /// Counters that rose, and by how much.
    pub(crate) counters: Vec<(&'static str, u64)>,
}

impl Outcome {
    /// The counter that says what was decided.
    pub(crate) fn only_counter(&self) -> &'static str {
        let decided: Vec<_> =
            self.counters.iter().map(|(name, _)| *name).filter(|name| *name != "flows_created").collect();
        assert_eq!(decided.len(), 1, "one outcome a packet: {:?}", self.counters);
        decided[0]
    }

    #[track_caller]
    pub(crate) fn expect(&self, action: i32, counter: &str) {
        assert_eq!((self.action, self.only_counter()), (action, counter));
    }
}
