//! The sockets of the clients: none of them blocks.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use crate::MESSAGE;

/// Open files that are asked for: what the kernel grants by default (`fs.nr_open`).
const OPEN_FILES: u64 = 1 << 20;

/// What the kernel may hold of a UDP socket that many flows share: a burst is no loss.
const BUFFER: usize = 16 << 20;

/// A TCP socket that connects.
pub(crate) fn tcp(target: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM.nonblocking(), None)?;
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// Sends a request.
pub(crate) fn ask(mut socket: &Socket) -> io::Result<()> {
    socket.write(&[b'q'; MESSAGE]).map(drop)
}

/// Reads more of a response, of which `received` bytes are known; tells whether it is complete.
pub(crate) fn answer(mut socket: &Socket, received: &mut usize) -> io::Result<bool> {
    let mut response = [0; MESSAGE];
    match socket.read(&mut response[*received..]) {
        Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before its response")),
        Ok(bytes) => *received += bytes,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => return Err(error),
    }
    Ok(*received == MESSAGE)
}

/// A connected UDP socket, on this port (0: any).
pub(crate) fn udp(port: u16, target: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::DGRAM.nonblocking(), None)?;
    if port != 0 {
        let any: IpAddr =
            if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        socket.bind(&SocketAddr::new(any, port).into())?;
    }
    socket.connect(&target.into())?;
    Ok(socket)
}

/// Whether a datagram may be sent again after this error: the kernel has no room now, or
/// tells that an earlier one found nobody.
pub(crate) fn passes(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS | libc::ECONNREFUSED))
}

/// Makes a socket's buffers large: beyond `net.core.rmem_max` where this process may do so.
pub(crate) fn enlarge(socket: &Socket) -> Result<()> {
    if setsockopt(socket, sockopt::RcvBufForce, &BUFFER) == Err(Errno::EPERM) {
        setsockopt(socket, sockopt::RcvBuf, &BUFFER).context("SO_RCVBUF")?;
    }
    if setsockopt(socket, sockopt::SndBufForce, &BUFFER) == Err(Errno::EPERM) {
        setsockopt(socket, sockopt::SndBuf, &BUFFER).context("SO_SNDBUF")?;
    }
    Ok(())
}

/// Raises the limit of open files: as root to [`OPEN_FILES`], else as far as it may go.
pub(crate) fn raise_open_files() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("getrlimit of RLIMIT_NOFILE")?;
    let wanted = hard.max(OPEN_FILES);
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_err() {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("setrlimit of RLIMIT_NOFILE")?;
    }
    Ok(())
}
