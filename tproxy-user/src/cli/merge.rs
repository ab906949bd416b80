//! The config file's values, where the command line says nothing.

use clap::ArgMatches;
use clap::parser::ValueSource;

use super::{
    CaptureArgs, Cli, Command, LimitArgs, LoggingArgs, RunArgs, SourceArgs, SteeringArgs, TimeoutArgs,
};
use crate::config::Log;
use crate::config::file::value::{Family, Level, LogForm, Protocol};
use crate::config::file::{self, List};
use crate::failure::Failure;

/// Reads the config file, where one is named, into flags that were not given; for `reload`
/// the one that tells which proxy is meant.
///
/// # Errors
/// As [`file::read`].
pub fn config_file(cli: &mut Cli, matches: &ArgMatches) -> Result<(), Failure> {
    let run = match &mut cli.command {
        None => &mut cli.run,
        Some(Command::Run(run) | Command::Check { run, .. } | Command::Doctor { run, .. }) => run,
        Some(Command::Reload { run, .. }) => return pin(run, &Unsaid::of(matches)),
        Some(_) => return Ok(()),
    };
    let Some(path) = run.config.as_deref() else { return Ok(()) };
    let (file, resolved) = file::read(path)?;
    Unsaid::of(matches).take(file, run, &mut cli.logging);
    run.capture.rules = resolved.rules;
    run.source.upstreams = resolved.upstreams;
    Ok(())
}

/// The rules are the running proxy's business: it reads them, and tells what is wrong.
fn pin(run: &mut RunArgs, unsaid: &Unsaid<'_>) -> Result<(), Failure> {
    if let Some(path) = run.config.as_deref().filter(|_| unsaid.is("pin")) {
        unsaid.one("pin", &mut run.steering.pin, file::keys(path)?.steer.pin);
    }
    Ok(())
}

/// What the command line does not say.
struct Unsaid<'a>(&'a ArgMatches);

impl<'a> Unsaid<'a> {
    fn of(matches: &'a ArgMatches) -> Self {
        Self(matches.subcommand().map_or(matches, |(_, of_command)| of_command))
    }

    fn is(&self, flag: &str) -> bool {
        self.0.value_source(flag) != Some(ValueSource::CommandLine)
    }

    fn one<T, V: Into<T>>(&self, flag: &str, to: &mut T, value: Option<V>) {
        if let Some(value) = value.filter(|_| self.is(flag)) {
            *to = value.into();
        }
    }

    /// A list that was given replaces the file's.
    fn list<T, V: Into<T>>(&self, flag: &str, to: &mut Vec<T>, values: Option<List<V>>) {
        if let Some(values) = values.filter(|_| self.is(flag)) {
            *to = values.into_iter().map(Into::into).collect();
        }
    }

    fn take(&self, file: file::File, run: &mut RunArgs, logging: &mut LoggingArgs) {
        let file::File {
            watch,
            capture,
            steer,
            source,
            log,
            timeouts,
            limits,
            upstreams: _,
            groups: _,
            rules: _,
        } = file;
        self.one("watch", &mut run.watch, watch);
        self.capture(capture, &mut run.capture);
        self.steering(steer, &mut run.steering);
        self.source(&source, &mut run.source);
        self.log(&log, &mut run.source, logging);
        self.timeouts(timeouts, &mut run.timeouts);
        self.limits(limits, &mut run.limits);
    }

    fn capture(&self, file: file::Capture, args: &mut CaptureArgs) {
        self.list("interfaces", &mut args.interfaces, file.interfaces);
        self.list("proto", &mut args.proto, file.protocols);
        self.list("dport", &mut args.dport, file.ports);
        self.list("to", &mut args.to, file.to);
        self.list("not_to", &mut args.not_to, file.not_to);
        self.list("from", &mut args.from, file.from);
        self.list("not_from", &mut args.not_from, file.not_from);
        // Both flags say one thing: -4 is not "IPv4 too".
        if let Some(families) = file.families.filter(|_| self.is("v4") && self.is("v6")) {
            args.v4 = families.as_slice().contains(&Family::Ipv4);
            args.v6 = families.as_slice().contains(&Family::Ipv6);
        }
        self.one("own_traffic", &mut args.own_traffic, file.own_traffic);
        self.one("fail", &mut args.fail, file.fail);
    }

