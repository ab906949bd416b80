//! The Internet checksum (RFC 1071), with the pseudo-headers of IPv4 and IPv6.

use std::net::IpAddr;

/// Length of the UDP header in bytes (RFC 768).
pub(crate) const HEADER: usize = 8;

/// UDP's protocol number.
const UDP: u8 = 17;

/// The header of a datagram from `source` to `destination`, with its checksum.
/// None: the payload is too long, or the families differ.
#[must_use]
pub(crate) fn udp_header(
    (source, source_port): (IpAddr, u16),
    (destination, destination_port): (IpAddr, u16),
    payload: &[u8],
) -> Option<[u8; HEADER]> {
    let length = u16::try_from(HEADER + payload.len()).ok()?;
    let mut header = [0; HEADER];
    header[0..2].copy_from_slice(&source_port.to_be_bytes());
    header[2..4].copy_from_slice(&destination_port.to_be_bytes());
    header[4..6].copy_from_slice(&length.to_be_bytes());
    let checksum = match transport(UDP, source, destination, &header, payload)? {
        // Zero would mean "no checksum" (RFC 768), which IPv6 forbids.
        0 => 0xffff,
        checksum => checksum,
    };
    header[6..8].copy_from_slice(&checksum.to_be_bytes());
    Some(header)
}

/// The checksum of a segment with `header`, an even number of bytes of which
/// those of the checksum are zero. None: it is too long, or the families differ.
#[must_use]
pub(crate) fn transport(
    protocol: u8,
    source: IpAddr,
    destination: IpAddr,
    header: &[u8],
    payload: &[u8],
) -> Option<u16> {
    let length = u16::try_from(header.len() + payload.len()).ok()?;
    let addresses = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => sum(&source.octets()) + sum(&destination.octets()),
        (IpAddr::V6(source), IpAddr::V6(destination)) => sum(&source.octets()) + sum(&destination.octets()),
        _ => return None,
    };
    // The pseudo-headers of IPv4 and IPv6 (RFC 9293, section 3.1; RFC 8200) differ in field
    // widths only; their sums are alike: addresses, protocol, length.
    let pseudo = addresses + u64::from(protocol) + u64::from(length);
    Some(!fold(pseudo + sum(header) + sum(payload)))
}

/// The checksum of a message that has no pseudo-header, such as ICMP's. Over one
/// that has its checksum already it is 0.
#[must_use]
pub(crate) fn internet(message: &[u8]) -> u16 {
    !fold(sum(message))
}

/// The sum of all 16-bit words in network byte order, an odd last byte padded
/// with zero. It cannot overflow: a datagram has less than 2^15 words.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let words: u64 = words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum();
    words + rest.first().map_or(0, |last| u64::from(*last) << 8)
}

/// The one's complement sum in 16 bits.
fn fold(mut sum: u64) -> u16 {
    loop {
        match u16::try_from(sum) {
            Ok(folded) => return folded,
            Err(_) => sum = (sum & 0xffff) + (sum >> 16),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a receiver does: pseudo-header, header and payload, in order, sum to all ones.
    fn verifies(source: IpAddr, destination: IpAddr, header: [u8; HEADER], payload: &[u8]) -> bool {
        let mut bytes = Vec::new();
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                bytes.extend([0, 17, header[4], header[5]]);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                bytes.extend([0, 0, header[4], header[5], 0, 0, 0, 17]);
            }
            _ => unreachable!("families are alike in these tests"),
        }
        bytes.extend(header);
        bytes.extend(payload);
        if bytes.len() % 2 == 1 {
            bytes.push(0);
        }
        // Carry by carry, as RFC 1071 writes it, and nothing like the code under test.
        let mut sum: u16 = 0;
        for word in bytes.chunks(2) {
            let (next, carry) = sum.overflowing_add(u16::from_be_bytes([word[0], word[1]]));
            sum = next + u16::from(carry);
        }
        sum == 0xffff
    }

    #[test]
    fn rfc_1071_example() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
    }

    #[test]
    fn datagram_summed_by_hand() {
        let v4 = udp_header(([10, 0, 0, 1].into(), 1024), ([10, 0, 0, 2].into(), 53), b"ab");
        // 0a00+0001+0a00+0002+0011+000a + 0400+0035+000a + 6162 = 79bf; its complement is 8640.
        assert_eq!(v4, Some([0x04, 0x00, 0x00, 0x35, 0x00, 0x0a, 0x86, 0x40]));
    }

    #[test]
    fn zero_becomes_all_ones() {
        // 0000+…+0011+000a + 0+0+000a + ffda - carries = ffff: the complement is 0.
        let header = udp_header(([0; 4].into(), 0), ([0; 4].into(), 0), &[0xff, 0xda]).expect("fits");
        assert_eq!(header[6..8], [0xff, 0xff]);
        assert!(verifies([0; 4].into(), [0; 4].into(), header, &[0xff, 0xda]));
    }

    #[test]
    fn too_long_or_mixed_is_refused() {
        const MAX_PAYLOAD: usize = u16::MAX as usize - HEADER;
        let any = (IpAddr::from([0; 4]), 0);
        assert!(udp_header(any, any, &vec![0; MAX_PAYLOAD]).is_some());
        assert!(udp_header(any, any, &vec![0; MAX_PAYLOAD + 1]).is_none());
        assert!(udp_header(any, (IpAddr::from([0; 16]), 0), &[]).is_none());
    }

    proptest::proptest! {
        #[test]
        fn receivers_agree_v4(
            source: [u8; 4], destination: [u8; 4], ports: (u16, u16),
            payload in proptest::collection::vec(proptest::num::u8::ANY, 0..2000),
        ) {
            let (source, destination) = (source.into(), destination.into());
            let header = udp_header((source, ports.0), (destination, ports.1), &payload).expect("fits");
            assert!(verifies(source, destination, header, &payload));
            assert_ne!(header[6..8], [0, 0]);
        }

        #[test]
        fn receivers_agree_v6(
            source: [u8; 16], destination: [u8; 16], ports: (u16, u16),
            payload in proptest::collection::vec(proptest::num::u8::ANY, 0..2000),
        ) {
            let (source, destination) = (source.into(), destination.into());
            let header = udp_header((source, ports.0), (destination, ports.1), &payload).expect("fits");
            assert!(verifies(source, destination, header, &payload));
            assert_ne!(header[6..8], [0, 0]);
        }
    }
}
