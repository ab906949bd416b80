//! Datagrams that go by one system call as segments (`UDP_SEGMENT`, Linux 4.18): the kernel makes
//! one packet of them, which is cut into the same datagrams as late as it can be.

use std::io;

/// The most segments of one send (`UDP_MAX_SEGMENTS` before Linux 6.9).
const MOST: usize = 64;

/// The most bytes of one send, which is a datagram until it is cut: over IPv4 their most.
const BYTES: usize = 65_507;

/// What every network carries whole, in bytes of an IPv4 packet (RFC 791).
const WHOLE: usize = 576;

/// How many of the first of these datagrams, by their lengths, may go as segments of one: they
/// have one length, but the last may be shorter. None may be empty.
pub(super) fn together(mut lengths: impl Iterator<Item = usize>) -> usize {
    let Some(length @ 1..) = lengths.next() else { return 1 };
    let (mut count, mut bytes) = (1, length);
    for next in lengths.take(MOST - 1) {
        bytes += next;
        if next == 0 || next > length || bytes > BYTES {
            break;
        }
        count += 1;
        if next < length {
            break;
        }
    }
    count
}

/// Whether datagrams that have come alone may be segments, for routers on their way: the kernel gives
/// those of one send the numbers that those of the next begin with (`ip_select_ident`), so that of what
/// a router cuts into fragments, parts of different datagrams could be taken for one.
pub(super) fn are_whole(v6: bool, dont_fragment: bool, length: usize) -> bool {
    v6 || dont_fragment || 28 + length <= WHOLE
}

/// Whether an error says that datagrams must go one by one: the device or a policy cannot (`EIO`), or
/// one is longer than fits whole (`EINVAL`, since Linux 6.14 `EMSGSIZE`).
pub(super) fn are_refused(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the kernel makes of one send (`__udp_gso_segment`): pieces of the first one's length.
    fn cut(datagrams: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let size = datagrams[0].len();
        let mut left = datagrams.concat();
        let mut pieces = Vec::new();
        while left.len() > size {
            let rest = left.split_off(size);
            pieces.push(std::mem::replace(&mut left, rest));
        }
        pieces.push(left);
        pieces
    }

    proptest! {
        #[test]
        fn what_goes_together_arrives_as_it_was(
            lengths in prop::collection::vec(prop_oneof![Just(1200), 0..3usize, 1190..1210usize, Just(9000)], 1..200),
        ) {
            let datagrams: Vec<_> = lengths.iter().zip(0u8..=u8::MAX).map(|(n, i)| vec![i; *n]).collect();
            let (mut sent, mut arrived) = (&datagrams[..], Vec::new());
            while !sent.is_empty() {
                let count = together(sent.iter().map(Vec::len));
                let (now, later) = sent.split_at(count);
                prop_assert!(count <= 64 && now.concat().len() <= 65_507);
                if count == 1 {
                    arrived.push(now[0].clone());
                } else {
                    arrived.extend(cut(now));
                }
                // Nothing is left behind that the kernel would have taken.
                if let Some(next) = later.first().filter(|_| count < 64) {
                    let size = now[0].len();
                    let fits = now.concat().len() + next.len() <= 65_507;
                    let equal = now.iter().all(|one| one.len() == size);
                    prop_assert!(!(size > 0 && fits && equal && (1..=size).contains(&next.len())));
                }
                sent = later;
            }
            prop_assert_eq!(arrived, datagrams);
        }
    }

    #[test]
    fn what_a_router_may_cut_goes_alone() {
        assert!(are_whole(false, false, 548) && !are_whole(false, false, 549));
        assert!(are_whole(false, true, 1472) && are_whole(true, false, 1452));
    }
}
