//! Windows opening, freezing and closing.
//!
//! Knows when a window has an account here and when its share is frozen. Must not know who
//! asks or what is said of it. The invariant it keeps: an open window is never forgotten and
//! made again, because that would repeat its share; and nothing is ever reset.

use std::sync::Arc;
use std::time::Duration;

use super::account::{Account, RING};
use super::quota::Key;
use super::window::{Timestamp, Window};
use super::{KeyState, Ledger, Note, next_window, window_of};

impl Ledger {
    /// Opens next windows whose lead has begun, freezes, and closes old ones.
    pub(super) fn roll(&mut self, now: Timestamp) {
        for key in self.active.clone() {
            let state = &self.keys[key];
            let (window, next) = (window_of(state, now), next_window(state, now));
            let in_use = state.own && state.open.get(&window.number()).is_some_and(|account| account.touched);
            if in_use && now >= next.opens() {
                self.open(key, next, now);
            }
            self.freeze_open(key, now);
            self.carry_over(key, now);
            self.close_old(key, now);
            let state = &self.keys[key];
            for account in state.open.values().filter(|account| state.is_shut_to_hits(account.window, now)) {
                // Settlements still reach it; a clock that steps back does not.
                state.ring.set_parked(account.window.number(), true);
            }
        }
    }

    /// Opens every window in which peers may count this replica, asked for or not: who leaves
    /// hands its share of them over, and nobody else could ever deal it.
    pub(super) fn open_entitled(&mut self, now: Timestamp) {
        let keys: Vec<usize> = self.limits.iter().flat_map(|limit| limit.keys.iter().copied()).collect();
        for key in keys {
            let state = &self.keys[key];
            for window in [window_of(state, now), next_window(state, now)] {
                if self.roster.has_frozen(window.start()) {
                    self.open(key, window, now);
                }
            }
        }
    }

    /// Returns the account of a window, opening it first if this is the first touch.
    /// `None` if the window has closed.
    pub(super) fn open(&mut self, key: usize, window: Window, now: Timestamp) -> Option<&mut Account> {
        let running = window_of(&self.keys[key], now);
        // These have a place: some that ended, the running one and the next.
        let reach = self.keys[key].slices.reach;
        if window.number() + reach < running.number() || window.number() > running.number() + 1 {
            return None;
        }
        if !self.keys[key].open.contains_key(&window.number()) {
            if closes(window, reach) <= now {
                return None; // It was open once, or nobody here needed it.
            }
            let version = self.keys[key].version_in(window)?;
            // The place in the ring may still be taken by the window a round before.
            self.close_before(key, window.number().saturating_sub(RING as u64 - 1), now);
            let state = &mut self.keys[key];
            let mode = state.mode;
            state.open.get_or_insert_with(&window.number(), || Account::open(version, mode, window, &state.ring));
            self.follow_sum(key, window, now);
            self.active.insert(key);
            self.freeze_open(key, now);
            let state = &self.keys[key];
            let waiting = self.roster.is_leaving() || !self.limits[state.limit].queue.is_empty();
            if waiting || state.is_shut_to_hits(window, now) {
                state.ring.set_parked(window.number(), true);
            }
        }
        self.keys[key].open.get_mut(&window.number())
    }

    /// Freezes every instalment of a key's open windows that may be frozen now and is not.
    pub(super) fn freeze_open(&mut self, key: usize, now: Timestamp) {
        let KeyState { ring, open, carry, .. } = &mut self.keys[key];
        let roster = &mut self.roster;
        // `None`: not now. `Some(None)`: not entitled, and never will be.
        let mut share = |key: &Key, instalment: Window, amount: u64| match roster.freeze(key, instalment, now) {
            Some(place) => Some(Some(place.share(amount))),
            None => roster.is_too_early(instalment).then_some(None),
        };
        for account in open.values_mut().filter(|account| now < account.window.end().min(ring.until())) {
            let slices = account.key.quota.slices();
            while account.dealt < slices.instalments {
                let instalment = slices.instalment_of(account.window, account.dealt);
                let due = if account.dealt == 0 { account.window.opens() } else { instalment.start() };
                if now < due {
                    break;
                }
                if let Some(carry) = carry {
                    for number in carry.undealt(account.window.number()) {
                        let slice = slices.earlier(account.window, number);
                        let Some(share) = share(&account.key, slice, slices.amount) else { return };
                        carry.deal_late(number, share);
                    }
                    if carry.next > account.window.number() {
                        account.deal(0, ring); // It was dealt before anybody touched it.
                        break;
                    }
                }
                let amount = slices.instalment(account.dealt);
                let Some(share) = share(&account.key, instalment, amount) else { break };
                if let Some(carry) = carry {
                    carry.deal(account.window.number(), share);
                }
                account.deal(share.unwrap_or(0), ring);
            }
        }
    }

    /// Moves what a bucket's ended slices left into the running one.
    pub(super) fn carry_over(&mut self, key: usize, now: Timestamp) {
        let state = &mut self.keys[key];
        let running = window_of(state, now).number();
        if let Some(carry) = state.carry.as_mut().filter(|_| state.ring.is_in_force(now)) {
            carry.move_on(running, &mut state.open, &state.ring);
            if state.owned(running) < 0 {
                self.indebted.insert((key, running));
            }
        }
    }

    pub(super) fn close_old(&mut self, key: usize, now: Timestamp) {
        let state = &self.keys[key];
        let open = state.open.values().filter(|account| closes(account.window, state.slices.reach) > now);
        let keep = open.map(|account| account.window.number()).min().unwrap_or(u64::MAX);
        self.close_before(key, keep, now);
    }

    /// Closes every window of a key before the one with this number: counts it, and what
    /// nobody could cover in it.
    pub(super) fn close_before(&mut self, key: usize, keep: u64, now: Timestamp) {
        let is_over = |account: &&Account| account.window.number() < keep && account.window.end() <= now;
        while self.keys[key].open.first().filter(is_over).is_some() {
            let Some(account) = self.keys[key].open.pop_first() else { break };
            let window = account.window;
            let over = self.sum_bound(&account);
            let state = &mut self.keys[key];
            let (allowed, uncovered) = match over {
                Some((limit, bound)) => account.overshot(limit, bound, &state.ring),
                None => account.overspent(&state.ring),
            };
            if let Some(carry) = &mut state.carry {
                carry.close(window.number(), &account, &state.ring);
            }
            let usage = account.close(&state.ring);
            state.closed.admitted += usage.reserved;
            state.closed.refunded += usage.refunded;
            state.closed.overshoot += allowed;
            self.indebted.remove(&(key, window.number()));
            if uncovered > 0 {
                self.note_uncovered(key, window, uncovered);
            }
        }
        if self.keys[key].open.is_empty() {
            (self.keys[key].demand, self.keys[key].demand_rest) = (0, 0);
            self.active.remove(&key);
        }
    }

    pub(super) fn note_uncovered(&mut self, key: usize, window: Window, amount: u64) {
        let state = &mut self.keys[key];
        state.closed.uncovered = state.closed.uncovered.saturating_add(amount);
        let limit = Arc::clone(&self.limits[state.limit].name);
        let unit = state.key.quota.unit();
        self.note(Note::Uncovered { limit, unit, amount, window });
    }
}

/// When the last settlement can still reach a window: some windows, or ten minutes, after
/// its end, whichever is sooner.
fn closes(window: Window, reach: u64) -> Timestamp {
    window.end().plus((window.length() * reach as u32).min(Duration::from_secs(600)))
}
