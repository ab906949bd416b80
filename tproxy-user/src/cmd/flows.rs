//! `flows`: the flow table, for people and as JSON.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, SystemTime};

use aya::maps::MapError;
use aya::pin::PinError;
use nix::net::if_::if_indextoname;
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use serde_json::Value;
use tproxy_common::abi::{Addr, Flow, FlowKey, Origin, TCP, UDP, Verdict, map};

use crate::cli::DataArgs;
use crate::datapath;
use crate::failure::Failure;
use crate::instance::Paths;
use crate::instance::control::{self, Request};
use crate::instance::state::netns;
use crate::output::{self, Align, Table, bytes, span};

/// Prints the flow table.
///
/// # Errors
/// [`Failure::NotRunning`] (exit code 3) where none is pinned.
pub fn run(args: &DataArgs) -> anyhow::Result<()> {
    require_pinned(&args.pin)?;
    let clock = Clock::now()?;
    let names = Names::of(&args.pin)?;
    let mut flows: Vec<Row> = datapath::flows::read(&args.pin)
        .map_err(|error| explain(error, &args.pin))?
        .iter()
        .map(|(key, flow)| Row::new(key, flow, &clock, &names))
        .collect();
    flows.sort_by_key(|row| std::cmp::Reverse(row.last_seen_at));
    if args.json {
        output::print_json(&flows)?;
    } else if flows.is_empty() {
        output::print("no flows\n")?;
    } else {
        output::print(&table(&flows, clock.wall))?;
    }
    Ok(())
}

/// Says it in words where there is no flow table to read.
fn require_pinned(pin: &Path) -> Result<(), Failure> {
    let path = pin.join(map::FLOWS);
    match path.metadata() {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(Failure::NotRunning(format!(
            "no proxy is running with --pin {}: no flow table is pinned there",
            pin.display()
        ))),
        Err(error) => {
            Err(Failure::unsupported(format_args!("cannot look at {}: {error}; run as root", path.display())))
        }
    }
}

/// Reading a map takes a privilege of its own.
fn explain(error: MapError, pin: &Path) -> anyhow::Error {
    let denied = |error: &io::Error| error.kind() == ErrorKind::PermissionDenied;
    match &error {
        MapError::PinError { error: PinError::SyscallError(call), .. } | MapError::SyscallError(call)
            if denied(&call.io_error) =>
        {
            let path = pin.join(map::FLOWS);
            Failure::unsupported(format_args!("may not read {}; run as root", path.display())).into()
        }
        _ => error.into(),
    }
}

/// What numbers in the flow table mean, as the running proxy says.
#[derive(Debug, Default)]
struct Names {
    /// Interfaces; `None`: they are those of this process's network namespace.
    interfaces: Option<HashMap<u32, String>>,
    upstreams: HashMap<u16, String>,
}

impl Names {
    fn of(pin: &Path) -> anyhow::Result<Self> {
        let paths = Paths::of(pin);
        let elsewhere = paths.read_state()?.is_some_and(|state| state.netns != netns());
        // One that was killed has left its flows, and nobody to ask.
        let status = control::ask(&paths.control(), Request::Status).unwrap_or_default();
        let list = |key: &str| status[key].as_array().into_iter().flatten();
        let name = |item: &Value| item["name"].as_str().map(str::to_owned);
        let interface = |item: &Value| Some((u32::try_from(item["index"].as_u64()?).ok()?, name(item)?));
        let numbers = |item: &Value| {
            let numbers = item["numbers"].as_array().into_iter().flatten();
            let numbers = numbers.filter_map(|number| u16::try_from(number.as_u64()?).ok());
            numbers.filter_map(|number| Some((number, name(item)?))).collect::<Vec<_>>()
        };
        Ok(Self {
            interfaces: elsewhere.then(|| list("interfaces").filter_map(interface).collect()),
            upstreams: list("upstreams").flat_map(numbers).collect(),
        })
    }

    fn interface(&self, index: u32) -> String {
        let name = match &self.interfaces {
            Some(names) => names.get(&index).cloned(),
            None => if_indextoname(index).ok().and_then(|name| name.into_string().ok()),
        };
        name.unwrap_or_else(|| format!("if{index}"))
    }
}

/// Both clocks at one moment: the kernel stamps flows with `CLOCK_MONOTONIC`.
struct Clock {
    monotonic: Duration,
    wall: SystemTime,
}

impl Clock {
    fn now() -> nix::Result<Self> {
        let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC)?.into();
        Ok(Self { monotonic, wall: SystemTime::now() })
    }

    fn wall(&self, nanoseconds: u64) -> SystemTime {
        // A packet may have come in since the clocks were read.
        let then = Duration::from_nanos(nanoseconds);
        match self.monotonic.checked_sub(then) {
            Some(age) => self.wall.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH),
            None => self.wall,
        }
    }
}

/// A flow as `flows --json` has it.
#[derive(Debug, Serialize)]
struct Row {
    protocol: &'static str,
    client: SocketAddr,
    destination: SocketAddr,
    iface: String,
    origin: &'static str,
    action: &'static str,
    rule: Option<u16>,
    upstream: Option<String>,
    packets_up: u64,
    bytes_up: u64,
    packets_down: u64,
    bytes_down: u64,
    first_seen: String,
    last_seen: String,
    state: &'static str,
    #[serde(skip)]
    last_seen_at: SystemTime,
}

