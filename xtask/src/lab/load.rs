//! Many connections: connect, request, response, close.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{sleep, timeout};

use super::namespace::Namespace;
use super::pace::patience;

const REQUEST: [u8; 64] = [b'q'; 64];
const RESPONSE: [u8; 64] = [b'a'; 64];

/// How long one connection may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often a load looks whether it is to stop.
const GLANCE: Duration = Duration::from_secs(1);

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Answers every request; runs until dropped.
#[derive(Debug)]
pub struct LoadServer {
    stop: Arc<AtomicBool>,
    foreign: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl LoadServer {
    /// Serves a port of every address of one family. Connections that do not
    /// come from `expected` are counted, see [`foreign`](Self::foreign).
    ///
    /// # Errors
    /// Where the port is taken.
    pub fn start(namespace: &Namespace, address: SocketAddr, expected: IpAddr) -> Result<Self> {
        let (stop, foreign) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, strangers) = (stop.clone(), foreign.clone());
        let (tell, listening) = std::sync::mpsc::sync_channel(1);
        let thread = namespace.spawn(move || {
            let Ok(runtime) = runtime() else { return };
            LocalSet::new().block_on(&runtime, async move {
                let listener = match listen(address) {
                    Ok(listener) => listener,
                    Err(error) => {
                        let _ = tell.send(Err(error));
                        return;
                    }
                };
                let _ = tell.send(Ok(()));
                while !stopped.load(Ordering::Relaxed) {
                    // The time-out is for the stop flag.
                    let Ok(Ok((stream, client))) =
                        timeout(Duration::from_millis(50), listener.accept()).await
                    else {
                        continue;
                    };
                    if client.ip() != expected {
                        strangers.fetch_add(1, Ordering::Relaxed);
                    }
                    tokio::task::spawn_local(respond(stream));
                }
            });
        })?;
        listening
            .recv()
            .context("the load server ended")?
            .with_context(|| format!("cannot listen on {address}"))?;
        Ok(Self { stop, foreign, thread: Some(thread) })
    }

    /// Connections that came from an unexpected address.
    #[must_use]
    pub fn foreign(&self) -> u64 {
        self.foreign.load(Ordering::Relaxed)
    }
}

impl Drop for LoadServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        SockRef::from(&socket).set_only_v6(true)?;
    }
    socket.bind(address)?;
    socket.listen(16_384)
}

async fn respond(mut stream: TcpStream) -> io::Result<()> {
    let mut request = REQUEST;
    loop {
        // The end of the connection is reported as an error as well.
        stream.read_exact(&mut request).await?;
        stream.write_all(&RESPONSE).await?;
    }
}

/// One exchange with a [`LoadServer`] on an open connection.
///
/// # Errors
/// Where the connection has ended, or the answer does not come within the stream's time-out.
pub fn ask(stream: &mut std::net::TcpStream) -> io::Result<()> {
    stream.write_all(&REQUEST)?;
    stream.read_exact(&mut [0; RESPONSE.len()])
}

/// What to send where.
#[derive(Clone, Debug)]
pub struct Load {
    /// Destinations, taken in turn.
    pub targets: Vec<SocketAddr>,
    /// Connections at one time.
    pub concurrency: usize,
    /// Ends after this number of connections.
    pub connections: u64,
    /// Ends after this time.
    pub duration: Duration,
    /// Whether each is closed by a reset, which leaves no `TIME_WAIT`.
    pub reset: bool,
}

/// How a load went.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Connections with a full response.
    pub completed: u64,
    /// The others, by error.
    pub failed: BTreeMap<String, u64>,
    /// From the first to the last.
    pub elapsed: Duration,
    /// The longest that one took.
    pub slowest: Duration,
    /// How long each took that completed.
    pub times: Vec<Times>,
}

/// How long one connection took, from the beginning of its connect.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Until it was connected.
    pub connected: Duration,
    /// Until the response was there.
    pub answered: Duration,
}

impl Report {
    /// Completed connections a second.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
    pub fn rate(&self) -> f64 {
        self.completed as f64 / self.elapsed.as_secs_f64()
    }

    /// Refuses any failure.
    ///
    /// # Errors
    /// Where a connection failed, or not `connections` were made.
    pub fn expect_all(&self, connections: u64) -> Result<()> {
        if !self.failed.is_empty() || self.completed != connections {
            bail!(
                "{} of {connections} connections completed in {:.1?}; failed: {:?}",
                self.completed,
                self.elapsed,
                self.failed
            );
        }
        Ok(())
    }
}

impl Load {
    /// Runs it from a namespace until it is done or `stop` is set.
    ///
    /// # Errors
    /// Where it cannot be started; failing connections are in the report.
    pub fn run(&self, namespace: &Namespace, stop: &AtomicBool) -> Result<Report> {
        namespace.try_enter(|| {
            let runtime = runtime()?;
            Ok(LocalSet::new().block_on(&runtime, self.generate(stop)))
        })
    }

    async fn generate(&self, stop: &AtomicBool) -> Report {
        let started = Instant::now();
        let mut report = Report::default();
        let mut running = JoinSet::new();
        let mut stopped = None;
        let mut begun = 0_u64;
        let mut targets = self.targets.iter().copied().cycle();
        loop {
            let more = begun < self.connections
                && started.elapsed() < patience(self.duration)
                && !stop.load(Ordering::Relaxed);
            if more && running.len() < self.concurrency {
                let Some(target) = targets.next() else { break };
                running.spawn_local(one(target, self.reset));
                begun += 1;
                continue;
            }
            let Ok(ended) = timeout(GLANCE, running.join_next()).await else {
                // Told to stop, it does not wait for those that nobody answers any more.
                if stop.load(Ordering::Relaxed)
                    && stopped.get_or_insert_with(Instant::now).elapsed() > PATIENCE
                {
                    report
                        .failed
                        .insert("not done when the load was stopped".to_owned(), running.len() as u64);
                    break;
                }
                continue;
            };
            match ended {
                None => break,
                Some(Ok(Ok(times))) => {
                    report.completed += 1;
                    report.slowest = report.slowest.max(times.answered);
                    report.times.push(times);
                }
                Some(Ok(Err(error))) => {
                    *report.failed.entry(error.to_string()).or_default() += 1;
                    // No spinning where every attempt fails at once.
                    sleep(Duration::from_millis(1)).await;
                }
                Some(Err(panic)) => {
                    *report.failed.entry(panic.to_string()).or_default() += 1;
                }
            }
        }
        report.elapsed = started.elapsed();
        report
    }
}

async fn one(target: SocketAddr, reset: bool) -> io::Result<Times> {
    let limit = patience(PATIENCE);
    match timeout(limit, exchange(target, reset)).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("not done within {limit:?}"))),
    }
}

async fn exchange(target: SocketAddr, reset: bool) -> io::Result<Times> {
    let started = Instant::now();
    let mut stream = TcpStream::connect(target).await?;
    let connected = started.elapsed();
    stream.write_all(&REQUEST).await?;
    let mut response = RESPONSE;
    stream.read_exact(&mut response).await?;
    let answered = started.elapsed();
    if reset {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    Ok(Times { connected, answered })
}

/// Raises this process's limit of open files as far as it may go.
///
/// # Errors
/// Where the kernel refuses.
pub fn raise_open_files() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}
