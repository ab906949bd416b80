//! Moves bytes between two TCP connections until both are done.
//!
//! The rest of the relay sees [`copy`] alone, so how bytes move can change.

mod direction;

use std::cell::Cell;
use std::os::fd::AsFd;
use std::pin::pin;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Instant;

use self::direction::Direction;
use super::pool::Pool;
use crate::sockopt;
use crate::stats::Value;
use crate::wire::Wire;

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

#[cfg(test)]
mod tests;
