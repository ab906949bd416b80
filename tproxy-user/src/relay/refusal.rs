//! Answers to a SYN that is not let in: what the client would have seen without
//! a proxy.

use std::io;
use std::time::Instant;

use socket2::Protocol;

use super::checksum::transport;
use super::errors::IcmpError;
use super::icmp::Budget;
use super::raw::Pair;
use super::send::TrafficClass;
use super::syn::Syn;
use crate::sockopt::{self, OwnMark, SocketError};
use crate::upstream::{ConnectError, Reason};

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A reset from the destination.
    Reset,
    /// An ICMP error of this router, by the error of `connect(2)`.
    Unreachable(i32),
    /// None.
    Silence,
}

impl Refusal {
    /// What a connect that failed looks like to the client.
    pub(crate) fn of(error: &ConnectError) -> Self {
        match (error.reason, error.errno()) {
            // A blackhole route is EINVAL. For want of descriptors, too: the client asks again, and it
            // may go better then.
            (Reason::TimedOut | Reason::Exhausted, _) | (_, Some(libc::EINVAL)) => Self::Silence,
            (Reason::Unreachable, Some(errno)) | (_, Some(errno @ (libc::EACCES | libc::EPERM))) => {
                Self::Unreachable(errno)
            }
            _ => Self::Reset,
        }
    }
}

/// The sockets that send them; one such for every worker.
#[derive(Debug)]
pub(crate) struct RefusalSender {
    tcp: Pair,
    icmp: Pair,
    budget: Budget,
    mark: OwnMark,
}

impl RefusalSender {
    /// Makes the sockets for the families that are asked for.
    ///
    /// # Errors
    /// [`SocketError`]: `EPERM` without `CAP_NET_RAW` and `CAP_NET_ADMIN`.
    pub(crate) fn new(v4: bool, v6: bool, mark: OwnMark) -> Result<Self, SocketError> {
        let tcp = Pair::new(v4, v6, [Protocol::TCP; 2], mark)?;
        Ok(Self { tcp, icmp: Pair::icmp(v4, v6, mark)?, budget: Budget::new(), mark })
    }

    /// What may be sent of it: no more ICMP errors than a router would send.
    pub(crate) fn granted(&self, refusal: Refusal) -> Refusal {
        match refusal {
            Refusal::Unreachable(_) if !self.budget.take(Instant::now()) => Refusal::Silence,
            refusal => refusal,
        }
    }

    /// Answers the packet that `syn` was read from.
    ///
    /// # Errors
    /// What `sendmsg(2)` answers.
    pub(crate) fn send(&self, refusal: Refusal, syn: &Syn, packet: &[u8]) -> io::Result<()> {
        let (to, class) = (syn.client.get(), TrafficClass::default());
        match refusal {
            Refusal::Silence => Ok(()),
            Refusal::Reset => {
                let header = reset(syn).ok_or(io::ErrorKind::InvalidInput)?;
                self.tcp.send(syn.destination.ip(), to, class, &header)
            }
            Refusal::Unreachable(errno) => {
                let here = sockopt::address_towards(to, self.mark).map_err(|error| error.source)?;
                let error = IcmpError::of_connect(errno, here).ok_or(io::ErrorKind::InvalidInput)?;
                self.icmp.send(here, to, class, &error.about(packet, to.is_ipv4()))
            }
        }
    }
}

/// The segment that a host sends where nobody listens (RFC 9293, section 3.10.7.1).
fn reset(syn: &Syn) -> Option<[u8; 20]> {
    const TCP: u8 = 6;
    const WORDS: u8 = 5;
    const RST_ACK: u8 = 0x14;
    let mut header = [0; 20];
    header[0..2].copy_from_slice(&syn.destination.port().to_be_bytes());
    header[2..4].copy_from_slice(&syn.client.port().to_be_bytes());
    header[8..12].copy_from_slice(&syn.acknowledgement.to_be_bytes());
    header[12] = WORDS << 4;
    header[13] = RST_ACK;
    let checksum = transport(TCP, syn.destination.ip(), syn.client.ip(), &header, &[])?;
    header[16..18].copy_from_slice(&checksum.to_be_bytes());
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{ClientAddr, OrigDst};
    use etherparse::TcpHeaderSlice;
    use std::net::{IpAddr, SocketAddr};

    fn refusal(errno: i32) -> Refusal {
        let source = io::Error::from_raw_os_error(errno);
        Refusal::of(&SocketError { call: "connect", source }.into())
    }

    #[test]
    fn errors_look_as_they_would_without_a_proxy() {
        assert_eq!(refusal(libc::ECONNREFUSED), Refusal::Reset);
        assert_eq!(refusal(libc::EHOSTUNREACH), Refusal::Unreachable(libc::EHOSTUNREACH));
        assert_eq!(refusal(libc::ENETUNREACH), Refusal::Unreachable(libc::ENETUNREACH));
        assert_eq!(refusal(libc::EACCES), Refusal::Unreachable(libc::EACCES));
        assert_eq!(refusal(libc::ETIMEDOUT), Refusal::Silence);
        assert_eq!(refusal(libc::EINVAL), Refusal::Silence);
        assert_eq!(refusal(libc::EMFILE), Refusal::Silence);
        assert_eq!(refusal(libc::EADDRNOTAVAIL), Refusal::Reset);
    }

    #[test]
    fn reset_acknowledges_the_syn() {
        for (client, destination) in
            [("192.0.2.2:4000", "198.18.0.1:80"), ("[2001:db8::2]:4000", "[2001:db8:f::1]:80")]
        {
            let client: SocketAddr = client.parse().expect("an address");
            let destination: SocketAddr = destination.parse().expect("an address");
            let syn = Syn {
                client: ClientAddr::from(client),
                destination: OrigDst::from(destination),
                acknowledgement: 1001,
            };
            let header = reset(&syn).expect("one family");
            let parsed = TcpHeaderSlice::from_slice(&header).expect("a TCP header");
            assert_eq!((parsed.source_port(), parsed.destination_port()), (80, 4000));
            assert_eq!((parsed.sequence_number(), parsed.acknowledgment_number()), (0, 1001));
            assert!(parsed.rst() && parsed.ack() && !parsed.syn());
            let checksum = match (destination.ip(), client.ip()) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    parsed.calc_checksum_ipv4_raw(from.octets(), to.octets(), &[])
                }
                (IpAddr::V6(from), IpAddr::V6(to)) => {
                    parsed.calc_checksum_ipv6_raw(from.octets(), to.octets(), &[])
                }
                _ => unreachable!("families are alike"),
            };
            assert_eq!(checksum.expect("fits"), parsed.checksum());
        }
    }
}
