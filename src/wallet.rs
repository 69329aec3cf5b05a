//! The wallet: the spendable part of a replica's rights in one window, in one word.
//!
//! Knows how to take, put and peek. Must not know what the amount means, who else has
//! some, or what time it is. The invariant it keeps: [`Wallet::take`] never makes the
//! balance negative, and an operation for another window than the one the word names
//! changes nothing.
//!
//! # The word
//!
//! ```text
//! 63                              21  20       19              0
//! [ balance: 43 bits, signed        | parked | generation: 20 bits ]
//! ```
//!
//! The generation is the window's number modulo 2^20, so a permit that outlives its
//! window cannot touch the next one that uses the same word (with windows of one second
//! the number repeats after 12 days). The parked bit says that requests wait under the
//! ledger's lock: a newcomer sees it in the same load that would have admitted it, and
//! whoever puts something back sees it in the same compare-and-swap, so no wake-up is
//! lost and nobody barges (docs/decisions/0002).

use std::sync::atomic::{AtomicU64, Ordering};

/// Balances lie in `[-2^42, 2^42)`.
const BALANCE_MAX: i64 = (1 << 42) - 1;
const BALANCE_MIN: i64 = -(1 << 42);
const BALANCE_SHIFT: u32 = 21;
const PARKED: u64 = 1 << 20;
const GENERATION: u64 = PARKED - 1;

/// One atomic word: a balance, whose window it is, and whether requests are parked.
#[derive(Debug)]
pub(crate) struct Wallet(AtomicU64);

/// Why nothing was taken. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Miss {
    /// The balance is smaller than the amount.
    Short,
    /// Requests are parked: whoever comes now comes after them.
    Parked,
    /// The word belongs to another window.
    Closed,
}

/// What a wallet looked like right after an amount was put into it or charged to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct After {
    /// The balance; negative is debt.
    pub(crate) balance: i64,
    /// Whether requests are parked and want to be served.
    pub(crate) parked: bool,
}

impl Wallet {
    /// Returns a wallet that belongs to the window with this number.
    pub(crate) fn open(window: u64, balance: u64) -> Self {
        Self(AtomicU64::new(pack(bounded(balance), false, window)))
    }

    /// Makes the wallet belong to this window, with this balance and nobody parked.
    ///
    /// Called under the ledger's lock, long after the previous window has closed.
    pub(crate) fn reopen(&self, window: u64, balance: u64) {
        self.0.store(pack(bounded(balance), false, window), Ordering::SeqCst);
    }

