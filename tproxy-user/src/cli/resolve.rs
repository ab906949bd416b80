//! What was typed → the configuration. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use tproxy_common::abi::{DEFAULT_MAX_FLOWS, MAX_WORKERS};

use super::{LoggingArgs, RunArgs};
use crate::config::upstream::Upstream;
use crate::config::{Capture, Config, Handshake, Limits, Log, Scope, Steer, Steering, Timeouts};
use crate::failure::Failure;

/// Builds the configuration of `run` and `check`, with the default log: see [`logged`].
///
/// # Errors
/// [`Failure::Usage`] where flags contradict each other.
pub fn config(args: &RunArgs) -> Result<Config, Failure> {
    let (capture, steering, timeouts, limits) = (&args.capture, &args.steering, &args.timeouts, &args.limits);
    if steering.steer == Steer::Ebpf && capture.interfaces.is_empty() && !capture.own_traffic {
        return Err(Failure::usage(
            "nothing to capture: name an interface with --iface NAME (or --own-traffic for what this host sends)",
        ));
    }
    if steering.steer == Steer::None && (capture.own_traffic || !capture.interfaces.is_empty()) {
        return Err(Failure::usage(
            "--iface and --own-traffic say what to capture, but with --steer none rules of yours do that",
        ));
    }
    if steering.steer == Steer::None && steering.handshake == Handshake::Faithful {
        return Err(Failure::usage(
            "--handshake faithful is done by the eBPF programs, but with --steer none rules of yours steer: leave out one of the two",
        ));
    }
    if args.watch && args.config.is_none() {
        return Err(Failure::usage(
            "--watch looks after the config file and what it names: name one with --config",
        ));
    }
    if steering.steer == Steer::None && !capture.rules.is_empty() {
        return Err(Failure::usage(
            "the rules of the config file are carried out by the eBPF programs, but with --steer none rules of yours steer: leave out one of the two",
        ));
    }
    let upstream = args
        .source
        .upstreams
        .find_all(&args.source.upstream)
        .map_err(|why| Failure::usage(format_args!("--upstream (source.upstream): {why}")))?;
    check_marks(args)?;
    let (on_ip4, on_ip6) = listen_addresses(&steering.on_ip, steering.steer)?;
    // Neither flag and both mean the same: both families.
    let (v4, v6) = (capture.v4 || !capture.v6, capture.v6 || !capture.v4);
    let tcp = capture.proto.iter().any(|proto| proto == "tcp");
    let mut config = Config {
        capture: Capture {
            interfaces: capture.interfaces.clone(),
            scope: Scope {
                tcp,
                udp: capture.proto.iter().any(|proto| proto == "udp"),
                v4,
                v6,
                ports: capture.dport.clone(),
                to: capture.to.clone(),
                not_to: capture.not_to.clone(),
                from: capture.from.clone(),
                not_from: capture.not_from.clone(),
            },
            rules: capture.rules.clone().into(),
            own_traffic: capture.own_traffic,
            fail: capture.fail,
        },
        steering: Steering {
            by: steering.steer,
            handshake: if tcp { steering.handshake } else { Handshake::Eager },
            attach: steering.attach,
            mark: steering.tproxy_mark,
            own_mark: steering.own_mark,
            table: steering.table,
            rule_priority: steering.rule_priority,
            on_ip4,
            on_ip6,
            on_port: steering.on_port,
            bpf_log: steering.bpf_log,
        },
        source: args.source.source,
        upstream,
        send_proxy: args.source.send_proxy,
        timeouts: Timeouts {
            connect: timeouts.connect_timeout,
            tcp_idle: timeouts.tcp_idle_timeout,
            half_close: timeouts.half_close_timeout,
            udp: timeouts.udp_timeout,
            udp_unreplied: timeouts.udp_timeout_unreplied,
            drain: timeouts.drain_timeout,
        },
        limits: Limits {
            connections: limits.max_connections,
            per_client: if limits.max_per_client == 0 { u32::MAX } else { limits.max_per_client },
            udp_flows: limits.max_udp_flows,
            flow_table: limits.max_flows.unwrap_or(DEFAULT_MAX_FLOWS),
        },
        workers: limits.workers.unwrap_or_else(cores),
        pin: steering.pin.clone(),
        log: Log::default(),
        access_log: args.source.access_log,
        files: Vec::new(),
        watch: args.watch,
        assume_kernel: steering.assume_kernel,
    };
    require_addresses(&config)?;
    config.files = files(args.config.as_ref(), &config);
    Ok(config)
}

