//! Which flow a client's datagram belongs to, and how a new one begins.

use std::rc::Rc;

use tproxy_common::abi::UDP;

use super::exit::Exit;
use super::{Flow, Flows, Key, Lane};
use crate::addr::{ClientAddr, OrigDst};
use crate::config::upstream::Udp;
use crate::relay::exit::{Hop, Leg, Legs};
use crate::relay::receive::Received;
use crate::relay::route::{Route, Way};
use crate::relay::sniff::quic;

impl Flows {
    /// Sends a client's datagram to where the client wanted it, in its flow or a new one,
    /// with the DF bit or without.
    pub(crate) fn forward(self: &Rc<Self>, datagram: &Received, payload: &[u8], dont_fragment: bool) {
        let stats = self.worker.stats();
        let Some(destination) = datagram.destination else {
            return stats.udp_no_destination.inc();
        };
        let key = (ClientAddr::from(datagram.sender), destination);
        let route = self.route(key);
        if self.wants_name(key, route.way, payload) {
            return self.ask(key, datagram, payload, dont_fragment);
        }
        self.forward_by((route, None), key, datagram, payload, dont_fragment);
    }

    /// The way of a datagram.
    pub(super) fn route(&self, (client, destination): (ClientAddr, OrigDst)) -> Route {
        let routes = &self.worker.shared.routes;
        // A system call: not for each datagram where it would tell the same.
        if routes.bind() {
            return routes.of(UDP, client, destination, self.worker.stats());
        }
        Route::DEFAULT
    }

    /// Whether it is to be looked what name a datagram's flow is for: its way depends on it, or a
    /// server wants to know.
    fn wants_name(&self, (client, destination): (ClientAddr, OrigDst), way: Way, payload: &[u8]) -> bool {
        match way {
            Way::Ask => true,
            Way::Proxy(number) if self.worker.shared.routes.ask_by_name(way) => {
                quic::may_open(payload) && !self.has((client, Lane::Named(number, destination)))
            }
            _ => false,
        }
    }

    /// Whether there is such a flow, or will be once a server carries it.
    fn has(&self, key: Key) -> bool {
        self.table.borrow().contains(&key) || self.opening.waits(&key)
    }

    /// Sends a datagram the way that is known, in its flow or a new one; of a flow for this name,
    /// where that is known.
    pub(super) fn forward_by(
        self: &Rc<Self>,
        (route, name): (Route, Option<&str>),
        (client, destination): (ClientAddr, OrigDst),
        datagram: &Received,
        payload: &[u8],
        dont_fragment: bool,
    ) {
        let lane = match route.way {
            Way::Proxy(number) if self.worker.shared.routes.ask_by_name(route.way) => {
                let named = Lane::Named(number, destination);
                let by_name = name.is_some() || self.has((client, named));
                if by_name { named } else { Lane::Upstream(number) }
            }
            Way::Proxy(number) => Lane::Upstream(number),
            Way::Divert(_) => Lane::Diverted(destination),
            Way::Reject => return self.refuse(client, destination, payload),
            Way::Drop | Way::Ask => return,
        };
        let known = self.table.borrow_mut().get(&(client, lane)).map(Rc::clone);
        let known = known.or_else(|| {
            self.begin((client, lane), destination, (route, name), datagram, payload, dont_fragment)
        });
        if let Some(flow) = known {
            self.send(&flow, destination, datagram, payload, dont_fragment);
        }
    }

    /// A new flow; `None`: this datagram is not sent, or only once a server carries it.
    fn begin(
        self: &Rc<Self>,
        (client, lane): Key,
        destination: OrigDst,
        (route, name): (Route, Option<&str>),
        datagram: &Received,
        payload: &[u8],
        dont_fragment: bool,
    ) -> Option<Rc<Flow>> {
        let legs = self.legs((client, destination), route.way, payload)?;
        let route = self.rule_of(route, client, destination);
        let Leg { direct, hop, send_proxy } = legs.first()?;
        let Hop::Straight(to) = hop else {
            self.associate((client, lane), legs, (route, name), datagram, payload, dont_fragment);
            return None;
        };
        let slot = self.admit(client)?;
        let socket = self.available(direct.udp(client, *to, self.worker.stats()), client)?;
        let exit = match lane {
            Lane::Upstream(_) | Lane::Named(..) => Exit::Straight(*send_proxy),
            Lane::Diverted(_) => Exit::Target(*to, destination, *send_proxy),
        };
        Some(self.open((client, lane), exit, socket, slot, self.record(client, destination, route)))
    }

    /// How a new flow may leave, what goes first before; `None`: it does not, and its client is told.
    fn legs(
        &self,
        (client, destination): (ClientAddr, OrigDst),
        way: Way,
        payload: &[u8],
    ) -> Option<Vec<Leg>> {
        let legs = Legs::of(&self.worker, way, client, destination)?;
        let mut instead = None;
        let carries = |leg: &Leg| match &leg.hop {
            Hop::Straight(_) => true,
            Hop::Through(outbound) => {
                instead.get_or_insert(outbound.proxy().udp);
                outbound.carries_udp()
            }
        };
        let legs: Vec<_> = legs.into_iter().filter(carries).collect();
        if !legs.is_empty() {
            return Some(legs);
        }
        if instead == Some(Udp::Reject) {
            self.refuse(client, destination, payload);
            return None;
        }
        // What the kernel was not told to forward is here, and can be relayed.
        Leg::straight(&self.worker, client, destination).map(|leg| vec![leg])
    }

    /// The rule of a new flow, where none was asked for yet.
    fn rule_of(&self, route: Route, client: ClientAddr, destination: OrigDst) -> Route {
        let routes = &self.worker.shared.routes;
        if routes.bind() { route } else { routes.of(UDP, client, destination, self.worker.stats()) }
    }
}
