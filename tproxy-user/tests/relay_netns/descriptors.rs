//! F1: the limit of open files is reached.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use socket2::SockRef;
use tproxy_user::config::SourceMode;

use super::lab::{Family, Host, Lab, config};
use super::tcp::listen;

const LIMIT: u64 = 64;

/// Names the lab to the process that is the proxy, and makes it one.
const LAB: &str = "RELAY_TEST_LAB";

/// The proxy is a process of its own: clients and servers of the test need descriptors, too.
#[test]
#[ignore = "needs root"]
fn descriptors_used_up_then_free_again() {
    if let Ok(name) = std::env::var(LAB) {
        return be_the_proxy(name);
    }
    let lab = Lab::new("nofile");
    let listener = listen(&lab, Family::V4);
    let mut proxy = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "descriptors::descriptors_used_up_then_free_again"])
        .env(LAB, lab.name())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (say, said) = mpsc::channel();
    let output = BufReader::new(proxy.stdout.take().unwrap());
    let reader = std::thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            // Nobody listens once the test has ended.
            if say.send(line).is_err() {
                break;
            }
        }
    });
    let wait_for = |what: &str| {
        loop {
            let line = said.recv_timeout(Duration::from_secs(10)).expect(what);
            if line.contains(what) {
                break line;
            }
        }
    };
    wait_for("ready");

    let to = SocketAddr::from((Family::V4.server(), 8080));
    let try_connect = |_| TcpStream::connect_timeout(&to, Duration::from_secs(2)).ok();
    let flood: Vec<TcpStream> = lab.on(Host::Client, || (0..100).filter_map(try_connect).collect());
    let line = wait_for("RLIMIT_NOFILE is 64");
    assert!(line.contains("Too many open files"), "{line}");
    let before = cpu_time(&proxy);
    std::thread::sleep(Duration::from_secs(2));
    let spent = cpu_time(&proxy) - before;
    assert!(spent < 20, "the proxy spun: {spent} hundredths of 2 s");
    let more: Vec<String> = said.try_iter().filter(|line| line.contains("RLIMIT")).collect();
    assert!(more.is_empty(), "one line is enough: {more:?}");

    drop(flood);
    // The proxy is still closing what is left: until a descriptor is free, a
    // new connection is reset.
    let served = (0..50).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        exchange(&lab, &listener, to)
    });
    assert!(served, "no connection works 5 s after the flood");

    drop(proxy.stdin.take());
    assert!(proxy.wait().unwrap().success());
    reader.join().unwrap();
}

/// Whether a byte gets from a new client to the server.
fn exchange(lab: &Lab, listener: &TcpListener, to: SocketAddr) -> bool {
    let connect = || TcpStream::connect_timeout(&to, Duration::from_secs(2));
    let sent = lab.on(Host::Client, connect).and_then(|mut client| client.write_all(b"x").map(|()| client));
    let Ok(_client) = sent else { return false };
    SockRef::from(listener).set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    // What waited in the proxy's queue comes first, and is closed already.
    while let Ok((mut accepted, _)) = listener.accept() {
        if matches!(accepted.read(&mut [0]), Ok(1)) {
            return true;
        }
    }
    false
}

/// User and system time in hundredths of a second.
fn cpu_time(process: &Child) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.id())).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

fn be_the_proxy(lab: String) {
    let filter = tracing_subscriber::EnvFilter::new("info,access=off");
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).init();
    setrlimit(Resource::RLIMIT_NOFILE, LIMIT, LIMIT).unwrap();
    let proxy = Lab::borrowed(lab).proxy(config(SourceMode::Client));
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    let stats = proxy.stats();
    assert!(stats.accept_exhausted + stats.connect_exhausted > 0, "{stats:#?}");
}