    fn steering(&self, file: file::Steer, args: &mut SteeringArgs) {
        self.one("steer", &mut args.steer, file.by);
        self.one("attach", &mut args.attach, file.attach);
        self.one("handshake", &mut args.handshake, file.handshake);
        self.one("on_port", &mut args.on_port, file.on_port);
        self.list("on_ip", &mut args.on_ip, file.on_ip);
        self.one("tproxy_mark", &mut args.tproxy_mark, file.tproxy_mark);
        self.one("own_mark", &mut args.own_mark, file.own_mark);
        self.one("table", &mut args.table, file.table);
        self.one("rule_priority", &mut args.rule_priority, file.rule_priority);
        self.one("pin", &mut args.pin, file.pin);
        self.one("bpf_log", &mut args.bpf_log, file.bpf_log);
    }

    fn source(&self, file: &file::Source, args: &mut SourceArgs) {
        self.one("source", &mut args.source, file.mode);
        self.list("upstream", &mut args.upstream, file.upstream.clone());
        self.one("send_proxy", &mut args.send_proxy, file.send_proxy);
    }

    fn log(&self, file: &file::Log, source: &mut SourceArgs, logging: &mut LoggingArgs) {
        self.one("access_log", &mut source.access_log, file.access);
        self.one("log_format", &mut logging.log_format, file.format.map(|form| form == LogForm::Json));
        if let Some(level) = file.level.filter(|_| self.is("verbose") && self.is("quiet")) {
            (logging.verbose, logging.quiet) = match level {
                Level::Error => (0, 2),
                Level::Warn => (0, 1),
                Level::Info => (0, 0),
                Level::Debug => (1, 0),
                Level::Trace => (2, 0),
            };
        }
    }

    fn timeouts(&self, file: file::Timeouts, args: &mut TimeoutArgs) {
        self.one("connect_timeout", &mut args.connect_timeout, file.connect);
        self.one("tcp_idle_timeout", &mut args.tcp_idle_timeout, file.tcp_idle);
        self.one("half_close_timeout", &mut args.half_close_timeout, file.half_close);
        self.one("udp_timeout", &mut args.udp_timeout, file.udp);
        self.one("udp_timeout_unreplied", &mut args.udp_timeout_unreplied, file.udp_unreplied);
        self.one("drain_timeout", &mut args.drain_timeout, file.drain);
    }

    fn limits(&self, file: file::Limits, args: &mut LimitArgs) {
        self.one("max_connections", &mut args.max_connections, file.max_connections);
        self.one("max_per_client", &mut args.max_per_client, file.max_per_client);
        self.one("max_udp_flows", &mut args.max_udp_flows, file.max_udp_flows);
        self.one("max_flows", &mut args.max_flows, file.max_flows.map(|entries| Some(entries.0)));
        self.one("workers", &mut args.workers, file.workers.map(|workers| Some(workers.0)));
    }
}

impl From<&LoggingArgs> for Log {
    fn from(args: &LoggingArgs) -> Self {
        let level = match (args.verbose, args.quiet) {
            (0, 0) => Level::Info,
            (0, 1) => Level::Warn,
            (0, _) => Level::Error,
            (1, _) => Level::Debug,
            (_, _) => Level::Trace,
        };
        Self { level, form: if args.log_format { LogForm::Json } else { LogForm::Text } }
    }
}

impl From<Protocol> for String {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
        .to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::resolve;
    use clap::{CommandFactory as _, FromArgMatches as _};
    use std::collections::BTreeSet;

