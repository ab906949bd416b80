//! Flows through a SOCKS5 server (UDP ASSOCIATE, RFC 1928 section 7): one association for all
//! destinations of a client's port. Datagrams that come before there is one wait.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use tokio::net::UdpSocket;
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::exit::{Exit, Named};
use super::{Flows, Key};
use crate::addr::{ClientAddr, OrigDst, UpstreamAddr};
use crate::config::upstream::Udp;
use crate::relay::exit::{Hop, Leg};
use crate::relay::receive::Received;
use crate::relay::record::End;
use crate::relay::route::Route;
use crate::relay::waiting::Waiting;
use crate::upstream::ConnectError;
use crate::upstream::outbound::{Errand, Outbound};
use crate::wire::Wire;

/// Datagrams of a flow that wait: a QUIC client's first flight, some DNS questions.
const DATAGRAMS: usize = 16;

/// Bytes that wait at a worker: those of a thousand first flights.
const BYTES: usize = 8 << 20;

/// A server that carries a flow's datagrams.
#[derive(Debug)]
pub(super) struct Association {
    relay: UpstreamAddr,
    /// It does so as long as this is open.
    control: Wire,
}

impl Association {
    /// Where it takes them.
    pub(super) fn relay(&self) -> UpstreamAddr {
        self.relay
    }

    /// Waits until the server hangs up.
    pub(super) async fn closed(&self) {
        let mut nothing = [0; 64];
        loop {
            if self.control.readable().await.is_err() {
                return;
            }
            match self.control.try_read(&mut nothing) {
                // It has nothing to say here.
                Ok(1..) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Ok(0) | Err(_) => return,
            }
        }
    }
}

/// The flows for which a server is being asked.
#[derive(Debug, Default)]
pub(super) struct Opening {
    flows: RefCell<HashMap<Key, Vec<Waiting>>>,
    bytes: Cell<usize>,
}

impl Opening {
    pub(super) fn len(&self) -> usize {
        self.flows.borrow().len()
    }

    pub(super) fn waits(&self, key: &Key) -> bool {
        self.flows.borrow().contains_key(key)
    }

    /// Has a datagram wait with its flow. Whether there was room.
    fn add(&self, key: &Key, waiting: Waiting) -> bool {
        let mut flows = self.flows.borrow_mut();
        let Some(queue) = flows.get_mut(key) else { return false };
        let bytes = self.bytes.get() + waiting.payload.len();
        let room = queue.len() < DATAGRAMS && bytes <= BYTES;
        if room {
            self.bytes.set(bytes);
            queue.push(waiting);
        }
        room
    }

    /// A flow begins to wait.
    fn begin(&self, key: Key) {
        self.flows.borrow_mut().insert(key, Vec::new());
    }

    /// It is over: all that have waited.
    fn end(&self, key: &Key) -> Vec<Waiting> {
        let waited = self.flows.borrow_mut().remove(key).unwrap_or_default();
        let bytes: usize = waited.iter().map(|one| one.payload.len()).sum();
        self.bytes.set(self.bytes.get() - bytes);
        waited
    }
}

impl Flows {
    /// Has the first server that does so carry the datagrams of a new flow, of which this is one.
    pub(super) fn associate(
        self: &Rc<Self>,
        key: Key,
        legs: Vec<Leg>,
        (route, name): (Route, Option<&str>),
        datagram: &Received,
        payload: &[u8],
        dont_fragment: bool,
    ) {
        let Some(destination) = datagram.destination else { return };
        let (client, _) = key;
        let slot = if self.opening.waits(&key) {
            None
        } else {
            let Some(slot) = self.admit(client) else { return };
            self.opening.begin(key);
            Some(slot)
        };
        let waiting = Waiting { datagram: *datagram, payload: payload.into(), dont_fragment };
        if !self.opening.add(&key, waiting) {
            self.worker.stats().udp_waiting_full.inc();
        }
        // Else the server is being asked already.
        let Some(slot) = slot else { return };
        let record = self.record(client, destination, route);
        let (flows, name) = (Rc::clone(self), name.map(Box::from));
        drop(spawn_local(async move {
            let found = flows.first_of(legs, (client, destination), name).await;
            let waited = flows.opening.end(&key);
            let (exit, socket) = match found {
                Ok((exit, socket, hop)) => {
                    record.connected(hop);
                    (exit, socket)
                }
                Err(error) => {
                    if let Some(error) = error.exhaustion() {
                        flows.worker.shared.report_exhaustion("cannot open a UDP flow", error);
                    }
                    record.ends(End::NotConnected(error.reason));
                    for one in waited {
                        flows.refuse(client, one.datagram.destination.unwrap_or(destination), &one.payload);
                    }
                    return;
                }
            };
            let flow = flows.open(key, exit, socket, slot, record);
            for Waiting { datagram, payload, dont_fragment } in waited {
                let destination = datagram.destination.unwrap_or(destination);
                flows.send(&flow, destination, &datagram, &[&payload], dont_fragment);
            }
        }));
    }

    /// The first way that can be gone, and a socket for it.
    async fn first_of(
        &self,
        legs: Vec<Leg>,
        (client, destination): (ClientAddr, OrigDst),
        name: Option<Box<str>>,
    ) -> Result<(Exit, UdpSocket, Hop), ConnectError> {
        let stats = self.worker.stats();
        let mut failed = Err(Outbound::too_slow());
        for Leg { direct, hop, send_proxy } in legs {
            let outbound = match &hop {
                Hop::Through(outbound) => outbound,
                Hop::Straight(to) => {
                    return Ok((Exit::Straight(send_proxy), direct.udp(client, *to, stats)?, hop));
                }
            };
            let asked =
                timeout(direct.timeout, outbound.associate(Errand { direct: &direct, client, stats })).await;
            let asked = asked.unwrap_or_else(|_| outbound.judge(Err(Outbound::too_slow())));
            match asked {
                Ok((control, relay)) => {
                    let relay = UpstreamAddr::from(relay);
                    let socket = direct.udp(client, relay, stats)?;
                    let association = Association { relay, control };
                    let exit = match name.filter(|_| outbound.proxy().names) {
                        Some(name) => Exit::Named(association, Named::new(name, destination)),
                        None => Exit::Relay(association),
                    };
                    return Ok((exit, socket, hop));
                }
                Err(error) => {
                    tracing::debug!("a flow of {client} by {hop}: {error}");
                    // It says that it never will, and where such flows go is configured.
                    if !outbound.carries_udp()
                        && outbound.proxy().udp != Udp::Reject
                        && let Some(Leg { direct, hop: Hop::Straight(to), send_proxy }) =
                            Leg::straight(&self.worker, client, destination)
                    {
                        return Ok((
                            Exit::Straight(send_proxy),
                            direct.udp(client, to, stats)?,
                            Hop::Straight(to),
                        ));
                    }
                    failed = Err(error);
                }
            }
        }
        failed
    }
}
