//! Every case against the server, both as programs, on loopback in a network namespace of
//! their own. Without root they are shown as ignored.

#[path = "../../../tproxy-user/tests/harness/mod.rs"]
mod harness;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use clap::Parser as _;
use libtest_mimic::Trial;
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_tproxy-load");

/// A family, the range of its loopback addresses, and the one that clients come from.
type Family = (&'static str, &'static str, &'static str);

const FAMILIES: [Family; 2] = [("v4", "127.0.0.1/4", "127.0.0.1"), ("v6", "::1/1", "::1")];

fn main() {
    let root = nix::unistd::geteuid().is_root();
    let trials = FAMILIES
        .map(|family| {
            let run = move || {
                unshare(CloneFlags::CLONE_NEWNET)?;
                let status = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
                assert!(status.success(), "ip: {status}");
                all_cases(family);
                Ok(())
            };
            let name = format!("every_case_reaches_the_server_{}", family.0);
            Trial::test(name, run).with_kind("needs root").with_ignored_flag(!root)
        })
        .into();
    let (arguments, trials) = harness::CommandLine::parse().select(trials);
    libtest_mimic::run(&arguments, trials).exit();
}

/// A program that ends when its stdin does.
struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(PROGRAM);
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("tproxy-load starts");
        let stdout = BufReader::new(child.stdout.take().expect("its stdout"));
        Self { stdin: child.stdin.take(), stdout, child }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("a line");
        line
    }

    fn counters(&mut self) -> Value {
        writeln!(self.stdin.as_mut().expect("its stdin"), "read").expect("the server reads");
        serde_json::from_str(&self.line()).expect("JSON")
    }

    fn end(mut self) {
        self.stdin = None;
        let status = self.child.wait().expect("it ends");
        assert!(status.success(), "{status}");
    }
}

/// Runs a case for a short time.
fn case(targets: &str, arguments: &str) -> Value {
    let output = Command::new(PROGRAM)
        .args(arguments.split(' '))
        .args(["--targets", targets, "--seconds", "0.3"])
        .output()
        .expect("tproxy-load runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{arguments}: {}: {errors}", output.status);
    serde_json::from_slice(&output.stdout).expect("one line of JSON")
}

fn all_cases((family, targets, client): Family) {
    let mut server = Running::start(&["serve", "--family", family, "--expect", client]);
    assert_eq!(server.line(), "ready\n");
    let mut before = server.counters();
    // How far a counter of the server went since the last time.
    let mut since = |server: &mut Running, names: [&str; 2]| {
        let now = server.counters();
        let differences = names.map(|name| number(&now[name]) - number(&before[name]));
        before = now;
        differences
    };

    let told = case(targets, "connect --concurrency 8");
    assert_rate(&told, "completed");
    assert_percentiles(&told["connected_us"]);
    assert_percentiles(&told["first_byte_us"]);
    assert_eq!(told["failed"], 0);
    let [connections, bytes] = since(&mut server, ["tcp_connections", "tcp_received_bytes"]);
    let completed = number(&told["completed"]);
    // Those that were under way at the end are not told of.
    assert!((completed..=completed + 8).contains(&connections), "{connections} connections: {told}");
    assert_eq!(bytes, connections * 64);

    let told = case(targets, "connect --concurrency 2 --limit 50");
    assert_eq!((&told["completed"], &told["failed"]), (&50.into(), &0.into()));
    assert_eq!(since(&mut server, ["tcp_connections", "tcp_sent_bytes"]), [50, 50 * 64]);

    let told = case(targets, "exchange --connections 10");
    assert_rate(&told, "completed");
    assert_percentiles(&told["response_us"]);
    assert_eq!(told["failed"], 0);
    let [connections, bytes] = since(&mut server, ["tcp_connections", "tcp_sent_bytes"]);
    assert_eq!(connections, 10);
    // One on each to begin with, and one on each at the end.
    let completed = number(&told["completed"]);
    assert!((completed..=completed + 20).contains(&(bytes / 64)), "{bytes} bytes: {told}");

    for (direction, counter) in [("up", "tcp_received_bytes"), ("down", "tcp_sent_bytes")] {
        let told = case(targets, &format!("bulk --streams 3 --direction {direction}"));
        let [connections, bytes] = since(&mut server, ["tcp_connections", counter]);
        assert_eq!(connections, 3);
        let (told, rate) = (number(&told["bytes"]), told["gbit_per_second"].as_f64().expect("a rate"));
        assert!(told > 10 << 20 && rate > 0.1, "{direction}: {told} bytes, {rate} Gbit/s");
        // What is in buffers at the end differs.
        assert!(
            bytes.abs_diff(told) < 64 << 20,
            "{direction}: the server had {bytes} bytes, the client {told}"
        );
    }

    let told = case(targets, "udp-exchange --flows 20 --size 300");
    assert_rate(&told, "completed");
    assert_percentiles(&told["response_us"]);
    assert_eq!(told["lost"], 0);
    let [echoed, _] = since(&mut server, ["udp_echoed", "udp_received"]);
    let completed = number(&told["completed"]);
    assert!((completed..=completed + 20).contains(&echoed), "{echoed} echoed: {told}");

    let told = case(targets, "udp-new --in-flight 5");
    assert_rate(&told, "completed");
    assert_eq!(told["lost"], 0);
    let [echoed, _] = since(&mut server, ["udp_echoed", "udp_received"]);
    let completed = number(&told["completed"]);
    assert!((completed..=completed + 5).contains(&echoed), "{echoed} echoed: {told}");

    for gso in ["", " --gso"] {
        let told = case(targets, &format!("udp-send --flows 3 --size 100 --rate 5000{gso}"));
        let sent = number(&told["sent"]);
        // At an even rate for 0.3 s; a machine that is slow may not come to all.
        assert!((500..=1510).contains(&sent), "{told}");
        assert_eq!(since(&mut server, ["udp_received", "udp_received_bytes"]), [sent, sent * 100]);
    }
    assert_rate(&case(targets, "udp-send --flows 3 --size 100"), "sent");

    let mut idle = Running::start(&["idle", "--targets", targets, "--connections", "100"]);
    assert_eq!(idle.line(), "{\"open\":100,\"failed\":0}\n");
    idle.end();

    assert_eq!(server.counters()["foreign"], 0);
    server.end();
    foreign_senders_are_counted(family, targets);
    failures_are_told(targets);
}

