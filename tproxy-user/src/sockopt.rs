//! Every socket option of the proxy, and no socket option anywhere else.
//!
//! Sockets towards upstream exist only as [`UpstreamSocket`], which carries the
//! proxy's mark from its first moment: without the mark the steering programs
//! would capture what the proxy itself sends.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use libc::c_int;
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, SockFilter, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Connections that may wait to be accepted; the kernel lowers it to `net.core.somaxconn`.
const BACKLOG: c_int = 65_535;

/// Receive buffer of a UDP listener and send buffer of the reply sockets, in
/// bytes: one socket serves all clients of a worker, and a burst of them must
/// fit while the worker is busy.
const SHARED_UDP_BUFFER: usize = 4 << 20;

/// Receive buffer of one UDP flow, in bytes: some 64 KiB datagrams with the
/// kernel's own overhead. It is a bound, not an allocation.
const FLOW_UDP_BUFFER: usize = 1 << 20;

/// Length of the options that are one int.
#[expect(clippy::cast_possible_truncation, reason = "an int is four bytes")]
const INT: libc::socklen_t = size_of::<c_int>() as libc::socklen_t;

/// A system call on a socket that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}")]
pub struct SocketError {
    /// The call, with the option where it is `setsockopt`.
    pub call: &'static str,
    /// What the kernel answered.
    pub source: io::Error,
}

impl SocketError {
    /// The errno, where there is one.
    #[must_use]
    pub fn errno(&self) -> Option<c_int> {
        self.source.raw_os_error()
    }
}

/// Names the call that a result belongs to.
trait Call<T> {
    fn call(self, call: &'static str) -> Result<T, SocketError>;
}

impl<T, E: Into<io::Error>> Call<T> for Result<T, E> {
    fn call(self, call: &'static str) -> Result<T, SocketError> {
        self.map_err(|error| SocketError { call, source: error.into() })
    }
}

/// The mark (`SO_MARK`) of every socket that the proxy makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnMark(pub u32);

/// Whether datagrams of a socket over IPv4 may be fragmented (`IP_MTU_DISCOVER`, ip(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragments {
    /// They may, here and by routers (`IP_PMTUDISC_DONT`).
    Allowed,
    /// They must not: they have the DF bit, and the learned path MTU does not matter, as in a
    /// router (`IP_PMTUDISC_PROBE`, Linux 2.6.22). What the device cannot take is `EMSGSIZE`.
    Forbidden,
    /// They may again (`IP_PMTUDISC_OMIT`, Linux 3.14): here by the MTU of the device alone. Under
    /// `IP_PMTUDISC_DONT` the kernel would not tell that an earlier one was too long (`__udp4_lib_err`).
    AllowedAgain,
}

impl Fragments {
    /// What the next datagram needs.
    #[must_use]
    pub const fn next(self, dont_fragment: bool) -> Self {
        match (dont_fragment, self) {
            (true, _) => Self::Forbidden,
            (false, Self::Allowed) => Self::Allowed,
            (false, Self::Forbidden | Self::AllowedAgain) => Self::AllowedAgain,
        }
    }

    const fn option(self) -> c_int {
        match self {
            Self::Allowed => libc::IP_PMTUDISC_DONT,
            Self::Forbidden => libc::IP_PMTUDISC_PROBE,
            Self::AllowedAgain => libc::IP_PMTUDISC_OMIT,
        }
    }
}

/// What the listeners of one run have in common.
#[derive(Clone, Copy, Debug)]
pub struct ListenerOptions {
    /// Their mark; accepted sockets inherit it.
    pub mark: OwnMark,
    /// Several workers share one port. Not with eBPF steering: `bpf_sk_assign`
    /// refuses such sockets before Linux 6.6.
    pub reuse_port: bool,
}

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
    /// not, [`acknowledge`] is to be called.
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

