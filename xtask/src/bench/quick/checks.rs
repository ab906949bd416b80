//! What is checked, and the bounds: what was measured, and a small margin.

/// Something that is counted, and what it may be.
#[derive(Debug)]
pub(super) struct Check {
    pub(super) what: &'static str,
    pub(super) bound: Bound,
}

/// What a figure may be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bound {
    /// No more, but something: where nothing is counted, nothing was measured.
    AtMost(f64),
    AtLeast(f64),
    /// Or nothing.
    Below(f64),
    Exactly(f64),
}

impl Bound {
    fn allows(self, seen: f64) -> bool {
        match self {
            Self::AtMost(most) => seen > 0.0 && seen <= most,
            Self::AtLeast(least) => seen >= least,
            Self::Below(end) => seen < end,
            // Both are whole numbers, or a division without rest.
            Self::Exactly(expected) => (seen - expected).abs() < 1e-9,
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "at most {}", figure(*most)),
            Self::AtLeast(least) => write!(f, "at least {}", figure(*least)),
            Self::Below(end) => write!(f, "below {}", figure(*end)),
            Self::Exactly(expected) => write!(f, "{}", figure(*expected)),
        }
    }
}

/// What was seen of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    check: &'static Check,
    seen: f64,
    /// What it is made of.
    detail: String,
}

impl Check {
    pub(super) fn allows(&self, seen: f64) -> bool {
        self.bound.allows(seen)
    }

    pub(super) fn seen(&'static self, seen: f64) -> Outcome {
        self.of(seen, String::new())
    }

    pub(super) fn of(&'static self, seen: f64, detail: String) -> Outcome {
        Outcome { check: self, seen, detail }
    }
}

impl Outcome {
    /// What is wrong with it; `None`: nothing.
    pub(crate) fn failure(&self) -> Option<String> {
        let Check { what, bound } = self.check;
        if self.check.allows(self.seen) {
            return None;
        }
        let detail = if self.detail.is_empty() { String::new() } else { format!(" ({})", self.detail) };
        Some(format!("{what}: expected {bound}, seen {}{detail}", figure(self.seen)))
    }
}

/// What was measured, and the bounds.
pub(super) fn table(outcomes: &[Outcome]) -> String {
    let mut table = row("what", "measured", "bound", "");
    for outcome in outcomes {
        let Check { what, bound } = outcome.check;
        let verdict = if outcome.failure().is_none() { "ok" } else { "FAILED" };
        table += &row(what, &figure(outcome.seen), &bound.to_string(), verdict);
    }
    table
}

fn row(what: &str, measured: &str, bound: &str, verdict: &str) -> String {
    format!("{what:<52} {measured:>10}  {bound:<17} {verdict}").trim_end().to_owned() + "\n"
}

fn figure(value: f64) -> String {
    if value.fract().abs() < 1e-9 { format!("{value:.0}") } else { format!("{value:.2}") }
}

const fn check(what: &'static str, bound: Bound) -> Check {
    Check { what, bound }
}

/// 280 to 345: 256 of the table of those that are quiet, and what is left free in the pages of the heap.
pub(super) const IDLE_MEMORY: Check = check("bytes of memory, an idle TCP connection", Bound::AtMost(400.0));

/// What ended connections leave behind, in the heap's pages and in tables that do not shrink.
pub(super) const ENDED_MEMORY: Check =
    check("bytes of memory, an idle connection that has ended", Bound::Below(150.0));

/// One socket towards each side.
pub(super) const TCP_FILES: Check = check("descriptors, an open TCP connection", Bound::Exactly(2.0));

/// The socket that sends as the client and hears every server.
pub(super) const UDP_FILES: Check = check("descriptors, a UDP flow", Bound::Exactly(1.0));
pub(super) const UDP_MORE_SERVERS: Check =
    check("descriptors, replies of more servers to a UDP flow", Bound::Exactly(0.0));

/// 27: accept4, `TCP_INFO` of the listener (none waits), 8 setsockopt, socket, bind, connect, getsockname, 4
/// `epoll_ctl`, 4 recvmsg (bytes, the end, from each side), 2 sendto, shutdown, 2 close. Upkeep
/// adds a tenth, more where all is slow; one call more is too much.
pub(super) const TCP_CALLS: Check = check("system calls, a TCP connection", Bound::AtMost(27.9));

/// 3.1; on a machine with idle cores each of the six events may come alone: connection, connected,
/// request, response, and the end of each side.
pub(super) const TCP_WAITS: Check = check("waits, a TCP connection", Bound::AtMost(6.5));

/// 8.05 to 8.4 (of two connections, with the last ACK of the handshake saved, and most of those of
/// bytes that are answered at once); one more is too much.
pub(super) const TCP_SEGMENTS: Check = check("segments sent, a TCP connection", Bound::AtMost(9.2));

/// 6: with the runtime two sockets, the end of one, and a task; what it waits with, and what watches
/// for a reset of the side that ends first. One more where the client's bytes come before the
/// connection to upstream is made.
pub(super) const TCP_ALLOCATIONS: Check = check("allocations, a TCP connection", Bound::AtMost(7.9));

/// 4: recvmsg, which tells that there is no more, and sendto, each way.
pub(super) const EXCHANGE_CALLS: Check = check("system calls, a TCP exchange", Bound::AtMost(4.8));

