//! UDP flows: what one client address and port sends, to however many servers.
//!
//! A flow has one socket towards upstream, so every server sees the same source, and
//! a reply from any of them finds its way (endpoint-independent mapping, RFC 4787).
//! Through a proxy server that socket's datagrams go to and come from the server alone.
//! What is diverted has one for each destination: a target's reply does not tell which
//! of them the client had asked.

mod ask;
mod association;
mod errors;
mod exit;
mod forward;
mod replies;

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use lru::LruCache;
use tokio::io::{Interest, Ready};
use tokio::net::UdpSocket;
use tokio::sync::Notify;
use tokio::task::{spawn_local, yield_now};
use tokio::time::{Instant, sleep_until};

use super::Worker;
use super::icmp::Budget;
use super::raw::ReplySender;
use super::receive::{Batch, MOST, Received};
use super::record::{End, Protocol, Record};
use super::route::Route;
use super::segments;
use super::send::{Segments, TrafficClass, send};
use super::udp::BATCH;
use super::waiting::Queue;
use crate::addr::{ClientAddr, OrigDst};
use crate::limits::ClientSlot;
use crate::sockopt::{self, Fragments};
use crate::upstream::{ConnectError, Reason};
use association::Opening;
use exit::Exit;

/// At the end of a run a flow is over when it was quiet for this long: time for an
/// answer that is under way.
const DRAIN_QUIET: Duration = Duration::from_secs(1);

/// All flows of one worker.
pub(crate) struct Flows {
    worker: Rc<Worker>,
    replies: ReplySender,
    /// Never borrowed while a task waits.
    batch: RefCell<Batch>,
    icmp: Budget,
    waiting: Queue,
    /// Those for which a proxy server is being asked.
    opening: Opening,
    /// The least recently used goes first where room is needed.
    table: RefCell<LruCache<Key, Rc<Flow>>>,
}

/// By whom a flow is, and what it shares with other datagrams of that client.
type Key = (ClientAddr, Lane);

/// Datagrams of a client that go by one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Lane {
    /// By the upstream of this number, wherever to.
    Upstream(u16),
    /// By the upstream of this number to this destination, of which the name is known.
    Named(u16, OrigDst),
    /// Diverted, from this destination.
    Diverted(OrigDst),
}

/// One flow.
struct Flow {
    client: ClientAddr,
    lane: Lane,
    exit: Exit,
    socket: UdpSocket,
    /// Whether the socket fragments what it sends.
    fragments: Cell<Fragments>,
    /// The latest group of its datagrams among those that came together.
    group: Cell<usize>,
    /// Whether it sends datagrams as segments, as far as is known.
    segments: Cell<bool>,
    /// Whether it receives them as such.
    merges: Cell<bool>,
    /// When the latest datagram went either way.
    last: Cell<Instant>,
    replied: Cell<bool>,
    evicted: Cell<bool>,
    /// The flow's task has to look at the fields above.
    changed: Notify,
    record: Record,
    _slot: ClientSlot,
}

impl Flow {
    fn key(&self) -> Key {
        (self.client, self.lane)
    }

    /// Has the next datagram sent with the DF bit or without.
    fn set_fragments(&self, dont_fragment: bool) {
        let wanted = self.fragments.get().next(dont_fragment);
        if wanted == self.fragments.get() {
            return;
        }
        match sockopt::set_fragments(self.socket.as_fd(), wanted) {
            Ok(()) => self.fragments.set(wanted),
            Err(error) => tracing::debug!("flow of {}: {error}", self.client),
        }
    }
}

impl Flows {
    pub(crate) fn new(worker: &Rc<Worker>, replies: ReplySender) -> Rc<Self> {
        Rc::new(Self {
            worker: Rc::clone(worker),
            replies,
            batch: RefCell::new(Batch::new()),
            icmp: Budget::new(),
            waiting: Queue::new(),
            opening: Opening::default(),
            table: RefCell::new(LruCache::unbounded()),
        })
    }

    fn record(&self, client: ClientAddr, destination: OrigDst, route: Route) -> Record {
        Record::new(&self.worker, Protocol::Udp, client, destination, route.rule)
    }