/// Who looks a proxy server's name up asks a DNS server, which would be captured in its turn.
fn require_addresses(config: &Config) -> Result<(), Failure> {
    let named = config.upstreams().find(|upstream| upstream.has_name());
    match named.filter(|_| config.capture.own_traffic) {
        Some(upstream) => Err(Failure::usage(format_args!(
            "the upstream {upstream} is given by a name, and with --own-traffic the question for its address would be captured: give its address"
        ))),
        None => Ok(()),
    }
}

/// [`config`], with the log that flags of all commands tell of.
///
/// # Errors
/// As there.
pub fn logged(args: &RunArgs, logging: &LoggingArgs) -> Result<Config, Failure> {
    Ok(Config { log: logging.into(), ..config(args)? })
}

fn files(file: Option<&PathBuf>, config: &Config) -> Vec<PathBuf> {
    let of_rules = config.capture.rules.iter().flat_map(|rule| {
        let conditions = &rule.conditions;
        let networks = conditions.from.files.iter().chain(&conditions.to.files).map(|file| file.path.clone());
        networks.chain(conditions.domains.files.iter().map(|file| file.path.clone()))
    });
    let of_upstreams = config.upstreams().flat_map(Upstream::servers).flat_map(|server| server.files.clone());
    let mut files: Vec<_> = file.cloned().into_iter().chain(of_rules).chain(of_upstreams).collect();
    files.sort_unstable();
    files.dedup();
    files
}

/// Own packets must not look captured (they would come back to the proxy), and
/// captured packets must not look like the proxy's own (they would be let pass).
fn check_marks(args: &RunArgs) -> Result<(), Failure> {
    let (mark, own) = (args.steering.tproxy_mark, args.steering.own_mark);
    if own == 0 {
        return Err(Failure::usage(
            "--own-mark 0 would match every unmarked packet: expected at least one bit, such as 0x2",
        ));
    }
    if mark.matches(own) {
        return Err(Failure::usage(format_args!(
            "--own-mark {own:#x} matches --tproxy-mark {mark}, so the proxy's own packets would be captured again: give it bits of its own"
        )));
    }
    if args.capture.own_traffic && mark.value & !own == 0 {
        return Err(Failure::usage(format_args!(
            "--own-mark {own:#x} has all bits of --tproxy-mark {mark}, so with --own-traffic what the proxy sends would come back to it: give them bits of their own"
        )));
    }
    if mark.value & own == own {
        return Err(Failure::usage(format_args!(
            "--tproxy-mark {mark} has all bits of --own-mark {own:#x}, so captured packets would pass as the proxy's own: give them bits of their own"
        )));
    }
    Ok(())
}

fn listen_addresses(given: &[IpAddr], steer: Steer) -> Result<(Ipv4Addr, Ipv6Addr), Failure> {
    let (mut v4, mut v6) = match steer {
        Steer::Ebpf => (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST),
        Steer::None => (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED),
    };
    for (index, address) in given.iter().enumerate() {
        if given[..index].iter().any(|earlier| earlier.is_ipv4() == address.is_ipv4()) {
            return Err(Failure::usage(format_args!("--on-ip {address}: there can be one address a family")));
        }
        match address {
            IpAddr::V4(address) => v4 = *address,
            IpAddr::V6(address) => v6 = *address,
        }
    }
    Ok((v4, v6))
}

