//! Where flows go, by number: through which upstream, or to which target they are diverted.
//!
//! The kernel decides over a flow and notes the number; the relay, which asks for it
//! once there are rules, finds what it means.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tproxy_common::abi::Decision;

use crate::config::rule::Diversion;
use crate::config::upstream::{Proxy, Upstream};
use crate::upstream::outbound::Outbound;
use crate::upstream::pool::Pool;

/// Targets. A number means the same target for as long as the process lives, for
/// flows keep theirs when the rules change; but for 0, the default upstream.
#[derive(Clone, Debug, Default)]
pub struct Targets(Arc<Inner>);

/// Where flows go.
#[derive(Clone, Debug, Default)]
pub enum Target {
    /// To their destinations.
    #[default]
    Direct,
    /// To their destinations, through a proxy server.
    Proxy(Arc<Outbound>),
    /// To their destinations, by a member of a group.
    Group(Arc<Pool>),
    /// To an address instead.
    Address(Diversion),
}

#[derive(Debug)]
struct Inner {
    /// By number; at least one.
    targets: RwLock<Vec<Target>>,
    /// Numbers that the rules of now have.
    used: RwLock<Vec<u16>>,
    rules: AtomicBool,
    bind: AtomicBool,
    names: AtomicBool,
}

impl Default for Inner {
    fn default() -> Self {
        let (used, rules, bind, names) = Default::default();
        Self { targets: RwLock::new(vec![Target::Direct]), used, rules, bind, names }
    }
}

/// There have been more targets than there are numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {} targets since the start: start again", Decision::NUMBERS)]
pub struct TooManyTargets;

impl Targets {
    /// The number of an address that flows are diverted to.
    ///
    /// # Errors
    ///
    /// [`TooManyTargets`].
    pub fn of_address(&self, address: Diversion) -> Result<u16, TooManyTargets> {
        self.number(
            |known| matches!(known, Target::Address(known) if *known == address),
            |_| Target::Address(address),
        )
    }

    /// The number of an upstream.
    ///
    /// # Errors
    ///
    /// [`TooManyTargets`].
    pub fn of_upstream(&self, upstream: &Upstream) -> Result<u16, TooManyTargets> {
        self.number(|known| known.is(upstream), |known| Target::through(upstream, known))
    }

