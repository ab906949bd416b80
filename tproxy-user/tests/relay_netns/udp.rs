//! UDP: sizes, exact sources, endpoint-independence, bounds.

use std::io::{self, IoSlice};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::sockopt::RcvBufForce;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt};
use tproxy_user::config::SourceMode;

use super::lab::{FAMILIES, Family, Host, Lab, ON_PORT, bound, config, pattern, sh};

const PORT: u16 = 5300;

fn bind(lab: &Lab, host: Host, addr: impl Into<SocketAddr>) -> UdpSocket {
    let addr = addr.into();
    let socket = lab.on(host, || bound(|| UdpSocket::bind(addr)));
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

fn client(lab: &Lab, family: Family) -> UdpSocket {
    bind(lab, Host::Client, family.any())
}

/// Waits again where the wait is interrupted: one with a time-out is never restarted by the
/// kernel (signal(7)).
fn wait(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 1 << 16];
    let (length, from) = wait(socket, &mut buffer).expect("a datagram");
    buffer.truncate(length);
    (buffer, from)
}

fn receives_nothing(socket: &UdpSocket) {
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(wait(socket, &mut [0; 100]).is_err());
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
}

/// T2, T10
#[test]
#[ignore = "needs root"]
fn datagrams_of_every_size_go_both_ways() {
    let lab = Lab::new("sizes");
    let proxy = lab.proxy(config(SourceMode::Client));
    for (family, flows) in FAMILIES.into_iter().zip(1u64..) {
        let to = SocketAddr::from((family.server(), PORT));
        let server = bind(&lab, Host::Server, to);
        let client = client(&lab, family);
        let largest = if family == Family::V4 { 65_507 } else { 65_527 };
        let sizes = [0, 1, 512, 1472, 1473, 4000, 9001, 30_000, 65_000, largest];
        for size in sizes {
            let data = pattern(size);
            client.send_to(&data, to).unwrap();
            let (got, from) = receive(&server);
            assert!(got == data, "{size} bytes up");
            assert_eq!(from.ip(), family.client());
            server.send_to(&got, from).unwrap();
            let (got, from) = receive(&client);
            assert!(got == data, "{size} bytes down");
            assert_eq!(from, to);
        }
        assert_eq!(proxy.stats().udp_flows, flows, "one flow for all of them");
    }
    proxy.wait("the last one's count", |stats| stats.udp_datagrams_down == 20);
    let stats = proxy.stats();
    assert_eq!((stats.udp_datagrams_up, stats.udp_bytes_up), (20, stats.udp_bytes_down));
}

/// T14
#[test]
#[ignore = "needs root"]
fn one_client_port_is_one_source_for_all_servers() {
    let lab = Lab::new("eim");
    let _proxy = lab.proxy(config(SourceMode::Client));
    for family in FAMILIES {
        let servers = [
            bind(&lab, Host::Server, (family.server(), PORT)),
            bind(&lab, Host::Server, (family.server(), PORT + 1)),
            bind(&lab, Host::Server, (family.server2(), PORT)),
        ];
        let client = client(&lab, family);
        let mut sources = Vec::new();
        for server in &servers {
            client.send_to(b"who am I?", server.local_addr().unwrap()).unwrap();
            sources.push(receive(server).1);
        }
        assert!(sources.iter().all(|source| *source == sources[0]), "{sources:?}");
        for server in &servers {
            server.send_to(b"you", sources[0]).unwrap();
            assert_eq!(receive(&client).1, server.local_addr().unwrap());
        }
        // One that was never asked.
        let stranger = bind(&lab, Host::Server, (family.server2(), PORT + 7));
        stranger.send_to(b"psst", sources[0]).unwrap();
        assert_eq!(receive(&client), (b"psst".to_vec(), stranger.local_addr().unwrap()));
    }
}

#[test]
#[ignore = "needs root"]
fn server_sees_the_source_that_was_asked_for() {
    for (mode, name) in [(SourceMode::ClientPort, "u2"), (SourceMode::Proxy, "u3")] {
        let lab = Lab::new(name);
        let _proxy = lab.proxy(config(mode));
        for family in FAMILIES {
            let server = bind(&lab, Host::Server, (family.server(), PORT));
            let client = client(&lab, family);
            client.send_to(b"hello", server.local_addr().unwrap()).unwrap();
            let (_, from) = receive(&server);
            let port = client.local_addr().unwrap().port();
            match mode {
                SourceMode::Proxy => assert_eq!(from.ip(), family.uplink()),
                _ => assert_eq!(from, (family.client(), port).into()),
            }
            server.send_to(b"world", from).unwrap();
            assert_eq!(receive(&client), (b"world".to_vec(), server.local_addr().unwrap()));
        }
    }
}

