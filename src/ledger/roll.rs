//! Windows opening, freezing and closing.
//!
//! Knows when a window has an account here and when its share is frozen. Must not know who
//! asks or what is said of it. The invariant it keeps: an open window is never forgotten and
//! made again, because that would repeat its share; and nothing is ever reset.

use std::sync::Arc;
use std::time::Duration;

use super::account::Account;
use super::window::{Timestamp, Window};
use super::{Ledger, Note, window_of};

impl Ledger {
    /// Opens next windows whose lead has begun, freezes, and closes old ones.
    pub(super) fn roll(&mut self, now: Timestamp) {
        for key in self.active.clone() {
            let state = &self.keys[key];
            let window = window_of(state, now);
            let in_use = state.own && state.open.get(&window.number()).is_some_and(|account| account.touched);
            if in_use && now >= window.next().opens() {
                self.open(key, window.next(), now);
            }
            self.freeze_open(key, now);
            self.close_old(key, now);
            let state = &self.keys[key];
            for account in state.open.values().filter(|account| state.is_shut_to_hits(account.window, now)) {
                // Settlements still reach it; a clock that steps back does not.
                state.ring.set_parked(account.window.number(), true);
            }
        }
    }

    /// Returns the account of a window, opening it first if this is the first touch.
    /// `None` if the window has closed.
    pub(super) fn open(&mut self, key: usize, window: Window, now: Timestamp) -> Option<&mut Account> {
        let running = window_of(&self.keys[key], now);
        // Four windows have a place: two that closed, the running one and the next.
        if window.number() + 2 < running.number() || window.number() > running.number() + 1 {
            return None;
        }
        if !self.keys[key].open.contains_key(&window.number()) {
            if closes(window) <= now {
                return None; // It was open once, or nobody here needed it.
            }
            let version = self.keys[key].version_in(window)?;
            // The place in the ring may still be taken by the window four before.
            self.close_before(key, window.number().saturating_sub(3), now);
            let state = &mut self.keys[key];
            state.open.insert(window.number(), Account::open(version, window, &state.ring));
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

    /// Freezes every open window of a key that may be frozen now and is not.
    pub(super) fn freeze_open(&mut self, key: usize, now: Timestamp) {
        let state = &mut self.keys[key];
        for account in state.open.values_mut() {
            let due = account.place.is_none() && now >= account.window.opens() && now < account.window.end();
            if due && let Some(place) = self.roster.freeze(&account.key, account.window, now) {
                account.freeze(place, state.mode, &state.ring);
            }
        }
    }

    pub(super) fn close_old(&mut self, key: usize, now: Timestamp) {
        let state = &self.keys[key];
        let open = state.open.values().filter(|account| closes(account.window) > now);
        let keep = open.map(|account| account.window.number()).min().unwrap_or(u64::MAX);
        self.close_before(key, keep, now);
    }

    /// Closes every window of a key before the one with this number: counts it, and what
    /// nobody could cover in it.
    pub(super) fn close_before(&mut self, key: usize, keep: u64, now: Timestamp) {
        while let Some(entry) = self.keys[key].open.first_entry() {
            if *entry.key() >= keep || entry.get().window.end() > now {
                break;
            }
            let account = entry.remove();
            let window = account.window;
            let state = &mut self.keys[key];
            let (allowed, uncovered) = account.overspent(&state.ring);
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
            self.keys[key].demand = 0;
            self.active.remove(&key);
        }
    }

    pub(super) fn note_uncovered(&mut self, key: usize, window: Window, amount: u64) {
        let state = &mut self.keys[key];
        state.closed.uncovered += amount;
        let limit = Arc::clone(&self.limits[state.limit].name);
        let unit = state.key.quota.unit();
        self.note(Note::Uncovered { limit, unit, amount, window });
    }
}

/// When the last settlement can still reach a window: two windows or ten minutes after
/// its end, whichever is sooner.
fn closes(window: Window) -> Timestamp {
    let length = window.end().since(window.start());
    window.end().plus((length * 2).min(Duration::from_secs(600)))
}
