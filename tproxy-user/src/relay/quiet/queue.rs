//! A queue from which any can be taken out, all in one piece of memory: what is freed around it
//! then fills whole pages, which can be given back to the kernel.

use slab::Slab;

/// The number of nobody.
const NONE: usize = usize::MAX;

/// Each has a number as long as it is in here.
#[derive(Debug)]
pub(super) struct Queue<T> {
    places: Slab<Place<T>>,
    first: usize,
    last: usize,
}

#[derive(Debug)]
struct Place<T> {
    value: T,
    before: usize,
    after: usize,
}

impl<T> Queue<T> {
    pub(super) const fn new() -> Self {
        Self { places: Slab::new(), first: NONE, last: NONE }
    }

    /// The number of the next that is [pushed](Self::push).
    pub(super) fn next_number(&self) -> usize {
        self.places.vacant_key()
    }

    pub(super) fn push(&mut self, value: T) {
        let number = self.places.insert(Place { value, before: self.last, after: NONE });
        match self.places.get_mut(self.last) {
            Some(last) => last.after = number,
            None => self.first = number,
        }
        self.last = number;
    }

    pub(super) fn first(&self) -> Option<&T> {
        self.places.get(self.first).map(|place| &place.value)
    }

    pub(super) fn take_first(&mut self) -> Option<T> {
        self.take(self.first)
    }

    /// Takes one out, if there is one of this number.
    pub(super) fn take(&mut self, number: usize) -> Option<T> {
        let Place { value, before, after } = self.places.try_remove(number)?;
        match self.places.get_mut(before) {
            Some(before) => before.after = after,
            None => self.first = after,
        }
        match self.places.get_mut(after) {
            Some(after) => after.before = before,
            None => self.last = before,
        }
        Some(value)
    }

    /// Gives up what room is left behind the last place.
    pub(super) fn shrink(&mut self) {
        self.places.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_kept_whoever_is_taken_out() {
        let mut queue = Queue::new();
        let numbers: Vec<_> = ('a'..='e')
            .map(|value| {
                let number = queue.next_number();
                queue.push(value);
                number
            })
            .collect();
        // The first, one in the middle, the last; and one more, in a place of theirs.
        for (index, value) in [(0, 'a'), (2, 'c'), (4, 'e')] {
            assert_eq!(queue.take(numbers[index]), Some(value));
            assert_eq!(queue.take(numbers[index]), None);
        }
        queue.push('f');
        queue.shrink();
        let rest: String = std::iter::from_fn(|| queue.take_first()).collect();
        assert_eq!(rest, "bdf");
        queue.push('g');
        assert_eq!(queue.first(), Some(&'g'));
    }
}