/// H1: a DNS server on the router, on the wildcard address and without `SO_REUSEADDR`.
#[test]
#[ignore = "needs root"]
fn local_service_on_the_same_port_disturbs_nothing() {
    let lab = Lab::new("dns");
    let proxy = lab.proxy(config(SourceMode::Client));
    let mut local = vec![bind(&lab, Host::Router, (std::net::Ipv6Addr::UNSPECIFIED, 53))];
    // A dual-stack socket holds both families; a host with separate ones behaves alike.
    for family in FAMILIES {
        let server = bind(&lab, Host::Server, (family.server(), 53));
        let client = client(&lab, family);
        client.send_to(b"query", server.local_addr().unwrap()).unwrap();
        let (_, from) = receive(&server);
        server.send_to(b"answer", from).unwrap();
        assert_eq!(receive(&client), (b"answer".to_vec(), server.local_addr().unwrap()));
        client.send_to(b"local", (family.router(), 53)).unwrap();
        let (query, from) = receive(&local[0]);
        assert_eq!(query, b"local");
        local[0].send_to(b"mine", from).unwrap();
        assert_eq!(receive(&client), (b"mine".to_vec(), (family.router(), 53).into()));
    }
    receives_nothing(&local.remove(0));
    assert_eq!((proxy.stats().udp_reply_errors, proxy.stats().udp_no_socket), (0, 0));
    // Nothing was even offered to the reply sockets: neither queued nor dropped.
    lab.on(Host::Router, || {
        for table in ["raw", "raw6"] {
            let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap();
            let rows: Vec<Vec<&str>> =
                text.lines().skip(1).map(|row| row.split_whitespace().collect()).collect();
            assert_eq!(rows.len(), 4, "two a worker, for UDP and for ICMP: {text}");
            for row in rows {
                assert!(row[4].ends_with(":00000000"), "{text}");
                assert_eq!(row.last(), Some(&"0"), "{text}");
            }
        }
    });
}

/// F11
#[test]
#[ignore = "needs root"]
fn errors_end_neither_listener_nor_flow() {
    let lab = Lab::new("icmp");
    let proxy = lab.proxy(config(SourceMode::Client));
    for family in FAMILIES {
        let server = bind(&lab, Host::Server, (family.server(), PORT));
        let client = client(&lab, family);
        for _ in 0..5 {
            client.send_to(b"nobody there", (family.server(), 9)).unwrap();
        }
        // No such network, and a port that does not exist.
        let nowhere = if family == Family::V4 { "198.51.100.1:7" } else { "[2001:db8::1]:7" };
        client.send_to(b"no route", nowhere).unwrap();
        client.send_to(b"self", (family.router(), ON_PORT)).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        client.send_to(b"hello", server.local_addr().unwrap()).unwrap();
        let (_, from) = receive(&server);
        server.send_to(b"world", from).unwrap();
        assert_eq!(receive(&client).0, b"world");
    }
    let stats = proxy.stats();
    assert_eq!((stats.udp_send_errors, stats.loops_prevented), (2, 2), "{stats:#?}");
}

#[test]
#[ignore = "needs root"]
fn quiet_flows_end() {
    let lab = Lab::new("quiet");
    let mut config = config(SourceMode::Client);
    config.timeouts.udp_unreplied = Duration::from_millis(300);
    config.timeouts.udp = Duration::from_millis(1200);
    let proxy = lab.proxy(config);
    let server = bind(&lab, Host::Server, (Family::V4.server(), PORT));
    let (answered, unanswered) = (client(&lab, Family::V4), client(&lab, Family::V4));
    for client in [&answered, &unanswered] {
        client.send_to(b"hello", server.local_addr().unwrap()).unwrap();
        let (_, from) = receive(&server);
        if client.local_addr().unwrap() == answered.local_addr().unwrap() {
            server.send_to(b"world", from).unwrap();
        }
    }
    proxy.wait("two flows", |stats| stats.udp_active == 2);
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(proxy.stats().udp_active, 1, "the one that was answered has more time");
    proxy.wait("the end of both", |stats| stats.udp_active == 0 && stats.udp_timeouts == 2);
}

/// F5 in small
#[test]
#[ignore = "needs root"]
fn full_table_ends_the_least_recently_used_flow() {
    let lab = Lab::new("lru");
    let mut config = config(SourceMode::Client);
    config.limits.udp_flows = 3;
    config.workers = 1;
    let proxy = lab.proxy(config);
    let server = bind(&lab, Host::Server, (Family::V4.server(), PORT));
    let clients: Vec<UdpSocket> = (0..4).map(|_| client(&lab, Family::V4)).collect();
    let ask = |client: &UdpSocket| {
        client.send_to(b"hello", server.local_addr().unwrap()).unwrap();
        receive(&server).1
    };
    let sources: Vec<SocketAddr> = clients[..3].iter().map(ask).collect();
    // The first is used again, so the second is the one to go.
    assert_eq!(ask(&clients[0]), sources[0]);
    ask(&clients[3]);
    proxy.wait("an eviction", |stats| stats.udp_evictions == 1 && stats.udp_active == 3);
    server.send_to(b"late", sources[1]).unwrap();
    receives_nothing(&clients[1]);
    server.send_to(b"fine", sources[0]).unwrap();
    assert_eq!(receive(&clients[0]).0, b"fine");
}

