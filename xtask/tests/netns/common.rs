//! What the scenarios share.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use xtask::lab::kernel::{Lacking, Version};
use xtask::lab::pace::patience;
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::proxy::{self, Launch};
use xtask::lab::{Family, Lab, Proxy};

/// A scenario; the lab is its own.
pub(crate) type Scenario = fn(&Lab, Family) -> Result<()>;

/// A list of scenarios by name.
pub(crate) type Scenarios = &'static [(&'static str, Scenario)];

/// The reason why a scenario cannot run here.
#[derive(Debug)]
pub(crate) struct Skip(pub(crate) String);

/// The version that brought tcx.
pub(crate) const TCX: Version = Version(6, 6);

/// Skips a scenario on a kernel before `since`, which brought `what`. On a
/// later kernel nothing is skipped, so that there the lack shows as a failure.
pub(crate) fn needs_linux(since: Version, what: &str) -> Result<()> {
    if Version::running()? < since {
        bail!(Skip(Lacking { since, what: what.to_owned() }.to_string()));
    }
    Ok(())
}

impl fmt::Display for Skip {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// The proxy of a scenario; none where plain forwarding is examined.
#[derive(Debug)]
pub(crate) struct Running(Option<Proxy>);

/// Starts a proxy with these flags.
pub(crate) fn start(lab: &Lab, flags: &str) -> Result<Running> {
    if proxy::is_direct() {
        return Ok(Running(None));
    }
    Launch::new(lab, flags).start().map(|proxy| Running(Some(proxy)))
}

/// Starts a proxy without which the scenario has no meaning.
pub(crate) fn start_proxy(lab: &Lab, flags: &str) -> Result<Proxy> {
    needs_proxy()?;
    Launch::new(lab, flags).start()
}

/// Skips a scenario that has no meaning for plain forwarding.
pub(crate) fn needs_proxy() -> Result<()> {
    if proxy::is_direct() {
        bail!(Skip("needs a proxy, and none is started".into()));
    }
    Ok(())
}

impl Running {
    /// Makes sure that connections went through the proxy, and not past it.
    pub(crate) fn expect_tcp(&self, connections: u64) -> Result<()> {
        self.expect("steered_tcp_new", connections)
    }

    /// Makes sure that datagrams went through the proxy, and not past it.
    pub(crate) fn expect_udp(&self, datagrams: u64) -> Result<()> {
        self.expect("steered_udp", datagrams)
    }

    pub(crate) fn expect(&self, counter: &str, least: u64) -> Result<()> {
        let Some(proxy) = &self.0 else { return Ok(()) };
        let count = proxy.counter(counter)?;
        ensure!(
            count >= least,
            "the traffic went past the proxy: {counter} is {count}, expected at least {least}"
        );
        Ok(())
    }

    /// Ends the proxy, where there is one.
    pub(crate) fn terminate(self) -> Result<()> {
        match self.0 {
            Some(proxy) => proxy.terminate(Duration::from_secs(15)).map(drop),
            None => Ok(()),
        }
    }

    /// The proxy, where there is one.
    pub(crate) fn proxy(&self) -> Option<&Proxy> {
        self.0.as_ref()
    }
}

/// An address and port of the lab.
pub(crate) fn at(address: std::net::IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

/// The port that [`expect_service`] uses, TCP and UDP.
pub(crate) const SERVICE_PORT: u16 = 7777;

/// Servers for [`expect_service`], on the server.
pub(crate) fn service(lab: &Lab, family: Family) -> Result<(TcpServer, UdpServer)> {
    Ok((
        TcpServer::echo(&lab.server, at(family.unspecified(), SERVICE_PORT))?,
        UdpServer::echo(&lab.server, at(family.anywhere(7), SERVICE_PORT))?,
    ))
}

/// Makes sure that the client reaches [`service`]: TCP and UDP, a little and a lot.
pub(crate) fn expect_service(lab: &Lab, family: Family) -> Result<()> {
    expect_tcp_service(lab, family)?;
    expect_udp_service(lab, family)
}

pub(crate) fn expect_tcp_service(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(7), SERVICE_PORT);
    let mut stream = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
    let (echo, _) = peer::ask(&mut stream, "is anybody there?")?;
    ensure!(echo == "is anybody there?", "the server's echo over TCP was {echo:?}");
    Ok(())
}

pub(crate) fn expect_udp_service(lab: &Lab, family: Family) -> Result<()> {
    expect_udp_service_within(lab, family, patience(peer::PATIENCE))
}

pub(crate) fn expect_udp_service_within(lab: &Lab, family: Family, wait: Duration) -> Result<()> {
    let to = at(family.anywhere(7), SERVICE_PORT);
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    socket.set_read_timeout(Some(wait))?;
    for length in [10, 1200] {
        let datagram = peer::pattern(length);
        let (echo, from) = peer::exchange(&socket, to, &datagram)?;
        ensure!(echo == datagram, "the echo of {length} bytes over UDP differs: {} bytes", echo.len());
        ensure!(from == to, "the reply came from {from}, expected {to}");
    }
    Ok(())
}
