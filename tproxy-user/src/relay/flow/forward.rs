//! Which flow a client's datagram belongs to, and how a new one begins.

use std::rc::Rc;

use smallvec::SmallVec;
use tproxy_common::abi::UDP;

use super::exit::Exit;
use super::{Flow, Flows, Key, Lane};
use crate::addr::{ClientAddr, OrigDst};
use crate::config::upstream::Udp;
use crate::relay::exit::{Hop, Leg, Legs};
use crate::relay::receive::Received;
use crate::relay::route::{Route, Way};
use crate::relay::sniff::quic;

/// Datagrams of a flow that are alike in all but their payload, among those that came together.
struct Group {
    flow: Rc<Flow>,
    destination: OrigDst,
    alike: Received,
}

impl Flows {
    /// Sends clients' datagrams to where they wanted them, in their flows or new ones, with the DF
    /// bit or without. Those of a flow that are alike go together, and before later ones that are not.
    pub(super) fn forward_all<'a>(
        self: &Rc<Self>,
        datagrams: impl Iterator<Item = (Received, &'a [u8])>,
        dont_fragment: bool,
    ) {
        // Where few have come, as of request and response, nothing is allocated.
        let mut groups = SmallVec::<[Group; 4]>::new();
        let mut members = SmallVec::<[_; 8]>::new();
        for (datagram, payload) in datagrams {
            let last =
                groups.last().filter(|last| last.alike == datagram && self.belongs(&last.flow, payload));
            let group = if last.is_some() {
                groups.len() - 1
            } else {
                let Some((flow, destination)) = self.flow_of(&datagram, payload, dont_fragment) else {
                    continue;
                };
                let latest = groups.get(flow.group.get());
                if !latest.is_some_and(|group| Rc::ptr_eq(&group.flow, &flow) && group.alike == datagram) {
                    flow.group.set(groups.len());
                    groups.push(Group { flow: Rc::clone(&flow), destination, alike: datagram });
                }
                flow.group.get()
            };
            members.push((group, payload));
        }
        members.sort_by_key(|(group, _)| *group);
        let mut payloads = SmallVec::<[_; 8]>::new();
        for (group, members) in groups.iter().zip(members.chunk_by(|one, next| one.0 == next.0)) {
            payloads.clear();
            payloads.extend(members.iter().map(|(_, payload)| *payload));
            self.send(&group.flow, group.destination, &group.alike, &payloads, dont_fragment);
        }
    }

    /// The flow that a client's datagram is to be sent by, and to where; `None`: it is not, or waits.
    fn flow_of(
        self: &Rc<Self>,
        datagram: &Received,
        payload: &[u8],
        dont_fragment: bool,
    ) -> Option<(Rc<Flow>, OrigDst)> {
        let Some(destination) = datagram.destination else {
            self.worker.stats().udp_no_destination.inc();
            return None;
        };
        let key = (ClientAddr::from(datagram.sender), destination);
        let route = self.route(key);
        if self.wants_name(key, route.way, payload) {
            self.ask(key, datagram, payload, dont_fragment);
            return None;
        }
        let flow = self.flow_by((route, None), key, datagram, payload, dont_fragment)?;
        Some((flow, destination))
    }

    /// Whether a datagram that is like the one before goes by the same flow: it may open one with a
    /// name of its own.
    fn belongs(&self, flow: &Flow, payload: &[u8]) -> bool {
        let by_name = matches!(flow.lane, Lane::Upstream(number)
            if self.worker.shared.routes.ask_by_name(Way::Proxy(number)));
        !(by_name && quic::may_open(payload))
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
        let key = (client, destination);
        if let Some(flow) = self.flow_by((route, name), key, datagram, payload, dont_fragment) {
            self.send(&flow, destination, datagram, &[payload], dont_fragment);
        }
    }

    /// The flow by which a datagram goes; `None`: it is not sent, or only once a server carries it.
    fn flow_by(
        self: &Rc<Self>,
        (route, name): (Route, Option<&str>),
        (client, destination): (ClientAddr, OrigDst),
        datagram: &Received,
        payload: &[u8],
        dont_fragment: bool,
    ) -> Option<Rc<Flow>> {
        let lane = match route.way {
            Way::Proxy(number) if self.worker.shared.routes.ask_by_name(route.way) => {
                let named = Lane::Named(number, destination);
                let by_name = name.is_some() || self.has((client, named));
                if by_name { named } else { Lane::Upstream(number) }
            }
            Way::Proxy(number) => Lane::Upstream(number),
            Way::Divert(_) => Lane::Diverted(destination),
            Way::Reject => {
                self.refuse(client, destination, payload);
                return None;
            }
            Way::Drop | Way::Ask => return None,
        };
        let known = self.table.borrow_mut().get(&(client, lane)).map(Rc::clone);
        known.or_else(|| {
            self.begin((client, lane), destination, (route, name), datagram, payload, dont_fragment)
        })
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
