//! What is measured, of whom, and how good it has to be.

use anyhow::Result;
use clap::ValueEnum;
use xtask::lab::sockets::Protocol;

use super::limits;
use super::measure::Load;
use super::peers::Peer;
use super::series::{Better, DIRECT, IPTABLES, Metric, Of, Plot, Target, figure};

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
            Self::Pass => &[Peer::Direct, Peer::Passing],
            Self::Bulk | Self::Connect | Self::Exchange => TCP,
            // Those that relay without another program behind them.
            Self::BulkPlain => {
                &[Peer::Direct, Peer::Ebpf, Peer::Iptables, Peer::Haproxy, Peer::Nginx, Peer::V2ray]
            }
            Self::UdpExchange | Self::UdpSend | Self::UdpNew => UDP,
            // Plain forwarding has no memory.
            Self::Memory => TCP.split_at(1).1,
            Self::Start => &[Peer::Ebpf],
            Self::Policy | Self::Packet => &[],
            Self::Steering => {
                &[Peer::Direct, Peer::Ebpf, Peer::Faithful, Peer::Iptables, Peer::IptablesCounting]
            }
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

/// One load, and what is told of it.
#[derive(Clone, Debug)]
pub(crate) struct Measure {
    pub(crate) title: String,
    pub(crate) load: Load,
    /// A third of the time is enough.
    pub(crate) brief: bool,
    /// Not of others.
    pub(crate) ours_alone: bool,
    /// What it yields, in this order.
    pub(crate) metrics: &'static [Metric],
}

impl Measure {
    /// Whether it is one for this candidate.
    pub(crate) fn is_for(&self, peer: Peer) -> bool {
        !self.ours_alone || peer == Peer::Ebpf
    }
}

const fn more(
    name: &'static str,
    unit: &'static str,
    targets: &'static [Target],
    plot: Option<Plot>,
) -> Metric {
    Metric { name, unit, better: Better::More, targets, plot }
}

const fn less(
    name: &'static str,
    unit: &'static str,
    targets: &'static [Target],
    plot: Option<Plot>,
) -> Metric {
    Metric { name, unit, better: Better::Less, targets, plot }
}

fn pass() -> Vec<Measure> {
    const UNHARMED: &[Target] = &[Target::AtLeast(0.97, DIRECT)];
    const PACKETS: &[Metric] = &[more("arrived", "1/s", UNHARMED, None)];
    const BYTES: &[Metric] = &[more("rate", "Gbit/s", UNHARMED, None)];
    vec![
        Measure {
            title: "passed UDP, 64 B, 1 flow".into(),
            load: Load::UdpSend { flows: 1, size: 64 },
            brief: false,
            ours_alone: false,
            metrics: PACKETS,
        },
        Measure {
            title: "passed TCP, 1 stream, down".into(),
            load: Load::Bulk { streams: 1, up: false, plain: false },
            brief: false,
            ours_alone: false,
            metrics: BYTES,
        },
    ]
}

const BULK: &[Metric] = &[
    more(
        "rate",
        "Gbit/s",
        &[Target::AtLeast(0.95, DIRECT), Target::AtLeast(1.3, Of::BestPeer)],
        Some(Plot::Bulk),
    ),
    less("processor time", "s/GB", &[Target::AtMost(0.6, Of::BestPeer)], None),
];

/// Shown for what it is: of other machines than these, with no device to segment.
const BULK_PLAIN: &[Metric] = &[more("rate", "Gbit/s", &[], None), less("processor time", "s/GB", &[], None)];

fn bulk((streams, up): (u32, bool), metrics: &'static [Metric]) -> Measure {
    let plain = metrics.iter().all(|metric| metric.targets.is_empty());
    let plural = if streams == 1 { "" } else { "s" };
    let direction = if up { "up" } else { "down" };
    let note = if plain { ", offloads off" } else { "" };
    Measure {
        title: format!("TCP bulk, {streams} stream{plural} {direction}{note}"),
        load: Load::Bulk { streams, up, plain },
        brief: false,
        ours_alone: false,
        metrics,
    }
}

/// At the median no more than twice as long as without a proxy.
const MEDIAN: &[Target] = &[Target::AtMost(2.0, DIRECT)];
/// Better than every other.
const TAIL: &[Target] = &[Target::AtMost(1.0, Of::BestPeer)];

