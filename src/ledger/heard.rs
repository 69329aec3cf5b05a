//! What peers have said about their accounts in one window, and what is open between us.
//!
//! Knows how what is said merges. Must not know rights, wallets or the roster. The invariant
//! it keeps: everything here only grows, field by field, so merging is commutative,
//! associative and idempotent: the state-based join of [`crdts::CvRDT`], in registers small
//! enough for tens of thousands of windows (docs/decisions/0009). Tests hold it against
//! `crdts`' own counters.

use std::convert::Infallible;

use crdts::{CmRDT, CvRDT, Dot};

use super::account::Actor;
use super::few::{Few, Keyed};
use super::message::Row;

/// What a peer has said about its account: 48 bytes.
///
/// The two counters are the halves of a PN-counter. The rest are hints, of the row with the
/// highest version. Those that say how much somebody wants end at 2^32 - 1 a second or a
/// request, and versions there as well, 136 rows a second for a year: a hint beyond is late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeerRow {
    pub(crate) peer: Actor,
    pub(crate) version: u32,
    /// Ever reserved and ever refunded, in units.
    pub(crate) reserved: u64,
    pub(crate) refunded: u64,
    pub(crate) spendable: i64,
    pub(crate) demand: u32,
    pub(crate) typical: u32,
    /// The ledger's change number when this row last changed, for the relay.
    pub(crate) changed: u64,
}

impl PeerRow {
    /// Returns what a row says.
    pub(crate) fn of(peer: Actor, row: &Row) -> Self {
        let bounded = |hint: u64| u32::try_from(hint).unwrap_or(u32::MAX);
        Self {
            peer,
            version: bounded(row.version),
            reserved: row.reserved,
            refunded: row.refunded,
            spendable: row.spendable,
            demand: bounded(row.demand),
            typical: bounded(row.typical),
            changed: 0,
        }
    }
}

impl Keyed for PeerRow {
    type Key = Actor;

    fn key(&self) -> Actor {
        self.peer
    }
}

impl CvRDT for PeerRow {
    type Validation = Infallible;

    fn validate_merge(&self, _: &Self) -> Result<(), Infallible> {
        Ok(())
    }

    fn merge(&mut self, other: Self) {
        if other.version > self.version {
            (self.version, self.spendable) = (other.version, other.spendable);
            (self.demand, self.typical) = (other.demand, other.typical);
        }
        self.reserved = self.reserved.max(other.reserved);
        self.refunded = self.refunded.max(other.refunded);
        self.changed = self.changed.max(other.changed);
    }
}

/// The rights that one replica has ever given to another: 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gift {
    pub(crate) from: Actor,
    pub(crate) to: Actor,
    pub(crate) total: u64,
}

impl Keyed for Gift {
    type Key = (Actor, Actor);

    fn key(&self) -> (Actor, Actor) {
        (self.from, self.to)
    }
}

/// Every transfer in a window that this replica knows of: what it gave, what it was given,
/// and what others gave one another, which it passes on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gifts(Few<Gift>);

impl Gifts {
    /// Returns what `from` has ever given to `to`.
    pub(crate) fn total(&self, from: Actor, to: Actor) -> u64 {
        self.0.get(&(from, to)).map_or(0, |gift| gift.total)
    }

    /// Returns what `from` has ever given, to whom.
    pub(crate) fn of(&self, from: Actor) -> &[Gift] {
        self.0.range((from, Actor(0))..=(from, Actor(u16::MAX)))
    }

    /// Returns what `to` was ever given, by whom.
    pub(crate) fn to(&self, to: Actor) -> impl Iterator<Item = &Gift> {
        self.0.values().filter(move |gift| gift.to == to)
    }
}

/// As a version vector of `crdts` takes it: the highest total counts.
impl CmRDT for Gifts {
    type Op = Dot<(Actor, Actor)>;
    type Validation = Infallible;

    fn validate_op(&self, _: &Self::Op) -> Result<(), Infallible> {
        Ok(())
    }

    fn apply(&mut self, op: Self::Op) {
        let (from, to) = op.actor;
        let gift = self.0.get_or_insert_with(&op.actor, || Gift { from, to, total: 0 });
        gift.total = gift.total.max(op.counter);
    }
}

/// The questions between this replica and a peer: 16 bytes, for those who ask.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    pub(crate) peer: Actor,
    /// When the peer was last asked for rights and has not answered since: the low bits of
    /// the time in unix ms, as far as a round trip is concerned; 0 = not.
    asked_ms: u32,
    /// The last rights request of this peer that was answered.
    pub(crate) answered: u64,
}

