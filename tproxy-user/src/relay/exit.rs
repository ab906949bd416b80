//! Where a connection leaves: how, for where, and by what socket.

use std::fmt;
use std::sync::Arc;
use std::vec;

use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, timeout_at};

use super::Worker;
use super::record::Record;
use super::route::Way;
use crate::addr::{ClientAddr, OrigDst, UpstreamAddr};
use crate::config::rule::Diversion;
use crate::config::upstream::SendProxy;
use crate::policy::targets::Target;
use crate::sockopt::{SocketError, UpstreamSocket};
use crate::upstream::announce;
use crate::upstream::destination::Destination;
use crate::upstream::direct::{Connecting, Direct};
use crate::upstream::outbound::{Errand, Outbound};
use crate::upstream::{ConnectError, Reason};
use crate::wire::Wire;

/// The next hop of a flow.
#[derive(Clone, Debug)]
pub(super) enum Hop {
    /// Its destination, or the target that it is diverted to.
    Straight(UpstreamAddr),
    /// A proxy server, which is asked for the destination.
    Through(Arc<Outbound>),
}

/// How a flow leaves.
#[derive(Clone, Debug)]
pub(super) struct Leg {
    pub(super) direct: Direct,
    pub(super) hop: Hop,
    /// What is said there of the client first.
    pub(super) send_proxy: SendProxy,
}

/// How a flow leaves: the first of these that does its part.
#[derive(Clone, Debug)]
pub(super) struct Legs {
    first: Leg,
    others: Vec<Leg>,
}

impl Leg {
    /// Straight to its destination; `None`: that is where it would come back.
    pub(super) fn straight(worker: &Worker, client: ClientAddr, destination: OrigDst) -> Option<Self> {
        Self::to(worker, worker.shared.direct, client, destination.into(), worker.shared.send_proxy)
    }

    fn to(
        worker: &Worker,
        direct: Direct,
        client: ClientAddr,
        to: UpstreamAddr,
        send_proxy: SendProxy,
    ) -> Option<Self> {
        if refuses_own(worker, client, to) {
            return None;
        }
        Some(Self { direct, hop: Hop::Straight(to), send_proxy })
    }

    fn through(worker: &Worker, outbound: Arc<Outbound>) -> Self {
        Self { direct: worker.shared.as_proxy, hop: Hop::Through(outbound), send_proxy: SendProxy::Off }
    }
}

/// Whether it is for a listener of the proxy's own, which would come back.
fn refuses_own(worker: &Worker, client: ClientAddr, to: UpstreamAddr) -> bool {
    let own = worker.shared.own.takes(to);
    if own {
        worker.stats().loops_prevented.inc();
        tracing::debug!("{client} asked for the proxy's own listener {to}: refused");
    }
    own
}

impl Legs {
    /// Those of a flow; `None`: it goes nowhere, which is also where it would come back.
    pub(super) fn of(worker: &Worker, way: Way, client: ClientAddr, destination: OrigDst) -> Option<Self> {
        let shared = &worker.shared;
        let only = match way {
            // A server that is asked for it may be on this host.
            Way::Proxy(_) if refuses_own(worker, client, destination.into()) => None,
            Way::Proxy(number) => match shared.routes.upstream(number) {
                Target::Proxy(outbound) => Some(Leg::through(worker, outbound)),
                Target::Group(pool) => {
                    let mut legs = pool.order(client.ip()).into_iter().filter_map(|member| match member {
                        Some(outbound) => Some(Leg::through(worker, outbound)),
                        None => Leg::straight(worker, client, destination),
                    });
                    return Some(Self { first: legs.next()?, others: legs.collect() });
                }
                Target::Direct | Target::Address(_) => Leg::straight(worker, client, destination),
            },
            Way::Divert(Diversion { target, send_proxy }) => {
                let send_proxy = send_proxy.unwrap_or(shared.send_proxy);
                Leg::to(worker, shared.as_proxy, client, target.into(), send_proxy)
            }
            Way::Reject | Way::Drop | Way::Ask => None,
        };
        only.map(|first| Self { first, others: Vec::new() })
    }
}

impl IntoIterator for Legs {
    type Item = Leg;
    type IntoIter = std::iter::Chain<std::iter::Once<Leg>, std::vec::IntoIter<Leg>>;

    /// In the order in which they are tried.
    fn into_iter(self) -> Self::IntoIter {
        std::iter::once(self.first).chain(self.others)
    }
}

/// A connection that is about to be made.
#[derive(Debug)]
pub(super) struct Exit {
    leg: Leg,
    /// What is tried after it.
    others: vec::IntoIter<Leg>,
    /// By `leg`; `None`: nothing is done yet, as where it is not known where the server is.
    begun: Option<Result<Begun, ConnectError>>,
}