    /// Takes what has come to a listener and sends it on. How much it was: fewer than [`MOST`]
    /// where there is nothing more.
    pub(super) fn take(self: &Rc<Self>, listener: BorrowedFd<'_>, dont_fragment: bool) -> io::Result<usize> {
        let mut batch = self.batch.borrow_mut();
        let come = batch.receive(listener, MOST)?;
        self.forward_all(batch.datagrams(), dont_fragment);
        Ok(come)
    }

    /// Sends datagrams by their flow, which are alike in all but their payload.
    fn send(
        &self,
        flow: &Rc<Flow>,
        destination: OrigDst,
        alike: &Received,
        mut payloads: &[&[u8]],
        dont_fragment: bool,
    ) {
        let stats = self.worker.stats();
        let to = flow.exit.next_hop(destination);
        if self.worker.shared.own.takes(to) {
            return stats.loops_prevented.add(payloads.len() as u64);
        }
        flow.last.set(Instant::now());
        let (to, header) = (to.get(), flow.exit.header(flow.client, destination));
        // With a header in front it may not fit any more, which its client cannot mend.
        let dont_fragment = dont_fragment && header.is_empty();
        flow.set_fragments(dont_fragment);
        while let Some(first) = payloads.first() {
            let length = header.len() + first.len();
            let may = flow.segments.get()
                && (alike.merged || segments::are_whole(to.is_ipv6(), dont_fragment, length));
            let lengths = payloads.iter().map(|payload| header.len() + payload.len());
            let together = if may { segments::together(lengths) } else { 1 };
            let (now, later) = payloads.split_at(together);
            match self.send_together(flow, to, alike.class, &header, now) {
                Ok(_) => {
                    let bytes = now.iter().map(|payload| payload.len() as u64).sum();
                    stats.udp_datagrams_up.add(now.len() as u64);
                    stats.udp_bytes_up.add(bytes);
                    let up = &flow.record.traffic.up;
                    up.set(up.get() + bytes);
                }
                Err(error) if together > 1 && segments::are_refused(&error) => {
                    flow.segments.set(false);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    stats.udp_send_full.add(now.len() as u64);
                }
                Err(error) => {
                    stats.udp_send_errors.add(now.len() as u64);
                    tracing::debug!("{} to {destination}: cannot send: {error}", flow.client);
                    if header.is_empty() {
                        for payload in now {
                            self.report_unsent(flow, destination, &error, payload);
                        }
                    }
                }
            }
            payloads = later;
        }
    }

    /// Sends datagrams by one system call, behind a header each.
    fn send_together(
        &self,
        flow: &Flow,
        to: SocketAddr,
        class: TrafficClass,
        header: &[u8],
        payloads: &[&[u8]],
    ) -> io::Result<usize> {
        let control = || class.control(to.is_ipv6());
        let attempt = || {
            let socket = flow.socket.as_fd();
            if let [payload] = payloads {
                let parts = [header, payload].map(IoSlice::new);
                return send(socket, to, &parts[usize::from(header.is_empty())..], control());
            }
            let parts = payloads.iter().flat_map(|payload| [header, payload]).filter(|part| !part.is_empty());
            let parts: Vec<_> = parts.map(IoSlice::new).collect();
            let length = header.len() + payloads[0].len();
            send(socket, to, &parts, Segments::new(control(), u16::try_from(length).unwrap_or(u16::MAX)))
        };
        // Not by way of the runtime: it believes a new socket unready until its first event, and
        // the first datagram would be lost.
        match attempt() {
            // What came of an earlier datagram is told in place of sending this one.
            Err(error) if error.kind() != io::ErrorKind::WouldBlock && self.bring_errors(flow).count > 0 => {
                attempt()
            }
            result => result,
        }
    }

    /// Lets flows end that are quiet, however long their time-outs are.
    pub(crate) fn drain(&self) {
        for (_, flow) in self.table.borrow().iter() {
            flow.changed.notify_one();
        }
    }

    /// The client's part of the limits for a new flow; room is made for it.
    fn admit(&self, client: ClientAddr) -> Option<ClientSlot> {
        let shared = &self.worker.shared;
        let slot = shared.admit(client, &self.worker.stats().client_limit_udp)?;
        let most = shared.flows_per_worker.max(1);
        if self.opening.len() >= most {
            // Those cannot make room: each waits for a server.
            self.worker.stats().udp_waiting_full.inc();
            return None;
        }
        if self.table.borrow().len() + self.opening.len() >= most {
            self.evict();
        }
        Some(slot)
    }

