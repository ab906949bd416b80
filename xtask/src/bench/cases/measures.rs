//! The loads of the cases, what is told of each, and how good that has to be.

use crate::bench::measure::Load;
use crate::bench::peers::Peer;
use crate::bench::series::{Better, DIRECT, IPTABLES, Metric, Of, Plot, Target, figure};

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

pub(super) fn pass() -> Vec<Measure> {
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

pub(super) const BULK: &[Metric] = &[
    more(
        "rate",
        "Gbit/s",
        &[Target::AtLeast(0.95, DIRECT), Target::AtLeast(1.3, Of::BestPeer)],
        Some(Plot::Bulk),
    ),
    less("processor time", "s/GB", &[Target::AtMost(0.6, Of::BestPeer)], None),
    BUSY,
];

/// Shown for what it is: of other machines than these, with no device to segment.
pub(super) const BULK_PLAIN: &[Metric] =
    &[more("rate", "Gbit/s", &[], None), less("processor time", "s/GB", &[], None), BUSY];

/// Of the machine: with the client and the server.
const BUSY: Metric = less("all processors busy", "%", &[], None);

pub(super) fn bulk((streams, up): (u32, bool), metrics: &'static [Metric]) -> Measure {
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

pub(super) fn connections() -> Measure {
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

pub(super) fn alone() -> Measure {
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

pub(super) const EXCHANGE: &[Metric] = &[
    more("responses", "1/s", &[], Some(Plot::Connections)),
    less("response after, p50", "µs", MEDIAN, None),
    less("response after, p99", "µs", TAIL, None),
];

pub(super) const EXCHANGE_ALONE: &[Metric] = &[
    less("response after, p50", "µs", MEDIAN, Some(Plot::Latency)),
    less("response after, p99", "µs", TAIL, Some(Plot::Latency)),
];

pub(super) fn exchange(connections: u32, metrics: &'static [Metric]) -> Measure {
    let plural = if connections == 1 { "" } else { "s" };
    Measure {
        title: format!("requests on {connections} open connection{plural}"),
        load: Load::Exchange { connections },
        brief: connections == 1,
        ours_alone: false,
        metrics,
    }
}

pub(super) const UDP_EXCHANGE: &[Metric] = &[
    more(
        "responses",
        "1/s",
        &[Target::AtLeast(0.6, DIRECT), Target::AtLeast(2.0, Of::BestPeer)],
        Some(Plot::Udp),
    ),
    less("response after, p50", "µs", &[], None),
    less("response after, p99", "µs", &[], None),
];

pub(super) const UDP_NEW: &[Metric] = &[more(
    "answered",
    "1/s",
    &[Target::AtLeast(0.5, DIRECT), Target::AtLeast(2.0, Of::BestPeer)],
    Some(Plot::Udp),
)];

pub(super) fn udp_send(size: u32, flows: u32) -> Measure {
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

pub(super) fn udp_loss(size: u32, flows: u32) -> Measure {
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

pub(super) const MEMORY: &[Metric] = &[
    less("for each", "bytes", &[Target::Within(1024.0), Target::AtMost(1.0, Of::BestPeer)], None),
    IN_KERNEL,
];

pub(super) const MEMORY_OF_MANY: &[Metric] =
    &[less("for each", "bytes", &[Target::Within(1024.0)], None), IN_KERNEL];

/// Without a proxy that of client and server alone.
const IN_KERNEL: Metric = less("for each, in the kernel", "bytes", &[], None);

/// In whole thousands.
pub(super) const fn whole(connections: u64) -> u64 {
    connections / 1000 * 1000
}

pub(super) fn idle(connections: u64, metrics: &'static [Metric], ours_alone: bool) -> Measure {
    Measure {
        title: format!("{},000 idle connections", connections / 1000),
        load: Load::Idle { connections },
        brief: true,
        ours_alone,
        metrics,
    }
}

pub(super) const START: &[Metric] = &[
    less("ready after", "ms", &[], None),
    less("first response through it after", "ms", &[Target::Within(300.0)], None),
];