    /// Takes `amount` if the balance covers it and nobody is parked.
    ///
    /// # Errors
    /// Says why not; nothing changed.
    #[inline]
    pub(crate) fn take(&self, window: u64, amount: u64) -> Result<(), Miss> {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            if (word ^ window) & GENERATION != 0 {
                return Err(Miss::Closed);
            }
            if word & PARKED != 0 {
                return Err(Miss::Parked);
            }
            match self.try_take(word, amount) {
                Ok(()) => return Ok(()),
                Err(Some(seen)) => word = seen,
                Err(None) => return Err(Miss::Short),
            }
        }
    }

    /// Takes `amount` if the balance covers it, parked requests or not.
    ///
    /// For whoever holds the ledger's lock: it serves the parked ones, or gives rights
    /// away after having looked at them.
    ///
    /// # Errors
    /// Says why not; nothing changed.
    pub(crate) fn take_past_parked(&self, window: u64, amount: u64) -> Result<(), Miss> {
        self.take_above(window, amount, 0)
    }

    /// Takes `amount` if the balance covers it and `floor` stays, parked requests or not.
    ///
    /// # Errors
    /// Says why not; nothing changed.
    pub(crate) fn take_above(&self, window: u64, amount: u64, floor: u64) -> Result<(), Miss> {
        let mut word = self.0.load(Ordering::SeqCst);
        loop {
            if (word ^ window) & GENERATION != 0 {
                return Err(Miss::Closed);
            }
            // Both are within 43 bits.
            if balance(word) - bounded(floor) < bounded(amount) {
                return Err(Miss::Short);
            }
            match self.try_take(word, amount) {
                Ok(()) => return Ok(()),
                Err(Some(seen)) => word = seen,
                Err(None) => return Err(Miss::Short),
            }
        }
    }

    /// Takes whatever is there, parked requests or not, and returns it: nothing if the balance
    /// is not positive or the window has closed.
    ///
    /// For whoever holds the ledger's lock. Nobody who takes at the same time makes it miss.
    pub(crate) fn take_all(&self, window: u64) -> u64 {
        let belongs = |word: u64| (word ^ window) & GENERATION == 0 && balance(word) > 0;
        let emptied = |word: u64| belongs(word).then(|| pack(0, word & PARKED != 0, word));
        self.0.fetch_update(Ordering::SeqCst, Ordering::Relaxed, emptied).map_or(0, |word| balance(word) as u64)
    }

    /// Puts `amount` back. Returns `None`, and changes nothing, if the window has closed.
    #[inline]
    pub(crate) fn put(&self, window: u64, amount: u64) -> Option<After> {
        self.add(window, bounded(amount))
    }

    /// Takes `amount` whether or not the balance covers it; a negative balance is debt.
    /// Returns `None`, and changes nothing, if the window has closed.
    pub(crate) fn charge(&self, window: u64, amount: u64) -> Option<After> {
        self.add(window, -bounded(amount))
    }

    /// Returns the balance, or `None` if the word belongs to another window.
    pub(crate) fn peek(&self, window: u64) -> Option<i64> {
        let word = self.0.load(Ordering::SeqCst);
        ((word ^ window) & GENERATION == 0).then(|| balance(word))
    }

    /// Says whether requests are parked. Called under the ledger's lock.
    pub(crate) fn set_parked(&self, window: u64, parked: bool) {
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |word| {
            let belongs = (word ^ window) & GENERATION == 0;
            belongs.then_some(if parked { word | PARKED } else { word & !PARKED })
        });
    }

    /// One attempt: `Err(Some(word))` if another thread was faster.
    #[inline]
    fn try_take(&self, word: u64, amount: u64) -> Result<(), Option<u64>> {
        // An amount beyond every balance must not wrap in the shift below.
        if amount > BALANCE_MAX as u64 || balance(word) < amount as i64 {
            return Err(None);
        }
        let taken = word - (amount << BALANCE_SHIFT);
        self.0.compare_exchange_weak(word, taken, Ordering::SeqCst, Ordering::Relaxed).map(drop).map_err(Some)
    }

    #[inline]
    fn add(&self, window: u64, amount: i64) -> Option<After> {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            if (word ^ window) & GENERATION != 0 {
                return None;
            }
            // Neither can overflow 64 bits: both are within 43.
            let balance = (balance(word) + amount).clamp(BALANCE_MIN, BALANCE_MAX);
            let parked = word & PARKED != 0;
            let added = pack(balance, parked, word);
            match self.0.compare_exchange_weak(word, added, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return Some(After { balance, parked }),
                Err(seen) => word = seen,
            }
        }
    }
}

#[inline]
const fn balance(word: u64) -> i64 {
    (word as i64) >> BALANCE_SHIFT
}

#[inline]
const fn pack(balance: i64, parked: bool, window: u64) -> u64 {
    ((balance << BALANCE_SHIFT) as u64) | if parked { PARKED } else { 0 } | (window & GENERATION)
}

