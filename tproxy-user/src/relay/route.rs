//! The way that a flow takes, as the kernel has decided: the flow table tells.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use aya::maps::MapError;
use tproxy_common::abi::{Addr, Flow, FlowKey, Verdict, mapped};

use crate::addr::{ClientAddr, OrigDst};
use crate::datapath::flows::FlowTable;
use crate::policy::targets::Targets;
use crate::stats::WorkerStats;

/// What becomes of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// To its destination.
    Direct,
    /// To a target instead.
    Divert(SocketAddr),
    /// Nowhere.
    Reject,
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
    /// That of a flow which no rule has decided over.
    pub(crate) const DIRECT: Self = Self { way: Way::Direct, rule: None };
}

/// Finds the ways of flows.
#[derive(Debug)]
pub struct Routes {
    table: Option<FlowTable>,
    targets: Targets,
}

impl Routes {
    /// By the flow table of the run with this pin directory.
    ///
    /// # Errors
    ///
    /// Where it cannot be opened.
    pub fn new(pin: &Path, targets: Targets) -> Result<Self, MapError> {
        Ok(Self { table: Some(FlowTable::open(pin)?), targets })
    }

    /// All go to their destinations: rules of others steer.
    #[must_use]
    pub fn direct() -> Self {
        Self { table: None, targets: Targets::default() }
    }

    /// Whether a flow may have another way than to its destination.
    pub(crate) fn bind(&self) -> bool {
        self.targets.bind()
    }

    /// The way of a flow. One that the table has lost in a flood has none where rules divert
    /// or refuse: it may be one of those.
    pub(crate) fn of(
        &self,
        protocol: u8,
        client: ClientAddr,
        destination: OrigDst,
        stats: &WorkerStats,
    ) -> Route {
        let Some(table) = self.table.as_ref().filter(|_| self.targets.are_asked_for()) else {
            return Route::DIRECT;
        };
        let (client, destination) = (client.get(), destination.get());
        let key = FlowKey::up(
            protocol,
            addr(client.ip()),
            addr(destination.ip()),
            client.port(),
            destination.port(),
        );
        match table.get(&key) {
            Some(flow) => self.route(&flow),
            None if self.bind() => {
                stats.flows_lost.inc();
                Route { way: Way::Reject, rule: None }
            }
            None => Route::DIRECT,
        }
    }

    fn route(&self, flow: &Flow) -> Route {
        let way = match Verdict::from_raw(flow.verdict) {
            Some(Verdict::Divert) => self.targets.get(flow.target).map_or(Way::Reject, Way::Divert),
            Some(Verdict::Reject) => Way::Reject,
            _ => Way::Direct,
        };
        Route { way, rule: (flow.rule != 0).then_some(flow.rule) }
    }
}

fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}
