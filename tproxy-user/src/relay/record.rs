//! What is known of a connection or UDP flow at its end, told exactly once:
//! to the counters and to the access log.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use super::Worker;
use super::copy::{Ending, Side, Traffic};
use super::exit::Hop;
use crate::addr::{ClientAddr, OrigDst};
use crate::upstream::Reason;

/// How a connection or flow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Bytes were copied until this.
    Copied(Ending),
    /// There was no connection to upstream.
    NotConnected(Reason),
    /// The client went before there was one.
    ClientGone,
    /// A rule that asks for its name refused it.
    Rejected,
    /// A UDP flow was quiet for its time-out.
    Timeout,
    /// A UDP flow made room for a newer one.
    Evicted,
    /// The run ended first.
    Cut,
}

impl End {
    /// The word in the access log.
    const fn name(self) -> &'static str {
        match self {
            Self::Copied(Ending::Closed) => "closed",
            Self::Copied(Ending::Reset(Side::Client)) => "client-reset",
            Self::Copied(Ending::Reset(Side::Upstream)) => "upstream-reset",
            Self::Copied(Ending::Idle) => "idle-timeout",
            Self::Copied(Ending::HalfClosed) => "half-close-timeout",
            Self::NotConnected(reason) => reason.name(),
            Self::ClientGone => "client-gone",
            Self::Rejected => "rejected",
            Self::Timeout => "timeout",
            Self::Evicted => "evicted",
            Self::Cut => "cut",
        }
    }
}

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

/// One connection or UDP flow. Dropping it tells its end, so none goes untold:
/// without a word about how, the end is [`End::Cut`].
#[derive(Debug)]
pub(crate) struct Record {
    worker: Rc<Worker>,
    protocol: Protocol,
    pub(super) client: ClientAddr,
    /// Of a UDP flow the first.
    pub(super) destination: OrigDst,
    /// The rule that says where it goes; of a UDP flow the first.
    pub(crate) rule: Cell<Option<u16>>,
    begun: Instant,
    upstream: RefCell<Option<(Hop, Duration)>>,
    end: Cell<End>,
    /// Payload bytes.
    pub(crate) traffic: Traffic,
}

impl Record {
    pub(crate) fn new(
        worker: &Rc<Worker>,
        protocol: Protocol,
        client: ClientAddr,
        destination: OrigDst,
        rule: Option<u16>,
    ) -> Self {
        let stats = worker.stats();
        match protocol {
            Protocol::Tcp => {
                stats.tcp_connections.inc();
                stats.tcp_active.inc();
            }
            Protocol::Udp => {
                stats.udp_flows.inc();
                stats.udp_active.inc();
            }
        }
        Self {
            worker: Rc::clone(worker),
            protocol,
            client,
            destination,
            rule: Cell::new(rule),
            begun: Instant::now(),
            upstream: RefCell::new(None),
            end: Cell::new(End::Cut),
            traffic: Traffic::default(),
        }
    }

    pub(super) fn worker(&self) -> &Worker {
        &self.worker
    }

    /// There is a connection to upstream; the time since the record began is what it took.
    pub(super) fn connected(&self, upstream: Hop) {
        self.upstream.replace(Some((upstream, self.begun.elapsed())));
    }

    /// Says how it ends; told when the record is dropped.
    pub(crate) fn ends(&self, end: End) {
        self.end.set(end);
    }

    fn count(&self) {
        let stats = self.worker.stats();
        match self.protocol {
            Protocol::Tcp => stats.tcp_active.dec(),
            Protocol::Udp => stats.udp_active.dec(),
        }
        let counter = match self.end.get() {
            End::Copied(Ending::Closed) => &stats.tcp_closed,
            End::Copied(Ending::Reset(Side::Client)) => &stats.tcp_client_resets,
            End::Copied(Ending::Reset(Side::Upstream)) => &stats.tcp_upstream_resets,
            End::Copied(Ending::Idle) => &stats.tcp_idle_timeouts,
            End::Copied(Ending::HalfClosed) => &stats.tcp_half_close_timeouts,
            End::NotConnected(Reason::Refused) => &stats.connect_refused,
            End::NotConnected(Reason::Unreachable) => &stats.connect_unreachable,
            End::NotConnected(Reason::TimedOut) => &stats.connect_timed_out,
            End::NotConnected(Reason::NoSource) => &stats.connect_no_source,
            End::NotConnected(Reason::Exhausted) => &stats.connect_exhausted,
            End::NotConnected(Reason::Proxy) => &stats.connect_proxy_failed,
            End::NotConnected(Reason::Other) => &stats.connect_other,
            End::ClientGone => &stats.connect_abandoned,
            End::Rejected => &stats.tcp_rejected,
            End::Timeout => &stats.udp_timeouts,
            End::Evicted => &stats.udp_evictions,
            End::Cut if self.protocol == Protocol::Tcp => &stats.tcp_cut,
            End::Cut => return,
        };
        counter.inc();
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.count();
        if self.worker.draining.get() {
            self.worker.ended.notify_one();
        }
        let upstream = self.upstream.take();
        tracing::info!(
            target: crate::telemetry::ACCESS,
            protocol = if self.protocol == Protocol::Tcp { "tcp" } else { "udp" },
            client = %self.client,
            destination = %self.destination,
            upstream = upstream.as_ref().map(|(hop, _)| tracing::field::display(hop)),
            rule = self.rule.get(),
            bytes_up = self.traffic.up.get(),
            bytes_down = self.traffic.down.get(),
            duration_ms = millis(self.begun.elapsed()),
            connect_ms = upstream.as_ref().map(|(_, took)| millis(*took)),
            end = self.end.get().name(),
        );
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
