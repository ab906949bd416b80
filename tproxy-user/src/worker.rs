//! A worker: one thread with its own runtime, listeners, flows and buffers.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use tokio::io::unix::AsyncFd;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::oneshot;
use tokio::task::spawn_local;

use crate::failure::Failure;
use crate::listener::{Bound, WorkerListeners};
use crate::relay::raw::ReplySender;
use crate::relay::refusal::RefusalSender;
use crate::relay::{self, Flows, Handshakes, Shared};
use crate::shutdown::{Phase, Shutdown};
use crate::sockopt::{self, SocketError};
use crate::turn;

/// A worker that could not be started, or that died.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The thread or its runtime.
    #[error("cannot start worker {index}")]
    Start {
        /// The worker.
        index: usize,
        /// What failed.
        source: io::Error,
    },
    /// The raw sockets that send UDP replies and answers to SYNs.
    #[error("cannot make the raw sockets of worker {index}")]
    RawSockets {
        /// The worker.
        index: usize,
        /// What failed.
        source: SocketError,
    },
    /// The same, for want of `CAP_NET_RAW`.
    #[error("cannot make the raw sockets of worker {index}")]
    Privilege {
        /// The worker.
        index: usize,
        /// [`Failure::Unsupported`].
        source: Failure,
    },
    /// The tun device of faithful handshakes: a client would wait for an answer in vain.
    #[error("worker {index} lost the tun device of --handshake faithful: {source}; start again")]
    Tun {
        /// The worker.
        index: usize,
        /// What reading it answered.
        source: io::Error,
    },
    /// The thread panicked. That is a fault of this program.
    #[error("worker {index} panicked; please report it with the lines above")]
    Panicked {
        /// The worker.
        index: usize,
    },
}

/// A running worker.
#[derive(Debug)]
pub struct WorkerHandle {
    index: usize,
    thread: JoinHandle<Result<(), WorkerError>>,
    over: oneshot::Receiver<()>,
}

impl WorkerHandle {
    /// Waits until the worker is done: everything it had has ended.
    ///
    /// # Errors
    /// [`WorkerError::Panicked`], [`WorkerError::Tun`].
    pub async fn finished(self) -> Result<(), WorkerError> {
        // The sender is dropped, never used, when the thread ends in whatever way.
        if self.over.await.is_ok() {
            tracing::trace!("worker {} said good-bye", self.index);
        }
        self.thread.join().unwrap_or(Err(WorkerError::Panicked { index: self.index }))
    }
}

/// Everything a worker starts with.
struct Parts {
    runtime: LocalRuntime,
    tcp: Vec<AsyncFd<OwnedFd>>,
    udp: Vec<AsyncFd<OwnedFd>>,
    /// The one whose datagrams have the DF bit.
    udp_df: Vec<AsyncFd<OwnedFd>>,
    replies: ReplySender,
    /// SYNs, and what answers those that are not let in.
    handshakes: Option<(AsyncFd<OwnedFd>, RefusalSender)>,
}

/// Starts the worker `index` (below the number of workers that `shared` knows).
///
/// It relays until `shutdown` drains and then stops it. The thread stays in the
/// network namespace of the caller. With `syns`, a queue of the tun device, its
/// handshakes are faithful.
///
/// # Errors
/// [`WorkerError`].
pub fn spawn(
    index: usize,
    listeners: WorkerListeners,
    syns: Option<OwnedFd>,
    shared: &Arc<Shared>,
    shutdown: Shutdown,
) -> Result<WorkerHandle, WorkerError> {
    let shared = Arc::clone(shared);
    let (alive, over) = oneshot::channel();
    let (tell, prepared) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(format!("tproxy-{index}"))
        .spawn(move || {
            let _alive = alive;
            // In the thread, which its runtime cannot leave.
            let parts = prepare(index, listeners, syns, &shared)?;
            // Whoever waits for it waits still.
            let _ = tell.send(());
            run(index, parts, shared, shutdown)
        })
        .map_err(|source| WorkerError::Start { index, source })?;
    if prepared.recv().is_err() {
        return Err(match thread.join() {
            Ok(Err(error)) => error,
            _ => WorkerError::Panicked { index },
        });
    }
    Ok(WorkerHandle { index, thread, over })
}