/// What is done before anything is waited for.
#[derive(Debug)]
enum Begun {
    Straight(Connecting),
    /// There is a descriptor for a connection to the server.
    Through(UpstreamSocket),
}

impl fmt::Display for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Straight(to) => to.fmt(f),
            Self::Through(outbound) => f.write_str(&outbound.proxy().name),
        }
    }
}

impl Exit {
    /// Takes a descriptor for it only when it is made.
    pub(super) fn later(legs: Legs) -> Self {
        Self { leg: legs.first, others: legs.others.into_iter(), begun: None }
    }

    /// Takes a descriptor for it and begins to connect, where it is known where to.
    pub(super) fn begin(worker: &Worker, client: ClientAddr, legs: Legs) -> Self {
        let mut exit = Self::later(legs);
        let Leg { direct, hop, .. } = &exit.leg;
        exit.begun =
            match hop {
                Hop::Straight(to) => Some(worker.upstream_socket(direct, *to).and_then(|socket| {
                    direct.connect(socket, client, *to, worker.stats()).map(Begun::Straight)
                })),
                Hop::Through(outbound) => {
                    outbound.first_hop().map(|to| worker.upstream_socket(direct, to).map(Begun::Through))
                }
            };
        exit
    }

    /// Whether it is worth a look what name the destination has: a server that is asked before
    /// anything is tried straight, after which there is no other, wants to know.
    pub(super) fn asks_by_name(&self) -> bool {
        let through = |leg: &Leg| match &leg.hop {
            Hop::Straight(_) => None,
            Hop::Through(outbound) => Some(outbound.proxy().names),
        };
        let legs = std::iter::once(&self.leg).chain(self.others.as_slice());
        legs.map_while(through).any(|names| names)
    }

    /// Connects on behalf of the client of `record`, to its destination, of this name where it has
    /// one; within the connect time-out, of which each way that is left has its part. Tells by which way.
    ///
    /// Once: a way that has failed is not tried again.
    pub(super) async fn connect(
        &mut self,
        record: &Record,
        name: Option<&str>,
    ) -> Result<(Wire, Hop), ConnectError> {
        let worker = record.worker();
        let mut now = Instant::now();
        let end = now + worker.shared.timeouts.connect;
        loop {
            let left = u32::try_from(self.others.len()).unwrap_or(u32::MAX).saturating_add(1);
            let until = now + end.saturating_duration_since(now) / left;
            let attempt = self.leg.connect(record, &mut self.begun, name);
            let error = match timeout_at(until, attempt).await.unwrap_or_else(|_| self.leg.too_slow()) {
                Ok(wire) => return Ok((wire, self.leg.hop.clone())),
                Err(error) => error,
            };
            let other = (error.reason == Reason::Proxy).then(|| self.others.next()).flatten();
            let (client, destination, hop) = (record.client, record.destination, &self.leg.hop);
            let Some(other) = other else {
                tracing::debug!("{client} to {destination} by {hop}: {error}");
                return Err(error);
            };
            worker.stats().connect_failed_over.inc();
            tracing::debug!("{client} to {destination} by {hop}: {error}; trying another");
            self.leg = other;
            now = Instant::now();
        }
    }
}

impl Leg {
    async fn connect(
        &self,
        record: &Record,
        begun: &mut Option<Result<Begun, ConnectError>>,
        name: Option<&str>,
    ) -> Result<Wire, ConnectError> {
        match &self.hop {
            Hop::Straight(to) => {
                let connecting = if let Some(Begun::Straight(connecting)) = begun.take().transpose()? {
                    connecting
                } else {
                    let stats = record.worker().stats();
                    self.direct.connect(self.direct.socket(*to)?, record.client, *to, stats)?
                };
                let mut stream = connecting.made().await?;
                let header = announce::of_stream(self.send_proxy, record.client, record.destination);
                if !header.is_empty() {
                    let sent = stream.write_all(&header).await;
                    sent.map_err(|source| SocketError { call: "write", source })?;
                }
                Ok(Wire::Plain(stream))
            }
            Hop::Through(outbound) => {
                let socket = match begun.take().transpose()? {
                    Some(Begun::Through(socket)) => Some(socket),
                    _ => None,
                };
                let name = name.filter(|_| outbound.proxy().names);
                let to = Destination::of(record.destination.get(), name);
                let errand =
                    Errand { direct: &self.direct, client: record.client, stats: record.worker().stats() };
                // In a box: it is large, and most connections do without.
                Box::pin(outbound.connect(errand, socket, to)).await
            }
        }
    }

    /// What it is when it has not answered in time.
    fn too_slow<T>(&self) -> Result<T, ConnectError> {
        match &self.hop {
            Hop::Straight(_) => Err(Direct::too_slow()),
            Hop::Through(outbound) => outbound.judge(Err(Outbound::too_slow())),
        }
    }
}
