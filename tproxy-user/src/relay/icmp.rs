//! ICMP errors for clients: what plain forwarding would have shown them about
//! a packet that the relay could not bring to its destination.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::checksum::{internet, udp_header};
use super::errors::IcmpError;
use crate::addr::{ClientAddr, OrigDst};

/// ICMP destination unreachable (RFC 792), and its code for too large a packet.
const UNREACHABLE_V4: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
/// ICMP parameter problem (RFC 792).
const PARAMETER_PROBLEM_V4: u8 = 12;
/// Destination unreachable of ICMP for IPv6 (RFC 4443).
const UNREACHABLE_V6: u8 = 1;

/// Longest error with its IP header: RFC 1812, section 4.3.2.3, and RFC 4443, section 2.4.
const MAX_V4: usize = 576;
const MAX_V6: usize = 1280;
const HEADER_V4: usize = 20;
const HEADER_V6: usize = 40;
const ICMP_HEADER: usize = 8;
const UDP: u8 = 17;

impl IcmpError {
    /// What a router says where it has no way for a datagram, by the error of
    /// `sendto(2)`: as `ip_error` and `ip6_pkt_discard` of Linux do for a packet
    /// that is forwarded. `here` is this host's address towards the client.
    pub(crate) fn of_send(errno: i32, here: IpAddr) -> Option<Self> {
        let (kind, code) = match (here, errno) {
            (IpAddr::V4(_), libc::ENETUNREACH) => (UNREACHABLE_V4, 0),
            (IpAddr::V4(_), libc::EHOSTUNREACH) => (UNREACHABLE_V4, 1),
            (IpAddr::V4(_), libc::EACCES) => (UNREACHABLE_V4, 13),
            (IpAddr::V6(_), libc::ENETUNREACH | libc::EHOSTUNREACH) => (UNREACHABLE_V6, 0),
            (IpAddr::V6(_), libc::EACCES) => (UNREACHABLE_V6, 1),
            _ => return None,
        };
        Some(Self { offender: here, kind, code, info: 0 })
    }

    /// What a host says of a datagram to a port at which nobody listens (RFC 792, RFC 4443).
    pub(crate) fn port_unreachable(host: IpAddr) -> Self {
        let (kind, code) = if host.is_ipv4() { (UNREACHABLE_V4, 3) } else { (UNREACHABLE_V6, 4) };
        Self { offender: host, kind, code, info: 0 }
    }

    /// What a client is told of a datagram that was diverted: the target is to it the
    /// destination that it `asked`, and how to get there its proxy's affair. None: that is
    /// of no use to it, or the target is of the other family.
    pub(crate) fn of_target(self, asked: IpAddr) -> Option<Self> {
        let unreachable = match self.offender {
            IpAddr::V4(_) => self.kind == UNREACHABLE_V4 && self.code != FRAGMENTATION_NEEDED,
            IpAddr::V6(_) => self.kind == UNREACHABLE_V6,
        };
        if unreachable {
            return Some(Self::port_unreachable(asked));
        }
        (self.offender.is_ipv4() == asked.is_ipv4()).then_some(Self { offender: asked, ..self })
    }

    /// What a router says of a datagram over IPv4 with DF for which its own link is too
    /// small. None over IPv6, where the kernel fragments what it sends.
    pub(crate) fn too_long(mtu: u32, here: IpAddr) -> Option<Self> {
        here.is_ipv4().then_some(Self {
            offender: here,
            kind: UNREACHABLE_V4,
            code: FRAGMENTATION_NEEDED,
            info: mtu,
        })
    }

    /// What a router says of a destination that `connect(2)` could not reach: as
    /// [`of_send`](Self::of_send), but that for IPv6 it is a neighbour, or an ICMP
    /// error about one, that gives `EHOSTUNREACH` (address unreachable, RFC 4443).
    pub(crate) fn of_connect(errno: i32, here: IpAddr) -> Option<Self> {
        const ADDRESS_UNREACHABLE: u8 = 3;
        match (here, errno) {
            (IpAddr::V6(_), libc::EHOSTUNREACH | libc::EHOSTDOWN) => {
                Some(Self { offender: here, kind: UNREACHABLE_V6, code: ADDRESS_UNREACHABLE, info: 0 })
            }
            (_, libc::EHOSTDOWN) => Self::of_send(libc::EHOSTUNREACH, here),
            (_, libc::ENETDOWN) => Self::of_send(libc::ENETUNREACH, here),
            // The output chain.
            (_, libc::EPERM) => Self::of_send(libc::EACCES, here),
            _ => Self::of_send(errno, here),
        }
    }

