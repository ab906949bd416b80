//! IP headers of datagrams, as they are on the wire.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use xtask::lab::Namespace;
use xtask::lab::pace::patience;

use crate::packet_socket::PacketSocket;

/// What a header says of how its packet is to be carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// DSCP and ECN: type of service in IPv4, traffic class in IPv6.
    pub(crate) class: u8,
    /// The DF bit; IPv6 has none.
    pub(crate) dont_fragment: bool,
}

/// An interface that is watched from now on.
#[derive(Debug)]
pub(crate) struct Wire(PacketSocket);

impl Wire {
    /// Watches an interface, both directions.
    ///
    /// # Errors
    /// Where there is no such interface, or no right to capture.
    pub(crate) fn watch(namespace: &Namespace, interface: &str) -> Result<Self> {
        namespace.enter(|| PacketSocket::open(interface))?.map(Self)
    }

    /// The header of the next whole datagram for an address and port.
    ///
    /// # Errors
    /// Where none comes.
    pub(crate) fn next_to(&self, to: SocketAddr) -> Result<Header> {
        let end = Instant::now() + patience(Duration::from_secs(5));
        let mut buffer = [0; 128];
        while Instant::now() < end {
            while let Some((_, frame)) = self.0.read(&mut buffer) {
                if let Some((header, _)) = udp(frame).filter(|(_, destination)| *destination == to) {
                    return Ok(header);
                }
            }
            self.0.wait();
        }
        bail!("no datagram for {to} on the wire")
    }
}

/// Header and destination of a datagram that is in one piece, without options or extension headers.
fn udp(frame: &[u8]) -> Option<(Header, SocketAddr)> {
    const UDP: u8 = 17;
    let packet = frame.get(14..)?;
    let (header, address, transport): (_, IpAddr, _) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let (ip, transport) = packet.split_first_chunk::<20>()?;
            let whole = [ip[6] & 0x3f, ip[7]] == [0, 0];
            if ip[9] != UDP || !whole {
                return None;
            }
            let header = Header { class: ip[1], dont_fragment: ip[6] & 0x40 != 0 };
            (header, Ipv4Addr::new(ip[16], ip[17], ip[18], ip[19]).into(), transport)
        }
        [0x86, 0xdd] => {
            let (ip, transport) = packet.split_first_chunk::<40>()?;
            if ip[6] != UDP {
                return None;
            }
            let header = Header { class: ip[0] << 4 | ip[1] >> 4, dont_fragment: false };
            let destination: [u8; 16] = ip[24..].try_into().ok()?;
            (header, Ipv6Addr::from(destination).into(), transport)
        }
        _ => return None,
    };
    let port = transport.get(2..4)?.try_into().ok()?;
    Some((header, SocketAddr::new(address, u16::from_be_bytes(port))))
}
