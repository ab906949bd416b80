//! The connection to the kernel's rtnetlink, and notice of changes.

use std::io;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};
use rtnetlink::{Handle, MulticastGroup};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::warn;

/// A netlink request that failed.
#[derive(Debug, thiserror::Error)]
#[error("netlink: cannot {what}")]
pub struct Error {
    /// What was asked for, as the end of "cannot …".
    pub what: String,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

impl Error {
    /// Adds what was asked for to an answer of the kernel.
    pub fn new(what: impl Into<String>, source: rtnetlink::Error) -> Self {
        let source = match source {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other.to_string()),
        };
        Self { what: what.into(), source }
    }

    /// The kernel's error number, where it answered with one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// Connects in the network namespace of the calling thread.
///
/// Dumps through this connection are filtered by the kernel (strict checking,
/// Linux 4.20). The connection lives as long as the handle and its clones.
///
/// # Errors
/// Where no netlink socket can be had.
///
/// # Panics
/// Outside a tokio runtime.
pub fn connect() -> Result<Handle, Error> {
    let (connection, handle, _) = rtnetlink::new_connection_with_strict_check()
        .map_err(|source| Error { what: "open a socket".to_owned(), source })?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Collects a dump. A family or table that the kernel does not have is an empty one.
pub(crate) async fn collect<T>(
    what: &str,
    dump: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<Vec<T>, Error> {
    match dump.try_collect().await.map_err(|error| Error::new(what, error)) {
        Ok(items) => Ok(items),
        Err(error) => match error.errno() {
            Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::ENOENT) => Ok(Vec::new()),
            _ => Err(error),
        },
    }
}

/// The address family of a flag "is IPv6".
pub(crate) const fn family(v6: bool) -> AddressFamily {
    if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

/// Whether the network namespace of the calling thread has IPv6 on its loopback
/// device, which steering needs.
///
/// # Errors
/// Where that cannot be told, for want of a descriptor, say. It must not be
/// taken for a no: the rules of IPv6 would be removed under open connections.
pub fn has_ipv6() -> Result<bool, Error> {
    let path = "/proc/sys/net/ipv6/conf/lo/disable_ipv6";
    match std::fs::read_to_string(path) {
        Ok(disabled) => Ok(disabled.trim() == "0"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error { what: format!("read {path}"), source }),
    }
}

/// Tells when addresses, links, routes, rules or qdiscs changed.
pub struct Watch {
    socket: TokioSocket,
    /// A change came in, but [`Watch::changed`] was dropped before it told.
    pending: bool,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("pending", &self.pending).finish_non_exhaustive()
    }
}

impl Watch {
    /// A burst is over when nothing came for this long.
    const QUIET: Duration = Duration::from_millis(100);
    /// A burst without end (a router that learns a full table) is told this often.
    const LONGEST: Duration = Duration::from_secs(1);
    const GROUPS: [MulticastGroup; 8] = [
        MulticastGroup::Link,
        MulticastGroup::Tc,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
    ];

    /// Starts to watch the network namespace of the calling thread. Take the
    /// first snapshot after this, or changes in between are lost.
    ///
    /// # Errors
    /// Where no netlink socket can be had.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        let groups = Self::GROUPS.iter().fold(0, |bits, group| bits | 1 << (*group as u32 - 1));
        socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
        Ok(Self { socket, pending: false })
    }

    /// Waits until something changed and the burst of changes is over.
    ///
    /// May be dropped and called again (as in `select!`) without losing a change.
    pub async fn changed(&mut self) {
        // What changed does not matter, a new snapshot tells; so one small
        // buffer does, and the rest of a longer message is discarded.
        let mut buffer = Vec::with_capacity(64);
        if !self.pending {
            self.receive(&mut buffer).await;
            self.pending = true;
        }
        let latest = Instant::now() + Self::LONGEST;
        loop {
            let quiet = (Instant::now() + Self::QUIET).min(latest);
            if timeout_at(quiet, self.receive(&mut buffer)).await.is_err() {
                break;
            }
        }
        self.pending = false;
    }

    async fn receive(&self, buffer: &mut Vec<u8>) {
        buffer.clear();
        match self.socket.recv(buffer).await {
            Ok(()) => {}
            // Messages were lost, so something did change.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(error) => {
                warn!(%error, "netlink: cannot receive notice of changes; looking again in 10 s");
                sleep(Duration::from_secs(10)).await;
            }
        }
    }
}

/// Sends a request that is answered by an acknowledgement alone.
pub(crate) async fn request(
    handle: &Handle,
    message: rtnetlink::packet_core::NetlinkMessage<rtnetlink::packet_route::RouteNetlinkMessage>,
) -> Result<(), rtnetlink::Error> {
    let mut answers = handle.clone().request(message)?;
    while let Some(answer) = answers.next().await {
        if let rtnetlink::packet_core::NetlinkPayload::Error(error) = answer.payload {
            return Err(rtnetlink::Error::NetlinkError(error));
        }
    }
    Ok(())
}