    /// A flag by its id, what is typed, the key that says the same, and the key saying something else.
    const SAME: &[(&str, &str, &str, &str)] = &[
        ("watch", "--watch", "watch = true", "watch = false"),
        ("interfaces", "-i wg*", "capture.interfaces = 'wg*'", "capture.interfaces = ['a', 'b']"),
        ("proto", "--proto udp", "capture.protocols = ['udp']", "capture.protocols = 'tcp'"),
        ("dport", "--dport 53,80-90", "capture.ports = [53, '80-90']", "capture.ports = 1"),
        ("to", "--to 10.0.0.0/8", "capture.to = '10.0.0.0/8'", "capture.to = ['::1', '::2']"),
        ("not_to", "--not-to ::1", "capture.not_to = ['::1']", "capture.not_to = '::2'"),
        ("from", "--from ::1", "capture.from = ['::1']", "capture.from = '::2'"),
        ("not_from", "--not-from ::1", "capture.not_from = ['::1']", "capture.not_from = '::2'"),
        ("v4", "-4", "capture.families = 'ipv4'", "capture.families = 'ipv6'"),
        ("v6", "-6", "capture.families = ['ipv6']", "capture.families = ['ipv4', 'ipv6']"),
        ("own_traffic", "--own-traffic", "capture.own_traffic = true", "capture.own_traffic = false"),
        ("fail", "--fail closed", "capture.fail = 'closed'", "capture.fail = 'open'"),
        ("steer", "--steer none", "steer.by = 'none'", "steer.by = 'ebpf'"),
        ("attach", "--attach tcx", "steer.attach = 'tcx'", "steer.attach = 'clsact'"),
        ("handshake", "--handshake faithful", "steer.handshake = 'faithful'", "steer.handshake = 'eager'"),
        ("on_port", "--on-port 5", "steer.on_port = 5", "steer.on_port = 6"),
        ("on_ip", "--on-ip ::1,127.0.0.2", "steer.on_ip = ['::1', '127.0.0.2']", "steer.on_ip = '::'"),
        ("tproxy_mark", "--tproxy-mark 4/4", "steer.tproxy_mark = '0x4/0x4'", "steer.tproxy_mark = 8"),
        ("own_mark", "--own-mark 0x10", "steer.own_mark = 16", "steer.own_mark = '0x20'"),
        ("table", "--table 7", "steer.table = 7", "steer.table = 8"),
        ("rule_priority", "--rule-priority 7", "steer.rule_priority = 7", "steer.rule_priority = 8"),
        ("pin", "--pin /sys/fs/bpf/x", "steer.pin = '/sys/fs/bpf/x'", "steer.pin = '/sys/fs/bpf/y'"),
        ("bpf_log", "--bpf-log", "steer.bpf_log = true", "steer.bpf_log = false"),
        ("source", "--source proxy", "source.mode = 'proxy'", "source.mode = 'client-port'"),
        (
            "upstream",
            "--upstream socks5://10.0.0.2",
            "source.upstream = 'socks5://10.0.0.2'",
            "source.upstream = 'direct'",
        ),
        ("send_proxy", "--send-proxy v2", "source.send_proxy = 'v2'", "source.send_proxy = 'v1'"),
        ("access_log", "--access-log json", "log.access = 'json'", "log.access = 'text'"),
        ("log_format", "--log-format json", "log.format = 'json'", "log.format = 'text'"),
        ("verbose", "-v", "log.level = 'debug'", "log.level = 'error'"),
        ("quiet", "-qq", "log.level = 'error'", "log.level = 'trace'"),
        ("connect_timeout", "--connect-timeout 1s", "timeouts.connect = '1s'", "timeouts.connect = '2s'"),
        (
            "tcp_idle_timeout",
            "--tcp-idle-timeout 1h",
            "timeouts.tcp_idle = '60m'",
            "timeouts.tcp_idle = '1s'",
        ),
        (
            "half_close_timeout",
            "--half-close-timeout 1s",
            "timeouts.half_close = '1s'",
            "timeouts.half_close = '2s'",
        ),
        ("udp_timeout", "--udp-timeout 1s", "timeouts.udp = '1s'", "timeouts.udp = '2s'"),
        (
            "udp_timeout_unreplied",
            "--udp-timeout-unreplied 1s",
            "timeouts.udp_unreplied = '1s'",
            "timeouts.udp_unreplied = '2s'",
        ),
        ("drain_timeout", "--drain-timeout 0s", "timeouts.drain = '0s'", "timeouts.drain = '2s'"),
        (
            "max_connections",
            "--max-connections 7",
            "limits.max_connections = 7",
            "limits.max_connections = 8",
        ),
        ("max_per_client", "--max-per-client 0", "limits.max_per_client = 0", "limits.max_per_client = 8"),
        ("max_udp_flows", "--max-udp-flows 7", "limits.max_udp_flows = 7", "limits.max_udp_flows = 8"),
        ("max_flows", "--max-flows 1024", "limits.max_flows = 1024", "limits.max_flows = 2048"),
        ("workers", "--workers 7", "limits.workers = 7", "limits.workers = 8"),
    ];

    /// What these words mean with a config file of this content, as text to compare.
    fn with_file(words: &str, content: &str) -> Result<Cli, Failure> {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("t.toml");
        std::fs::write(&path, content).expect("written");
        let words = ["tproxy-user"].into_iter().chain(words.split_whitespace());
        let argv = words.map(Into::into).chain(["--config".into(), path.into_os_string()]);
        let matches = Cli::command().try_get_matches_from(argv).expect("flags");
        let mut cli = Cli::from_arg_matches(&matches).expect("flags");
        config_file(&mut cli, &matches)?;
        for run in [Some(&mut cli.run), cli.command.as_mut().and_then(run_of)].into_iter().flatten() {
            run.config = None;
        }
        Ok(cli)
    }

    fn run_of(command: &mut Command) -> Option<&mut RunArgs> {
        match command {
            Command::Run(run) | Command::Check { run, .. } | Command::Doctor { run, .. } => Some(run),
            _ => None,
        }
    }

