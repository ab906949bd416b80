//! Where a connection leaves: how, for where, and by what socket.

use std::fmt;
use std::sync::Arc;

use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, timeout_at};

use super::Worker;
use super::route::Way;
use crate::addr::{ClientAddr, OrigDst, UpstreamAddr};
use crate::config::rule::Diversion;
use crate::config::upstream::SendProxy;
use crate::policy::targets::Target;
use crate::sockopt::{SocketError, UpstreamSocket};
use crate::upstream::announce;
use crate::upstream::destination::Destination;
use crate::upstream::direct::Direct;
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
    legs: Legs,
    /// For the first; `None`: there is none yet, as where it is not known where the server is.
    socket: Option<Result<UpstreamSocket, ConnectError>>,
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
        Self { legs, socket: None }
    }

    /// Takes a descriptor for it.
    pub(super) fn open(worker: &Worker, legs: Legs) -> Self {
        let to = match &legs.first.hop {
            Hop::Straight(to) => Some(*to),
            Hop::Through(outbound) => outbound.first_hop(),
        };
        let socket = to.map(|to| worker.upstream_socket(&legs.first.direct, to));
        Self { legs, socket }
    }

    /// Whether it is worth a look what name the destination has: a server wants to know.
    pub(super) fn asks_by_name(&self) -> bool {
        let wants = |leg: &Leg| matches!(&leg.hop, Hop::Through(outbound) if outbound.proxy().names);
        wants(&self.legs.first) || self.legs.others.iter().any(wants)
    }

    /// Connects on behalf of `client`, to the destination of this name where it has one; within the connect time-out, of which each way that is left
    /// has its part. Tells by which way.
    pub(super) async fn connect(
        self,
        worker: &Worker,
        ends: (ClientAddr, OrigDst),
        name: Option<&str>,
    ) -> Result<(Wire, Hop), ConnectError> {
        let Self { legs, mut socket } = self;
        let mut now = Instant::now();
        let end = now + worker.shared.timeouts.connect;
        let mut left = u32::try_from(legs.others.len()).unwrap_or(u32::MAX).saturating_add(1);
        let mut legs = legs.into_iter();
        loop {
            let Some(leg) = legs.next() else { return Err(Direct::too_slow()) };
            let until = now + end.saturating_duration_since(now) / left;
            left -= 1;
            match leg.connect(worker, socket.take(), (ends, name), until).await {
                Ok(wire) => return Ok((wire, leg.hop)),
                Err(error) if error.reason == Reason::Proxy && left > 0 => {
                    worker.stats().connect_failed_over.inc();
                    tracing::debug!("{} to {} by {}: {error}; trying another", ends.0, ends.1, leg.hop);
                    now = Instant::now();
                }
                Err(error) => {
                    tracing::debug!("{} to {} by {}: {error}", ends.0, ends.1, leg.hop);
                    return Err(error);
                }
            }
        }
    }
}

impl Leg {
    async fn connect(
        &self,
        worker: &Worker,
        socket: Option<Result<UpstreamSocket, ConnectError>>,
        ((client, destination), name): ((ClientAddr, OrigDst), Option<&str>),
        until: Instant,
    ) -> Result<Wire, ConnectError> {
        let (socket, stats) = (socket.transpose()?, worker.stats());
        match &self.hop {
            Hop::Straight(to) => {
                let socket = socket.map_or_else(|| self.direct.socket(*to), Ok)?;
                let attempt = async {
                    let mut stream = self.direct.connect(socket, client, *to, stats).await?;
                    let header = announce::of_stream(self.send_proxy, client, destination);
                    if !header.is_empty() {
                        let sent = stream.write_all(&header).await;
                        sent.map_err(|source| SocketError { call: "write", source })?;
                    }
                    Ok(Wire::Plain(stream))
                };
                timeout_at(until, attempt).await.unwrap_or_else(|_| Err(Direct::too_slow()))
            }
            Hop::Through(outbound) => {
                let name = name.filter(|_| outbound.proxy().names);
                let to = Destination::of(destination.get(), name);
                let errand = Errand { direct: &self.direct, client, stats };
                // In a box: it is large, and most connections do without.
                let attempt = Box::pin(outbound.connect(errand, socket, to));
                match timeout_at(until, attempt).await {
                    Ok(outcome) => outcome,
                    Err(_) => outbound.judge(Err(Outbound::too_slow())),
                }
            }
        }
    }
}
