//! The one place that speaks to `AF_PACKET`, packet(7): its options are in no crate.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::sockopt;

/// Length of `struct virtio_net_hdr` (`include/uapi/linux/virtio_net.h`).
const VNET: usize = 10;
/// Enough for a capture that nobody reads for a while; the kernel takes the memory only as it fills.
const BUFFER: libc::c_int = 512 << 20;

/// `AF_PACKET` and `ETH_P_ALL`, in the width of the fields that hold them.
const FAMILY: u16 = 17;
const EVERYTHING: u16 = 3;
const LINK_SIZE: libc::socklen_t = 20;
const STATS_SIZE: libc::socklen_t = 8;
const _: () = {
    assert!(FAMILY as libc::c_int == libc::AF_PACKET);
    assert!(EVERYTHING as libc::c_int == libc::ETH_P_ALL);
    assert!(LINK_SIZE as usize == size_of::<libc::sockaddr_ll>());
    assert!(STATS_SIZE as usize == size_of::<[u32; 2]>());
};

/// A socket that gets a copy of every packet of an interface.
#[derive(Debug)]
pub(crate) struct PacketSocket(Socket);

impl PacketSocket {
    pub(crate) fn open(interface: &str) -> Result<Self> {
        // Protocol 0 until bound: else it would get packets of all interfaces.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None).context("no packet socket")?;
        let fd = socket.as_fd();
        sockopt::set(fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1).context("PACKET_VNET_HDR")?;
        sockopt::set(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER).context("SO_RCVBUFFORCE")?;
        socket.set_nonblocking(true)?;
        let index =
            nix::net::if_::if_nametoindex(interface).with_context(|| format!("no interface {interface}"))?;
        // SAFETY: `sockaddr_ll` is written as a whole, fits the storage, and its length is given.
        let ((), address) = unsafe {
            SockAddr::try_init(|storage, length| {
                let mut link: libc::sockaddr_ll = MaybeUninit::zeroed().assume_init();
                link.sll_family = FAMILY;
                link.sll_protocol = EVERYTHING.to_be();
                link.sll_ifindex = index.cast_signed();
                storage.cast::<libc::sockaddr_ll>().write(link);
                *length = LINK_SIZE;
                Ok(())
            })
        }?;
        socket.bind(&address)?;
        Ok(Self(socket))
    }

    /// Waits a moment for packets; whether there are any.
    pub(crate) fn wait(&self) -> bool {
        let mut wanted = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut wanted, PollTimeout::from(50_u8)).is_ok_and(|ready| ready > 0)
    }

    /// The next packet: the size of its segments on the wire (0: it is one),
    /// and as much of it as fits into the buffer.
    pub(crate) fn read<'a>(&self, buffer: &'a mut [u8]) -> Option<(u16, &'a [u8])> {
        let length = (&self.0).read(buffer).ok()?;
        let (header, frame) = buffer[..length].split_at_checked(VNET)?;
        // Offsets of `gso_type` and `gso_size`, host byte order.
        let segmented = header[1] != 0;
        Some((if segmented { u16::from_ne_bytes([header[4], header[5]]) } else { 0 }, frame))
    }

    /// Puts a frame on the wire, whatever is in it.
    ///
    /// # Errors
    /// Where the interface does not take it.
    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        // Without a header of its own, the frame is to be sent as it is.
        let framed = [&[0; VNET], frame].concat();
        (&self.0).write_all(&framed)
    }

    /// Packets that the kernel could not keep for this socket since the last call.
    pub(crate) fn lost(&self) -> io::Result<u32> {
        let mut stats = [0_u32; 2]; // struct tpacket_stats: packets, drops
        let mut length = STATS_SIZE;
        // SAFETY: the kernel writes at most `length` bytes, the size of `stats`.
        let result = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut length,
            )
        };
        if result == 0 { Ok(stats[1]) } else { Err(io::Error::last_os_error()) }
    }
}
