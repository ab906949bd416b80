//! `cargo xtask demo`: the proxy at work, and proof that it was.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use xtask::lab::proxy::{FlowRecord, Launch};
use xtask::lab::sockets::Protocol;
use xtask::lab::{Cmd, Daemon, Family, Lab, Proxy, firewall, reclaim, server, url};

use crate::build::{self, Profile};
use crate::{needs, packages};

/// Flags of `cargo xtask demo`.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Where `tproxy-user` pins its maps unless told otherwise.
const PIN: &str = "/sys/fs/bpf/tproxy";

/// Bytes of the bulk transfer.
const BULK: usize = 64 << 20;

/// Tells what is going on, step by step, with the time that each took.
struct Steps {
    count: usize,
    current: Option<(String, Instant)>,
}

const STEPS: usize = 9;

impl Steps {
    fn begin(&mut self, what: &str) {
        self.end();
        self.count += 1;
        println!("\n[{}/{STEPS}] {what}", self.count);
        self.current = Some((what.to_owned(), Instant::now()));
    }

    fn end(&mut self) {
        if let Some((_, started)) = self.current.take() {
            println!("      done in {:.1} s", started.elapsed().as_secs_f64());
        }
    }
}

/// Prints what a program has said, set off from what the demo says.
fn quote(text: &str) {
    for line in text.trim_end().lines() {
        println!("      | {line}");
    }
}

fn say(text: &str) {
    println!("      {text}");
}

/// Runs the task.
pub(crate) fn run(_args: &Args) -> Result<()> {
    let started = Instant::now();
    reclaim::on_signals()?;
    let mut steps = Steps { count: 0, current: None };
    if let Err(error) = show(&mut steps) {
        let (number, step) = (steps.count, steps.current.map_or_else(String::new, |(step, _)| step));
        bail!(
            "step {number} ({step}) failed: {error:#}\nEverything that the demo had set up is removed. \
             `cargo xtask test netns` examines the same in single scenarios"
        );
    }
    steps.end();
    println!(
        "\nAll of it worked, and everything is removed again ({:.0} s).",
        started.elapsed().as_secs_f64()
    );
    println!(
        "To proxy what arrives on an interface: cargo xtask build-ebpf && sudo tproxy-user --iface eth0"
    );
    Ok(())
}

fn show(steps: &mut Steps) -> Result<()> {
    steps.begin("Programs that the demo uses");
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces and eBPF need root: run `sudo -E env PATH=\"$PATH\" cargo xtask demo`"
    );
    packages::ensure(needs::DEMO)?;
    say("all there");

    steps.begin("Build: eBPF programs, and the tproxy-user that embeds them");
    let artifacts = build::ensure_all(Profile::Release)?;
    say(&format!("eBPF object:  {}", artifacts.object.display()));
    say(&format!("tproxy-user:  {}", artifacts.tproxy_user.display()));

    steps.begin("Lab: client, router and server, each in a network namespace");
    let lab = Lab::new()?;
    say("client 192.0.2.2 ──── router .1 | .1 ──── server 198.51.100.2 and all of 198.18.0.0/15");
    say("client 2001:db8:1::2 ─ ::1 router ::1 ─── server 2001:db8:2::2 and all of 2001:db8:f000::/36");
    let web = server::web(&lab, &lab.server, &[80])?;
    let dns = server::dns(&lab, &lab.server, [Family::V4.anywhere(80), Family::V6.anywhere(80)])?;
    say("on the server: nginx (port 80) and dnsmasq (port 53)");

    steps.begin("Proxy: the real tproxy-user, on the router");
    let proxy = launch(&lab, artifacts.tproxy_user)?;

    steps.begin("TCP: web requests with curl");
    for family in Family::ALL {
        web_request(&lab, &web, family)?;
    }

    steps.begin("UDP: DNS questions with dig");
    for family in Family::ALL {
        dns_question(&lab, &dns, family)?;
    }

    steps.begin(&format!("Bulk: {} MiB with curl, checked by sha256sum", BULK >> 20));
    bulk(&lab)?;

    steps.begin("Counters: what the proxy saw, and the same from the kernel by bpftool");
    counters(&lab, &proxy)?;

    steps.begin("End: SIGTERM to the proxy, then nothing may be left");
    finish(&lab, proxy)
}

