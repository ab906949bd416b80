//! Replies on their way to the client.

use std::io;
use std::os::fd::AsFd as _;

use tokio::io::Interest;
use tokio::time::Instant;

use super::{Flow, Flows};
use crate::relay::receive::Received;
use crate::relay::udp::BATCH;

/// Port of DNS servers.
const DNS: u16 = 53;

impl Flows {
    /// Sends what has come on to the client; true where there may be more.
    pub(super) fn bring_replies(&self, flow: &Flow) -> bool {
        let stats = self.worker.stats();
        let mut buffer = self.worker.datagram.borrow_mut();
        let mut receiver = self.receiver.borrow_mut();
        self.table.borrow_mut().promote(&flow.key());
        for _ in 0..BATCH {
            let mut receive = || receiver.receive(flow.socket.as_fd(), &mut buffer);
            match flow.socket.try_io(Interest::READABLE, &mut receive) {
                Ok(Received { len, sender: server, class, .. }) => {
                    let Some((server, at)) = flow.exit.source(server, &buffer[..len]) else { continue };
                    let payload = &buffer[at..len];
                    flow.last.set(Instant::now());
                    flow.replied.set(true);
                    // Before its client has it and connects.
                    if server.port() == DNS
                        && self.worker.shared.routes.learn(flow.client, server.into(), payload)
                    {
                        stats.names_learned.inc();
                    }
                    match self.replies.send(server, flow.client, class, payload) {
                        Ok(()) => {
                            stats.udp_datagrams_down.inc();
                            stats.udp_bytes_down.add(payload.len() as u64);
                            let down = &flow.record.traffic.down;
                            down.set(down.get() + payload.len() as u64);
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => stats.udp_send_full.inc(),
                        Err(error) => {
                            stats.udp_reply_errors.inc();
                            tracing::debug!("reply of {server} to {}: cannot send: {error}", flow.client);
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                // An error about an earlier datagram: its details are in the queue.
                Err(_) if self.bring_errors(flow).count > 0 => {}
                Err(error) => {
                    stats.udp_receive_errors.inc();
                    tracing::debug!("flow of {}: cannot receive: {error}", flow.client);
                }
            }
        }
        true
    }
}
