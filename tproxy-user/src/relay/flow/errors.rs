//! What clients are told of datagrams that do not arrive.

use std::io;
use std::os::fd::AsFd as _;

use super::{Exit, Flow, Flows};
use crate::addr::{ClientAddr, OrigDst};
use crate::relay::errors::{self, IcmpError, Queued};
use crate::relay::udp::BATCH;
use crate::sockopt;

/// What was in the error queue of a flow.
#[derive(Default)]
pub(super) struct Errors {
    /// How many there were.
    pub(super) count: usize,
    /// The MTU that the latest datagram which the kernel refused did not fit.
    mtu: Option<u32>,
}

impl Flows {
    /// Passes ICMP errors about the flow's datagrams on to its client.
    pub(super) fn bring_errors(&self, flow: &Flow) -> Errors {
        let mut quote = [0; errors::QUOTE];
        let mut errors = Errors::default();
        while errors.count < BATCH {
            match errors::receive(flow.socket.as_fd(), &mut quote) {
                Ok(Queued::Icmp { destination, error, len }) => {
                    let told = match &flow.exit {
                        Exit::Straight(_) => Some((destination, error)),
                        Exit::Target(_, asked, _) => error.of_target(asked.ip()).map(|error| (*asked, error)),
                        // It is about the server, which its client does not know.
                        Exit::Relay(_) | Exit::Named(..) => None,
                    };
                    if let Some((destination, error)) = told
                        && self.may_report()
                    {
                        self.report(flow.client, destination, &error, &quote[..len]);
                    }
                }
                Ok(Queued::TooLong { mtu }) => errors.mtu = Some(mtu),
                Ok(Queued::Other) => {}
                Err(_) => break,
            }
            errors.count += 1;
        }
        errors
    }

    /// Tells the client that nobody listens there, as its destination would: a rule says so.
    pub(super) fn refuse(&self, client: ClientAddr, destination: OrigDst, payload: &[u8]) {
        if self.may_report() {
            let error = IcmpError::port_unreachable(destination.ip());
            self.report(client, destination, &error, payload);
        }
    }

    /// Tells the client that there is no way for its datagram, as a router would.
    pub(super) fn report_unsent(&self, flow: &Flow, destination: OrigDst, error: &io::Error, payload: &[u8]) {
        let Some(errno) = error.raw_os_error() else { return };
        // Taken off the queue whether or not it may be told.
        let mtu = if errno == libc::EMSGSIZE { self.bring_errors(flow).mtu } else { None };
        // Before this host's address is asked for, which takes a socket.
        if !self.may_report() {
            return;
        }
        let Ok(here) = sockopt::address_towards(flow.client.get(), self.worker.shared.mark()) else { return };
        let icmp = match mtu {
            Some(mtu) => IcmpError::too_long(mtu, here),
            None => IcmpError::of_send(errno, here),
        };
        if let Some(icmp) = icmp {
            self.report(flow.client, destination, &icmp, payload);
        }
    }

    /// Whether one more error may be sent, as far as a router may.
    fn may_report(&self) -> bool {
        let granted = self.icmp.take(std::time::Instant::now());
        if !granted {
            self.worker.stats().udp_icmp_errors_limited.inc();
        }
        granted
    }

    fn report(&self, client: ClientAddr, destination: OrigDst, error: &IcmpError, quote: &[u8]) {
        let stats = self.worker.stats();
        let Some(message) = error.message(client, destination, quote) else { return };
        match self.replies.send_icmp(error.offender, client, &message) {
            Ok(()) => stats.udp_icmp_errors.inc(),
            Err(error) => {
                stats.udp_reply_errors.inc();
                tracing::debug!("ICMP error for {client}: cannot send: {error}");
            }
        }
    }
}
