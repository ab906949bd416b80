//! Where things are in an image. Line 0 is the header, the lines after it
//! describe two dimensions each.

use super::LINE;

/// Header: the dimensions that rules ask for, a bit each.
pub const USED: usize = 0;
/// Header: the first line of verdicts, [`LINE`] in each. After the last rule's
/// comes that of a packet which no rule matches.
pub const VERDICTS: usize = 1;
/// Header: how many rules there are.
pub const RULES: usize = 2;
/// Header: what tells the image from others that take its place. Whoever puts it there sets it.
pub const NUMBER: usize = 3;
/// Header: a word for TCP and one for UDP over IPv4, then the same over IPv6: the rule that
/// decides whatever else a packet is, [`UNSETTLED`] where that depends.
pub const SETTLED: usize = 4;
/// No rule's number.
pub const UNSETTLED: u32 = u32::MAX;

/// Words that describe a dimension.
pub const DESCRIPTION: usize = LINE / 2;
/// Description: levels of its tree above the leaves, 0 where there is one leaf.
pub const LEVELS: usize = 0;
/// Description: the first leaf. Leaves are lines with the ends of intervals, in order,
/// and their classes.
pub const LEAVES: usize = 1;
/// Description: the first line of vectors, one a class.
pub const VECTORS: usize = 2;
/// Description: the class of a packet that has no such value.
pub const ABSENT: usize = 3;
/// Description: the class of a packet that may have any value.
pub const UNKNOWN: usize = 4;
/// Description: what a dimension that there is more than once is told by.
pub const PARAMETER: usize = 5;
/// Description: the first line of each level, the root first.
pub const TREE: usize = 8;

/// Ends in a leaf of values of one word. Word 0 is the first of them, and
/// half words 2 to 32 are what each is above that; unused ones hold the most.
pub const SHORT_LEAF: usize = 31;
/// The first half word of their classes.
pub const SHORT_LEAF_CLASSES: usize = 2 + SHORT_LEAF;
/// Ends in a leaf of longer values, whole; unused ones hold the most.
pub const LONG_LEAF: usize = 7;
/// The first half word of their classes.
pub const LONG_LEAF_CLASSES: usize = 8 * LONG_LEAF;

/// The line that describes a dimension, and where in it.
#[must_use]
pub const fn description(dimension: usize) -> (usize, usize) {
    (1 + dimension / 2, dimension % 2 * DESCRIPTION)
}
