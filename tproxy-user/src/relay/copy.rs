//! Moves bytes between two TCP connections until both are done.
//!
//! The rest of the relay sees [`copy`] alone, so how bytes move can change.

use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;
use std::pin::pin;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::pool::Pool;
use crate::sockopt;
use crate::stats::Value;
use crate::wire::Wire;

/// Reads in a row before other connections get their turn.
const ROUNDS: usize = 16;

/// How long bytes that came before a reset may take to reach the other side. A
/// side that takes none for this long would not read them soon either.
const RESET_GRACE: Duration = Duration::from_secs(1);

/// First pause between two looks at whether the other side has got all bytes.
const FLUSH_PAUSE: Duration = Duration::from_millis(1);

/// One of the two connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Towards the client.
    Client,
    /// Towards upstream.
    Upstream,
}

impl Side {
    const fn other(self) -> Self {
        match self {
            Self::Client => Self::Upstream,
            Self::Upstream => Self::Client,
        }
    }
}

/// How copying ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Both sides closed and both have been told.
    Closed,
    /// A side reset or vanished; the other is to be reset.
    Reset(Side),
    /// No byte for the idle time-out; both are to be reset.
    Idle,
    /// No byte for the half-close time-out; both are to be reset.
    HalfClosed,
}

/// How long without a byte.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// While both directions are open.
    pub(crate) idle: Duration,
    /// Once one is closed.
    pub(crate) half_close: Duration,
}

/// Bytes of one connection so far.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    /// From the client.
    pub(crate) up: Cell<u64>,
    /// To the client.
    pub(crate) down: Cell<u64>,
}

/// Copies both ways until both directions are closed, a side resets or patience ends.
///
/// A closed direction is passed on as FIN once all its bytes are; the other goes
/// on. `totals` are the worker's counters of bytes up and down.
pub(crate) async fn copy(
    client: &Wire,
    upstream: &Wire,
    pool: &Pool,
    patience: Patience,
    traffic: &Traffic,
    totals: (&Value, &Value),
) -> Ending {
    let state = State::new();
    let up = Direction {
        from: client,
        to: upstream,
        source: Side::Client,
        pool,
        state: &state,
        bytes: &traffic.up,
        total: totals.0,
    };
    let down = Direction {
        from: upstream,
        to: client,
        source: Side::Upstream,
        pool,
        state: &state,
        bytes: &traffic.down,
        total: totals.1,
    };
    let (mut up_runs, mut down_runs) = (pin!(up.run()), pin!(down.run()));
    let mut clock = pin!(state.clock(patience));
    let (mut up_open, mut down_open) = (true, true);
    let ending = loop {
        // The result of a direction; `Err` names the side that is dead.
        let result = tokio::select! {
            result = &mut up_runs, if up_open => {
                up_open = false;
                result
            }
            result = &mut down_runs, if down_open => {
                down_open = false;
                result
            }
            // A side that has closed its direction is no longer read, but may still reset.
            () = reset(client.socket()), if !up_open && state.dead.get().is_none() => Err(Side::Client),
            () = reset(upstream.socket()), if !down_open && state.dead.get().is_none() => Err(Side::Upstream),
            ending = &mut clock => break ending,
        };
        if let Err(side) = result {
            state.died(side);
        }
        match state.dead.get() {
            None if up_open || down_open => {}
            None => break Ending::Closed,
            // Bytes towards the dead side are lost; those from it are still delivered.
            Some(Side::Client) if up_open => down_open = false,
            Some(Side::Upstream) if down_open => up_open = false,
            Some(side) => break Ending::Reset(side),
        }
    };
    if let Ending::Reset(side) = ending {
        let other = if side == Side::Client { upstream } else { client };
        flush(other.socket(), state.grace_ends.get()).await;
    }
    ending
}

/// Waits until a connection has been reset (or its peer given up), however much
/// there is to read before it.
pub(crate) async fn reset(stream: &TcpStream) {
    if let Err(error) = stream.ready(Interest::ERROR).await {
        tracing::debug!(%error, "the runtime is going away");
    }
}

/// Waits until the peer has acknowledged everything: the reset that follows
/// would drop what has not left yet, and may overtake what the peer has not read.
async fn flush(stream: &TcpStream, until: Instant) {
    let mut pause = FLUSH_PAUSE;
    while sockopt::unacknowledged(stream.as_fd()) > 0 && Instant::now() < until {
        tokio::select! {
            () = tokio::time::sleep(pause) => pause *= 2,
            () = reset(stream) => return,
        }
    }
}

