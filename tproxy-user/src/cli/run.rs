//! Flags of `run`, and of the commands that take them as well.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use ipnet::IpNet;

use super::{default, parse};
use crate::config::file::upstream::Upstreams;
use crate::config::rule::Rule;
use crate::config::upstream::SendProxy;
use crate::config::{AccessLog, Attach, Fail, Handshake, Kernel, Mark, SourceMode, Steer};

/// Flags of `run`, `check`, `doctor` and `reload`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Config file (TOML): a key for each of these flags, and rules; flags given here go before it
    ///
    /// `tproxy-user schema` prints what it may have.
    #[arg(short, long, value_name = "FILE", help_heading = "Configuration")]
    pub config: Option<PathBuf>,
    /// Reload when the config file changes, or one that it names
    #[arg(long, help_heading = "Configuration")]
    pub watch: bool,
    /// The `Capture` group.
    #[command(flatten)]
    pub capture: CaptureArgs,
    /// The `Steering` group.
    #[command(flatten)]
    pub steering: SteeringArgs,
    /// The `Source` group.
    #[command(flatten)]
    pub source: SourceArgs,
    /// The `Time-outs` group.
    #[command(flatten)]
    pub timeouts: TimeoutArgs,
    /// The `Limits` group.
    #[command(flatten)]
    pub limits: LimitArgs,
}

/// Which packets are captured.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Capture")]
pub struct CaptureArgs {
    /// Interface whose incoming traffic is captured; repeatable, globs such as 'wg*' too
    ///
    /// An interface that a glob matches may appear later. Traffic for this host,
    /// multicast, broadcast and link-local traffic is never captured. Of a bridge,
    /// name the bridge, not its ports; for the host's own traffic see --own-traffic.
    #[arg(short, long = "iface", value_name = "NAME", value_parser = parse::interface)]
    pub interfaces: Vec<String>,
    /// Protocols to capture: tcp, udp
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "tcp,udp",
          value_parser = PossibleValuesParser::new(["tcp", "udp"]))]
    pub proto: Vec<String>,
    /// Destination ports to capture, such as 53,80,1000-2000; repeatable [default: all]
    #[arg(long, value_name = "PORTS", value_delimiter = ',', value_parser = parse::ports)]
    pub dport: Vec<(u16, u16)>,
    /// Destination network to capture; repeatable [default: all]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = parse::cidr)]
    pub to: Vec<IpNet>,
    /// Destination network to leave alone, whatever --to says; repeatable
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = parse::cidr)]
    pub not_to: Vec<IpNet>,
    /// Source network to capture; repeatable [default: all]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = parse::cidr)]
    pub from: Vec<IpNet>,
    /// Source network to leave alone, whatever --from says; repeatable
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = parse::cidr)]
    pub not_from: Vec<IpNet>,
    /// Capture IPv4 only
    #[arg(short = '4', long = "ipv4")]
    pub v4: bool,
    /// Capture IPv6 only
    #[arg(short = '6', long = "ipv6")]
    pub v6: bool,
    /// Capture what this host itself sends, too
    #[arg(long)]
    pub own_traffic: bool,
    /// New flows while no proxy is there to take them: open forwards them, closed drops them
    #[arg(long, value_name = "HOW", default_value = "open",
          value_parser = PossibleValuesParser::new(["open", "closed"])
              .map(|how| if how == "open" { Fail::Open } else { Fail::Closed }))]
    pub fail: Fail,
    /// Rules of the config file.
    #[arg(skip)]
    pub rules: Vec<Rule>,
}

