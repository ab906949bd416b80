//! What is done with connections that are open.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use libc::c_int;
use nix::sys::socket::{MsgFlags, recv};
use socket2::SockRef;

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
