//! Receives datagrams, many by one system call, together with what their headers say: original
//! destination, traffic class.

use std::io;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_uint, cmsghdr, iovec, mmsghdr, msghdr, sockaddr_in, sockaddr_in6};
use nix::sys::socket::{SockaddrIn, SockaddrIn6, SockaddrStorage};

use super::send::TrafficClass;
use crate::addr::OrigDst;

/// Where what is received goes: longer than any UDP payload, so nothing is ever cut.
const BUFFER: usize = 1 << 16;

/// From one buffer to the next: were it a power of two, the first bytes of all would share a few
/// lines of the processor's caches.
const STRIDE: usize = BUFFER + 17 * 64;

/// The most that one system call takes; they take memory only once something that long has come.
pub(crate) const MOST: usize = 64;

/// Words for the control messages: original destination, traffic class, length of segments.
const CONTROL: usize = words::<sockaddr_in6>() + 2 * words::<c_int>();

/// Words of a control message with a `T`.
const fn words<T>() -> usize {
    (size_of::<cmsghdr>() + size_of::<T>()).div_ceil(size_of::<u64>())
}

/// What came with a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    /// Who sent it.
    pub(crate) sender: SocketAddr,
    /// Where to; None where the kernel did not tell, as it tells listeners alone.
    pub(crate) destination: Option<OrigDst>,
    /// With which traffic class.
    pub(crate) class: TrafficClass,
    /// Whether it came as a segment of one, with others.
    pub(crate) merged: bool,
}

/// An address as the kernel writes it.
#[derive(Clone, Copy)]
#[repr(C)]
union Name {
    v4: sockaddr_in,
    v6: sockaddr_in6,
}

/// Datagrams that were received by one system call, with room for the next: none costs an allocation.
pub(crate) struct Batch {
    bytes: Box<[u8]>,
    names: Box<[Name; MOST]>,
    controls: Box<[[u64; CONTROL]; MOST]>,
    parts: Box<[iovec; MOST]>,
    headers: Box<[mmsghdr; MOST]>,
    come: usize,
}

impl Batch {
    pub(crate) fn new() -> Self {
        // SAFETY: of all these, zeros are a value: numbers and null pointers.
        unsafe {
            Self {
                bytes: vec![0; MOST * STRIDE].into(),
                names: Box::new(std::mem::zeroed()),
                controls: Box::new([[0; CONTROL]; MOST]),
                parts: Box::new(std::mem::zeroed()),
                headers: Box::new(std::mem::zeroed()),
                come: 0,
            }
        }
    }

    /// Takes what has come, in place of what was taken before. How much it is: fewer than `most`
    /// where there is nothing more. One may be many datagrams, where a socket takes segments
    /// (`UDP_GRO`).
    ///
    /// # Errors
    /// What `recvmmsg(2)` answers; `WouldBlock` where nothing has come.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
        self.come = 0;
        let most = most.min(MOST);
        let buffers = self.bytes.chunks_exact_mut(STRIDE);
        let rooms = buffers.zip(&mut *self.names).zip(&mut *self.controls).zip(&mut *self.parts);
        for ((((buffer, name), control), part), header) in rooms.zip(&mut *self.headers).take(most) {
            *part = iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: BUFFER };
            let header = &mut header.msg_hdr;
            header.msg_name = (&raw mut *name).cast();
            header.msg_namelen = LENGTH_OF_NAME;
            header.msg_iov = part;
            header.msg_iovlen = 1;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = size_of_val(control) as _;
        }
        // SAFETY: the first `most` headers point to names, parts, buffers and control messages of the
        // lengths given, which live as long as `self` and which nothing else uses meanwhile.
        let come = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                c_uint::try_from(most).unwrap_or_default(),
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        self.come = usize::try_from(come).map_err(|_negative| io::Error::last_os_error())?;
        Ok(self.come)
    }

    /// The datagrams, in the order in which they came; an empty one is one like any other.
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = (Received, &[u8])> {
        let buffers = self.bytes.chunks_exact(STRIDE);
        let come = self.headers.iter().take(self.come).zip(&*self.names).zip(buffers);
        come.flat_map(|((header, name), buffer)| {
            let (received, segment) = told(&header.msg_hdr, name);
            let payload = buffer.get(..header.msg_len as usize).unwrap_or_default();
            split(payload, segment).map(move |datagram| (received, datagram))
        })
    }
}