fn connections() -> Measure {
    const METRICS: &[Metric] = &[
        more(
            "connections",
            "1/s",
            &[Target::AtLeast(1.0, IPTABLES), Target::AtLeast(1.3, Of::BestPeer)],
            Some(Plot::Connections),
        ),
        less("first byte after, p50", "µs", MEDIAN, None),
        less("first byte after, p99", "µs", TAIL, None),
        less("processor time of 1,000", "s", &[], None),
    ];
    Measure {
        title: "new connections, 64 at a time".into(),
        load: Load::Connect { concurrency: 64 },
        brief: false,
        ours_alone: false,
        metrics: METRICS,
    }
}

fn alone() -> Measure {
    const METRICS: &[Metric] = &[
        less("first byte after, p50", "µs", MEDIAN, Some(Plot::Latency)),
        less("first byte after, p99", "µs", TAIL, Some(Plot::Latency)),
        less("connected after, p50", "µs", &[], None),
    ];
    Measure {
        title: "new connections, one alone".into(),
        load: Load::Connect { concurrency: 1 },
        brief: true,
        ours_alone: false,
        metrics: METRICS,
    }
}

const EXCHANGE: &[Metric] = &[
    more("responses", "1/s", &[], Some(Plot::Connections)),
    less("response after, p50", "µs", MEDIAN, None),
    less("response after, p99", "µs", TAIL, None),
];

const EXCHANGE_ALONE: &[Metric] = &[
    less("response after, p50", "µs", MEDIAN, Some(Plot::Latency)),
    less("response after, p99", "µs", TAIL, Some(Plot::Latency)),
];

fn exchange(connections: u32, metrics: &'static [Metric]) -> Measure {
    let plural = if connections == 1 { "" } else { "s" };
    Measure {
        title: format!("requests on {connections} open connection{plural}"),
        load: Load::Exchange { connections },
        brief: connections == 1,
        ours_alone: false,
        metrics,
    }
}

const UDP_EXCHANGE: &[Metric] = &[
    more(
        "responses",
        "1/s",
        &[Target::AtLeast(0.6, DIRECT), Target::AtLeast(2.0, Of::BestPeer)],
        Some(Plot::Udp),
    ),
    less("response after, p50", "µs", &[], None),
    less("response after, p99", "µs", &[], None),
];

const UDP_NEW: &[Metric] = &[more(
    "answered",
    "1/s",
    &[Target::AtLeast(0.5, DIRECT), Target::AtLeast(2.0, Of::BestPeer)],
    Some(Plot::Udp),
)];

fn udp_send(size: u32, flows: u32) -> Measure {
    const METRICS: &[Metric] = &[more(
        "arrived",
        "1/s",
        &[Target::AtLeast(0.8, DIRECT), Target::AtLeast(2.0, Of::BestPeer)],
        Some(Plot::Udp),
    )];
    Measure {
        title: format!("UDP one way, {}", datagrams(size, flows)),
        load: Load::UdpSend { flows, size },
        brief: false,
        ours_alone: false,
        metrics: METRICS,
    }
}

fn udp_loss(size: u32, flows: u32) -> Measure {
    // A datagram in a thousand: the machine's own noise.
    const METRICS: &[Metric] = &[less("lost", "%", &[Target::AtMostAbove(0.1, DIRECT)], None)];
    Measure {
        title: format!("UDP at half of the direct rate, {}", datagrams(size, flows)),
        load: Load::UdpHalf { flows, size },
        brief: true,
        ours_alone: false,
        metrics: METRICS,
    }
}

fn datagrams(size: u32, flows: u32) -> String {
    match flows {
        1 => format!("{size} B, 1 flow"),
        _ => format!("{size} B, {} flows", figure(f64::from(flows))),
    }
}

const MEMORY: &[Metric] =
    &[less("for each", "bytes", &[Target::Within(1024.0), Target::AtMost(1.0, Of::BestPeer)], None)];

const MEMORY_OF_MANY: &[Metric] = &[less("for each", "bytes", &[Target::Within(1024.0)], None)];

/// In whole thousands.
const fn whole(connections: u64) -> u64 {
    connections / 1000 * 1000
}

fn idle(connections: u64, metrics: &'static [Metric], ours_alone: bool) -> Measure {
    Measure {
        title: format!("{},000 idle connections", connections / 1000),
        load: Load::Idle { connections },
        brief: true,
        ours_alone,
        metrics,
    }
}

const START: &[Metric] = &[
    less("ready after", "ms", &[], None),
    less("first response through it after", "ms", &[Target::Within(300.0)], None),
];
