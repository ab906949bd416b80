//! UDP flows: what one client address and port sends, to however many servers.
//!
//! A flow has one socket towards upstream, so every server sees the same source, and
//! a reply from any of them finds its way (endpoint-independent mapping, RFC 4787).
//! What is diverted has one for each destination: a target's reply does not tell which
//! of them the client had asked.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use lru::LruCache;
use tokio::io::{Interest, Ready};
use tokio::net::UdpSocket;
use tokio::sync::Notify;
use tokio::task::{spawn_local, yield_now};
use tokio::time::{Instant, sleep_until};
use tproxy_common::abi::UDP;

use super::Worker;
use super::errors::{self, IcmpError, Queued};
use super::icmp::Budget;
use super::raw::ReplySender;
use super::receive::{Received, Receiver};
use super::record::{End, Protocol, Record};
use super::route::{Route, Way};
use super::send::send;
use super::udp::BATCH;
use super::waiting::{self, Queue, Told, Waiting};
use crate::addr::{ClientAddr, OrigDst, UpstreamAddr};
use crate::limits::ClientSlot;
use crate::sockopt::{self, Fragments};
use crate::upstream::Reason;

/// At the end of a run a flow is over when it was quiet for this long: time for an
/// answer that is under way.
const DRAIN_QUIET: Duration = Duration::from_secs(1);

/// Port of DNS servers.
const DNS: u16 = 53;

/// All flows of one worker.
pub(crate) struct Flows {
    worker: Rc<Worker>,
    replies: ReplySender,
    receiver: RefCell<Receiver>,
    icmp: Budget,
    waiting: Queue,
    /// The least recently used goes first where room is needed.
    table: RefCell<LruCache<Key, Rc<Flow>>>,
}

/// By whom a flow is; of one that is diverted also to where it was sent.
type Key = (ClientAddr, Option<OrigDst>);

/// What was in the error queue of a flow.
#[derive(Default)]
struct Errors {
    /// How many there were.
    count: usize,
    /// The MTU that the latest datagram which the kernel refused did not fit.
    mtu: Option<u32>,
}

