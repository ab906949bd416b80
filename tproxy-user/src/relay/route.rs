//! The way that a flow takes, as the kernel has decided: the flow table tells. Where the kernel
//! asks for a name, it is decided here.

use std::net::IpAddr;
use std::path::Path;

use aya::maps::MapError;
use tproxy_common::abi::{Addr, Decision, Family, Flow, FlowKey, Origin, UDP, Verdict, mapped};
use tproxy_common::policy::Known;

use crate::addr::{ClientAddr, OrigDst};
use crate::config::rule::Diversion;
use crate::datapath::flows::FlowTable;
use crate::policy::facts::Packet;
use crate::policy::targets::Target;
use crate::relay::sniff::dns;
use crate::rulebook::Rulebook;
use crate::stats::WorkerStats;

/// What becomes of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// To its destination, by the upstream with this number.
    Proxy(u16),
    /// To a target instead.
    Divert(Diversion),
    /// Nowhere, and its client is told.
    Reject,
    /// Nowhere.
    Drop,
    /// As [`Routes::decide`] says, once it is known what name the flow is for.
    Ask,
}

/// A flow's way, and the rule that says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    /// Where to.
    pub(crate) way: Way,
    /// Number of the rule; `None`: none decided.
    pub(crate) rule: Option<u16>,
}

impl Route {
    /// That of a flow which no rule has decided over: by the default upstream.
    pub(crate) const DEFAULT: Self = Self { way: Way::Proxy(0), rule: None };
}

/// Finds the ways of flows.
#[derive(Debug)]
pub struct Routes {
    table: Option<FlowTable>,
    rules: Rulebook,
}

impl Routes {
    /// By the flow table of the run with this pin directory.
    ///
    /// # Errors
    ///
    /// Where it cannot be opened.
    pub fn new(pin: &Path, rules: Rulebook) -> Result<Self, MapError> {
        Ok(Self { table: Some(FlowTable::open(pin)?), rules })
    }

    /// All go by the default upstream: rules of others steer.
    #[must_use]
    pub fn by_default(rules: Rulebook) -> Self {
        Self { table: None, rules }
    }

    /// What this number means for flows that go to their destinations.
    pub(crate) fn upstream(&self, number: u16) -> Target {
        match self.rules.targets.get(number) {
            None | Some(Target::Address(_)) => Target::Direct,
            Some(upstream) => upstream,
        }
    }

    /// Whether a flow may have another way than to its destination by the default upstream.
    pub(crate) fn bind(&self) -> bool {
        self.rules.targets.bind()
    }

    /// Whether a server by this way may want to know the name of a destination.
    pub(crate) fn ask_by_name(&self, way: Way) -> bool {
        self.rules.targets.ask_by_name()
            && matches!(way, Way::Proxy(number) if self.upstream(number).asks_by_name())
    }

    /// The way of a flow. One that the table has lost in a flood has none where rules bind: it
    /// may be one that does not go to its destination.
    pub(crate) fn of(
        &self,
        protocol: u8,
        client: ClientAddr,
        destination: OrigDst,
        stats: &WorkerStats,
    ) -> Route {
        let Some(table) = self.table.as_ref().filter(|_| self.rules.targets.are_asked_for()) else {
            return Route::DEFAULT;
        };
        let key = key(protocol, client, destination);
        let Some(flow) = table.get(&key) else { return self.lost(stats) };
        // A datagram is one of many, a connection that is accepted is new.
        let decided = if protocol == UDP { table.decided(&key, &flow) } else { None };
        let decision =
            decided.unwrap_or_else(|| Decision::of_flow(flow.verdict, flow.fallback, flow.rule, flow.target));
        self.route(decision)
    }

    fn lost(&self, stats: &WorkerStats) -> Route {
        if !self.bind() {
            return Route::DEFAULT;
        }
        stats.flows_lost.inc();
        Route { way: Way::Reject, rule: None }
    }

    /// Decides over a flow by the name that it is for; `None`: none is to be seen. Those who
    /// look at the flow table are told.
    pub(crate) fn decide(
        &self,
        protocol: u8,
        client: ClientAddr,
        destination: OrigDst,
        name: Option<&str>,
        stats: &WorkerStats,
    ) -> Route {
        let Some(table) = &self.table else { return Route::DEFAULT };
        let key = key(protocol, client, destination);
        let Some(flow) = table.get(&key) else { return self.lost(stats) };
        let rules = self.rules.named();
        let named = name
            .zip(rules)
            .and_then(|(name, rules)| rules.decide(name, facts(&key, &flow, client.ip()), flow.rule));
        let decision = named.unwrap_or_else(|| Decision::of(flow.fallback, flow.rule, flow.target));
        if let Err(error) = table.decide(&key, &flow, decision) {
            tracing::debug!("{client} to {destination}: cannot note what was decided: {error}");
        }
        self.route(decision)
    }

    /// Learns what addresses are called, from what a DNS server says to a client that has asked it:
    /// not from whoever finds the proxy's port. Whether it has learned something.
    pub(crate) fn learn(&self, client: ClientAddr, server: OrigDst, datagram: &[u8]) -> bool {
        let Some(table) = self.table.as_ref().filter(|_| self.rules.named().is_some()) else { return false };
        let Some(answer) = dns::answer(datagram) else { return false };
        let asked = table.get(&key(UDP, client, server)).is_some();
        if asked {
            self.rules.learn(&answer.name, &answer.addresses);
        }
        asked
    }

    fn route(&self, decision: Decision) -> Route {
        let way = match Verdict::from_raw(decision.raw_verdict()) {
            Some(Verdict::Divert) => match self.rules.targets.get(decision.target()) {
                Some(Target::Address(address)) => Way::Divert(address),
                Some(Target::Direct | Target::Proxy(_) | Target::Group(_)) | None => Way::Reject,
            },
            Some(Verdict::Reject) => Way::Reject,
            Some(Verdict::Drop) => Way::Drop,
            Some(Verdict::Ask) => Way::Ask,
            Some(Verdict::Proxy) => Way::Proxy(decision.target()),
            Some(Verdict::Pass) | None => Route::DEFAULT.way,
        };
        Route { way, rule: (decision.rule() != 0).then_some(decision.rule()) }
    }
}

/// What is known of a flow here.
fn facts(key: &FlowKey, flow: &Flow, client: IpAddr) -> Packet {
    Packet {
        family: if client.is_ipv4() { Family::V4 } else { Family::V6 },
        source: key.client,
        destination: key.destination,
        ports: Known::Is((key.client_port, key.destination_port)),
        protocol: key.protocol,
        interface: (flow.origin != Origin::Own as u8).then_some(flow.ifindex),
        ..Packet::EMPTY
    }
}

fn key(protocol: u8, client: ClientAddr, destination: OrigDst) -> FlowKey {
    let (client, destination) = (client.get(), destination.get());
    FlowKey::up(protocol, addr(client.ip()), addr(destination.ip()), client.port(), destination.port())
}

fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}
