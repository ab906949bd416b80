//! Conditions as sets, so that those of a jump and of a rule can be joined, and
//! rules that never decide be told.

use crate::config::Mark;
use crate::policy::ranges::Ranges;

/// What a flow has a number for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dimension {
    /// Protocol number.
    Protocol,
    /// IPv4 source address.
    From4,
    /// IPv6 source address.
    From6,
    /// IPv4 destination address.
    To4,
    /// IPv6 destination address.
    To6,
    /// Source port.
    FromPort,
    /// Destination port.
    ToPort,
    /// Differentiated services field.
    Dscp,
    /// User of the sending socket.
    Uid,
    /// Group of the process that made it.
    Gid,
    /// Link-layer source address.
    Mac,
}

impl Dimension {
    const COUNT: usize = 11;

    /// All numbers that packets have.
    #[must_use]
    pub(crate) fn all(self) -> Ranges {
        // No flow has port 0, and rules here cannot name it.
        let least = u128::from(matches!(self, Self::FromPort | Self::ToPort));
        Ranges::new(vec![(least, self.most())])
    }

    /// The greatest number.
    #[must_use]
    pub(crate) const fn most(self) -> u128 {
        match self {
            Self::Protocol => 0xff,
            Self::From4 | Self::To4 | Self::Uid | Self::Gid => u32::MAX as u128,
            Self::From6 | Self::To6 => u128::MAX,
            Self::FromPort | Self::ToPort => 0xffff,
            Self::Dscp => 63,
            Self::Mac => 0xffff_ffff_ffff,
        }
    }
}

/// The dimensions of addresses of one family.
pub(crate) const FAMILIES: [[Dimension; 2]; 2] =
    [[Dimension::From4, Dimension::To4], [Dimension::From6, Dimension::To6]];

const NOT_ADDRESSES: [Dimension; 7] = [
    Dimension::Protocol,
    Dimension::FromPort,
    Dimension::ToPort,
    Dimension::Dscp,
    Dimension::Uid,
    Dimension::Gid,
    Dimension::Mac,
];

/// All of them hold; what is `None` holds for every flow.
///
/// The sets of a family that is not meant are empty; those of the other say nothing
/// about its packets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Conditions {
    sets: [Option<Ranges>; Dimension::COUNT],
    /// Names of interfaces that it arrives on, or beginnings of such with a final `*`; in order.
    pub(crate) interfaces: Option<Vec<String>>,
    /// Names of users, where they have no number; in order.
    pub(crate) users: Option<Vec<String>>,
    /// Names of groups, likewise.
    pub(crate) groups: Option<Vec<String>>,
    /// Its mark.
    pub(crate) mark: Option<Mark>,
    /// It is (or is not) this host's own traffic.
    pub(crate) own: Option<bool>,
    /// It goes to this host itself, so it is none that tproxy captures.
    pub(crate) to_this_host: bool,
}

impl Conditions {
    /// One number is in a set.
    #[must_use]
    pub(crate) fn of(dimension: Dimension, numbers: Ranges) -> Self {
        let mut conditions = Self::default();
        conditions.put(dimension, numbers);
        conditions
    }

    /// It is of one family.
    #[must_use]
    pub(crate) fn family(v6: bool) -> Self {
        let mut conditions = Self::default();
        for dimension in FAMILIES[usize::from(!v6)] {
            conditions.put(dimension, Ranges::default());
        }
        conditions
    }

    /// It arrives on one of these interfaces.
    #[must_use]
    pub(crate) fn on(interfaces: Vec<String>) -> Self {
        Self { interfaces: Some(in_order(interfaces)), ..Self::default() }
    }

    /// Its mark is so.
    #[must_use]
    pub(crate) fn marked(mark: Mark) -> Self {
        Self { mark: Some(mark), ..Self::default() }
    }

    /// One of these users sends it.
    #[must_use]
    pub(crate) fn sent_by(users: Vec<String>) -> Self {
        Self { users: Some(in_order(users)), ..Self::default() }
    }

    /// A process of one of these groups sends it.
    #[must_use]
    pub(crate) fn sent_by_groups(groups: Vec<String>) -> Self {
        Self { groups: Some(in_order(groups)), ..Self::default() }
    }

