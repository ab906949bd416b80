//! Connections and flows come and go for a while: descriptors and memory come
//! back to where they were (F12).

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::load::{Load, LoadServer};
use xtask::lab::pace::patience;
use xtask::lab::peer::{self, UdpServer};
use xtask::lab::{Family, Lab, Proxy};

use crate::common::{Scenarios, at, start_proxy};

pub(crate) const SCENARIOS: Scenarios = &[("F12_soak_of_connections_and_flows", soak)];

const PORT: u16 = 6400;
/// What the allocator may keep that it did not have after the first round.
const SLACK: u64 = 4 << 20;

fn soak(lab: &Lab, family: Family) -> Result<()> {
    const ROUNDS: usize = 4;
    let server = LoadServer::start(&lab.server, at(family.unspecified(), PORT), family.client())?;
    let echo = at(family.anywhere(3), PORT);
    let _udp = UdpServer::echo(&lab.server, echo)?;
    lab.client.set_sysctls(&[("net/ipv4/ip_local_port_range", "1024 29999")])?;
    let proxy = start_proxy(lab, "--iface lan --udp-timeout 1s")?;
    let idle = settled_files(&proxy)?;
    let mut memory = Vec::new();
    for round in 0..ROUNDS {
        // Every other round ends its connections by a reset.
        let load = Load {
            targets: vec![at(family.anywhere(1), PORT), at(family.anywhere(2), PORT)],
            concurrency: 64,
            connections: 3000,
            duration: Duration::from_secs(20),
            reset: round % 2 == 1,
        };
        load.run(&lab.client, &AtomicBool::new(false))?.expect_all(load.connections)?;
        for _ in 0..300 {
            peer::exchange(&peer::udp(&lab.client, at(family.client(), 0))?, echo, b"hello")?;
        }
        let back = wait_for("all descriptors to come back", Duration::from_secs(10), || {
            Ok(proxy.daemon.open_files()? <= idle)
        });
        if let Err(error) = back {
            let (open, connections) = (proxy.daemon.open_files()?, &proxy.status()?["connections"]);
            return Err(
                error.context(format!("{open} open, {idle} at the start; relayed now: {connections}"))
            );
        }
        memory.push(proxy.daemon.memory()?);
    }
    let status = proxy.status()?;
    ensure!(
        status["connections"]["tcp"] == 0 && status["connections"]["udp"] == 0,
        "still open: {}",
        status["connections"]
    );
    ensure!(
        memory[ROUNDS - 1] <= memory[0] + SLACK,
        "resident bytes of the proxy after each of {ROUNDS} rounds alike: {memory:?}"
    );
    ensure!(server.foreign() == 0, "{} connections did not come from the client's address", server.foreign());
    Ok(())
}

/// The descriptors of a proxy without work. Its workers may still be opening
/// theirs when it says that it is ready.
fn settled_files(proxy: &Proxy) -> Result<usize> {
    let mut last = 0;
    wait_for("the proxy to have opened its descriptors", Duration::from_secs(10), || {
        std::thread::sleep(patience(Duration::from_millis(300)));
        let open = proxy.daemon.open_files()?;
        Ok(std::mem::replace(&mut last, open) == open)
    })?;
    Ok(last)
}
