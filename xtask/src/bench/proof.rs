//! That a candidate does what it is there for: no figure is worth more than this.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use xtask::lab::sockets::{self, Entry, Protocol};
use xtask::lab::{Family, Lab, peer};

use super::generator::PORT;
use super::peers::{Peer, Running};
use super::processes::Processes;

/// How long each step may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends to a server from the client, and looks, while that goes on, whose sockets in the router
/// it went through. To be called before another server has the port.
pub(crate) fn prove(peer: Peer, lab: &Lab, running: &Running, protocol: Protocol) -> Result<()> {
    let seen = match protocol {
        Protocol::Tcp => tcp(lab),
        Protocol::Udp => udp(lab),
    };
    let relayed = match protocol {
        Protocol::Tcp => peer.relays(),
        Protocol::Udp => peer.relays_udp(),
    };
    seen.and_then(|seen| seen.judge(peer, lab, running, protocol, relayed)).map_err(|error| {
        let (name, protocol) = (peer.name(), protocol.name());
        anyhow!("{name} does not do its work for {protocol}: {error:#}\n{}", running.describe())
    })
}

/// An open connection or flow.
struct Seen {
    client: SocketAddr,
    /// Where the server sees it come from.
    source: SocketAddr,
    _open: [Open; 2],
}

#[expect(dead_code, reason = "held open")]
enum Open {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Seen {
    fn judge(
        &self,
        peer: Peer,
        lab: &Lab,
        running: &Running,
        protocol: Protocol,
        relayed: bool,
    ) -> Result<()> {
        let (client, source) = (self.client, self.source);
        let entries = sockets::all(&lab.router, protocol)?;
        if !relayed {
            ensure!(source == client, "the server sees {source} in place of the client, {client}");
            let foreign = entries.iter().find(|entry| entry.peer == client);
            ensure!(foreign.is_none(), "the router has a socket of the client's: {foreign:?}");
            return expect_passed(running);
        }
        ensure!(
            (source.ip() == client.ip()) == peer.keeps_source(),
            "the server sees {source}, the client is {client}"
        );
        let own = Processes::of(&running.all())?.sockets();
        let has_sent = |entry: &&Entry| {
            entry.local.port() == source.port()
                && (entry.local.ip() == source.ip() || entry.local.ip().is_unspecified())
                && own.contains(&entry.inode)
        };
        ensure!(
            entries.iter().any(|entry| has_sent(&entry)),
            "none of its processes has the socket {source} that the server sees, among {entries:?}"
        );
        if protocol == Protocol::Tcp {
            accepted(lab, &running.front(), client)?;
        }
        Ok(())
    }
}

/// That a program in the router has accepted a client's connection.
pub(crate) fn accepted(lab: &Lab, groups: &[u32], client: SocketAddr) -> Result<()> {
    let own = Processes::of(groups)?.sockets();
    let entries = sockets::all(&lab.router, Protocol::Tcp)?;
    ensure!(
        entries.iter().any(|entry| entry.peer == client && own.contains(&entry.inode)),
        "none of its processes has the connection of {client}, among {entries:?}"
    );
    Ok(())
}

/// That a tproxy that passes all has seen it, and let it pass.
fn expect_passed(running: &Running) -> Result<()> {
    let Some(proxy) = running.proxy() else {
        return Ok(());
    };
    let passed = proxy.counter("pass_protocol")? + proxy.counter("pass_policy")?;
    ensure!(passed > 0, "its programs have not seen the packets");
    Ok(())
}

fn server() -> SocketAddr {
    SocketAddr::new(Family::V4.anywhere(1), PORT)
}

fn tcp(lab: &Lab) -> Result<Seen> {
    let listener = lab.server.try_enter(|| TcpListener::bind(server()))?;
    listener.set_nonblocking(true)?;
    let mut client = lab.client.try_enter(|| TcpStream::connect_timeout(&server(), PATIENCE))?;
    // Some connect to the server with the client's first bytes only.
    client.write_all(b"?")?;
    let (mut accepted, source) = wait("no connection reached the server", || listener.accept())?;
    accepted.set_nonblocking(false)?;
    for stream in [&client, &accepted] {
        stream.set_read_timeout(Some(PATIENCE))?;
    }
    let mut byte = [0];
    accepted.read_exact(&mut byte).context("nothing reached the server")?;
    accepted.write_all(b"!")?;
    client.read_exact(&mut byte).context("no answer reached the client")?;
    let address = client.local_addr()?;
    Ok(Seen { client: address, source, _open: [Open::Tcp(client), Open::Tcp(accepted)] })
}

fn udp(lab: &Lab) -> Result<Seen> {
    let socket = lab.server.try_enter(|| UdpSocket::bind(server()))?;
    let client = lab.client.try_enter(|| {
        let client = UdpSocket::bind(SocketAddr::new(Family::V4.client(), 0))?;
        client.connect(server())?;
        Ok(client)
    })?;
    for socket in [&socket, &client] {
        socket.set_read_timeout(Some(PATIENCE))?;
    }
    client.send(b"?")?;
    let mut byte = [0];
    let (_, source) = peer::receive(&socket, &mut byte).context("no datagram reached the server")?;
    socket.send_to(b"!", source)?;
    peer::receive(&client, &mut byte).context("no answer reached the client")?;
    let address = client.local_addr()?;
    Ok(Seen { client: address, source, _open: [Open::Udp(client), Open::Udp(socket)] })
}

fn wait<T>(what: &str, mut attempt: impl FnMut() -> io::Result<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("{what} within {PATIENCE:?}"),
            result => return result.with_context(|| what.to_owned()),
        }
    }
}
