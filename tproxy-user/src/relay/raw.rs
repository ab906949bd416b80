//! Sends UDP replies and ICMP errors with any source address, from a bounded number of sockets.
//!
//! A socket bound to the replying server's address would be the usual way. It fails
//! with `EADDRINUSE` where a local service holds the port on the wildcard address (a DNS
//! server on 53), costs a descriptor for each server, and receives packets that are not
//! its own. A raw socket has none of these: source and port are what each message says.

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::{c_int, in_pktinfo, in6_pktinfo};
use socket2::Protocol;

use super::checksum::udp_header;
use super::send::{Control, TrafficClass, send_all};
use crate::addr::ClientAddr;
use crate::sockopt::{self, OwnMark, SocketError};

/// The sockets of one worker that speak for others.
#[derive(Debug)]
pub struct ReplySender {
    udp: Pair,
    icmp: Pair,
}

/// A raw socket of each family that is asked for.
#[derive(Debug)]
pub(super) struct Pair {
    v4: Option<OwnedFd>,
    v6: Option<OwnedFd>,
}

impl ReplySender {
    /// Makes the sockets for the families that are asked for.
    ///
    /// # Errors
    /// [`SocketError`]: `EPERM` without `CAP_NET_RAW` and `CAP_NET_ADMIN`.
    pub fn new(v4: bool, v6: bool, mark: OwnMark) -> Result<Self, SocketError> {
        Ok(Self { udp: Pair::new(v4, v6, [Protocol::UDP; 2], mark)?, icmp: Pair::icmp(v4, v6, mark)? })
    }

    /// Sends payloads to `client` as if `server` had, by one system call. The kernel fragments what is
    /// larger than the path MTU. How many were sent: where it is not all, the next one's turn tells why.
    ///
    /// # Errors
    /// About the first: `InvalidInput` where the families differ or it is longer than UDP can
    /// tell; `WouldBlock` where the send buffer is full; else what `sendmmsg(2)` answers.
    pub(super) fn send(
        &self,
        server: SocketAddr,
        client: ClientAddr,
        class: TrafficClass,
        payloads: &[&[u8]],
    ) -> io::Result<usize> {
        let client = client.get();
        let header =
            |payload| udp_header((server.ip(), server.port()), (client.ip(), client.port()), payload);
        if let [payload] = payloads {
            let header = header(payload).ok_or(io::ErrorKind::InvalidInput)?;
            return self.udp.send_all(
                server.ip(),
                client,
                class,
                &[[header.as_slice(), payload].map(IoSlice::new)],
            );
        }
        let headers: Vec<_> = payloads.iter().map_while(|payload| header(payload)).collect();
        let packets =
            headers.iter().zip(payloads).map(|(header, payload)| [header, *payload].map(IoSlice::new));
        let packets: Vec<_> = packets.collect();
        if packets.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.udp.send_all(server.ip(), client, class, &packets)
    }

    /// Sends an ICMP message to `client` as if `source` had.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn send_icmp(&self, source: IpAddr, client: ClientAddr, message: &[u8]) -> io::Result<()> {
        self.icmp.send(source, client.get(), TrafficClass::default(), message)
    }
}

impl Pair {
    /// Sockets of these protocols, that of IPv4 first.
    pub(super) fn new(
        v4: bool,
        v6: bool,
        protocols: [Protocol; 2],
        mark: OwnMark,
    ) -> Result<Self, SocketError> {
        Ok(Self {
            v4: v4.then(|| sockopt::raw_sender(false, protocols[0], mark)).transpose()?,
            v6: v6.then(|| sockopt::raw_sender(true, protocols[1], mark)).transpose()?,
        })
    }

    /// Sockets for ICMP.
    pub(super) fn icmp(v4: bool, v6: bool, mark: OwnMark) -> Result<Self, SocketError> {
        Self::new(v4, v6, [Protocol::ICMPV4, Protocol::ICMPV6], mark)
    }

    /// Sends a packet, of which this is what is behind the IP header, from any address.
    pub(super) fn send(
        &self,
        source: IpAddr,
        to: SocketAddr,
        class: TrafficClass,
        packet: &[u8],
    ) -> io::Result<()> {
        self.send_all(source, to, class, &[[IoSlice::new(packet)]]).map(drop)
    }

    /// Sends packets, of which these are the parts behind the IP header, from any address. How many
    /// were sent.
    fn send_all<const N: usize>(
        &self,
        source: IpAddr,
        mut to: SocketAddr,
        class: TrafficClass,
        packets: &[[IoSlice<'_>; N]],
    ) -> io::Result<usize> {
        // Raw sockets take the protocol where a UDP address has its port.
        to.set_port(0);
        let class = class.control(source.is_ipv6());
        match source {
            IpAddr::V4(source) => {
                let info = in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(source.octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                let source = Control::new(libc::IPPROTO_IP, libc::IP_PKTINFO, info);
                send_all(socket(self.v4.as_ref())?, to, packets, Controls { source, class })
            }
            IpAddr::V6(source) => {
                let info =
                    in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: source.octets() }, ipi6_ifindex: 0 };
                let source = Control::new(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
                send_all(socket(self.v6.as_ref())?, to, packets, Controls { source, class })
            }
        }
    }
}

fn socket(fd: Option<&OwnedFd>) -> io::Result<BorrowedFd<'_>> {
    fd.map(AsFd::as_fd).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// What each packet is sent with: where it comes from, and its traffic class.
#[repr(C)]
struct Controls<T> {
    source: Control<T>,
    class: Control<c_int>,
}