    /// Whether they ask for the socket that sends it, which the host's own traffic alone has.
    #[must_use]
    pub(crate) fn ask_who_sends(&self) -> bool {
        self.users.is_some()
            || self.groups.is_some()
            || [Dimension::Uid, Dimension::Gid].iter().any(|dimension| self.get(*dimension).is_some())
    }

    /// It is this host's own traffic, or is not.
    #[must_use]
    pub(crate) fn own(own: bool) -> Self {
        Self { own: Some(own), ..Self::default() }
    }

    /// It goes to this host itself.
    #[must_use]
    pub(crate) fn to_this_host() -> Self {
        Self { to_this_host: true, ..Self::default() }
    }

    /// A set; `None`: all numbers.
    #[must_use]
    pub(crate) fn get(&self, dimension: Dimension) -> Option<&Ranges> {
        self.sets[dimension as usize].as_ref()
    }

    /// Replaces a set.
    pub(crate) fn put(&mut self, dimension: Dimension, numbers: Ranges) {
        let all = dimension.all();
        let numbers = if all.covers(&numbers) { numbers } else { numbers.intersection(&all) };
        self.sets[dimension as usize] = (numbers != all).then_some(numbers);
    }

    /// Takes a condition off.
    pub(crate) fn lift(&mut self, dimension: Dimension) {
        self.sets[dimension as usize] = None;
    }

    /// Whether packets of a family can meet them.
    #[must_use]
    pub(crate) fn has_family(&self, v6: bool) -> bool {
        FAMILIES[usize::from(v6)]
            .iter()
            .all(|dimension| self.get(*dimension).is_none_or(|set| !set.is_empty()))
    }

    /// Both hold; `None` where no flow can meet that.
    #[must_use]
    pub(crate) fn and(&self, other: &Self) -> Option<Self> {
        self.joined(other).ok()?.normal()
    }

    fn joined(&self, other: &Self) -> Result<Self, Contradiction> {
        let mut both = Self::default();
        for (set, (this, that)) in both.sets.iter_mut().zip(self.sets.iter().zip(&other.sets)) {
            *set = join(this.as_ref(), that.as_ref(), |this, that| Some(this.intersection(that)))?;
        }
        both.interfaces = join(self.interfaces.as_ref(), other.interfaces.as_ref(), |this, that| {
            let both =
                this.iter().flat_map(|a| that.iter().filter_map(|b| narrower(a, b))).cloned().collect();
            Some(in_order(both)).filter(|both| !both.is_empty())
        })?;
        both.users = join(self.users.as_ref(), other.users.as_ref(), common)?;
        both.groups = join(self.groups.as_ref(), other.groups.as_ref(), common)?;
        both.mark = join(self.mark.as_ref(), other.mark.as_ref(), |this, that| both_marks(*this, *that))?;
        both.own = join(self.own.as_ref(), other.own.as_ref(), |this, that| (this == that).then_some(*this))?;
        both.to_this_host = self.to_this_host || other.to_this_host;
        Ok(both)
    }

    /// Empties what is about a family that is not meant; `None` where nothing is left.
    fn normal(mut self) -> Option<Self> {
        let families = [false, true].map(|v6| self.has_family(v6));
        for (dimensions, meant) in FAMILIES.into_iter().zip(families) {
            if !meant {
                for dimension in dimensions {
                    self.put(dimension, Ranges::default());
                }
            }
        }
        let possible =
            NOT_ADDRESSES.iter().all(|dimension| self.get(*dimension).is_none_or(|set| !set.is_empty()));
        (families != [false; 2] && possible).then_some(self)
    }

    /// Whether every flow that meets the other meets this.
    #[must_use]
    pub(crate) fn covers(&self, other: &Self) -> bool {
        let sets = self.sets.iter().zip(&other.sets).all(|(this, that)| match (this, that) {
            (None, _) => true,
            (Some(this), Some(that)) => this.covers(that),
            (Some(_), None) => false,
        });
        let interfaces = match (&self.interfaces, &other.interfaces) {
            (None, _) => true,
            (Some(this), Some(that)) => that.iter().all(|b| this.iter().any(|a| narrower(a, b) == Some(b))),
            (Some(_), None) => false,
        };
        sets && interfaces
            && (self.users.is_none() || self.users == other.users)
            && (self.groups.is_none() || self.groups == other.groups)
            && (self.mark.is_none() || self.mark == other.mark)
            && (self.own.is_none() || self.own == other.own)
            && (!self.to_this_host || other.to_this_host)
    }

