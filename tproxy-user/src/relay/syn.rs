//! The SYN of a client, as it comes out of the tun device.

use std::cell::Cell;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use tproxy_common::abi::{Addr, TCP};
use tproxy_common::wire::{Fragment, Load, parse_v4, parse_v6};

use crate::addr::{ClientAddr, OrigDst};

/// What is asked for by a SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Syn {
    /// Who asks.
    pub(crate) client: ClientAddr,
    /// For what.
    pub(crate) destination: OrigDst,
    /// The sequence number that an answer acknowledges: after the SYN and what
    /// data it has (TCP Fast Open).
    pub(crate) acknowledgement: u32,
}

impl Syn {
    /// Reads an IP packet; `None` where it is no SYN.
    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        let noting = Noting { packet, furthest: Cell::new(0) };
        let parsed = match packet.first()? >> 4 {
            4 => parse_v4(&noting),
            6 => parse_v6(&noting),
            _ => return None,
        }
        .ok()?;
        if parsed.protocol != TCP || parsed.fragment != Fragment::Whole || !parsed.is_syn() {
            return None;
        }
        let [sequence] = packet.load(noting.furthest.get() + SEQUENCE)?;
        let sequence = u32::from_be(sequence);
        let data = parsed.ip_len.saturating_sub(parsed.header_len.into());
        Some(Self {
            client: ClientAddr::from(SocketAddr::new(ip(parsed.source), parsed.source_port)),
            destination: OrigDst::from(SocketAddr::new(ip(parsed.destination), parsed.destination_port)),
            acknowledgement: sequence.wrapping_add(1).wrapping_add(data),
        })
    }
}

/// Where the TCP header has the sequence number (RFC 9293, section 3.1).
const SEQUENCE: u32 = 4;

/// Notes where the parser reads. The TCP header, where it begins, is furthest in the
/// packet. [`Packet`] does not tell: in the kernel each of its bytes costs time.
///
/// [`Packet`]: tproxy_common::wire::Packet
struct Noting<'a> {
    packet: &'a [u8],
    furthest: Cell<u32>,
}

impl Load for Noting<'_> {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        self.furthest.set(self.furthest.get().max(offset));
        self.packet.load(offset)
    }
}

fn ip(addr: Addr) -> IpAddr {
    Ipv6Addr::from(addr).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    fn v4(change: impl FnOnce(etherparse::PacketBuilderStep<etherparse::TcpHeader>) -> Vec<u8>) -> Vec<u8> {
        change(PacketBuilder::ipv4([192, 0, 2, 2], [198, 18, 0, 1], 64).tcp(4000, 80, 1000, 64_240))
    }

    fn written(builder: etherparse::PacketBuilderStep<etherparse::TcpHeader>, data: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        builder.write(&mut packet, data).expect("fits");
        packet
    }

    #[test]
    fn says_who_asks_for_what() {
        let syn = Syn::parse(&v4(|builder| written(builder.syn(), b""))).expect("a SYN");
        assert_eq!(syn.client.to_string(), "192.0.2.2:4000");
        assert_eq!(syn.destination.to_string(), "198.18.0.1:80");
        assert_eq!(syn.acknowledgement, 1001);
    }

    #[test]
    fn data_of_a_syn_is_acknowledged_too() {
        let syn = Syn::parse(&v4(|builder| written(builder.syn(), b"hello"))).expect("a SYN");
        assert_eq!(syn.acknowledgement, 1006);
    }

    #[test]
    fn ipv6_and_the_end_of_the_sequence_space() {
        let builder = PacketBuilder::ipv6([0x20; 16], [0x30; 16], 64).tcp(4000, 443, u32::MAX, 64_240);
        let syn = Syn::parse(&written(builder.syn(), b"")).expect("a SYN");
        assert_eq!(syn.destination.port(), 443);
        assert!(syn.client.get().is_ipv6());
        assert_eq!(syn.acknowledgement, 0);
    }

    #[test]
    fn options_and_extension_headers_stand_before_it() {
        let mut packet = v4(|builder| written(builder.syn(), b""));
        // Four bytes of IP options: no operation.
        packet.splice(20..20, [1; 4]);
        (packet[0], packet[3]) = (0x46, 44);
        assert_eq!(Syn::parse(&packet).map(|syn| syn.acknowledgement), Some(1001));
        let builder = PacketBuilder::ipv6([0x20; 16], [0x30; 16], 64).tcp(4000, 443, 1000, 64_240);
        let mut packet = written(builder.syn(), b"");
        // Destination options, with nothing but padding in them.
        packet.splice(40..40, [6, 0, 1, 4, 0, 0, 0, 0]);
        (packet[5], packet[6]) = (28, 60);
        assert_eq!(Syn::parse(&packet).map(|syn| syn.acknowledgement), Some(1001));
    }

    #[test]
    fn other_packets_are_none() {
        assert_eq!(Syn::parse(&v4(|builder| written(builder.syn().ack(7), b""))), None);
        assert_eq!(Syn::parse(&v4(|builder| written(builder.fin(), b""))), None);
        assert_eq!(Syn::parse(&[]), None);
        assert_eq!(Syn::parse(&[0x60; 39]), None);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..128)) {
            let _ = Syn::parse(&bytes);
        }
    }
}
