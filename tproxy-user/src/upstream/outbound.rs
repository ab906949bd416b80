//! A proxy server that is in use: where it is, and whether it does its part.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::destination::Destination;
use super::direct::Direct;
use super::health::{Change, Health};
use super::socks5::Command;
use super::{Cause, ConnectError, Reason, tunnel};
use crate::addr::{ClientAddr, UpstreamAddr};
use crate::config::upstream::{Check, CheckBy, Host, Proxy};
use crate::limits::Alarm;
use crate::sockopt::UpstreamSocket;
use crate::stats::WorkerStats;
use crate::wire::{Wire, tls};

/// How long the addresses of a name are used before it is looked up again.
const FRESH: Duration = Duration::from_secs(30);

/// How long they are used although none of them works.
const AGAIN: Duration = Duration::from_secs(1);

/// How long a server that does not carry datagrams is not asked again.
const NO_UDP: Duration = Duration::from_mins(1);

/// Whom a check is on behalf of: the proxy itself, whose source no mode keeps.
const NOBODY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// The most addresses of a name that are used.
const MOST: usize = 8;

/// For whom a server is asked, and by what sockets.
#[derive(Clone, Copy, Debug)]
pub struct Errand<'a> {
    /// How connections to servers are made.
    pub direct: &'a Direct,
    /// On whose behalf.
    pub client: ClientAddr,
    /// Where it counts.
    pub stats: &'a WorkerStats,
}

/// One for all workers.
#[derive(Debug)]
pub struct Outbound {
    proxy: Arc<Proxy>,
    /// The server through which it is reached.
    via: Option<Arc<Self>>,
    found: Mutex<Found>,
    /// Held by who looks the name up.
    looking: tokio::sync::Mutex<()>,
    health: Health,
    failing: Alarm,
    /// Until when it is not asked to carry datagrams.
    no_udp: Mutex<Option<Instant>>,
    /// Microseconds that the latest connection to it took, plus one; 0: there was none.
    latency: AtomicU64,
}

/// The addresses of the server's name.
#[derive(Debug, Default)]
struct Found {
    addresses: Vec<SocketAddr>,
    since: Option<Instant>,
    /// The one that is used; another after a failure.
    turn: usize,
}

impl Outbound {
    /// Of a server, which is reached through that of `via`. Nothing is asked yet.
    #[must_use]
    pub fn new(proxy: Arc<Proxy>, via: Option<Arc<Self>>) -> Self {
        let (found, looking, health, failing, no_udp, latency) = Default::default();
        Self { proxy, via, found, looking, health, failing, no_udp, latency }
    }

    /// The server, as it is configured.
    #[must_use]
    pub fn proxy(&self) -> &Proxy {
        &self.proxy
    }

    /// Whether it works, as far as is known.
    #[must_use]
    pub fn works(&self) -> bool {
        self.health.is_up()
    }

    /// How long the latest connection to it took to make.
    #[must_use]
    pub fn latency(&self) -> Option<Duration> {
        self.latency.load(Ordering::Relaxed).checked_sub(1).map(Duration::from_micros)
    }

    /// Whether it carries datagrams, as far as is known.
    #[must_use]
    pub fn carries_udp(&self) -> bool {
        let until = *self.no_udp.lock().unwrap_or_else(PoisonError::into_inner);
        self.proxy.may_carry_udp() && until.is_none_or(|until| Instant::now() >= until)
    }

    /// The server through which it is reached.
    #[must_use]
    pub fn via(&self) -> Option<&Arc<Self>> {
        self.via.as_ref()
    }

    /// Where to connect to, if that is known without asking.
    #[must_use]
    pub fn first_hop(&self) -> Option<UpstreamAddr> {
        match &self.via {
            Some(via) => via.first_hop(),
            None => self.at_hand(),
        }
    }

    /// Where it is, if that is known without asking.
    fn at_hand(&self) -> Option<UpstreamAddr> {
        match self.proxy.host {
            Host::Address(ip) => Some(SocketAddr::new(ip, self.proxy.port).into()),
            Host::Name(_) => {
                let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
                let fresh = found.since.is_some_and(|since| since.elapsed() < FRESH);
                fresh.then(|| found.address()).flatten()
            }
        }
    }

