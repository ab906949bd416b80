//! What the relay counts: the one list of names, help texts and values.
//!
//! Each worker has a struct of its own on cache lines of its own, so counting
//! costs no traffic between cores; so has the thread that looks after the kernel
//! side. Whoever reads sums them up.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// A value that one worker changes and anyone reads.
#[derive(Debug, Default)]
pub struct Value(AtomicU64);

impl Value {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Takes one away; for gauges.
    pub fn dec(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// The value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Whether a value only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// One value with what there is to say about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name, `snake_case`.
    pub name: &'static str,
    /// Whether it only grows.
    pub kind: Kind,
    /// The value.
    pub value: u64,
    /// What it counts.
    pub help: &'static str,
}

macro_rules! stats {
    ($($kind:ident { $($(#[doc = $help:literal])+ $name:ident,)+ })+) => {
        /// What one worker counts. Aligned to two cache lines, which processors fetch as a pair.
        #[repr(align(128))]
        #[derive(Debug, Default)]
        pub struct WorkerStats {
            $($($(#[doc = $help])+ pub $name: Value,)+)+
        }

        /// The sum over all workers at one time.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct Snapshot {
            $($($(#[doc = $help])+ pub $name: u64,)+)+
        }

        impl Snapshot {
            /// How many values there are.
            pub const COUNT: usize = [$($(stringify!($name)),+),+].len();

            /// Every value, in the order of declaration.
            #[must_use]
            pub fn entries(&self) -> [Entry; Self::COUNT] {
                [$($(Entry {
                    name: stringify!($name),
                    kind: Kind::$kind,
                    value: self.$name,
                    help: concat!($($help),+).trim_ascii(),
                }),+),+]
            }

            fn add(&mut self, worker: &WorkerStats) {
                $($(self.$name = self.$name.wrapping_add(worker.$name.get());)+)+
            }
        }
    };
}

stats! {
    Gauge {
        /// TCP connections open now.
        tcp_active,
        /// UDP flows (client address and port) open now.
        udp_active,
    }
    Counter {
        /// TCP connections taken from clients.
        tcp_connections,
        /// Payload bytes from TCP clients handed to upstream.
        tcp_bytes_up,
        /// Payload bytes from upstream handed to TCP clients.
        tcp_bytes_down,
        /// TCP connections that both sides closed.
        tcp_closed,
        /// TCP connections that the client reset.
        tcp_client_resets,
        /// TCP connections that the upstream reset.
        tcp_upstream_resets,
        /// TCP connections cut because no byte came for `tcp-idle-timeout`.
        tcp_idle_timeouts,
        /// TCP connections cut because one side had closed and no byte came for `half-close-timeout`.
        tcp_half_close_timeouts,
        /// TCP connections cut at the end of the run.
        tcp_cut,
        /// TCP connections whose first bytes were looked at for a name, as rules ask for it.
        tcp_asked,
        /// TCP connections among these that had one.
        tcp_named,
        /// TCP connections among these that a rule refused.
        tcp_rejected,
        /// UDP flows that were looked at for a name, as rules ask for it.
        udp_asked,
        /// UDP flows among these that had one.
        udp_named,
        /// DNS answers that told what addresses are called, as rules ask for it.
        names_learned,
        /// Connects that the destination refused.
        connect_refused,
        /// Connects to which the network or host could not be reached.
        connect_unreachable,
        /// Connects not answered within `connect-timeout`.
        connect_timed_out,
        /// Connects for which no source address and port could be had.
        connect_no_source,
        /// Connects for which descriptors or memory were used up.
        connect_exhausted,
        /// Connects that a proxy server did not make: it could not be reached, or did not do its part.
        connect_proxy_failed,
        /// Proxy servers of a group that did not do their part for a connect, so that another was tried.
        connect_failed_over,
        /// Connects that failed in another way.
        connect_other,
        /// Connects given up because the client had gone.
        connect_abandoned,
        /// Faithful handshakes answered with a reset.
        handshake_reset,
        /// Faithful handshakes answered with an ICMP error.
        handshake_unreachable,
        /// Faithful handshakes that got no answer: the destination gave none, descriptors were used up, or enough ICMP errors had been sent.
        handshake_silent,
        /// SYNs dropped: too many handshakes waited for their destinations, `max-connections` was reached, or the SYN was longer than 9 KiB.
        handshake_full,
        /// SYNs and answers to SYNs that could not be sent.
        handshake_lost,
        /// Connections whose client completed its handshake so late that upstream had to be connected anew.
        handshake_late,
        /// Connections and UDP flows whose preferred source port was taken, so that another was used.
        source_port_fallbacks,
        /// Connections and datagrams refused because their destination was the proxy's own listener.
        loops_prevented,
        /// `accept` errors that concern one connection only.
        accept_errors,
        /// `accept` errors for want of descriptors or memory; the worker paused after each.
        accept_exhausted,
        /// Times that a worker stopped accepting because `max-connections` was reached.
        connection_limit_waits,
        /// TCP connections reset because their client had `max-per-client` already.
        client_limit_tcp,
        /// UDP datagrams dropped because their client had `max-per-client` already.
        client_limit_udp,
        /// UDP flows created.
        udp_flows,
        /// UDP flows that ended by time-out.
        udp_timeouts,
        /// UDP flows ended early to make room for newer ones (`max-udp-flows`).
        udp_evictions,
        /// UDP datagrams from clients handed to upstream.
        udp_datagrams_up,
        /// UDP datagrams from upstream handed to clients.
        udp_datagrams_down,
        /// Payload bytes of `udp_datagrams_up`.
        udp_bytes_up,
        /// Payload bytes of `udp_datagrams_down`.
        udp_bytes_down,
        /// UDP datagrams dropped because as many waited already for a proxy server to be ready.
        udp_waiting_full,
        /// UDP datagrams dropped because a send buffer was full.
        udp_send_full,
        /// UDP datagrams that could not be sent upstream.
        udp_send_errors,
        /// UDP replies that could not be sent to the client.
        udp_reply_errors,
        /// ICMP errors about UDP datagrams passed on to their clients.
        udp_icmp_errors,
        /// ICMP errors about UDP datagrams not passed on: there were too many (1,000 a second and worker, 50 at once).
        udp_icmp_errors_limited,
        /// Errors when receiving UDP datagrams.
        udp_receive_errors,
        /// UDP datagrams dropped because the kernel did not tell their original destination.
        udp_no_destination,
        /// Connections and datagrams refused because the flow table had lost their flow, while rules divert or reject.
        flows_lost,
        /// UDP datagrams dropped because no socket towards upstream could be had.
        udp_no_socket,
        /// Programs that another detached (filter, qdisc, tcx or `sk_lookup` link), put back.
        programs_put_back,
        /// Routing rules and local routes that another removed, put back.
        rules_put_back,
        /// Kernel settings that another changed, set again.
        settings_put_back,
    }
}

/// What all workers count.
#[derive(Debug)]
pub struct Stats {
    workers: Box<[WorkerStats]>,
    upkeep: WorkerStats,
}

impl Stats {
    /// Zeros for each of `workers` workers.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        let workers = (0..workers).map(|_| WorkerStats::default()).collect();
        Self { workers, upkeep: WorkerStats::default() }
    }

    /// The values of one worker.
    ///
    /// # Panics
    /// Where `index` is not below the number given to [`new`](Self::new).
    #[must_use]
    pub fn worker(&self, index: usize) -> &WorkerStats {
        &self.workers[index]
    }

    /// The values of the thread that looks after the kernel side.
    #[must_use]
    pub fn upkeep(&self) -> &WorkerStats {
        &self.upkeep
    }

    /// The sum of all. Workers count on meanwhile: values of one snapshot may
    /// be some events apart.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let mut sum = Snapshot::default();
        for worker in self.workers.iter().chain([&self.upkeep]) {
            sum.add(worker);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshot_sums_workers() {
        let stats = Stats::new(2);
        stats.worker(0).tcp_bytes_up.add(40);
        stats.worker(1).tcp_bytes_up.add(2);
        stats.worker(1).udp_active.inc();
        stats.worker(0).udp_active.inc();
        stats.worker(0).udp_active.dec();
        let sum = stats.snapshot();
        assert_eq!((sum.tcp_bytes_up, sum.udp_active), (42, 1));
    }

    #[test]
    fn entries_tell_name_kind_and_help() {
        let entries = Snapshot { tcp_active: 3, ..Snapshot::default() }.entries();
        assert_eq!(
            entries[0],
            Entry { name: "tcp_active", kind: Kind::Gauge, value: 3, help: "TCP connections open now." }
        );
        assert!(entries.iter().all(|entry| entry.help.ends_with('.')), "{entries:?}");
    }

    #[test]
    fn workers_share_no_cache_line() {
        assert_eq!(align_of::<WorkerStats>(), 128);
        assert_eq!(size_of::<WorkerStats>() % 128, 0);
    }
}