    /// From now on flows go by these upstreams, and by the default one where no rule says otherwise.
    ///
    /// # Errors
    ///
    /// [`TooManyTargets`].
    pub fn hold<'a>(
        &self,
        default: &Upstream,
        of_rules: impl Iterator<Item = &'a Upstream>,
    ) -> Result<(), TooManyTargets> {
        let used = of_rules.map(|upstream| self.of_upstream(upstream)).collect::<Result<_, _>>()?;
        *self.0.used.write().unwrap_or_else(PoisonError::into_inner) = used;
        let mut targets = self.0.targets.write().unwrap_or_else(PoisonError::into_inner);
        targets[0] = Target::through(default, &targets);
        self.0.names.store(targets.iter().any(Target::asks_by_name), Ordering::Relaxed);
        Ok(())
    }

    fn number(
        &self,
        is: impl Fn(&Target) -> bool,
        make: impl FnOnce(&[Target]) -> Target,
    ) -> Result<u16, TooManyTargets> {
        let mut targets = self.0.targets.write().unwrap_or_else(PoisonError::into_inner);
        // The first is another when the default is.
        let at = targets.iter().skip(1).position(is).map_or_else(
            || {
                let new = make(&targets);
                targets.push(new);
                targets.len() - 1
            },
            |at| at + 1,
        );
        u16::try_from(at).ok().filter(|number| *number < Decision::NUMBERS).ok_or(TooManyTargets)
    }

    /// From now on some flow may have been decided over by a rule; if rules `bind`, one
    /// may not go to its destination, or not by the default upstream.
    pub fn ask_for(&self, bind: bool) {
        self.0.rules.store(true, Ordering::Relaxed);
        self.0.bind.fetch_or(bind, Ordering::Relaxed);
    }

    /// Whether some flow may have been decided over by a rule.
    #[must_use]
    pub fn are_asked_for(&self) -> bool {
        self.0.rules.load(Ordering::Relaxed)
    }

    /// Whether some flow may not go to its destination, or not by the default upstream.
    #[must_use]
    pub fn bind(&self) -> bool {
        self.0.bind.load(Ordering::Relaxed)
    }

    /// Whether some server may be asked for destinations by their names.
    #[must_use]
    pub fn ask_by_name(&self) -> bool {
        self.0.names.load(Ordering::Relaxed)
    }

    /// The target with this number.
    #[must_use]
    pub fn get(&self, number: u16) -> Option<Target> {
        self.0.targets.read().unwrap_or_else(PoisonError::into_inner).get(usize::from(number)).cloned()
    }

    /// The proxy servers that new flows may go by, each once.
    #[must_use]
    pub fn outbounds(&self) -> Vec<Arc<Outbound>> {
        let mut all: Vec<Arc<Outbound>> = Vec::new();
        let used = self.0.used.read().unwrap_or_else(PoisonError::into_inner);
        let used = used.iter().copied().chain([0]).filter_map(|number| self.get(number));
        for outbound in used.flat_map(|target| target.outbounds()) {
            if !all.iter().any(|known| Arc::ptr_eq(known, &outbound)) {
                all.push(outbound);
            }
        }
        all
    }

    /// All of them, by their numbers.
    #[must_use]
    pub fn all(&self) -> Vec<Target> {
        self.0.targets.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Target {
    fn is(&self, upstream: &Upstream) -> bool {
        match (self, upstream) {
            (Self::Direct, Upstream::Direct) => true,
            (Self::Proxy(outbound), Upstream::Proxy(proxy)) => outbound.proxy() == &**proxy,
            (Self::Group(pool), Upstream::Group(group)) => pool.group() == &**group,
            _ => false,
        }
    }

    /// Whether a server of it is asked for destinations by their names.
    #[must_use]
    pub fn asks_by_name(&self) -> bool {
        match self {
            Self::Direct | Self::Address(_) => false,
            Self::Proxy(outbound) => outbound.proxy().names,
            Self::Group(pool) => pool.members().iter().flatten().any(|outbound| outbound.proxy().names),
        }
    }

    /// The proxy servers of it.
    fn outbounds(&self) -> Vec<Arc<Outbound>> {
        match self {
            Self::Direct | Self::Address(_) => Vec::new(),
            Self::Proxy(outbound) => vec![Arc::clone(outbound)],
            Self::Group(pool) => pool.members().iter().flatten().cloned().collect(),
        }
    }

    /// An upstream: the one that is in use, if it is.
    fn through(upstream: &Upstream, known: &[Self]) -> Self {
        if let Some(known) = known.iter().find(|known| known.is(upstream)) {
            return known.clone();
        }
        match upstream {
            Upstream::Direct => Self::Direct,
            Upstream::Proxy(proxy) => Self::Proxy(outbound(proxy, known)),
            Upstream::Group(group) => {
                let member = |member: &Upstream| match member {
                    Upstream::Proxy(proxy) => Some(outbound(proxy, known)),
                    Upstream::Direct | Upstream::Group(_) => None,
                };
                let members = group.members.iter().map(member).collect();
                Self::Group(Arc::new(Pool::new(Arc::clone(group), members)))
            }
        }
    }
}

/// A proxy server: the one that is in use, alone or in a group, if it is.
fn outbound(proxy: &Arc<Proxy>, known: &[Target]) -> Arc<Outbound> {
    let in_use = known.iter().flat_map(Target::outbounds).find(|outbound| outbound.proxy() == &**proxy);
    in_use.unwrap_or_else(|| {
        let via = proxy.via.as_ref().map(|via| outbound(via, known));
        Arc::new(Outbound::new(Arc::clone(proxy), via))
    })
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn through(url: &str) -> Upstream {
        Upstream::Proxy(Arc::new(Proxy::parse(url).expect("a URL")))
    }

    #[test]
    fn numbers_stay() {
        let targets = Targets::default();
        let target = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let numbers: Vec<_> =
            [53, 80, 53].into_iter().map(|port| targets.of_address(target(port).into())).collect();
        assert_eq!(numbers, [Ok(1), Ok(2), Ok(1)]);
        assert!(
            matches!(targets.clone().get(2), Some(Target::Address(address)) if address == target(80).into())
        );
        assert!(targets.get(3).is_none());
        for port in 0..Decision::NUMBERS - 3 {
            assert!(targets.of_address(target(1000 + port).into()).is_ok());
        }
        assert_eq!(targets.of_address(target(9).into()), Err(TooManyTargets));
    }

    #[test]
    fn the_default_is_another_after_a_reload_and_a_server_is_known_once() {
        let targets = Targets::default();
        let (one, two) = (through("socks5://10.0.0.1"), through("socks5://10.0.0.2"));
        targets.hold(&one, std::iter::empty()).expect("few");
        assert_eq!([targets.of_upstream(&one), targets.of_upstream(&Upstream::Direct)], [Ok(1), Ok(2)]);
        let (Some(Target::Proxy(default)), Some(Target::Proxy(numbered))) = (targets.get(0), targets.get(1))
        else {
            panic!("{targets:?}")
        };
        assert!(Arc::ptr_eq(&default, &numbered));
        targets.hold(&two, [&one].into_iter()).expect("few");
        let used: Vec<_> = targets.outbounds().iter().map(|one| one.proxy().name.to_string()).collect();
        assert_eq!(used, ["socks5://10.0.0.1:1080", "socks5://10.0.0.2:1080"]);
        targets.hold(&two, std::iter::empty()).expect("few");
        assert_eq!(targets.outbounds().len(), 1);
        assert!(targets.get(0).expect("the default").is(&two));
        assert_eq!(targets.of_upstream(&one), Ok(1));
    }
}
