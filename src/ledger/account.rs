//! One replica's whole state for one key and window: rights, usage, peers' rows.
//!
//! Knows how rows merge and what follows from them. Must not know the roster, the clock
//! or how anything is sent. The invariant it keeps (docs/algorithm.md section 9): rights are
//! credited once for each unit a donor has debited, because what was received from a
//! replica is the maximum of what that replica ever said it gave; so the rights of all
//! replicas together never exceed the sum of the shares.

use std::sync::atomic::{AtomicU64, Ordering};

use crdts::{CmRDT, CvRDT, Dot};

use super::few::{Few, Keyed};
use super::heard::{Gifts, PeerRow, Question};
use super::message::Row;
use super::mode::Mode;
use super::quota::{Key, Quota};
use super::window::{Timestamp, Window};
use crate::wallet::{After, Miss, Wallet};

/// A replica's number within one ledger; 0 is this replica.
///
/// Interned because a row names several replicas, and a 16-byte id in every cell would
/// be most of an account's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Actor(pub(crate) u16);

impl Actor {
    pub(crate) const ME: Self = Self(0);
}

/// How many windows of one key have a wallet at once: those that ended and settlements may
/// still reach (twelve slices of a sliding window, two windows of most others), the running
/// one, and the next.
pub(crate) const RING: usize = 16;

/// The wallets of one key: a ring over its windows, shared between the hot path and the
/// ledger. Nothing in it is only read by a hit: a line that another thread writes would be
/// fetched twice.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct WalletRing {
    purses: [Purse; RING],
    /// Units refused since the last tick: demand that never reached a wallet.
    pub(crate) refused: AtomicU64,
    /// Requests in `[from, until)` are checked against it, in unix ms. For whoever is out of
    /// line: a hit never looks, because a window outside is not open, and one that is cut
    /// short carries the parked bit.
    from: AtomicU64,
    until: AtomicU64,
}

#[derive(Debug)]
struct Purse {
    spendable: Wallet,
    /// Ever refunded. With it, what was ever reserved follows from the rights:
    /// reserved = rights - spendable + refunded, so a hit touches one word only.
    refunded: Wallet,
}

impl WalletRing {
    pub(crate) fn new(from: Timestamp) -> Self {
        // A generation that no window of the purse's own place has: closed.
        let closed = |place: usize| Purse {
            spendable: Wallet::open(place as u64 + 1, 0),
            refunded: Wallet::open(place as u64 + 1, 0),
        };
        Self {
            purses: std::array::from_fn(closed),
            refused: AtomicU64::new(0),
            from: AtomicU64::new(from.unix_ms()),
            until: AtomicU64::new(Timestamp::NEVER.unix_ms()),
        }
    }

    /// Returns from when on requests are checked against it.
    pub(crate) fn from(&self) -> Timestamp {
        Timestamp::from_unix_ms(self.from.load(Ordering::Relaxed))
    }

    /// Returns from when on they are no longer.
    pub(crate) fn until(&self) -> Timestamp {
        Timestamp::from_unix_ms(self.until.load(Ordering::Relaxed))
    }

    /// Sets it. Never to or from an instant that a reservation made by now, with its edge,
    /// could reach: what a permit was charged follows from this.
    pub(crate) fn end_at(&self, until: Timestamp) {
        self.until.store(until.unix_ms(), Ordering::Relaxed);
    }

    /// Says whether requests at this instant are checked against it.
    #[inline]
    pub(crate) fn is_in_force(&self, at: Timestamp) -> bool {
        self.from() <= at && at < self.until()
    }

    #[inline]
    pub(crate) fn take(&self, number: u64, amount: u64) -> Result<(), Miss> {
        self.purse(number).spendable.take(number, amount)
    }

    pub(crate) fn take_past_parked(&self, number: u64, amount: u64) -> Result<(), Miss> {
        self.purse(number).spendable.take_past_parked(number, amount)
    }

    /// Gives a reservation, or a part of it, back. `None` if its window has closed.
    #[inline]
    pub(crate) fn refund(&self, number: u64, amount: u64) -> Option<After> {
        let purse = self.purse(number);
        // First the money, then the receipt: a reader in between sees too little
        // reserved, which the next row corrects, and never too much.
        let after = purse.spendable.put(number, amount)?;
        purse.refunded.put(number, amount);
        Some(after)
    }

