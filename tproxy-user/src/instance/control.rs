//! The control socket: one request line of JSON, one answer line of JSON.
//! It is for root alone.

use std::future::Future;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::limits::{self, Alarm, Reserve};

/// A question to the running proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    /// For `status`.
    Status,
    /// For `reload`.
    Reload,
    /// For `check --diff`: the plan that is carried out.
    Plan,
}

/// Longest request line, in bytes.
const LONGEST_REQUEST: u64 = 4096;
/// Longest answer, in bytes.
const LONGEST_ANSWER: u64 = 16 << 20;
/// Connections at one time; more wait in the backlog.
const CONNECTIONS: usize = 16;
/// One connection's time. A reload reads what may be a million networks.
const PATIENCE: Duration = Duration::from_secs(30);

/// Makes the socket, mode 0600. What a killed run left at the path is replaced.
///
/// # Errors
/// Where the path cannot be bound.
///
/// # Panics
/// Outside a tokio runtime.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // From the start: a mode that is set after bind leaves a moment in between.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

/// Answers requests, for ever. Nothing that a peer does ends it.
///
/// It keeps a descriptor in reserve: when connections have used up all others,
/// `status` is what tells the administrator.
pub async fn serve<H, F>(listener: UnixListener, handler: H)
where
    H: Fn(Request) -> F,
    F: Future<Output = Value>,
{
    let mut connections = FuturesUnordered::new();
    let reserve = Reserve::default();
    let trouble = Alarm::default();
    loop {
        if connections.is_empty() {
            // Where that fails, the next accept does, and says so.
            drop(reserve.refill());
        }
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok((stream, _)) => connections.push(timeout(PATIENCE, answer(stream, &handler))),
                Err(error) if limits::is_exhaustion(&error) && reserve.give_up() => {}
                Err(error) => {
                    if trouble.raise() {
                        warn!(%error, "control socket: cannot accept");
                    }
                    sleep(Duration::from_secs(1)).await;
                }
            },
            Some(done) = connections.next() => match done {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(%error, "control socket: connection lost"),
                Err(_) => debug!("control socket: a peer was too slow"),
            },
        }
    }
}

async fn answer<H, F>(stream: tokio::net::UnixStream, handler: &H) -> io::Result<()>
where
    H: Fn(Request) -> F,
    F: Future<Output = Value>,
{
    let (reader, mut writer) = stream.into_split();
    let mut line = Vec::new();
    tokio::io::BufReader::new(reader).take(LONGEST_REQUEST).read_until(b'\n', &mut line).await?;
    let answer = match serde_json::from_slice(&line) {
        Ok(request) => handler(request).await,
        Err(error) => json!({"error": format!("not a request: {error}")}),
    };
    writer.write_all(format!("{answer}\n").as_bytes()).await?;
    writer.shutdown().await
}

/// Asks the running proxy.
///
/// # Errors
/// Where there is none, it does not answer in 30 s, or this is not root.
pub fn ask(path: &Path, request: Request) -> io::Result<Value> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let question = serde_json::to_string(&request)?;
    stream.write_all(format!("{question}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream.take(LONGEST_ANSWER)).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}