fn socket_address(address: Addr, port: u16) -> SocketAddr {
    let address = Ipv6Addr::from(address);
    SocketAddr::new(address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4), port)
}

fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}

impl Row {
    fn new(key: &FlowKey, flow: &Flow, clock: &Clock, names: &Names) -> Self {
        let (action, upstream) = match Verdict::from_raw(flow.verdict) {
            Some(Verdict::Pass) => ("pass", None),
            Some(Verdict::Reject) => ("reject", None),
            Some(Verdict::Drop) => ("drop", None),
            Some(Verdict::Divert) => ("divert", None),
            // The kernel program writes no other; one of a later version is not a reason to fail.
            // One that the proxy is asked about is there until it has decided.
            Some(Verdict::Proxy | Verdict::Ask) | None => {
                ("proxy", names.upstreams.get(&flow.target).cloned())
            }
        };
        let last_seen_at = clock.wall(flow.last_seen);
        Self {
            protocol: match key.protocol {
                TCP => "tcp",
                UDP => "udp",
                _ => "other",
            },
            client: socket_address(key.client, key.client_port),
            destination: socket_address(key.destination, key.destination_port),
            iface: names.interface(flow.ifindex),
            origin: match flow.origin {
                origin if origin == Origin::Own as u8 => "own",
                origin if origin == Origin::Uplink as u8 => "uplink",
                _ => "captured",
            },
            action,
            rule: (flow.rule != 0).then_some(flow.rule),
            upstream,
            packets_up: flow.packets_up,
            bytes_up: flow.bytes_up,
            packets_down: flow.packets_down,
            bytes_down: flow.bytes_down,
            first_seen: time(clock.wall(flow.first_seen)),
            last_seen: time(last_seen_at),
            state: flow.state(key.protocol).name(),
            last_seen_at,
        }
    }
}

fn table(flows: &[Row], now: SystemTime) -> String {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("PROTO", Left),
        ("CLIENT", Left),
        ("DESTINATION", Left),
        ("IFACE", Left),
        ("ACTION", Left),
        ("RULE", Right),
        ("STATE", Left),
        ("PKTS UP", Right),
        ("UP", Right),
        ("PKTS DOWN", Right),
        ("DOWN", Right),
        ("IDLE", Right),
    ]);
    for flow in flows {
        table.push([
            flow.protocol.to_owned(),
            flow.client.to_string(),
            flow.destination.to_string(),
            flow.iface.clone(),
            flow.action.to_owned(),
            flow.rule.map_or_else(|| "-".to_owned(), |rule| rule.to_string()),
            flow.state.to_owned(),
            flow.packets_up.to_string(),
            bytes(flow.bytes_up),
            flow.packets_down.to_string(),
            bytes(flow.bytes_down),
            span(now.duration_since(flow.last_seen_at).unwrap_or_default()),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tproxy_common::abi::mapped;
    use tproxy_common::flow::tcp_seen;

    fn example() -> Row {
        let key = FlowKey::up(TCP, mapped([10, 0, 0, 2]), mapped([192, 0, 2, 1]), 40000, 443);
        let flow = Flow {
            packets_up: 3,
            bytes_up: 2048,
            first_seen: 40_000_000_000,
            last_seen: 90_000_000_000,
            ifindex: 7,
            verdict: Verdict::Proxy as u8,
            seen_up: tcp_seen::SYN,
            ..Flow::default()
        };
        let clock = Clock {
            monotonic: Duration::from_secs(100),
            wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_100),
        };
        let names = Names {
            interfaces: Some(HashMap::from([(7, "eth7".to_owned())])),
            upstreams: HashMap::from([(0, "direct".to_owned())]),
        };
        Row::new(&key, &flow, &clock, &names)
    }

    #[test]
    fn json_is_the_contract() {
        let json = serde_json::to_string(&example()).expect("JSON");
        assert_eq!(
            json,
            r#"{"protocol":"tcp","client":"10.0.0.2:40000","destination":"192.0.2.1:443","iface":"eth7","origin":"captured","action":"proxy","rule":null,"upstream":"direct","packets_up":3,"bytes_up":2048,"packets_down":0,"bytes_down":0,"first_seen":"2001-09-09T01:47:20.000Z","last_seen":"2001-09-09T01:48:10.000Z","state":"new"}"#
        );
    }

    #[test]
    fn ipv6_is_in_brackets() {
        let address = "2001:db8::1".parse::<Ipv6Addr>().expect("address").octets();
        assert_eq!(socket_address(address, 53).to_string(), "[2001:db8::1]:53");
    }

    #[test]
    fn text_is_a_table() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_100);
        let text = table(&[example()], now);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(
            lines[1].starts_with("tcp    10.0.0.2:40000  192.0.2.1:443") && lines[1].ends_with("10s"),
            "{text}"
        );
    }

    #[test]
    fn nothing_pinned_is_not_running() {
        let error = require_pinned(Path::new("/nonexistent/tproxy")).expect_err("nothing there");
        assert_eq!(error.exit_code(), 3);
    }
}