    /// Charges what a response used beyond its reservation.
    pub(crate) fn charge(&self, number: u64, amount: u64) -> Option<After> {
        self.purse(number).spendable.charge(number, amount)
    }

    pub(crate) fn balance(&self, number: u64) -> i64 {
        self.purse(number).spendable.peek(number).unwrap_or(0)
    }

    fn take_all(&self, number: u64) -> u64 {
        self.purse(number).spendable.take_all(number)
    }

    fn take_above(&self, number: u64, amount: u64, floor: u64) -> Result<(), Miss> {
        self.purse(number).spendable.take_above(number, amount, floor)
    }

    pub(crate) fn set_parked(&self, number: u64, parked: bool) {
        self.purse(number).spendable.set_parked(number, parked);
    }

    fn credit(&self, number: u64, amount: u64) {
        self.purse(number).spendable.put(number, amount);
    }

    fn open(&self, number: u64) {
        let purse = self.purse(number);
        purse.refunded.reopen(number, 0);
        purse.spendable.reopen(number, 0);
    }

    fn close(&self, number: u64) {
        let purse = self.purse(number);
        purse.spendable.reopen(number + 1, 0);
        purse.refunded.reopen(number + 1, 0);
    }

    fn refunded(&self, number: u64) -> u64 {
        self.purse(number).refunded.peek(number).unwrap_or(0).max(0) as u64
    }

    #[inline]
    fn purse(&self, number: u64) -> &Purse {
        &self.purses[number as usize % RING]
    }
}

/// The counters of this replica as of now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) reserved: u64,
    pub(crate) refunded: u64,
    /// Rights that are still spendable; negative is debt.
    pub(crate) owned: i64,
}

impl Usage {
    pub(crate) const fn used(self) -> u64 {
        self.reserved.saturating_sub(self.refunded)
    }
}

/// What a row of a peer brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Merged {
    /// Rights that were credited here.
    pub(crate) credit: u64,
    /// Rights that nobody can have given: not credited.
    pub(crate) refused: u64,
    pub(crate) news: bool,
}

/// One (key, window) on one replica.
#[derive(Debug)]
pub(crate) struct Account {
    /// In which version: whatever is configured later, this window keeps it.
    pub(crate) key: Key,
    /// In which mode, likewise.
    pub(crate) mode: Mode,
    pub(crate) window: Window,
    /// How many instalments have been dealt with: this replica's part of each is frozen, or
    /// it was not entitled to one and never will be.
    pub(crate) dealt: u32,
    /// Shares + received - given + carried; below zero only where a bucket's debt was moved
    /// on to the next slice.
    rights: i64,
    /// What the mode has put into the wallet beside the rights: in `elastic` the allowance,
    /// in `sum` the ceiling less the known use of peers, negative if that is more.
    beside: i64,
    /// In `sum`, what all replicas together may use; there are no rights then.
    ceiling: Option<u64>,
    /// Moved here from earlier slices of a bucket, and taken back for their debts.
    pub(crate) carried: i64,
    /// Used before the bucket was emptied, when the replica joined a fleet.
    written_off: i64,
    gifts: Gifts,
    /// The running sum of `reserved - refunded` over peers.
    used_by_peers: i64,
    /// Those that have said something of this window.
    pub(crate) peers: Few<PeerRow>,
    /// Those that asked or were asked for rights.
    pub(crate) questions: Few<Question>,
    /// The last published row's version and counters.
    pub(crate) version: u64,
    pub(crate) published: Usage,
    given_changed: bool,
    /// How many more times the row is sent although nothing changed: cover for loss.
    pub(crate) repeat: u8,
    /// The ledger's change number when the own row last changed.
    pub(crate) changed: u64,
    /// What was reserved at the last tick, for the demand.
    pub(crate) reserved_at_tick: u64,
    /// Whether anybody, here or elsewhere, has used this window.
    pub(crate) touched: bool,
}

