//! Every socket option of the proxy, and no socket option anywhere else.
//!
//! Sockets towards upstream exist only as [`UpstreamSocket`], which carries the
//! proxy's mark from its first moment: without the mark the steering programs
//! would capture what the proxy itself sends.

mod address;
mod datagram;
mod listener;
mod raw;
mod stream;
mod upstream;

pub use address::{address_towards, is_local};
pub use datagram::{Fragments, set_fragments, take_segments};
pub use listener::{ListenerOptions, accept, tcp_listener, udp_listener, waiting};
pub use raw::raw_sender;
pub use stream::{
    acknowledge, close_in_order, peek, receive, receive_telling, reset_on_close, send_fin, unacknowledged,
};
pub use upstream::UpstreamSocket;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use libc::c_int;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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

/// Has the runtime watch a socket for something to read.
///
/// # Errors
/// What `epoll_ctl(2)` answers. Must be called within a tokio runtime.
pub fn watch(listener: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is an open descriptor, always the same one, until it is dropped; nothing
    // takes it out of the AsyncFd.
    Ok(unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }?)
}

fn marked(domain: Domain, ty: Type, protocol: Protocol, mark: OwnMark) -> Result<Socket, SocketError> {
    let socket = Socket::new(domain, ty.nonblocking().cloexec(), Some(protocol)).call("socket")?;
    socket.set_mark(mark.0).call("setsockopt SO_MARK")?;
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

/// Sets an option that takes an int.
fn set_int(socket: &impl AsRawFd, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the option takes one int, whose address and size are given.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), INT) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
