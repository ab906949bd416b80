//! 100,000 idle connections at a time: what each takes of the proxy's memory, and that it goes on
//! to work beside them. It takes minutes and gigabytes, so it runs only where it is named in full.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit};
use xtask::lab::daemon::wait_for;
use xtask::lab::load::{self, Load, LoadServer};
use xtask::lab::pace::patience;
use xtask::lab::selection::IDLE;
use xtask::lab::{Family, Lab, Proxy, note};

use crate::common::{at, start_proxy};

const PORT: u16 = 6500;
/// Idle connections in all.
const ALL: u64 = 100_000;
/// Those before what is counted: the proxy then gives back what its start has left.
const FIRST: u64 = 1000;
/// What each may take of the proxy's memory, as in the README's table.
const BYTES_EACH: u64 = 1024;
/// Sockets of this process, of both ends, or of the proxy; and room for everything else.
const OPEN_FILES: u64 = 2 * ALL + 2000;
/// Servers, taken in turn: the client has less than 20,000 ports for each.
const SERVERS: u64 = 64;
/// Connections that are opened at a time.
const OPENERS: u64 = 8;
/// After each of so many it is told how many are open.
const STEP: u64 = 10_000;
/// Connections that come and go beside the idle ones.
const EXCHANGES: u64 = 400;
/// One of so many idle ones is used again.
const AGAIN: usize = 100;

pub(crate) fn idle(lab: &Lab, family: Family) -> Result<()> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    ensure!(
        limit >= OPEN_FILES,
        "{limit} open files are allowed here, expected {OPEN_FILES}; in a virtual machine they are: \
         `cargo xtask test newest -- {IDLE}`"
    );
    let server = LoadServer::start(&lab.server, at(family.unspecified(), PORT), family.client())?;
    let proxy = start_proxy(lab, "--iface lan --max-connections 120000 --max-per-client 0")?;
    let (_, files_before) = (settled(&proxy)?, proxy.daemon.open_files()?);

    let mut held = open(lab, family, FIRST)?;
    let first = settled(&proxy)?;
    let started = Instant::now();
    held.extend(open(lab, family, ALL - FIRST)?);
    let took = started.elapsed();
    let memory = settled(&proxy)?;
    let each = memory.saturating_sub(first) / (ALL - FIRST);
    let files = proxy.daemon.open_files()?;
    note(&format!(
        "{ALL} idle connections, the last {} opened in {} s: {each} bytes of the proxy's memory for each, {} MB in all, \
         {files} descriptors",
        ALL - FIRST,
        took.as_secs(),
        memory / 1_000_000
    ));
    ensure!(each <= BYTES_EACH, "{each} bytes for each, from {first} to {memory}; expected {BYTES_EACH}");
    let load = Load {
        targets: vec![at(family.anywhere(1), PORT), at(family.anywhere(2), PORT)],
        concurrency: 8,
        connections: EXCHANGES,
        duration: Duration::from_secs(30),
        reset: false,
    };
    let report = load.run(&lab.client, &AtomicBool::new(false))?;
    report.expect_all(EXCHANGES)?;
    note(&format!("{EXCHANGES} connections with an exchange beside them: {:.0} a second", report.rate()));

    for stream in held.iter_mut().step_by(AGAIN) {
        load::ask(stream).context("a connection that was idle does not work any more")?;
    }
    relays(&proxy, ALL)?;
    ensure!(server.foreign() == 0, "{} connections did not come from the client's address", server.foreign());

    let closed = Instant::now();
    drop(held);
    relays(&proxy, 0)?;
    wait_for("all descriptors to come back", Duration::from_secs(10), || {
        Ok(proxy.daemon.open_files()? <= files_before)
    })?;
    note(&format!(
        "all closed within {} s: {files_before} descriptors as before",
        closed.elapsed().as_secs()
    ));
    proxy.terminate(Duration::from_secs(10)).map(drop)
}

/// Opens connections, one exchange on each; none may fail.
fn open(lab: &Lab, family: Family, connections: u64) -> Result<Vec<TcpStream>> {
    let opened = AtomicU64::new(0);
    let open_one = |number: u64| -> Result<TcpStream> {
        let server = at(family.anywhere(u16::try_from(1 + number % SERVERS)?), PORT);
        let mut stream = TcpStream::connect(server)?;
        stream.set_read_timeout(Some(patience(Duration::from_secs(10))))?;
        load::ask(&mut stream)?;
        let open = opened.fetch_add(1, Ordering::Relaxed) + 1;
        if open.is_multiple_of(STEP) {
            note(&format!("{open} of {connections} connections are open"));
        }
        Ok(stream)
    };
    let open_some = |opener: u64| -> Result<Vec<TcpStream>> {
        let numbers = (opener..connections).step_by(usize::try_from(OPENERS)?);
        numbers.map(|number| open_one(number).with_context(|| format!("connection {number}"))).collect()
    };
    // Threads are in the namespace of the one that starts them.
    let groups: Vec<_> = lab.client.enter(|| {
        thread::scope(|scope| {
            let openers: Vec<_> = (0..OPENERS).map(|opener| scope.spawn(move || open_some(opener))).collect();
            openers.into_iter().map(|opener| opener.join().expect("no panic")).collect()
        })
    })?;
    Ok(groups.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// Waits until the proxy relays so many connections.
fn relays(proxy: &Proxy, connections: u64) -> Result<()> {
    wait_for(&format!("the proxy to relay {connections} connections"), Duration::from_mins(2), || {
        // Who asks must not keep the processor from it.
        thread::sleep(patience(Duration::from_millis(200)));
        Ok(proxy.status()?["connections"]["tcp"] == connections)
    })
}

/// The proxy's memory, once it does not become less any more: what opening took is given back
/// some seconds later.
fn settled(proxy: &Proxy) -> Result<u64> {
    let mut last = u64::MAX;
    wait_for("the proxy to give memory back", Duration::from_mins(1), || {
        thread::sleep(Duration::from_secs(15));
        let memory = proxy.daemon.memory()?;
        Ok(std::mem::replace(&mut last, memory) <= memory)
    })?;
    Ok(last)
}
