//! A client, a router and a server in three network namespaces.
//!
//! ```text
//!  client ──────────── router ──────────── server
//!  192.0.2.2        .1 lan wan .1         198.51.100.2    and every address in
//!  2001:db8:1::2   ::1         ::1        2001:db8:2::2   198.18.0.0/15 and
//!                    lan2                                 2001:db8:f000::/36
//!  guest ──────────────┘
//!  203.0.113.2, 2001:db8:3::2
//! ```
//!
//! Any number of labs run side by side. One is removed when it is dropped, when
//! its process is told to end ([`reclaim::on_signals`]), and, where neither could
//! run, by the next process that makes one.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

pub mod command;
pub mod daemon;
pub mod firewall;
pub mod kernel;
pub mod load;
pub mod namespace;
pub mod pace;
pub mod peer;
pub mod proxy;
pub mod reclaim;
pub mod selection;
pub mod server;
pub mod sockets;
pub mod upstream;

pub use command::{Cmd, Output};
pub use daemon::Daemon;
pub use namespace::Namespace;
pub use proxy::Proxy;

/// The two families that every scenario runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order that they are shown.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// `v4` or `v6`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.pick("v4", "v6")
    }

    /// The flag of curl, nc and dig that asks for this family.
    #[must_use]
    pub const fn flag(self) -> &'static str {
        self.pick("-4", "-6")
    }

    /// The one of two values that belongs to this family.
    #[must_use]
    pub const fn pick<T: Copy>(self, v4: T, v6: T) -> T {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }

    /// The client's address.
    #[must_use]
    pub const fn client(self) -> IpAddr {
        self.pick(v4(192, 0, 2, 2), v6(1, 2))
    }

    /// The router's address on `lan`.
    #[must_use]
    pub const fn router(self) -> IpAddr {
        self.pick(v4(192, 0, 2, 1), v6(1, 1))
    }

    /// The router's address on `wan`: what a server sees of a proxy that keeps no source.
    #[must_use]
    pub const fn uplink(self) -> IpAddr {
        self.pick(v4(198, 51, 100, 1), v6(2, 1))
    }

    /// The server's address on its link.
    #[must_use]
    pub const fn server(self) -> IpAddr {
        self.pick(v4(198, 51, 100, 2), v6(2, 2))
    }

    /// The address of the second client, behind `lan2`.
    #[must_use]
    pub const fn guest(self) -> IpAddr {
        self.pick(v4(203, 0, 113, 2), v6(3, 2))
    }

    /// The `n`th of the many addresses "anywhere" that the server answers for.
    #[must_use]
    pub const fn anywhere(self, n: u16) -> IpAddr {
        let [high, low] = n.to_be_bytes();
        self.pick(v4(198, 18, high, low), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xf000, 0, 0, 0, 0, n)))
    }

    /// The `n`th network "anywhere" of 256 addresses (a /24; a /120 in IPv6).
    #[must_use]
    pub fn anywhere_net(self, n: u8) -> String {
        format!("{}/{}", self.anywhere(u16::from(n) << 8), self.pick(24, 120))
    }

    /// The wildcard address.
    #[must_use]
    pub const fn unspecified(self) -> IpAddr {
        self.pick(IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED))
    }

    /// The loopback address.
    #[must_use]
    pub const fn loopback(self) -> IpAddr {
        self.pick(IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST))
    }

    /// Bytes of an IP header without options and of a UDP header.
    #[must_use]
    pub const fn udp_overhead(self) -> usize {
        self.pick(28, 48)
    }
}

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const fn v6(net: u16, host: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, net, 0, 0, 0, 0, host))
}

/// `http://ADDRESS:PORT/path`, with the brackets that IPv6 needs.
#[must_use]
pub fn url(to: IpAddr, port: u16, path: &str) -> String {
    format!("http://{}{path}", SocketAddr::new(to, port))
}

/// How a line begins that tells what a scenario has done so far, or found.
pub const NOTE: &str = "note: ";

/// Tells what a scenario has done so far, or found: `cargo xtask test` shows it.
pub fn note(text: &str) {
    println!("{NOTE}{text}");
}

/// One lab; see the module's documentation for its layout.
#[derive(Debug)]
pub struct Lab {
    name: String,
    /// Where the traffic starts.
    pub client: Namespace,
    /// Where the proxy runs. Its interfaces: `lan`, `lan2`, `wan`.
    pub router: Namespace,
    /// Where the traffic goes.
    pub server: Namespace,
    /// A second client, on another interface of the router.
    pub guest: Namespace,
    dir: PathBuf,
    // Dropped last: whoever can take this lock may remove the lab.
    _claim: fs::File,
}

impl Lab {
    /// Lays out a lab.
    ///
    /// # Errors
    /// Without root, or where `ip` (iproute2) is missing or fails.
    pub fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let name = format!("tp{}n{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let (dir, claim) = reclaim::claim(&name).context("cannot claim the lab's state directory")?;
        let namespace = |role| Namespace::new(&name, role);
        let lab = Self {
            client: namespace("client"),
            router: namespace("router"),
            server: namespace("server"),
            guest: namespace("guest"),
            name,
            dir,
            _claim: claim,
        };
        lab.lay_out().context("cannot lay out the lab")?;
        Ok(lab)
    }

