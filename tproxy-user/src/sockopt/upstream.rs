//! Sockets towards upstream.

use std::net::{SocketAddr, TcpStream, UdpSocket};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::datagram::{allow_fragments, queue_errors, tell_class};
use super::stream::tell_left;
use super::{Call, OwnMark, SocketError, marked, transparent};

/// Receive buffer of one UDP flow, in bytes: some 64 KiB datagrams with the
/// kernel's own overhead. It is a bound, not an allocation.
const FLOW_UDP_BUFFER: usize = 1 << 20;

/// A socket towards upstream: marked, non-blocking, close-on-exec.
#[derive(Debug)]
pub struct UpstreamSocket(Socket);

impl UpstreamSocket {
    /// A TCP socket for `peer`'s family.
    ///
    /// # Errors
    /// [`SocketError`]: no descriptor left, or no `CAP_NET_ADMIN` for the mark.
    pub fn tcp(peer: SocketAddr, mark: OwnMark) -> Result<Self, SocketError> {
        let socket = marked(Domain::for_address(peer), Type::STREAM, Protocol::TCP, mark)?;
        // The relay writes what it has read at once; holding it back would add the delay of
        // Nagle's algorithm to whatever the two ends do themselves.
        socket.set_tcp_nodelay(true).call("setsockopt TCP_NODELAY")?;
        // A byte of urgent data is part of the stream here, or it would be lost.
        socket.set_out_of_band_inline(true).call("setsockopt SO_OOBINLINE")?;
        tell_left(&socket)?;
        Ok(Self(socket))
    }

    /// A UDP socket of the client's family, unconnected and without an address.
    /// It sends datagrams larger than the path MTU in fragments, tells the traffic class of
    /// what it receives, and queues ICMP errors about what it has sent.
    ///
    /// # Errors
    /// [`SocketError`]: no descriptor left, or no `CAP_NET_ADMIN` for the mark.
    pub fn udp(client: SocketAddr, mark: OwnMark) -> Result<Self, SocketError> {
        let socket = marked(Domain::for_address(client), Type::DGRAM, Protocol::UDP, mark)?;
        if client.is_ipv6() {
            socket.set_only_v6(true).call("setsockopt IPV6_V6ONLY")?;
        }
        allow_fragments(&socket, client.is_ipv6())?;
        tell_class(&socket, client.is_ipv6())?;
        queue_errors(&socket, client.is_ipv6())?;
        setsockopt(&socket, sockopt::RcvBufForce, &FLOW_UDP_BUFFER).call("setsockopt SO_RCVBUFFORCE")?;
        Ok(Self(socket))
    }

    /// Gives a TCP socket a source address that need not be this host's.
    ///
    /// With port 0 the choice is left to `connect` (`IP_BIND_ADDRESS_NO_PORT`, Linux 4.2),
    /// which may use one port for as many connections as there are destinations; a choice
    /// at `bind` would end at some 28,000 connections a client.
    ///
    /// # Errors
    /// [`SocketError`] of `bind`: `EADDRINUSE` where the port is taken.
    pub fn bind_tcp_source(&self, source: SocketAddr) -> Result<(), SocketError> {
        transparent(&self.0, source.is_ipv6())?;
        // Lets one client port go to several destinations, and keeps a local server from
        // failing to bind a port that a client happens to use.
        self.0.set_reuse_address(true).call("setsockopt SO_REUSEADDR")?;
        if source.port() == 0 {
            setsockopt(&self.0, sockopt::IpBindAddressNoPort, &true)
                .call("setsockopt IP_BIND_ADDRESS_NO_PORT")?;
        }
        self.0.bind(&source.into()).call("bind")
    }

    /// Gives a UDP socket a source address that need not be this host's; port 0
    /// lets the kernel choose.
    ///
    /// # Errors
    /// [`SocketError`] of `bind`: `EADDRINUSE` where the port is taken.
    pub fn bind_udp_source(&self, source: SocketAddr) -> Result<(), SocketError> {
        transparent(&self.0, source.is_ipv6())?;
        self.0.bind(&source.into()).call("bind")
    }

    /// Begins to connect, for a runtime to wait for.
    ///
    /// The last ACK of the handshake waits (at most 200 ms, `TCP_DELACK_MAX`) for data to go
    /// with: one packet less where the client's first bytes are there by then. Where they are
    /// not, [`acknowledge`](super::acknowledge) is to be called.
    ///
    /// # Errors
    /// [`SocketError`] of `connect`.
    pub fn connect(self, peer: SocketAddr) -> Result<TcpStream, SocketError> {
        // `inet_csk_enter_pingpong_mode`, of which `tcp_rcv_synsent_state_process` makes quick
        // acknowledgements again.
        self.0.set_tcp_quickack(false).call("setsockopt TCP_QUICKACK")?;
        match self.0.connect(&peer.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error).call("connect"),
            _ => Ok(self.0.into()),
        }
    }

    /// The socket for a runtime to receive from.
    #[must_use]
    pub fn into_udp(self) -> UdpSocket {
        self.0.into()
    }
}
