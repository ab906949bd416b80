//! TCP: transparency, half-close, resets.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use socket2::SockRef;
use tproxy_user::config::SourceMode;

use super::lab::{FAMILIES, Family, Host, Lab, ON_PORT, bound, config, pattern};

const PORT: u16 = 8080;

/// A listener on the server, before anybody connects.
pub(crate) fn listen(lab: &Lab, family: Family) -> TcpListener {
    listen_on(lab, family.server())
}

/// Its `accept` fails rather than wait for ever where a connection never comes.
pub(crate) fn listen_on(lab: &Lab, ip: IpAddr) -> TcpListener {
    let listener = lab.on(Host::Server, || bound(|| TcpListener::bind((ip, PORT))));
    SockRef::from(&listener).set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    listener
}

pub(crate) fn connect(lab: &Lab, to: impl Into<SocketAddr>) -> TcpStream {
    let to = to.into();
    let stream = lab.on(Host::Client, || TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap());
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

pub(crate) fn pair(lab: &Lab, family: Family, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = connect(lab, (family.server(), PORT));
    let (server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (client, server)
}

/// Connected to `AF_UNSPEC` a socket is reset at once (connect(2); `tcp_disconnect` in
/// `net/ipv4/tcp.c`). A close would wait for whoever else holds it, see [`bound`].
pub(crate) fn reset(stream: TcpStream) {
    rustix::net::connect_unspec(stream).unwrap();
}

/// Connects where the relay answers by a reset, which may come before `connect` has returned.
pub(crate) fn is_reset(lab: &Lab, to: impl Into<SocketAddr>) {
    let to = to.into();
    match lab.on(Host::Client, || TcpStream::connect_timeout(&to, Duration::from_secs(5))) {
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        Ok(mut stream) => assert!(read_until_reset(&mut stream).is_empty()),
    }
}

/// Reads until the connection is reset and returns what came before.
pub(crate) fn read_until_reset(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let error = stream.read_to_end(&mut bytes).expect_err("a reset, not a close");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    bytes
}

/// T1
#[test]
#[ignore = "needs root"]
fn server_sees_the_source_that_was_asked_for() {
    for (mode, name) in
        [(SourceMode::Client, "m1"), (SourceMode::ClientPort, "m2"), (SourceMode::Proxy, "m3")]
    {
        let lab = Lab::new(name);
        let proxy = lab.proxy(config(mode));
        for family in FAMILIES {
            let listener = listen(&lab, family);
            let client = connect(&lab, (family.server(), PORT));
            let (_server, peer) = listener.accept().unwrap();
            let own = client.local_addr().unwrap();
            assert_eq!(client.peer_addr().unwrap(), (family.server(), PORT).into());
            match mode {
                SourceMode::Client => assert_eq!(peer.ip(), family.client()),
                SourceMode::ClientPort => assert_eq!((peer.ip(), peer.port()), (own.ip(), own.port())),
                SourceMode::Proxy => assert_eq!(peer.ip(), family.uplink()),
            }
        }
        assert_eq!(proxy.stats().source_port_fallbacks, 0);
        assert_eq!(proxy.stats().tcp_connections, 2);
    }
}

/// T3
#[test]
#[ignore = "needs root"]
fn server_may_speak_first() {
    let lab = Lab::new("first");
    let _proxy = lab.proxy(config(SourceMode::Client));
    for family in FAMILIES {
        let listener = listen(&lab, family);
        let begun = Instant::now();
        let (mut client, mut server) = pair(&lab, family, &listener);
        server.write_all(b"220 hello\r\n").unwrap();
        let mut banner = [0; 11];
        client.read_exact(&mut banner).unwrap();
        assert_eq!(&banner, b"220 hello\r\n");
        assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    }
}

/// T4
#[test]
#[ignore = "needs root"]
fn closed_direction_leaves_the_other_open() {
    let lab = Lab::new("half");
    let proxy = lab.proxy(config(SourceMode::Client));
    let data = pattern(5_000_000);
    for family in FAMILIES {
        for client_closes in [true, false] {
            let listener = listen(&lab, family);
            let (client, server) = pair(&lab, family, &listener);
            let (mut closes, mut goes_on) = if client_closes { (client, server) } else { (server, client) };
            std::thread::scope(|scope| {
                let (data, closes) = (&data, &mut closes);
                scope.spawn(move || {
                    closes.write_all(data).unwrap();
                    closes.shutdown(Shutdown::Write).unwrap();
                });
                let mut got = Vec::new();
                goes_on.read_to_end(&mut got).unwrap();
                assert!(got == *data, "{} of {} bytes", got.len(), data.len());
            });
            std::thread::sleep(Duration::from_millis(200));
            std::thread::scope(|scope| {
                // Read meanwhile: it is more than all buffers on the way may take.
                scope.spawn(|| {
                    goes_on.write_all(&data).unwrap();
                    drop(goes_on);
                });
                let mut got = Vec::new();
                closes.read_to_end(&mut got).unwrap();
                assert!(got == data, "{} of {} bytes", got.len(), data.len());
            });
        }
    }
    proxy.wait("the end of all connections", |stats| stats.tcp_active == 0);
    let stats = proxy.stats();
    assert_eq!((stats.tcp_closed, stats.tcp_bytes_up, stats.tcp_bytes_down), (4, 20_000_000, 20_000_000));
}

/// T3, after a time without a byte, from either side.
#[test]
#[ignore = "needs root"]
fn quiet_connection_goes_on() {
    let lab = Lab::new("goes-on");
    let proxy = lab.proxy(config(SourceMode::Client));
    for family in FAMILIES {
        let listener = listen(&lab, family);
        let pairs: Vec<_> = (0..20).map(|_| pair(&lab, family, &listener)).collect();
        for pause in [0, 3, 3] {
            std::thread::sleep(Duration::from_secs(pause));
            for (number, (mut client, mut server)) in pairs.iter().map(|(a, b)| (a, b)).enumerate() {
                // The first to speak is now the one, now the other.
                if number % 2 == 0 {
                    std::mem::swap(&mut client, &mut server);
                }
                let mut got = [0; 4];
                client.write_all(b"ping").unwrap();
                server.read_exact(&mut got).unwrap();
                assert_eq!(&got, b"ping");
                server.write_all(b"pong").unwrap();
                client.read_exact(&mut got).unwrap();
                assert_eq!(&got, b"pong");
            }
        }
        std::thread::sleep(Duration::from_secs(3));
        for (number, (mut client, mut server)) in pairs.into_iter().enumerate() {
            if number % 2 == 0 {
                std::mem::swap(&mut client, &mut server);
            }
            // In order, or by a reset.
            if number % 3 == 0 {
                reset(client);
                let error = server.read(&mut [0]).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            } else {
                drop(client);
                assert_eq!(server.read(&mut [0]).unwrap(), 0);
            }
        }
    }
    proxy.wait("the end of all connections", |stats| stats.tcp_active == 0);
    let stats = proxy.stats();
    let resets = stats.tcp_client_resets + stats.tcp_upstream_resets;
    assert_eq!((stats.tcp_closed, resets, stats.tcp_bytes_up, stats.tcp_bytes_down), (26, 14, 480, 480));
}

/// T4
#[test]
#[ignore = "needs root"]
fn reset_is_passed_on_after_the_bytes_before_it() {
    let lab = Lab::new("rst");
    let proxy = lab.proxy(config(SourceMode::Client));
    for family in FAMILIES {
        for client_resets in [true, false] {
            let listener = listen(&lab, family);
            let (client, server) = pair(&lab, family, &listener);
            let (mut resets, mut sees) = if client_resets { (client, server) } else { (server, client) };
            let mut byte = [0];
            resets.write_all(b"x").unwrap();
            sees.read_exact(&mut byte).unwrap();
            // A reset drops what the sender's own kernel still holds, so it has to be out first.
            let data = pattern(30_000);
            resets.write_all(&data).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            let begun = Instant::now();
            reset(resets);
            assert!(read_until_reset(&mut sees) == data);
            assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
        }
    }
    proxy.wait("the end of all connections", |stats| stats.tcp_active == 0);
    assert_eq!((proxy.stats().tcp_client_resets, proxy.stats().tcp_upstream_resets), (2, 2));
}

/// Urgent data is part of the stream, not lost beside it.
#[test]
#[ignore = "needs root"]
fn urgent_byte_stays_in_the_stream() {
    let lab = Lab::new("urgent");
    let _proxy = lab.proxy(config(SourceMode::Client));
    for family in FAMILIES {
        let listener = listen(&lab, family);
        let (client, server) = pair(&lab, family, &listener);
        for (mut sends, mut gets) in [(&client, &server), (&server, &client)] {
            sends.write_all(b"ab").unwrap();
            SockRef::from(sends).send_out_of_band(b"!").unwrap();
            sends.write_all(b"cd").unwrap();
            let mut bytes = [0; 5];
            gets.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"ab!cd");
        }
    }
}

/// A server that answers and closes with unread bytes resets (RFC 2525, 2.17): the answer arrives.
#[test]
#[ignore = "needs root"]
fn answer_before_a_reset_arrives_whole() {
    let lab = Lab::new("answer");
    let _proxy = lab.proxy(config(SourceMode::Client));
    let answer = pattern(200_000);
    for family in FAMILIES {
        let listener = listen(&lab, family);
        let (mut client, mut server) = pair(&lab, family, &listener);
        client.write_all(b"a request that nobody reads").unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let writer = std::thread::spawn({
            let answer = answer.clone();
            move || {
                server.write_all(&answer).unwrap();
                // All is acknowledged by the proxy once its reader, the client, takes part.
                std::thread::sleep(Duration::from_millis(300));
                drop(server);
            }
        });
        assert!(read_until_reset(&mut client) == answer);
        writer.join().unwrap();
    }
}

/// A reset shows at once although the other side does not read.
#[test]
#[ignore = "needs root"]
fn stalled_reader_hides_no_reset() {
    let lab = Lab::new("stall");
    let proxy = lab.proxy(config(SourceMode::Client));
    for family in FAMILIES {
        for server_resets in [true, false] {
            let before = proxy.stats();
            let listener = listen(&lab, family);
            let (client, server) = pair(&lab, family, &listener);
            let (mut resets, mut stalls) = if server_resets { (server, client) } else { (client, server) };
            resets.set_nonblocking(true).unwrap();
            // Fills every buffer on the way.
            let mut quiet = 0;
            while quiet < 20 {
                match resets.write(&vec![0; 65536]) {
                    Ok(_) => quiet = 0,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        quiet += 1;
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            reset(resets);
            let ended = |stats: &tproxy_user::stats::Snapshot| {
                stats.tcp_client_resets + stats.tcp_upstream_resets
                    == before.tcp_client_resets + before.tcp_upstream_resets + 1
            };
            proxy.wait("the reset's end", ended);
            read_until_reset(&mut stalls);
        }
    }
}

/// T5
#[test]
#[ignore = "needs root"]
fn refused_destination_resets_the_client_at_once() {
    let lab = Lab::new("refused");
    let proxy = lab.proxy(config(SourceMode::Client));
    for family in FAMILIES {
        let begun = Instant::now();
        is_reset(&lab, (family.server(), 9));
        assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    }
    proxy.wait("the failure's count", |stats| stats.connect_refused == 2 && stats.tcp_active == 0);
}

/// T5
#[test]
#[ignore = "needs root"]
fn silent_destination_times_out() {
    let lab = Lab::new("silent");
    let mut config = config(SourceMode::Client);
    config.timeouts.connect = Duration::from_millis(300);
    let proxy = lab.proxy(config);
    // Nobody has this address; neighbour discovery answers only after some seconds.
    is_reset(&lab, (std::net::Ipv4Addr::new(10, 7, 2, 99), 80));
    proxy.wait("the failure's count", |stats| stats.connect_timed_out == 1);
}

/// A client that leaves while its destination is being tried is noticed.
#[test]
#[ignore = "needs root"]
fn client_that_leaves_early_ends_the_attempt() {
    let lab = Lab::new("early");
    let proxy = lab.proxy(config(SourceMode::Client));
    let client = connect(&lab, (std::net::Ipv4Addr::new(10, 7, 2, 99), 80));
    reset(client);
    proxy.wait("the attempt's end", |stats| stats.connect_abandoned == 1);
}

/// H10 (the part of it that is the relay's)
#[test]
#[ignore = "needs root"]
fn proxy_does_not_connect_to_itself() {
    let lab = Lab::new("loop");
    let proxy = lab.proxy(config(SourceMode::Client));
    for family in FAMILIES {
        is_reset(&lab, (family.router(), ON_PORT));
    }
    let stats = proxy.stats();
    assert_eq!((stats.loops_prevented, stats.tcp_connections), (2, 0));
}

/// T8: the client's own port is taken on the proxy's host.
#[test]
#[ignore = "needs root"]
fn taken_client_port_falls_back_and_is_counted() {
    let lab = Lab::new("fallback");
    let proxy = lab.proxy(config(SourceMode::ClientPort));
    for (family, taken) in FAMILIES.into_iter().zip(1u64..) {
        let listener = listen(&lab, family);
        let port = 40_000;
        let _holder = lab.on(Host::Router, || {
            let socket =
                socket2::Socket::new(socket2::Domain::for_address(family.any()), socket2::Type::STREAM, None)
                    .unwrap();
            if family == Family::V6 {
                socket.set_only_v6(true).unwrap();
            }
            let mut any = family.any();
            any.set_port(port);
            socket.bind(&any.into()).unwrap();
            socket.listen(1).unwrap();
            socket
        });
        let _client = lab.on(Host::Client, || {
            let socket =
                socket2::Socket::new(socket2::Domain::for_address(family.any()), socket2::Type::STREAM, None)
                    .unwrap();
            socket.bind(&SocketAddr::from((family.client(), port)).into()).unwrap();
            socket.connect(&SocketAddr::from((family.server(), PORT)).into()).unwrap();
            socket
        });
        let (_server, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip(), family.client());
        assert_ne!(peer.port(), port);
        assert_eq!(proxy.stats().source_port_fallbacks, taken);
    }
}