    /// The socket of a new flow, if there is one.
    fn available(&self, socket: Result<UdpSocket, ConnectError>, client: ClientAddr) -> Option<UdpSocket> {
        let shared = &self.worker.shared;
        match socket {
            Ok(socket) => {
                shared.report_recovery();
                Some(socket)
            }
            Err(error) => {
                self.worker.stats().udp_no_socket.inc();
                if let Some(error) = error.exhaustion() {
                    shared.report_exhaustion("cannot open a UDP flow", error);
                    // The client will repeat its datagram; by then there is a descriptor.
                    self.evict();
                }
                tracing::debug!("a flow of {client}: {error}");
                None
            }
        }
    }

    /// A new flow.
    fn open(
        self: &Rc<Self>,
        (client, lane): Key,
        exit: Exit,
        socket: UdpSocket,
        slot: ClientSlot,
        record: Record,
    ) -> Rc<Flow> {
        let flow = Rc::new(Flow {
            client,
            lane,
            exit,
            socket,
            fragments: Cell::new(Fragments::Allowed),
            group: Cell::new(0),
            segments: Cell::new(true),
            merges: Cell::new(false),
            last: Cell::new(Instant::now()),
            replied: Cell::new(false),
            evicted: Cell::new(false),
            changed: Notify::new(),
            record,
            _slot: slot,
        });
        self.table.borrow_mut().put(flow.key(), Rc::clone(&flow));
        spawn_local(Rc::clone(self).run(Rc::clone(&flow)));
        flow
    }

    /// Ends the least recently used flow.
    fn evict(&self) {
        if let Some((_, flow)) = self.table.borrow_mut().pop_lru() {
            flow.evicted.set(true);
            flow.changed.notify_one();
        }
    }

    /// Brings the replies of one flow to its client, until the flow is over.
    ///
    /// The timer sleeps until the flow would be over if nothing came, and looks
    /// then whether something did: a datagram costs no timer.
    async fn run(self: Rc<Self>, flow: Rc<Flow>) {
        let mut timer = pin!(sleep_until(self.deadline(&flow)));
        let mut changed = pin!(flow.changed.notified());
        let end = loop {
            tokio::select! {
                biased;
                () = flow.exit.closed() => break End::NotConnected(Reason::Proxy),
                result = flow.socket.ready(Interest::READABLE | Interest::ERROR) => match result {
                    Ok(ready) => if self.bring(&flow, ready) { yield_now().await },
                    Err(_) => break End::Cut,
                },
                () = &mut timer => {}
                () = &mut changed => changed.set(flow.changed.notified()),
            }
            if flow.evicted.get() {
                break End::Evicted;
            }
            let deadline = self.deadline(&flow);
            if Instant::now() >= deadline {
                break End::Timeout;
            }
            if timer.is_elapsed() || deadline < timer.deadline() {
                timer.as_mut().reset(deadline);
            }
        };
        flow.record.ends(end);
        self.remove(&flow);
    }

    /// Brings what has come, replies and errors; true where there may be more.
    fn bring(&self, flow: &Flow, ready: Ready) -> bool {
        let more_errors = ready.is_error() && {
            let errors = || match self.bring_errors(flow).count {
                BATCH.. => Ok(()),
                // The queue is empty: wait for the next one.
                _ => Err(io::ErrorKind::WouldBlock.into()),
            };
            flow.socket.try_io(Interest::ERROR, errors).is_ok()
        };
        let more_replies = ready.is_readable() && self.bring_replies(flow);
        more_errors || more_replies
    }

    fn deadline(&self, flow: &Flow) -> Instant {
        let timeouts = &self.worker.shared.timeouts;
        let timeout = if flow.replied.get() { timeouts.udp } else { timeouts.udp_unreplied };
        let timeout = if self.worker.draining.get() { timeout.min(DRAIN_QUIET) } else { timeout };
        flow.last.get() + timeout
    }

    fn remove(&self, flow: &Rc<Flow>) {
        let mut table = self.table.borrow_mut();
        // After an eviction the place may be a newer flow's.
        let key = flow.key();
        if table.peek(&key).is_some_and(|other| Rc::ptr_eq(other, flow)) {
            table.pop(&key);
        }
    }
}
