//! A configuration by the keys of the config file: what each comes to.

use std::fmt::Display;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::{Capture, Config, Limits, Log, Scope, Steering, Timeouts};

/// A key, and what its value comes to in words.
pub type Key = (&'static str, String);

impl Config {
    /// All keys, in the order of the file, but for rules: these are told by themselves.
    #[must_use]
    pub fn keys(&self) -> Vec<Key> {
        // Without `..`, so that no field is forgotten.
        let Self {
            capture,
            steering,
            source,
            upstream,
            send_proxy,
            timeouts,
            limits,
            workers,
            pin,
            log,
            access_log,
            files: _,
            watch,
            assume_kernel: _,
        } = self;
        let Capture { interfaces, scope, rules: _, own_traffic, fail } = capture;
        let Scope { tcp, udp, v4, v6, ports, to, not_to, from, not_from } = scope;
        let Steering {
            by,
            handshake,
            attach,
            mark,
            own_mark,
            table,
            rule_priority,
            on_ip4,
            on_ip6,
            on_port,
            bpf_log,
        } = steering;
        let Timeouts { connect, tcp_idle, half_close, udp: udp_replied, udp_unreplied, drain } = timeouts;
        let Limits { connections, per_client, udp_flows, flow_table } = limits;
        let Log { level, form } = log;
        let ports = ports
            .iter()
            .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") });
        vec![
            ("watch", watch.to_string()),
            ("capture.interfaces", list(interfaces)),
            ("capture.protocols", chosen([(*tcp, "tcp"), (*udp, "udp")])),
            ("capture.ports", list(ports)),
            ("capture.to", list(to)),
            ("capture.not_to", list(not_to)),
            ("capture.from", list(from)),
            ("capture.not_from", list(not_from)),
            ("capture.families", chosen([(*v4, "ipv4"), (*v6, "ipv6")])),
            ("capture.own_traffic", own_traffic.to_string()),
            ("capture.fail", word(fail)),
            ("steer.by", word(by)),
            ("steer.attach", word(attach)),
            ("steer.handshake", word(handshake)),
            ("steer.on_port", on_port.to_string()),
            ("steer.on_ip", format!("{on_ip4}, {on_ip6}")),
            ("steer.tproxy_mark", mark.to_string()),
            ("steer.own_mark", format!("{own_mark:#x}")),
            ("steer.table", table.to_string()),
            ("steer.rule_priority", rule_priority.to_string()),
            ("steer.pin", pin.display().to_string()),
            ("steer.bpf_log", bpf_log.to_string()),
            ("source.mode", word(source)),
            ("source.upstream", upstream.to_string()),
            ("source.send_proxy", send_proxy.to_string()),
            ("log.level", word(level)),
            ("log.format", word(form)),
            ("log.access", word(access_log)),
            ("timeouts.connect", time(*connect)),
            ("timeouts.tcp_idle", time(*tcp_idle)),
            ("timeouts.half_close", time(*half_close)),
            ("timeouts.udp", time(*udp_replied)),
            ("timeouts.udp_unreplied", time(*udp_unreplied)),
            ("timeouts.drain", time(*drain)),
            ("limits.max_connections", connections.to_string()),
            (
                "limits.max_per_client",
                if *per_client == u32::MAX { "no bound".to_owned() } else { per_client.to_string() },
            ),
            ("limits.max_udp_flows", udp_flows.to_string()),
            ("limits.max_flows", flow_table.to_string()),
            ("limits.workers", workers.to_string()),
        ]
    }
}

fn list<T: Display>(values: impl IntoIterator<Item = T>) -> String {
    values.into_iter().map(|value| value.to_string()).collect::<Vec<_>>().join(", ")
}

fn chosen(all: [(bool, &str); 2]) -> String {
    list(all.into_iter().filter(|(chosen, _)| *chosen).map(|(_, name)| name))
}

fn time(time: Duration) -> String {
    humantime::format_duration(time).to_string()
}

/// A choice, as the file names it.
fn word(choice: impl Serialize) -> String {
    serde_json::to_value(choice).ok().as_ref().and_then(Value::as_str).unwrap_or_default().to_owned()
}
