//! Rules over the group of who sends, which a program notes when a socket is made.

use std::net::UdpSocket;
use std::time::Duration;
use std::{io, thread};

use anyhow::{Context, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::proxy::{self, Proxy};
use xtask::lab::{Family, Lab, peer};

use crate::bad_input::expect_refusal;
use crate::common::{Scenarios, needs_proxy};
use crate::matching::{Way, judge, unused};
use crate::policy::{
    Client, ConfigFile,
    Fate::{Dropped, Passed, Proxied},
    reflectors_in, target,
};
use crate::snapshot::Snapshot;

pub(crate) const SCENARIOS: Scenarios = &[("policy_by_group", by_group)];

/// For both families at once.
pub(crate) const ONCE: Scenarios = &[("policy_by_group_needs_linux_5_9", old_kernel)];

const FLAGS: &str = "--iface lan --own-traffic";

/// A group that nobody else has.
const GROUP: u32 = 4711;

/// Who is in the group gets nowhere, and what others make from now on is passed.
const RULES: &str = "[[rule]]\ngid = '4711-4712'\naction = 'drop'\n\
                     [[rule]]\ngid = ['root', '1-4294967295']\naction = 'pass'\n";
const NO_RULES: &str = "[[rule]]\nuid = 4711\naction = 'drop'\n";

fn by_group(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _servers = reflectors_in(lab, family, &[1])?;
    let to = target(family, 1);
    let before = Snapshot::take(lab)?;
    let router = Client { namespace: &lab.router, address: family.uplink() };
    let config = ConfigFile::new(lab, NO_RULES)?;
    let proxy = config.launch(lab, FLAGS).start()?;
    let old = peer::udp(&lab.router, unused(family.uplink()))?;
    ensure!(!is_noted(lab), "groups are noted though no rule asks for them");
    as_group(GROUP, || router.expect(to, Proxied))?;

    config.write(RULES)?;
    proxy.cmd("reload")?.check()?;
    as_group(GROUP, || router.expect(to, Dropped))?;
    router.expect(to, Passed)?;
    // Which of them a client is in is not known here.
    Client::of(lab, family).expect(to, Proxied)?;
    // Nor is it of a socket that was there before.
    ensure!(way(&old, to)? == Way::Proxied, "a socket that is older than the rule has a group");

    detached(lab, &proxy)?;
    as_group(GROUP, || router.expect(to, Dropped)).context("once the program was put back")?;

    config.write(NO_RULES)?;
    proxy.cmd("reload")?.check()?;
    ensure!(!is_noted(lab), "groups are still noted though no rule asks for them any more");
    as_group(GROUP, || router.expect(to, Proxied))?;
    proxy.terminate(Duration::from_secs(10))?;
    Snapshot::take(lab)?.expect_same(&before)?;

    config.write(RULES)?;
    let proxy = config.launch(lab, FLAGS).start()?;
    as_group(GROUP, || router.expect(to, Dropped)).context("by rules that are there from the start")?;
    proxy.kill()?;
    as_group(GROUP, || router.expect(to, Dropped)).context("after kill -9")?;
    proxy::cleanup(lab)?;
    Snapshot::take(lab)?.expect_same(&before)?;
    as_group(GROUP, || router.expect(to, Passed)).context("after cleanup")
}

/// Neither a start nor a reload with what the kernel cannot do changes anything.
fn old_kernel(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let old = format!("{FLAGS} --assume-kernel 5.8");
    let config = ConfigFile::new(lab, RULES)?;
    expect_refusal(lab, &config.launch(lab, &old).command()?, 4, &["`gid`", "Linux 5.9"])?;
    config.write(NO_RULES)?;
    let proxy = config.launch(lab, &old).start()?;
    config.write(RULES)?;
    expect_refusal(lab, &proxy.cmd("reload")?, 4, &["`gid`", "Linux 5.9"])?;
    let _servers = reflectors_in(lab, Family::V4, &[1])?;
    let router = Client { namespace: &lab.router, address: Family::V4.uplink() };
    as_group(GROUP, || router.expect(target(Family::V4, 1), Proxied))
}

/// Another program detaches the one that notes groups: it is put back.
fn detached(lab: &Lab, proxy: &Proxy) -> Result<()> {
    lab.router.cmd("bpftool").args(["link", "detach", "pinned"]).arg(link(lab)).check()?;
    wait_for("the program at the control groups is put back", Duration::from_secs(5), || {
        Ok(proxy.counter("programs_put_back")? == 1)
    })
}

fn is_noted(lab: &Lab) -> bool {
    link(lab).exists()
}

fn link(lab: &Lab) -> std::path::PathBuf {
    lab.pin().join("links/tproxy_group")
}

/// The way that a datagram takes.
fn way(socket: &UdpSocket, to: std::net::SocketAddr) -> Result<Way> {
    let (seen, _) = peer::exchange(socket, to, b"who am I?")?;
    judge(String::from_utf8_lossy(&seen).parse()?, socket.local_addr()?)
}

/// Does something as a process of a group would.
fn as_group<T: Send>(group: u32, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    // Threads have groups of their own: what glibc does for all is left out, and what this one starts
    // has that of this one.
    const AS_IT_IS: libc::gid_t = libc::gid_t::MAX;
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: the call takes numbers.
            let result = unsafe { libc::syscall(libc::SYS_setresgid, group, AS_IT_IS, AS_IT_IS) };
            ensure!(result == 0, "setresgid {group}: {}", io::Error::last_os_error());
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