/// A TCP listener for foreign addresses. Accepted sockets inherit mark,
/// `TCP_NODELAY`, `SO_OOBINLINE` and transparency.
///
/// # Errors
/// [`SocketError`]: `EPERM` without `CAP_NET_ADMIN`, `EADDRINUSE`, `EAFNOSUPPORT`
/// where the family is off.
pub fn tcp_listener(addr: SocketAddr, options: ListenerOptions) -> Result<TcpListener, SocketError> {
    let socket = listener(addr, Type::STREAM, Protocol::TCP, options)?;
    // Accepted sockets occupy their original destination's port and inherit this: with it, a
    // local server that sets it too (all do) can still be started on that port.
    socket.set_reuse_address(true).call("setsockopt SO_REUSEADDR")?;
    socket.set_tcp_nodelay(true).call("setsockopt TCP_NODELAY")?;
    socket.set_out_of_band_inline(true).call("setsockopt SO_OOBINLINE")?;
    socket.bind(&addr.into()).call("bind")?;
    socket.listen(BACKLOG).call("listen")?;
    Ok(socket.into())
}

/// A UDP socket for foreign addresses that tells each datagram's traffic class and original
/// destination (`IP_RECVORIGDSTADDR`, Linux 2.6.29; `IPV6_RECVORIGDSTADDR`, Linux 2.6.38).
///
/// # Errors
/// As [`tcp_listener`].
pub fn udp_listener(addr: SocketAddr, options: ListenerOptions) -> Result<UdpSocket, SocketError> {
    let socket = listener(addr, Type::DGRAM, Protocol::UDP, options)?;
    if addr.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6OrigDstAddr, &true).call("setsockopt IPV6_RECVORIGDSTADDR")?;
    } else {
        setsockopt(&socket, sockopt::Ipv4OrigDstAddr, &true).call("setsockopt IP_RECVORIGDSTADDR")?;
    }
    tell_class(&socket, addr.is_ipv6())?;
    take_segments(&socket)?;
    setsockopt(&socket, sockopt::RcvBufForce, &SHARED_UDP_BUFFER).call("setsockopt SO_RCVBUFFORCE")?;
    socket.bind(&addr.into()).call("bind")?;
    Ok(socket.into())
}

/// A raw socket that sends packets of a protocol from any address and receives nothing.
///
/// The kernel would copy every such packet of the host to it. Two things keep it
/// from that: it is bound to an address to which nothing is sent (the copy is not
/// even made), and a filter drops all.
///
/// # Errors
/// [`SocketError`]: `EPERM` without `CAP_NET_RAW` and `CAP_NET_ADMIN`, `EAFNOSUPPORT`
/// where the family is off.
pub fn raw_sender(v6: bool, protocol: Protocol, mark: OwnMark) -> Result<OwnedFd, SocketError> {
    /// `BPF_RET | BPF_K`: keep as many bytes as the constant says, which is none.
    const DROP_ALL: u16 = 0x06;
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket = marked(domain, Type::RAW, protocol, mark)?;
    socket.attach_filter(&[SockFilter::new(DROP_ALL, 0, 0, 0)]).call("setsockopt SO_ATTACH_FILTER")?;
    transparent(&socket, v6)?;
    allow_fragments(&socket, v6)?;
    setsockopt(&socket, sockopt::SndBufForce, &SHARED_UDP_BUFFER).call("setsockopt SO_SNDBUFFORCE")?;
    // 127/8's last address but one is nobody's, 100::/64 is the discard prefix (RFC 6666).
    let nowhere: SocketAddr = if v6 {
        (Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1), 0).into()
    } else {
        (Ipv4Addr::new(127, 255, 255, 254), 0).into()
    };
    socket.bind(&nowhere.into()).call("bind")?;
    Ok(socket.into())
}