/// One for each message, and some for timers.
pub(super) const EXCHANGE_WAITS: Check = check("waits, a TCP exchange", Bound::AtMost(3.0));

/// None but for upkeep; one for each would be 1.
pub(super) const EXCHANGE_ALLOCATIONS: Check = check("allocations, a TCP exchange", Bound::Below(0.5));

/// 129,000: two splices for what a pipe of 256 KiB takes. A copy through the buffers of 64 KiB
/// makes 32,768 at most; less of a pipe is filled where the proxy is not slowed down as much.
pub(super) const BULK_UP: Check = check("bytes a system call, TCP bulk up", Bound::AtLeast(40_000.0));
pub(super) const BULK_DOWN: Check = check("bytes a system call, TCP bulk down", Bound::AtLeast(40_000.0));

/// 10 to 30: the first bytes are copied, until a read has filled a buffer. Ten thousand else.
pub(super) const BULK_COPIES: Check = check("calls that copy, a TCP bulk transfer", Bound::AtMost(200.0));

/// Eight pipes are kept for the next transfers (`KEEP` in `relay/pipe.rs`).
pub(super) const BULK_PIPES: Check = check("descriptors left by 16 TCP bulk transfers", Bound::AtMost(16.0));

/// 16: 7 setsockopt, 2 `epoll_ctl`, 2 recvmmsg, 2 sendmsg, socket, bind, close. Upkeep adds up to
/// two tenths here.
pub(super) const UDP_FLOW_CALLS: Check =
    check("system calls, a new UDP flow and its end", Bound::AtMost(16.9));

/// 2.4 to 3.3: datagram, reply, the end of the flow, which others share.
pub(super) const UDP_FLOW_WAITS: Check = check("waits, a new UDP flow and its end", Bound::AtMost(4.5));

/// 5.4: the flow, its place in the table, the ways it may go; with the runtime its socket and its task.
pub(super) const UDP_FLOW_ALLOCATIONS: Check =
    check("allocations, a new UDP flow and its end", Bound::AtMost(6.2));

/// 4: recvmmsg and sendmsg, each way.
pub(super) const UDP_EXCHANGE_CALLS: Check = check("system calls, a UDP exchange", Bound::AtMost(4.8));

/// 2.1 to 2.6: one for each datagram, and some for timers.
pub(super) const UDP_EXCHANGE_WAITS: Check = check("waits, a UDP exchange", Bound::AtMost(3.5));

/// None, likewise.
pub(super) const UDP_EXCHANGE_ALLOCATIONS: Check = check("allocations, a UDP exchange", Bound::Below(0.5));

/// 0.12 to 0.15, waits among them: batches of up to 64 datagrams leave as segments. Without
/// `recvmmsg` or without segments it is more than 1.
pub(super) const UDP_SEND_CALLS: Check = check("system calls, a UDP datagram one way", Bound::AtMost(0.4));

/// By what the benchmark `packet` calls them: 730, 852, 862, 2,133, 572. Up to three per cent more
/// than that: kernels get patches, and compilers change.
pub(super) const PACKETS: [(&str, Check); 5] = [
    (
        "capture: TCP, a known flow",
        check("instructions, capture, a TCP packet of a known flow", Bound::AtMost(735.0)),
    ),
    (
        "capture: UDP, a known flow",
        check("instructions, capture, a datagram of a known flow", Bound::AtMost(855.0)),
    ),
    (
        "capture: UDP over IPv6, a known flow",
        check("instructions, capture, the same over IPv6", Bound::AtMost(890.0)),
    ),
    ("uplink: TCP, no socket", check("instructions, uplink, TCP without a socket", Bound::AtMost(2175.0))),
    (
        "reply: TCP, a known flow",
        check("instructions, reply, a TCP packet of a known flow", Bound::AtMost(575.0)),
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Check = check("calls", Bound::AtMost(24.0));
    const LEAST: Check = check("bytes a call", Bound::AtLeast(32_768.0));
    const FEW: Check = check("allocations", Bound::Below(0.5));
    const EXACT: Check = check("descriptors", Bound::Exactly(2.0));

    #[test]
    fn a_violated_bound_tells_what_was_expected_and_seen() {
        for (outcome, expected) in [
            (MOST.of(25.25, "connect 2.00".into()), "calls: expected at most 24, seen 25.25 (connect 2.00)"),
            (MOST.seen(0.0), "calls: expected at most 24, seen 0"),
            (LEAST.seen(32_767.5), "bytes a call: expected at least 32768, seen 32767.50"),
            (FEW.seen(0.5), "allocations: expected below 0.50, seen 0.50"),
            (EXACT.seen(2.01), "descriptors: expected 2, seen 2.01"),
            (EXACT.seen(1.0), "descriptors: expected 2, seen 1"),
        ] {
            assert_eq!(outcome.failure().as_deref(), Some(expected));
            assert!(table(&[outcome]).ends_with(" FAILED\n"));
        }
    }

    #[test]
    fn a_bound_that_is_kept_is_no_failure() {
        for outcome in [
            MOST.seen(24.0),
            FEW.seen(0.0),
            FEW.seen(0.49),
            MOST.seen(3.0),
            LEAST.seen(32_768.0),
            EXACT.seen(2.0),
        ] {
            assert_eq!(outcome.failure(), None);
            assert!(table(&[outcome]).ends_with(" ok\n"));
        }
    }
}
