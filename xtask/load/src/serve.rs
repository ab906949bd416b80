//! `tproxy-load serve`.

mod tcp;
mod udp;

use std::fs::File;
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use nix::sys::epoll::EpollFlags;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use serde::Serialize;
use socket2::{Domain, Socket, Type};

use self::tcp::{Connection, Service};
use crate::poller::Poller;
use crate::{ECHO, SINK, SOURCE, report, sockets};

/// Serves all addresses of a family: TCP 9000 to 9002, UDP 9000 and 9001
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The family
    #[arg(long)]
    family: Family,
    /// Counts connections and datagrams of other senders
    #[arg(long, value_name = "ADDR")]
    expect: Option<IpAddr>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Family {
    V4,
    V6,
}

/// What `read` on stdin is answered by.
#[derive(Default, Serialize)]
struct Counters {
    tcp_connections: u64,
    tcp_received_bytes: u64,
    tcp_sent_bytes: u64,
    udp_echoed: u64,
    udp_received: u64,
    udp_received_bytes: u64,
    /// Connections and datagrams of unexpected senders.
    foreign: u64,
    cpu_seconds: f64,
}

/// What a descriptor is for.
enum Role {
    /// stdin.
    Control(File),
    Listener(TcpListener, Service),
    Connection(Connection),
    Echo(udp::Echo),
    /// [`Server::sink`].
    Sink,
}

struct Server {
    poller: Poller,
    expected: Option<IpAddr>,
    counters: Counters,
    /// By descriptor.
    roles: Vec<Option<Role>>,
    buffers: tcp::Buffers,
    sink: udp::Sink,
    /// Of stdin, the beginning of a line.
    line: Vec<u8>,
}

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16_384;

/// Connections that are accepted before others have their turn.
const ACCEPTED: usize = 64;

/// Runs the server until stdin ends.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut server = Server {
        poller: Poller::new()?,
        expected: args.expect,
        counters: Counters::default(),
        roles: Vec::new(),
        buffers: tcp::Buffers::new(),
        sink: udp::Sink::new(args.family.bind(Type::DGRAM, SINK)?)?,
        line: Vec::new(),
    };
    for (port, service) in [(ECHO, Service::Echo), (SINK, Service::Sink), (SOURCE, Service::Source)] {
        let socket = args.family.bind(Type::STREAM, port)?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        server.add(Role::Listener(socket.into(), service), EpollFlags::EPOLLIN)?;
    }
    let echo = udp::Echo::new(args.family.bind(Type::DGRAM, ECHO)?, args.family == Family::V6)?;
    server.add(Role::Echo(echo), EpollFlags::EPOLLIN)?;
    server.add(Role::Sink, EpollFlags::EPOLLIN)?;
    let stdin = io::stdin().as_fd().try_clone_to_owned().context("stdin")?;
    server
        .add(Role::Control(stdin.into()), EpollFlags::EPOLLIN)
        .context("stdin is to be a pipe or a terminal")?;
    println!("ready");
    server.serve()
}

impl Family {
    fn bind(self, kind: Type, port: u16) -> Result<Socket> {
        let any: IpAddr = match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        let address = SocketAddr::new(any, port);
        let bind = || {
            let socket = Socket::new(Domain::for_address(address), kind, None)?;
            socket.set_reuse_address(true)?;
            if self == Self::V6 {
                socket.set_only_v6(true)?;
            }
            socket.bind(&address.into())?;
            io::Result::Ok(socket)
        };
        let name = if kind == Type::STREAM { "TCP" } else { "UDP" };
        let socket = bind().with_context(|| format!("cannot bind {name} {address}"))?;
        if kind == Type::DGRAM {
            sockets::enlarge(&socket)?;
        }
        Ok(socket)
    }
}

impl Server {
    fn add(&mut self, role: Role, events: EpollFlags) -> Result<()> {
        let fd = match &role {
            Role::Control(stdin) => stdin.as_fd(),
            Role::Listener(listener, _) => listener.as_fd(),
            Role::Connection(connection) => connection.as_fd(),
            Role::Echo(echo) => echo.as_fd(),
            Role::Sink => self.sink.as_fd(),
        };
        let key = usize::try_from(fd.as_raw_fd())?;
        // Level-triggered: one call for an event, and all have their turn.
        self.poller.add(fd, key, events)?;
        if key >= self.roles.len() {
            self.roles.resize_with(key + 1, || None);
        }
        self.roles[key] = Some(role);
        Ok(())
    }

    fn serve(&mut self) -> Result<()> {
        let mut room = Poller::room();
        loop {
            for key in self.poller.wait(&mut room, None)? {
                match &mut self.roles[key] {
                    Some(Role::Connection(connection)) => {
                        let is_open = connection.advance(&mut self.buffers, &mut self.counters);
                        if !is_open {
                            self.roles[key] = None;
                        }
                    }
                    Some(Role::Echo(echo)) => echo.advance(self.expected, &mut self.counters)?,
                    Some(Role::Sink) => self.sink.advance(self.expected, &mut self.counters)?,
                    Some(Role::Listener(..)) => self.accept(key)?,
                    Some(Role::Control(stdin)) => {
                        let mut bytes = [0; 64];
                        let count = stdin.read(&mut bytes).context("cannot read stdin")?;
                        if count == 0 {
                            return Ok(());
                        }
                        self.line.extend_from_slice(&bytes[..count]);
                        self.obey()?;
                    }
                    None => {}
                }
            }
        }
    }

    fn accept(&mut self, key: usize) -> Result<()> {
        for _ in 0..ACCEPTED {
            let Some(Role::Listener(listener, service)) = &self.roles[key] else { break };
            let service = *service;
            match listener.accept() {
                Ok((stream, client)) => {
                    self.counters.tcp_connections += 1;
                    self.counters.count_foreign(self.expected, Some(client.ip()));
                    self.add(Role::Connection(Connection::new(stream, service)), service.events())?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error).context("cannot accept a connection"),
            }
        }
        Ok(())
    }

    /// Does what the complete lines of stdin ask for.
    fn obey(&mut self) -> Result<()> {
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            if line.trim_ascii() != b"read" {
                bail!("stdin: expected `read`, not {:?}", String::from_utf8_lossy(&line));
            }
            while self.sink.count(self.expected, &mut self.counters)? {}
            let usage = getrusage(UsageWho::RUSAGE_SELF).context("getrusage")?;
            let used = usage.user_time() + usage.system_time();
            let used = Duration::from_micros(u64::try_from(used.num_microseconds())?);
            self.counters.cpu_seconds = report::seconds(used);
            report::print(&self.counters)?;
        }
        Ok(())
    }
}

impl Counters {
    fn count_foreign(&mut self, expected: Option<IpAddr>, sender: Option<IpAddr>) {
        if expected.is_some() && sender != expected {
            self.foreign += 1;
        }
    }
}
