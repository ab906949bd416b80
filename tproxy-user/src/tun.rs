//! The tun device of `--handshake faithful`: SYNs that are set aside come out of
//! it, those that are let in are written back.
//!
//! It has one queue a worker, no address and no route, and it is not persistent:
//! the kernel removes it when the process ends, however that comes about.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::Context as _;
use libc::c_int;
use rtnetlink::packet_route::link::LinkFlags;
use rtnetlink::{Handle, LinkUnspec};

use crate::failure::Failure;
use crate::netlink::collect;
use crate::sysctl;

/// What the names of these devices begin with; the kernel adds the first free number.
pub const PREFIX: &str = "tproxy";

/// The kind of these devices, as a link message has it.
pub const KIND: &str = "tun";

/// SYNs that wait for one worker: as many as the queue of a listener usually
/// holds (`net.core.somaxconn`).
const QUEUE_LENGTH: u32 = 4096;

const DEVICE: &str = "/dev/net/tun";

/// The device. It is there for as long as one of its queues is open.
#[derive(Debug)]
pub struct Tun {
    /// The interface that it is.
    pub link: Link,
    queues: Vec<OwnedFd>,
}

/// The interface that a device is.
#[derive(Clone, Debug)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Its ifindex.
    pub index: u32,
}

impl Link {
    /// Sets it up.
    ///
    /// # Errors
    /// What netlink answers.
    pub async fn set_up(&self, handle: &Handle) -> anyhow::Result<()> {
        let up = LinkUnspec::new_with_index(self.index).txqueuelen(QUEUE_LENGTH).up().build();
        handle.link().set(up).execute().await.with_context(|| format!("cannot set up {}", self.name))
    }

    /// Whether it is up; `None` where it is gone.
    ///
    /// # Errors
    /// What netlink answers.
    pub async fn is_up(&self, handle: &Handle) -> anyhow::Result<Option<bool>> {
        let found = collect("look at the tun device", handle.link().get().match_index(self.index).execute());
        match found.await {
            Ok(links) => Ok(links.first().map(|link| link.header.flags.contains(LinkFlags::Up))),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Tun {
    /// Makes a device with this many queues (`IFF_MULTI_QUEUE`, Linux 3.8) and sets it up.
    ///
    /// # Errors
    /// [`Failure::Unsupported`] without the tun driver or `CAP_NET_ADMIN`; else what failed.
    pub async fn create(queues: u32, handle: &Handle) -> anyhow::Result<Self> {
        let mut name = format!("{PREFIX}%d");
        let mut opened = Vec::new();
        for _ in 0..queues {
            let queue = open().map_err(explain)?;
            name = set_interface(&queue, &name).map_err(explain)?;
            opened.push(queue.into());
        }
        let index = nix::net::if_::if_nametoindex(name.as_str()).context("the tun device is gone again")?;
        // Nothing but SYNs goes through it: no router solicitations, no multicast reports. Where
        // they cannot be had off, they are read and thrown away.
        if let Err(error) = sysctl::write(&format!("net.ipv6.conf.{name}.disable_ipv6"), "1") {
            tracing::debug!("{error}");
        }
        let link = Link { name, index };
        link.set_up(handle).await?;
        Ok(Self { link, queues: opened })
    }

    /// Lets a socket filter choose the queue of each packet (`TUNSETSTEERINGEBPF`, Linux 4.16).
    ///
    /// # Errors
    /// What `ioctl(2)` answers.
    pub fn choose_queue_by(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let Some(queue) = self.queues.first() else { return Ok(()) };
        let program: c_int = program.as_raw_fd();
        // SAFETY: the request reads one int, the program's descriptor.
        let result =
            unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETSTEERINGEBPF as _, &raw const program) };
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The queues, by worker: non-blocking, a packet each read and write.
    #[must_use]
    pub fn into_queues(self) -> Vec<OwnedFd> {
        self.queues
    }
}

/// Whether the tun driver is there and may be used. Makes no device, but may load the driver.
///
/// # Errors
/// What `open(2)` answers.
pub fn probe() -> io::Result<()> {
    open().map(drop)
}

/// Whether an error says that there is no tun driver.
#[must_use]
pub fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO))
}

fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)
}

/// Makes a queue one of the named device, which is made where there is none. Answers its full name.
fn set_interface(queue: &File, name: &str) -> io::Result<String> {
    // SAFETY: an ifreq of zeros is valid: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE).try_into().map_err(io::Error::other)?;
    // SAFETY: the request reads and writes one ifreq.
    let result = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned());
    String::from_utf8(name.collect()).map_err(io::Error::other)
}

/// What the error means for `--handshake faithful`, and what mends it.
#[must_use]
pub fn explain(error: io::Error) -> anyhow::Error {
    match error.raw_os_error() {
        _ if is_absent(&error) => Failure::unsupported(format_args!(
            "--handshake faithful needs a tun device, and {DEVICE} is not there: modprobe tun (in a container, give it the device)"
        ))
        .into(),
        Some(libc::EPERM | libc::EACCES) => Failure::unsupported(format_args!(
            "--handshake faithful needs a tun device: {DEVICE}: {error}: CAP_NET_ADMIN is needed, and access to the device"
        ))
        .into(),
        _ => anyhow::Error::from(error).context("cannot make a tun device for --handshake faithful"),
    }
}
