//! Straight to the destination, with the source address that was asked for.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use super::{ConnectError, Reason};
use crate::addr::{ClientAddr, UpstreamAddr};
use crate::config::SourceMode;
use crate::sockopt::{self, OwnMark, SocketError, UpstreamSocket};
use crate::stats::WorkerStats;

/// How to go straight to destinations.
#[derive(Clone, Copy, Debug)]
pub struct Direct {
    /// Whose address the destination sees.
    pub source: SourceMode,
    /// Mark of the sockets.
    pub mark: OwnMark,
    /// Longest wait for the destination's answer.
    pub timeout: Duration,
}

impl Direct {
    /// Connects to `to` on behalf of `client`.
    ///
    /// Where the preferred source port is taken another is tried and counted: with
    /// `client-port` one of the kernel's choice; with `client` the client's own port,
    /// once the kernel has no free one left towards this destination (its range is
    /// some 28,000 ports, which one busy client can use up).
    ///
    /// # Errors
    /// [`ConnectError`] with the reason; after `timeout` at the latest.
    pub async fn connect(
        &self,
        client: ClientAddr,
        to: UpstreamAddr,
        stats: &WorkerStats,
    ) -> Result<TcpStream, ConnectError> {
        let attempt = async {
            let (first, second) = self.sources(client);
            match self.connect_from(first, to).await {
                Err(error) if error.reason == Reason::NoSource && second.is_some() => {
                    stats.source_port_fallbacks.inc();
                    self.connect_from(second, to).await
                }
                result => result,
            }
        };
        tokio::time::timeout(self.timeout, attempt).await.unwrap_or_else(|_| {
            let source = io::Error::from_raw_os_error(libc::ETIMEDOUT);
            Err(SocketError { call: "connect", source }.into())
        })
    }

    /// A socket for the datagrams of `client`, open to replies from anywhere.
    ///
    /// # Errors
    /// [`ConnectError`] with the reason. Must be called within a tokio runtime.
    pub fn udp(&self, client: ClientAddr, stats: &WorkerStats) -> Result<UdpSocket, ConnectError> {
        let socket = UpstreamSocket::udp(client.get(), self.mark)?;
        // The kernel chooses a UDP port at `bind`, so only `client-port` has a second choice.
        match (self.source, self.sources(client)) {
            (SourceMode::ClientPort, (Some(first), Some(second))) => {
                if let Err(error) = socket.bind_udp_source(first).map_err(ConnectError::from) {
                    if error.reason != Reason::NoSource {
                        return Err(error);
                    }
                    stats.source_port_fallbacks.inc();
                    socket.bind_udp_source(second)?;
                }
            }
            (_, (Some(first), _)) => socket.bind_udp_source(first)?,
            (_, (None, _)) => {}
        }
        UdpSocket::from_std(socket.into_udp())
            .map_err(|source| SocketError { call: "epoll_ctl", source }.into())
    }

    /// The source to try first and the one to try where its port is taken. None: the kernel's choice.
    fn sources(&self, client: ClientAddr) -> (Option<SocketAddr>, Option<SocketAddr>) {
        let with_port = client.get();
        let mut any_port = with_port;
        any_port.set_port(0);
        match self.source {
            SourceMode::Client => (Some(any_port), Some(with_port)),
            SourceMode::ClientPort => (Some(with_port), Some(any_port)),
            SourceMode::Proxy => (None, None),
        }
    }

    async fn connect_from(
        &self,
        source: Option<SocketAddr>,
        to: UpstreamAddr,
    ) -> Result<TcpStream, ConnectError> {
        let socket = UpstreamSocket::tcp(to.get(), self.mark)?;
        if let Some(source) = source {
            socket.bind_tcp_source(source)?;
        }
        let stream = TcpSocket::from_std_stream(socket.into_tcp())
            .connect(to.get())
            .await
            .map_err(|source| SocketError { call: "connect", source })?;
        if source.is_none_or(|source| source.ip() == to.ip()) && is_self_connected(&stream) {
            sockopt::reset_on_close(&stream);
            let source = io::Error::from_raw_os_error(libc::ECONNREFUSED);
            return Err(SocketError { call: "connect", source }.into());
        }
        Ok(stream)
    }
}

/// Whether a connection has met itself: source and destination on this host, nobody
/// listens, and the kernel happens to choose the destination's port as the source port (TCP's
/// simultaneous open). It would echo the client's bytes.
fn is_self_connected(stream: &TcpStream) -> bool {
    matches!((stream.local_addr(), stream.peer_addr()), (Ok(local), Ok(peer)) if local == peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(source: SourceMode) -> (Option<SocketAddr>, Option<SocketAddr>) {
        let direct = Direct { source, mark: OwnMark(2), timeout: Duration::from_secs(1) };
        direct.sources(ClientAddr::from(SocketAddr::from(([10, 0, 0, 1], 4000))))
    }

    #[test]
    fn source_modes_prefer_what_they_promise() {
        let (any, own) = (([10, 0, 0, 1], 0).into(), ([10, 0, 0, 1], 4000).into());
        assert_eq!(sources(SourceMode::Client), (Some(any), Some(own)));
        assert_eq!(sources(SourceMode::ClientPort), (Some(own), Some(any)));
        assert_eq!(sources(SourceMode::Proxy), (None, None));
    }
}