/// Takes one connection from a listener: non-blocking, close-on-exec (`accept4`, Linux 2.6.28).
///
/// # Errors
/// What `accept4(2)` answers; `WouldBlock` where none waits.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<(TcpStream, SocketAddr)> {
    // SAFETY: `try_init` passes a zeroed storage and its size, which `accept4` fills in.
    let (fd, peer) = unsafe {
        SockAddr::try_init(|storage, len| {
            let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            match libc::accept4(listener.as_raw_fd(), storage.cast(), len, flags) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(fd),
            }
        })?
    };
    // SAFETY: the kernel has just handed out `fd`; nothing else owns it.
    let stream = unsafe { TcpStream::from_raw_fd(fd) };
    let peer = peer.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok((stream, peer))
}

/// Looks at what can be read, and leaves it there. Does not wait.
///
/// # Errors
/// What `recv(2)` answers.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(socket.as_raw_fd(), buffer, flags).map_err(Into::into)
}

/// Reads what is there. Does not wait.
///
/// # Errors
/// What `recv(2)` answers; `WouldBlock` where nothing is there.
pub fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<usize> {
    recv(socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT).map_err(Into::into)
}

/// Has the runtime watch a socket for something to read.
///
/// # Errors
/// What `epoll_ctl(2)` answers. Must be called within a tokio runtime.
pub fn watch(listener: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is an open descriptor, always the same one, until it is dropped; nothing
    // takes it out of the AsyncFd.
    Ok(unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }?)
}

/// Makes a later close send RST instead of FIN, and drop unsent data
/// (`SO_LINGER` of zero). An error means that the connection is gone already.
pub fn reset_on_close(stream: &impl AsFd) {
    let result = SockRef::from(stream).set_linger(Some(Duration::ZERO));
    if let Err(error) = result {
        tracing::trace!(%error, "SO_LINGER");
    }
}

/// Undoes [`reset_on_close`].
pub fn close_in_order(stream: &impl AsFd) {
    let result = SockRef::from(stream).set_linger(None);
    if let Err(error) = result {
        tracing::trace!(%error, "SO_LINGER");
    }
}

/// Acknowledges what waits to be acknowledged. An error means that the connection is gone.
pub fn acknowledge(stream: &impl AsFd) {
    if let Err(error) = SockRef::from(stream).set_tcp_quickack(true) {
        tracing::trace!(%error, "TCP_QUICKACK");
    }
}

/// Sends FIN after what was written.
///
/// # Errors
/// `ENOTCONN` where the connection is gone.
pub fn send_fin(stream: &impl AsFd) -> io::Result<()> {
    SockRef::from(stream).shutdown(Shutdown::Write)
}

/// Bytes written that the peer has not acknowledged (`SIOCOUTQ`); 0 on a dead connection.
#[must_use]
pub fn unacknowledged(stream: BorrowedFd<'_>) -> usize {
    let mut bytes: c_int = 0;
    // SAFETY: TIOCOUTQ (= SIOCOUTQ, tcp(7)) writes one int through the pointer.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == -1 { 0 } else { usize::try_from(bytes).unwrap_or(0) }
}

/// Allows or forbids fragments of what a UDP socket over IPv4 sends from now on.
///
/// # Errors
/// [`SocketError`] of `setsockopt`.
pub fn set_fragments(socket: BorrowedFd<'_>, fragments: Fragments) -> Result<(), SocketError> {
    set_int(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, fragments.option())
        .call("setsockopt IP_MTU_DISCOVER")
}

/// This host's address towards another one, by its routes. Nothing is sent.
///
/// # Errors
/// [`SocketError`]: no descriptor left, no route.
pub fn address_towards(peer: SocketAddr, mark: OwnMark) -> Result<IpAddr, SocketError> {
    let socket = marked(Domain::for_address(peer), Type::DGRAM, Protocol::UDP, mark)?;
    socket.connect(&peer.into()).call("connect")?;
    let here = socket.local_addr().call("getsockname")?.as_socket();
    here.map(|here| here.ip()).ok_or(io::Error::from(io::ErrorKind::InvalidData)).call("getsockname")
}

