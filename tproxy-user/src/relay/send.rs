//! Sends packets with control messages, one or more by a system call.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_uint, c_void, cmsghdr, mmsghdr, msghdr};
use socket2::SockAddr;

/// DSCP and ECN of a packet, one byte: type of service in IPv4, traffic class in
/// IPv6 (RFC 2474, RFC 3168).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TrafficClass(pub(crate) u8);

impl TrafficClass {
    /// The control message that sends one packet with it (`IP_TOS`, Linux 3.13).
    pub(super) fn control(self, v6: bool) -> Control<c_int> {
        let (level, kind) =
            if v6 { (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) } else { (libc::IPPROTO_IP, libc::IP_TOS) };
        Control::new(level, kind, self.0.into())
    }
}

/// What datagrams are sent with that go as segments of one: their class, and how long each is.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Segments {
    class: Control<c_int>,
    length: Control<u16>,
}

impl Segments {
    pub(super) fn new(class: Control<c_int>, length: u16) -> Self {
        Self { class, length: Control::new(libc::SOL_UDP, libc::UDP_SEGMENT, length) }
    }
}

/// One control message as `cmsg(3)` lays it out: the data follows the header at its
/// own alignment, which is that of the header for the types used here. In a
/// `repr(C)` struct several follow each other as the kernel expects them.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Control<T> {
    header: cmsghdr,
    value: T,
}

impl<T> Control<T> {
    pub(super) fn new(level: c_int, kind: c_int, value: T) -> Self {
        const { assert!(align_of::<T>() <= align_of::<cmsghdr>()) };
        let header = cmsghdr {
            // What CMSG_LEN computes: no padding at the end.
            cmsg_len: (size_of::<cmsghdr>() + size_of::<T>()) as _,
            cmsg_level: level,
            cmsg_type: kind,
        };
        Self { header, value }
    }
}

/// Sends one packet now or not at all, its bytes in parts, with `control`: a
/// [`Control`], or a `repr(C)` struct of them. How many bytes were sent.
///
/// # Errors
/// What `sendmsg(2)` answers; `WouldBlock` where the send buffer is full.
pub(super) fn send<C>(
    socket: BorrowedFd<'_>,
    to: SocketAddr,
    parts: &[IoSlice<'_>],
    mut control: C,
) -> io::Result<usize> {
    let to = SockAddr::from(to);
    let message = message(&to, parts, &raw mut control);
    // SAFETY: name, parts and control are live values; the kernel only reads them.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) };
    usize::try_from(sent).map_err(|_negative| io::Error::last_os_error())
}

/// As [`send`], several packets by one system call (`sendmmsg(2)`, Linux 3.0), with the same
/// `control`. How many were sent: where it is not all, the next one's turn tells why.
///
/// # Errors
/// That of the first.
pub(super) fn send_all<C, const N: usize>(
    socket: BorrowedFd<'_>,
    to: SocketAddr,
    packets: &[[IoSlice<'_>; N]],
    mut control: C,
) -> io::Result<usize> {
    if let [packet] = packets {
        return send(socket, to, packet, control).map(|_| 1);
    }
    let to = SockAddr::from(to);
    let message = |parts: &[_; N]| mmsghdr { msg_hdr: message(&to, parts, &raw mut control), msg_len: 0 };
    let mut messages: Vec<_> = packets.iter().map(message).collect();
    let count = c_uint::try_from(messages.len()).unwrap_or(c_uint::MAX);
    // SAFETY: so many messages there are; their names, parts and control are live values, which the
    // kernel only reads.
    let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), count, 0) };
    usize::try_from(sent).map_err(|_negative| io::Error::last_os_error())
}

/// What the kernel is told of a packet. It points to what it is made of.
fn message<C>(to: &SockAddr, parts: &[IoSlice<'_>], control: *mut C) -> msghdr {
    // SAFETY: a msghdr of zeros is valid (no name, no parts, no control), also where it has padding fields.
    let mut message: msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = to.as_ptr().cast::<c_void>().cast_mut();
    message.msg_namelen = to.len();
    // An IoSlice is an iovec.
    message.msg_iov = parts.as_ptr().cast_mut().cast();
    message.msg_iovlen = parts.len() as _;
    message.msg_control = control.cast();
    message.msg_controllen = size_of::<C>() as _;
    message
}