#[test]
#[ignore = "needs root"]
fn client_over_its_share_is_ignored() {
    let lab = Lab::new("ushare");
    let mut config = config(SourceMode::Client);
    config.limits.per_client = 2;
    let proxy = lab.proxy(config);
    let server = bind(&lab, Host::Server, (Family::V6.server(), PORT));
    for _ in 0..3 {
        client(&lab, Family::V6).send_to(b"hello", server.local_addr().unwrap()).unwrap();
    }
    proxy.wait("the refusal", |stats| stats.client_limit_udp == 1);
    assert_eq!(proxy.stats().udp_active, 2);
}

#[test]
#[ignore = "needs root"]
fn drain_waits_for_an_answer_under_way() {
    let lab = Lab::new("udrain");
    let mut proxy = lab.proxy(config(SourceMode::Client));
    let server = bind(&lab, Host::Server, (Family::V4.server(), PORT));
    let client = client(&lab, Family::V4);
    client.send_to(b"hello", server.local_addr().unwrap()).unwrap();
    let (_, from) = receive(&server);
    proxy.controller.drain();
    std::thread::sleep(Duration::from_millis(300));
    server.send_to(b"world", from).unwrap();
    assert_eq!(receive(&client).0, b"world");
    proxy.join();
    assert_eq!(proxy.stats().udp_active, 0);
}

/// Sends datagrams in one go; those of a length that follow each other as segments of one, where
/// `segments` says so.
fn send_at_once(socket: &UdpSocket, to: SocketAddr, datagrams: &[Vec<u8>], segments: bool) {
    if !segments {
        return datagrams.iter().for_each(|datagram| {
            socket.send_to(datagram, to).unwrap();
        });
    }
    for alike in datagrams.chunk_by(|one, next| one.len() == next.len()) {
        // An empty one is no segment.
        for alike in alike.chunks(60_000_usize.checked_div(alike[0].len()).unwrap_or(1).min(64)) {
            let length = u16::try_from(alike[0].len()).unwrap();
            let control = [ControlMessage::UdpGsoSegments(&length)];
            let control = if alike.len() > 1 { &control[..] } else { &[] };
            let whole = alike.concat();
            let name = SockaddrStorage::from(to);
            let parts = [IoSlice::new(&whole)];
            sendmsg(socket.as_raw_fd(), &parts, control, MsgFlags::empty(), Some(&name)).unwrap();
        }
    }
}

/// T2: also where segments do not fit the way on.
#[test]
#[ignore = "needs root"]
fn datagrams_that_come_together_arrive_as_they_were() {
    let lengths =
        [[1200; 70].as_slice(), &[700, 0, 0, 1300, 1300, 1299, 3000, 2900, 64], &[64; 130], &[1; 3]];
    let datagrams: Vec<Vec<u8>> =
        lengths.concat().into_iter().enumerate().map(|(i, n)| pattern(n + i)[i..].to_vec()).collect();
    for mtu in [1500, 1280] {
        let lab = Lab::new(&format!("bursts{mtu}"));
        sh(&format!("ip -n {} link set r1 mtu {mtu}", lab.netns(Host::Router)));
        let proxy = lab.proxy(config(SourceMode::Client));
        for (family, segments) in FAMILIES.into_iter().flat_map(|family| [(family, false), (family, true)]) {
            let case = format!("{family:?}, MTU {mtu}, segments {segments}");
            let server = bind(&lab, Host::Server, (family.server(), PORT));
            let client = client(&lab, family);
            for socket in [&server, &client] {
                setsockopt(socket, RcvBufForce, &(4 << 20)).unwrap();
            }
            let to = server.local_addr().unwrap();
            send_at_once(&client, to, &datagrams, segments);
            let mut from = None;
            for (n, datagram) in datagrams.iter().enumerate() {
                let (got, source) = receive(&server);
                assert!(got == *datagram, "{case}: number {n} up");
                assert_eq!(*from.get_or_insert(source), source);
            }
            // What is larger than the MTU of the other end is lost without a proxy too. Twice: after
            // many the kernel may merge what comes.
            for _ in 0..if mtu == 1500 { 2 } else { 0 } {
                send_at_once(&server, from.unwrap(), &datagrams, segments);
                for (n, datagram) in datagrams.iter().enumerate() {
                    let (got, source) = receive(&client);
                    assert!(got == *datagram, "{case}: number {n} down");
                    assert_eq!(source, to);
                }
            }
        }
        let all = 4 * datagrams.len() as u64;
        proxy.wait("the last one's count", |stats| stats.udp_datagrams_up == all);
        assert_eq!(proxy.stats().udp_send_errors, 0);
    }
}
