//! New connections as a program on tokio relays them that does nothing else: what bounds every
//! relay with a task a connection.
//!
//! As [`connections`] it has neither time-outs, limits nor counters, and a message that a socket
//! does not take at once is cut: a bound, and nothing to use. Each thread has a runtime of its own.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::thread;

use anyhow::Result;
use socket2::{SockRef, Socket};
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, LocalOptions};
use tokio::task::spawn_local;

use crate::{CHUNK, Listener, connections, report};

/// Relays for ever, with so many threads.
pub(crate) fn run(port: u16, threads: usize) -> Result<()> {
    let listeners = (0..threads).map(|_| Listener::shared(port)).collect::<Result<Vec<_>>>()?;
    let address = listeners[0].address()?;
    thread::scope(|scope| {
        let all: Vec<_> =
            listeners.into_iter().map(|listener| scope.spawn(move || serve(listener.socket))).collect();
        println!("{address}");
        all.into_iter().try_for_each(|one| one.join().expect("a thread does not panic"))
    })
}

fn serve(listener: Socket) -> Result<()> {
    listener.set_nonblocking(true)?;
    let runtime = Builder::new_current_thread().enable_io().build_local(LocalOptions::default())?;
    runtime.block_on(async {
        let listener = TcpListener::from_std(listener.into())?;
        let buffer: Buffer = Rc::new(RefCell::new(vec![0; CHUNK]));
        loop {
            match listener.accept().await {
                Ok((client, from)) => {
                    let buffer = Rc::clone(&buffer);
                    drop(spawn_local(async move {
                        if let Err(error) = relay(client, from, &buffer).await {
                            report(&error);
                        }
                    }));
                }
                Err(error) => report(&error),
            }
        }
    })
}

/// One for all connections of a thread.
type Buffer = Rc<RefCell<Vec<u8>>>;

async fn relay(mut client: TcpStream, from: SocketAddr, buffer: &Buffer) -> io::Result<()> {
    let mut server = TcpStream::from_std(connections::begin(from, client.local_addr()?)?.into())?;
    poll_fn(|cx| server.poll_write_ready(cx)).await?;
    if let Some(error) = server.take_error()? {
        return Err(error);
    }
    let mut ended = [false; 2];
    poll_fn(|cx| {
        for side in [0, 1] {
            let (from, to) = if side == 0 { (&mut client, &server) } else { (&mut server, &client) };
            if !ended[side] && copy(from, to, ended[1 - side], &mut buffer.borrow_mut(), cx)?.is_ready() {
                ended[side] = true;
            }
        }
        if ended == [true; 2] { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}

/// Copies what is there; ready where no more will come, which the other side is told unless it
/// was the `last` to speak. After a short read the runtime does not ask again, as it does for all
/// its streams.
fn copy(
    from: &mut TcpStream,
    to: &TcpStream,
    last: bool,
    buffer: &mut [u8],
    cx: &mut Context<'_>,
) -> io::Result<Poll<()>> {
    loop {
        let mut buffer = ReadBuf::new(buffer);
        match Pin::new(&mut *from).poll_read(cx, &mut buffer) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(read) => read?,
        }
        if buffer.filled().is_empty() {
            if !last {
                SockRef::from(to).shutdown(Shutdown::Write)?;
            }
            return Ok(Poll::Ready(()));
        }
        to.try_write(buffer.filled()).map(drop)?;
    }
}
