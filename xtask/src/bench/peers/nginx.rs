//! nginx's stream module: to the address that a connection or datagram came to, as the client.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd as _;

use anyhow::Result;
use socket2::{Domain, Socket, Type};
use xtask::lab::{Daemon, Lab};

use super::{PORT, Running, UDP_IDLE, rules};
use crate::bench::{generator, limits};

pub(super) fn start(lab: &Lab) -> Result<Running> {
    rules::tproxy_tcp(lab)?;
    // It learns the address that a datagram was for, but not the port: a listener for each.
    rules::tproxy_udp(lab, 0)?;
    let workers = std::thread::available_parallelism()?.get();
    let mut servers = format!(
        "server {{ listen {PORT} reuseport backlog=16384; proxy_bind $remote_addr transparent;\n\
         proxy_pass $server_addr:$server_port; }}\n"
    );
    for port in generator::UDP_PORTS {
        write!(
            servers,
            "server {{ listen {port} udp reuseport; proxy_timeout {UDP_IDLE}s;\n\
             proxy_bind $remote_addr transparent; proxy_pass $server_addr:{port}; }}\n"
        )?;
    }
    let here = lab.dir().display();
    let config = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n\
         user root; worker_processes {workers}; error_log stderr; pid {here}/nginx.pid;\n\
         events {{ worker_connections {}; }}\n\
         stream {{ {servers} }}\n",
        limits::flows()?
    );
    let path = lab.dir().join("nginx.conf");
    fs::write(&path, config)?;
    let mut sockets = Vec::new();
    for (kind, port) in
        [(Type::STREAM, PORT)].into_iter().chain(generator::UDP_PORTS.map(|port| (Type::DGRAM, port)))
    {
        for _ in 0..workers {
            sockets.push(lab.router.try_enter(|| transparent(kind, port))?);
        }
    }
    // It cannot make them transparent, but takes those that another nginx hands over.
    let numbers: Vec<String> = sockets.iter().map(|socket| socket.as_raw_fd().to_string()).collect();
    let inherited = numbers.join(";") + ";";
    let command =
        lab.router.cmd("nginx").env("NGINX", inherited).arg("-p").arg(lab.dir()).arg("-c").arg(&path);
    let command = command.args(["-e", "stderr", "-g", "daemon off;"]);
    let mut daemon = Daemon::start(lab, "nginx", &command)?;
    // The master writes it once the sockets are its own.
    daemon.wait_ready("it wrote its process number", |_| Ok(lab.dir().join("nginx.pid").exists()))?;
    Ok(Running::of(daemon))
}

/// A socket that a program started from here inherits.
fn transparent(kind: Type, port: u16) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, kind, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_ip_transparent_v4(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
    if kind == Type::STREAM {
        socket.listen(16_384)?;
    }
    socket.set_nonblocking(true)?;
    socket.set_cloexec(false)?;
    Ok(socket)
}
