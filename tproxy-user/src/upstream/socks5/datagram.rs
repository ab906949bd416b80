//! The header of datagrams between client and server (RFC 1928, section 7).

use std::net::SocketAddr;

use super::{address, write_address};

/// Bytes of the longest header with an address.
pub const LONGEST: usize = 3 + 1 + 16 + 2;

/// The header of a datagram for this destination.
#[must_use]
pub fn header(to: SocketAddr) -> Vec<u8> {
    let mut header = Vec::with_capacity(LONGEST);
    // Two reserved bytes, and the number of a fragment: none.
    header.extend([0, 0, 0]);
    write_address(&mut header, to);
    header
}

/// The sender of a datagram that a server brings, and where the payload begins. `None` where it
/// is a fragment, which a client may leave alone (section 7), has its sender by name, or is
/// cut short.
#[must_use]
pub fn parse(datagram: &[u8]) -> Option<(SocketAddr, usize)> {
    let (head, rest) = datagram.split_first_chunk::<4>()?;
    let (ip, rest): (std::net::IpAddr, _) = match *head {
        [_, _, 0, address::V4] => rest.split_first_chunk::<4>().map(|(ip, rest)| ((*ip).into(), rest))?,
        [_, _, 0, address::V6] => rest.split_first_chunk::<16>().map(|(ip, rest)| ((*ip).into(), rest))?,
        _ => return None,
    };
    let (port, payload) = rest.split_first_chunk::<2>()?;
    let sender = SocketAddr::new(ip.to_canonical(), u16::from_be_bytes(*port));
    Some((sender, datagram.len() - payload.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(v6: bool, ip: [u8; 16], port: u16, payload in prop::collection::vec(any::<u8>(), 0..64)) {
            let ip = if v6 { ip.into() } else { std::net::IpAddr::from([ip[0], ip[1], ip[2], ip[3]]) };
            let to = SocketAddr::new(ip.to_canonical(), port);
            let header = header(to);
            prop_assert!(header.len() <= LONGEST);
            let datagram = [&header[..], &payload].concat();
            prop_assert_eq!(parse(&datagram), Some((to, header.len())));
            for short in 0..header.len() {
                prop_assert_eq!(parse(&datagram[..short]), None);
            }
        }
    }
}
