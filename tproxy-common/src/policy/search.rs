//! A value's class: its interval by a tree of fixed fan-out, then the interval's class.

use super::layout::{
    LEAVES, LEVELS, LONG_LEAF, LONG_LEAF_CLASSES, SHORT_LEAF, SHORT_LEAF_CLASSES, TREE, description,
};
use super::{Description, Image, LINE, Line, MAX_LEVELS, word};

/// A value of a dimension, in the order of numbers.
///
/// Comparisons are arithmetic: of a branch the kernel's verifier follows both ways,
/// and of a tree's every path.
pub(super) trait Value: Copy {
    /// Words of one in a line, the highest first.
    const WIDTH: usize;

    /// The first half word of the classes in a leaf.
    const LEAF_CLASSES: usize;

    /// 1 where the one at this place of a line is less, else 0.
    fn exceeds(self, image: &impl Image, line: &Line, place: usize) -> usize;

    /// How many ends of a leaf are less. The last is not.
    fn place_in_leaf(self, image: &impl Image, leaf: &Line) -> usize;
}

impl Value for u32 {
    const WIDTH: usize = 1;
    const LEAF_CLASSES: usize = SHORT_LEAF_CLASSES;

    #[inline(always)]
    fn exceeds(self, image: &impl Image, line: &Line, place: usize) -> usize {
        let end = u64::from(word(line, bounded(image, place)));
        (image.opaque(end.wrapping_sub(u64::from(self))) >> 63) as usize
    }

    #[inline(always)]
    fn place_in_leaf(self, image: &impl Image, leaf: &Line) -> usize {
        /// Half words before the ends: those of the first end.
        const ENDS: usize = 2;
        let difference = u64::from(self).wrapping_sub(u64::from(word(leaf, 0)));
        let is_below = image.opaque(difference) >> 63;
        // What the value is above the first end, 0 where it is below.
        let above = difference & is_below.wrapping_sub(1);
        let mut below = 0;
        let mut step = SHORT_LEAF.div_ceil(2);
        while step > 0 {
            let end = u64::from(half_word(image, leaf, ENDS + below + step - 1));
            below += step * (image.opaque(end.wrapping_sub(above)) >> 63) as usize;
            step /= 2;
        }
        below
    }
}

/// An IPv6 address, or what else is longer than a word, the high half first: BPF has no
/// 128-bit numbers.
impl Value for (u64, u64) {
    const WIDTH: usize = 4;
    const LEAF_CLASSES: usize = LONG_LEAF_CLASSES;

    #[inline(always)]
    fn exceeds(self, image: &impl Image, line: &Line, place: usize) -> usize {
        let at = bounded(image, place * Self::WIDTH);
        let (high, low) = (double_word(line, at), double_word(line, at + 2));
        (less(image, high, self.0) | (!less(image, self.0, high) & less(image, low, self.1))) as usize
    }

    #[inline(always)]
    fn place_in_leaf(self, image: &impl Image, leaf: &Line) -> usize {
        let mut below = 0;
        let mut step = LONG_LEAF.div_ceil(2);
        while step > 0 {
            below += step * self.exceeds(image, leaf, below + step - 1);
            step /= 2;
        }
        below
    }
}

/// 1 where `a` is less than `b`, else 0: the borrow of their difference.
#[inline(always)]
fn less(image: &impl Image, a: u64, b: u64) -> u64 {
    ((!a & b) | ((!a | b) & image.opaque(a.wrapping_sub(b)))) >> 63
}

/// The same place of a line. What the compiler can tell of it the verifier of Linux 5.10
/// cannot, so the compiler must not leave the bound out that [`word`] sets.
#[inline(always)]
fn bounded(image: &impl Image, place: usize) -> usize {
    image.opaque(place as u64) as usize
}

#[inline(always)]
fn double_word(line: &Line, at: usize) -> u64 {
    u64::from(word(line, at)) << 32 | u64::from(word(line, at + 1))
}

/// How many places of a line hold less than the value. Unused ones hold the
/// greatest value that there is.
#[inline(always)]
fn places_below<V: Value>(image: &impl Image, line: &Line, value: V) -> u32 {
    let mut below = 0;
    let mut step = LINE / V::WIDTH / 2;
    while step > 0 {
        below += step * value.exceeds(image, line, below + step - 1);
        step /= 2;
    }
    (below + value.exceeds(image, line, below)) as u32
}

/// The class of a value in a dimension, by its number.
///
/// A level is the greatest ends of the leaves (the lowest), or of the lines below; the last
/// of all is not in the tree. So each level says which line of the next one holds
/// the interval, and the lowest says which leaf. That has the class beside the end: in a
/// tree of a million networks each line that is read waits for memory.
#[inline(always)]
pub(super) fn class<V: Value>(image: &impl Image, dimension: u32, value: V) -> Option<u32> {
    let fan_out = (LINE / V::WIDTH) as u32;
    let (line, at) = description(dimension as usize);
    let described: &Description = image.line(line as u32)?[at..].first_chunk()?;
    let levels = described[LEVELS] as usize;
    let mut place = 0u32;
    for level in 0..MAX_LEVELS {
        if level >= levels {
            break;
        }
        let line = image.line(described[TREE + level].wrapping_add(place))?;
        place = place.wrapping_mul(fan_out).wrapping_add(places_below(image, line, value));
    }
    let leaf = image.line(described[LEAVES].wrapping_add(place))?;
    Some(half_word(image, leaf, V::LEAF_CLASSES + value.place_in_leaf(image, leaf)))
}

/// The low half of a word comes first.
#[inline(always)]
fn half_word(image: &impl Image, line: &Line, at: usize) -> u32 {
    word(line, bounded(image, at / 2)) >> (at % 2 * 16) & 0xffff
}
