//! Ordered rules in compiled form, and the first that matches.
//!
//! The cost grows neither with the rules nor with their prefixes. It is the
//! bit-vector method (Lakshman and Stiliadis, SIGCOMM 1998) with a summary of
//! each vector (Baboescu and Varghese, SIGCOMM 2001): each dimension of a packet,
//! such as its source or its port, is looked up by itself and gives a vector of
//! the rules that this value satisfies. The first bit that all have is the rule.
//! A value is found in a tree over the ends of intervals, so prefixes, ranges
//! and single values are one thing, and a million IPv4 prefixes of one rule are some
//! two million words.
//!
//! The compiled form is one image of equal [`Line`]s, which kernel programs read
//! from a map and userspace from memory; this is the code of both. `tproxy-user`
//! compiles it.

#![allow(
    clippy::cast_possible_truncation,
    reason = "places in a line and dimensions are below 32, and addresses are cut into words"
)]

pub mod layout;
mod search;
mod settled;

pub use settled::settled;

use crate::abi::{Addr, Family};

/// The unit in which an image is read: two cache lines.
pub type Line = [u32; LINE];

/// Words of a [`Line`].
pub const LINE: usize = 32;

/// What an image says of a dimension, half a [`Line`].
pub type Description = [u32; layout::DESCRIPTION];

/// Rules that an image can hold: words 0 and 1 of a vector's two lines sum the others up.
pub const MAX_RULES: usize = VECTOR_WORDS * 32;

/// Words of a vector that hold rules, 32 in each.
pub const VECTOR_WORDS: usize = VECTOR_LINES * LINE - SUMMARY_WORDS;

/// Lines of a vector.
pub const VECTOR_LINES: usize = 2;

/// Words of a vector that have a bit for each of the others that is not zero.
pub const SUMMARY_WORDS: usize = 2;

/// The most levels of a tree above its leaves: 7 · 8^7 ends of 128 bits are 14 million,
/// of 32 bits those of a million networks take 4 levels.
pub const MAX_LEVELS: usize = 7;

/// What of a packet rules may ask for. Each is looked up by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Dimension {
    /// Source address of an IPv4 packet, 32 bits.
    Source4,
    /// Source address of an IPv6 packet, 128 bits.
    Source6,
    /// Destination address of an IPv4 packet.
    Destination4,
    /// Destination address of an IPv6 packet.
    Destination6,
    /// Source port; unknown in a fragment without ports.
    SourcePort,
    /// Destination port; unknown in a fragment without ports.
    DestinationPort,
    /// Protocol number.
    Protocol,
    /// Index of the interface that the flow arrives on; of own traffic none.
    Interface,
    /// Link-layer address that it comes from, 48 bits; none of own traffic and of
    /// what has no Ethernet header.
    Mac,
    /// Differentiated services codepoint, 6 bits (RFC 2474).
    Dscp,
    /// The mark with which it arrives, or leaves its socket: the bits that are set in
    /// the description's [`PARAMETER`](layout::PARAMETER).
    Mark0,
    /// The same by another parameter.
    Mark1,
    /// User that owns the sending socket; own traffic alone.
    Uid,
    /// Group of the process that made the sending socket; own traffic alone, and none where
    /// that is not known.
    Gid,
    /// Control group that the sending socket is in, 64 bits: its ancestor at the depth that
    /// the description's [`PARAMETER`](layout::PARAMETER) says, the root's being 0. Own
    /// traffic alone, and none where the socket's group is less deep.
    Cgroup0,
    /// The same at another depth.
    Cgroup1,
    /// The same at a third depth.
    Cgroup2,
    /// Set of the name that the flow is for, by the number that userspace gives it. Rules that
    /// ask for names share all sets that names can be in.
    Domain,
}

impl Dimension {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 18] = [
        Self::Source4,
        Self::Source6,
        Self::Destination4,
        Self::Destination6,
        Self::SourcePort,
        Self::DestinationPort,
        Self::Protocol,
        Self::Interface,
        Self::Mac,
        Self::Dscp,
        Self::Mark0,
        Self::Mark1,
        Self::Uid,
        Self::Gid,
        Self::Cgroup0,
        Self::Cgroup1,
        Self::Cgroup2,
        Self::Domain,
    ];

    /// Words of a value. What is longer than one is taken for as long as an IPv6 address:
    /// a third length would be a third search for the kernel's verifier to follow.
    #[must_use]
    pub const fn width(self) -> usize {
        match self {
            Self::Source6
            | Self::Destination6
            | Self::Mac
            | Self::Cgroup0
            | Self::Cgroup1
            | Self::Cgroup2 => 4,
            _ => 1,
        }
    }
}

/// An image, in a map or in memory.
///
/// The kernel's verifier follows a function anew for each place that calls it, but for global ones,
/// of which it assumes nothing. So programs make such functions of the parts of a decision that
/// have loops: those that are given here.
pub trait Image: Sized {
    /// A line; `None` beyond the end.
    fn line(&self, index: u32) -> Option<&Line>;

