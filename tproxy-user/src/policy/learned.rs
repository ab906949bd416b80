//! What addresses are called, by the DNS answers that pass.

use std::net::IpAddr;
use std::num::NonZeroUsize;

use lru::LruCache;

use super::domains::Domains;

/// Addresses that are remembered; the one that was answered longest ago goes first. As many as
/// the kernel's map has room for.
const ADDRESSES: NonZeroUsize = NonZeroUsize::new(65_536).expect("more than none");

/// Names of one address. Where there are more, it is too many servers' to say which is meant.
const NAMES: usize = 16;

/// A name that an address was given for, and until when; times are nanoseconds of
/// `CLOCK_MONOTONIC`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Called {
    name: Box<str>,
    expires: u64,
}

/// Names by address.
#[derive(Debug)]
pub struct Learned(LruCache<IpAddr, Names>);

/// Those of one address.
#[derive(Debug, Default)]
struct Names {
    called: Vec<Called>,
    /// Until when there are more than these.
    crowded: u64,
}

impl Default for Learned {
    fn default() -> Self {
        // Not at once: rules need not ask for names.
        Self(LruCache::sparse(ADDRESSES))
    }
}

impl Learned {
    /// An answer has said that this is an address of a name.
    pub fn learn(&mut self, name: &str, address: IpAddr, now: u64, expires: u64) {
        let names = self.0.get_or_insert_mut(address, Names::default);
        names.called.retain(|called| called.expires > now);
        if let Some(known) = names.called.iter_mut().find(|called| *called.name == *name) {
            known.expires = known.expires.max(expires);
        } else if names.called.len() < NAMES {
            names.called.push(Called { name: name.into(), expires });
        } else {
            names.crowded = names.crowded.max(expires);
        }
    }

    /// The set of names that an address has, and until when. `None`: it has none, or its names
    /// are of several sets, so that only a client can tell which one it means.
    #[must_use]
    pub fn set_of(&self, address: IpAddr, domains: &Domains, now: u64) -> Option<(u32, u64)> {
        let names = self.0.peek(&address).filter(|names| names.crowded <= now)?;
        let mut sets = names
            .called
            .iter()
            .filter(|called| called.expires > now)
            .map(|called| (domains.set_of(&called.name), called.expires));
        let first = sets.next()?;
        sets.try_fold(first, |known, other| (known.0 == other.0).then_some((known.0, known.1.max(other.1))))
    }

    /// All addresses, the one that was answered longest ago first.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.0.iter().rev().map(|(address, _)| *address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::domains::Pattern;

    fn address(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn names_of_one_set_are_as_good_as_one() {
        let listed = [Pattern::parse("*.example").expect("a name")];
        let domains = Domains::new([&listed]);
        let set = domains.set_of("a.example");
        let mut learned = Learned::default();
        assert_eq!(learned.set_of(address(1), &domains, 0), None);
        learned.learn("a.example", address(1), 0, 100);
        learned.learn("b.example", address(1), 0, 50);
        learned.learn("other.test", address(2), 0, 50);
        assert_eq!(learned.set_of(address(1), &domains, 10), Some((set, 100)));
        assert_eq!(learned.set_of(address(2), &domains, 10), Some((0, 50)));
        assert_eq!(learned.set_of(address(2), &domains, 50), None);
        // Another that is of no rule, until it expires.
        learned.learn("other.test", address(1), 10, 60);
        assert_eq!(learned.set_of(address(1), &domains, 59), None);
        assert_eq!(learned.set_of(address(1), &domains, 60), Some((set, 100)));
        learned.learn("a.example", address(1), 60, 80);
        assert_eq!(
            learned.set_of(address(1), &domains, 60),
            Some((set, 100)),
            "a shorter time changes nothing"
        );
        assert_eq!(learned.addresses().collect::<Vec<_>>(), [address(2), address(1)]);
    }

    #[test]
    fn an_address_of_very_many_has_no_name() {
        let domains = Domains::default();
        let mut learned = Learned::default();
        for number in 0..100 {
            learned.learn(&format!("n{number}.test"), address(1), 0, 100 + number);
        }
        assert_eq!(learned.set_of(address(1), &domains, 198), None);
        learned.learn("one.test", address(1), 200, 300);
        assert_eq!(learned.set_of(address(1), &domains, 200), Some((0, 300)));
    }

    #[test]
    fn as_many_addresses_as_there_is_room_for() {
        let mut learned = Learned::default();
        for number in 0..=u32::try_from(ADDRESSES.get()).expect("fits") {
            learned.learn("a.test", IpAddr::V4(number.into()), 0, 1);
        }
        assert_eq!(learned.addresses().count(), ADDRESSES.get());
        assert_eq!(learned.set_of(IpAddr::V4(0.into()), &Domains::default(), 0), None);
    }
}
