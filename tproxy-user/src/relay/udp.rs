//! Takes datagrams from clients and hands each to its flow.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::task::yield_now;

use super::Worker;
use super::flow::Flows;
use super::receive::MOST;

/// What is taken in a row before others get their turn.
pub(super) const BATCH: usize = 64;

/// Pause where nothing but errors comes, so that an error that stays cannot spin.
const PAUSE: Duration = Duration::from_millis(10);

/// Receives for ever, from a listener whose datagrams have the DF bit or do not.
/// No error ends it: an error of a UDP socket is about a datagram, not about the socket.
pub(crate) async fn listen(
    worker: Rc<Worker>,
    flows: Rc<Flows>,
    listener: AsyncFd<OwnedFd>,
    dont_fragment: bool,
) {
    let mut failed = false;
    loop {
        let mut ready = match listener.readable().await {
            Ok(ready) => ready,
            Err(error) => return tracing::error!(%error, "a listener can no longer be waited for"),
        };
        match ready.try_io(|socket| flows.take(socket.get_ref().as_fd(), dont_fragment)) {
            Err(_would_block) => {}
            Ok(Ok(MOST..)) => {
                failed = false;
                yield_now().await;
            }
            Ok(Ok(_)) => {
                failed = false;
                ready.clear_ready();
            }
            Ok(Err(error)) => {
                worker.stats().udp_receive_errors.inc();
                tracing::debug!(%error, "cannot receive a datagram from a client");
                if std::mem::replace(&mut failed, true) {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}
