//! Many datagrams by one system call.
//!
//! nix has `sendmmsg`, but with the same control messages for all datagrams: an echo has to
//! leave each from the address that it was sent to.
#![expect(unsafe_code, reason = "recvmmsg and sendmmsg")]

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use libc::{cmsghdr, iovec, mmsghdr, sockaddr_in, sockaddr_in6, sockaddr_storage};

/// Room for one `IP_PKTINFO`, `IPV6_PKTINFO` or `UDP_GRO`.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Datagrams, and what the kernel tells of each.
pub(crate) struct Batch {
    /// Room for one datagram.
    size: usize,
    data: Vec<u8>,
    /// Sender of a received datagram, receiver of a sent one.
    names: Vec<sockaddr_storage>,
    /// Told of a received datagram; for a sent one the kernel is told the same.
    controls: Vec<Control>,
    parts: Vec<iovec>,
    headers: Vec<mmsghdr>,
}

impl Batch {
    /// `count` datagrams of `size` bytes, all zero, for the other end of a connected socket.
    pub(crate) fn new(count: usize, size: usize) -> Self {
        // SAFETY: all of it integers and pointers, which may be zero.
        let (name, header) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        Self {
            size,
            data: vec![0; count * size],
            names: vec![name; count],
            controls: vec![Control([0; 64]); count],
            parts: vec![iovec { iov_base: ptr::null_mut(), iov_len: size }; count],
            headers: vec![header; count],
        }
    }

    /// Lets the kernel read and write these datagrams. The pointers hold until another field
    /// is used: each call takes new ones.
    fn point(&mut self) {
        let all = self.headers.iter_mut().zip(&mut self.parts);
        let rest = self.names.iter_mut().zip(&mut self.controls).zip(self.data.chunks_exact_mut(self.size));
        for ((header, part), ((name, control), data)) in all.zip(rest) {
            part.iov_base = data.as_mut_ptr().cast();
            let header = &mut header.msg_hdr;
            header.msg_iov = part;
            header.msg_iovlen = 1;
            // Without a length there is none: the pointer alone is not looked at.
            header.msg_name = ptr::from_mut(name).cast();
            header.msg_control = ptr::from_mut(control).cast();
        }
    }

    /// Receives what is there, with its senders: at least one datagram, or `WouldBlock`.
    /// With `MSG_TRUNC`, [`length`](Self::length) also counts bytes that there is no room for.
    pub(crate) fn receive(&mut self, socket: impl AsFd, flags: i32) -> io::Result<usize> {
        for (header, part) in self.headers.iter_mut().zip(&mut self.parts) {
            part.iov_len = self.size;
            header.msg_hdr.msg_namelen = length_of::<sockaddr_storage>();
            header.msg_hdr.msg_controllen = size_of::<Control>() as _;
        }
        self.point();
        let fd = socket.as_fd().as_raw_fd();
        let count = u32::try_from(self.headers.len()).unwrap_or(u32::MAX);
        let flags = flags | libc::MSG_DONTWAIT;
        // SAFETY: `point` has set every pointer of the `count` headers to memory of `self` of
        // the length that is given beside it.
        let received =
            unsafe { libc::recvmmsg(fd, self.headers.as_mut_ptr(), count, flags as _, ptr::null_mut()) };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        for (header, part) in self.headers.iter().zip(&mut self.parts).take(received) {
            part.iov_len = self.size.min(header.msg_len as usize);
        }
        Ok(received)
    }

    /// Sends these datagrams: to the other end of a connected socket, or, what was received,
    /// back. Tells how many went.
    pub(crate) fn send(&mut self, socket: impl AsFd, range: Range<usize>) -> io::Result<usize> {
        self.point();
        let headers = &mut self.headers[range];
        let count = u32::try_from(headers.len()).unwrap_or(u32::MAX);
        // SAFETY: as above; the lengths of name and control message are zero, or what the
        // kernel itself has set when it wrote them.
        let sent = unsafe { libc::sendmmsg(socket.as_fd().as_raw_fd(), headers.as_mut_ptr(), count, 0) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Bytes of a received datagram.
    pub(crate) fn length(&self, index: usize) -> u32 {
        self.headers[index].msg_len
    }

    /// Datagrams that the kernel has merged into a received one (`UDP_GRO`): 1 where it has not.
    pub(crate) fn merged(&self, index: usize) -> u32 {
        const DATA: usize = size_of::<cmsghdr>();
        let control = &self.controls[index];
        if self.headers[index].msg_hdr.msg_controllen <= DATA as _ {
            return 1;
        }
        // SAFETY: it has room and alignment for the header, which is all integers.
        let header = unsafe { &*ptr::from_ref(control).cast::<cmsghdr>() };
        if (header.cmsg_level, header.cmsg_type) != (libc::SOL_UDP, libc::UDP_GRO) {
            return 1;
        }
        let size = control.0[DATA..].first_chunk().map_or(0, |size| u32::from_ne_bytes(*size));
        self.length(index).div_ceil(size.max(1))
    }

    /// Whom a received datagram came from.
    pub(crate) fn sender(&self, index: usize) -> Option<IpAddr> {
        let name = &self.names[index];
        match i32::from(name.ss_family) {
            libc::AF_INET => {
                // SAFETY: a `sockaddr_storage` has room and alignment for every address, and
                // its family tells which one it is.
                let name = unsafe { &*ptr::from_ref(name).cast::<sockaddr_in>() };
                Some(Ipv4Addr::from_bits(u32::from_be(name.sin_addr.s_addr)).into())
            }
            libc::AF_INET6 => {
                // SAFETY: as above.
                let name = unsafe { &*ptr::from_ref(name).cast::<sockaddr_in6>() };
                Some(Ipv6Addr::from_octets(name.sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the sizes of structures of the kernel")]
const fn length_of<T>() -> u32 {
    size_of::<T>() as u32
}
