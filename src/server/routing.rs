//! Which deployment is asked first for a model, and which next.
//!
//! Knows orders, weights and turns. Must not know limits or how requests are sent. The
//! invariant it keeps: every deployment comes once in a request's order: those of a lower
//! order first; among equals the one whose turn it is first, and those without weight last.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::health::Health;

/// The most turns before they repeat: weights finer than this are rounded.
const MAX_TURNS: u64 = 1_000;

/// Where a deployment stands among those of its model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// A lower one is asked first.
    pub(super) order: u32,
    /// How often it is first among those of its order; one of zero takes only what no other
    /// of them has room for.
    pub(super) weight: u32,
}

/// The deployments behind one model name, by their order.
#[derive(Debug)]
pub(super) struct Routes<T> {
    levels: Vec<Level<T>>,
}

/// The deployments of one order.
#[derive(Debug)]
pub(super) struct Level<T> {
    /// Those with a weight first.
    all: Vec<Route<T>>,
    weighted: usize,
    /// Whose turn it is to be first, over and over.
    turns: Vec<usize>,
    next: AtomicUsize,
}

/// One deployment among those of its model.
#[derive(Debug)]
pub(super) struct Route<T> {
    pub(super) to: T,
    pub(super) health: Health,
}

impl<T> Routes<T> {
    /// Returns all deployments, whatever their order.
    pub(super) fn all(&self) -> impl Iterator<Item = &T> {
        self.levels.iter().flat_map(|level| &level.all).map(|route| &route.to)
    }

    /// Returns the routes to these deployments.
    pub(super) fn new(deployments: impl IntoIterator<Item = (T, Place)>) -> Self {
        let mut levels: BTreeMap<u32, Vec<(T, u32)>> = BTreeMap::new();
        for (to, place) in deployments {
            levels.entry(place.order).or_default().push((to, place.weight));
        }
        Self { levels: levels.into_values().map(Level::new).collect() }
    }

    /// Returns the deployments of each order, the lowest first.
    pub(super) fn levels(&self) -> std::slice::Iter<'_, Level<T>> {
        self.levels.iter()
    }
}

impl<T> Level<T> {
    fn new(mut deployments: Vec<(T, u32)>) -> Self {
        deployments.sort_by_key(|(_, weight)| *weight == 0);
        let weights: Vec<u32> = deployments.iter().map(|(_, weight)| *weight).filter(|weight| *weight > 0).collect();
        let all: Vec<_> = deployments.into_iter().map(|(to, _)| Route { to, health: Health::new() }).collect();
        // Where none has a weight, all have the same.
        let weights = if weights.is_empty() { vec![1; all.len()] } else { weights };
        Self { all, weighted: weights.len(), turns: turns(&weights), next: AtomicUsize::new(0) }
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Returns the order in which the next request looks at the deployments.
    pub(super) fn in_turn(&self) -> InTurn<'_, T> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.turns.len().max(1);
        InTurn { level: self, first: self.turns.get(turn).copied().unwrap_or(0), seen: 0 }
    }
}

/// The order of one request.
#[derive(Debug)]
pub(super) struct InTurn<'a, T> {
    level: &'a Level<T>,
    first: usize,
    seen: usize,
}

impl<'a, T> Iterator for InTurn<'a, T> {
    type Item = &'a Route<T>;

    fn next(&mut self) -> Option<&'a Route<T>> {
        let (place, weighted) = (self.seen, self.level.weighted);
        self.seen += 1;
        let place = if place < weighted { (self.first + place) % weighted } else { place };
        self.level.all.get(place)
    }
}

/// Returns whose turn it is, for as many turns as there are weights: in proportion, and
/// nobody twice in a row who need not be (nginx's smooth weighted round robin).
fn turns(weights: &[u32]) -> Vec<usize> {
    let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    let scaled = |weight: u32| match total > MAX_TURNS {
        true => (u64::from(weight) * MAX_TURNS / total).max(1),
        false => u64::from(weight),
    };
    let weights: Vec<i64> = weights.iter().map(|weight| scaled(*weight) as i64).collect();
    let total: i64 = weights.iter().sum();
    let mut credits = vec![0; weights.len()];
    let turn = |_| {
        for (credit, weight) in credits.iter_mut().zip(&weights) {
            *credit += weight;
        }
        // The first of equals: `max_by_key` would take the last.
        let richest = (0..credits.len()).rev().max_by_key(|place| credits[*place]).unwrap_or(0);
        credits[richest] -= total;
        richest
    };
    (0..total).map(turn).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes<const N: usize>(places: [(char, u32); N]) -> Routes<char> {
        Routes::new(places.map(|(to, weight)| (to, Place { order: 1, weight })))
    }

    fn order(routes: &Routes<char>) -> String {
        routes.levels().flat_map(Level::in_turn).map(|route| route.to).collect()
    }

    #[test]
    fn weights_say_who_is_first() {
        let heavy = routes([('a', 3), ('b', 1)]);
        let firsts: String = (0..8).map(|_| order(&heavy).remove(0)).collect();
        assert_eq!(firsts, "aabaaaba");
        let equal = routes([('a', 1), ('b', 1), ('c', 1)]);
        assert_eq!([order(&equal), order(&equal), order(&equal), order(&equal)], ["abc", "bca", "cab", "abc"]);
    }

    #[test]
    fn without_a_weight_a_deployment_comes_last() {
        let routes = routes([('s', 0), ('a', 1), ('b', 1), ('t', 0)]);
        assert_eq!([order(&routes), order(&routes)], ["abst", "bast"]);
        assert_eq!(order(&self::routes([('a', 0), ('b', 0)])), "ab");
    }

    #[test]
    fn a_lower_order_comes_first_whatever_the_weights() {
        let place = |order, weight| Place { order, weight };
        let routes = Routes::new([('c', place(7, 9)), ('a', place(1, 0)), ('b', place(2, 5)), ('d', place(7, 9))]);
        assert_eq!([order(&routes), order(&routes)], ["abcd", "abdc"]);
    }

    #[test]
    fn great_weights_are_rounded_and_nobody_is_forgotten() {
        let turns = turns(&[u32::MAX, u32::MAX, 1]);
        assert_eq!(turns.len(), 999);
        assert_eq!(turns.iter().filter(|place| **place == 2).count(), 1);
    }
}