    fn meaning(words: &str, content: &str) -> String {
        format!("{:?}", with_file(words, content).unwrap_or_else(|error| panic!("{error}: {content}")))
    }

    #[test]
    fn a_flag_and_its_key_mean_the_same_and_the_flag_goes_first() {
        for (_, flag, key, other) in SAME {
            for command in ["", "run", "check", "doctor --json"] {
                let words = format!("{command} {flag}");
                assert_eq!(meaning(command, key), meaning(&words, ""), "{words} and {key}");
                assert_eq!(meaning(&words, other), meaning(&words, ""), "{words} and {other}");
            }
            assert!(key == other || meaning("", key) != meaning("", other), "{key} and {other}");
        }
    }

    #[test]
    fn every_key_is_told() {
        let told = |content: &str| {
            let flags = match content {
                _ if content.starts_with("capture.interfaces") => "",
                "steer.by = 'none'" => "",
                _ => "-i eth0",
            };
            let mut cli = with_file(flags, content).expect(content);
            cli.run.config = Some("t.toml".into());
            resolve::logged(&cli.run, &cli.logging).expect(content).keys()
        };
        for (_, _, key, other) in SAME {
            let (one, two) = (told(key), told(other));
            let mut differ = one.iter().zip(&two).filter(|(one, two)| one != two);
            let name = key.split(" = ").next();
            assert!(key == other || differ.any(|((key, _), _)| Some(*key) == name), "{key} and {other}");
        }
    }

    #[test]
    fn every_flag_has_a_key() {
        let command = Cli::command();
        let visible = command.get_arguments().filter(|arg| !arg.is_hide_set());
        let flags: BTreeSet<_> =
            visible.map(|arg| arg.get_id().as_str()).filter(|flag| *flag != "config").collect();
        assert_eq!(SAME.iter().map(|(flag, ..)| *flag).collect::<BTreeSet<_>>(), flags);
    }

    #[test]
    fn reload_finds_the_proxy_of_the_same_flags() {
        let pin = |words: &str, content: &str| {
            let cli = with_file(&format!("reload {words}"), content).map_err(|error| error.to_string())?;
            let Some(Command::Reload { run, .. }) = cli.command else { panic!("not reload") };
            Ok::<_, String>(run.steering.pin.display().to_string())
        };
        let file = "steer.pin = '/sys/fs/bpf/x'\n[[rule]]\nto_file = 'missing'\naction = 'drop'";
        assert_eq!(pin("-i eth0 --dport 53", file), Ok("/sys/fs/bpf/x".to_owned()));
        assert_eq!(pin("--pin /sys/fs/bpf/y", file), Ok("/sys/fs/bpf/y".to_owned()));
        assert_eq!(pin("", ""), Ok("/sys/fs/bpf/tproxy".to_owned()));
        let error = pin("", "steer.pim = 1").expect_err("no such key");
        assert!(error.contains("t.toml:1:"), "{error}");
    }

    #[test]
    fn rules_come_along_and_contradictions_are_found() {
        let config = |words, content| {
            let cli = with_file(words, content)?;
            resolve::config(&cli.run)
        };
        let rule = "[[rule]]\naction = 'drop'";
        assert_eq!(config("-i eth0", rule).expect("valid").capture.rules.len(), 1);
        for (words, content, expected) in [
            ("", rule, "nothing to capture: name an interface"),
            ("--steer none", rule, "the rules of the config file are carried out by the eBPF programs"),
            ("-i eth0", "steer.own_mark = 1", "--own-mark 0x1 matches --tproxy-mark 0x1/0x1"),
            ("--steer none", "capture.interfaces = 'eth0'", "with --steer none"),
        ] {
            let error = config(words, content).expect_err(content).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn the_sample_has_the_defaults() {
        let sample = include_str!("../../../xtask/assets/tproxy.toml");
        let key = |line: &&str| line.starts_with(|first: char| first == '[' || first.is_ascii_lowercase());
        let in_force = |line: &'static str| line.strip_prefix('#').filter(key).unwrap_or(line);
        let lines: Vec<_> = sample
            .lines()
            .filter(|line| !line.ends_with("# example"))
            .map(in_force)
            .take_while(|line| *line != "[[upstream]]")
            .collect();
        assert!(lines.iter().filter(|line| line.contains('=')).count() > 25, "{lines:?}");
        let resolved = |content: &str| {
            let cli = with_file("-i eth0", content).unwrap_or_else(|error| panic!("{error}"));
            resolve::logged(&cli.run, &cli.logging).expect("valid")
        };
        assert_eq!(resolved(&lines.join("\n")), resolved(""));
    }
}