fn prepare(
    index: usize,
    listeners: WorkerListeners,
    syns: Option<OwnedFd>,
    shared: &Shared,
) -> Result<Parts, WorkerError> {
    let start = |source| WorkerError::Start { index, source };
    let explain = |source: SocketError| match source.errno() {
        Some(libc::EPERM | libc::EACCES) => {
            let source = Failure::unsupported(format_args!("{source}: CAP_NET_RAW is needed; run as root"));
            WorkerError::Privilege { index, source }
        }
        _ => WorkerError::RawSockets { index, source },
    };
    let replies = ReplySender::new(listeners.udp4.is_some(), listeners.udp6.is_some(), shared.mark())
        .map_err(explain)?;
    let (v4, v6) = (listeners.tcp4.is_some(), listeners.tcp6.is_some());
    let refusals = syns.is_some().then(|| RefusalSender::new(v4, v6, shared.mark())).transpose();
    let refusals = refusals.map_err(explain)?;
    // Its tasks wake each other without a system call, as those of a `LocalSet` do not.
    let mut builder = Builder::new_current_thread();
    builder.enable_all().on_thread_park(turn::give_way).on_thread_unpark(turn::go_on);
    let runtime = builder.build_local(LocalOptions::default()).map_err(start)?;
    let context = runtime.enter();
    let tcp = watched([listeners.tcp4, listeners.tcp6]).map_err(start)?;
    let udp = watched([listeners.udp4, listeners.udp6]).map_err(start)?;
    let udp_df = watched([listeners.udp4_df]).map_err(start)?;
    let syns = syns.map(sockopt::watch).transpose().map_err(start)?;
    drop(context);
    Ok(Parts { runtime, tcp, udp, udp_df, replies, handshakes: syns.zip(refusals) })
}

fn watched<T: Into<OwnedFd>, const N: usize>(
    listeners: [Option<Bound<T>>; N],
) -> io::Result<Vec<AsyncFd<OwnedFd>>> {
    listeners.into_iter().flatten().map(|bound| sockopt::watch(bound.socket.into())).collect()
}

fn run(index: usize, parts: Parts, shared: Arc<Shared>, mut shutdown: Shutdown) -> Result<(), WorkerError> {
    let Parts { runtime, tcp, udp, udp_df, replies, handshakes } = parts;
    let outcome = runtime.block_on(async {
        let worker = relay::Worker::new(
            shared,
            index,
            handshakes.map(|(syns, refusals)| Handshakes::new(syns, refusals)),
        );
        let flows = Flows::new(&worker, replies);
        let accepting: Vec<_> = tcp
            .into_iter()
            .map(|listener| {
                let mut shutdown = shutdown.clone();
                let end = async move { shutdown.reached(Phase::Draining).await };
                spawn_local(relay::tcp::listen(Rc::clone(&worker), listener, end))
            })
            .collect();
        for (listeners, dont_fragment) in [(udp, false), (udp_df, true)] {
            for listener in listeners {
                let (worker, flows) = (Rc::clone(&worker), Rc::clone(&flows));
                spawn_local(relay::udp::listen(worker, flows, listener, dont_fragment));
            }
        }
        tokio::select! {
            () = shutdown.reached(Phase::Draining) => {}
            Err(source) = relay::handshake::listen(&worker) => return Err(WorkerError::Tun { index, source }),
        }
        worker.drain();
        flows.drain();
        let finished = async {
            // They take what is in their queues, and only then nothing more begins.
            for listener in accepting {
                if let Err(error) = listener.await {
                    tracing::error!(%error, "a listener's task died");
                }
            }
            if let Some(handshakes) = &worker.handshakes {
                handshakes.close();
            }
            worker.finished().await;
        };
        tokio::select! {
            () = finished => {}
            () = shutdown.reached(Phase::Stopped) => {}
        }
        Ok(())
    });
    // What is left ends here: its sockets are reset and its records say so.
    drop(runtime);
    outcome
}
