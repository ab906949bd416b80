//! Accepts TCP connections and relays each to its original destination.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::OptionFuture;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::error::SendError;
use tokio::task::{spawn_local, yield_now};
use tokio::time::sleep;
use tproxy_common::abi::TCP;

use super::Worker;
use super::ask;
use super::copy::{Ending, Outcome, copy, reset};
use super::exit::{Exit, Legs};
use super::quiet::Quiet;
use super::record::{End, Protocol, Record};
use super::route::Way;
use crate::addr::{ClientAddr, OrigDst};
use crate::limits::ClientSlot;
use crate::sockopt;
use crate::wire::Wire;

/// Connections accepted in a row, and connecting, before those already open get their turn.
const BATCH: usize = 4;

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
        let permit = Arc::clone(&worker.shared.connections).try_acquire_owned().ok();
        if permit.is_none() && worker.handshakes.is_none() {
            break;
        }
        let Ok((stream, peer)) = worker.accept(&listener) else { break };
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
        let (mut more, mut waiting) = (true, 0_u32);
        for _ in 0..BATCH {
            // Before accepting: what is over the limit waits in the kernel's queue. A
            // handshake that waited for upstream has had its permit since it began.
            let permit = if worker.handshakes.is_some() {
                None
            } else {
                let Some(permit) = permit(worker).await else { return };
                Some(permit)
            };
            match ready.try_io(|listener| worker.accept(listener)) {
                Err(_would_block) => {
                    more = false;
                    break;
                }
                Ok(Ok((stream, peer))) => {
                    pause = PAUSE.0;
                    worker.shared.report_recovery();
                    admit(worker, stream, peer, permit);
                    // An accept in vain makes a socket before it looks; to ask makes none.
                    waiting = waiting.checked_sub(1).unwrap_or_else(|| sockopt::waiting(listener));
                    if waiting == 0 {
                        // One that comes from here on is a new event.
                        ready.clear_ready();
                        more = false;
                        break;
                    }
                }
                Ok(Err(error)) if concerns_one_connection(&error) => worker.stats().accept_errors.inc(),
                Ok(Err(error)) => {
                    worker.stats().accept_exhausted.inc();
                    worker.shared.report_exhaustion("cannot accept connections", &error);
                    drop(permit);
                    sleep(pause).await;
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
    if let Some(permit) = worker.try_permit() {
        return Some(permit);
    }
    worker.stats().connection_limit_waits.inc();
    // An error means that the semaphore was closed, which nobody does.
    Arc::clone(&worker.shared.connections).acquire_owned().await.ok()
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
fn admit(
    worker: &Rc<Worker>,
    stream: std::net::TcpStream,
    peer: SocketAddr,
    permit: Option<OwnedSemaphorePermit>,
) {
    let (stats, client) = (worker.stats(), ClientAddr::from(peer));
    let Ok(destination) = stream.local_addr().map(OrigDst::from) else {
        return stats.accept_errors.inc();
    };
    let route = worker.shared.routes.of(TCP, client, destination, stats);
    let legs = Legs::of(worker, route.way, client, destination);
    if legs.is_none() && route.way != Way::Ask {
        return sockopt::reset_on_close(&stream);
    }
    let mut stream = match TcpStream::from_std(stream) {
        Ok(stream) => Connection::new(Wire::Plain(stream)),
        Err(error) => {
            stats.accept_exhausted.inc();
            return worker.shared.report_exhaustion("cannot wait for a connection", &error);
        }
    };
    // What is asked about was not set aside.
    if let Some(handshakes) = worker.handshakes.as_ref().filter(|_| route.way != Way::Ask) {
        match handshakes.complete((client, destination), stream) {
            Ok(()) => return,
            // Its client took too long; it is served as if it came only now.
            Err(late) => stream = late,
        }
        stats.handshake_late.inc();
    }
    let Some(slot) = worker.shared.admit(client, &stats.client_limit_tcp) else { return };
    let Some(permit) = permit.or_else(|| worker.try_permit()) else { return };
    let record = Record::new(worker, Protocol::Tcp, client, destination, route.rule);
    // Before another is accepted, which would take the descriptor; and not by its task, which
    // would wait for what other connections do: it is connecting meanwhile.
    let exit = legs.map(|legs| Exit::begin(worker, client, legs));
    // First the one, then the other, in the same memory.
    let task =
        connected(stream, record, exit, (permit, slot)).then(|both| OptionFuture::from(both.map(copied)));
    drop(spawn_local(Box::pin(task.map(drop))));
}

/// The parts of the limits that one connection has.
pub(super) type Shares = (OwnedSemaphorePermit, ClientSlot);

/// Both sides of a connection.
pub(super) struct Both {
    pub(super) client_side: Connection,
    pub(super) upstream_side: Connection,
    pub(super) record: Record,
    pub(super) shares: Shares,
}

/// One connection from its acceptance to its relay; `None`: it has ended before.
#[expect(clippy::manual_async_fn, reason = "what it is given would be in the future twice")]
fn connected(
    client_side: Connection,
    record: Record,
    mut exit: Option<Exit>,
    shares: Shares,
) -> impl Future<Output = Option<Both>> {
    async move {
        match connect(&client_side, &record, &mut exit).await {
            Ok(upstream_side) => Some(Both { client_side, upstream_side, record, shares }),
            Err(end) => {
                // Before its client sees the reset, and comes again.
                drop(shares);
                record.ends(end);
                drop(record);
                None
            }
        }
    }
}

/// Connects to upstream by `exit`; without one it is asked about first.
async fn connect(
    client_side: &Connection,
    record: &Record,
    exit: &mut Option<Exit>,
) -> Result<Connection, End> {
    let mut name = None;
    if exit.as_ref().is_none_or(Exit::asks_by_name) {
        // In a box: most connections do without.
        name = Box::pin(ask(client_side, record)).await.map_err(|_| End::ClientGone)?;
    }
    if exit.is_none() {
        *exit = decide(record, name.as_deref());
    }
    // A connection that its client believes in can only be reset, whatever a rule says.
    let exit = exit.as_mut().ok_or(End::Rejected)?;
    let connected = tokio::select! {
        biased;
        connected = exit.connect(record, name.as_deref()) => connected,
        () = gone(client_side.socket()) => return Err(End::ClientGone),
    };
    let (wire, hop) = connected.map_err(|error| {
        if let Some(error) = error.exhaustion() {
            record.worker().shared.report_exhaustion("cannot connect", error);
        }
        End::NotConnected(error.reason)
    })?;
    record.connected(hop);
    if !client_side.is_readable().await {
        sockopt::acknowledge(wire.socket());
    }
    Ok(Connection::new(wire))
}

/// The name that a connection is for.
async fn ask(client_side: &Connection, record: &Record) -> io::Result<Option<String>> {
    let stats = record.worker().stats();
    stats.tcp_asked.inc();
    let name = ask::name(client_side.socket()).await?;
    if name.is_some() {
        stats.tcp_named.inc();
    }
    Ok(name)
}

/// Where a connection goes that was asked about.
fn decide(record: &Record, name: Option<&str>) -> Option<Exit> {
    let (worker, client, destination) = (record.worker(), record.client, record.destination);
    let route = worker.shared.routes.decide(TCP, client, destination, name, worker.stats());
    tracing::debug!("{client} to {destination}: for {name:?}, so {:?}", route.way);
    record.rule.set(route.rule);
    Legs::of(worker, route.way, client, destination).map(|legs| Exit::begin(worker, client, legs))
}

/// Waits until a client has reset its connection.
async fn gone(stream: &TcpStream) {
    // After a reset there is something to read, which costs less to wait for; and is waited for by
    // nobody else.
    if poll_fn(|cx| stream.poll_read_ready(cx)).await.is_ok() {
        // In a box: most connections are made before anything comes.
        Box::pin(reset(stream)).await;
    }
}

/// Relays in a task of its own.
pub(super) fn relay(both: Both) {
    drop(spawn_local(copied(both)));
}

/// Copies between the two sides until their end, which is passed on.
///
/// What it is given is in the future once, not as arguments too.
fn copied(both: Both) -> impl Future<Output = ()> {
    let Both { client_side, upstream_side, record, shares } = both;
    async move {
        let worker = record.worker();
        let (patience, stats) = (&worker.shared.patience, worker.stats());
        let totals = (&stats.tcp_bytes_up, &stats.tcp_bytes_down);
        let outcome =
            copy(&client_side, &upstream_side, &worker.pool, patience, &record.traffic, totals).await;
        match outcome {
            Outcome::Ended(ending) => {
                record.ends(End::Copied(ending));
                if ending == Ending::Closed {
                    let sockets = (client_side.agreed(), upstream_side.agreed());
                    // What others wait for comes first: to close both takes 30 µs.
                    yield_now().await;
                    drop(sockets);
                }
                drop(shares);
            }
            Outcome::Quiet(last_byte) => {
                let lot = worker.quiet.clone();
                if let Some(quiet) = Quiet::new(client_side, upstream_side, record, shares, last_byte)
                    && let Err(SendError(quiet)) = lot.send(quiet)
                {
                    // Nobody keeps it, which was said: it goes on as it was.
                    quiet.resume();
                }
            }
        }
    }
}

/// A connection that is reset when it is dropped, however that comes about, unless its end
/// was [agreed](Self::agreed) on: one that was not must not look like that.
#[derive(Debug)]
pub(super) struct Connection {
    /// `None`: it is closed, or somebody else's.
    wire: Option<Wire>,
}

impl Connection {
    pub(super) fn new(wire: Wire) -> Self {
        Self { wire: Some(wire) }
    }

    /// What is closed, not reset, when it is dropped.
    fn agreed(mut self) -> Option<Wire> {
        self.wire.take()
    }

    /// Takes the socket from the runtime; `None` inside TLS.
    pub(super) fn into_socket(mut self) -> Option<std::net::TcpStream> {
        match self.wire.take() {
            Some(Wire::Plain(stream)) => stream.into_std().ok(),
            _ => None,
        }
    }
}

impl Deref for Connection {
    type Target = Wire;

    fn deref(&self) -> &Wire {
        match &self.wire {
            Some(wire) => wire,
            None => unreachable!("only what consumes the connection takes it out"),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(wire) = &self.wire {
            sockopt::reset_on_close(wire.socket());
        }
    }
}
