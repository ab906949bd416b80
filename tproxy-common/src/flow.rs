//! Flow keys, states and the choice of worker.

use crate::abi::{Addr, Flow, FlowKey, TCP};

/// Bits of [`Flow::seen_up`] and [`Flow::seen_down`]: TCP flags that one side
/// has sent (RFC 9293, section 3.1, with the same values).
pub mod tcp_seen {
    /// The side has closed its sending direction.
    pub const FIN: u8 = 0x01;
    /// The side has opened.
    pub const SYN: u8 = 0x02;
    /// The side has aborted.
    pub const RST: u8 = 0x04;
    /// The side has acknowledged.
    pub const ACK: u8 = 0x10;
    /// All bits that are remembered.
    pub const ALL: u8 = FIN | SYN | RST | ACK;
}

/// What a flow is doing, as told by the packets that were seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// TCP: opening; UDP: not replied to yet.
    New,
    /// Packets went both ways.
    Established,
    /// TCP: one side has closed.
    Closing,
    /// TCP: both sides have closed, or one has reset.
    Closed,
}

impl State {
    /// The word that `flows` prints.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Closed => "closed",
        }
    }
}

impl FlowKey {
    /// The key of a packet that goes from the client to its destination.
    #[inline(always)]
    #[must_use]
    pub const fn up(
        protocol: u8,
        source: Addr,
        destination: Addr,
        source_port: u16,
        destination_port: u16,
    ) -> Self {
        Self {
            client: source,
            destination,
            client_port: source_port,
            destination_port,
            protocol,
            pad: [0; 3],
        }
    }

    /// The key of a packet that goes from the destination back to the client.
    #[inline(always)]
    #[must_use]
    pub const fn down(
        protocol: u8,
        source: Addr,
        destination: Addr,
        source_port: u16,
        destination_port: u16,
    ) -> Self {
        Self::up(protocol, destination, source, destination_port, source_port)
    }
}

impl Flow {
    /// The state that the packets seen amount to.
    #[must_use]
    pub const fn state(&self, protocol: u8) -> State {
        if protocol != TCP {
            return if self.packets_down == 0 { State::New } else { State::Established };
        }
        if self.is_over() {
            State::Closed
        } else if (self.seen_up | self.seen_down) & tcp_seen::FIN != 0 {
            State::Closing
        } else if self.seen_up & tcp_seen::ACK != 0 && self.seen_down & tcp_seen::ACK != 0 {
            State::Established
        } else {
            State::New
        }
    }

    /// Whether the TCP connection has ended: both sides closed, or one reset.
    #[inline(always)]
    #[must_use]
    pub const fn is_over(&self) -> bool {
        (self.seen_up | self.seen_down) & tcp_seen::RST != 0
            || self.seen_up & self.seen_down & tcp_seen::FIN != 0
    }
}

/// The worker that serves a client's address and port, in `0..workers`.
///
/// It depends on the client alone, so that all destinations of one UDP port
/// meet in one worker (endpoint-independent mapping, RFC 4787).
#[inline(always)]
#[must_use]
pub fn worker(client: &Addr, client_port: u16, workers: u32) -> u32 {
    // Multiplicative hashing (Knuth, TAOCP 6.4); the multiplier is 2^32 divided
    // by the golden ratio. The high half of the second product picks the worker.
    const GOLDEN: u32 = 0x9E37_79B1;
    let word = |i: usize| u32::from_be_bytes([client[i], client[i + 1], client[i + 2], client[i + 3]]);
    let mut hash = u32::from(client_port).wrapping_mul(GOLDEN);
    hash = (hash ^ word(12)).wrapping_mul(GOLDEN);
    hash = (hash ^ (hash >> 15) ^ word(8)).wrapping_mul(GOLDEN);
    hash = (hash ^ (hash >> 15) ^ word(4) ^ word(0)).wrapping_mul(GOLDEN);
    ((u64::from(hash) * u64::from(workers)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{UDP, mapped};

    #[test]
    fn down_key_is_the_mirror_of_up() {
        let (a, b) = (mapped([10, 0, 0, 1]), mapped([192, 0, 2, 1]));
        assert_eq!(FlowKey::up(TCP, a, b, 1000, 80), FlowKey::down(TCP, b, a, 80, 1000));
    }

    #[test]
    fn states_follow_the_flags() {
        use tcp_seen::{ACK, FIN, RST, SYN};
        let flow = |seen_up, seen_down| Flow { seen_up, seen_down, ..Flow::default() }.state(TCP);
        assert_eq!(flow(SYN, 0), State::New);
        assert_eq!(flow(SYN, SYN | ACK), State::New);
        assert_eq!(flow(SYN | ACK, SYN | ACK), State::Established);
        assert_eq!(flow(SYN | ACK | FIN, SYN | ACK), State::Closing);
        assert_eq!(flow(SYN | ACK | FIN, SYN | ACK | FIN), State::Closed);
        assert_eq!(flow(SYN, RST | ACK), State::Closed);
        assert_eq!(Flow::default().state(UDP), State::New);
        assert_eq!(Flow { packets_down: 1, ..Flow::default() }.state(UDP), State::Established);
    }

    proptest::proptest! {
        #[test]
        fn worker_is_in_range(client: [u8; 16], port: u16, workers in 1u32..=64) {
            assert!(worker(&client, port, workers) < workers);
        }
    }

    #[test]
    fn workers_share_evenly() {
        // Consecutive client ports, as a client opens them.
        let mut counts = [0u32; 2];
        for port in 32768..60000 {
            counts[worker(&mapped([10, 0, 0, 2]), port, 2) as usize] += 1;
        }
        assert!(counts[0].abs_diff(counts[1]) < 27232 / 20, "{counts:?}");
    }
}
