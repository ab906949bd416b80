//! Faithful handshakes: a client's is completed only once upstream has answered.
//!
//! The eBPF programs set a SYN aside; here it waits until there is a connection
//! to its destination. Then it is let in, the kernel answers the client, and the
//! connection that is accepted is joined to the one that was made for it. Where
//! there is none the client sees what it would have seen without a proxy.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::task::{spawn_local, yield_now};
use tokio::time::Instant;
use tproxy_common::abi::TCP;

use super::Worker;
use super::exit::{Exit, Legs};
use super::record::{End, Protocol, Record};
use super::refusal::{Refusal, RefusalSender};
use super::syn::Syn;
use super::tcp::{Both, Connection, Shares, relay};
use crate::addr::{ClientAddr, OrigDst};
use crate::limits::Alarm;
use crate::sockopt;
use crate::upstream::ConnectError;

/// SYNs read in a row before other connections get their turn.
const BATCH: usize = 32;

/// Handshakes that one worker has open at a time; each holds a descriptor and a
/// packet. It is what the kernel would hold for a listener (`net.core.somaxconn`).
const MOST: usize = 4096;

/// The longest SYN that waits, in bytes. With Fast Open (RFC 7413) it carries data,
/// as much as a segment; a longer one is sent again, without data.
const LONGEST: usize = 9216;

/// A SYN is let in again where it was let in at least this long ago: a client
/// sends it again after a second, and what comes sooner comes from a program
/// that takes the mark off the packet on its way in.
const AGAIN: Duration = Duration::from_millis(100);

/// Who wants to go where.
type Key = (ClientAddr, OrigDst);

/// The open handshakes of one worker.
#[derive(Debug)]
pub(crate) struct Handshakes {
    queue: AsyncFd<OwnedFd>,
    refusals: RefusalSender,
    open: RefCell<HashMap<Key, Rc<Handshake>>>,
    full: Alarm,
}

/// A client that waits for its SYN to be answered.
#[derive(Debug)]
struct Handshake {
    /// The latest that it sent: an answer to that is the one that it expects.
    packet: RefCell<Box<[u8]>>,
    /// When it was let in.
    let_in: Cell<Option<Instant>>,
    /// Takes the client's side of the connection.
    claim: RefCell<Option<oneshot::Sender<Connection>>>,
}

impl Handshakes {
    pub(crate) fn new(queue: AsyncFd<OwnedFd>, refusals: RefusalSender) -> Self {
        Self { queue, refusals, open: RefCell::default(), full: Alarm::default() }
    }

    /// Gives an accepted connection to the handshake that it came of. `Err`: there
    /// is none, or none any more.
    pub(super) fn complete(&self, key: Key, stream: Connection) -> Result<(), Connection> {
        let handshake = self.open.borrow_mut().remove(&key);
        match handshake.and_then(|handshake| handshake.claim.take()) {
            Some(claim) => claim.send(stream),
            None => Err(stream),
        }
    }

    /// Ends all that are open: nothing more is accepted.
    pub(crate) fn close(&self) {
        self.open.borrow_mut().clear();
    }

    /// Writes the SYN back, to arrive once more.
    fn let_in(&self, handshake: &Handshake, worker: &Worker) {
        handshake.let_in.set(Some(Instant::now()));
        if let Err(error) = nix::unistd::write(self.queue.get_ref(), &handshake.packet.borrow()) {
            // Its client sends another.
            worker.stats().handshake_lost.inc();
            tracing::debug!(%error, "cannot let a SYN in");
        }
    }

    fn refuse(&self, refusal: Refusal, syn: &Syn, packet: &[u8], worker: &Worker) {
        let stats = worker.stats();
        let refusal = self.refusals.granted(refusal);
        match refusal {
            Refusal::Reset => stats.handshake_reset.inc(),
            Refusal::Unreachable(_) => stats.handshake_unreachable.inc(),
            Refusal::Silence => stats.handshake_silent.inc(),
        }
        if let Err(error) = self.refusals.send(refusal, syn, packet) {
            stats.handshake_lost.inc();
            tracing::debug!("{} to {}: cannot answer: {error}", syn.client, syn.destination);
        }
    }
}

/// Serves the SYNs that are set aside; without end where handshakes are eager.
///
/// # Errors
/// Where the tun device can no longer be read: it was taken away.
pub(crate) async fn listen(worker: &Rc<Worker>) -> io::Result<Infallible> {
    let Some(handshakes) = &worker.handshakes else { return pending().await };
    loop {
        // A device that is deleted has nothing to read, but an error.
        let mut ready = handshakes.queue.ready(Interest::READABLE | Interest::ERROR).await?;
        for _ in 0..BATCH {
            let mut buffer = worker.packet.borrow_mut();
            match ready.try_io(|queue| nix::unistd::read(queue, &mut buffer).map_err(io::Error::from)) {
                Err(_would_block) => break,
                Ok(Ok(length)) => {
                    let packet: Box<[u8]> = buffer[..length].into();
                    drop(buffer);
                    arrived(worker, handshakes, packet);
                }
                Ok(Err(error)) => return Err(error),
            }
        }
        yield_now().await;
    }
}