/// Length of a [`Name`].
#[expect(clippy::cast_possible_truncation, reason = "28 bytes")]
const LENGTH_OF_NAME: libc::socklen_t = size_of::<Name>() as libc::socklen_t;

/// The datagrams of what was received as one: all of a size but the last, which may be shorter.
fn split(payload: &[u8], segment: Option<usize>) -> impl Iterator<Item = &[u8]> {
    let (first, rest) = payload.split_at(segment.map_or(payload.len(), |size| size.min(payload.len())));
    std::iter::once(first).chain(rest.chunks(first.len().max(1)))
}

/// What the kernel has told of a message, and how long its datagrams are where they are several.
fn told(header: &msghdr, name: &Name) -> (Received, Option<usize>) {
    let mut received =
        Received { sender: address(name), destination: None, class: TrafficClass::default(), merged: false };
    let mut segment = None;
    // SAFETY: the kernel has filled in the control messages and their length.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: what these return is null or points to a whole header of a control message.
    while let Some(control) = unsafe { next.as_ref() } {
        match (control.cmsg_level, control.cmsg_type) {
            (libc::IPPROTO_IP, libc::IP_ORIGDSTADDR) => {
                // SAFETY: that message is such an address.
                let v4 = unsafe { data::<sockaddr_in>(control) };
                received.destination = v4.map(|v4| address(&Name { v4 }).into());
            }
            (libc::IPPROTO_IPV6, libc::IPV6_ORIGDSTADDR) => {
                // SAFETY: that message is such an address.
                let v6 = unsafe { data::<sockaddr_in6>(control) };
                received.destination = v6.map(|v6| address(&Name { v6 }).into());
            }
            (libc::IPPROTO_IP, libc::IP_TOS) => {
                // SAFETY: that message is a byte.
                received.class = TrafficClass(unsafe { data(control) }.unwrap_or_default());
            }
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                // SAFETY: that message is one byte of the header in an int.
                let class: c_int = unsafe { data(control) }.unwrap_or_default();
                received.class = TrafficClass(class.to_le_bytes()[0]);
            }
            (libc::SOL_UDP, libc::UDP_GRO) => {
                // SAFETY: that message is an int.
                let size: Option<c_int> = unsafe { data(control) };
                segment = size.and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0);
            }
            _ => {}
        }
        // SAFETY: `control` is one of the messages of `header`.
        next = unsafe { libc::CMSG_NXTHDR(header, control) };
    }
    received.merged = segment.is_some();
    (received, segment)
}

/// The data of a control message; `None`: it is shorter.
///
/// # Safety
/// Any bytes are a `T`.
unsafe fn data<T>(control: &cmsghdr) -> Option<T> {
    let needed = size_of::<cmsghdr>() + size_of::<T>();
    // SAFETY: that many bytes follow the header; they need not be aligned.
    (control.cmsg_len >= needed as _)
        .then(|| unsafe { libc::CMSG_DATA(control).cast::<T>().read_unaligned() })
}

fn address(name: &Name) -> SocketAddr {
    // SAFETY: both begin with the family, and all bytes were written by the kernel or are zero.
    unsafe {
        if c_int::from(name.v4.sin_family) == libc::AF_INET6 {
            SocketAddrV6::from(SockaddrIn6::from(name.v6)).into()
        } else {
            SocketAddrV4::from(SockaddrIn::from(name.v4)).into()
        }
    }
}

pub(super) fn socket_addr(storage: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddrV4::from(*v4).into());
    }
    storage.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into())
}
