//! Where the datagrams of a flow go, and whom its client hears.

use std::cell::Cell;
use std::future::pending;
use std::net::SocketAddr;

use super::association::Association;
use crate::addr::{ClientAddr, OrigDst, UpstreamAddr};
use crate::config::upstream::SendProxy;
use crate::upstream::announce;
use crate::upstream::destination::Destination;
use crate::upstream::socks5::datagram::{self, Sender};

/// One for all datagrams of a flow.
#[derive(Debug)]
pub(super) enum Exit {
    /// To their destinations, which are told this of the client.
    Straight(SendProxy),
    /// To a target, which stands for this destination and is told this of the client.
    Target(UpstreamAddr, OrigDst, SendProxy),
    /// To a proxy server, each with its destination.
    Relay(Association),
    /// To a proxy server, for one destination that it is asked for by name.
    Named(Association, Named),
}

/// A destination that a server knows by its name.
#[derive(Debug)]
pub(super) struct Named {
    pub(super) name: Box<str>,
    pub(super) destination: OrigDst,
    /// Which address it has for the server, once it has answered.
    answered: Cell<Option<SocketAddr>>,
}

impl Named {
    pub(super) fn new(name: Box<str>, destination: OrigDst) -> Self {
        Self { name, destination, answered: Cell::new(None) }
    }

    /// Whether the destination has sent this: the first that answers by its port, and nobody else then.
    fn has_sent(&self, sender: Sender) -> bool {
        let port = self.destination.get().port();
        match sender {
            Sender::Name(from) => from == port,
            Sender::Address(address) => {
                let known = self.answered.get().unwrap_or(address);
                self.answered.set(Some(known).filter(|known| known.port() == port));
                address == known && address.port() == port
            }
        }
    }
}

impl Exit {
    /// Where a datagram is sent that is for this destination.
    pub(super) fn next_hop(&self, destination: OrigDst) -> UpstreamAddr {
        match self {
            Self::Straight(_) => destination.into(),
            Self::Target(target, ..) => *target,
            Self::Relay(association) | Self::Named(association, _) => association.relay(),
        }
    }

    /// What goes before its payload.
    pub(super) fn header(&self, client: ClientAddr, destination: OrigDst) -> Vec<u8> {
        match self {
            Self::Straight(version) | Self::Target(.., version) => {
                announce::of_datagram(*version, client, destination)
            }
            Self::Relay(_) => datagram::header(Destination::Address(destination.get())),
            Self::Named(_, Named { name, .. }) => {
                datagram::header(Destination::of(destination.get(), Some(name)))
            }
        }
    }

    /// Who answers, as the client knows it, and where in the datagram its answer begins; `None`:
    /// a stranger, or what cannot be understood.
    pub(super) fn source(&self, sender: SocketAddr, received: &[u8]) -> Option<(SocketAddr, usize)> {
        match self {
            Self::Straight(_) => Some((sender, 0)),
            Self::Target(target, destination, _) => {
                (*target == sender.into()).then(|| (destination.get(), 0))
            }
            Self::Relay(association) => {
                match (association.relay() == sender.into()).then(|| datagram::parse(received))?? {
                    (Sender::Address(source), at) if may_be_anybody(source) => Some((source, at)),
                    _ => None,
                }
            }
            Self::Named(association, named) => {
                let (sender, at) =
                    (association.relay() == sender.into()).then(|| datagram::parse(received))??;
                named.has_sent(sender).then(|| (named.destination.get(), at))
            }
        }
    }

    /// Waits until the server carries them no longer.
    pub(super) async fn closed(&self) {
        match self {
            Self::Straight(_) | Self::Target(..) => pending().await,
            Self::Relay(association) | Self::Named(association, _) => association.closed().await,
        }
    }
}

/// Whether a client can have asked somebody at this address.
fn may_be_anybody(source: SocketAddr) -> bool {
    let ip = source.ip();
    !(ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || source.port() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_destination_is_who_answers_first() {
        let [own, other, elsewhere] =
            ["192.0.2.1:443", "192.0.2.2:443", "192.0.2.3:53"].map(|text| text.parse().expect("an address"));
        let named = || Named::new("www.example.org".into(), OrigDst::from(own));
        let first = named();
        let told =
            [elsewhere, other, own, other, elsewhere].map(|from| first.has_sent(Sender::Address(from)));
        assert_eq!(told, [false, true, false, true, false]);
        assert_eq!([443, 53].map(|port| named().has_sent(Sender::Name(port))), [true, false]);
    }
}
