//! Bad input: the exit codes of the contract, one clear line, nothing left behind.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};
use xtask::lab::proxy::{Launch, binary};
use xtask::lab::{Cmd, Family, Lab};

use crate::common::{Scenarios, at, expect_service, needs_proxy, service, start_proxy};
use crate::snapshot::Snapshot;

pub(crate) const SCENARIOS: Scenarios = &[
    ("bad_flags_exit_2", bad_flags),
    ("unknown_interface_exit_2", unknown_interface),
    ("no_root_exit_4", no_root),
    ("old_kernel_exit_4", old_kernel),
    ("port_taken_exit_5", port_taken),
    ("mark_taken_exit_5", mark_taken),
    ("table_taken_exit_5", table_taken),
    ("second_run_exit_5", second_run),
];

/// The command must end by itself with this code, say why in one line with all
/// these words, and leave nothing behind.
pub(crate) fn expect_refusal(lab: &Lab, command: &Cmd, code: i32, words: &[&str]) -> Result<()> {
    let before = Snapshot::take(lab)?;
    let output = command.run()?.expect_code(code)?;
    let lines: Vec<&str> = output.stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    ensure!(lines.len() == 1, "expected one line that says why, {}", output.describe());
    for word in words {
        ensure!(lines[0].contains(word), "the message does not name {word:?}, {}", output.describe());
    }
    Snapshot::take(lab)?.expect_same(&before).with_context(|| format!("after {}", output.describe()))
}

fn refused(lab: &Lab, flags: &str, code: i32, words: &[&str]) -> Result<()> {
    expect_refusal(lab, &Launch::new(lab, flags).command()?, code, words)
}

fn bad_flags(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let address = family.anywhere(1);
    let too_long = format!("{address}/{}", family.pick(33, 129));
    let half = format!("{address}/");
    for (flag, value) in [
        ("--to", too_long.as_str()),
        ("--not-to", half.as_str()),
        ("--from", "10.0.0.300/8"),
        ("--not-from", "lan"),
        ("--dport", "70000"),
        ("--dport", "20-10"),
        ("--proto", "sctp"),
        ("--tproxy-mark", "0x100/0x1"),
        ("--tproxy-mark", "one"),
        ("--on-port", "0x50"),
        ("--udp-timeout", "five"),
        ("--fail", "ajar"),
        ("--source", "nobody"),
    ] {
        // A usage error may be followed by the hint to --help.
        let before = Snapshot::take(lab)?;
        let output =
            Launch::new(lab, &format!("--iface lan {flag} {value}")).command()?.run()?.expect_code(2)?;
        ensure!(
            output.stderr.contains(value) && output.stderr.contains(flag),
            "the message names not both {flag} and {value}, {}",
            output.describe()
        );
        Snapshot::take(lab)?.expect_same(&before)?;
    }
    Launch::new(lab, "--iface lan --no-such-flag").command()?.run()?.expect_code(2)?;
    Ok(())
}

fn unknown_interface(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _ = family;
    refused(lab, "--iface nosuch0", 2, &["nosuch0"])?;
    refused(lab, "--iface lan --iface nosuch0", 2, &["nosuch0"])
}

/// A copy of the proxy where every user may read it; removed when dropped.
pub(crate) struct Copy(pub(crate) PathBuf);

impl Drop for Copy {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

pub(crate) fn readable_binary(lab: &Lab) -> Result<Copy> {
    let path = std::env::temp_dir().join(format!("{}-tproxy-user", lab.name()));
    std::fs::copy(binary()?, &path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Copy(path))
}

fn no_root(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _ = family;
    let binary = readable_binary(lab)?;
    let nobody =
        lab.router.cmd("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&binary.0);
    expect_refusal(lab, &nobody.args(["--iface", "lan", "--pin"]).arg(lab.pin()), 4, &["root"])
}

fn old_kernel(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _ = family;
    refused(lab, "--iface lan --assume-kernel 5.4", 4, &["5.4", "5.7"])
}

fn port_taken(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    for kind in [Type::STREAM, Type::DGRAM] {
        let address: IpAddr = family.loopback();
        let holder = lab.router.try_enter(|| {
            let socket = Socket::new(Domain::for_address(at(address, 15_001)), kind, None)?;
            socket.bind(&at(address, 15_001).into())?;
            if kind == Type::STREAM {
                socket.listen(1)?;
            }
            Ok(socket)
        })?;
        refused(lab, "--iface lan", 5, &["15001"])?;
        drop(holder);
    }
    Ok(())
}

fn mark_taken(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    lab.router.sh(&format!("ip {} rule add pref 900 fwmark 0x1/0x1 lookup 900", family.flag()))?;
    refused(lab, "--iface lan", 5, &["0x1"])?;
    // Another mark is free.
    let proxy = start_proxy(lab, "--iface lan --tproxy-mark 0x8/0x8")?;
    proxy.terminate(Duration::from_secs(10)).map(drop)
}

fn table_taken(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let net = family.pick("100.64.0.0/10", "2001:db8:6400::/48");
    lab.router.sh(&format!("ip route add {net} dev wan table 100"))?;
    refused(lab, "--iface lan", 5, &["100"])?;
    let proxy = start_proxy(lab, "--iface lan --table 101")?;
    proxy.terminate(Duration::from_secs(10)).map(drop)
}

/// The same instance twice: the second is refused, and the first goes on.
fn second_run(lab: &Lab, family: Family) -> Result<()> {
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, "--iface lan")?;
    let pid = proxy.daemon.pid().to_string();
    refused(lab, "--iface lan", 5, &[&pid])?;
    expect_service(lab, family)?;
    ensure!(proxy.counter("steered_tcp_new")? == 1, "the second run broke the first");
    Ok(())
}
