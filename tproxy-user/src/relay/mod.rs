//! The relay: what the client sends goes to its destination, and back.

mod ask;
mod checksum;
mod copy;
mod errors;
mod exit;
mod flow;
pub(crate) mod handshake;
mod icmp;
mod pipe;
mod pool;
mod quiet;
pub mod raw;
mod receive;
mod record;
pub(crate) mod refusal;
mod route;
mod segments;
mod send;
pub mod sniff;
mod syn;
pub(crate) mod tcp;
pub(crate) mod udp;
mod waiting;

pub(crate) use flow::Flows;
pub(crate) use handshake::Handshakes;
pub use route::Routes;

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_local;

use crate::addr::{ClientAddr, UpstreamAddr};
use crate::config::upstream::SendProxy;
use crate::config::{Config, Limits, SourceMode, Timeouts};
use crate::limits::{self, Alarm, ClientLimits, ClientSlot, Reserve};
use crate::listener::WorkerListeners;
use crate::sockopt::{self, OwnMark, UpstreamSocket};
use crate::stats::{Stats, Value, WorkerStats};
use crate::upstream::direct::Direct;
use crate::upstream::{ConnectError, Reason};
use copy::Patience;
use pool::Pool;
use quiet::Quiet;

/// What all workers of one run share. Nothing in it is locked for data.
#[derive(Debug)]
pub struct Shared {
    routes: Routes,
    direct: Direct,
    /// As this host: to targets, of which one on this host could not answer a client's address, and
    /// to proxy servers.
    as_proxy: Direct,
    /// What servers and targets are told of the client.
    send_proxy: SendProxy,
    timeouts: Timeouts,
    patience: Patience,
    limits: Limits,
    flows_per_worker: usize,
    stats: Arc<Stats>,
    clients: Arc<ClientLimits>,
    connections: Arc<Semaphore>,
    own: OwnAddresses,
    exhausted: Alarm,
    full: Alarm,
    client_full: Alarm,
}

impl Shared {
    /// Takes what the relay needs of the configuration. `stats` must have been made for
    /// as many workers as there are `listeners`.
    ///
    /// UDP flows are divided among the workers, whose clients the kernel spreads
    /// evenly: each can then make room by its own least recently used flow.
    #[must_use]
    pub fn new(
        config: &Config,
        listeners: &[WorkerListeners],
        stats: Arc<Stats>,
        routes: Routes,
    ) -> Arc<Self> {
        let workers = listeners.len().max(1);
        let direct = Direct {
            source: config.source,
            mark: OwnMark(config.steering.own_mark),
            timeout: config.timeouts.connect,
        };
        Arc::new(Self {
            routes,
            direct,
            as_proxy: Direct { source: SourceMode::Proxy, ..direct },
            send_proxy: config.send_proxy,
            timeouts: config.timeouts,
            patience: Patience { idle: config.timeouts.tcp_idle, half_close: config.timeouts.half_close },
            limits: config.limits,
            flows_per_worker: (config.limits.udp_flows as usize).div_ceil(workers),
            stats,
            clients: ClientLimits::new(config.limits.per_client),
            connections: Arc::new(Semaphore::new(config.limits.connections as usize)),
            own: OwnAddresses::new(listeners),
            exhausted: Alarm::default(),
            full: Alarm::default(),
            client_full: Alarm::default(),
        })
    }

    /// The mark of the proxy's sockets.
    pub(crate) fn mark(&self) -> OwnMark {
        self.direct.mark
    }

    /// The client's part of the limits, for one more; where it has all of it that is counted, and said once.
    fn admit(&self, client: ClientAddr, limit: &Value) -> Option<ClientSlot> {
        let slot = self.clients.admit(client.ip());
        if slot.is_some() {
            if self.client_full.clear() {
                tracing::info!("no client has more than its share of connections any more");
            }
            return slot;
        }
        limit.inc();
        if self.client_full.raise() {
            tracing::warn!(
                "{} has its share of connections and UDP flows, further ones are refused (--max-per-client {}; `status` counts)",
                client.ip(),
                self.limits.per_client
            );
        }
        None
    }

    /// Logs once that descriptors or memory are used up.
    fn report_exhaustion(&self, what: &str, error: &io::Error) {
        if self.exhausted.raise() {
            tracing::warn!("{what}: {error}: {}", limits::describe_exhaustion(error));
        }
    }

    /// Logs once that things go well again.
    fn report_recovery(&self) {
        if self.exhausted.clear() {
            tracing::info!("descriptors and memory suffice again");
        }
    }
}

/// What the tasks of one worker share.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    index: usize,
    /// None: handshakes are completed at once.
    pub(crate) handshakes: Option<Handshakes>,
    pool: Pool,
    /// Keeps connections that are quiet.
    quiet: UnboundedSender<Quiet>,
    /// For the other side of a connection that is accepted.
    reserve: Reserve,
    /// For one packet at a time; never borrowed while a task waits.
    packet: RefCell<Box<[u8]>>,
    draining: Cell<bool>,
    /// While draining: a connection or flow has ended.
    ended: Notify,
}

