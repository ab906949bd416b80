//! The config file's values, where the command line says nothing.

use clap::ArgMatches;
use clap::parser::ValueSource;

use super::{
    CaptureArgs, Cli, Command, LimitArgs, LoggingArgs, RunArgs, SourceArgs, SteeringArgs, TimeoutArgs,
};
use crate::config::file::value::{Family, Level, LogForm, Protocol, Upstream};
use crate::config::file::{self, List};
use crate::failure::Failure;

/// Reads the config file, where one is named, into flags that were not given.
///
/// # Errors
/// As [`file::read`].
pub fn config_file(cli: &mut Cli, matches: &ArgMatches) -> Result<(), Failure> {
    let run = match &mut cli.command {
        None => &mut cli.run,
        Some(Command::Run(run) | Command::Check { run, .. } | Command::Doctor { run, .. }) => run,
        Some(_) => return Ok(()),
    };
    let Some(path) = run.config.as_deref() else { return Ok(()) };
    let (file, rules) = file::read(path)?;
    let matches = matches.subcommand().map_or(matches, |(_, of_command)| of_command);
    Unsaid(matches).take(file, run, &mut cli.logging);
    run.capture.rules = rules;
    Ok(())
}

/// What the command line does not say.
struct Unsaid<'a>(&'a ArgMatches);

impl Unsaid<'_> {
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
        let file::File { watch, capture, steer, source, log, timeouts, limits, rules: _ } = file;
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
        self.one("upstream", &mut args.upstream, file.upstream);
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

impl From<Protocol> for String {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
        .to_owned()
    }
}

impl From<Upstream> for String {
    fn from(upstream: Upstream) -> Self {
        match upstream {
            Upstream::Direct => "direct",
        }
        .to_owned()
    }
}
