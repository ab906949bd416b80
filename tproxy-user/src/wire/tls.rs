//! TLS over a connection (RFC 8446), as its client.

use std::cell::RefCell;
use std::io::{self, IoSlice, Read as _, Write as _};
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

use super::Wire;

/// A connection inside another.
#[derive(Debug)]
pub struct Session {
    below: Wire,
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    connection: ClientConnection,
    /// What was looked at and not read.
    ahead: Vec<u8>,
}

impl Session {
    /// Has a handshake with the server at the other end, which is to prove that it has this name.
    ///
    /// # Errors
    /// Those of the connection; `InvalidData` with a [`rustls::Error`] where TLS is broken, or the
    /// server's certificate is not to be trusted.
    pub async fn connect(
        below: Wire,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> io::Result<Self> {
        let connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
        let session = Self { below, state: RefCell::new(State { connection, ahead: Vec::new() }) };
        loop {
            match session.try_flush() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    session.below.writable().await?;
                    continue;
                }
                flushed => flushed?,
            }
            if !session.state.borrow().connection.is_handshaking() {
                return Ok(session);
            }
            Box::pin(session.below.readable()).await?;
            match session.state.borrow_mut().receive(&session.below) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// The connection below.
    pub(super) fn below(&self) -> &Wire {
        &self.below
    }

    pub(super) async fn readable(&self) -> io::Result<()> {
        if self.waits() { self.below.readable().await } else { Ok(()) }
    }

    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.waits() { self.below.poll_readable(cx) } else { Poll::Ready(Ok(())) }
    }

    /// Whether there is nothing to read but what is still to come.
    fn waits(&self) -> bool {
        let state = self.state.borrow();
        state.ahead.is_empty() && state.connection.wants_read()
    }

    pub(super) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let state = &mut *self.state.borrow_mut();
        if !state.ahead.is_empty() {
            let length = buffer.len().min(state.ahead.len());
            buffer[..length].copy_from_slice(&state.ahead[..length]);
            state.ahead.drain(..length);
            return Ok(length);
        }
        state.read(&self.below, buffer)
    }

    pub(super) async fn peek(&self, seen: usize, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.look(seen, buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                told => return told,
            }
            self.below.readable().await?;
        }
    }

    fn look(&self, seen: usize, buffer: &mut [u8]) -> io::Result<usize> {
        let state = &mut *self.state.borrow_mut();
        loop {
            let length = state.ahead.len().min(buffer.len());
            buffer[..length].copy_from_slice(&state.ahead[..length]);
            if length > seen || length == buffer.len() {
                return Ok(length);
            }
            match state.read(&self.below, &mut buffer[length..])? {
                0 => return Ok(length),
                more => state.ahead.extend_from_slice(&buffer[length..length + more]),
            }
        }
    }

    pub(super) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let state = &mut *self.state.borrow_mut();
        // First what waits, so that it does not become more and more.
        state.send(&self.below)?;
        let written = state.connection.writer().write(bytes)?;
        match state.send(&self.below) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(written),
        }
    }

    pub(super) fn try_flush(&self) -> io::Result<()> {
        self.state.borrow_mut().send(&self.below)
    }

    pub(super) fn try_close(&self) -> io::Result<()> {
        let state = &mut *self.state.borrow_mut();
        // Sent once, however often it is asked for.
        state.connection.send_close_notify();
        state.send(&self.below)?;
        self.below.try_close()
    }
}

impl State {
    fn read(&mut self, below: &Wire, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                told => return told,
            }
            self.receive(below)?;
        }
    }

    /// Takes what has come.
    fn receive(&mut self, below: &Wire) -> io::Result<usize> {
        let length = self.connection.read_tls(&mut Below(below))?;
        let processed = self.connection.process_new_packets();
        // An answer, or an alert that says what is wrong; what there is no room for goes with the next.
        let sent = self.send(below);
        processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        match sent {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(length),
        }
    }

    fn send(&mut self, below: &Wire) -> io::Result<()> {
        while self.connection.wants_write() {
            self.connection.write_tls(&mut Below(below))?;
        }
        below.try_flush()
    }
}

/// The connection below, as rustls reads and writes it.
struct Below<'a>(&'a Wire);

impl io::Read for Below<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

impl io::Write for Below<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.try_flush()
    }
}

#[cfg(test)]
mod tests;