    /// The ICMP message about a datagram of `client` to `destination`, of whose
    /// payload `quote` is known. Over IPv6 without checksum, which the kernel
    /// puts in. None: the families differ.
    pub(crate) fn message(&self, client: ClientAddr, destination: OrigDst, quote: &[u8]) -> Option<Vec<u8>> {
        let (client, destination) = (client.get(), destination.get());
        let udp = udp_header((client.ip(), client.port()), (destination.ip(), destination.port()), quote)?;
        let mut packet =
            self.quoted_header(client, destination, u16::try_from(udp.len() + quote.len()).ok()?)?;
        packet.extend(udp);
        packet.extend(quote);
        Some(self.about(&packet, client.is_ipv4()))
    }

    /// The ICMP message about a packet, of which it has as much as the standards
    /// allow. Over IPv6 without checksum, which the kernel puts in.
    pub(crate) fn about(&self, packet: &[u8], v4: bool) -> Vec<u8> {
        let most = if v4 { MAX_V4 - HEADER_V4 } else { MAX_V6 - HEADER_V6 };
        let mut message = vec![self.kind, self.code, 0, 0];
        message.extend(
            match (v4, self.kind, self.code) {
                (true, UNREACHABLE_V4, FRAGMENTATION_NEEDED) => self.info & 0xffff,
                (true, PARAMETER_PROBLEM_V4, _) => self.info << 24,
                (true, ..) => 0,
                (false, ..) => self.info,
            }
            .to_be_bytes(),
        );
        debug_assert_eq!(message.len(), ICMP_HEADER);
        message.extend(packet);
        message.truncate(most);
        if v4 {
            let checksum = internet(&message);
            message[2..4].copy_from_slice(&checksum.to_be_bytes());
        }
        message
    }

    /// The IP header of the client's datagram. What the relay cannot know of it
    /// (identification, TTL, traffic class) is as a host would set it.
    fn quoted_header(&self, client: SocketAddr, destination: SocketAddr, payload: u16) -> Option<Vec<u8>> {
        const HOPS: u8 = 64;
        const DONT_FRAGMENT: u16 = 0x4000;
        let mut header;
        match (client.ip(), destination.ip()) {
            (IpAddr::V4(client), IpAddr::V4(destination)) => {
                let too_big = (self.kind, self.code) == (UNREACHABLE_V4, FRAGMENTATION_NEEDED);
                let total = payload.checked_add(u16::try_from(HEADER_V4).ok()?)?;
                header = vec![0x45, 0];
                header.extend(total.to_be_bytes());
                header.extend([0, 0]);
                header.extend(if too_big { DONT_FRAGMENT } else { 0 }.to_be_bytes());
                header.extend([HOPS, UDP, 0, 0]);
                header.extend(client.octets());
                header.extend(destination.octets());
                let checksum = internet(&header);
                header[10..12].copy_from_slice(&checksum.to_be_bytes());
            }
            (IpAddr::V6(client), IpAddr::V6(destination)) => {
                header = vec![0x60, 0, 0, 0];
                header.extend(payload.to_be_bytes());
                header.extend([UDP, HOPS]);
                header.extend(client.octets());
                header.extend(destination.octets());
            }
            _ => return None,
        }
        Some(header)
    }
}

/// How many errors may be sent: the kernel's own defaults (`icmp_msgs_per_sec`,
/// `icmp_msgs_burst`), as RFC 1812, section 4.3.2.8, and RFC 4443, section 2.4, ask.
#[derive(Debug)]
pub(crate) struct Budget {
    left: Cell<u128>,
    since: Cell<Instant>,
}

impl Budget {
    /// Errors that may follow each other at once.
    const BURST: u128 = 50;
    /// Time that earns one more.
    const PERIOD: Duration = Duration::from_millis(1);

    pub(crate) fn new() -> Self {
        Self { left: Cell::new(Self::BURST), since: Cell::new(Instant::now()) }
    }

    /// Whether one more may be sent.
    pub(crate) fn take(&self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.since.get()).as_millis() / Self::PERIOD.as_millis();
        if earned > 0 {
            self.left.set(Self::BURST.min(self.left.get() + earned));
            self.since.set(now);
        }
        let left = self.left.get().checked_sub(1);
        self.left.set(left.unwrap_or(0));
        left.is_some()
    }
}

#[cfg(test)]
mod tests;