/// How captured packets reach the proxy.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Steering")]
pub struct SteeringArgs {
    /// ebpf: this program does it all; none: rules of yours do (iptables -j TPROXY), only listen and relay
    #[arg(long, value_name = "BY", default_value = "ebpf",
          value_parser = PossibleValuesParser::new(["ebpf", "none"])
              .map(|by| if by == "ebpf" { Steer::Ebpf } else { Steer::None }))]
    pub steer: Steer,
    /// How programs are attached: tcx (Linux 6.6), clsact, or auto, the better that the kernel has
    #[arg(long, value_name = "HOW", default_value = "auto",
          value_parser = PossibleValuesParser::new(["auto", "tcx", "clsact"])
              .map(|how| match how.as_str() { "tcx" => Attach::Tcx, "clsact" => Attach::Clsact, _ => Attach::Auto }))]
    pub attach: Attach,
    /// When a client's TCP handshake is completed: eager, at once; faithful, once the server has answered
    ///
    /// With faithful a server that refuses, cannot be reached or does not answer looks
    /// so to the client, and one that is slow looks slow. It makes each connection
    /// cost a little more, and the server be connected to before the client has
    /// shown that its address is its own (Linux 5.8, and a tun device).
    #[arg(long, value_name = "WHEN", default_value = "eager",
          value_parser = PossibleValuesParser::new(["eager", "faithful"])
              .map(|when| if when == "eager" { Handshake::Eager } else { Handshake::Faithful }))]
    pub handshake: Handshake,
    /// Port of the listeners
    ///
    /// With --steer ebpf nobody connects to it: packets are handed over whatever their port is.
    #[arg(long, value_name = "PORT", default_value = "15001", value_parser = parse::port)]
    pub on_port: u16,
    /// Address of the listeners, one a family [default: 127.0.0.1 and ::1; --steer none: all]
    #[arg(long, value_name = "IP", value_delimiter = ',', value_parser = parse::ip)]
    pub on_ip: Vec<IpAddr>,
    /// Mark of captured packets, decimal or 0x hex; without MASK all bits count, as in ip rule
    ///
    /// Only the bits of MASK are changed and compared: give it a bit that no other
    /// program on this host uses.
    #[arg(long, value_name = "VALUE[/MASK]", default_value = "0x1/0x1", value_parser = parse::mark)]
    pub tproxy_mark: Mark,
    /// Mark of the proxy's own sockets, by which their packets are told apart
    #[arg(long, value_name = "VALUE", default_value = "0x2", value_parser = parse::number)]
    pub own_mark: u32,
    /// Routing table for the local route; must hold no routes of others
    #[arg(long, value_name = "NUMBER", default_value = "100", value_parser = parse::table)]
    pub table: u32,
    /// Priority of the routing rules, 1 to 32765
    ///
    /// The default puts them before the rules of VPNs (Tailscale 5210, wg-quick below
    /// 32766) and VRFs (1000): a captured packet must not be routed by those.
    #[arg(long, value_name = "NUMBER", default_value = "100", value_parser = parse::priority)]
    pub rule_priority: u32,
    /// Directory of the pinned maps and programs, on a bpf filesystem; its last part names this instance
    #[arg(long, value_name = "DIR", default_value = default::PIN, value_parser = parse::pin)]
    pub pin: PathBuf,
    /// Use the eBPF build that logs each decision (slow; Linux 5.8)
    #[arg(long)]
    pub bpf_log: bool,
    /// Choose features as if this kernel was older
    #[arg(long, value_name = "X.Y", hide = true, value_parser = parse::kernel)]
    pub assume_kernel: Option<Kernel>,
}

/// Where connections go, and as whom.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Source and upstream")]
pub struct SourceArgs {
    /// Whose address servers see: client, its address; client-port, address and port; proxy, this host's
    ///
    /// client-port falls back to another port where the client's is taken.
    #[arg(long, value_name = "WHOSE", default_value = "client",
          value_parser = PossibleValuesParser::new(["client", "client-port", "proxy"])
              .map(|whose| match whose.as_str() {
                  "client-port" => SourceMode::ClientPort,
                  "proxy" => SourceMode::Proxy,
                  _ => SourceMode::Client,
              }))]
    pub source: SourceMode,
    /// How captured flows reach their destinations: direct, or through socks5://HOST[:PORT], http://HOST:PORT or https://HOST:PORT
    ///
    /// Or the name of an upstream of the config file. Repeatable: the first that works. A proxy server is asked for the original
    /// destination, which then sees that server's address. HTTP carries TCP alone: UDP is refused.
    /// A user and a password can be given as in socks5://USER:PASSWORD@HOST, but others may see them
    /// for a moment; a config file can name a file that has the password.
    #[arg(long, value_name = "URL", default_value = "direct")]
    pub upstream: Vec<String>,
    /// Tell servers and diverted flows' targets the client and its destination, by the PROXY protocol
    ///
    /// v1 and v2 begin each TCP connection with it, v2 each UDP datagram as well. Who does not expect
    /// it takes it for what the client says. Not said through proxy servers.
    #[arg(long, value_name = "VERSION", default_value = "off",
          value_parser = PossibleValuesParser::new(["off", "v1", "v2"])
              .map(|version| match version.as_str() { "v1" => SendProxy::V1, "v2" => SendProxy::V2, _ => SendProxy::Off }))]
    pub send_proxy: SendProxy,
    /// Upstreams of the config file.
    #[arg(skip)]
    pub upstreams: Upstreams,
    /// A line on standard output for each connection that ends
    #[arg(long, value_name = "FORM", default_value = "off",
          value_parser = PossibleValuesParser::new(["off", "json", "text"])
              .map(|form| match form.as_str() { "json" => AccessLog::Json, "text" => AccessLog::Text, _ => AccessLog::Off }))]
    pub access_log: AccessLog,
}