impl Worker {
    /// Must be called within its runtime.
    pub(crate) fn new(shared: Arc<Shared>, index: usize, handshakes: Option<Handshakes>) -> Rc<Self> {
        let (quiet, arriving) = unbounded_channel();
        let idle = shared.timeouts.tcp_idle;
        spawn_local(async move {
            if let Err(error) = quiet::keep(arriving, idle).await {
                tracing::error!(%error, "quiet connections can no longer be kept");
            }
        });
        let reserve = Reserve::default();
        // From the start, so that work opens no descriptor that stays. Where that fails, the
        // first accept does, and says so.
        drop(reserve.refill());
        Rc::new(Self {
            shared,
            index,
            handshakes,
            pool: Pool::default(),
            quiet,
            reserve,
            packet: RefCell::new(vec![0; 1 << 16].into()),
            draining: Cell::new(false),
            ended: Notify::new(),
        })
    }

    pub(crate) fn stats(&self) -> &WorkerStats {
        self.shared.stats.worker(self.index)
    }

    /// Accepts a connection if there is a descriptor for its other side too: else it would
    /// be reset, and in the queue it can wait.
    fn accept(&self, listener: &AsyncFd<OwnedFd>) -> io::Result<(TcpStream, SocketAddr)> {
        self.reserve.refill()?;
        sockopt::accept(listener.get_ref().as_fd())
    }

    /// A socket for the other side of a connection that was accepted.
    fn upstream_socket(&self, direct: &Direct, to: UpstreamAddr) -> Result<UpstreamSocket, ConnectError> {
        match direct.socket(to) {
            Err(error) if error.reason == Reason::Exhausted && self.reserve.give_up() => direct.socket(to),
            outcome => outcome,
        }
    }

    /// One of the `max-connections`, where one is free. Says once that none is.
    fn try_permit(&self) -> Option<OwnedSemaphorePermit> {
        let shared = &self.shared;
        let permit = Arc::clone(&shared.connections).try_acquire_owned().ok();
        let limit = shared.limits.connections;
        if permit.is_some() && shared.full.clear() {
            tracing::info!("fewer than {limit} connections are open again");
        } else if permit.is_none() && shared.full.raise() {
            tracing::warn!("{limit} connections are open (--max-connections): others wait until one ends");
        }
        permit
    }

    /// From now on nothing new is taken.
    pub(crate) fn drain(&self) {
        self.draining.set(true);
    }

    /// Waits until no connection and no flow is left.
    pub(crate) async fn finished(&self) {
        while self.stats().tcp_active.get() + self.stats().udp_active.get() > 0 {
            self.ended.notified().await;
        }
    }
}

/// The listeners' own addresses. A client that asks for one of them asks the
/// proxy to connect to itself, which would go on until no descriptor is left.
#[derive(Debug)]
struct OwnAddresses {
    /// Sorted. Almost every question ends with it.
    ports: Vec<u16>,
    exact: HashSet<SocketAddr>,
    /// Listeners on all addresses of this host.
    wildcard: HashSet<SocketAddr>,
}

impl OwnAddresses {
    fn new(listeners: &[WorkerListeners]) -> Self {
        let addresses = listeners.iter().flat_map(WorkerListeners::iter).map(|listener| listener.addr);
        Self::of(addresses)
    }

    fn of(addresses: impl Iterator<Item = SocketAddr>) -> Self {
        let (wildcard, exact): (HashSet<_>, HashSet<_>) =
            addresses.partition(|addr| addr.ip().is_unspecified());
        let mut ports: Vec<u16> = exact.iter().chain(&wildcard).map(SocketAddr::port).collect();
        ports.sort_unstable();
        ports.dedup();
        Self { ports, exact, wildcard }
    }

    /// Whether a flow that goes there comes back.
    fn takes(&self, to: UpstreamAddr) -> bool {
        let addr = to.get();
        if self.ports.binary_search(&addr.port()).is_err() {
            return false;
        }
        let mut any = addr;
        match &mut any {
            SocketAddr::V4(v4) => v4.set_ip(std::net::Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(v6) => {
                v6.set_ip(std::net::Ipv6Addr::UNSPECIFIED);
                v6.set_scope_id(0);
            }
        }
        self.exact.contains(&addr) || self.wildcard.contains(&any) && sockopt::is_local(addr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(addresses: &[&str]) -> OwnAddresses {
        OwnAddresses::of(addresses.iter().map(|addr| addr.parse().expect("an address")))
    }

    fn asks(own: &OwnAddresses, destination: &str) -> bool {
        own.takes(UpstreamAddr::from(destination.parse::<SocketAddr>().expect("an address")))
    }

    #[test]
    fn listeners_are_no_destination() {
        let own = own(&["127.0.0.1:15001", "[::1]:40000"]);
        assert!(asks(&own, "127.0.0.1:15001"));
        assert!(asks(&own, "[::1]:40000"));
        assert!(!asks(&own, "127.0.0.1:40000"));
        assert!(!asks(&own, "192.0.2.1:15001"), "the port elsewhere is fair game");
    }

    #[test]
    fn wildcard_listeners_cover_this_host_only() {
        let own = own(&["0.0.0.0:15001", "[::]:15001"]);
        assert!(asks(&own, "127.0.0.7:15001"));
        assert!(asks(&own, "[::1]:15001"));
        assert!(!asks(&own, "192.0.2.1:15001"));
        assert!(!asks(&own, "127.0.0.7:15002"));
    }
}
