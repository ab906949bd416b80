//! Ways to move the bytes of a relayed TCP connection, to compare: no part of tproxy.
//!
//! A relay with one thread: it accepts what is handed to it (iptables TPROXY), connects to where
//! the client wanted to go, as this host, and moves bytes until both directions have ended.
//! `cargo xtask bench --cases bulk --peers direct,ebpf,exp-copy,…` measures it. It also forwards
//! packets without relaying anything, and relays connections with the fewest system calls, or a task
//! for each, and UDP flows, to know what those could reach.

mod bpf;
mod connections;
mod copy;
mod events;
mod flows;
mod forward;
mod ring;
mod sockmap;
mod splice;
mod tasks;
mod zerocopy;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use socket2::{Domain, Socket, Type};

/// Bytes of one read or write where they are copied: what tproxy's relay takes too.
const CHUNK: usize = 64 << 10;

/// How long one connect may take. Nothing else is done meanwhile: connections are few here.
const CONNECT: Duration = Duration::from_secs(5);

/// Ways to move the bytes of TCP connections, to compare.
#[derive(Parser)]
enum Command {
    /// Relays TCP connections in one of several ways
    Relay(Relay),
    /// Relays TCP connections with the fewest system calls, to their original destination and as
    /// their client, which takes `CAP_NET_ADMIN` (`IP_TRANSPARENT`)
    Connections {
        /// The port to listen on
        #[arg(long)]
        port: u16,
        /// Threads, each with a listener of its own
        #[arg(long, default_value_t = 2)]
        threads: usize,
        /// With a runtime (tokio) and a task for each connection
        #[arg(long)]
        tasks: bool,
    },
    /// Relays UDP flows and does nothing else, to their original destination and as their client,
    /// which takes `CAP_NET_ADMIN` (`IP_TRANSPARENT`) and `CAP_NET_RAW`
    Flows {
        /// The port to listen on
        #[arg(long)]
        port: u16,
        /// Threads, each with a listener of its own
        #[arg(long, default_value_t = 2)]
        threads: usize,
    },
    /// Forwards IPv4 packets between two devices, for ever
    Forward { one: String, another: String },
}

#[derive(clap::Args)]
struct Relay {
    /// How bytes are moved
    #[arg(long)]
    mover: Mover,
    /// What a pipe of the splicing movers holds
    #[arg(long, value_name = "KIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(4..=1 << 20))]
    pipe: u32,
    /// The port to listen on; 0: any that is free
    #[arg(long)]
    port: u16,
    /// Where connections go; else to their original destination, which takes `CAP_NET_ADMIN`
    /// (`IP_TRANSPARENT`)
    #[arg(long, value_name = "ADDR:PORT")]
    to: Option<SocketAddr>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mover {
    /// read(2) and write(2), 64 KiB
    Copy,
    /// splice(2) through a pipe for each direction
    Splice,
    /// read(2), and send(2) with `MSG_ZEROCOPY`
    Zerocopy,
    /// A socket map, whose program sends what is received from the other socket
    Sockmap,
    /// Receives and sends of `io_uring`, both of a direction under way at once
    IoUring,
    /// Splices of `io_uring`
    IoUringSplice,
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Relay(relay) => run(&relay),
        Command::Connections { port, threads, tasks: true } => tasks::run(port, threads),
        Command::Connections { port, threads, tasks: false } => connections::run(port, threads),
        Command::Flows { port, threads } => flows::run(port, threads),
        Command::Forward { one, another } => forward::run([&one, &another]),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tproxy-experiments: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Relay) -> Result<()> {
    let listener = Listener::new(args.port, args.to)?;
    println!("{}", listener.address()?);
    let pipe = args.pipe << 10;
    match args.mover {
        Mover::Copy => events::run(&listener, || Ok(copy::Copy::new())),
        Mover::Splice => events::run(&listener, || splice::Splice::new(pipe)),
        Mover::Zerocopy => events::run(&listener, || Ok(zerocopy::Zerocopy::new())),
        Mover::Sockmap => {
            let maps = sockmap::Maps::new()?;
            events::run(&listener, || Ok(sockmap::Sockmap::new(&maps)))
        }
        Mover::IoUring => ring::run(&listener, || Ok(ring::Messages::new())),
        Mover::IoUringSplice => ring::run(&listener, || ring::Splices::new(pipe)),
    }
}

/// The listening socket, and where its connections go.
struct Listener {
    socket: Socket,
    to: Option<SocketAddr>,
}

/// The two sockets of a relayed connection: the client's, and the server's.
type Pair = [Socket; 2];

impl Listener {
    fn new(port: u16, to: Option<SocketAddr>) -> Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if to.is_none() {
            socket.set_ip_transparent_v4(true).context("IP_TRANSPARENT")?;
        }
        Self::on(socket, port, to)
    }

    /// One of several on a port, whose connections inherit `TCP_NODELAY`.
    fn shared(port: u16) -> Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_port(true)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_ip_transparent_v4(true).context("IP_TRANSPARENT")?;
        Self::on(socket, port, None)
    }

    fn on(socket: Socket, port: u16, to: Option<SocketAddr>) -> Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        socket.bind(&address.into()).with_context(|| format!("cannot bind to {address}"))?;
        socket.listen(1024)?;
        Ok(Self { socket, to })
    }

    fn address(&self) -> Result<SocketAddr> {
        self.socket.local_addr()?.as_socket().context("an address of no internet family")
    }

    /// Connects on behalf of a client; `None`, and a message: that did not work.
    fn connect(&self, client: Socket) -> Option<Pair> {
        let connected = || -> Result<Socket> {
            let to = match self.to {
                Some(to) => to,
                None => client.local_addr()?.as_socket().context("an address of no internet family")?,
            };
            let server = TcpStream::connect_timeout(&to, CONNECT);
            let server = server.with_context(|| format!("cannot connect to {to}"))?;
            client.set_tcp_nodelay(true)?;
            server.set_nodelay(true)?;
            Ok(server.into())
        };
        match connected() {
            Ok(server) => Some([client, server]),
            Err(error) => {
                eprintln!("tproxy-experiments: {error:#}");
                None
            }
        }
    }
}

/// Tells of the end of a connection, unless it is one of those that client and server choose.
fn report(error: &io::Error) {
    if !matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) {
        eprintln!("tproxy-experiments: a connection ended: {error}");
    }
}
