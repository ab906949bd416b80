//! Flows whose name is asked for: their datagrams wait until it is known.

use std::rc::Rc;

use tokio::task::spawn_local;
use tproxy_common::abi::UDP;

use super::Flows;
use crate::addr::{ClientAddr, OrigDst};
use crate::relay::receive::Received;
use crate::relay::route::{Route, Way};
use crate::relay::waiting::{self, Told, Waiting};

impl Flows {
    /// Finds the name of a flow, from this datagram or with those that follow, which wait.
    pub(super) fn ask(
        self: &Rc<Self>,
        key: (ClientAddr, OrigDst),
        datagram: &Received,
        payload: &[u8],
        dont_fragment: bool,
    ) {
        match self.waiting.add(key, datagram, payload, dont_fragment) {
            Told::Name(name, before) => {
                let route = self.decide(key, name.as_deref(), &before);
                self.forward_by((route, name.as_deref()), key, datagram, payload, dont_fragment);
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
        let mut route = self.route(key);
        if route.way == Way::Ask {
            route = self.worker.shared.routes.decide(UDP, client, destination, name, stats);
        }
        tracing::debug!("{client} to {destination}: for {name:?}, so {:?}", route.way);
        for one in waiting {
            self.forward_by((route, name), key, &one.datagram, &one.payload, one.dont_fragment);
        }
        route
    }
}
