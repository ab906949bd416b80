//! One direction of a connection: how its bytes move.

use std::cell::Cell;
use std::io;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::{Side, State, reset};
use crate::relay::pipe::Pipe;
use crate::relay::pool::Pool;
use crate::sockopt;
use crate::stats::Value;
use crate::wire::Wire;

/// Reads in a row before other connections get their turn.
const ROUNDS: usize = 16;

/// One direction of a connection.
///
/// It begins with a buffer, which is cheapest for what is short. Where more is there than a buffer
/// takes, pages are moved through a pipe instead, until no more is there.
pub(super) struct Direction<'a> {
    pub(super) from: &'a Wire,
    pub(super) to: &'a Wire,
    /// The side of `from`.
    pub(super) source: Side,
    pub(super) pool: &'a Pool,
    pub(super) state: &'a State,
    pub(super) bytes: &'a Cell<u64>,
    pub(super) total: &'a Value,
}

/// Why some reads in a row ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// All that was there has moved.
    Drained,
    /// It is another connection's turn.
    Over,
    /// A whole buffer was there at once: a bulk transfer.
    Bulk,
    /// The source has closed.
    Closed,
}

impl Direction<'_> {
    /// Moves bytes until the source closes (its FIN is passed on) or a side dies.
    pub(super) async fn run(&self) -> Result<(), Side> {
        let mut bulk = false;
        loop {
            self.from.readable().await.map_err(|_| self.source)?;
            // Taken only now: a connection with nothing to say holds neither pipe nor buffer.
            let pipe = if bulk { self.pool.pipes.take() } else { None };
            let turn = match (pipe, self.from, self.to) {
                (Some(pipe), Wire::Plain(from), Wire::Plain(to)) => self.splice(from, to, pipe).await?,
                _ => self.copy().await?,
            };
            match turn {
                Turn::Drained => bulk = false,
                Turn::Bulk => bulk = true,
                Turn::Over => tokio::task::yield_now().await,
                Turn::Closed => return self.pass_fin().await,
            }
        }
    }

    fn is_plain(&self) -> bool {
        matches!((self.from, self.to), (Wire::Plain(_), Wire::Plain(_)))
    }

    async fn copy(&self) -> Result<Turn, Side> {
        let mut buffer = self.pool.take();
        for _ in 0..ROUNDS {
            match self.from.try_read(&mut buffer) {
                Ok(0) => return Ok(Turn::Closed),
                Ok(read) => {
                    self.write(&buffer[..read]).await?;
                    if read == buffer.len() && self.is_plain() {
                        return Ok(Turn::Bulk);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Drained),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(self.source),
            }
        }
        Ok(Turn::Over)
    }

    async fn splice(&self, from: &TcpStream, to: &TcpStream, mut pipe: Pipe<'_>) -> Result<Turn, Side> {
        for _ in 0..ROUNDS {
            match from.try_io(Interest::READABLE, || pipe.fill(from)) {
                Ok(0) => return Ok(Turn::Closed),
                Ok(_) => self.drain(&mut pipe, to).await?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Urgent data stops a splice, and nothing would tell when it may go on.
                    let mut buffer = self.pool.take();
                    match sockopt::receive(from, &mut buffer) {
                        Ok(0) => return Ok(Turn::Closed),
                        Ok(read) => self.write(&buffer[..read]).await?,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Drained),
                        Err(_) => return Err(self.source),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(self.source),
            }
        }
        Ok(Turn::Over)
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
                    self.count(written);
                }
                Err(error) => self.try_again(error).await?,
            }
        }
        while self.blocks(self.to.try_flush())? {
            self.writable().await?;
        }
        Ok(())
    }

    async fn drain(&self, pipe: &mut Pipe<'_>, to: &TcpStream) -> Result<(), Side> {
        self.state.last_byte.set(Instant::now());
        while pipe.held() > 0 {
            match to.try_io(Interest::WRITABLE, || pipe.drain(to)) {
                Ok(written) => self.count(written),
                Err(error) => self.try_again(error).await?,
            }
        }
        Ok(())
    }

    fn count(&self, written: usize) {
        self.bytes.set(self.bytes.get() + written as u64);
        self.total.add(written as u64);
        self.state.last_byte.set(Instant::now());
    }

    /// After a write failed: waits for room where there was none.
    async fn try_again(&self, error: io::Error) -> Result<(), Side> {
        match error.kind() {
            io::ErrorKind::WouldBlock => self.writable().await,
            io::ErrorKind::Interrupted => Ok(()),
            _ => Err(self.source.other()),
        }
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