impl Keyed for Question {
    type Key = Actor;

    fn key(&self) -> Actor {
        self.peer
    }
}

impl Question {
    pub(crate) const fn with(peer: Actor) -> Self {
        Self { peer, asked_ms: 0, answered: 0 }
    }

    /// Notes that the peer was asked.
    pub(crate) const fn asked(&mut self, now_ms: u64) {
        self.asked_ms = now_ms as u32;
    }

    /// Notes that the peer has answered.
    pub(crate) const fn settled(&mut self) {
        self.asked_ms = 0;
    }

    /// Returns for how many milliseconds an answer may still be expected of a peer that
    /// takes `patience_ms` at most.
    pub(crate) fn open_for_ms(&self, patience_ms: u64, now_ms: u64) -> u64 {
        let waited_ms = (now_ms as u32).wrapping_sub(self.asked_ms);
        if self.asked_ms == 0 { 0 } else { patience_ms.saturating_sub(u64::from(waited_ms)) }
    }
}

#[cfg(test)]
mod tests {
    use crdts::{PNCounter, VClock};
    use proptest::prelude::*;

    use super::*;

    fn row() -> impl Strategy<Value = PeerRow> {
        (0u32..6, 0u64..50, 0u64..50).prop_map(|(version, reserved, refunded)| PeerRow {
            peer: Actor(1),
            version,
            reserved,
            refunded,
            // One version, one statement.
            spendable: i64::from(version) - 3,
            demand: version * 7,
            typical: version,
            changed: 0,
        })
    }

    fn merged(a: PeerRow, b: PeerRow) -> PeerRow {
        let mut merged = a;
        merged.merge(b);
        merged
    }

    proptest! {
        #[test]
        fn rows_merge_as_a_pn_counter_does(rows in prop::collection::vec(row(), 1..20)) {
            let mut oracle = PNCounter::<u16>::new();
            let mut sum = rows[0];
            for row in &rows {
                sum.merge(*row);
                oracle.apply(crdts::pncounter::Op { dot: Dot::new(1, row.reserved), dir: crdts::pncounter::Dir::Pos });
                oracle.apply(crdts::pncounter::Op { dot: Dot::new(1, row.refunded), dir: crdts::pncounter::Dir::Neg });
            }
            prop_assert_eq!((i128::from(sum.reserved) - i128::from(sum.refunded)).to_string(), oracle.read().to_string());
        }

        #[test]
        fn merging_rows_is_a_join(a in row(), b in row(), c in row()) {
            prop_assert_eq!(merged(a, a), a);
            prop_assert_eq!(merged(a, b), merged(b, a));
            prop_assert_eq!(merged(merged(a, b), c), merged(a, merged(b, c)));
        }

        #[test]
        fn gifts_are_a_version_vector(
            told in prop::collection::vec((0u16..4, 0u16..4, 1u64..100), 0..60),
        ) {
            let (mut gifts, mut oracle) = (Gifts::default(), VClock::<(Actor, Actor)>::new());
            for (from, to, total) in told {
                let dot = Dot::new((Actor(from), Actor(to)), total);
                gifts.apply(dot);
                oracle.apply(dot);
            }
            for (from, to) in (0..4).flat_map(|from| (0..4).map(move |to| (Actor(from), Actor(to)))) {
                prop_assert_eq!(gifts.total(from, to), oracle.get(&(from, to)));
                prop_assert_eq!(gifts.of(from).iter().map(|gift| gift.total).sum::<u64>(),
                    oracle.iter().filter(|dot| dot.actor.0 == from).map(|dot| dot.counter).sum::<u64>());
                prop_assert_eq!(gifts.to(to).map(|gift| gift.total).sum::<u64>(),
                    oracle.iter().filter(|dot| dot.actor.1 == to).map(|dot| dot.counter).sum::<u64>());
            }
        }
    }

    #[test]
    fn an_entry_is_as_small_as_the_decision_says() {
        assert_eq!([size_of::<PeerRow>(), size_of::<Gift>(), size_of::<Question>()], [48, 16, 16]);
    }

    #[test]
    fn a_question_is_open_until_the_patience_is_over_whatever_the_high_bits_are() {
        let mut question = Question::with(Actor(1));
        assert_eq!(question.open_for_ms(10, 5), 0);
        let asked_ms = (7 << 32) + u64::from(u32::MAX) - 2;
        question.asked(asked_ms);
        assert_eq!([0, 4, 10].map(|later| question.open_for_ms(10, asked_ms + later)), [10, 6, 0]);
        question.settled();
        assert_eq!(question.open_for_ms(10, asked_ms + 1), 0);
    }
}