fn foreign_senders_are_counted(family: &str, targets: &str) {
    let mut server = Running::start(&["serve", "--family", family, "--expect", "192.0.2.1"]);
    assert_eq!(server.line(), "ready\n");
    case(targets, "connect --concurrency 1 --limit 5");
    assert_eq!(server.counters()["foreign"], 5);
    case(targets, "udp-send --flows 1 --size 1 --rate 100");
    case(targets, "udp-exchange --flows 1");
    let told = server.counters();
    let datagrams = number(&told["udp_received"]) + number(&told["udp_echoed"]);
    assert_eq!(number(&told["foreign"]), 5 + datagrams);
    server.end();
}

/// Where there is no server.
fn failures_are_told(targets: &str) {
    let run = |arguments: &str| {
        let mut command = Command::new(PROGRAM);
        command.args(arguments.split(' ')).args(["--targets", targets, "--seconds", "0.1"]);
        command.output().expect("tproxy-load runs")
    };
    let output = run("connect --concurrency 4 --limit 20");
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&told["completed"], &told["failed"]), (&0.into(), &20.into()));
    assert!(String::from_utf8_lossy(&output.stderr).contains("Connection refused"), "{output:?}");

    let output = run("bulk --streams 1 --direction up");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot connect to"), "{output:?}");

    let output = run("udp-new --in-flight 4");
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&told["completed"], &told["lost"]), (&0.into(), &4.into()));
}

fn number(value: &Value) -> u64 {
    value.as_u64().expect("a number")
}

/// Something happened, all the time, and as often as is told.
fn assert_rate(told: &Value, what: &str) {
    let (seconds, rate) = (told["seconds"].as_f64(), told["per_second"].as_f64());
    let (seconds, rate) = (seconds.expect("seconds"), rate.expect("a rate"));
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let count = number(&told[what]) as f64;
    assert!(count > 100.0 && seconds >= 0.3, "{told}");
    assert!((count / seconds - rate).abs() < 1.0, "{told}");
}

fn assert_percentiles(told: &Value) {
    let [p50, p90, p99, max] = ["p50", "p90", "p99", "max"].map(|name| told[name].as_f64().expect(name));
    assert!(0.0 < p50 && p50 <= p90 && p90 <= p99 && p99 <= max && max < 1e6, "{told}");
}
