//! One direction of a connection: how its bytes move.

use std::cell::Cell;
use std::io;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::{Side, is_reset, reset};
use crate::relay::pipe::Pipe;
use crate::relay::pool::{Buffer, Pool};
use crate::sockopt;
use crate::stats::Value;
use crate::wire::Wire;

/// Reads in a row before other connections get their turn.
const ROUNDS: usize = 16;

/// Bytes at a time that are worth a pipe: what comes in less than a quarter of a buffer is no bulk
/// transfer any more.
const WORTH_A_PIPE: usize = 16 << 10;

/// One direction of a connection.
///
/// It begins with a buffer, which is cheapest for what is short. Where more is there than a buffer
/// takes, pages are moved through a pipe instead, as long as much comes at a time.
pub(super) struct Direction<'a> {
    from: &'a Wire,
    to: &'a Wire,
    /// The side of `from`.
    source: Side,
    pool: &'a Pool,
    /// Those of the connection, those of the worker.
    bytes: (&'a Cell<u64>, &'a Value),
    last_byte: Instant,
    step: Step<'a>,
    /// Pages are to be moved.
    bulk: bool,
    /// Bytes that were there since it has waited for any.
    at_a_time: usize,
    /// Waits for a reset of the source while that is not read.
    reset: Option<Pin<Box<dyn Future<Output = ()> + 'a>>>,
}

