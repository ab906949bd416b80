//! Moves bytes between two TCP connections until both are done.
//!
//! The rest of the relay sees [`copy`] alone, so how bytes move can change.

mod direction;

use std::cell::Cell;
use std::future::poll_fn;
use std::os::fd::AsFd;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

use self::direction::Direction;
use super::pool::Pool;
use super::quiet;
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

/// How copying ends for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// There is no more to copy.
    Ended(Ending),
    /// No byte for [`quiet::AFTER`] since this one, and nothing is in hand.
    Quiet(Instant),
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
/// on. The last FIN is sent when the connections are dropped. `totals` are the worker's counters of bytes up and down.
///
/// What it is given is in the future once, not as arguments too: see [`Copy`].
pub(crate) fn copy<'a>(
    client: &'a Wire,
    upstream: &'a Wire,
    pool: &'a Pool,
    patience: &'a Patience,
    traffic: &'a Traffic,
    totals: (&'a Value, &'a Value),
) -> impl Future<Output = Outcome> + 'a {
    let now = Instant::now();
    let mut copy = Copy {
        up: Direction::new((Side::Client, client), upstream, pool, (&traffic.up, totals.0), now),
        down: Direction::new((Side::Upstream, upstream), client, pool, (&traffic.down, totals.1), now),
        patience,
        dead: None,
        grace_ends: now,
    };
    async move {
        let mut clock = pin!(sleep_until(copy.deadline().0));
        let outcome = poll_fn(|cx| copy.poll(clock.as_mut(), cx)).await;
        if let Outcome::Ended(Ending::Reset(side)) = outcome {
            let other = if side == Side::Client { copy.down.from() } else { copy.up.from() };
            // In a box: few connections end so, and all would have room for it.
            Box::pin(flush(other.socket(), copy.grace_ends)).await;
        }
        outcome
    }
}

/// Waits until a connection has been reset (or its peer given up), however much
/// there is to read before it.
pub(crate) async fn reset(stream: &TcpStream) {
    if let Err(error) = stream.ready(Interest::ERROR).await {
        tracing::debug!(%error, "the runtime is going away");
    }
}

/// Whether it has been, as far as the runtime knows.
fn is_reset(stream: &TcpStream) -> bool {
    stream.try_io(Interest::ERROR, || Ok(())).is_ok()
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

/// Both directions of a connection. No futures inside of each other: thousands of
/// connections wait here, and what they wait with is what one takes in memory.
struct Copy<'a> {
    up: Direction<'a>,
    down: Direction<'a>,
    patience: &'a Patience,
    /// The first side that died; what follows from it does not count.
    dead: Option<Side>,
    grace_ends: Instant,
}

impl Copy<'_> {
    fn poll(&mut self, mut clock: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<Outcome> {
        // Once for all that is done here, which takes less time than any time-out tells apart.
        let mut now = Instant::now();
        loop {
            let known = self.dead;
            self.advance(now, cx);
            match self.dead {
                None if self.up.is_open() || self.down.is_open() => {}
                None => return Poll::Ready(Outcome::Ended(Ending::Closed)),
                // Bytes towards the dead side are lost; those from it are still delivered.
                Some(Side::Client) if self.up.is_open() => self.down.abandon(),
                Some(Side::Upstream) if self.down.is_open() => self.up.abandon(),
                Some(side) => return Poll::Ready(Outcome::Ended(Ending::Reset(side))),
            }
            // What one direction has met is news to the other, which had its turn before.
            if self.dead == known {
                break;
            }
        }
        // It sleeps until the time-out that is due if no byte comes, and looks then whether
        // one came: bytes cost no timer.
        loop {
            let (deadline, outcome) = self.deadline();
            if now >= deadline {
                return Poll::Ready(outcome);
            }
            if clock.is_elapsed() || deadline < clock.deadline() {
                clock.as_mut().reset(deadline);
            }
            ready!(clock.as_mut().poll(cx));
            now = Instant::now();
        }
    }

    /// Moves what can be moved.
    fn advance(&mut self, now: Instant, cx: &mut Context<'_>) {
        for side in [Side::Client, Side::Upstream] {
            let (direction, other) = match side {
                Side::Client => (&mut self.up, &self.down),
                Side::Upstream => (&mut self.down, &self.up),
            };
            if let Poll::Ready(Err(side)) = direction.poll(self.dead, !other.is_open(), now, cx)
                && self.dead.is_none()
            {
                self.dead = Some(side);
                self.grace_ends = now + RESET_GRACE;
            }
        }
    }

    /// When patience ends, and how that ends copying.
    fn deadline(&self) -> (Instant, Outcome) {
        let last = self.up.last_byte().max(self.down.last_byte());
        match self.dead {
            Some(side) => (self.grace_ends, Outcome::Ended(Ending::Reset(side))),
            None if self.up.is_quiet() && self.down.is_quiet() && quiet::AFTER < self.patience.idle => {
                (last + quiet::AFTER, Outcome::Quiet(last))
            }
            None if self.up.is_open() && self.down.is_open() => {
                (last + self.patience.idle, Outcome::Ended(Ending::Idle))
            }
            None => (last + self.patience.half_close, Outcome::Ended(Ending::HalfClosed)),
        }
    }
}

#[cfg(test)]
mod tests;
