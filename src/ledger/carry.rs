//! What a bucket keeps from one slice to the next.
//!
//! Knows how long rights live and which are spent first. Must not know the roster, nor how
//! rights move between replicas. The invariant it keeps: each unit dealt here is spendable in
//! one wallet at a time, and in none once it has lived its slices (docs/algorithm.md
//! section 12).
//!
//! Use takes the oldest rights first. So it is enough to know sums: what was dealt of each
//! slice, and how much of all that is *gone*, used or expired. Going from slice to slice,
//! `gone = max(gone, all that has expired by now) + used there`, and what was dealt and is not
//! gone belongs to the running slice. A refund that comes later makes the use of its slice
//! smaller, so the sum says by itself what comes back and what would have expired since.

use std::collections::BTreeMap;

use super::account::{Account, WalletRing};
use super::few::Few;

/// A bucket's rights on one replica, over all slices.
#[derive(Debug)]
pub(super) struct Carry {
    lifetime: u64,
    /// The first slice whose share has not been dealt with here.
    pub(super) next: u64,
    /// Shares dealt here, by slice, until nothing depends on them any more.
    shares: BTreeMap<u64, u64>,
    /// What of `shares` was gone when the last closed slice ended.
    gone: i64,
    /// Dealt of slices that had no account: in no wallet yet.
    loose: u64,
}

impl Carry {
    /// Returns an empty bucket whose first share is that of slice `first`.
    pub(super) const fn new(lifetime: u64, first: u64) -> Self {
        Self { lifetime, next: first, shares: BTreeMap::new(), gone: 0, loose: 0 }
    }

    /// Returns the slices before `slice` whose rights still live in it and were not dealt.
    pub(super) fn undealt(&mut self, slice: u64) -> std::ops::Range<u64> {
        self.next = self.yet_to_deal(slice).start;
        self.next..slice
    }

    /// The same for whoever only looks.
    pub(super) fn yet_to_deal(&self, slice: u64) -> std::ops::Range<u64> {
        self.next.max((slice + 1).saturating_sub(self.lifetime))..slice
    }

    /// Returns what earlier slices would leave a running one that nobody has touched, `late` dealt
    /// with its first touch: as [`Carry::move_on`] counts it. Negative is debt.
    pub(super) fn left_for(&self, running: u64, late: u64, open: &Few<Account>, ring: &WalletRing) -> i64 {
        let first = open.keys().next().unwrap_or(running).min(running);
        let mut gone = self.gone.max(self.expired(first));
        for account in open.values().take_while(|account| account.window.number() < running) {
            gone = gone.max(self.expired(account.window.number())) + account.own_use(ring);
        }
        let dealt: u64 = self.shares.range(..running).map(|(_, share)| share).sum();
        (dealt + late) as i64 - gone.max(self.expired(running))
    }

    /// Counts this replica's share of a slice, or that it has none. In the order of slices.
    pub(super) fn deal(&mut self, slice: u64, share: Option<u64>) {
        self.next = self.next.max(slice + 1);
        if let Some(share) = share {
            self.shares.insert(slice, share);
        }
    }

    /// As [`Carry::deal`], for a slice without an account.
    pub(super) fn deal_late(&mut self, slice: u64, share: Option<u64>) {
        self.deal(slice, share);
        self.loose += share.unwrap_or(0);
    }

    /// Moves what earlier slices left into the running one, or takes back what they turned
    /// out to have used.
    pub(super) fn move_on(&mut self, running: u64, open: &mut Few<Account>, ring: &WalletRing) {
        let first = open.keys().next().unwrap_or(running).min(running);
        self.drop_before(first);
        let mut gone = self.gone;
        for account in open.range_mut(..running) {
            let slice = account.window.number();
            // Nobody takes from it any more, so what is read here stays true.
            ring.set_parked(slice, true);
            gone = gone.max(self.expired(slice)) + account.own_use(ring);
        }
        gone = gone.max(self.expired(running));
        let dealt: u64 = self.shares.range(..running).map(|(_, share)| share).sum();
        let Some(carried) = open.get(&running).map(|account| account.carried) else { return };
        let change = dealt as i64 - gone - carried;
        if change > 0 {
            let mut found = self.loose.min(change as u64);
            for account in open.range_mut(..running).iter_mut().rev() {
                found += account.carry_out(change as u64 - found, ring);
            }
            self.account(open, running).carry_in(found, ring);
        } else if change < 0 {
            self.account(open, running).carry_debt(change.unsigned_abs(), ring);
            let mut rest = change.unsigned_abs();
            for account in open.range_mut(..running).iter_mut().rev() {
                let part = rest.min(account.owned(ring).min(0).unsigned_abs());
                account.cover(part, ring);
                rest -= part;
            }
        }
        self.loose = 0;
    }

    /// Counts a slice that closes; the oldest first.
    pub(super) fn close(&mut self, slice: u64, account: &Account, ring: &WalletRing) {
        self.drop_before(slice);
        self.gone = self.gone.max(self.expired(slice)) + account.own_use(ring);
        self.drop_before(slice + 1);
    }

    /// Empties the bucket: what was dealt alone is not the fleet's.
    pub(super) fn forfeit(&mut self) {
        self.shares.clear();
        self.gone = 0;
        self.loose = 0;
    }

    /// What was dealt and lives no more in this slice.
    fn expired(&self, slice: u64) -> i64 {
        let Some(last) = slice.checked_sub(self.lifetime) else { return 0 };
        self.shares.range(..=last).map(|(_, share)| *share as i64).sum()
    }

    /// Forgets shares that had expired before this slice: they are gone, whoever asks.
    fn drop_before(&mut self, slice: u64) {
        let expired = self.expired(slice);
        if expired > 0 {
            self.gone = self.gone.max(expired) - expired;
            let alive = (slice + 1).saturating_sub(self.lifetime);
            self.shares = self.shares.split_off(&alive);
        }
    }

    fn account<'a>(&self, open: &'a mut Few<Account>, slice: u64) -> &'a mut Account {
        open.get_mut(&slice).expect("looked up above")
    }
}