    /// One of both holds; `None` where that is more than conditions can say: they differ in more
    /// than one respect.
    #[must_use]
    pub(crate) fn or(&self, other: &Self) -> Option<Self> {
        let rest = |of: &Self| (of.users.clone(), of.groups.clone(), of.mark, of.own, of.to_this_host);
        if rest(self) != rest(other) {
            return None;
        }
        let mut either = self.clone();
        let mut respects = 0;
        for dimension in
            NOT_ADDRESSES.into_iter().filter(|dimension| self.get(*dimension) != other.get(*dimension))
        {
            respects += 1;
            either.unite(dimension, other);
        }
        if self.interfaces != other.interfaces {
            respects += 1;
            either.interfaces = self
                .interfaces
                .as_ref()
                .zip(other.interfaces.as_ref())
                .map(|(this, that)| in_order(this.iter().chain(that).cloned().collect()));
        }
        let mut addresses_differ = false;
        for (v6, dimensions) in [false, true].into_iter().zip(FAMILIES) {
            let differing: Vec<_> = dimensions
                .into_iter()
                .filter(|dimension| self.get(*dimension) != other.get(*dimension))
                .collect();
            addresses_differ |= !differing.is_empty();
            match (self.has_family(v6), other.has_family(v6)) {
                (true, true) if differing.len() > 1 => return None,
                (true, true) => differing.into_iter().for_each(|dimension| either.unite(dimension, other)),
                // A packet is of one family: the other side says nothing about it.
                (false, true) => differing.into_iter().for_each(|dimension| {
                    either.sets[dimension as usize] = other.get(dimension).cloned();
                }),
                (_, false) => {}
            }
        }
        (respects + usize::from(addresses_differ) <= 1).then_some(either)
    }

    fn unite(&mut self, dimension: Dimension, other: &Self) {
        match (self.get(dimension), other.get(dimension)) {
            (Some(this), Some(that)) => self.put(dimension, this.clone().union(that.clone())),
            _ => self.lift(dimension),
        }
    }
}

/// No flow meets both.
struct Contradiction;

/// What both say.
fn join<T: Clone>(
    this: Option<&T>,
    that: Option<&T>,
    both: impl Fn(&T, &T) -> Option<T>,
) -> Result<Option<T>, Contradiction> {
    match (this, that) {
        (Some(this), Some(that)) => both(this, that).map(Some).ok_or(Contradiction),
        (one, other) => Ok(one.or(other).cloned()),
    }
}

/// The names that are in both lists; `None` where there is none.
#[expect(clippy::ptr_arg, reason = "as `join` has what it joins")]
fn common(this: &Vec<String>, that: &Vec<String>) -> Option<Vec<String>> {
    let both: Vec<_> = this.iter().filter(|name| that.contains(name)).cloned().collect();
    Some(both).filter(|both| !both.is_empty())
}

fn both_marks(this: Mark, that: Mark) -> Option<Mark> {
    let common = this.mask & that.mask;
    let mark = Mark { value: this.value | that.value, mask: this.mask | that.mask };
    ((this.value ^ that.value) & common == 0).then_some(mark)
}

/// The one of two names or beginnings that says more; `None` where no name is both.
fn narrower<'a>(a: &'a String, b: &'a String) -> Option<&'a String> {
    let within = |name: &str, pattern: &str| match pattern.strip_suffix('*') {
        Some(beginning) => name.trim_end_matches('*').starts_with(beginning),
        None => name == pattern,
    };
    if within(b, a) { Some(b) } else { within(a, b).then_some(a) }
}

fn in_order(mut names: Vec<String>) -> Vec<String> {
    names.sort_unstable();
    names.dedup();
    names
}
