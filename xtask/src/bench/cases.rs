//! What is measured, and of whom.

mod measures;

pub(crate) use self::measures::Measure;

use anyhow::Result;
use clap::ValueEnum;
use xtask::lab::sockets::Protocol;

use self::measures::{
    BULK, BULK_PLAIN, EXCHANGE, EXCHANGE_ALONE, MEMORY, MEMORY_OF_MANY, START, UDP_EXCHANGE, UDP_NEW, alone,
    bulk, connections, exchange, idle, pass, udp_loss, udp_send, whole,
};
use super::limits;
use super::measure::Load;
use super::peers::Peer;

/// A comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Case {
    /// Forwarding of what the policy passes, with the programs attached and without
    Pass,
    /// TCP bulk transfers, 1 and 8 streams, each direction
    Bulk,
    /// The same, one stream, with segmentation offloads off
    BulkPlain,
    /// New TCP connections: how many a second, and how long one takes
    Connect,
    /// Requests and responses on open TCP connections
    Exchange,
    /// UDP requests and responses on 1,000 flows
    UdpExchange,
    /// UDP one way
    UdpSend,
    /// New UDP flows a second
    UdpNew,
    /// Memory for each idle TCP connection
    Memory,
    /// From the start of the program to the first connection
    Start,
    /// What rules cost, by their number and by that of their networks: to load, and a new
    /// flow in the kernel
    Policy,
    /// What a packet costs in each eBPF program
    Packet,
    /// New TCP connections: steered by eBPF, with eager and faithful handshakes, and by
    /// iptables TPROXY with the same relay
    Steering,
}

/// Everybody who relays TCP, and plain forwarding.
const TCP: &[Peer] = &[
    Peer::Direct,
    Peer::Ebpf,
    Peer::Iptables,
    Peer::Haproxy,
    Peer::Nginx,
    Peer::Redsocks,
    Peer::V2ray,
    Peer::Shadowsocks,
];

/// Everybody who relays UDP, and plain forwarding.
const UDP: &[Peer] = &[Peer::Direct, Peer::Ebpf, Peer::Iptables, Peer::Nginx, Peer::V2ray, Peer::Shadowsocks];

impl Case {
    /// The rows of the table of targets.
    pub(crate) const ALL: [Self; 12] = [
        Self::Pass,
        Self::Bulk,
        Self::BulkPlain,
        Self::Connect,
        Self::Exchange,
        Self::UdpExchange,
        Self::UdpSend,
        Self::UdpNew,
        Self::Memory,
        Self::Start,
        Self::Policy,
        Self::Packet,
    ];

    pub(crate) const fn key(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Bulk => "bulk",
            Self::BulkPlain => "bulk-plain",
            Self::Connect => "connect",
            Self::Exchange => "exchange",
            Self::UdpExchange => "udp-exchange",
            Self::UdpSend => "udp-send",
            Self::UdpNew => "udp-new",
            Self::Memory => "memory",
            Self::Start => "start",
            Self::Policy => "policy",
            Self::Packet => "packet",
            Self::Steering => "steering",
        }
    }

    /// Who is compared.
    pub(crate) const fn peers(self) -> &'static [Peer] {
        match self {
            Self::Pass => &[Peer::Direct, Peer::Ruled, Peer::Passing],
            Self::Bulk | Self::Connect | Self::Exchange | Self::Memory => TCP,
            // Those that relay without another program behind them.
            Self::BulkPlain => {
                &[Peer::Direct, Peer::Ebpf, Peer::Iptables, Peer::Haproxy, Peer::Nginx, Peer::V2ray]
            }
            Self::UdpExchange | Self::UdpSend | Self::UdpNew => UDP,
            Self::Start => &[Peer::Ebpf],
            Self::Policy | Self::Packet => &[],
            Self::Steering => {
                &[Peer::Direct, Peer::Ebpf, Peer::Faithful, Peer::Iptables, Peer::IptablesCounting]
            }
        }
    }

    /// Whether one is compared too, where it is asked for. Experiments relay TCP alone, and each is
    /// about bytes of what is established or about new connections.
    pub(crate) const fn is_for_asked(self, peer: Peer) -> bool {
        match (self, peer) {
            (Self::Connect | Self::Exchange | Self::Bulk, Peer::OneWorker)
            | (Self::Connect | Self::Exchange | Self::Steering, Peer::ExpConnections | Peer::ExpTasks)
            | (Self::UdpExchange | Self::UdpSend, Peer::ExpForward)
            | (Self::UdpNew | Self::UdpExchange, Peer::ExpFlows) => true,
            (Self::Bulk | Self::BulkPlain, Peer::ExpConnections | Peer::ExpTasks | Peer::ExpFlows) => false,
            (Self::Bulk | Self::BulkPlain, _) => peer.is_experiment(),
            _ => false,
        }
    }

    /// Whether it is one of the benchmarks of `tproxy-user`.
    pub(crate) const fn in_kernel(self) -> bool {
        matches!(self, Self::Policy | Self::Packet)
    }

    /// By which protocols each has to be proven.
    pub(crate) const fn protocols(self) -> &'static [Protocol] {
        match self {
            Self::Pass => &[Protocol::Tcp, Protocol::Udp],
            Self::UdpExchange | Self::UdpSend | Self::UdpNew => &[Protocol::Udp],
            _ => &[Protocol::Tcp],
        }
    }

    /// What is measured one after the other.
    ///
    /// # Errors
    /// Where the limit of open files is not known.
    pub(crate) fn measures(self) -> Result<Vec<Measure>> {
        Ok(match self {
            Self::Pass => pass(),
            Self::Bulk => [(1, true), (1, false), (8, true), (8, false)].map(|load| bulk(load, BULK)).into(),
            Self::BulkPlain => [(1, true), (1, false)].map(|load| bulk(load, BULK_PLAIN)).into(),
            Self::Connect | Self::Steering => vec![connections(), alone()],
            Self::Exchange => vec![exchange(64, EXCHANGE), exchange(1, EXCHANGE_ALONE)],
            Self::UdpExchange => vec![Measure {
                title: "UDP requests and responses, 1,000 flows".into(),
                load: Load::UdpExchange { flows: 1000 },
                brief: false,
                ours_alone: false,
                metrics: UDP_EXCHANGE,
            }],
            Self::UdpSend => [(64, 1), (64, 1000), (1200, 1), (1200, 1000)]
                .into_iter()
                .flat_map(|(size, flows)| [udp_send(size, flows), udp_loss(size, flows)])
                .collect(),
            Self::UdpNew => vec![Measure {
                title: "new UDP flows, 64 at a time".into(),
                load: Load::UdpNew { in_flight: 64 },
                brief: false,
                ours_alone: false,
                metrics: UDP_NEW,
            }],
            Self::Memory => {
                // As many as everybody can hold here; then, as many as we can.
                let [few, many] = [limits::piped_connections()?, limits::connections()?];
                vec![
                    idle(whole(few).min(10_000), MEMORY, false),
                    idle(whole(many).min(100_000), MEMORY_OF_MANY, true),
                ]
            }
            Self::Start => vec![Measure {
                title: "start of tproxy-user".into(),
                load: Load::Start,
                brief: true,
                ours_alone: false,
                metrics: START,
            }],
            Self::Policy | Self::Packet => Vec::new(),
        })
    }
}
