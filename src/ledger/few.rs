//! A map for few entries: a sorted vector with next to no slack.
//!
//! Knows order and room. Must not know what an entry means. The invariant it keeps: entries
//! lie in ascending order of their keys, one a key, and at most an eighth of the room is empty.
//!
//! A ledger has tens of thousands of such maps with one to five entries each, and a leaf of a
//! `BTreeMap` has room for eleven (docs/decisions/0009).

use std::ops::{Index, RangeInclusive, RangeTo};

/// An entry that names its own place.
pub(crate) trait Keyed {
    /// What it is found by.
    type Key: Ord + Copy;

    /// Returns it. It never changes.
    fn key(&self) -> Self::Key;
}

/// Entries by key, in order.
#[derive(Clone, Debug)]
pub(crate) struct Few<T>(Vec<T>);

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Keyed> Few<T> {
    pub(crate) fn get(&self, key: &T::Key) -> Option<&T> {
        self.find(key).ok().map(|place| &self.0[place])
    }

    pub(crate) fn get_mut(&mut self, key: &T::Key) -> Option<&mut T> {
        self.find(key).ok().map(|place| &mut self.0[place])
    }

    pub(crate) fn contains_key(&self, key: &T::Key) -> bool {
        self.find(key).is_ok()
    }

    /// Returns the entry of this key; `make` makes it, with this key, if there is none.
    pub(crate) fn get_or_insert_with(&mut self, key: &T::Key, make: impl FnOnce() -> T) -> &mut T {
        let place = self.find(key).unwrap_or_else(|place| {
            if self.0.len() == self.0.capacity() {
                self.0.reserve_exact((self.0.len() / 8).max(1));
            }
            self.0.insert(place, make());
            place
        });
        &mut self.0[place]
    }

    /// Returns the entry with the smallest key.
    pub(crate) fn first(&self) -> Option<&T> {
        self.0.first()
    }

    /// Takes the entry with the smallest key out.
    pub(crate) fn pop_first(&mut self) -> Option<T> {
        let first = (!self.0.is_empty()).then(|| self.0.remove(0));
        self.0.shrink_to_fit();
        first
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = T::Key> + '_ {
        self.0.iter().map(T::key)
    }

    pub(crate) fn values(&self) -> std::slice::Iter<'_, T> {
        self.0.iter()
    }

    pub(crate) fn values_mut(&mut self) -> std::slice::IterMut<'_, T> {
        self.0.iter_mut()
    }

    pub(crate) fn range(&self, keys: RangeInclusive<T::Key>) -> &[T] {
        let from = self.0.partition_point(|entry| entry.key() < *keys.start());
        let until = self.0.partition_point(|entry| entry.key() <= *keys.end());
        &self.0[from..until.max(from)]
    }

    pub(crate) fn range_mut(&mut self, keys: RangeTo<T::Key>) -> &mut [T] {
        let until = self.0.partition_point(|entry| entry.key() < keys.end);
        &mut self.0[..until]
    }

    fn find(&self, key: &T::Key) -> Result<usize, usize> {
        self.0.binary_search_by_key(key, T::key)
    }
}

impl<T: Keyed> Index<&T::Key> for Few<T> {
    type Output = T;

    /// # Panics
    /// Without such an entry, as a `BTreeMap` does.
    fn index(&self, key: &T::Key) -> &T {
        self.get(key).expect("the entry is there")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug, PartialEq)]
    struct Entry(u16, u64);

    impl Keyed for Entry {
        type Key = u16;

        fn key(&self) -> u16 {
            self.0
        }
    }

    proptest! {
        #[test]
        fn it_is_a_map_in_order_without_slack(
            steps in prop::collection::vec((0u16..40, prop::option::weighted(0.9, 1u64..9)), 0..200),
        ) {
            let (mut few, mut model) = (Few::default(), BTreeMap::new());
            for (key, add) in steps {
                match add {
                    Some(add) => {
                        few.get_or_insert_with(&key, || Entry(key, 0)).1 += add;
                        *model.entry(key).or_insert(0) += add;
                    }
                    None => {
                        prop_assert_eq!(few.pop_first().map(|entry| (entry.0, entry.1)), model.pop_first());
                    }
                }
                prop_assert!(few.0.capacity() <= few.0.len() + few.0.len() / 8 + 1);
                let pairs = |entries: &[Entry]| entries.iter().map(|entry| (entry.0, entry.1)).collect::<Vec<_>>();
                prop_assert_eq!(pairs(&few.0), model.clone().into_iter().collect::<Vec<_>>());
                prop_assert_eq!(pairs(few.range(7..=21)), model.range(7..=21).map(|(k, v)| (*k, *v)).collect::<Vec<_>>());
                prop_assert_eq!(pairs(few.range_mut(..key)), model.range(..key).map(|(k, v)| (*k, *v)).collect::<Vec<_>>());
                prop_assert_eq!(few.get(&key).map(|entry| entry.1), model.get(&key).copied());
            }
        }
    }
}