fn arrived(worker: &Rc<Worker>, handshakes: &Handshakes, packet: Box<[u8]>) {
    if packet.len() > LONGEST {
        return worker.stats().handshake_full.inc();
    }
    let Some(syn) = Syn::parse(&packet) else { return };
    let key = (syn.client, syn.destination);
    let known = handshakes.open.borrow().get(&key).map(Rc::clone);
    if let Some(handshake) = known {
        handshake.packet.replace(packet);
        if handshake.let_in.get().is_some_and(|at| at.elapsed() >= AGAIN) {
            handshakes.let_in(&handshake, worker);
        }
        return;
    }
    // What is set aside while the run ends is sent again, to whoever serves it then.
    if worker.draining.get() {
        return;
    }
    let (shared, stats) = (&worker.shared, worker.stats());
    let route = shared.routes.of(TCP, syn.client, syn.destination, stats);
    let Some(legs) = Legs::of(worker, route.way, syn.client, syn.destination) else {
        return handshakes.refuse(Refusal::Reset, &syn, &packet, worker);
    };
    let Some(slot) = shared.admit(syn.client, &stats.client_limit_tcp) else {
        return handshakes.refuse(Refusal::Reset, &syn, &packet, worker);
    };
    let Some(permit) = room(worker, handshakes) else { return stats.handshake_full.inc() };
    let (claim, claimed) = oneshot::channel();
    let handshake = Rc::new(Handshake {
        packet: RefCell::new(packet),
        let_in: Cell::new(None),
        claim: RefCell::new(Some(claim)),
    });
    handshakes.open.borrow_mut().insert(key, Rc::clone(&handshake));
    let record = Record::new(worker, Protocol::Tcp, syn.client, syn.destination, route.rule);
    let open = Open { handshake, key };
    let exit = Exit::later(legs);
    drop(spawn_local(serve(Rc::clone(worker), (open, exit), record, claimed, (permit, slot))));
}

/// One of the `max-connections`, where one is free and this worker may open
/// another handshake. What finds no room is dropped; its client asks again.
fn room(worker: &Worker, handshakes: &Handshakes) -> Option<OwnedSemaphorePermit> {
    if handshakes.open.borrow().len() >= MOST {
        if handshakes.full.raise() {
            tracing::warn!("{MOST} handshakes of a worker wait for their destinations: others are dropped");
        }
        return None;
    }
    if handshakes.full.clear() {
        tracing::info!("fewer than {MOST} handshakes are open again");
    }
    worker.try_permit()
}

/// One connection from its SYN to its relay.
async fn serve(
    worker: Rc<Worker>,
    (open, mut exit): (Open, Exit),
    record: Record,
    mut claimed: oneshot::Receiver<Connection>,
    shares: Shares,
) {
    let Some(handshakes) = &worker.handshakes else { return };
    let connected = tokio::select! {
        connected = exit.connect(&record, None) => connected,
        // Nobody can claim what was not let in: the run is over.
        _ = &mut claimed => return,
    };
    let (upstream_side, hop) = match connected {
        Ok((wire, hop)) => (Connection::new(wire), hop),
        Err(error) => {
            failed(&worker, handshakes, &open.handshake, &error);
            open.forget(handshakes);
            return record.ends(End::NotConnected(error.reason));
        }
    };
    record.connected(hop);
    // The client's data is a round trip away.
    sockopt::acknowledge(upstream_side.socket());
    handshakes.let_in(&open.handshake, &worker);
    // The client has as long as the server had: its own half of the handshake
    // may be lost and repeated just as well.
    let claimed = tokio::time::timeout(worker.shared.timeouts.connect, claimed).await;
    if let Ok(Ok(client_side)) = claimed {
        return relay(Both { client_side, upstream_side, record, shares });
    }
    open.forget(handshakes);
    record.ends(End::ClientGone);
}

fn failed(worker: &Worker, handshakes: &Handshakes, handshake: &Handshake, error: &ConnectError) {
    if let Some(error) = error.exhaustion() {
        worker.shared.report_exhaustion("cannot connect", error);
    }
    let packet = handshake.packet.borrow();
    if let Some(syn) = Syn::parse(&packet) {
        tracing::debug!("{} to {}: {error}", syn.client, syn.destination);
        handshakes.refuse(Refusal::of(error), &syn, &packet, worker);
    }
}

/// A handshake, and where it is found.
struct Open {
    handshake: Rc<Handshake>,
    key: Key,
}

impl Open {
    /// Takes it off the table, unless its place is a newer one's.
    fn forget(&self, handshakes: &Handshakes) {
        let mut open = handshakes.open.borrow_mut();
        if open.get(&self.key).is_some_and(|other| Rc::ptr_eq(other, &self.handshake)) {
            open.remove(&self.key);
        }
    }
}
