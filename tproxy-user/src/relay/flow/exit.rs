//! Where the datagrams of a flow go, and whom its client hears.

use std::future::pending;
use std::net::SocketAddr;

use super::association::Association;
use crate::addr::{ClientAddr, OrigDst, UpstreamAddr};
use crate::config::upstream::SendProxy;
use crate::upstream::announce;
use crate::upstream::socks5::datagram;

/// One for all datagrams of a flow.
#[derive(Debug)]
pub(super) enum Exit {
    /// To their destinations, which are told this of the client.
    Straight(SendProxy),
    /// To a target, which stands for this destination and is told this of the client.
    Target(UpstreamAddr, OrigDst, SendProxy),
    /// To a proxy server, each with its destination.
    Relay(Association),
}

impl Exit {
    /// Where a datagram is sent that is for this destination.
    pub(super) fn next_hop(&self, destination: OrigDst) -> UpstreamAddr {
        match self {
            Self::Straight(_) => destination.into(),
            Self::Target(target, ..) => *target,
            Self::Relay(association) => association.relay(),
        }
    }

    /// What goes before its payload.
    pub(super) fn header(&self, client: ClientAddr, destination: OrigDst) -> Vec<u8> {
        match self {
            Self::Straight(version) | Self::Target(.., version) => {
                announce::of_datagram(*version, client, destination)
            }
            Self::Relay(_) => datagram::header(destination.get()),
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
                let answer = (association.relay() == sender.into()).then(|| datagram::parse(received))?;
                answer.filter(|(source, _)| {
                    let ip = source.ip();
                    !(ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || source.port() == 0)
                })
            }
        }
    }

    /// Waits until the server carries them no longer.
    pub(super) async fn closed(&self) {
        match self {
            Self::Straight(_) | Self::Target(..) => pending().await,
            Self::Relay(association) => association.closed().await,
        }
    }
}
