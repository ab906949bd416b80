//! The header of datagrams between client and server (RFC 1928, section 7).

use std::net::{IpAddr, SocketAddr};

use super::super::destination::Destination;
use super::{address, write_destination};

/// Bytes of the longest header with an address.
pub const LONGEST: usize = 3 + 1 + 16 + 2;

/// Who sent a datagram that a server brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// This address.
    Address(SocketAddr),
    /// A host of some name, from this port.
    Name(u16),
}

/// The header of a datagram for this destination.
#[must_use]
pub fn header(to: Destination<'_>) -> Vec<u8> {
    let mut header = Vec::with_capacity(LONGEST);
    // Two reserved bytes, and the number of a fragment: none.
    header.extend([0, 0, 0]);
    write_destination(&mut header, to);
    header
}

/// The sender of a datagram that a server brings, and where the payload begins. `None` where it
/// is a fragment, which a client may leave alone (section 7), or is cut short.
#[must_use]
pub fn parse(datagram: &[u8]) -> Option<(Sender, usize)> {
    let (head, rest) = datagram.split_first_chunk::<4>()?;
    let (ip, rest): (Option<IpAddr>, _) = match *head {
        [_, _, 0, address::V4] => {
            rest.split_first_chunk::<4>().map(|(ip, rest)| (Some((*ip).into()), rest))?
        }
        [_, _, 0, address::V6] => {
            rest.split_first_chunk::<16>().map(|(ip, rest)| (Some((*ip).into()), rest))?
        }
        [_, _, 0, address::NAME] => {
            let (length, rest) = rest.split_first()?;
            (None, rest.split_at_checked(usize::from(*length))?.1)
        }
        _ => return None,
    };
    let (port, payload) = rest.split_first_chunk::<2>()?;
    let port = u16::from_be_bytes(*port);
    let sender =
        ip.map_or(Sender::Name(port), |ip| Sender::Address(SocketAddr::new(ip.to_canonical(), port)));
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
            for (to, sender) in [
                (Destination::Address(to), Sender::Address(to)),
                (Destination::Name("www.example.org", port), Sender::Name(port)),
            ] {
                let header = header(to);
                prop_assert!(header.len() <= LONGEST);
                let datagram = [&header[..], &payload].concat();
                prop_assert_eq!(parse(&datagram), Some((sender, header.len())));
                for short in 0..header.len() {
                    prop_assert_eq!(parse(&datagram[..short]), None);
                }
            }
        }
    }
}