/// What both directions know of each other.
struct State {
    last_byte: Cell<Instant>,
    half_closed: Cell<bool>,
    dead: Cell<Option<Side>>,
    grace_ends: Cell<Instant>,
    /// The clock has to look anew.
    changed: Notify,
}

impl State {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            last_byte: Cell::new(now),
            half_closed: Cell::new(false),
            dead: Cell::new(None),
            grace_ends: Cell::new(now),
            changed: Notify::new(),
        }
    }

    /// The first side that dies counts; what follows from it does not.
    fn died(&self, side: Side) {
        if self.dead.get().is_none() {
            self.dead.set(Some(side));
            self.grace_ends.set(Instant::now() + RESET_GRACE);
            self.changed.notify_one();
        }
    }

    fn half_close(&self) {
        self.half_closed.set(true);
        self.changed.notify_one();
    }

    /// Ends when patience does. It sleeps until the time-out that is due if no
    /// byte comes, and looks then whether one came: bytes cost no timer.
    async fn clock(&self, patience: Patience) -> Ending {
        loop {
            let last = self.last_byte.get();
            let (deadline, ending) = match (self.dead.get(), self.half_closed.get()) {
                (Some(side), _) => (self.grace_ends.get(), Ending::Reset(side)),
                (None, true) => (last + patience.half_close, Ending::HalfClosed),
                (None, false) => (last + patience.idle, Ending::Idle),
            };
            if Instant::now() >= deadline {
                return ending;
            }
            tokio::select! {
                () = tokio::time::sleep_until(deadline) => {}
                () = self.changed.notified() => {}
            }
        }
    }
}

/// One direction of a connection.
struct Direction<'a> {
    from: &'a Wire,
    to: &'a Wire,
    /// The side of `from`.
    source: Side,
    pool: &'a Pool,
    state: &'a State,
    bytes: &'a Cell<u64>,
    total: &'a Value,
}

impl Direction<'_> {
    /// Copies until the source closes (its FIN is passed on) or a side dies.
    async fn run(&self) -> Result<(), Side> {
        loop {
            self.from.readable().await.map_err(|_| self.source)?;
            // Taken only now: a connection with nothing to say holds no buffer.
            let mut buffer = self.pool.take();
            let mut more = true;
            for _ in 0..ROUNDS {
                match self.from.try_read(&mut buffer) {
                    Ok(0) => return self.pass_fin().await,
                    Ok(read) => self.write(&buffer[..read]).await?,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        more = false;
                        break;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return Err(self.source),
                }
            }
            drop(buffer);
            if more {
                tokio::task::yield_now().await;
            }
        }
    }

    async fn pass_fin(&self) -> Result<(), Side> {
        // A socket whose error was reported already reads as closed: no FIN for that, or
        // a response cut short would look complete.
        if self.state.dead.get() == Some(self.source) {
            return Err(self.source);
        }
        while self.blocks(self.to.try_close())? {
            self.writable().await?;
        }
        self.state.half_close();
        Ok(())
    }

    async fn write(&self, mut rest: &[u8]) -> Result<(), Side> {
        self.state.last_byte.set(Instant::now());
        while !rest.is_empty() {
            match self.to.try_write(rest) {
                Ok(written) => {
                    rest = &rest[written..];
                    self.bytes.set(self.bytes.get() + written as u64);
                    self.total.add(written as u64);
                    self.state.last_byte.set(Instant::now());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(self.source.other()),
            }
        }
        while self.blocks(self.to.try_flush())? {
            self.writable().await?;
        }
        Ok(())
    }

    /// Whether what was tried at the destination is to be tried again.
    fn blocks(&self, outcome: io::Result<()>) -> Result<bool, Side> {
        match outcome {
            Ok(()) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
            Err(_) => Err(self.source.other()),
        }
    }

    /// Waits for room to write, and meanwhile for a reset of the source: a reader
    /// that stalls must not hide that the other end is gone.
    async fn writable(&self) -> Result<(), Side> {
        loop {
            tokio::select! {
                result = self.to.writable() => return result.map_err(|_| self.source.other()),
                () = reset(self.from.socket()), if self.state.dead.get().is_none() => self.state.died(self.source),
            }
        }
    }
}

#[cfg(test)]
mod tests;