impl Account {
    /// Opens the account and its purse, without rights.
    pub(crate) fn open(key: Key, mode: Mode, window: Window, ring: &WalletRing) -> Self {
        ring.open(window.number());
        Self {
            key,
            mode,
            window,
            dealt: 0,
            rights: 0,
            beside: 0,
            ceiling: None,
            carried: 0,
            written_off: 0,
            gifts: Gifts::default(),
            used_by_peers: 0,
            peers: Few::default(),
            questions: Few::default(),
            version: 0,
            published: Usage::default(),
            given_changed: false,
            repeat: 0,
            changed: 0,
            reserved_at_tick: 0,
            touched: false,
        }
    }

    /// Closes the purse and returns the final counters.
    pub(crate) fn close(self, ring: &WalletRing) -> Usage {
        let usage = self.usage(ring);
        ring.close(self.window.number());
        usage
    }

    /// Credits this replica's part of the next instalment, and what the mode allows beyond
    /// it. Each once.
    pub(crate) fn deal(&mut self, share: u64, ring: &WalletRing) {
        self.dealt += 1;
        if self.ceiling.is_some() {
            return; // Frozen all the same: it tells everybody until when this replica counts.
        }
        let allowance = self.mode.allowance(share);
        self.rights += share as i64;
        self.beside += allowance as i64;
        ring.credit(self.window.number(), share + allowance);
    }

    /// Returns what this replica may still spend or has spent here.
    pub(crate) const fn rights(&self) -> i64 {
        self.rights
    }

    /// Returns the rights that are still spendable, which is all that can be given away:
    /// the wallet's balance without the allowance. Negative is debt. In `sum` nobody has
    /// rights and nobody owes any.
    pub(crate) fn owned(&self, ring: &WalletRing) -> i64 {
        if self.ceiling.is_some() { 0 } else { self.unspent(ring) }
    }

    /// Returns the rights less what was spent of the wallet.
    fn unspent(&self, ring: &WalletRing) -> i64 {
        ring.balance(self.window.number()) - self.beside
    }

    /// Makes this an account of the mode `sum`, or follows what has become known since: the
    /// wallet holds `ceiling` less what all replicas are known to use. Returns what was put
    /// back. The same knowledge gives the same balance, in whatever order it came.
    pub(crate) fn follow(&mut self, ceiling: u64, ring: &WalletRing) -> u64 {
        self.ceiling = Some(ceiling);
        // Beyond any limit it makes no difference, and the wallet need not hold it.
        let known = self.used_by_peers.clamp(0, Quota::MAX_AMOUNT as i64);
        let beside = ceiling as i64 - known;
        let change = beside - self.beside;
        self.beside = beside;
        if change < 0 {
            ring.charge(self.window.number(), change.unsigned_abs());
            return 0;
        }
        ring.credit(self.window.number(), change as u64);
        change as u64
    }

    /// Returns what was used of rights that were dealt here, now or in earlier slices. What
    /// was received comes first: it cannot be carried on, because only its donor knows how
    /// long it lives.
    pub(crate) fn own_use(&self, ring: &WalletRing) -> i64 {
        let gave: u64 = self.gifts.of(Actor::ME).iter().map(|gift| gift.total).sum();
        let got: u64 = self.gifts.to(Actor::ME).filter(|_| self.mode.has_rights()).map(|gift| gift.total).sum();
        let used = self.usage(ring).used() as i64;
        (used + gave as i64 - got as i64 - self.written_off).max(0)
    }

    /// Takes up to `amount` of the rights out, for the running slice. Returns what was there.
    pub(crate) fn carry_out(&mut self, amount: u64, ring: &WalletRing) -> u64 {
        let amount = amount.min(self.owned(ring).max(0) as u64);
        if amount == 0 || ring.take_above(self.window.number(), amount, self.beside.max(0) as u64).is_err() {
            return 0;
        }
        self.rights -= amount as i64;
        amount
    }

    /// Adds what earlier slices left.
    pub(crate) fn carry_in(&mut self, amount: u64, ring: &WalletRing) {
        self.carried += amount as i64;
        self.rights += amount as i64;
        ring.credit(self.window.number(), amount);
    }