    /// The same number, by a way on which the kernel's verifier loses sight of it:
    /// what it can tell of numbers keeps it from joining the paths that lead to one place.
    fn hidden(&self, number: u32) -> u32;

    /// The same number, of which the compiler knows nothing: it would make branches
    /// of arithmetic that stands for them.
    fn opaque(&self, number: u64) -> u64;

    /// [`settled`].
    #[inline(always)]
    fn settled(&self, family: Family, protocol: u8) -> Option<u32> {
        settled(self, family, protocol)
    }

    /// [`short_class`].
    #[inline(always)]
    fn short_class(&self, dimension: u32, value: u32) -> Option<u32> {
        short_class(self, dimension, value)
    }

    /// [`long_class`].
    #[inline(always)]
    fn long_class(&self, dimension: u32, value: (u64, u64)) -> Option<u32> {
        long_class(self, dimension, value)
    }

    /// [`in_all`].
    #[inline(always)]
    fn in_all(&self, work: &Work, place: u32) -> Option<u32> {
        in_all(self, work, place)
    }
}

/// What a packet is to the rules, which ask for no more than they need.
pub trait Facts {
    /// The family of its addresses.
    fn family(&self) -> Family;
    /// Source address.
    fn source(&self) -> &Addr;
    /// Destination address.
    fn destination(&self) -> &Addr;
    /// Source and destination port.
    fn ports(&self) -> Known<(u16, u16)>;
    /// Protocol number.
    fn protocol(&self) -> u8;
    /// Index of the interface that it arrived on; `None` for own traffic.
    fn interface(&self) -> Option<u32>;
    /// Link-layer address that it comes from, as a number; `None` where there is none.
    fn mac(&self) -> Option<u64>;
    /// Differentiated services codepoint.
    fn dscp(&self) -> u8;
    /// Its mark.
    fn mark(&self) -> u32;
    /// User that owns the sending socket; `None` for traffic of others.
    fn uid(&self) -> Option<u32>;
    /// Group of the process that made the sending socket; `None` where it is not known, and for
    /// traffic of others.
    fn gid(&self) -> Option<u32>;
    /// Control group at this depth that the sending socket is in or below; `None` where
    /// there is none, and for traffic of others.
    fn cgroup(&self, depth: u32) -> Option<u64>;
    /// Set of the name that it is for.
    fn domain(&self) -> Known<u32>;
}

/// Memory for one decision: the lines of the vectors that are to be joined, and behind
/// them an end. A power of two has a remainder whose bounds the kernel's verifier knows.
pub type Work = [u32; (MOST_JOINED + 1).next_power_of_two()];

/// Vectors that one packet can have: it has no addresses of both families.
const MOST_JOINED: usize = Dimension::ALL.len() - 2;

/// Ends a list of lines. To count them instead would tell the kernel's verifier at each
/// step how many there are, and it would follow what comes after once for each number.
const END: u32 = u32::MAX;

/// What is known of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known<V> {
    /// It is this.
    Is(V),
    /// The packet has none: no rule that asks for one matches.
    Absent,
    /// It may have any: every rule that asks for one matches.
    Unknown,
}

impl<V> From<Option<V>> for Known<V> {
    #[inline(always)]
    fn from(value: Option<V>) -> Self {
        value.map_or(Self::Absent, Self::Is)
    }
}

impl<V> Known<V> {
    #[inline(always)]
    fn map<W>(self, change: impl FnOnce(V) -> W) -> Known<W> {
        match self {
            Self::Is(value) => Known::Is(change(value)),
            Self::Absent => Known::Absent,
            Self::Unknown => Known::Unknown,
        }
    }
}

/// The verdict over a packet: the word that was compiled for the first rule that
/// matches, or the one for packets that no rule matches, and the number of the
/// rule, from 0 on; that of no rule is how many there are.
///
/// `None` where the image is none that the compiler makes.
#[inline(always)]
pub fn decide(image: &impl Image, facts: &impl Facts, work: &mut Work) -> Option<(u32, u32)> {
    let mut rule = image.settled(facts.family(), facts.protocol())?;
    if rule == layout::UNSETTLED {
        vectors(image, word(image.line(0)?, layout::USED), facts, work)?;
        rule = first_in_all(image, work)?;
    }
    // The header again, as a program has few words to keep it in meanwhile.
    let header = image.line(0)?;
    let rule = rule.min(word(header, layout::RULES));
    let line = image.line(word(header, layout::VERDICTS).wrapping_add(rule / LINE as u32))?;
    Some((word(line, rule as usize), rule))
}

