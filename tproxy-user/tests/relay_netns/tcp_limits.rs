//! TCP: time-outs, limits, the end of the run.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use tproxy_user::config::SourceMode;
use tproxy_user::limits;

use super::lab::{FAMILIES, Family, Host, Lab, config};
use super::tcp::{connect, is_reset, listen, listen_on, pair, read_until_reset};

/// Of the namespace that the thread which opens it is in.
const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

#[test]
#[ignore = "needs root"]
fn quiet_connection_is_cut() {
    // Before and after it is set aside.
    for idle in [Duration::from_millis(400), Duration::from_secs(3)] {
        let lab = Lab::new("idle");
        let mut config = config(SourceMode::Client);
        config.timeouts.tcp_idle = idle;
        let proxy = lab.proxy(config);
        let listener = listen(&lab, Family::V4);
        let (mut client, mut server) = pair(&lab, Family::V4, &listener);
        // A byte now and then keeps it open.
        for _ in 0..3 {
            std::thread::sleep(idle * 3 / 4);
            client.write_all(b"x").unwrap();
        }
        let last_byte = Instant::now();
        read_until_reset(&mut client);
        assert!(last_byte.elapsed() >= idle * 9 / 10, "{:?}", last_byte.elapsed());
        assert_eq!(read_until_reset(&mut server), b"xxx");
        proxy.wait("the time-out's count", |stats| stats.tcp_idle_timeouts == 1);
    }
}

#[test]
#[ignore = "needs root"]
fn half_closed_connection_has_less_time() {
    let lab = Lab::new("halfidle");
    let mut config = config(SourceMode::Client);
    config.timeouts.half_close = Duration::from_millis(300);
    let proxy = lab.proxy(config);
    let listener = listen(&lab, Family::V4);
    let (mut client, _server) = pair(&lab, Family::V4, &listener);
    client.shutdown(Shutdown::Write).unwrap();
    let begun = Instant::now();
    read_until_reset(&mut client);
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    proxy.wait("the time-out's count", |stats| stats.tcp_half_close_timeouts == 1);
}

#[test]
#[ignore = "needs root"]
fn connection_over_the_limit_waits() {
    let lab = Lab::new("max");
    let mut config = config(SourceMode::Client);
    config.limits.connections = 1;
    let proxy = lab.proxy(config);
    let listener = listen(&lab, Family::V4);
    let (first, first_server) = pair(&lab, Family::V4, &listener);
    // The kernel accepts it; the relay does not until there is room.
    let mut second = connect(&lab, (Family::V4.server(), 8080));
    second.write_all(b"late").unwrap();
    proxy.wait("the limit's count", |stats| stats.connection_limit_waits >= 1);
    assert_eq!(proxy.stats().tcp_active, 1);
    drop((first, first_server));
    let (mut server, _) = listener.accept().unwrap();
    let mut bytes = [0; 4];
    server.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"late");
}

#[test]
#[ignore = "needs root"]
fn client_over_its_share_is_reset() {
    let lab = Lab::new("share");
    let mut config = config(SourceMode::Client);
    config.limits.per_client = 1;
    let proxy = lab.proxy(config);
    let listener = listen(&lab, Family::V4);
    let (first, first_server) = pair(&lab, Family::V4, &listener);
    is_reset(&lab, (Family::V4.server(), 8080));
    assert_eq!(proxy.stats().client_limit_tcp, 1);
    drop((first, first_server));
    proxy.wait("the first one's end", |stats| stats.tcp_active == 0);
    pair(&lab, Family::V4, &listener);
}

/// F10 (the part of it that is the relay's)
#[test]
#[ignore = "needs root"]
fn drain_lets_connections_finish() {
    let lab = Lab::new("drain");
    let mut proxy = lab.proxy(config(SourceMode::Client));
    for family in FAMILIES {
        let listener = listen(&lab, family);
        let (mut client, mut server) = pair(&lab, family, &listener);
        if family == Family::V4 {
            continue;
        }
        proxy.controller.drain();
        std::thread::sleep(Duration::from_millis(200));
        client.write_all(b"still here").unwrap();
        drop(client);
        let mut got = String::new();
        server.read_to_string(&mut got).unwrap();
        assert_eq!(got, "still here");
        let new = lab.on(Host::Client, || {
            TcpStream::connect_timeout(&(family.server(), 8080).into(), Duration::from_millis(300))
        });
        assert!(new.is_err(), "nothing new is taken");
    }
    proxy.join();
    assert_eq!((proxy.stats().tcp_closed, proxy.stats().tcp_cut), (2, 0));
}

