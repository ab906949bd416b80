//! The program from its start to its end, and what it leaves.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tproxy_user::datapath::bpffs;

use super::world::{Outcome, Test, ensure, expect_as_before, picture, sh};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("pins_of_others_stay", pins_of_others_stay),
    ("a_pin_directory_elsewhere_leaves_nothing", a_pin_directory_elsewhere_leaves_nothing),
    ("a_hangup_ends_in_order", a_hangup_ends_in_order),
    ("nohup_is_respected", nohup_is_respected),
    ("clsact_interfaces_come_and_go", clsact_interfaces_come_and_go),
    ("a_failed_restart_leaves_nothing", a_failed_restart_leaves_nothing),
];

const PROGRAM: &str = env!("CARGO_BIN_EXE_tproxy-user");

/// A running proxy; killed where a test fails.
struct Proxy(Child);

impl Proxy {
    /// Starts it and waits until it captures.
    fn start(args: &[&str]) -> Result<Self, String> {
        Self::start_as(&[&[PROGRAM], args].concat())
    }

    /// The same, by way of another program that becomes it.
    fn start_as(words: &[&str]) -> Result<Self, String> {
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut log = BufReader::new(child.stderr.take().ok_or("no standard error")?).lines();
        let mut proxy = Self(child);
        let mut said = String::new();
        for line in log.by_ref().map_while(Result::ok) {
            said = said + &line + "\n";
            if line.contains("ready: ") {
                // A full pipe would stop the proxy.
                std::thread::spawn(move || log.for_each(drop));
                return Ok(proxy);
            }
        }
        Err(format!("not ready: {:?}: {said}", proxy.0.wait()))
    }

    fn signal(&self, signal: Signal) -> Outcome {
        let pid = i32::try_from(self.0.id()).map_err(|error| error.to_string())?;
        kill(Pid::from_raw(pid), signal).map_err(|error| error.to_string())
    }