    /// Where it is. Its name is looked up where that was long ago; what is known is used
    /// while another does so, and while nobody answers.
    async fn address(&self) -> Result<UpstreamAddr, ConnectError> {
        let name = match &self.proxy.host {
            Host::Address(ip) => return Ok(SocketAddr::new(*ip, self.proxy.port).into()),
            Host::Name(name) => name,
        };
        let known = self.found.lock().unwrap_or_else(PoisonError::into_inner).address();
        let _looking = match (self.looking.try_lock(), known) {
            (Ok(guard), _) => guard,
            (Err(_), Some(address)) => return Ok(address),
            (Err(_), None) => self.looking.lock().await,
        };
        // Another may have looked meanwhile.
        if let Some(address) = self.at_hand() {
            return Ok(address);
        }
        let looked_up = tokio::net::lookup_host((&**name, self.proxy.port)).await;
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        match looked_up {
            Ok(addresses) => found.replace(addresses.take(MOST).collect()),
            Err(error) if found.addresses.is_empty() => return Err(lookup_failed(name, error)),
            Err(error) => {
                found.since = Some(Instant::now());
                tracing::warn!("upstream {}: cannot look up {name} again: {error}", self.proxy.name);
            }
        }
        found.address().ok_or_else(|| lookup_failed(name, io::ErrorKind::NotFound.into()))
    }

    /// Connects to `to` through the server; `socket` is one for where it [is](Self::at_hand).
    ///
    /// # Errors
    /// [`ConnectError`] of the destination or, with [`Reason::Proxy`], of the server; that is logged
    /// once. There is no time-out here.
    pub async fn connect(
        &self,
        errand: Errand<'_>,
        socket: Option<UpstreamSocket>,
        to: Destination<'_>,
    ) -> Result<Wire, ConnectError> {
        let wire = self.reach(errand, socket).await?;
        self.judge(tunnel::connect(&wire, &self.proxy, to).await)?;
        Ok(wire)
    }