/// Looks the dimensions up that rules ask for, and lists the vectors that are to be joined.
#[inline(always)]
fn vectors(image: &impl Image, used: u32, facts: &impl Facts, work: &mut Work) -> Option<()> {
    let mut joined = 0u32;
    /// Looks one up, if rules ask for it.
    macro_rules! look_up {
        ($class:ident $dimension:ident, $value:expr) => {
            look_up!($class $dimension, _ => $value)
        };
        ($class:ident $dimension:ident, $parameter:pat => $value:expr) => {
            if used & 1 << Dimension::$dimension as u32 != 0 {
                let (line, at) = const { layout::description(Dimension::$dimension as usize) };
                let described: &Description = image.line(line as u32)?[at..].first_chunk()?;
                let $parameter = described[layout::PARAMETER];
                let class = match $value {
                    Known::Is(value) => image.$class(Dimension::$dimension as u32, value)?,
                    Known::Absent => described[layout::ABSENT],
                    Known::Unknown => described[layout::UNKNOWN],
                };
                let vector = class.wrapping_mul(VECTOR_LINES as u32);
                work[joined as usize % work.len()] = described[layout::VECTORS].wrapping_add(vector);
                joined = image.hidden(joined + 1);
            }
        };
    }
    match facts.family() {
        Family::V4 => {
            look_up!(short_class Source4, Known::Is(low_word(facts.source())));
            look_up!(short_class Destination4, Known::Is(low_word(facts.destination())));
        }
        Family::V6 => {
            look_up!(long_class Source6, Known::Is(halves(facts.source())));
            look_up!(long_class Destination6, Known::Is(halves(facts.destination())));
        }
    }
    look_up!(short_class SourcePort, facts.ports().map(|(source, _)| u32::from(source)));
    look_up!(short_class DestinationPort, facts.ports().map(|(_, destination)| u32::from(destination)));
    look_up!(short_class Protocol, Known::Is(u32::from(facts.protocol())));
    look_up!(short_class Interface, Known::from(facts.interface()));
    look_up!(long_class Mac, Known::from(facts.mac()).map(long));
    look_up!(short_class Dscp, Known::Is(u32::from(facts.dscp())));
    look_up!(short_class Mark0, mask => Known::Is(facts.mark() & mask));
    look_up!(short_class Mark1, mask => Known::Is(facts.mark() & mask));
    look_up!(short_class Uid, Known::from(facts.uid()));
    look_up!(short_class Gid, Known::from(facts.gid()));
    look_up!(long_class Cgroup0, depth => Known::from(facts.cgroup(depth)).map(long));
    look_up!(long_class Cgroup1, depth => Known::from(facts.cgroup(depth)).map(long));
    look_up!(long_class Cgroup2, depth => Known::from(facts.cgroup(depth)).map(long));
    look_up!(short_class Domain, facts.domain());
    work[joined as usize % work.len()] = END;
    Some(())
}

/// No rule is in all vectors.
const NONE: u32 = u32::MAX;

/// The first bit that all vectors have, [`NONE`] where there is none. Of no vector it is
/// the first of all: rules that ask for nothing match everything.
#[inline(always)]
fn first_in_all(image: &impl Image, work: &Work) -> Option<u32> {
    let summary = [image.in_all(work, 0)?, image.in_all(work, 1)?];
    for chunk in 0..VECTOR_WORDS {
        // Not all have a bit in there; those that have may have different ones.
        if summary[chunk / 32] >> (chunk % 32) & 1 == 0 {
            continue;
        }
        let all = image.in_all(work, (SUMMARY_WORDS + chunk) as u32)?;
        if all != 0 {
            return Some(image.hidden(chunk as u32 * 32 + all.trailing_zeros()));
        }
    }
    Some(NONE)
}

/// The class of a value of one word in a dimension, by its number. `None` as with [`decide`].
#[inline(always)]
pub fn short_class(image: &impl Image, dimension: u32, value: u32) -> Option<u32> {
    search::class(image, dimension, value)
}

/// The same of a longer value, its high half first.
#[inline(always)]
pub fn long_class(image: &impl Image, dimension: u32, value: (u64, u64)) -> Option<u32> {
    search::class(image, dimension, value)
}

/// The bits of a word that all vectors have. `None` as with [`decide`].
#[inline(always)]
pub fn in_all(image: &impl Image, work: &Work, place: u32) -> Option<u32> {
    let mut all = u32::MAX;
    for vector in work.iter().take(MOST_JOINED).take_while(|vector| **vector != END) {
        all &= word(image.line(vector.wrapping_add(place / LINE as u32))?, place as usize);
        if all == 0 {
            break;
        }
    }
    Some(all)
}

#[inline(always)]
const fn word(line: &Line, at: usize) -> u32 {
    line[at % LINE]
}

/// The low 32 bits: an IPv4 address is given mapped.
#[inline(always)]
const fn low_word(addr: &Addr) -> u32 {
    u32::from_be_bytes([addr[12], addr[13], addr[14], addr[15]])
}

#[inline(always)]
const fn halves(addr: &Addr) -> (u64, u64) {
    let number = u128::from_be_bytes(*addr);
    ((number >> 64) as u64, number as u64)
}

/// A number of up to 64 bits as [`Dimension::width`] has it.
#[inline(always)]
const fn long(number: u64) -> (u64, u64) {
    (0, number)
}
