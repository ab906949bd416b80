//! Replies on their way to the client.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;

use smallvec::SmallVec;
use tokio::io::Interest;
use tokio::time::Instant;

use super::{Flow, Flows};
use crate::relay::send::TrafficClass;
use crate::sockopt;

/// Port of DNS servers.
const DNS: u16 = 53;

/// Replies of a flow that are taken in a row, before others get their turn.
const FEW: usize = 16;

/// Has the kernel merge the replies of a flow that gets many.
fn take_segments(flow: &Flow) {
    if !flow.merges.replace(true)
        && let Err(error) = sockopt::take_segments(&flow.socket)
    {
        tracing::debug!("flow of {}: {error}", flow.client);
    }
}

impl Flows {
    /// Sends what has come on to the client; true where there may be more.
    pub(super) fn bring_replies(&self, flow: &Flow) -> bool {
        let stats = self.worker.stats();
        let mut batch = self.batch.borrow_mut();
        self.table.borrow_mut().promote(&flow.key());
        let receive = || match batch.receive(flow.socket.as_fd(), FEW)? {
            FEW.. => Ok(()),
            // Nothing more: wait for the next one.
            _ => Err(io::ErrorKind::WouldBlock.into()),
        };
        let more = match flow.socket.try_io(Interest::READABLE, receive) {
            Ok(()) => {
                take_segments(flow);
                true
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            // An error about an earlier datagram: its details are in the queue.
            Err(_) if self.bring_errors(flow).count > 0 => true,
            Err(error) => {
                stats.udp_receive_errors.inc();
                tracing::debug!("flow of {}: cannot receive: {error}", flow.client);
                true
            }
        };
        let mut from = None;
        let mut payloads = SmallVec::<[_; 8]>::new();
        for (reply, datagram) in batch.datagrams() {
            let Some((server, at)) = flow.exit.source(reply.sender, datagram) else { continue };
            let payload = &datagram[at..];
            // Before its client has it and connects.
            if server.port() == DNS && self.worker.shared.routes.learn(flow.client, server.into(), payload) {
                stats.names_learned.inc();
            }
            if let Some((server, class)) = from.filter(|from| *from != (server, reply.class)) {
                self.answer(flow, server, class, &payloads);
                payloads.clear();
            }
            from = Some((server, reply.class));
            payloads.push(payload);
        }
        if let Some((server, class)) = from {
            self.answer(flow, server, class, &payloads);
        }
        more
    }

    /// Sends replies of a server to their client.
    fn answer(&self, flow: &Flow, server: SocketAddr, class: TrafficClass, mut payloads: &[&[u8]]) {
        let stats = self.worker.stats();
        flow.last.set(Instant::now());
        flow.replied.set(true);
        while !payloads.is_empty() {
            let done = match self.replies.send(server, flow.client, class, payloads) {
                Ok(sent) => {
                    let bytes = payloads.iter().take(sent).map(|payload| payload.len() as u64).sum();
                    stats.udp_datagrams_down.add(sent as u64);
                    stats.udp_bytes_down.add(bytes);
                    let down = &flow.record.traffic.down;
                    down.set(down.get() + bytes);
                    sent
                }
                Err(error) => {
                    if error.kind() == io::ErrorKind::WouldBlock {
                        stats.udp_send_full.inc();
                    } else {
                        stats.udp_reply_errors.inc();
                        tracing::debug!("reply of {server} to {}: cannot send: {error}", flow.client);
                    }
                    1
                }
            };
            payloads = payloads.get(done..).unwrap_or_default();
        }
    }
}
