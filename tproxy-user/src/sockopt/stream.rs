//! What is done with connections that are open.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use libc::c_int;
use nix::sys::socket::{MsgFlags, recv};
use socket2::SockRef;

use super::{Call as _, INT, SocketError, set_int};

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

/// Has [`receive_telling`] tell what is left (`TCP_INQ`, Linux 4.18). Accepted sockets inherit it
/// from their listener.
pub(super) fn tell_left(socket: &impl AsRawFd) -> Result<(), SocketError> {
    set_int(socket, libc::IPPROTO_TCP, libc::TCP_INQ, 1).call("setsockopt TCP_INQ")
}

/// As [`receive`], and how much is left to read after it: more than 0 also where the peer has
/// closed its direction (`tcp_inq_hint`). `None` where the socket does not tell.
///
/// # Errors
/// As [`receive`].
pub fn receive_telling(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<(usize, Option<c_int>)> {
    /// Room for one control message of an int, aligned as its header.
    type Control = [usize; 3];
    // SAFETY: `CMSG_SPACE` computes a size.
    const { assert!(unsafe { libc::CMSG_SPACE(INT) } as usize <= size_of::<Control>()) };
    let mut control: Control = [0; 3];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a `msghdr` of zeros is valid: it has no address, no buffer and no control message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: the message describes `buffer` and `control`, which outlive the call.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has set the length of what it wrote to `control`, and the first message
    // in it is null or whole.
    let left = unsafe {
        libc::CMSG_FIRSTHDR(&raw const message)
            .as_ref()
            .filter(|header| (header.cmsg_level, header.cmsg_type) == (libc::SOL_TCP, libc::TCP_CM_INQ))
            .map(|header| libc::CMSG_DATA(header).cast::<c_int>().read_unaligned())
    };
    Ok((length, left))
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        tell_left(&listener).expect("a TCP socket");
        let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
        let (server, _) = listener.accept().expect("the connection");
        (client, server)
    }

    /// Once something is there: loopback delivers before `send` returns, but not the end.
    fn told(socket: &TcpStream, size: usize) -> (usize, Option<c_int>) {
        let mut buffer = [0; 64];
        for _ in 0..100 {
            match receive_telling(socket, &mut buffer[..size]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    thread::sleep(Duration::from_millis(10));
                }
                told => return told.expect("an open connection"),
            }
        }
        panic!("nothing came");
    }

    #[test]
    fn a_read_tells_what_is_left() {
        let (mut client, server) = pair();
        client.write_all(b"abcde").expect("room");
        assert_eq!(told(&server, 3), (3, Some(2)));
        assert_eq!(told(&server, 64), (2, Some(0)));
    }

    #[test]
    fn a_read_that_ends_before_urgent_data_tells_that_more_is_there() {
        let (mut client, server) = pair();
        SockRef::from(&server).set_out_of_band_inline(true).expect("a TCP socket");
        client.write_all(b"ab").expect("room");
        SockRef::from(&client).send_out_of_band(b"!").expect("room");
        client.write_all(b"cd").expect("room");
        assert_eq!(told(&server, 64), (2, Some(3)));
        assert_eq!(told(&server, 64), (3, Some(0)));
    }

    #[test]
    fn the_end_is_left() {
        let (mut client, server) = pair();
        client.write_all(b"ab").expect("room");
        drop(client);
        thread::sleep(Duration::from_millis(100));
        assert!(matches!(told(&server, 64), (2, Some(1..))));
        assert_eq!(told(&server, 64).0, 0);
    }

    #[test]
    fn a_socket_that_does_not_tell() {
        let (client, mut server) = pair();
        server.write_all(b"ab").expect("room");
        assert_eq!(told(&client, 64), (2, None));
    }
}
