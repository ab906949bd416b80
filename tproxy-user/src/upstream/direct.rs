//! Straight to the destination, with the source address that was asked for.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::io::{Interest, Ready};
use tokio::net::{TcpStream, UdpSocket};

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
    /// A socket for a connection to `to`.
    ///
    /// # Errors
    /// [`ConnectError`]: no descriptor left, or no `CAP_NET_ADMIN` for the mark.
    pub fn socket(&self, to: UpstreamAddr) -> Result<UpstreamSocket, ConnectError> {
        Ok(UpstreamSocket::tcp(to.get(), self.mark)?)
    }

    /// Has `socket`, or another where that cannot have a source port, connect to `to` on behalf
    /// of `client`.
    ///
    /// Where the preferred source port is taken others are tried, and that is counted: with
    /// `client-port` one of the kernel's choice; with `client` first the client's own,
    /// once the kernel has none left towards this destination (its range is some 28,000
    /// ports, which one busy client can use up); then ports out of the kernel's range.
    ///
    /// # Errors
    /// [`ConnectError`] with the reason, where it is known at once. Must be called within a tokio runtime.
    pub fn connect(
        &self,
        socket: UpstreamSocket,
        client: ClientAddr,
        to: UpstreamAddr,
        stats: &WorkerStats,
    ) -> Result<Connecting, ConnectError> {
        if self.source == SourceMode::Proxy {
            return Connecting::from(socket, None, to);
        }
        let mut result = Connecting::from(socket, Some(self.preferred(client)), to);
        let mut others = self.alternatives(client);
        let mut counted = false;
        while matches!(&result, Err(error) if error.reason == Reason::NoSource) {
            let Some(source) = others.next() else { break };
            if !std::mem::replace(&mut counted, true) {
                stats.source_port_fallbacks.inc();
            }
            result = Connecting::from(self.socket(to)?, Some(source), to);
        }
        result
    }

    /// The error of a destination that did not answer in time.
    #[must_use]
    pub fn too_slow() -> ConnectError {
        let source = io::Error::from_raw_os_error(libc::ETIMEDOUT);
        SocketError { call: "connect", source }.into()
    }

    /// A socket for the datagrams of `client`, open to replies from anywhere; of the family of `to`.
    ///
    /// # Errors
    /// [`ConnectError`] with the reason. Must be called within a tokio runtime.
    pub fn udp(
        &self,
        client: ClientAddr,
        to: UpstreamAddr,
        stats: &WorkerStats,
    ) -> Result<UdpSocket, ConnectError> {
        let socket = UpstreamSocket::udp(to.get(), self.mark)?;
        if self.source != SourceMode::Proxy {
            let mut result = socket.bind_udp_source(self.preferred(client)).map_err(ConnectError::from);
            let mut others = self.alternatives(client);
            let mut counted = false;
            while matches!(&result, Err(error) if error.reason == Reason::NoSource) {
                let Some(source) = others.next() else { break };
                if !std::mem::replace(&mut counted, true) {
                    stats.source_port_fallbacks.inc();
                }
                result = socket.bind_udp_source(source).map_err(ConnectError::from);
            }
            result?;
        }
        UdpSocket::from_std(socket.into_udp())
            .map_err(|source| SocketError { call: "epoll_ctl", source }.into())
    }

    /// The client's address, with its own port or one of the kernel's choice.
    fn preferred(&self, client: ClientAddr) -> SocketAddr {
        with_port(client, if self.source == SourceMode::ClientPort { client.port() } else { 0 })
    }

    /// What to try where the preferred port is taken.
    fn alternatives(&self, client: ClientAddr) -> impl Iterator<Item = SocketAddr> + use<> {
        let second = if self.source == SourceMode::ClientPort { 0 } else { client.port() };
        std::iter::once(second).chain(scattered(client.port())).map(move |port| with_port(client, port))
    }
}

/// A connection that is being made.
#[derive(Debug)]
pub struct Connecting {
    stream: TcpStream,
    may_meet_itself: bool,
}

impl Connecting {
    fn from(
        socket: UpstreamSocket,
        source: Option<SocketAddr>,
        to: UpstreamAddr,
    ) -> Result<Self, ConnectError> {
        if let Some(source) = source {
            socket.bind_tcp_source(source)?;
        }
        let stream = TcpStream::from_std(socket.connect(to.get())?)
            .map_err(|source| SocketError { call: "epoll_ctl", source })?;
        Ok(Self { stream, may_meet_itself: source.is_none_or(|source| source.ip() == to.ip()) })
    }

    /// Waits until it is made.
    ///
    /// # Errors
    /// [`ConnectError`] with the reason. There is no time-out here.
    pub async fn made(self) -> Result<TcpStream, ConnectError> {
        let failed = |source| SocketError { call: "connect", source };
        // As one who waits for the socket alone, which costs less than as one of many.
        poll_fn(|cx| self.stream.poll_write_ready(cx)).await.map_err(failed)?;
        let ready = self.stream.ready(Interest::WRITABLE | Interest::ERROR).now_or_never();
        let ready = ready.transpose().map_err(failed)?.unwrap_or(Ready::WRITABLE);
        // Asked for only where there is one: a system call less.
        if ready.is_error() || ready.is_write_closed() {
            let error = self.stream.take_error().map_err(failed)?;
            return Err(failed(error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())).into());
        }
        if self.may_meet_itself && is_self_connected(&self.stream) {
            sockopt::reset_on_close(&self.stream);
            let source = io::Error::from_raw_os_error(libc::ECONNREFUSED);
            return Err(SocketError { call: "connect", source }.into());
        }
        Ok(self.stream)
    }
}

fn with_port(client: ClientAddr, port: u16) -> SocketAddr {
    let mut source = client.get();
    source.set_port(port);
    source
}

/// A few unprivileged ports, far from each other and from those of the client's next
/// connections. Where half of all ports are taken, one of them is free but for 1 in 65,536.
fn scattered(seed: u16) -> impl Iterator<Item = u16> {
    const FIRST: u32 = 1024;
    const COUNT: u32 = 65_536 - FIRST;
    /// The golden section of `COUNT`, and without a common divisor: multiples spread evenly.
    const STEP: u32 = 39_871;
    (1..=16).filter_map(move |i| u16::try_from(FIRST + (u32::from(seed) + i * STEP) % COUNT).ok())
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

    fn direct(source: SourceMode) -> Direct {
        Direct { source, mark: OwnMark(2), timeout: Duration::from_secs(1) }
    }

    #[test]
    fn source_modes_prefer_what_they_promise() {
        let client = ClientAddr::from(SocketAddr::from(([10, 0, 0, 1], 4000)));
        let (any, own) = (([10, 0, 0, 1], 0).into(), ([10, 0, 0, 1], 4000).into());
        assert_eq!(direct(SourceMode::Client).preferred(client), any);
        assert_eq!(direct(SourceMode::Client).alternatives(client).next(), Some(own));
        assert_eq!(direct(SourceMode::ClientPort).preferred(client), own);
        assert_eq!(direct(SourceMode::ClientPort).alternatives(client).next(), Some(any));
    }

    proptest::proptest! {
        #[test]
        fn scattered_ports_are_unprivileged_and_differ(seed: u16) {
            let ports: Vec<u16> = scattered(seed).collect();
            let distinct: std::collections::HashSet<_> = ports.iter().collect();
            assert_eq!((ports.len(), distinct.len()), (16, 16));
            assert!(ports.iter().all(|port| *port >= 1024));
        }
    }
}