    fn end(mut self, signal: Signal) -> Outcome {
        self.signal(signal)?;
        let status = self.0.wait().map_err(|error| error.to_string())?;
        ensure!(status.code() == Some(0), "{status} after {signal}");
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Gone already where the test went well.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Looks again for 5 s until it is so.
fn wait_for(what: &str, mut so: impl FnMut() -> bool) -> Outcome {
    let begun = Instant::now();
    while !so() {
        ensure!(begun.elapsed() < Duration::from_secs(5), "waited 5 s for: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn run(args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(PROGRAM).args(args).stdin(Stdio::null()).output().expect("program");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout) + &text(&output.stderr))
}

/// A directory that others share loses what is ours, and nothing else.
fn pins_of_others_stay() -> Outcome {
    let pin = Path::new("/sys/fs/bpf/plumbing-shared");
    bpffs::create(pin).map_err(|error| error.to_string())?;
    let others = [pin.join("others"), pin.join("links/others")];
    // The one thing that can be made on this file system without a program or map.
    let ours = [pin.join("FLOWS"), pin.join("links/2_tproxy_capture"), pin.join("links/tproxy_lookup")];
    for path in others.iter().chain(&ours) {
        std::os::unix::fs::symlink("nowhere", path).expect("made");
    }
    let (exit, text) = run(&["cleanup", "--pin=/sys/fs/bpf/plumbing-shared"]);
    let is_there = |path: &std::path::PathBuf| path.symlink_metadata().is_ok();
    let (stayed, left) = (others.iter().all(is_there), ours.iter().any(is_there));
    for path in &others {
        // Gone already where the test fails.
        drop(std::fs::remove_file(path));
    }
    let (again, _) = run(&["cleanup", "--pin=/sys/fs/bpf/plumbing-shared"]);
    ensure!(exit == Some(0) && stayed && !left, "exit {exit:?}, others {stayed}, ours {left}: {text}");
    ensure!(again == Some(0) && !pin.exists(), "the empty directory stayed");
    Ok(())
}

fn a_pin_directory_elsewhere_leaves_nothing() -> Outcome {
    sh("ip link add lan0 type bridge; ip link set lan0 up; ip addr add 10.1.0.1/24 dev lan0");
    let before = picture();
    let dir = tempfile::tempdir().expect("directory");
    let pin = dir.path().join("some/plumbing-elsewhere");
    let flag = format!("--pin={}", pin.display());
    // The second run must not stumble over the first.
    for _ in 0..2 {
        let (exit, text) = run(&["-i", "lan0", &flag]);
        let told = text.contains("not on a BPF file system") && !text.contains("killed run");
        ensure!(exit == Some(2) && told, "exit {exit:?}: {text}");
        ensure!(std::fs::read_dir(dir.path()).map_or(1, Iterator::count) == 0, "directories stayed");
        ensure!(!Path::new("/run/tproxy/plumbing-elsewhere").exists(), "state stayed");
    }
    // Files of others in such a directory are none of its business.
    std::fs::create_dir_all(&pin).expect("made");
    std::fs::write(pin.join("FLOWS"), "mine").expect("written");
    let (exit, text) = run(&["-i", "lan0", &flag]);
    ensure!(exit == Some(2) && pin.join("FLOWS").exists(), "exit {exit:?}: {text}");
    let (exit, text) = run(&["cleanup", &flag]);
    ensure!(exit == Some(0) && pin.join("FLOWS").exists(), "exit {exit:?}: {text}");
    expect_as_before(&before)
}

const ROUTER: &str = "ip link add lan0 type bridge; ip link set lan0 up; ip addr add 10.1.0.1/24 dev lan0; \
    ip link add wan0 type bridge; ip link set wan0 up; ip addr add 192.0.2.1/24 dev wan0";

/// The terminal that it was started from is closed.
fn a_hangup_ends_in_order() -> Outcome {
    sh(ROUTER);
    let before = picture();
    Proxy::start(&["-i", "lan0", "-4", "--pin=/sys/fs/bpf/plumbing-hangup"])?.end(Signal::SIGHUP)?;
    ensure!(!Path::new("/sys/fs/bpf/plumbing-hangup").exists(), "pins stayed");
    expect_as_before(&before)
}

fn nohup_is_respected() -> Outcome {
    sh(ROUTER);
    let args = ["nohup", PROGRAM, "-i", "lan0", "-4", "--pin=/sys/fs/bpf/plumbing-nohup"];
    let proxy = Proxy::start_as(&args)?;
    proxy.signal(Signal::SIGHUP)?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(sh("ip rule").contains("lookup 100"), "it ended");
    proxy.end(Signal::SIGTERM)
}

/// Filters of clsact stay when an interface leaves the plan for a while: it is
/// down, loses its addresses, gets another name. They must not pile up.
fn clsact_interfaces_come_and_go() -> Outcome {
    sh(ROUTER);
    let before = picture();
    let flags = ["-i", "lan*", "-4", "--attach", "clsact", "--pin=/sys/fs/bpf/plumbing-flap"];
    let proxy = Proxy::start(&flags)?;
    // Names of the programs, each as often as there is a filter with it.
    let filters = |interface: &str| {
        let of = |side| {
            let shown = sh(&format!("tc filter show dev {interface} {side}"));
            let words: Vec<_> = shown.split_whitespace().collect();
            let names = words.windows(2).filter(|pair| pair[0] == "name").map(|pair| pair[1].to_owned());
            names.collect::<Vec<_>>()
        };
        ["ingress", "egress"].map(of).concat().join(" ")
    };
    let (captured, uplink) = ("tproxy_capture tproxy_reply", "tproxy_uplink tproxy_nat");
    ensure!(filters("lan0") == captured, "lan0 at the start: {}", filters("lan0"));
    ensure!(filters("wan0") == uplink, "wan0 at the start: {}", filters("wan0"));
    for (away, back) in [
        ("ip link set wan0 down", "ip link set wan0 up"),
        ("ip addr flush dev wan0", "ip addr add 192.0.2.1/24 dev wan0"),
    ] {
        sh(away);
        wait_for(&format!("no filter after {away}"), || filters("wan0").is_empty())?;
        sh(back);
        wait_for(&format!("one filter a side after {back}"), || filters("wan0") == uplink)?;
    }
    // Another name, and what it is to the proxy changes with it.
    for (name, next, expected) in
        [("lan0", "lan1", captured), ("lan1", "up0", uplink), ("up0", "lan0", captured)]
    {
        sh(&format!("ip link set {name} down; ip link set {name} name {next}; ip link set {next} up"));
        let rule = format!("iif {next} lookup 100");
        wait_for(&format!("{next} to be attached"), || {
            filters(next) == expected && sh("ip rule").contains(&rule)
        })?;
        std::thread::sleep(Duration::from_millis(300));
        ensure!(filters(next) == expected, "{next}: {}", filters(next));
    }
    proxy.end(Signal::SIGTERM)?;
    expect_as_before(&before)
}

/// What a killed run left is taken over by the next, even by one that fails.
fn a_failed_restart_leaves_nothing() -> Outcome {
    sh(ROUTER);
    let before = picture();
    let flags = ["-i", "lan0", "-4", "--pin=/sys/fs/bpf/plumbing-restart"];
    // Dropped: killed.
    drop(Proxy::start(&flags)?);
    ensure!(picture() != before, "the killed run left nothing");
    let taken = std::net::TcpListener::bind("127.0.0.1:15001").expect("free");
    let (exit, text) = run(&flags);
    ensure!(exit == Some(5) && text.contains("15001"), "exit {exit:?}: {text}");
    drop(taken);
    ensure!(!Path::new("/sys/fs/bpf/plumbing-restart").exists(), "pins stayed");
    expect_as_before(&before)
}
