//! Values that both tools write alike.

use ipnet::IpNet;
use tproxy_common::abi::{TCP, UDP};

use crate::cli::parse;
use crate::config::Mark;
use crate::policy::ranges::Ranges;

use super::condition::{Conditions, Dimension, FAMILIES};
use super::model::Matches;

/// Which address of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Its source.
    From,
    /// Its destination.
    To,
}

impl Side {
    /// The dimension of its address.
    #[must_use]
    pub(crate) const fn address(self, v6: bool) -> Dimension {
        FAMILIES[v6 as usize][self as usize]
    }

    /// The dimension of its port.
    #[must_use]
    pub(crate) const fn port(self) -> Dimension {
        match self {
            Self::From => Dimension::FromPort,
            Self::To => Dimension::ToPort,
        }
    }
}

/// A set of one number.
#[must_use]
pub(crate) fn one(number: impl Into<u128>) -> Ranges {
    let number = number.into();
    Ranges::new(vec![(number, number)])
}

/// The family and the numbers of a network.
#[must_use]
pub(crate) fn addresses(net: IpNet) -> (bool, (u128, u128)) {
    match net {
        IpNet::V4(net) => (false, (u32::from(net.network()).into(), u32::from(net.broadcast()).into())),
        IpNet::V6(net) => (true, (net.network().into(), net.broadcast().into())),
    }
}

/// The numbers of a protocol, by its name or number: none where tproxy captures no such
/// packets, all for `all`.
#[must_use]
pub(crate) fn protocol(name: &str) -> Ranges {
    match name.to_ascii_lowercase().as_str() {
        "tcp" | "6" => one(TCP),
        "udp" | "17" => one(UDP),
        "all" | "0" => Ranges::new(vec![(0, Dimension::Protocol.most())]),
        _ => Ranges::default(),
    }
}

/// `VALUE[/MASK]`, as conditions over marks have it; `None` where no mark is so.
///
/// # Errors
/// What was expected.
pub(crate) fn mark(text: &str) -> Result<Option<Mark>, String> {
    let mark = parse::value_and_mask(text)?;
    Ok(Some(mark).filter(|mark| mark.value & !mark.mask == 0))
}

/// A number, also in hexadecimal, or name of the differentiated services field.
///
/// # Errors
/// What was expected.
pub(crate) fn dscp(text: &str) -> Result<Ranges, String> {
    let number = parse::number(text).map_or_else(|_| text.to_owned(), |number| number.to_string());
    parse::dscp(&number).map(one)
}

/// A link-layer address.
///
/// # Errors
/// What was expected.
pub(crate) fn mac(text: &str) -> Result<Ranges, String> {
    let bytes = parse::mac(text)?;
    Ok(one(bytes.into_iter().fold(0, |number, byte| number << 8 | u128::from(byte))))
}

/// The user of the sending socket, as numbers `5` or `5-10`, or a name.
pub(crate) fn require_users(matches: &mut Matches, text: &str, negated: bool) {
    match ids(text) {
        Some(ids) => matches.number(Dimension::Uid, ids, negated),
        None => matches.require_or_not(Conditions::sent_by(vec![text.to_owned()]), negated),
    }
}

/// The group of the process that made it, likewise.
pub(crate) fn require_groups(matches: &mut Matches, text: &str, negated: bool) {
    match ids(text) {
        Some(ids) => matches.number(Dimension::Gid, ids, negated),
        None => matches.require_or_not(Conditions::sent_by_groups(vec![text.to_owned()]), negated),
    }
}

fn ids(text: &str) -> Option<Ranges> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let id = |text: &str| text.parse::<u32>().ok().map(u128::from);
    Some(Ranges::new(vec![(id(first)?, id(last)?)]))
}

/// What kind of address the destination is, by the words of both tools: of the packets that
/// tproxy captures it is unicast and not this host's.
pub(crate) fn destination_type(matches: &mut Matches, types: &[&str], negated: bool) {
    let has = |name: &str| types.iter().any(|kind| kind.eq_ignore_ascii_case(name));
    if has("local") && !has("unicast") && !negated {
        matches.require(&[Conditions::to_this_host()]);
    } else {
        matches.constant(has("unicast") != negated);
    }
}

/// What kind of address the source is: `local` for the host's own traffic.
pub(crate) fn source_type(matches: &mut Matches, types: &[&str], negated: bool) {
    let has = |name: &str| types.iter().any(|kind| kind.eq_ignore_ascii_case(name));
    match (has("local"), has("unicast")) {
        (true, false) => matches.require(&[Conditions::own(!negated)]),
        (false, true) => matches.require(&[Conditions::own(negated)]),
        (both, _) => matches.constant(both != negated),
    }
}

/// The interface that a packet leaves by. The host's own packets that leave by `lo` are for
/// itself, and are not captured.
pub(crate) fn outgoing(matches: &mut Matches, name: &str, negated: bool) {
    if name == "lo" {
        matches.constant(negated);
    } else {
        matches.cannot(format!("there is no condition over the interface that a packet leaves by ({name})"));
    }
}

/// What connection tracking says of a connection: one that is captured is new, and
/// goes the way of its first packet ever after.
pub(crate) fn state(matches: &mut Matches, states: &[&str], negated: bool) {
    let new = states.iter().any(|state| state.eq_ignore_ascii_case("new"));
    matches.constant(new != negated);
}

/// The mark of the connection: a new one has none.
pub(crate) fn connection_mark(matches: &mut Matches, mark: Option<Mark>, negated: bool) {
    matches.constant(mark.is_some_and(|mark| mark.value == 0) != negated);
}

/// The flags of TCP, of the packet that opens a connection: SYN alone.
pub(crate) fn flags(matches: &mut Matches, mask: &[&str], set: &[&str], negated: bool) {
    let has = |of: &[&str], flag: &str| of.iter().any(|name| name.eq_ignore_ascii_case(flag));
    let looked_at = has(mask, "syn") || has(mask, "all");
    let others =
        set.iter().any(|name| !name.eq_ignore_ascii_case("syn") && !name.eq_ignore_ascii_case("none"));
    matches.constant((!others && looked_at == has(set, "syn")) != negated);
}
