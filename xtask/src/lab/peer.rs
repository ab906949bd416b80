//! Peers for what no tool can do: exact ports, exact closes, exact sources.
//!
//! Every socket has time-outs, so that a fault shows as an error and not as a hang.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use socket2::{Domain, Protocol, Socket, Type};
use std::os::fd::AsFd;

use super::namespace::Namespace;
use super::pace::patience;

/// How long a read or write of a peer waits.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The longest that a program which is being started may hold our sockets.
const FORK_TO_EXEC: Duration = Duration::from_secs(1);

/// How often a server looks whether it is to stop.
const TICK: u16 = 50;

/// A TCP server with a thread for each connection.
#[derive(Debug)]
pub struct TcpServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TcpServer {
    /// Listens on an address and hands each connection, with its client's
    /// address, to `serve`.
    ///
    /// # Errors
    /// Where the address is taken.
    pub fn start(
        namespace: &Namespace,
        address: SocketAddr,
        serve: impl Fn(TcpStream, SocketAddr) + Clone + Send + 'static,
    ) -> Result<Self> {
        let listener = namespace.try_enter(|| listen(address))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if !readable(&listener) {
                    continue;
                }
                let Ok((stream, client)) = listener.accept() else {
                    continue;
                };
                let serve = serve.clone();
                std::thread::spawn(move || {
                    if patient(&stream).is_ok() {
                        serve(stream, client);
                    }
                });
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }

    /// A server that gives back what it gets, and closes when its client does.
    ///
    /// # Errors
    /// Where the address is taken.
    pub fn echo(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        Self::start(namespace, address, |stream, _| {
            let (mut reader, mut writer) = (&stream, &stream);
            if io::copy(&mut reader, &mut writer).is_ok() {
                // The client may be gone by now.
                let _ = stream.shutdown(Shutdown::Write);
            }
        })
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A UDP server that answers from the very address that it is bound to.
#[derive(Debug)]
pub struct UdpServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UdpServer {
    /// Answers each datagram with what `answer` makes of it and its sender.
    ///
    /// # Errors
    /// Where the address is taken.
    pub fn start(
        namespace: &Namespace,
        address: SocketAddr,
        mut answer: impl FnMut(&[u8], SocketAddr) -> Option<Vec<u8>> + Send + 'static,
    ) -> Result<Self> {
        let socket = namespace.try_enter(|| bind_udp(address))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while !stopped.load(Ordering::Relaxed) {
                if !readable(&socket) {
                    continue;
                }
                // An ICMP error of an earlier answer is no reason to end.
                let Ok((length, client)) = receive(&socket, &mut buffer) else {
                    continue;
                };
                if let Some(reply) = answer(&buffer[..length], client) {
                    let _ = socket.send_to(&reply, client);
                }
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }

    /// A server that gives back what it gets.
    ///
    /// # Errors
    /// Where the address is taken.
    pub fn echo(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        Self::start(namespace, address, |datagram, _| Some(datagram.to_vec()))
    }

    /// A server that answers with the sender's address and port, as STUN does.
    ///
    /// # Errors
    /// Where the address is taken.
    pub fn reflector(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        Self::start(namespace, address, |_, client| Some(client.to_string().into_bytes()))
    }
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn readable(socket: &impl AsFd) -> bool {
    let mut wanted = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    nix::poll::poll(&mut wanted, PollTimeout::from(TICK)).is_ok_and(|ready| ready > 0)
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    bind(&socket, address)?;
    socket.listen(4096)?;
    Ok(socket.into())
}

fn bind_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_recv_buffer_size(4 << 20)?;
    bind(&socket, address)?;
    Ok(socket.into())
}

/// Binds a socket, also to an address that was freed just now: a program that
/// another thread starts holds all our sockets from its fork to its exec, which
/// on a busy guest lasts long enough to be seen.
fn bind(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    let deadline = Instant::now() + patience(FORK_TO_EXEC);
    loop {
        match socket.bind(&address.into()) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            outcome => return outcome,
        }
    }
}

fn patient(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(patience(PATIENCE)))?;
    stream.set_write_timeout(Some(patience(PATIENCE)))
}

/// A UDP socket in a namespace, with a read time-out.
///
/// # Errors
/// Where the address is taken.
pub fn udp(namespace: &Namespace, address: SocketAddr) -> Result<UdpSocket> {
    namespace.try_enter(|| {
        let socket = bind_udp(address)?;
        socket.set_read_timeout(Some(patience(PATIENCE)))?;
        Ok(socket)
    })
}

/// Sends a datagram and waits for one reply: its bytes and where it came from.
///
/// # Errors
/// Where none comes within the socket's time-out.
pub fn exchange(socket: &UdpSocket, to: SocketAddr, datagram: &[u8]) -> Result<(Vec<u8>, SocketAddr)> {
    socket.send_to(datagram, to).with_context(|| format!("cannot send {} bytes to {to}", datagram.len()))?;
    let mut buffer = vec![0; 65_536];
    let (length, from) = receive(socket, &mut buffer)
        .with_context(|| format!("no reply to {} bytes sent to {to}", datagram.len()))?;
    buffer.truncate(length);
    Ok((buffer, from))
}

/// Waits for a datagram.
///
/// # Errors
/// Where none comes within the socket's time-out.
#[expect(clippy::disallowed_methods, reason = "the one place that waits again")]
pub fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    uninterrupted(|| socket.recv_from(buffer))
}

