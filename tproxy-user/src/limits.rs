//! Bounds that hold over all workers: descriptors, connections of one client,
//! and one log line, not thousands, when a bound is reached.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Shards of [`ClientLimits`]: so many that two workers seldom meet in one.
const SHARDS: usize = 64;

/// How long nothing must happen until a bound counts as no longer reached.
const QUIET: Duration = Duration::from_secs(10);

/// Raises the soft limit of open files to the hard limit and returns it.
///
/// Two descriptors a connection make the usual soft limit of 1,024 the first
/// bound that a proxy meets; the hard one is what the administrator decided.
///
/// # Errors
/// What `getrlimit(2)` and `setrlimit(2)` answer.
pub fn raise_open_files() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// Whether an error says that a resource of the host or of this process is used
/// up, so that trying again at once would only burn the processor.
#[must_use]
pub fn is_exhaustion(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

/// Names the limit behind an [exhaustion](is_exhaustion) and what raises it.
#[must_use]
pub fn describe_exhaustion(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EMFILE) => {
            let limit =
                getrlimit(Resource::RLIMIT_NOFILE).map_or_else(|e| e.to_string(), |l| l.0.to_string());
            format!("RLIMIT_NOFILE is {limit}; raise it with LimitNOFILE= of the unit or `ulimit -n`")
        }
        Some(libc::ENFILE) => "the whole host has no file left; raise sysctl fs.file-max".to_owned(),
        _ => "the kernel has no memory for sockets left; see sysctls net.ipv4.tcp_mem and udp_mem".to_owned(),
    }
}

/// A descriptor that can be given up for another; empty until it is filled.
#[derive(Debug, Default)]
pub struct Reserve(RefCell<Option<File>>);

impl Reserve {
    /// Makes it full.
    ///
    /// # Errors
    /// Where no descriptor is left.
    pub fn refill(&self) -> io::Result<()> {
        let mut held = self.0.borrow_mut();
        if held.is_none() {
            *held = Some(File::open("/dev/null")?);
        }
        Ok(())
    }

    /// Whether there was one.
    #[must_use]
    pub fn give_up(&self) -> bool {
        self.0.take().is_some()
    }
}

/// Says once that a bound is reached, and once that it no longer is.
#[derive(Debug)]
pub struct Alarm {
    epoch: Instant,
    /// Milliseconds after `epoch`, plus one, of the latest report; 0: all is well.
    last: AtomicU64,
}

impl Default for Alarm {
    fn default() -> Self {
        Self { epoch: Instant::now(), last: AtomicU64::new(0) }
    }
}

impl Alarm {
    /// The bound was met. True for the first caller after a quiet time: it logs.
    pub fn raise(&self) -> bool {
        self.raise_at(Instant::now())
    }

    /// Things went well. True for the first caller after a time without
    /// [`raise`](Self::raise): it logs the recovery.
    pub fn clear(&self) -> bool {
        self.last.load(Ordering::Relaxed) != 0 && self.clear_at(Instant::now())
    }

    fn raise_at(&self, now: Instant) -> bool {
        self.last.swap(self.stamp(now), Ordering::Relaxed) == 0
    }

    fn clear_at(&self, now: Instant) -> bool {
        let last = self.last.load(Ordering::Relaxed);
        let quiet = u64::try_from(QUIET.as_millis()).unwrap_or(u64::MAX);
        last != 0
            && self.stamp(now).saturating_sub(last) >= quiet
            && self.last.compare_exchange(last, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn stamp(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX - 1) + 1
    }
}

/// Counts what each client address has open, over all workers.
///
/// Workers share it, because one client's connections spread over all of them and
/// a bound per worker would mean something else for each number of workers. A
/// lock is taken when a connection or flow begins and ends, never for its data.
#[derive(Debug)]
pub struct ClientLimits {
    max: u32,
    shards: [Mutex<BTreeMap<IpAddr, u32>>; SHARDS],
}

impl ClientLimits {
    /// Limits each client address to `max` connections and flows together.
    #[must_use]
    pub fn new(max: u32) -> Arc<Self> {
        Arc::new(Self { max, shards: std::array::from_fn(|_| Mutex::new(BTreeMap::new())) })
    }

    /// Counts one more for `client`, until the slot is dropped. None: it has its share.
    #[must_use]
    pub fn admit(self: &Arc<Self>, client: IpAddr) -> Option<ClientSlot> {
        let mut shard = self.shard(client);
        match shard.entry(client) {
            Entry::Occupied(mut entry) if *entry.get() < self.max => *entry.get_mut() += 1,
            Entry::Vacant(entry) if self.max > 0 => {
                entry.insert(1);
            }
            _ => return None,
        }
        drop(shard);
        Some(ClientSlot { limits: Arc::clone(self), client })
    }

    fn shard(&self, client: IpAddr) -> MutexGuard<'_, BTreeMap<IpAddr, u32>> {
        // Clients of a network differ in one of its bytes. Who makes that be the same gains nothing.
        let folded = match client {
            IpAddr::V4(client) => client.octets().into_iter().fold(0, u8::wrapping_add),
            IpAddr::V6(client) => client.octets().into_iter().fold(0, u8::wrapping_add),
        };
        // A count is right after every step, so a panic elsewhere does not spoil it.
        self.shards[usize::from(folded) % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection or flow of a client; counted until dropped.
#[derive(Debug)]
pub struct ClientSlot {
    limits: Arc<ClientLimits>,
    client: IpAddr,
}

impl Drop for ClientSlot {
    fn drop(&mut self) {
        let mut shard = self.limits.shard(self.client);
        if let Entry::Occupied(mut entry) = shard.entry(self.client) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_gets_its_share_and_no_more() {
        let limits = ClientLimits::new(2);
        let [a, b] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(IpAddr::from);
        let first = limits.admit(a).expect("the first fits");
        let _second = limits.admit(a).expect("the second fits");
        assert!(limits.admit(a).is_none());
        assert!(limits.admit(b).is_some(), "another client is not affected");
        drop(first);
        assert!(limits.admit(a).is_some());
    }

    #[test]
    fn nothing_is_kept_of_a_client_that_left() {
        let limits = ClientLimits::new(2);
        drop(limits.admit([10, 0, 0, 1].into()));
        assert!(limits.shards.iter().all(|shard| shard.lock().is_ok_and(|map| map.is_empty())));
    }

    #[test]
    fn alarm_speaks_once_until_it_was_quiet() {
        let alarm = Alarm::default();
        let at = |seconds| alarm.epoch + Duration::from_secs(seconds);
        assert!(!alarm.clear());
        assert!(alarm.raise_at(at(0)));
        assert!(!alarm.raise_at(at(5)));
        assert!(!alarm.clear_at(at(14)), "5 to 14 is not quiet for long enough");
        assert!(alarm.clear_at(at(15)));
        assert!(!alarm.clear_at(at(30)));
        assert!(alarm.raise_at(at(31)));
    }

    #[test]
    fn exhaustion_names_its_limit() {
        let error = io::Error::from_raw_os_error(libc::EMFILE);
        assert!(is_exhaustion(&error));
        assert!(describe_exhaustion(&error).contains("RLIMIT_NOFILE is "));
        assert!(!is_exhaustion(&io::Error::from_raw_os_error(libc::ECONNABORTED)));
    }
}
