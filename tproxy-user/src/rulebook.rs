//! What steering and relay share of the rules that hold: the targets, the rules that ask for
//! names, and what addresses are called.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use aya::maps::MapError;
use nix::time::{ClockId, clock_gettime};

use crate::datapath::names::NameTable;
use crate::policy::asked::NamedRules;
use crate::policy::domains::Domains;
use crate::policy::learned::Learned;
use crate::policy::targets::Targets;

/// How long an answer holds at least and at most, in seconds: a client connects after it has
/// it, and what nobody says again for a day is old.
const SHORTEST: u32 = 1;
const LONGEST: u32 = 24 * 60 * 60;

/// One for all who have a copy.
#[derive(Clone, Debug, Default)]
pub struct Rulebook {
    /// Where diverted flows go.
    pub targets: Targets,
    naming: Arc<RwLock<Naming>>,
}

#[derive(Debug, Default)]
struct Naming {
    /// `None`: none asks for names.
    rules: Option<Arc<NamedRules>>,
    known: Mutex<Known>,
}

/// What addresses are called, here and in the kernel.
#[derive(Debug, Default)]
struct Known {
    learned: Learned,
    table: Option<NameTable>,
}

impl Rulebook {
    /// The rules that ask for names.
    #[must_use]
    pub fn named(&self) -> Option<Arc<NamedRules>> {
        self.naming.read().unwrap_or_else(PoisonError::into_inner).rules.clone()
    }

    /// From now on the kernel is told here what addresses are called.
    pub fn tell(&self, table: NameTable) {
        let mut naming = self.naming.write().unwrap_or_else(PoisonError::into_inner);
        naming.known.get_mut().unwrap_or_else(PoisonError::into_inner).table = Some(table);
    }

    /// Has other rules hold once the kernel decides by them, as `switch` makes it. Who asks
    /// meanwhile waits, and the kernel knows no name: it has sets by the numbers that one of
    /// both has for them.
    ///
    /// # Errors
    ///
    /// That of `switch`: those of before hold.
    pub fn replace<E>(
        &self,
        rules: Option<NamedRules>,
        switch: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut naming = self.naming.write().unwrap_or_else(PoisonError::into_inner);
        let Naming { rules: held, known } = &mut *naming;
        let known = known.get_mut().unwrap_or_else(PoisonError::into_inner);
        if held.is_some() {
            log(known.table.as_mut().map_or(Ok(()), NameTable::clear));
        }
        let switched = switch();
        if switched.is_ok() {
            *held = rules.map(Arc::new);
        }
        match held {
            Some(rules) => log(known.publish(rules.domains())),
            None => known.learned = Learned::default(),
        }
        switched
    }

    /// Learns from an answer of the DNS which addresses a name has, and for how many seconds.
    pub fn learn(&self, name: &str, addresses: &[(IpAddr, u32)]) {
        let naming = self.naming.read().unwrap_or_else(PoisonError::into_inner);
        let (Some(rules), Some(now)) = (&naming.rules, now()) else { return };
        let mut known = naming.known.lock().unwrap_or_else(PoisonError::into_inner);
        for (address, ttl) in addresses {
            let nanoseconds = u64::from((*ttl).clamp(SHORTEST, LONGEST)) * 1_000_000_000;
            known.learned.learn(name, *address, now, now + nanoseconds);
            log(known.tell(*address, rules.domains(), now));
        }
    }
}

impl Known {
    /// Tells the kernel what an address is called.
    fn tell(&mut self, address: IpAddr, domains: &Domains, now: u64) -> Result<(), MapError> {
        let Some(table) = &mut self.table else { return Ok(()) };
        table.set(address, self.learned.set_of(address, domains, now))
    }

    /// Tells it of all.
    fn publish(&mut self, domains: &Domains) -> Result<(), MapError> {
        let (Some(table), Some(now)) = (&mut self.table, now()) else { return Ok(()) };
        self.learned.addresses().try_for_each(|address| match self.learned.set_of(address, domains, now) {
            None => Ok(()),
            called => table.set(address, called),
        })
    }
}

/// The clock by which the kernel tells what has expired.
fn now() -> Option<u64> {
    let now = std::time::Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).ok()?);
    u64::try_from(now.as_nanos()).ok()
}

/// What the kernel is not told it asks for.
fn log(told: Result<(), MapError>) {
    if let Err(error) = told {
        tracing::debug!("cannot tell the kernel what addresses are called: {error}");
    }
}