/// One flow.
struct Flow {
    client: ClientAddr,
    /// Of one that is diverted: the target, and the destination that it stands for.
    diverted: Option<(UpstreamAddr, OrigDst)>,
    socket: UdpSocket,
    /// Whether the socket fragments what it sends.
    fragments: Cell<Fragments>,
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
        (self.client, self.diverted.map(|(_, destination)| destination))
    }

    /// Who answers, as the client knows it; `None`: a stranger to a diverted flow.
    fn source(&self, server: SocketAddr) -> Option<SocketAddr> {
        match self.diverted {
            None => Some(server),
            Some((target, destination)) if target == server.into() => Some(destination.get()),
            Some(_) => None,
        }
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
            receiver: RefCell::new(Receiver::new()),
            icmp: Budget::new(),
            waiting: Queue::new(),
            table: RefCell::new(LruCache::unbounded()),
        })
    }

    /// Sends a client's datagram to where the client wanted it, in its flow or a new one,
    /// with the DF bit or without.
    pub(crate) fn forward(self: &Rc<Self>, datagram: &Received, payload: &[u8], dont_fragment: bool) {
        let stats = self.worker.stats();
        let Some(destination) = datagram.destination else {
            return stats.udp_no_destination.inc();
        };
        let client = ClientAddr::from(datagram.sender);
        let routes = &self.worker.shared.routes;
        // A system call: not for each datagram where it would tell the same.
        let route = if routes.bind() { routes.of(UDP, client, destination, stats) } else { Route::DIRECT };
        if route.way == Way::Ask {
            return self.ask((client, destination), datagram, payload, dont_fragment);
        }
        self.forward_by(route, (client, destination), datagram, payload, dont_fragment);
    }

    /// Finds the name of a flow, from this datagram or with those that follow, which wait.
    fn ask(
        self: &Rc<Self>,
        key: (ClientAddr, OrigDst),
        datagram: &Received,
        payload: &[u8],
        dont_fragment: bool,
    ) {
        match self.waiting.add(key, datagram, payload, dont_fragment) {
            Told::Name(name, before) => {
                let route = self.decide(key, name.as_deref(), &before);
                self.forward_by(route, key, datagram, payload, dont_fragment);
            }
            Told::Waits(Some(number)) => self.wait(key, number),
            Told::Waits(None) => {}
            Told::Instead(number, other, unnamed) => {
                self.decide(other, None, &unnamed);
                self.wait(key, number);
            }
        }
    }

    /// Goes on without a name where none is found in time.
    fn wait(self: &Rc<Self>, key: (ClientAddr, OrigDst), number: u64) {
        let flows = Rc::clone(self);
        drop(spawn_local(async move {
            tokio::time::sleep(waiting::PATIENCE).await;
            let unnamed = flows.waiting.take(key, number);
            if !unnamed.is_empty() {
                flows.decide(key, None, &unnamed);
            }
        }));
    }

    /// Decides over a flow by its name, and sends on what has waited for that.
    fn decide(self: &Rc<Self>, key: (ClientAddr, OrigDst), name: Option<&str>, waiting: &[Waiting]) -> Route {
        let stats = self.worker.stats();
        stats.udp_asked.inc();
        if name.is_some() {
            stats.udp_named.inc();
        }
        let (client, destination) = key;
        let route = self.worker.shared.routes.decide(UDP, client, destination, name, stats);
        tracing::debug!("{client} to {destination}: for {name:?}, so {:?}", route.way);
        for one in waiting {
            self.forward_by(route, key, &one.datagram, &one.payload, one.dont_fragment);
        }
        route
    }

    /// Sends a datagram the way that is known, in its flow or a new one.
    fn forward_by(
        self: &Rc<Self>,
        route: Route,
        (client, destination): (ClientAddr, OrigDst),
        datagram: &Received,
        payload: &[u8],
        dont_fragment: bool,
    ) {
        let stats = self.worker.stats();
        let Some((_, to)) = self.worker.shared.upstream(route.way, destination) else {
            if route.way == Way::Reject {
                self.refuse(client, destination, payload);
            }
            return;
        };
        if self.worker.shared.own.takes(to) {
            return stats.loops_prevented.inc();
        }
        let diverted = matches!(route.way, Way::Divert(_)).then_some(destination);
        let known = self.table.borrow_mut().get(&(client, diverted)).map(Rc::clone);
        let Some(flow) = known.or_else(|| self.open(client, destination, route)) else { return };
        flow.last.set(Instant::now());
        flow.set_fragments(dont_fragment);
        let to = to.get();
        // Not by way of the runtime: it believes a new socket unready until its first event, and
        // the first datagram would be lost.
        let attempt = || send(flow.socket.as_fd(), to, [payload], datagram.class.control(to.is_ipv6()));
        let result = match attempt() {
            // What came of an earlier datagram is told in place of sending this one.
            Err(error) if error.kind() != io::ErrorKind::WouldBlock && self.bring_errors(&flow).count > 0 => {
                attempt()
            }
            result => result,
        };
        match result {
            Ok(sent) => {
                stats.udp_datagrams_up.inc();
                stats.udp_bytes_up.add(sent as u64);
                flow.record.traffic.up.set(flow.record.traffic.up.get() + sent as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stats.udp_send_full.inc(),
            Err(error) => {
                stats.udp_send_errors.inc();
                tracing::debug!("{client} to {destination}: cannot send: {error}");
                self.report_unsent(&flow, destination, &error, payload);
            }
        }
    }

    /// Lets flows end that are quiet, however long their time-outs are.
    pub(crate) fn drain(&self) {
        for (_, flow) in self.table.borrow().iter() {
            flow.changed.notify_one();
        }
    }

    /// A new flow, unless a limit forbids it.
    fn open(self: &Rc<Self>, client: ClientAddr, destination: OrigDst, route: Route) -> Option<Rc<Flow>> {
        let (shared, stats) = (&self.worker.shared, self.worker.stats());
        let route =
            if shared.routes.bind() { route } else { shared.routes.of(UDP, client, destination, stats) };
        let (direct, to) = shared.upstream(route.way, destination)?;
        let Some(slot) = shared.clients.admit(client.ip()) else {
            stats.client_limit_udp.inc();
            return None;
        };
        if self.table.borrow().len() >= shared.flows_per_worker.max(1) {
            self.evict();
        }
        let socket = match direct.udp(client, to, stats) {
            Ok(socket) => socket,
            Err(error) => {
                stats.udp_no_socket.inc();
                if error.reason == Reason::Exhausted {
                    shared.report_exhaustion("cannot open a UDP flow", &error.source.source);
                    // The client will repeat its datagram; by then there is a descriptor.
                    self.evict();
                }
                tracing::debug!("{client} to {destination}: {error}");
                return None;
            }
        };
        shared.report_recovery();
        let flow = Rc::new(Flow {
            client,
            diverted: matches!(route.way, Way::Divert(_)).then_some((to, destination)),
            socket,
            fragments: Cell::new(Fragments::Allowed),
            last: Cell::new(Instant::now()),
            replied: Cell::new(false),
            evicted: Cell::new(false),
            changed: Notify::new(),
            record: Record::new(&self.worker, Protocol::Udp, client, destination, route.rule),
            _slot: slot,
        });
        self.table.borrow_mut().put(flow.key(), Rc::clone(&flow));
        spawn_local(Rc::clone(self).run(Rc::clone(&flow)));
        Some(flow)
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
        let end = loop {
            tokio::select! {
                result = flow.socket.ready(Interest::READABLE | Interest::ERROR) => match result {
                    Ok(ready) => if self.bring(&flow, ready) { yield_now().await },
                    Err(_) => break End::Cut,
                },
                () = &mut timer => {}
                () = flow.changed.notified() => {}
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

    /// Passes ICMP errors about the flow's datagrams on to its client.
    fn bring_errors(&self, flow: &Flow) -> Errors {
        let mut quote = [0; errors::QUOTE];
        let mut errors = Errors::default();
        while errors.count < BATCH {
            match errors::receive(flow.socket.as_fd(), &mut quote) {
                Ok(Queued::Icmp { destination, error, len }) => {
                    let told = match flow.diverted {
                        None => Some((destination, error)),
                        Some((_, asked)) => error.of_target(asked.ip()).map(|error| (asked, error)),
                    };
                    if let Some((destination, error)) = told
                        && self.may_report()
                    {
                        self.report(flow.client, destination, &error, &quote[..len]);
                    }
                }
                Ok(Queued::TooLong { mtu }) => errors.mtu = Some(mtu),
                Ok(Queued::Other) => {}
                Err(_) => break,
            }
            errors.count += 1;
        }
        errors
    }

    /// Tells the client that nobody listens there, as its destination would: a rule says so.
    fn refuse(&self, client: ClientAddr, destination: OrigDst, payload: &[u8]) {
        if self.may_report() {
            let error = IcmpError::port_unreachable(destination.ip());
            self.report(client, destination, &error, payload);
        }
    }

    /// Tells the client that there is no way for its datagram, as a router would.
    fn report_unsent(&self, flow: &Flow, destination: OrigDst, error: &io::Error, payload: &[u8]) {
        let Some(errno) = error.raw_os_error() else { return };
        // Taken off the queue whether or not it may be told.
        let mtu = if errno == libc::EMSGSIZE { self.bring_errors(flow).mtu } else { None };
        // Before this host's address is asked for, which takes a socket.
        if !self.may_report() {
            return;
        }
        let Ok(here) = sockopt::address_towards(flow.client.get(), self.worker.shared.mark()) else { return };
        let icmp = match mtu {
            Some(mtu) => IcmpError::too_long(mtu, here),
            None => IcmpError::of_send(errno, here),
        };
        if let Some(icmp) = icmp {
            self.report(flow.client, destination, &icmp, payload);
        }
    }

    /// Whether one more error may be sent, as far as a router may.
    fn may_report(&self) -> bool {
        let granted = self.icmp.take(std::time::Instant::now());
        if !granted {
            self.worker.stats().udp_icmp_errors_limited.inc();
        }
        granted
    }

    fn report(&self, client: ClientAddr, destination: OrigDst, error: &IcmpError, quote: &[u8]) {
        let stats = self.worker.stats();
        let Some(message) = error.message(client, destination, quote) else { return };
        match self.replies.send_icmp(error.offender, client, &message) {
            Ok(()) => stats.udp_icmp_errors.inc(),
            Err(error) => {
                stats.udp_reply_errors.inc();
                tracing::debug!("ICMP error for {client}: cannot send: {error}");
            }
        }
    }

    /// Sends what has come on to the client; true where there may be more.
    fn bring_replies(&self, flow: &Flow) -> bool {
        let stats = self.worker.stats();
        let mut buffer = self.worker.datagram.borrow_mut();
        let mut receiver = self.receiver.borrow_mut();
        self.table.borrow_mut().promote(&flow.key());
        for _ in 0..BATCH {
            let mut receive = || receiver.receive(flow.socket.as_fd(), &mut buffer);
            match flow.socket.try_io(Interest::READABLE, &mut receive) {
                Ok(Received { len, sender: server, class, .. }) => {
                    let Some(server) = flow.source(server) else { continue };
                    flow.last.set(Instant::now());
                    flow.replied.set(true);
                    // Before its client has it and connects.
                    if server.port() == DNS
                        && self.worker.shared.routes.learn(flow.client, server.into(), &buffer[..len])
                    {
                        stats.names_learned.inc();
                    }
                    match self.replies.send(server, flow.client, class, &buffer[..len]) {
                        Ok(()) => {
                            stats.udp_datagrams_down.inc();
                            stats.udp_bytes_down.add(len as u64);
                            flow.record.traffic.down.set(flow.record.traffic.down.get() + len as u64);
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => stats.udp_send_full.inc(),
                        Err(error) => {
                            stats.udp_reply_errors.inc();
                            tracing::debug!("reply of {server} to {}: cannot send: {error}", flow.client);
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                // An error about an earlier datagram: its details are in the queue.
                Err(_) if self.bring_errors(flow).count > 0 => {}
                Err(error) => {
                    stats.udp_receive_errors.inc();
                    tracing::debug!("flow of {}: cannot receive: {error}", flow.client);
                }
            }
        }
        true
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