    /// The name: prefix of the namespaces, and the proxy's instance name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A directory for logs and files, removed with the lab.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The pin directory of the lab's proxy.
    #[must_use]
    pub fn pin(&self) -> PathBuf {
        reclaim::pin(&self.name)
    }

    /// All four namespaces.
    #[must_use]
    pub fn namespaces(&self) -> [&Namespace; 4] {
        [&self.client, &self.router, &self.server, &self.guest]
    }

    fn lay_out(&self) -> Result<()> {
        let add = self.namespaces().map(|namespace| format!("netns add {}\n", namespace.name()));
        Cmd::host("ip").args(["-batch", "-"]).stdin(add.concat()).check()?;
        // Before any address is set: with forwarding off, a namespace takes
        // its own view of routes from router advertisements.
        for namespace in self.namespaces() {
            namespace.set_sysctls(&[
                ("net/ipv6/conf/all/accept_dad", "0"),
                ("net/ipv6/conf/default/accept_dad", "0"),
                ("net/ipv6/conf/default/accept_ra", "0"),
                ("net/ipv6/conf/default/router_solicitations", "0"),
            ])?;
        }
        self.router.set_sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
        self.server.set_sysctls(&[("net/ipv6/ip_nonlocal_bind", "1")])?;
        // Namespaces of one kernel pick ephemeral ports by the same secret, so the
        // client and a proxy that acts for it would pick the same ones, far more
        // often than two hosts do. That matters when a client's next connection is
        // forwarded: while a closed one of the proxy with the same addresses and
        // ports is in TIME_WAIT, early demux finds it, and the kernel drops what is
        // to be forwarded (`ip_forward`: an skb that has a socket).
        for (namespace, ports) in
            [(&self.client, "2000 19999"), (&self.guest, "2000 19999"), (&self.router, "30000 60999")]
        {
            namespace.set_sysctls(&[("net/ipv4/ip_local_port_range", ports)])?;
        }
        let (client, server, guest) = (self.client.name(), self.server.name(), self.guest.name());
        let mut router = format!(
            "link set lo up\n\
             link add lan type veth peer name eth0 netns {client}\n\
             link add lan2 type veth peer name eth0 netns {guest}\n\
             link add wan type veth peer name eth0 netns {server}\n\
             link set lan up\n\
             link set lan2 up\n\
             link set wan up\n"
        );
        // The host's default congestion control may be bbr, which hides what a
        // proxy costs; a namespace cannot change its default, its routes can.
        for (device, four, net4, six, net6) in [
            ("lan", "192.0.2.1", "192.0.2.0/24", "2001:db8:1::1", "2001:db8:1::/64"),
            ("lan2", "203.0.113.1", "203.0.113.0/24", "2001:db8:3::1", "2001:db8:3::/64"),
            ("wan", "198.51.100.1", "198.51.100.0/24", "2001:db8:2::1", "2001:db8:2::/64"),
        ] {
            write!(
                router,
                "addr add {four}/24 dev {device} noprefixroute\n\
                 addr add {six}/64 dev {device} nodad noprefixroute\n\
                 route add {net4} dev {device} src {four} congctl cubic\n\
                 route add {net6} dev {device} congctl cubic\n"
            )?;
        }
        router.push_str(
            "route add 198.18.0.0/15 via 198.51.100.2 congctl cubic\n\
             route add 2001:db8:f000::/36 via 2001:db8:2::2 congctl cubic\n",
        );
        self.router.ip_batch(&router)?;
        // The router's own address is one that servers see: of a proxy that does not keep the
        // client's.
        let edge = |(router4, router6): (IpAddr, IpAddr), own: (IpAddr, IpAddr)| {
            format!(
                "link set lo up\n\
                 link set eth0 up\n\
                 addr add {}/24 dev eth0\n\
                 addr add {}/64 dev eth0 nodad\n\
                 route add {router4} dev eth0 congctl cubic\n\
                 route add {router6} dev eth0 congctl cubic\n\
                 route add default via {router4} congctl cubic\n\
                 route add ::/0 via {router6} congctl cubic\n",
                own.0, own.1
            )
        };
        let both = |address: fn(Family) -> IpAddr| (address(Family::V4), address(Family::V6));
        self.client.ip_batch(&edge(both(Family::router), both(Family::client)))?;
        self.guest.ip_batch(&edge((v4(203, 0, 113, 1), v6(3, 1)), both(Family::guest)))?;
        self.server.ip_batch(&format!(
            "{}route add local 198.18.0.0/15 dev lo\n\
             route add local 2001:db8:f000::/36 dev lo\n",
            edge(both(Family::uplink), both(Family::server))
        ))?;
        for namespace in self.namespaces() {
            namespace.wait_until_up()?;
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        reclaim::remove(&self.name);
    }
}