/// Saturates: quotas are at most half of what fits, so only absurd settlements get here.
#[inline]
const fn bounded(amount: u64) -> i64 {
    if amount > BALANCE_MAX as u64 { BALANCE_MAX } else { amount as i64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_wallet_of_another_window_refuses_and_changes_nothing() {
        let wallet = Wallet::open(7, 100);
        assert_eq!(wallet.take(8, 1), Err(Miss::Closed));
        assert_eq!(wallet.put(8, 1), None);
        assert_eq!(wallet.charge(8, 1), None);
        assert_eq!(wallet.peek(7), Some(100));
        assert_eq!(wallet.peek(8), None);
    }

    #[test]
    fn take_never_makes_debt_and_charge_may() {
        let wallet = Wallet::open(1, 10);
        assert_eq!(wallet.take(1, 11), Err(Miss::Short));
        assert_eq!(wallet.take(1, u64::MAX), Err(Miss::Short));
        assert_eq!(wallet.take(1, 10), Ok(()));
        assert_eq!(wallet.charge(1, 5), Some(After { balance: -5, parked: false }));
        assert_eq!(wallet.take(1, 0), Err(Miss::Short));
        assert_eq!(wallet.put(1, 8), Some(After { balance: 3, parked: false }));
    }

    #[test]
    fn a_parked_bit_stops_newcomers_and_is_told_to_whoever_puts() {
        let wallet = Wallet::open(3, 10);
        wallet.set_parked(3, true);
        assert_eq!(wallet.take(3, 1), Err(Miss::Parked));
        assert_eq!(wallet.take_past_parked(3, 4), Ok(()));
        assert_eq!(wallet.put(3, 1), Some(After { balance: 7, parked: true }));
        wallet.set_parked(3, false);
        assert_eq!(wallet.take(3, 7), Ok(()));
    }

    #[test]
    fn what_is_taken_above_a_floor_leaves_the_floor() {
        let wallet = Wallet::open(1, 10);
        assert_eq!(wallet.take_above(1, 4, 7), Err(Miss::Short));
        assert_eq!(wallet.take_above(1, 3, 7), Ok(()));
        assert_eq!(wallet.take_above(2, 0, 0), Err(Miss::Closed));
        assert_eq!(wallet.peek(1), Some(7));
    }

    #[test]
    fn all_is_taken_of_what_is_there_and_debt_stays() {
        let wallet = Wallet::open(1, 10);
        wallet.set_parked(1, true);
        assert_eq!(wallet.take_all(2), 0);
        assert_eq!((wallet.take_all(1), wallet.take_all(1)), (10, 0));
        assert_eq!(wallet.charge(1, 5), Some(After { balance: -5, parked: true }));
        assert_eq!((wallet.take_all(1), wallet.peek(1)), (0, Some(-5)));
    }

    #[test]
    fn two_threads_never_take_more_than_there_is() {
        let wallet = Wallet::open(1, 10_000);
        let taken: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2)
                .map(|_| scope.spawn(|| (0..9_000).filter(|_| wallet.take(1, 1).is_ok()).count() as u64))
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
        });
        assert_eq!(taken, 10_000);
        assert_eq!(wallet.peek(1), Some(0));
    }

    proptest! {
        #[test]
        fn the_word_holds_what_was_packed(balance in BALANCE_MIN..=BALANCE_MAX, parked: bool, window: u64) {
            let word = pack(balance, parked, window);
            prop_assert_eq!(super::balance(word), balance);
            prop_assert_eq!(word & PARKED != 0, parked);
            prop_assert_eq!(word & GENERATION, window & GENERATION);
        }

        #[test]
        fn a_wallet_is_a_counter(start in 0u64..1_000_000, steps in prop::collection::vec((0u8..3, 0u64..100_000), 0..64)) {
            let wallet = Wallet::open(9, start);
            let mut model = start as i64;
            for (kind, amount) in steps {
                match kind {
                    0 => {
                        let fits = model >= amount as i64;
                        prop_assert_eq!(wallet.take(9, amount).is_ok(), fits);
                        if fits { model -= amount as i64; }
                    }
                    1 => { wallet.put(9, amount); model += amount as i64; }
                    _ => { wallet.charge(9, amount); model -= amount as i64; }
                }
                prop_assert_eq!(wallet.peek(9), Some(model));
            }
        }
    }
}