    /// Takes out what an earlier slice turned out to have used, covered or not.
    pub(crate) fn carry_debt(&mut self, amount: u64, ring: &WalletRing) {
        self.carried -= amount as i64;
        self.rights -= amount as i64;
        ring.charge(self.window.number(), amount);
    }

    /// Covers debt with what a later slice gave for it.
    pub(crate) fn cover(&mut self, amount: u64, ring: &WalletRing) {
        self.rights += amount as i64;
        ring.credit(self.window.number(), amount);
    }

    /// Returns this replica's counters as they stand.
    pub(crate) fn usage(&self, ring: &WalletRing) -> Usage {
        let number = self.window.number();
        // In this order, see `WalletRing::refund`; and never below what was published,
        // because the counters are grow-only to everybody else.
        let refunded = ring.refunded(number);
        let unspent = self.unspent(ring);
        let reserved = (i128::from(self.rights) - i128::from(unspent) + i128::from(refunded)).max(0);
        Usage {
            reserved: (reserved as u64).max(self.published.reserved),
            refunded: refunded.max(self.published.refunded),
            owned: if self.ceiling.is_some() { 0 } else { unspent },
        }
    }

    /// Returns reserved and not refunded, over all replicas, as known here.
    pub(crate) fn used(&self, ring: &WalletRing) -> u64 {
        let own = self.usage(ring).used();
        (i128::from(own) + i128::from(self.used_by_peers)).max(0) as u64
    }

    /// Says whether there is news to publish, and counts the row as published.
    pub(crate) fn publish(&mut self, ring: &WalletRing) -> bool {
        let usage = self.usage(ring);
        let news = usage != self.published || self.given_changed || self.version == 0;
        if news {
            self.published = usage;
            self.given_changed = false;
            self.version += 1;
        }
        news
    }

    /// Debits `amount` and gives it to `to`. The debit comes first, so a crash in between
    /// loses rights and never doubles them. Returns what was given: `amount` or nothing.
    pub(crate) fn give(&mut self, to: Actor, amount: u64, ring: &WalletRing) -> u64 {
        let floor = self.beside.max(0) as u64;
        if amount == 0 || ring.take_above(self.window.number(), amount, floor).is_err() {
            return 0;
        }
        self.rights -= amount as i64;
        let total = self.given_to(to) + amount;
        self.gifts.apply(Dot::new((Actor::ME, to), total));
        self.given_changed = true;
        amount
    }

    /// Gives up everything spendable: nobody gets it until the window ends. In `sum` nothing
    /// was owned: what peers use is charged as it becomes known.
    pub(crate) fn forfeit(&mut self, ring: &WalletRing) {
        if self.ceiling.is_some() {
            return;
        }
        let balance = ring.take_all(self.window.number()) as i64;
        let owned = (balance - self.beside).max(0);
        self.rights -= owned;
        self.beside -= balance - owned;
        self.carried = 0;
        self.written_off += self.own_use(ring);
    }

    /// Returns what replicas owe in this window, as they last said.
    pub(crate) fn debts(&self, ring: &WalletRing) -> u64 {
        let all = self.peers.values().map(|peer| peer.spendable).chain([self.owned(ring)]);
        all.fold(0, |sum: u64, owned| sum.saturating_add(owned.min(0).unsigned_abs()))
    }

    /// Returns what was spent beyond the rights: within the allowance, and beyond it.
    pub(crate) fn overspent(&self, ring: &WalletRing) -> (u64, u64) {
        let debt = self.owned(ring).min(0).unsigned_abs();
        let allowed = debt.min(self.beside.max(0) as u64);
        (allowed, debt - allowed)
    }

    /// Returns this replica's part, by use, of what all replicas are known to have used over
    /// the limit: within the mode's bound, and beyond it.
    pub(crate) fn overshot(&self, limit: u64, bound: u64, ring: &WalletRing) -> (u64, u64) {
        let (own, all) = (u128::from(self.usage(ring).used()), u128::from(self.used(ring)));
        let over = all.saturating_sub(u128::from(limit));
        let part = |amount: u128| (amount * own).checked_div(all).unwrap_or(0) as u64;
        let allowed = over.min(u128::from(bound));
        (part(allowed), part(over - allowed))
    }