#[test]
#[ignore = "needs root"]
fn stop_resets_what_is_left() {
    let lab = Lab::new("stop");
    let mut proxy = lab.proxy(config(SourceMode::Client));
    let listener = listen(&lab, Family::V6);
    let (mut client, mut server) = pair(&lab, Family::V6, &listener);
    proxy.controller.drain();
    std::thread::sleep(Duration::from_millis(100));
    proxy.controller.stop();
    proxy.join();
    read_until_reset(&mut client);
    read_until_reset(&mut server);
    assert_eq!((proxy.stats().tcp_cut, proxy.stats().tcp_active), (1, 0));
}

/// T6: of full size where the hard limit of open files allows it (`ulimit -Hn`, 250,000: both
/// ends and both sides of the proxy are in this process), else smaller in proportion.
#[test]
#[ignore = "needs root"]
fn sixty_thousand_connections_of_one_client() {
    let files = usize::try_from(limits::raise_open_files().unwrap()).unwrap();
    let each = 30_000.min((files - 500) / 8);
    println!("{each} connections to each of two destinations");
    let lab = Lab::new("t6");
    // The usual range has fewer ports than there are connections to one destination.
    let range = format!("32768 {}", 32_767 + each * 28_232 / 30_000);
    lab.on(Host::Router, || std::fs::write(PORT_RANGE, range).unwrap());
    lab.on(Host::Client, || std::fs::write(PORT_RANGE, "1024 65535").unwrap());
    let mut config = config(SourceMode::Client);
    config.limits.connections = 100_000;
    config.limits.per_client = 100_000;
    let proxy = lab.proxy(config);
    let listeners = [Family::V4.server(), Family::V4.server2()].map(|ip| listen_on(&lab, ip));
    let mut servers = Vec::with_capacity(2 * each);
    let mut clients = Vec::with_capacity(2 * each);
    for listener in &listeners {
        let to = listener.local_addr().unwrap();
        lab.on(Host::Client, || {
            for _ in 0..each {
                clients.push(TcpStream::connect(to).unwrap());
                let (server, peer) = listener.accept().unwrap();
                assert_eq!(peer.ip(), Family::V4.client());
                servers.push(server);
            }
        });
    }
    assert_eq!(proxy.stats().tcp_active, 2 * each as u64);
    let last = clients.last_mut().unwrap();
    last.write_all(b"x").unwrap();
    servers.last_mut().unwrap().read_exact(&mut [0]).unwrap();
}

/// Many short connections leave nothing behind; one client address opens more than the kernel
/// has ports for one destination (T6 in small: the router's port range is cut to 100 ports).
#[test]
#[ignore = "needs root"]
fn ports_of_the_kernel_are_not_the_limit() {
    let lab = Lab::new("ports");
    lab.on(Host::Router, || std::fs::write(PORT_RANGE, "50000 50099").unwrap());
    // Most of the client's own ports are taken, too, for connections to the same destination.
    lab.on(Host::Client, || std::fs::write(PORT_RANGE, "50000 50269").unwrap());
    let proxy = lab.proxy(config(SourceMode::Client));
    for family in FAMILIES {
        let listener = listen(&lab, family);
        let mut open = Vec::new();
        for _ in 0..250 {
            open.push(pair(&lab, family, &listener));
        }
        for (_, server) in &open {
            assert_eq!(server.peer_addr().unwrap().ip(), family.client());
        }
        assert_eq!(proxy.stats().tcp_active, 250);
        drop(open);
        proxy.wait("the end of all connections", |stats| stats.tcp_active == 0);
    }
    assert!(proxy.stats().source_port_fallbacks >= 300, "{:#?}", proxy.stats());
    assert_eq!(proxy.stats().connect_no_source, 0);
}
