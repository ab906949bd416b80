//! Sockets that clients reach, by addresses that are not this host's.

use std::io;
use std::mem::offset_of;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

use libc::c_int;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::datagram::{SHARED_BUFFER, take_segments, tell_class};
use super::stream::tell_left;
use super::{Call, OwnMark, SocketError, marked, transparent};

/// Connections that may wait to be accepted; the kernel lowers it to `net.core.somaxconn`.
const BACKLOG: c_int = 65_535;

/// What the listeners of one run have in common.
#[derive(Clone, Copy, Debug)]
pub struct ListenerOptions {
    /// Their mark; accepted sockets inherit it.
    pub mark: OwnMark,
    /// Several workers share one port. Not with eBPF steering: `bpf_sk_assign`
    /// refuses such sockets before Linux 6.6.
    pub reuse_port: bool,
}

/// A TCP listener for foreign addresses. Accepted sockets inherit mark,
/// `TCP_NODELAY`, `SO_OOBINLINE`, `TCP_INQ` and transparency.
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
    tell_left(&socket)?;
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
    setsockopt(&socket, sockopt::RcvBufForce, &SHARED_BUFFER).call("setsockopt SO_RCVBUFFORCE")?;
    socket.bind(&addr.into()).call("bind")?;
    Ok(socket.into())
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

/// How many connections wait to be accepted (`tcp_get_info`, net/ipv4/tcp.c, tells in
/// `tcpi_unacked`); `u32::MAX` where that cannot be told.
#[must_use]
pub fn waiting(listener: &impl AsRawFd) -> u32 {
    /// The kernel writes as much as it is given room for.
    const UP_TO_UNACKED: usize = offset_of!(libc::tcp_info, tcpi_unacked) + size_of::<u32>();
    let mut info = [0_u32; UP_TO_UNACKED / size_of::<u32>()];
    #[expect(clippy::cast_possible_truncation, reason = "some bytes")]
    let mut length = UP_TO_UNACKED as libc::socklen_t;
    // SAFETY: it writes no more than `length` bytes to `info`, and the length of that to `length`.
    let answer = unsafe {
        let (level, room) = (libc::IPPROTO_TCP, info.as_mut_ptr().cast());
        libc::getsockopt(listener.as_raw_fd(), level, libc::TCP_INFO, room, &raw mut length)
    };
    if answer == 0 { info[info.len() - 1] } else { u32::MAX }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_listener_tells_how_many_wait() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a listener");
        let addr = listener.local_addr().expect("its address");
        assert_eq!(waiting(&listener), 0);
        let _clients: Vec<_> = (0..3).map(|_| TcpStream::connect(addr).expect("it listens")).collect();
        // A client is connected before its last segment has arrived.
        let until = Instant::now() + Duration::from_secs(5);
        while waiting(&listener) < 3 && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        for left in (0..3).rev() {
            assert_eq!(waiting(&listener), left + 1);
            accept(listener.as_fd()).expect("one waits");
        }
        assert_eq!(waiting(&listener), 0);
    }

    #[test]
    fn what_cannot_tell_may_have_any_number() {
        let file = std::fs::File::open("/dev/null").expect("a file");
        assert_eq!(waiting(&file), u32::MAX);
    }
}