    /// Returns what `from` ever gave to each replica, as known here.
    pub(crate) fn given_by(&self, from: Actor) -> impl Iterator<Item = (Actor, u64)> + '_ {
        self.gifts.of(from).iter().map(|gift| (gift.to, gift.total))
    }

    pub(crate) fn given_to(&self, to: Actor) -> u64 {
        self.gifts.total(Actor::ME, to)
    }

    /// Returns what is open between this replica and a peer.
    pub(crate) fn question(&mut self, peer: Actor) -> &mut Question {
        self.questions.get_or_insert_with(&peer, || Question::with(peer))
    }

    /// Merges a row of `from`; `given` is its list with replicas interned.
    pub(crate) fn merge(&mut self, from: Actor, row: &Row, given: &[(Actor, u64)], ring: &WalletRing) -> Merged {
        let said = PeerRow::of(from, row);
        let mut news = !self.peers.contains_key(&from);
        let peer = self.peers.get_or_insert_with(&from, || PeerRow { reserved: 0, refunded: 0, ..said });
        let before = *peer;
        peer.merge(said);
        news |= *peer != before;
        // A row can say anything: merged by maximum a counter never falls, so the difference is
        // none below zero, and what the sum cannot hold is cut off, far above any quota: only a
        // peer that lies comes near.
        let grown = |now: u64, before: u64| (now - before).min(i64::MAX as u64) as i64;
        self.used_by_peers = self.used_by_peers.saturating_add(grown(peer.reserved, before.reserved));
        self.used_by_peers = self.used_by_peers.saturating_sub(grown(peer.refunded, before.refunded));
        self.touched |= row.reserved > 0;
        let mut credit = 0_u64;
        for (to, total) in given {
            let known = self.gifts.total(from, *to);
            if *total > known {
                self.gifts.apply(Dot::new((from, *to), *total));
                news = true;
                credit = credit.saturating_add(if *to == Actor::ME { total - known } else { 0 });
            }
        }
        if let Some(ceiling) = self.ceiling {
            // Without rights nothing is received.
            return Merged { credit: self.follow(ceiling, ring), refused: 0, news };
        }
        let given = credit;
        if credit > 0 {
            credit = credit.min(self.room());
            self.rights += credit as i64;
            ring.credit(self.window.number(), credit);
        }
        Merged { credit, refused: given - credit, news }
    }

    /// Returns how many more rights can be received: all replicas together never have more than
    /// the limit, so whoever gives beyond it gives what it does not have.
    fn room(&self) -> u64 {
        let slices = self.key.quota.slices();
        let most = slices.amount.saturating_mul(slices.lifetime).min(i64::MAX as u64) as i64;
        most.saturating_sub(self.rights).max(0) as u64
    }
}

impl Keyed for Account {
    type Key = u64;

    fn key(&self) -> u64 {
        self.window.number()
    }
}

#[cfg(test)]
mod tests {
    use super::super::mode::Portion;
    use super::super::quota::{LimitId, Quota};
    use super::super::window::{Timestamp, WindowLength};
    use super::*;

    /// A hit may come between the look at what is owned and the debit.
    #[test]
    fn a_gift_that_an_allowance_would_pay_for_is_not_made() {
        let ring = WalletRing::new(Timestamp::ZERO);
        let key = Key { limit: LimitId::of("a"), quota: Quota::tokens(1_000).per_minute() };
        let window = WindowLength::MINUTE.window_at(Timestamp::from_unix_ms(60_000));
        let mode = Mode::Elastic { beta: Portion::percent(10) };
        let mut account = Account::open(key, mode, window, &ring);
        account.deal(500, &ring);
        assert_eq!((account.owned(&ring), ring.balance(window.number())), (500, 550));
        assert_eq!(account.give(Actor(1), 501, &ring), 0);
        assert_eq!(account.give(Actor(1), 500, &ring), 500);
        assert_eq!(account.give(Actor(1), 1, &ring), 0);
        assert_eq!((account.owned(&ring), ring.balance(window.number()), account.rights()), (0, 50, 0));
    }
}