fn launch(lab: &Lab, binary: PathBuf) -> Result<Proxy> {
    let launch = Launch::new(lab, "--iface lan").binary(binary).pin(PIN);
    say("$ tproxy-user --iface lan");
    let proxy = launch.start().with_context(|| {
        format!("if a tproxy-user of this machine uses {PIN}, stop it for the time of the demo (`tproxy-user status`)")
    })?;
    let rules = lab.router.sh("ip rule show")?.stdout;
    let rules: Vec<&str> = rules.lines().filter(|line| line.contains("fwmark")).collect();
    quote(&rules.join(
        "
",
    ));
    for namespace in lab.namespaces() {
        let rules = firewall::rules(namespace)?;
        ensure!(rules.is_empty(), "there are packet filter rules on the {}:\n{rules}", namespace.role());
    }
    say("no iptables or nft rule in any of the namespaces (`nft list ruleset` prints nothing)");
    Ok(proxy)
}

fn web_request(lab: &Lab, web: &Daemon, family: Family) -> Result<()> {
    let destination = SocketAddr::new(family.anywhere(1), 80);
    let address = url(destination.ip(), 80, "/");
    let output =
        lab.client.cmd("curl").args(["--silent", "--show-error", "--max-time", "10", &address]).check()?;
    say(&format!("client $ curl {address}      (the server answers: who you are, whom you reached)"));
    quote(&output.stdout);
    let words: Vec<&str> = output.stdout.split_whitespace().collect();
    let [client, _, server, _] = words[..] else { bail!("an unexpected answer, {}", output.describe()) };
    let (client, server): (IpAddr, IpAddr) = (client.parse()?, server.parse()?);
    ensure!(client == family.client(), "the server saw {client} instead of the client's {}", family.client());
    ensure!(server == destination.ip(), "the client reached {server} instead of {}", destination.ip());
    let seen = logged(web, &format!("{client} "))?;
    say("server, access log of nginx: the client's own address");
    quote(&seen);
    Ok(())
}

fn dns_question(lab: &Lab, dns: &Daemon, family: Family) -> Result<()> {
    let resolver = family.anywhere(53);
    let answer = server::dig(&lab.client, resolver, family, Protocol::Udp)?;
    say(&format!("client $ dig @{resolver} {} {}", server::NAME, family.pick("A", "AAAA")));
    quote(&answer.to_string());
    ensure!(answer == family.anywhere(80), "expected {}", family.anywhere(80));
    let seen = logged(dns, &format!("{}/", family.client()))?;
    say("server, log of dnsmasq: the client's own address (and a port)");
    quote(&seen);
    Ok(())
}

