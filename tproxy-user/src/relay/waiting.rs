//! Datagrams that wait until it is known what name their flow is for.

use std::cell::RefCell;
use std::time::Duration;

use lru::LruCache;

use super::receive::Received;
use super::sniff::Sniffed;
use super::sniff::quic::Initials;
use crate::addr::{ClientAddr, OrigDst};

/// How long they wait at most: a client sends its first datagrams in one go, and is not
/// to send them again because of the proxy (1 s, RFC 9002 section 6.2.2).
pub(super) const PATIENCE: Duration = Duration::from_millis(100);

/// Datagrams of a flow that wait: clients with large keys send two or three.
const DATAGRAMS: usize = 4;

/// Flows of a worker that wait at a time; the one that was heard of longest ago makes room.
const FLOWS: usize = 1024;

/// A flow, by its client and the destination that was asked for.
type Key = (ClientAddr, OrigDst);

/// A datagram that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    /// What came with it.
    pub(super) datagram: Received,
    /// What it carries.
    pub(super) payload: Box<[u8]>,
    /// Whether it came with the DF bit.
    pub(super) dont_fragment: bool,
}

/// What is known after a datagram has come.
#[derive(Debug)]
pub(super) enum Told {
    /// The name of its flow; `None`: none is to be seen. What has waited goes before it.
    Name(Option<String>, Vec<Waiting>),
    /// It waits, under this number where it is its flow's first.
    Waits(Option<u64>),
    /// It waits in the place of another flow, which has no name.
    Instead(u64, Key, Vec<Waiting>),
}

/// The flows of one worker that wait.
#[derive(Debug)]
pub(super) struct Queue(RefCell<Flows>);

#[derive(Debug)]
struct Flows {
    waiting: LruCache<Key, Flow>,
    begun: u64,
}

#[derive(Debug)]
struct Flow {
    number: u64,
    initials: Initials,
    datagrams: Vec<Waiting>,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self(RefCell::new(Flows { waiting: LruCache::unbounded(), begun: 0 }))
    }

    /// Looks at a datagram of a flow of which the name is asked for.
    pub(super) fn add(&self, key: Key, datagram: &Received, payload: &[u8], dont_fragment: bool) -> Told {
        let mut flows = self.0.borrow_mut();
        let known = flows.waiting.pop(&key);
        let number = known.as_ref().map(|flow| flow.number);
        let (mut initials, mut datagrams) =
            known.map_or_else(Default::default, |flow| (flow.initials, flow.datagrams));
        match initials.add(payload) {
            Sniffed::Name(name) => return Told::Name(Some(name), datagrams),
            Sniffed::Nothing => return Told::Name(None, datagrams),
            Sniffed::More if datagrams.len() + 1 >= DATAGRAMS => return Told::Name(None, datagrams),
            Sniffed::More => {}
        }
        datagrams.push(Waiting { datagram: *datagram, payload: payload.into(), dont_fragment });
        let begins = number.is_none();
        let number = number.unwrap_or_else(|| {
            flows.begun += 1;
            flows.begun
        });
        let other = (flows.waiting.len() >= FLOWS).then(|| flows.waiting.pop_lru()).flatten();
        flows.waiting.put(key, Flow { number, initials, datagrams });
        match other {
            Some((other, flow)) => Told::Instead(number, other, flow.datagrams),
            None => Told::Waits(begins.then_some(number)),
        }
    }

    /// Takes what waits of a flow still, if it is the one of this number.
    pub(super) fn take(&self, key: Key, number: u64) -> Vec<Waiting> {
        let mut flows = self.0.borrow_mut();
        let waits = flows.waiting.peek(&key).is_some_and(|flow| flow.number == number);
        let flow = waits.then(|| flows.waiting.pop(&key)).flatten();
        flow.map(|flow| flow.datagrams).unwrap_or_default()
    }
}