/// Waits for some bytes of a stream, or for its end: 0.
///
/// # Errors
/// Where none come within the socket's time-out; where it is reset.
pub fn read(stream: &mut impl io::Read, buffer: &mut [u8]) -> io::Result<usize> {
    uninterrupted(|| stream.read(buffer))
}

/// Waits again as often as a wait is interrupted: one with a time-out may be although no
/// signal has a handler, and is never restarted by the kernel (signal(7)).
fn uninterrupted<T>(mut wait: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match wait() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// Connects from a namespace, where `from` is given with exactly that address
/// and port, even if that port was used a moment ago.
///
/// # Errors
/// Where the connection is not there within `timeout`.
pub fn connect(
    namespace: &Namespace,
    from: Option<SocketAddr>,
    to: SocketAddr,
    timeout: Duration,
) -> Result<TcpStream> {
    namespace
        .enter(|| try_connect(from, to, timeout))?
        .with_context(|| format!("cannot connect from the {} to {to}", namespace.role()))
}

/// As [`connect`], in the calling thread's namespace and with the plain error.
///
/// # Errors
/// Where the connection is not there within `timeout`.
pub fn try_connect(from: Option<SocketAddr>, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    if let Some(from) = from {
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
    }
    socket.connect_timeout(&to.into(), patience(timeout))?;
    let stream = TcpStream::from(socket);
    patient(&stream)?;
    Ok(stream)
}

/// Ends a connection with a reset, at once: connected to `AF_UNSPEC` a socket is
/// disconnected (connect(2); `tcp_disconnect` in `net/ipv4/tcp.c`). A close would
/// wait for programs that are being started, as [`bind`] says.
///
/// # Errors
/// Where the socket refuses.
pub fn reset(stream: TcpStream) -> io::Result<()> {
    Ok(rustix::net::connect_unspec(stream)?)
}

/// Whether an error says that the other side has aborted the connection.
#[must_use]
pub fn is_reset(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
    )
}

/// Sends a line and reads one back: the line, and how long it took.
///
/// # Errors
/// Where the connection breaks or the reply does not come.
pub fn ask(stream: &mut TcpStream, line: &str) -> io::Result<(String, Duration)> {
    let started = Instant::now();
    stream.write_all(format!("{line}\n").as_bytes())?;
    Ok((read_line(stream)?, started.elapsed()))
}

/// Reads up to a newline, which is left out.
///
/// # Errors
/// Where the connection ends before, breaks, or nothing comes.
pub fn read_line(stream: &mut impl Read) -> io::Result<String> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    loop {
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            return Ok(String::from_utf8_lossy(&line).into_owned());
        }
        line.push(byte[0]);
    }
}

/// Bytes that differ from each other and from their neighbours, so that a
/// missing, doubled or swapped piece shows.
#[must_use]
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state: u32 = 0x2545_F491;
    std::iter::repeat_with(|| {
        // Marsaglia's xorshift32.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    })
    .take(length)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_can_be_used_again_although_a_child_still_holds_it() {
        let listener = listen((std::net::Ipv4Addr::LOCALHOST, 0).into()).expect("a port");
        let address = listener.local_addr().expect("bound");
        let of_a_child = listener.try_clone().expect("a duplicate");
        let child = std::thread::spawn(move || {
            std::thread::sleep(FORK_TO_EXEC / 10);
            drop(of_a_child);
        });
        drop(listener);
        listen(address).expect("free once the child has let go of it");
        child.join().expect("no panic");
    }

    #[test]
    fn a_reset_ends_the_connection_although_a_child_still_holds_it() {
        let listener = listen((std::net::Ipv4Addr::LOCALHOST, 0).into()).expect("a port");
        let to = listener.local_addr().expect("bound");
        let connect = |from| try_connect(Some(from), to, Duration::from_secs(1));
        let stream = connect((std::net::Ipv4Addr::LOCALHOST, 0).into()).expect("a listener is there");
        let from = stream.local_addr().expect("bound");
        let (mut server, _) = listener.accept().expect("a connection is there");
        server.set_read_timeout(Some(Duration::from_secs(1))).expect("not zero");
        let of_a_child = stream.try_clone().expect("a duplicate");
        reset(stream).expect("not refused");
        let error = server.read(&mut [0]).expect_err("the connection is reset");
        assert!(is_reset(&error), "{error}");
        connect(from).expect("the port is free for the same destination");
        drop(of_a_child);
    }
}