/// Whether an address is this host's: an ordinary socket can be bound to it.
#[must_use]
pub fn is_local(addr: SocketAddr) -> bool {
    UdpSocket::bind((addr.ip(), 0)).is_ok()
}

fn marked(domain: Domain, ty: Type, protocol: Protocol, mark: OwnMark) -> Result<Socket, SocketError> {
    let socket = Socket::new(domain, ty.nonblocking().cloexec(), Some(protocol)).call("socket")?;
    socket.set_mark(mark.0).call("setsockopt SO_MARK")?;
    Ok(socket)
}

fn listener(
    addr: SocketAddr,
    ty: Type,
    protocol: Protocol,
    options: ListenerOptions,
) -> Result<Socket, SocketError> {
    let socket = marked(Domain::for_address(addr), ty, protocol, options.mark)?;
    transparent(&socket, addr.is_ipv6())?;
    if addr.is_ipv6() {
        // IPv4 has listeners of its own.
        socket.set_only_v6(true).call("setsockopt IPV6_V6ONLY")?;
    }
    if options.reuse_port {
        socket.set_reuse_port(true).call("setsockopt SO_REUSEPORT")?;
    }
    Ok(socket)
}

/// `IP_TRANSPARENT` (Linux 2.6.28), `IPV6_TRANSPARENT` (Linux 2.6.37): addresses that are not this host's.
fn transparent(socket: &Socket, v6: bool) -> Result<(), SocketError> {
    if v6 {
        socket.set_ip_transparent_v6(true).call("setsockopt IPV6_TRANSPARENT")
    } else {
        socket.set_ip_transparent_v4(true).call("setsockopt IP_TRANSPARENT")
    }
}

/// No path MTU discovery: large datagrams leave in fragments instead of failing with `EMSGSIZE`.
fn allow_fragments(socket: &Socket, v6: bool) -> Result<(), SocketError> {
    let (level, option, value) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
    };
    set_int(socket, level, option, value).call("setsockopt IP_MTU_DISCOVER")
}

/// DSCP and ECN of each datagram are told (`IP_RECVTOS`, Linux 2.2; `IPV6_RECVTCLASS`, Linux 2.6.14).
fn tell_class(socket: &Socket, v6: bool) -> Result<(), SocketError> {
    let (level, option) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS) } else { (libc::IPPROTO_IP, libc::IP_RECVTOS) };
    set_int(socket, level, option, 1).call("setsockopt IP_RECVTOS")
}

/// Datagrams that this kernel or their sender's has merged are received as one, with the length of each
/// (`UDP_GRO`, Linux 5.0). Without it the kernel cuts them first.
///
/// # Errors
/// [`SocketError`] of `setsockopt`.
pub fn take_segments(socket: &impl AsRawFd) -> Result<(), SocketError> {
    set_int(socket, libc::SOL_UDP, libc::UDP_GRO, 1).call("setsockopt UDP_GRO")
}

/// ICMP errors about what was sent are queued with the datagram that they are about
/// (`IP_RECVERR`, Linux 2.2), also on a socket that is not connected.
fn queue_errors(socket: &Socket, v6: bool) -> Result<(), SocketError> {
    let (level, option) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_RECVERR) } else { (libc::IPPROTO_IP, libc::IP_RECVERR) };
    set_int(socket, level, option, 1).call("setsockopt IP_RECVERR")
}

/// Sets an option that takes an int.
fn set_int(socket: &impl AsRawFd, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the option takes one int, whose address and size are given.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), INT) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::Fragments;

    #[test]
    fn errors_about_datagrams_with_df_are_told_ever_after() {
        let after = |flags: &[bool]| flags.iter().fold(Fragments::Allowed, |now, df| now.next(*df));
        assert_eq!(after(&[false, false]), Fragments::Allowed);
        assert_eq!(after(&[false, true]), Fragments::Forbidden);
        assert_eq!(after(&[true, false, false]), Fragments::AllowedAgain);
        assert_eq!(after(&[true, false, true]), Fragments::Forbidden);
    }
}
