//! Every mover, as a program on loopback. Those that this host or user cannot run are shown as ignored.

#[path = "../../../tproxy-user/tests/harness/mod.rs"]
mod harness;

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use clap::Parser as _;
use io_uring::IoUring;
use libtest_mimic::Trial;
use nix::unistd::geteuid;

const MOVERS: [&str; 8] = [
    "copy",
    "splice --pipe 64",
    "splice --pipe 256",
    "splice --pipe 1024",
    "zerocopy",
    "sockmap",
    "io-uring",
    "io-uring-splice",
];

/// More than sockets and pipes hold, and no multiple of what is moved at once.
const BYTES: usize = (16 << 20) + 12345;

const PATIENCE: Duration = Duration::from_secs(20);

fn main() {
    let ring: io::Result<IoUring> = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(1);
    let trials = MOVERS.map(|mover| {
        let run = move || relays(mover).map_err(Into::into);
        let name = format!(
            "both_directions_and_their_ends_pass_{}",
            mover.replace(" --", "_").replace([' ', '-'], "_")
        );
        let trial = Trial::test(name, run);
        match mover {
            "sockmap" => trial.with_kind("needs root").with_ignored_flag(!geteuid().is_root()),
            "io-uring" | "io-uring-splice" => {
                trial.with_kind("needs io_uring of Linux 6.1").with_ignored_flag(ring.is_err())
            }
            _ => trial,
        }
    });
    let (arguments, trials) = harness::CommandLine::parse().select(trials.into());
    libtest_mimic::run(&arguments, trials).exit();
}

/// The relay; killed when dropped.
struct Relay(Child);

impl Drop for Relay {
    fn drop(&mut self) {
        self.0.kill().expect("it was started");
        self.0.wait().expect("it ends");
    }
}

impl Relay {
    fn start(mover: &str, to: SocketAddr) -> io::Result<(Self, SocketAddr)> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tproxy-experiments"));
        command.args(["relay", "--mover"]).args(mover.split(' ')).args([
            "--port",
            "0",
            "--to",
            &to.to_string(),
        ]);
        let mut relay = Self(command.stdout(Stdio::piped()).spawn()?);
        let mut line = String::new();
        BufReader::new(relay.0.stdout.take().expect("its stdout")).read_line(&mut line)?;
        let listens: SocketAddr = line.trim().parse().expect("the address on which it listens");
        Ok((relay, SocketAddr::new(to.ip(), listens.port())))
    }
}

/// Two connections at a time: the client ends its direction first in one, the server in the other.
fn relays(mover: &str) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (_relay, address) = Relay::start(mover, listener.local_addr()?)?;
    let connect = || {
        let client = TcpStream::connect(address)?;
        let server = listener.accept()?.0;
        for socket in [&client, &server] {
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.set_write_timeout(Some(PATIENCE))?;
        }
        io::Result::Ok((client, server))
    };
    let (one, another) = (connect()?, connect()?);
    thread::scope(|scope| {
        scope.spawn(|| exchange(&one.0, &one.1));
        scope.spawn(|| exchange(&another.1, &another.0));
    });
    Ok(())
}

/// Both send at once. `first` ends its direction; `last` sends more once it has seen that.
fn exchange(first: &TcpStream, last: &TcpStream) {
    let (from_first, from_last) = (pattern(3), pattern(7));
    thread::scope(|scope| {
        let sends = scope.spawn(|| send(last, &from_last));
        scope.spawn(|| {
            send(first, &from_first);
            first.shutdown(Shutdown::Write).expect("it is connected");
        });
        let hears = scope.spawn(|| receive_all(first));
        assert!(receive_all(last) == from_first, "other bytes than the first one sent");
        sends.join().expect("no panic");
        send(last, b"goes on");
        last.shutdown(Shutdown::Write).expect("it is connected");
        let expected = [&from_last, b"goes on".as_slice()].concat();
        assert!(hears.join().expect("no panic") == expected, "other bytes than the last one sent");
    });
}

/// Bytes that do not repeat where buffers do.
fn pattern(step: u8) -> Vec<u8> {
    let unit: Vec<u8> = (0..251_u8).map(|number| number.wrapping_mul(step)).collect();
    let mut bytes = unit.repeat(BYTES.div_ceil(unit.len()));
    bytes.truncate(BYTES);
    bytes
}

fn send(mut socket: &TcpStream, bytes: &[u8]) {
    socket.write_all(bytes).expect("it is read");
}

fn receive_all(mut socket: &TcpStream) -> Vec<u8> {
    let mut got = Vec::new();
    socket.read_to_end(&mut got).expect("an end");
    got
}
