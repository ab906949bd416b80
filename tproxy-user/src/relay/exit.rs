//! Where a connection leaves: how, for where, and by what socket.

use std::fmt;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::Worker;
use super::route::Way;
use crate::addr::{ClientAddr, OrigDst, UpstreamAddr};
use crate::sockopt::UpstreamSocket;
use crate::upstream::ConnectError;
use crate::upstream::direct::Direct;
use crate::upstream::outbound::Outbound;

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
}

impl Leg {
    /// The one of a flow; `None`: it goes nowhere, which is also where it would come back.
    pub(super) fn of(worker: &Worker, way: Way, client: ClientAddr, destination: OrigDst) -> Option<Self> {
        let shared = &worker.shared;
        match way {
            Way::Proxy(number) => match shared.routes.outbound(number) {
                Some(outbound) => Some(Self { direct: shared.as_proxy, hop: Hop::Through(outbound) }),
                None => Self::straight(worker, client, destination),
            },
            Way::Divert(target) => Self::to(worker, shared.as_proxy, client, target.into()),
            Way::Reject | Way::Drop | Way::Ask => None,
        }
    }

    /// Straight to its destination.
    pub(super) fn straight(worker: &Worker, client: ClientAddr, destination: OrigDst) -> Option<Self> {
        Self::to(worker, worker.shared.direct, client, destination.into())
    }

    fn to(worker: &Worker, direct: Direct, client: ClientAddr, to: UpstreamAddr) -> Option<Self> {
        if worker.shared.own.takes(to) {
            worker.stats().loops_prevented.inc();
            tracing::debug!("{client} asked for the proxy's own listener {to}: refused");
            return None;
        }
        Some(Self { direct, hop: Hop::Straight(to) })
    }
}

/// A connection that is about to be made.
#[derive(Debug)]
pub(super) struct Exit {
    leg: Leg,
    /// `None`: there is none yet, as where it is not known where the server is.
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
    pub(super) fn later(leg: Leg) -> Self {
        Self { leg, socket: None }
    }

    /// Takes a descriptor for it.
    pub(super) fn open(worker: &Worker, leg: Leg) -> Self {
        let to = match &leg.hop {
            Hop::Straight(to) => Some(*to),
            Hop::Through(outbound) => outbound.at_hand(),
        };
        let socket = to.map(|to| worker.upstream_socket(&leg.direct, to));
        Self { leg, socket }
    }

    /// Where it goes next.
    pub(super) fn hop(&self) -> &Hop {
        &self.leg.hop
    }

    /// Connects on behalf of `client`; within the connect time-out.
    pub(super) async fn connect(
        self,
        worker: &Worker,
        (client, destination): (ClientAddr, OrigDst),
    ) -> Result<TcpStream, ConnectError> {
        let Self { leg: Leg { direct, hop }, socket } = self;
        let (socket, stats) = (socket.transpose()?, worker.stats());
        match hop {
            Hop::Straight(to) => {
                let socket = socket.map_or_else(|| direct.socket(to), Ok)?;
                let attempt = direct.connect(socket, client, to, stats);
                tokio::time::timeout(direct.timeout, attempt)
                    .await
                    .unwrap_or_else(|_| Err(Direct::too_slow()))
            }
            Hop::Through(outbound) => {
                let attempt = outbound.connect(&direct, socket, (client, destination), stats);
                match tokio::time::timeout(direct.timeout, attempt).await {
                    Ok(outcome) => outcome,
                    Err(_) => outbound.judge(Err(Outbound::too_slow())),
                }
            }
        }
    }
}