/// Time-outs: a number with its unit, such as 300s, 5m or 1h30m.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Time-outs (such as 300s, 5m, 1h30m)")]
pub struct TimeoutArgs {
    /// How long a server may take to accept a connection
    ///
    /// With --handshake faithful the client has as long again to complete its own.
    /// Long enough for three lost SYNs (Linux repeats them after 1, 3 and 7 s).
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse::duration)]
    pub connect_timeout: Duration,
    /// A TCP connection without a byte either way
    ///
    /// What RFC 5382 (REQ-5) asks of whatever stands between two hosts: 2 h and the
    /// 4 min of a keep-alive. (HAProxy's timeout tunnel and Envoy's idle_timeout are
    /// usually 1 h; Linux conntrack has 5 days.)
    #[arg(long, value_name = "TIME", default_value = "2h4m", value_parser = parse::duration)]
    pub tcp_idle_timeout: Duration,
    /// A TCP connection that one side has closed, without a byte from the other
    ///
    /// RFC 5382 (REQ-5): at least 4 min for partly closed connections. (Linux
    /// conntrack has 1 to 2 min, too short for a server that computes an answer.)
    #[arg(long, value_name = "TIME", default_value = "4m", value_parser = parse::duration)]
    pub half_close_timeout: Duration,
    /// A UDP flow that was replied to, without a datagram
    ///
    /// RFC 4787 (REQ-5): never less than 2 min. Linux conntrack has 2 min.
    #[arg(long, value_name = "TIME", default_value = "3m", value_parser = parse::duration)]
    pub udp_timeout: Duration,
    /// A UDP flow that was not replied to yet
    ///
    /// As Linux conntrack; most are DNS queries whose resolver is gone.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse::duration)]
    pub udp_timeout_unreplied: Duration,
    /// From SIGTERM until connections are cut; 0s: at once
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse::duration_or_zero)]
    pub drain_timeout: Duration,
}

/// Bounds.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// TCP connections at one time; each takes two descriptors
    ///
    /// With --handshake faithful those that wait for their server count, too.
    #[arg(long, value_name = "NUMBER", default_value = "65536", value_parser = parse::count)]
    pub max_connections: u32,
    /// TCP connections and UDP flows of one client address at one time; 0: no bound of its own
    ///
    /// The default leaves half of the UDP flows to the others. A network that
    /// hides behind one address needs more.
    #[arg(long, value_name = "NUMBER", default_value = "8192", value_parser = parse::count_or_zero)]
    pub max_per_client: u32,
    /// UDP flows (one a client's address and port) at one time; each takes a descriptor
    #[arg(long, value_name = "NUMBER", default_value = "16384", value_parser = parse::count)]
    pub max_udp_flows: u32,
    /// Entries of the flow table that `flows` shows; the oldest give way (104 bytes each) [default: 150000]
    #[arg(long, value_name = "NUMBER", value_parser = parse::flow_entries)]
    pub max_flows: Option<u32>,
    /// Worker threads, 1 to 64 [default: one a core]
    #[arg(long, value_name = "NUMBER", value_parser = parse::workers)]
    pub workers: Option<u32>,
}
