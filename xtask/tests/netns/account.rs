//! Counters of a flow equal what a capture on the wire counts (F13).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::load::{Load, LoadServer};
use xtask::lab::pace;
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::proxy::FlowRecord;
use xtask::lab::{Family, Lab, Proxy, server};

use crate::capture::Capture;
use crate::common::{Scenarios, at, start_proxy};

pub(crate) const SCENARIOS: Scenarios = &[
    ("F13_tcp_bulk_counters_equal_the_wire", |lab, family| bulk(lab, family, false, "--iface lan")),
    ("F13_tcp_bulk_counters_with_offloads", |lab, family| bulk(lab, family, true, "--iface lan")),
    ("F13_udp_counters_equal_the_wire", |lab, family| udp(lab, family, "--iface lan")),
    ("F13_many_connections_on_several_cores", many),
    ("F13_eight_flows_of_each_protocol_at_once", eight),
    ("clsact_F13_tcp_bulk_counters", |lab, family| bulk(lab, family, true, "--iface lan --attach clsact")),
    ("clsact_F13_udp_counters", |lab, family| udp(lab, family, "--iface lan --attach clsact")),
];

/// Packets and bytes, up and down.
type Counters = [u64; 4];

fn told(flow: &FlowRecord) -> Counters {
    [flow.packets_up, flow.bytes_up, flow.packets_down, flow.bytes_down]
}

fn captured(capture: &Capture, flow: &FlowRecord) -> Result<Counters> {
    let protocol = if flow.protocol == "tcp" { 6 } else { 17 };
    let (client, destination): (SocketAddr, SocketAddr) = (flow.client.parse()?, flow.destination.parse()?);
    let (up, down) =
        (capture.count(protocol, client, destination), capture.count(protocol, destination, client));
    Ok([up.packets, up.bytes, down.packets, down.bytes])
}

/// Compares all flows with the capture; the last packets get a moment to pass.
pub(crate) fn expect_equal(proxy: &Proxy, capture: &Capture, least: usize) -> Result<()> {
    let mut differences = BTreeMap::new();
    let mut compared = 0;
    let equal = wait_for("equal counters", Duration::from_secs(5), || {
        differences.clear();
        let flows = proxy.flows()?;
        compared = flows.len();
        for flow in &flows {
            let (told, captured) = (told(flow), captured(capture, flow)?);
            if told != captured {
                let name =
                    format!("{} {} → {} ({})", flow.protocol, flow.client, flow.destination, flow.state);
                differences.insert(name, format!("flow table {told:?}, wire {captured:?}"));
            }
        }
        Ok(differences.is_empty())
    });
    capture.expect_complete()?;
    let shown: Vec<_> =
        differences.iter().take(10).map(|(flow, counters)| format!("\n  {flow}: {counters}")).collect();
    equal.with_context(|| {
        format!(
            "{} of {compared} flows differ from the wire [packets up, bytes up, packets down, bytes down]:{}",
            differences.len(),
            shown.concat()
        )
    })?;
    ensure!(compared >= least, "only {compared} flows are listed, expected at least {least}");
    Ok(())
}

fn bulk(lab: &Lab, family: Family, offloads: bool, flags: &str) -> Result<()> {
    if !offloads {
        for (namespace, device) in
            [(&lab.client, "eth0"), (&lab.router, "lan"), (&lab.router, "wan"), (&lab.server, "eth0")]
        {
            namespace.sh(&format!("ethtool --offload {device} tso off gso off gro off"))?;
        }
    }
    // One a run: a server that has not done with the last one turns the next away.
    let runs = [("--parallel=2", 5201), ("--reverse", 5202)];
    let _servers: Vec<_> =
        runs.iter().map(|(_, port)| server::iperf(lab, &lab.server, *port)).collect::<Result<_>>()?;
    let proxy = start_proxy(lab, flags)?;
    let capture = Capture::start(&lab.router, "lan")?;
    for (direction, port) in runs {
        let iperf = lab.client.cmd("iperf3").args([
            family.flag(),
            "--client",
            &family.anywhere(1).to_string(),
            "--port",
            &port.to_string(),
            "--bytes",
            &pace::share(12 << 20).to_string(),
            direction,
        ]);
        iperf.timeout(Duration::from_secs(30)).check()?;
    }
    // Two runs: three and two connections, one of each for control.
    expect_equal(&proxy, &capture, 5)
}

fn udp(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let targets: Vec<_> = (1..=3).map(|n| at(family.anywhere(n), 5300)).collect();
    let _servers = targets.iter().map(|to| UdpServer::echo(&lab.server, *to)).collect::<Result<Vec<_>>>()?;
    let proxy = start_proxy(lab, flags)?;
    let capture = Capture::start(&lab.router, "lan")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    for length in [0, 1, 1200, 1472, 1473, 4000, 30_000, 65_000] {
        for to in &targets {
            let datagram = peer::pattern(length);
            peer::exchange(&socket, *to, &datagram)?;
        }
    }
    expect_equal(&proxy, &capture, targets.len())
}

/// Eight connections and eight client ports, busy at the same time on two workers.
fn eight(lab: &Lab, family: Family) -> Result<()> {
    const FLOWS: u16 = 8;
    let _tcp = TcpServer::echo(&lab.server, at(family.unspecified(), 9010))?;
    let targets: Vec<_> = (1..=FLOWS).map(|n| at(family.anywhere(n), 9010)).collect();
    let _udp = targets.iter().map(|to| UdpServer::echo(&lab.server, *to)).collect::<Result<Vec<_>>>()?;
    let proxy = start_proxy(lab, "--iface lan --workers 2")?;
    let capture = Capture::start(&lab.router, "lan")?;
    std::thread::scope(|scope| {
        let busy: Vec<_> = targets
            .iter()
            .flat_map(|to| [scope.spawn(|| talk(lab, *to)), scope.spawn(|| exchanges(lab, family, *to))])
            .collect();
        busy.into_iter()
            .try_for_each(|flow| flow.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    expect_equal(&proxy, &capture, 2 * usize::from(FLOWS))
}

fn talk(lab: &Lab, to: SocketAddr) -> Result<()> {
    let mut stream = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
    for round in 0..40 {
        let line = "x".repeat(round * 1000);
        let (echo, _) = peer::ask(&mut stream, &line)?;
        ensure!(echo == line, "{} bytes to {to} came back changed", line.len());
    }
    Ok(())
}

fn exchanges(lab: &Lab, family: Family, to: SocketAddr) -> Result<()> {
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    for round in 0..100 {
        let datagram = peer::pattern(round * 37);
        let (echo, _) = peer::exchange(&socket, to, &datagram)?;
        ensure!(echo == datagram, "{} bytes to {to} came back changed", datagram.len());
    }
    Ok(())
}

fn many(lab: &Lab, family: Family) -> Result<()> {
    let count = u16::try_from(pace::share(3000))?;
    let _server = LoadServer::start(&lab.server, at(family.unspecified(), 9000), family.client())?;
    let proxy = start_proxy(lab, "--iface lan --workers 2")?;
    let capture = Capture::start(&lab.router, "lan")?;
    let load = Load {
        // Each to a destination of its own: a client that uses a port for a second connection to
        // one begins that flow again, while the capture counts both.
        targets: (1..=count).map(|n| at(family.anywhere(n), 9000)).collect(),
        concurrency: 64,
        connections: count.into(),
        duration: Duration::from_secs(20),
        reset: false,
    };
    load.run(&lab.client, &AtomicBool::new(false))?.expect_all(count.into())?;
    expect_equal(&proxy, &capture, count.into())
}