fn cores() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(cores).unwrap_or(MAX_WORKERS).min(MAX_WORKERS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser as _;
    use std::time::Duration;

    fn resolve(flags: &str) -> Result<Config, String> {
        let argv = std::iter::once("tproxy-user").chain(flags.split_whitespace());
        let cli = Cli::try_parse_from(argv).map_err(|error| error.to_string())?;
        config(&cli.run).map_err(|error| {
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        })
    }

    #[test]
    fn defaults() {
        let config = resolve("--iface eth0").expect("valid");
        assert!(
            config.capture.scope.tcp
                && config.capture.scope.udp
                && config.capture.scope.v4
                && config.capture.scope.v6
        );
        assert_eq!(config.steering.mark.to_string(), "0x1/0x1");
        assert_eq!((config.steering.own_mark, config.steering.table), (2, 100));
        assert_eq!(config.steering.on_ip(false).to_string(), "127.0.0.1");
        assert_eq!(config.timeouts.tcp_idle, Duration::from_mins(124));
        assert_eq!(config.limits.flow_table, DEFAULT_MAX_FLOWS);
        assert!((1..=MAX_WORKERS).contains(&config.workers));
        assert_eq!(config.pin.to_string_lossy(), "/sys/fs/bpf/tproxy");
    }

    #[test]
    fn faithful_handshakes_need_tcp_and_the_programs() {
        let handshake = |flags| resolve(flags).map(|config| config.steering.handshake);
        assert_eq!(handshake("--iface eth0"), Ok(Handshake::Eager));
        assert_eq!(handshake("--iface eth0 --handshake faithful"), Ok(Handshake::Faithful));
        assert_eq!(handshake("--iface eth0 --handshake faithful --proto udp"), Ok(Handshake::Eager));
        assert!(handshake("--steer none --handshake faithful").is_err());
    }

    #[test]
    fn families_and_protocols() {
        let config = resolve("-i eth0 -4 --proto udp").expect("valid");
        assert!(
            config.capture.scope.v4
                && !config.capture.scope.v6
                && !config.capture.scope.tcp
                && config.capture.scope.udp
        );
        let config = resolve("-i eth0 -46 --proto tcp --proto udp").expect("valid");
        assert!(
            config.capture.scope.v4
                && config.capture.scope.v6
                && config.capture.scope.tcp
                && config.capture.scope.udp
        );
    }

    #[test]
    fn lists_repeat_and_join() {
        let config =
            resolve("-i a -i b* --dport 53,80 --dport 1000-2000 --to 10.0.0.0/8,fd00::/8 --not-to 10.1.2.3")
                .expect("valid");
        assert_eq!(config.capture.interfaces, ["a", "b*"]);
        assert_eq!(config.capture.scope.ports, [(53, 53), (80, 80), (1000, 2000)]);
        assert_eq!((config.capture.scope.to.len(), config.capture.scope.not_to[0].prefix_len()), (2, 32));
    }

    #[test]
    fn marks_must_differ() {
        for bad in [
            "--own-mark 0x1",
            "--own-mark 0x3",
            "--own-mark 0",
            "--tproxy-mark 0x2/0x2",
            "--tproxy-mark 0x3/0x3",
            "--tproxy-mark 0x2",
        ] {
            let error = resolve(&format!("-i eth0 {bad}")).expect_err(bad);
            assert!(error.contains("--own-mark"), "{error}");
        }
        let superset = "--tproxy-mark 0x1 --own-mark 0xff";
        assert!(resolve(&format!("-i eth0 {superset}")).is_ok());
        let error = resolve(&format!("--own-traffic {superset}")).expect_err("a loop");
        assert!(error.contains("would come back"), "{error}");
        for good in ["--tproxy-mark 0x1", "--own-mark 0x100", "--tproxy-mark 0x2/0x2 --own-mark 0x4"] {
            assert!(resolve(&format!("-i eth0 {good}")).is_ok(), "{good}");
        }
    }

    #[test]
    fn contradictions() {
        assert!(resolve("").expect_err("nothing to capture").contains("--iface"));
        assert!(resolve("--own-traffic").is_ok());
        assert!(resolve("--steer none").is_ok());
        assert!(resolve("--steer none -i eth0").is_err());
        assert!(resolve("-i eth0 --on-ip 127.0.0.2 --on-ip 127.0.0.3").is_err());
        let config = resolve("--steer none --on-ip ::1").expect("valid");
        assert_eq!(config.steering.on_ip(false).to_string(), "0.0.0.0");
        assert_eq!(config.steering.on_ip(true).to_string(), "::1");
        assert_eq!(resolve("-i e --max-per-client 0").expect("valid").limits.per_client, u32::MAX);
    }

    #[test]
    fn bad_values_name_the_flag_and_what_was_given() {
        for (flags, expected) in [
            (
                "-i e --to 10.0.0.1/8",
                "'10.0.0.1/8' for '--to <CIDR>': it has bits after the prefix; expected 10.0.0.0/8",
            ),
            ("-i e --udp-timeout 5", "'5' for '--udp-timeout <TIME>': expected a number with its unit"),
            ("-i e --workers 65", "65"),
            (
                "-i e --upstream socks://h:1",
                "--upstream (source.upstream): 'socks' is no protocol of an upstream",
            ),
            ("--own-traffic --upstream socks5://exit.example", "give its address"),
            ("-i e --upstream exit", "'exit': no [[upstream]] or [[group]] has this name; expected direct"),
            ("-i e --rule-priority 40000", "40000"),
        ] {
            let error = resolve(flags).expect_err(flags);
            assert!(error.contains(expected), "{error}");
        }
    }
}
