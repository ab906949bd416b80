//! Flows through a SOCKS5 server (UDP ASSOCIATE, RFC 1928 section 7): one association for all
//! destinations of a client's port. Datagrams that come before there is one wait.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::spawn_local;

use super::exit::Exit;
use super::{Flows, Key};
use crate::addr::{ClientAddr, OrigDst, UpstreamAddr};
use crate::config::upstream::Udp;
use crate::relay::exit::{Hop, Leg};
use crate::relay::receive::Received;
use crate::relay::record::End;
use crate::relay::route::Route;
use crate::upstream::outbound::Outbound;
use crate::upstream::{ConnectError, Reason};

/// Datagrams of a flow that wait: a QUIC client's first flight, some DNS questions.
const DATAGRAMS: usize = 16;

/// A server that carries a flow's datagrams.
#[derive(Debug)]
pub(super) struct Association {
    relay: UpstreamAddr,
    /// It does so as long as this is open.
    control: TcpStream,
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
            if self.control.ready(Interest::READABLE).await.is_err() {
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
pub(super) struct Opening(RefCell<HashMap<Key, Vec<Waiting>>>);

/// A datagram that waits.
#[derive(Debug)]
struct Waiting {
    destination: OrigDst,
    datagram: Received,
    payload: Box<[u8]>,
}

impl Opening {
    pub(super) fn len(&self) -> usize {
        self.0.borrow().len()
    }
}

impl Flows {
    /// Has a server carry the datagrams of a new flow, of which this is one.
    pub(super) fn associate(
        self: &Rc<Self>,
        key: Key,
        outbound: Arc<Outbound>,
        route: Route,
        datagram: &Received,
        payload: &[u8],
    ) {
        let Some(destination) = datagram.destination else { return };
        let waiting = Waiting { destination, datagram: *datagram, payload: payload.into() };
        if let Some(queue) = self.opening.0.borrow_mut().get_mut(&key) {
            if queue.len() < DATAGRAMS {
                queue.push(waiting);
            } else {
                self.worker.stats().udp_waiting_full.inc();
            }
            return;
        }
        let (client, _) = key;
        let Some(slot) = self.admit(client) else { return };
        self.opening.0.borrow_mut().insert(key, vec![waiting]);
        let record = self.record(client, destination, route);
        let flows = Rc::clone(self);
        drop(spawn_local(async move {
            let asked = flows.ask_server(client, &outbound).await;
            let waited = flows.opening.0.borrow_mut().remove(&key).unwrap_or_default();
            match asked {
                Ok((association, socket)) => {
                    record.connected(Hop::Through(outbound));
                    let flow = flows.open(key, Exit::Relay(association), socket, slot, record);
                    for one in waited {
                        flows.send(&flow, one.destination, &one.datagram, &one.payload, false);
                    }
                }
                Err(error) => {
                    tracing::debug!("a flow of {client} by {}: {error}", outbound.proxy().name);
                    if let Some(error) = error.exhaustion() {
                        flows.worker.shared.report_exhaustion("cannot open a UDP flow", error);
                    }
                    record.ends(End::NotConnected(error.reason));
                    drop((record, slot));
                    flows.without(&outbound, key, route, &error, &waited);
                }
            }
        }));
    }

    async fn ask_server(
        &self,
        client: ClientAddr,
        outbound: &Outbound,
    ) -> Result<(Association, tokio::net::UdpSocket), ConnectError> {
        let (direct, stats) = (self.worker.shared.as_proxy, self.worker.stats());
        let asked = tokio::time::timeout(direct.timeout, outbound.associate(&direct, client, stats)).await;
        let (control, relay) = match asked {
            Ok(outcome) => outcome?,
            Err(_) => return outbound.judge(Err(Outbound::too_slow())),
        };
        let relay = UpstreamAddr::from(relay);
        let socket = direct.udp(client, relay, stats)?;
        Ok((Association { relay, control }, socket))
    }

    /// What becomes of datagrams that the server does not carry.
    fn without(
        self: &Rc<Self>,
        outbound: &Outbound,
        (client, lane): Key,
        route: Route,
        error: &ConnectError,
        waited: &[Waiting],
    ) {
        // It may carry others' once it works again; these are not to take another way meanwhile.
        let another_way = error.reason == Reason::Proxy && !outbound.carries_udp();
        let straight = another_way && outbound.proxy().udp != Udp::Reject;
        for one in waited {
            let destination = one.destination;
            if !straight {
                self.refuse(client, destination, &one.payload);
                continue;
            }
            let Some(Leg { direct, hop: Hop::Straight(to) }) =
                Leg::straight(&self.worker, client, destination)
            else {
                continue;
            };
            let known = self.table.borrow_mut().get(&(client, lane)).map(Rc::clone);
            let flow = known.or_else(|| {
                let slot = self.admit(client)?;
                let socket = self.available(direct.udp(client, to, self.worker.stats()), client)?;
                let record = self.record(client, destination, route);
                Some(self.open((client, lane), Exit::Straight, socket, slot, record))
            });
            if let Some(flow) = flow {
                self.send(&flow, destination, &one.datagram, &one.payload, false);
            }
        }
    }
}