/// The line of a server's log that has a text in it.
fn logged(daemon: &Daemon, text: &str) -> Result<String> {
    let deadline = Instant::now() + Duration::from_secs(3);
    loop {
        if let Some(line) = daemon.log().lines().find(|line| line.contains(text)) {
            return Ok(line.to_owned());
        }
        ensure!(Instant::now() < deadline, "the server did not see {text:?}, {}", daemon.describe());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn bulk(lab: &Lab) -> Result<()> {
    let (original, copy) = (lab.dir().join("www/bulk"), lab.dir().join("copy"));
    std::fs::write(&original, xtask::lab::peer::pattern(BULK))?;
    let sum = |path: &PathBuf| -> Result<String> {
        let output = Cmd::host("sha256sum").arg(path).check()?;
        output.stdout.split_whitespace().next().map(Into::into).context("no checksum")
    };
    let expected = sum(&original)?;
    for family in Family::ALL {
        let address = url(family.anywhere(2), 80, "/files/bulk");
        let download = lab.client.cmd("curl").args(["--silent", "--show-error", "--max-time", "60"]);
        let download =
            download.args(["--write-out", "%{speed_download}", "--output"]).arg(&copy).arg(&address);
        let output = download.timeout(Duration::from_secs(70)).check()?;
        let speed: f64 = output.stdout.trim().parse().context("curl told no speed")?;
        let got = sum(&copy)?;
        say(&format!(
            "{}: {:.1} Gbit/s, sha256 {}… at both ends",
            family.name(),
            speed * 8.0 / 1e9,
            &got[..16]
        ));
        ensure!(
            got == expected,
            "{}: the file arrived changed: sha256 {got}, expected {expected}",
            family.name()
        );
    }
    Ok(())
}

/// Packets and bytes each way of a flow, and what identifies it.
type Row = (String, u64, u64, [u64; 4]);

fn from_flows(flow: &FlowRecord) -> Result<Row> {
    let port = |text: &str| -> Result<u64> { Ok(text.parse::<SocketAddr>()?.port().into()) };
    let counters = [flow.packets_up, flow.bytes_up, flow.packets_down, flow.bytes_down];
    Ok((flow.protocol.clone(), port(&flow.client)?, port(&flow.destination)?, counters))
}

fn from_bpftool(entry: &Value) -> Result<Row> {
    // bpftool puts what BTF says beside the bare bytes.
    let (key, value) = (&entry["formatted"]["key"], &entry["formatted"]["value"]);
    let number = |object: &Value, name: &str| {
        object[name].as_u64().with_context(|| {
            format!("bpftool shows no field {name}: the map lacks BTF, or bpftool is older than 4.20")
        })
    };
    let protocol = if number(key, "protocol")? == 6 { "tcp" } else { "udp" };
    let counters = [
        number(value, "packets_up")?,
        number(value, "bytes_up")?,
        number(value, "packets_down")?,
        number(value, "bytes_down")?,
    ];
    Ok((protocol.into(), number(key, "client_port")?, number(key, "destination_port")?, counters))
}

fn counters(lab: &Lab, proxy: &Proxy) -> Result<()> {
    let dump = ["map", "dump", "pinned", &format!("{PIN}/FLOWS")].map(str::to_owned);
    let mut rows = (Vec::new(), Vec::new());
    // The last packets of closing connections may pass between the two readings.
    for _ in 0..20 {
        let flows = proxy.flows()?;
        rows.0 = flows.iter().map(from_flows).collect::<Result<_>>()?;
        let output = lab.router.cmd("bpftool").arg("--json").args(&dump).check()?;
        let entries: Vec<Value> = serde_json::from_str(&output.stdout).context("bpftool printed no JSON")?;
        rows.1 = entries.iter().map(from_bpftool).collect::<Result<_>>()?;
        rows.0.sort();
        rows.1.sort();
        if rows.0 == rows.1 {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    say("router $ tproxy-user flows");
    quote(&proxy.cmd("flows")?.check()?.stdout);
    say(&format!("router $ bpftool map dump pinned {PIN}/FLOWS      (its first entry)"));
    let text = lab.router.cmd("bpftool").args(&dump).check()?.stdout;
    // An entry ends where its object does, four columns in.
    let entry: Vec<&str> = text.lines().take_while(|line| !line.starts_with("    }")).collect();
    quote(&entry.join("\n"));
    ensure!(rows.0 == rows.1, "the two differ:\n`flows`: {:?}\nbpftool: {:?}", rows.0, rows.1);
    ensure!(
        rows.0.len() >= 6,
        "{} flows; expected at least 2 web requests, 2 questions, 2 transfers",
        rows.0.len()
    );
    let least = u64::try_from(BULK)?;
    let transfers = rows.0.iter().filter(|row| row.3[3] > least).count();
    ensure!(transfers == 2, "{transfers} flows of more than {least} bytes; expected the 2 transfers");
    say(&format!("the same {} flows with the same packets and bytes in both", rows.0.len()));
    Ok(())
}

fn finish(lab: &Lab, proxy: Proxy) -> Result<()> {
    let took = proxy.terminate(Duration::from_secs(20))?;
    say(&format!("the proxy ended after {:.1} s, exit code 0", took.as_secs_f64()));
    for (command, unwanted) in [
        ("ip rule show", "fwmark"),
        ("ip -6 rule show", "fwmark"),
        ("tc qdisc show", "clsact"),
        ("ip route show table all", "table 100"),
    ] {
        let output = lab.router.sh(command)?;
        ensure!(!output.stdout.contains(unwanted), "a leftover of the proxy: {}", output.describe());
    }
    ensure!(!std::path::Path::new(PIN).exists(), "the proxy left {PIN}");
    say("rules, routes, qdiscs and pins: as before");
    for family in Family::ALL {
        let plain =
            lab.client.cmd("curl").args(["--silent", "--max-time", "5", &url(family.anywhere(1), 80, "/")]);
        plain.check().context("the router does not forward any more")?;
    }
    say("and the router forwards again by itself");
    Ok(())
}
