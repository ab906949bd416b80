//! Accepts TCP connections and relays each to its original destination.

use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::{spawn_local, yield_now};

use super::Worker;
use super::copy::{Ending, Patience, copy, reset};
use super::record::{End, Protocol, Record};
use crate::addr::{ClientAddr, OrigDst, UpstreamAddr};
use crate::limits::ClientSlot;
use crate::sockopt;
use crate::upstream::Reason;

/// Connections accepted in a row before those already open get their turn.
const BATCH: usize = 32;

/// Pauses after `accept` failed for want of descriptors or memory: short at
/// first, because a connection ends soon on a busy proxy, and never a spin.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// Connections taken from the queue when the run ends: they were acknowledged, so
/// their clients believe themselves connected. It is the usual `net.core.somaxconn`.
const LAST: usize = 4096;

/// Accepts until the run ends, each connection in a task of its own.
pub(crate) async fn listen(worker: Rc<Worker>, listener: AsyncFd<OwnedFd>, end: impl Future<Output = ()>) {
    tokio::select! {
        () = accept_all(&worker, &listener) => {}
        () = end => {}
    }
    for _ in 0..LAST {
        let Ok(permit) = Arc::clone(&worker.shared.connections).try_acquire_owned() else { break };
        let Ok((stream, peer)) = sockopt::accept(listener.get_ref().as_fd()) else { break };
        admit(&worker, stream, peer, permit);
    }
}

async fn accept_all(worker: &Rc<Worker>, listener: &AsyncFd<OwnedFd>) {
    let mut pause = PAUSE.0;
    loop {
        let mut ready = match listener.readable().await {
            Ok(ready) => ready,
            Err(error) => return tracing::error!(%error, "a listener can no longer be waited for"),
        };
        let mut more = true;
        for _ in 0..BATCH {
            // Before accepting: what is over the limit waits in the kernel's queue.
            let Some(permit) = permit(worker).await else { return };
            match ready.try_io(|listener| sockopt::accept(listener.get_ref().as_fd())) {
                Err(_would_block) => {
                    more = false;
                    break;
                }
                Ok(Ok((stream, peer))) => {
                    pause = PAUSE.0;
                    worker.shared.report_recovery();
                    admit(worker, stream, peer, permit);
                }
                Ok(Err(error)) if concerns_one_connection(&error) => worker.stats().accept_errors.inc(),
                Ok(Err(error)) => {
                    worker.stats().accept_exhausted.inc();
                    worker.shared.report_exhaustion("cannot accept connections", &error);
                    drop(permit);
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.1);
                }
            }
        }
        if more {
            yield_now().await;
        }
    }
}

/// One of the `max-connections`; waits where all are taken.
async fn permit(worker: &Rc<Worker>) -> Option<OwnedSemaphorePermit> {
    let shared = &worker.shared;
    if let Ok(permit) = Arc::clone(&shared.connections).try_acquire_owned() {
        if shared.full.clear() {
            tracing::info!("fewer than {} connections are open again", shared.limits.connections);
        }
        return Some(permit);
    }
    worker.stats().connection_limit_waits.inc();
    if shared.full.raise() {
        let limit = shared.limits.connections;
        tracing::warn!("{limit} connections are open (--max-connections): others wait until one ends");
    }
    // An error means that the semaphore was closed, which nobody does.
    Arc::clone(&shared.connections).acquire_owned().await.ok()
}

/// Errors of `accept(2)` that say nothing about the listener: the connection failed
/// before it was taken. After any other, trying again at once would spin.
fn concerns_one_connection(error: &io::Error) -> bool {
    const OF_THE_CONNECTION: [i32; 11] = [
        libc::ECONNABORTED,
        libc::EINTR,
        libc::EPERM,
        libc::EPROTO,
        libc::ENETDOWN,
        libc::ENOPROTOOPT,
        libc::EHOSTDOWN,
        libc::ENONET,
        libc::EHOSTUNREACH,
        libc::EOPNOTSUPP,
        libc::ENETUNREACH,
    ];
    error.raw_os_error().is_some_and(|errno| OF_THE_CONNECTION.contains(&errno))
}

/// Starts to serve a connection, or resets it where it may not be served.
fn admit(worker: &Rc<Worker>, stream: std::net::TcpStream, peer: SocketAddr, permit: OwnedSemaphorePermit) {
    let (stats, client) = (worker.stats(), ClientAddr::from(peer));
    let Ok(destination) = stream.local_addr().map(OrigDst::from) else {
        return stats.accept_errors.inc();
    };
    if worker.shared.own.contains(destination) {
        stats.loops_prevented.inc();
        tracing::debug!("{client} asked for the proxy's own listener {destination}: refused");
        return sockopt::reset_on_close(&stream);
    }
    let Some(slot) = worker.shared.clients.admit(client.ip()) else {
        stats.client_limit_tcp.inc();
        tracing::debug!("{client} has its share of connections (--max-per-client): refused");
        return sockopt::reset_on_close(&stream);
    };
    match TcpStream::from_std(stream) {
        Ok(stream) => {
            let record = Record::new(worker, Protocol::Tcp, client, destination);
            let stream = Connection::new(stream);
            let task = serve(Rc::clone(worker), stream, record, (client, destination), (permit, slot));
            drop(spawn_local(task));
        }
        Err(error) => {
            stats.accept_exhausted.inc();
            worker.shared.report_exhaustion("cannot wait for a connection", &error);
        }
    }
}

/// One connection from its acceptance to its end. `_shares` are its parts of the limits.
async fn serve(
    worker: Rc<Worker>,
    client_side: Connection,
    record: Record,
    (client, destination): (ClientAddr, OrigDst),
    _shares: (OwnedSemaphorePermit, ClientSlot),
) {
    let to = UpstreamAddr::from(destination);
    let stats = worker.stats();
    let connected = tokio::select! {
        connected = worker.shared.direct.connect(client, to, stats) => connected,
        () = reset(&client_side) => return record.ends(End::ClientGone),
    };
    let upstream_side = match connected {
        Ok(stream) => Connection::new(stream),
        Err(error) => {
            if error.reason == Reason::Exhausted {
                worker.shared.report_exhaustion("cannot connect", &error.source.source);
            }
            tracing::debug!("{client} to {destination}: {error}");
            return record.ends(End::NotConnected(error.reason));
        }
    };
    record.connected(to);
    let timeouts = worker.shared.timeouts;
    let patience = Patience { idle: timeouts.tcp_idle, half_close: timeouts.half_close };
    let totals = (&stats.tcp_bytes_up, &stats.tcp_bytes_down);
    let ending = copy(&client_side, &upstream_side, &worker.pool, patience, &record.traffic, totals).await;
    record.ends(End::Copied(ending));
    if ending == Ending::Closed {
        client_side.close();
        upstream_side.close();
    }
}

/// A connection that is reset when it is dropped, however that comes about, unless
/// it was [closed](Self::close): an end that was not agreed on must not look like one.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    closed: bool,
}

impl Connection {
    fn new(stream: TcpStream) -> Self {
        Self { stream, closed: false }
    }

    fn close(mut self) {
        self.closed = true;
    }
}

impl Deref for Connection {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.stream
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.closed {
            sockopt::reset_on_close(&self.stream);
        }
    }
}