    /// Has the server carry datagrams: the connection that they are carried as long as, the
    /// server's address, and where it takes them.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn associate(&self, errand: Errand<'_>) -> Result<(Wire, SocketAddr), ConnectError> {
        let wire = self.reach(errand, None).await?;
        let server = wire.socket().peer_addr().map_err(|source| ConnectError::of_proxy(Cause::Io(source)))?;
        // Some servers mind the family. Which port it will be is not known, nor what NAT makes of it.
        let from = if server.is_ipv6() { ([0; 16], 0).into() } else { ([0; 4], 0).into() };
        let command = Command::UdpAssociate(from);
        let asked = tunnel::socks5(&wire, &self.proxy, command).await;
        if let Err(error) = &asked
            && error.source.is_unsupported()
        {
            *self.no_udp.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + NO_UDP);
        }
        let bound = self.judge(asked)?;
        // Servers that do not know their own address say none, which means this one.
        let relay = match bound {
            Some(relay) if !relay.ip().is_unspecified() => relay,
            bound => SocketAddr::new(server.ip(), bound.map_or(server.port(), |relay| relay.port())),
        };
        Ok((wire, relay))
    }

    /// A connection to the server, at the first of its addresses that has it.
    async fn reach(&self, errand: Errand<'_>, socket: Option<UpstreamSocket>) -> Result<Wire, ConnectError> {
        match self.reach_any(errand, socket).await {
            // It has its part still to do.
            Ok(wire) => Ok(wire),
            Err(error) => self.judge(Err(error)),
        }
    }

    async fn reach_any(
        &self,
        errand: Errand<'_>,
        mut socket: Option<UpstreamSocket>,
    ) -> Result<Wire, ConnectError> {
        let mut tried = 0;
        loop {
            tried += 1;
            match self.reach_one(errand, socket.take()).await {
                Ok(wire) => return Ok(wire),
                Err(error) if error.reason == Reason::Exhausted => return Err(error),
                Err(error) => {
                    let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.turn += 1;
                    if tried >= found.addresses.len() {
                        found.expire();
                        return Err(ConnectError::of_proxy(error.source));
                    }
                }
            }
        }
    }

    async fn reach_one(
        &self,
        errand: Errand<'_>,
        socket: Option<UpstreamSocket>,
    ) -> Result<Wire, ConnectError> {
        let begun = Instant::now();
        let wire = match &self.via {
            None => Wire::Plain(self.reach_straight(errand, socket).await?),
            Some(via) => {
                let to = match &self.proxy.host {
                    Host::Address(ip) => Destination::Address(SocketAddr::new(*ip, self.proxy.port)),
                    Host::Name(name) => Destination::Name(name, self.proxy.port),
                };
                // Boxed: it is this very future, of another server.
                Box::pin(via.connect(errand, socket, to)).await?
            }
        };
        let wire = self.secure(wire).await?;
        let took = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.latency.store(took.saturating_add(1), Ordering::Relaxed);
        Ok(wire)
    }

    /// Has a TLS handshake where the server wants one.
    async fn secure(&self, wire: Wire) -> Result<Wire, ConnectError> {
        let Some(tls) = &self.proxy.tls else { return Ok(wire) };
        // It was made when the configuration was read.
        let client = tls.client().map_err(|why| ConnectError::of_proxy(Cause::Trust(why)))?;
        let session = tls::Session::connect(wire, client, tls.name.clone()).await.map_err(tunnel::broken)?;
        Ok(Wire::Tls(Box::new(session)))
    }

    async fn reach_straight(
        &self,
        errand: Errand<'_>,
        socket: Option<UpstreamSocket>,
    ) -> Result<TcpStream, ConnectError> {
        let (server, socket) = if let (Some(server), Some(socket)) = (self.at_hand(), socket) {
            (server, socket)
        } else {
            let server = self.address().await?;
            (server, errand.direct.socket(server)?)
        };
        errand.direct.connect(socket, errand.client, server, errand.stats)?.made().await
    }

    /// Notes, and says once, that the server does not do its part, or does so again.
    ///
    /// # Errors
    /// That of `outcome`.
    pub fn judge<T>(&self, outcome: Result<T, ConnectError>) -> Result<T, ConnectError> {
        let check = self.proxy.check.as_ref();
        match &outcome {
            Err(error) if error.reason == Reason::Proxy => {
                let change = self.health.flow(false, check);
                let first = self.failing.raise();
                // Of one that is checked it is told when it is given up; of others once in a while.
                if change.is_some() && check.is_some() {
                    tracing::warn!("upstream {} is down: {error}", self.proxy);
                } else if first {
                    tracing::warn!("upstream {}: {error}", self.proxy);
                }
            }
            Err(_) => {}
            Ok(_) => {
                let change = self.health.flow(true, check);
                if (change.is_some() && check.is_some()) || self.failing.clear() {
                    tracing::info!("upstream {}: works again", self.proxy);
                }
            }
        }
        outcome
    }

    /// Looks whether the server works, and notes it.
    pub async fn check(&self, check: &Check, direct: &Direct, stats: &WorkerStats) {
        let errand = Errand { direct, client: NOBODY.into(), stats };
        let attempt = async {
            let wire = self.reach_any(errand, None).await?;
            match check.by {
                CheckBy::Connect => Ok(()),
                CheckBy::Handshake => tunnel::greet(&wire, &self.proxy).await,
                CheckBy::Request(to) => tunnel::connect(&wire, &self.proxy, Destination::Address(to)).await,
            }
        };
        let outcome =
            tokio::time::timeout(check.timeout, attempt).await.unwrap_or_else(|_| Err(Self::too_slow()));
        match (self.health.check(outcome.is_ok(), check), outcome) {
            (Some(Change::Down), Err(error)) => tracing::warn!("upstream {} is down: {error}", self.proxy),
            (Some(Change::Up), _) => tracing::info!("upstream {} is up again", self.proxy),
            (_, Err(error)) => tracing::debug!("upstream {}: a check failed: {error}", self.proxy),
            (_, Ok(())) => {}
        }
    }

    /// The error of a server that did not answer in time.
    #[must_use]
    pub fn too_slow() -> ConnectError {
        ConnectError::of_proxy(Cause::Silent)
    }
}

impl Found {
    fn address(&self) -> Option<UpstreamAddr> {
        let address = self.addresses.get(self.turn.checked_rem(self.addresses.len())?)?;
        Some((*address).into())
    }

    /// None of the addresses works: they may be others by now.
    fn expire(&mut self) {
        self.since = self.since.filter(|since| since.elapsed() < AGAIN);
    }

    fn replace(&mut self, addresses: Vec<SocketAddr>) {
        self.since = Some(Instant::now());
        if self.addresses != addresses {
            self.turn = 0;
            self.addresses = addresses;
        }
    }
}

fn lookup_failed(name: &str, source: io::Error) -> ConnectError {
    ConnectError::of_proxy(Cause::Lookup { name: name.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_failure_another_address_gets_its_turn() {
        let [a, b] = ["192.0.2.1:1", "[2001:db8::1]:1"].map(|text| text.parse::<SocketAddr>().expect("one"));
        let mut found = Found::default();
        assert_eq!(found.address(), None);
        found.replace(vec![a, b]);
        let next = |found: &mut Found| {
            found.turn += 1;
            found.address().map(UpstreamAddr::get)
        };
        assert_eq!(
            [found.address().map(UpstreamAddr::get), next(&mut found), next(&mut found)],
            [Some(a), Some(b), Some(a)]
        );
        next(&mut found);
        found.replace(vec![a, b]);
        assert_eq!(found.address(), Some(b.into()), "the same addresses: the one that works stays");
    }
}