/// What a direction does next. Only with bytes in hand it holds a buffer or a pipe.
enum Step<'a> {
    Read,
    Write { buffer: Buffer<'a>, at: usize, end: usize },
    Drain(Pipe<'a>),
    Flush,
    Close,
    Done,
}

impl<'a> Direction<'a> {
    pub(super) fn new(
        (source, from): (Side, &'a Wire),
        to: &'a Wire,
        pool: &'a Pool,
        bytes: (&'a Cell<u64>, &'a Value),
        now: Instant,
    ) -> Self {
        let (step, bulk, at_a_time, reset) = (Step::Read, false, 0, None);
        Self { from, to, source, pool, bytes, last_byte: now, step, bulk, at_a_time, reset }
    }

    pub(super) const fn from(&self) -> &'a Wire {
        self.from
    }

    pub(super) const fn is_open(&self) -> bool {
        !matches!(self.step, Step::Done)
    }

    /// Whether it waits for a byte of a socket, and has nothing in hand.
    pub(super) fn is_quiet(&self) -> bool {
        matches!(self.step, Step::Read) && self.plain().is_some()
    }

    pub(super) const fn last_byte(&self) -> Instant {
        self.last_byte
    }

    /// What it holds is lost.
    pub(super) fn abandon(&mut self) {
        self.step = Step::Done;
    }

    /// Moves bytes until the source closes (its FIN is passed on) or a side dies, which one is told.
    /// A source may die also after that, and while what came from it is still being delivered.
    /// The `last` direction leaves its FIN to whoever closes the connections.
    pub(super) fn poll(
        &mut self,
        dead: Option<Side>,
        last: bool,
        now: Instant,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Side>> {
        let mut result = Poll::Ready(Ok(()));
        if self.is_open() {
            result = self.advance(dead, last, now, cx);
            if result.is_ready() {
                self.abandon();
            }
        }
        // Whoever is not read, because it has closed or the destination stalls, may still reset.
        if dead.is_some() || matches!(self.step, Step::Read) || matches!(result, Poll::Ready(Err(_))) {
            self.reset = None;
            return result;
        }
        let from = self.from;
        // Nobody waits for it any more.
        if last && !self.is_open() && self.reset.is_none() && !is_reset(from.socket()) {
            return result;
        }
        let watch = self.reset.get_or_insert_with(|| Box::pin(reset(from.socket())));
        ready!(watch.as_mut().poll(cx));
        self.reset = None;
        Poll::Ready(Err(self.source))
    }

    fn advance(
        &mut self,
        dead: Option<Side>,
        last: bool,
        now: Instant,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Side>> {
        let (source, destination) = (self.source, self.source.other());
        let mut rounds = 0;
        loop {
            match &mut self.step {
                Step::Read => {
                    if rounds == ROUNDS {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    rounds += 1;
                    ready!(self.from.poll_readable(cx)).map_err(|_| source)?;
                    self.step = match self.read() {
                        // A socket whose error was reported already reads as closed: no FIN for that,
                        // or a response cut short would look complete.
                        Ok(Step::Close) if dead == Some(source) => return Poll::Ready(Err(source)),
                        Ok(step) => step,
                        Err(error) if is_passing(&error) => continue,
                        Err(_) => return Poll::Ready(Err(source)),
                    };
                    self.last_byte = now;
                }
                Step::Write { buffer, at, end } => {
                    let written = ready!(attempt(self.to, cx, || self.to.try_write(&buffer[*at..*end])))
                        .map_err(|_| destination)?;
                    *at += written;
                    let done = at == end;
                    self.count(written, now);
                    if done {
                        self.step = Step::Flush;
                    }
                }
                Step::Drain(pipe) => {
                    let socket = self.to.socket();
                    let drain = || socket.try_io(Interest::WRITABLE, || pipe.drain(socket));
                    let written = ready!(attempt(self.to, cx, drain)).map_err(|_| destination)?;
                    let done = pipe.held() == 0;
                    self.count(written, now);
                    if done {
                        self.step = Step::Read;
                    }
                }
                Step::Flush => {
                    ready!(attempt(self.to, cx, || self.to.try_flush())).map_err(|_| destination)?;
                    self.step = Step::Read;
                }
                Step::Close if last && matches!(self.to, Wire::Plain(_)) => return Poll::Ready(Ok(())),
                Step::Close => {
                    ready!(attempt(self.to, cx, || self.to.try_close())).map_err(|_| destination)?;
                    return Poll::Ready(Ok(()));
                }
                Step::Done => return Poll::Ready(Ok(())),
            }
        }
    }

    fn read(&mut self) -> io::Result<Step<'a>> {
        let from = self.from;
        if self.bulk
            && let Some(from) = self.plain()
            && let Some(mut pipe) = self.pool.pipes.take()
        {
            match from.try_io(Interest::READABLE, || pipe.fill(from)) {
                Ok(0) => return Ok(Step::Close),
                Ok(filled) => {
                    self.at_a_time += filled;
                    return Ok(Step::Drain(pipe));
                }
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                // Nothing is there; or urgent data, which stops a splice, and nothing would tell
                // when it may go on.
                Err(_) => {
                    self.bulk = mem::take(&mut self.at_a_time) >= WORTH_A_PIPE;
                    return self.read_into_buffer(|buffer| sockopt::receive(from, buffer));
                }
            }
        }
        self.read_into_buffer(|buffer| from.try_read(buffer))
    }

    fn read_into_buffer(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<Step<'a>> {
        let mut buffer = self.pool.take();
        let end = read(&mut buffer)?;
        self.bulk = end == buffer.len();
        self.at_a_time = end;
        Ok(if end == 0 { Step::Close } else { Step::Write { buffer, at: 0, end } })
    }

    /// The socket of the source where pages can be moved from it to the destination.
    fn plain(&self) -> Option<&'a TcpStream> {
        match (self.from, self.to) {
            (Wire::Plain(from), Wire::Plain(_)) => Some(from),
            _ => None,
        }
    }

    fn count(&mut self, written: usize, now: Instant) {
        let (own, total) = self.bytes;
        own.set(own.get() + written as u64);
        total.add(written as u64);
        self.last_byte = now;
    }
}

/// Tries until it succeeds; waits for room at the destination where there is none.
fn attempt<T>(
    to: &Wire,
    cx: &mut Context<'_>,
    mut operation: impl FnMut() -> io::Result<T>,
) -> Poll<io::Result<T>> {
    loop {
        match operation() {
            Ok(done) => return Poll::Ready(Ok(done)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ready!(to.poll_writable(cx))?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
    }
}

/// Whether trying again may help.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::super::tests::connection;
    use super::*;

    #[tokio::test]
    async fn pages_are_moved_while_much_comes_at_a_time() {
        let (mut client, from) = connection().await;
        let (mut server, to) = connection().await;
        let (from, to) = (Wire::Plain(from), Wire::Plain(to));
        let (pool, own, total) = (Pool::default(), Cell::default(), Value::default());
        let mut direction = Direction::new((Side::Client, &from), &to, &pool, (&own, &total), Instant::now());
        // Each arrives whole, and has left again before the next: the source runs dry in between.
        for (bytes, is_bulk) in [(300_000, true), (40_000, true), (40_000, true), (1_000, false)] {
            client.write_all(&vec![7; bytes]).await.expect("an open connection");
            let mut got = vec![0; bytes];
            let arrival = server.read_exact(&mut got);
            tokio::select! {
                ended = poll_fn(|cx| direction.poll(None, false, Instant::now(), cx)) => panic!("{ended:?}"),
                arrived = arrival => assert_eq!(arrived.ok(), Some(bytes)),
            }
            let dry = poll_fn(|cx| Poll::Ready(direction.poll(None, false, Instant::now(), cx))).await;
            assert_eq!((dry, direction.bulk), (Poll::Pending, is_bulk), "{bytes} bytes at a time");
        }
    }
}
