//! Takes datagrams from clients and hands each to its flow.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::task::yield_now;

use super::Worker;
use super::flow::Flows;
use super::receive::Receiver;

/// Datagrams taken in a row before the replies get their turn.
pub(super) const BATCH: usize = 64;

/// Pause after nothing but errors came, so that an error that stays cannot spin.
const PAUSE: Duration = Duration::from_millis(10);

/// Receives for ever, from a listener whose datagrams have the DF bit or do not.
/// No error ends it: an error of a UDP socket is about a datagram, not about the socket.
pub(crate) async fn listen(
    worker: Rc<Worker>,
    flows: Rc<Flows>,
    listener: AsyncFd<OwnedFd>,
    dont_fragment: bool,
) {
    let mut receiver = Receiver::new();
    loop {
        let mut ready = match listener.readable().await {
            Ok(ready) => ready,
            Err(error) => return tracing::error!(%error, "a listener can no longer be waited for"),
        };
        let (mut good, mut bad) = (0, 0);
        {
            let mut buffer = worker.datagram.borrow_mut();
            while good + bad < BATCH {
                match ready.try_io(|socket| receiver.receive(socket.get_ref().as_fd(), &mut buffer)) {
                    Err(_would_block) => break,
                    Ok(Ok(datagram)) => {
                        good += 1;
                        flows.forward(&datagram, &buffer[..datagram.len], dont_fragment);
                    }
                    Ok(Err(error)) => {
                        bad += 1;
                        worker.stats().udp_receive_errors.inc();
                        tracing::debug!(%error, "cannot receive a datagram from a client");
                    }
                }
            }
        }
        if good == 0 && bad > 0 {
            tokio::time::sleep(PAUSE).await;
        } else if good + bad == BATCH {
            yield_now().await;
        }
    }
}
