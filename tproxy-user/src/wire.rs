//! A TCP connection as the relay has it: bytes go as they are, or inside TLS.

pub mod tls;

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::AsFd as _;
use std::task::{Context, Poll};

use tokio::io::Interest;
use tokio::net::TcpStream;

use self::tls::Session;
use crate::sockopt;

/// A connection. What takes `&self` may run for both directions at once, in one task.
#[derive(Debug)]
pub enum Wire {
    /// As they are.
    Plain(TcpStream),
    /// Inside TLS, as a client.
    Tls(Box<Session>),
}

impl Wire {
    /// The socket below.
    #[must_use]
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(session) => session.below().socket(),
        }
    }

    /// Waits until there may be something to [read](Self::try_read).
    ///
    /// # Errors
    /// As the runtime says; not those of the connection.
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.readable().await,
            Self::Tls(session) => Box::pin(session.readable()).await,
        }
    }

    /// As [`readable`](Self::readable), for whoever waits by itself: one of a connection.
    ///
    /// # Errors
    /// As there.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(stream) => stream.poll_read_ready(cx),
            Self::Tls(session) => session.poll_readable(cx),
        }
    }

    /// Whether there may be something to read, without waiting for it.
    pub async fn is_readable(&self) -> bool {
        poll_fn(|cx| Poll::Ready(self.poll_readable(cx).is_ready())).await
    }

    /// Reads what is there; 0: the other side has closed its direction.
    ///
    /// # Errors
    /// `WouldBlock` where nothing is there; those of the connection. One inside TLS that ends
    /// without being closed is broken (`UnexpectedEof`): what came may be cut short.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => read_plain(stream, buffer),
            Self::Tls(session) => session.try_read(buffer),
        }
    }

    /// Waits until there may be room to [write](Self::try_write).
    ///
    /// # Errors
    /// As the runtime says; not those of the connection.
    pub async fn writable(&self) -> io::Result<()> {
        self.socket().writable().await
    }

    /// As [`writable`](Self::writable), for whoever waits by itself: one of a connection.
    ///
    /// # Errors
    /// As there.
    pub fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket().poll_write_ready(cx)
    }

    /// Writes as much as there is room for. It may wait here still to be [sent](Self::try_flush).
    ///
    /// # Errors
    /// `WouldBlock` where there is no room; those of the connection.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.try_write(bytes),
            Self::Tls(session) => session.try_write(bytes),
        }
    }

    fn try_write_vectored(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.try_write_vectored(parts),
            Self::Tls(session) => {
                parts.iter().find(|part| !part.is_empty()).map_or(Ok(0), |part| session.try_write(part))
            }
        }
    }

    /// Hands the kernel what was written.
    ///
    /// # Errors
    /// `WouldBlock` where something is left; those of the connection.
    pub fn try_flush(&self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(session) => session.try_flush(),
        }
    }

    /// Closes the direction to the other side, once all that was written is sent.
    ///
    /// # Errors
    /// `WouldBlock` where something is left: it is to be tried again; those of the connection.
    pub fn try_close(&self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => sockopt::send_fin(stream),
            Self::Tls(session) => session.try_close(),
        }
    }

    /// Waits until more than `seen` bytes can be seen, which stay where they are: so many are in
    /// `buffer` then. No more than `seen`: the other side has closed its direction.
    ///
    /// # Errors
    /// As [`try_read`](Self::try_read).
    pub async fn peek(&self, seen: usize, buffer: &mut [u8]) -> io::Result<usize> {
        let stream = match self {
            Self::Plain(stream) => stream,
            Self::Tls(session) => return Box::pin(session.peek(seen, buffer)).await,
        };
        loop {
            let ready = stream.ready(Interest::READABLE).await?;
            let more = stream.try_io(Interest::READABLE, || {
                let length = sockopt::peek(stream.as_fd(), buffer)?;
                // What has been seen stays, so it is readable still; but it is to be waited for more.
                if length > seen || length == 0 { Ok(length) } else { Err(io::ErrorKind::WouldBlock.into()) }
            });
            match more {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && ready.is_read_closed() => {
                    return Ok(seen);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                told => return told,
            }
        }
    }

    /// Reads as many bytes as fit.
    ///
    /// # Errors
    /// As [`try_read`](Self::try_read); `UnexpectedEof` where there are fewer.
    pub async fn read_exact(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            self.readable().await?;
            match self.try_read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => buffer = &mut buffer[read..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes and sends all of it.
    ///
    /// # Errors
    /// As [`try_write`](Self::try_write).
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                Err(error) => return Err(error),
            }
        }
        while let Err(error) = self.try_flush() {
            if error.kind() != io::ErrorKind::WouldBlock {
                return Err(error);
            }
            self.writable().await?;
        }
        Ok(())
    }
}

/// Reads what is there. Where the socket tells that nothing is left, it is not asked again before
/// it tells of more.
///
/// That a read was short does not tell: one also ends before urgent data (tcp(7)).
fn read_plain(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut last = 0;
    let read = stream.try_io(Interest::READABLE, || match sockopt::receive_telling(stream, buffer)? {
        (length @ 1.., Some(0)) => {
            last = length;
            Err(io::ErrorKind::WouldBlock.into())
        }
        (length, _) => Ok(length),
    });
    if last > 0 { Ok(last) } else { read }
}
