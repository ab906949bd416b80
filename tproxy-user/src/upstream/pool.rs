//! A group in use: which member a flow goes by, and which if that fails.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::outbound::Outbound;
use crate::config::upstream::{Group, Policy};

/// One for all workers.
#[derive(Debug)]
pub struct Pool {
    group: Arc<Group>,
    members: Vec<Member>,
    turn: AtomicUsize,
}

/// A member; `None`: straight to the destination.
pub type Member = Option<Arc<Outbound>>;

impl Pool {
    /// Of a group; `members` are in the order of its own.
    #[must_use]
    pub fn new(group: Arc<Group>, members: Vec<Member>) -> Self {
        Self { group, members, turn: AtomicUsize::new(0) }
    }

    /// The group, as it is configured.
    #[must_use]
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Its members.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// All members, in the order in which they are tried for a flow of this client: by the policy,
    /// but first those that work.
    #[must_use]
    pub fn order(&self, client: IpAddr) -> Vec<Member> {
        let count = self.members.len();
        let mut order: Vec<usize> = (0..count).collect();
        match self.group.policy {
            Policy::Failover => {}
            Policy::RoundRobin => {
                order.rotate_left(self.turn.fetch_add(1, Ordering::Relaxed) % count.max(1));
            }
            Policy::LeastLatency => order.sort_by_key(|at| self.latency(*at)),
            Policy::SourceHash => order.sort_by_key(|at| std::cmp::Reverse(weight(client, *at))),
        }
        order.sort_by_key(|at| !self.works(*at));
        order.into_iter().map(|at| self.members[at].clone()).collect()
    }

    fn works(&self, at: usize) -> bool {
        self.members[at].as_ref().is_none_or(|outbound| outbound.works())
    }

    /// One that was not connected to yet goes first, to be known.
    fn latency(&self, at: usize) -> Duration {
        self.members[at].as_ref().and_then(|outbound| outbound.latency()).unwrap_or_default()
    }
}

/// What a member weighs for a client: the heaviest is its own (rendezvous hashing, Thaler and
/// Ravishankar, ACM Transactions on Networking 1998), so that one that fails moves its own clients alone.
fn weight(client: IpAddr, member: usize) -> u64 {
    // Without keys of its own: the same in each worker, and after a restart.
    let mut hasher = DefaultHasher::new();
    (client, member).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::upstream::{Proxy, Upstream};
    use crate::upstream::{Cause, ConnectError, Reason};

    fn pool(policy: Policy, count: u8) -> Pool {
        let proxies: Vec<_> = (1..=count)
            .map(|n| Arc::new(Proxy::parse(&format!("socks5://10.0.0.{n}")).expect("a URL")))
            .collect();
        let members = proxies.iter().map(|proxy| Upstream::Proxy(Arc::clone(proxy))).collect();
        let group = Group { name: "exits".into(), members, policy };
        let members = proxies.into_iter().map(|proxy| Some(Arc::new(Outbound::new(proxy, None)))).collect();
        Pool::new(Arc::new(group), members)
    }

    fn names(pool: &Pool, client: [u8; 4]) -> Vec<String> {
        let order = pool.order(client.into());
        order.iter().flatten().map(|outbound| outbound.proxy().name.to_string()).collect()
    }

    fn fail(pool: &Pool, at: usize) {
        let error = ConnectError { reason: Reason::Proxy, source: Cause::Closed };
        pool.members()[at].as_ref().expect("a server").judge(Err::<(), _>(error)).expect_err("failed");
    }

    #[test]
    fn what_works_goes_first() {
        let pool = pool(Policy::Failover, 3);
        let [one, two, three] = [1, 2, 3].map(|n| format!("socks5://10.0.0.{n}:1080"));
        assert_eq!(names(&pool, [10, 1, 1, 1]), [one.clone(), two.clone(), three.clone()]);
        fail(&pool, 0);
        assert_eq!(names(&pool, [10, 1, 1, 1]), [two, three, one]);
    }

    #[test]
    fn each_has_its_turn() {
        let pool = pool(Policy::RoundRobin, 3);
        let first: Vec<_> = (0..6).map(|_| names(&pool, [10, 1, 1, 1]).remove(0)).collect();
        assert_eq!(first[..3], first[3..]);
        assert_eq!(first[..3].iter().collect::<std::collections::HashSet<_>>().len(), 3);
    }

    #[test]
    fn a_client_keeps_its_member_and_one_that_fails_moves_its_own_alone() {
        let pool = pool(Policy::SourceHash, 3);
        let of = |pool: &Pool| (0..90).map(|n| names(pool, [10, 1, 1, n]).remove(0)).collect::<Vec<_>>();
        let before = of(&pool);
        assert_eq!(before, of(&pool));
        for n in 1..=3 {
            let name = format!("socks5://10.0.0.{n}:1080");
            assert!(
                (15..=45).contains(&before.iter().filter(|member| **member == name).count()),
                "{before:?}"
            );
        }
        fail(&pool, 0);
        let moved = before.iter().zip(of(&pool)).filter(|(old, new)| *old != new);
        assert!(moved.clone().count() > 0 && moved.into_iter().all(|(old, _)| old.ends_with(".1:1080")));
    }
}
