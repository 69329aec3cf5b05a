//! The mode `sum`: what is held back for use that has not been heard of yet.
//!
//! Knows how the margin is measured and which replicas a bound counts. Must not know how a
//! request is decided: that is the wallet, as in every mode. The invariant it keeps
//! (docs/algorithm.md section 11): what a replica has admitted and not given back is, at
//! every admission, at most the limit less the margin less what it knows of its peers' use.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Ledger;
use super::account::Account;
use super::message::ReplicaId;
use super::mode::{Margin, Mode};
use super::window::{Timestamp, Window};

/// How much more than the measured rate is held back: rates of a second ago say little of
/// bursts. The factor that the first simulations of this rule used; without promise.
const SAFETY: u64 = 2;

impl Ledger {
    /// Finds every margin again: peers were heard, or have been silent a little longer.
    pub(super) fn follow_sums(&mut self, now: Timestamp) {
        for key in self.active.clone() {
            let accounts = self.keys[key].open.values().filter(|account| !account.mode.has_rights());
            let windows: Vec<Window> = accounts.map(|account| account.window).collect();
            for window in windows.into_iter().filter(|window| window.end() > now) {
                self.follow_sum(key, window, now);
            }
        }
    }

    /// Brings a window's wallet in line with its margin, if the mode is `sum`.
    pub(super) fn follow_sum(&mut self, key: usize, window: Window, now: Timestamp) {
        let Some(ceiling) = self.ceiling(key, window, now) else { return };
        let state = &mut self.keys[key];
        if let Some(account) = state.open.get_mut(&window.number()) {
            account.follow(ceiling, &state.ring);
        }
    }

    /// Returns what all replicas together may use of a window; `None` but in `sum`.
    pub(super) fn ceiling(&self, key: usize, window: Window, now: Timestamp) -> Option<u64> {
        let limit = self.keys[key].version_at(window.start()).quota.largest_claim();
        self.margin(key, window, now).map(|margin| limit - margin)
    }

    /// Returns what is to be expected over the limit: what has not been heard of, as
    /// measured, less the margin.
    pub(super) fn unheard_over_margin(&self, key: usize, window: Window, now: Timestamp) -> u64 {
        let unheard = self.unheard(key, window, now).fold(0, u64::saturating_add);
        unheard.saturating_sub(self.margin(key, window, now).unwrap_or(0))
    }

    /// Returns how many replicas may have admitted something in a window: everybody who is
    /// not known to have ended before it, everybody who is known to have used some of it,
    /// and every listed address at which nobody has answered.
    pub(super) fn replicas_in(&self, account: Option<&Account>, window: Window) -> u64 {
        let alive = self.roster.everybody().filter(|(.., gone)| gone.is_none_or(|gone| gone > window.start()));
        let mut replicas: BTreeSet<ReplicaId> = alive.map(|(id, ..)| id).chain([self.roster.me()]).collect();
        if let Some(account) = account {
            let users = account.peers.values().filter(|row| row.reserved > 0);
            replicas.extend(users.map(|row| self.id_of(row.peer)));
        }
        replicas.len() as u64 + self.roster.silent_in(window.start())
    }

    /// Returns the limit and the bound that a closing slice is held to; `None` but in
    /// `sum`.
    pub(super) fn sum_bound(&self, account: &Account) -> Option<(u64, u64)> {
        if account.mode.has_rights() {
            return None;
        }
        let limit = account.key.quota.largest_claim();
        let replicas = self.replicas_in(Some(account), account.window);
        Some((limit, replicas.saturating_mul(account.mode.largest(limit)).saturating_sub(limit)))
    }

    fn margin(&self, key: usize, window: Window, now: Timestamp) -> Option<u64> {
        let limit = self.keys[key].version_at(window.start()).quota.largest_claim();
        match self.keys[key].mode_in(window) {
            Mode::Sum { margin: margin @ Margin::Fixed(_) } => Some(margin.fixed(limit)),
            Mode::Sum { margin: Margin::Auto } => {
                // A silent peer costs its even part and no more, as its share would in
                // `strict`: one crash must not close a fleet, and the parts of a fleet that
                // has come apart add up to the limit again.
                let replicas = self.roster.peers().count() as u64 + 1;
                let parts = self.unheard(key, window, now).map(|unheard| unheard.saturating_mul(SAFETY));
                Some(parts.map(|part| part.min(limit / replicas)).sum::<u64>().min(limit))
            }
            _ => None,
        }
    }

    /// What each peer may have used that has not been heard of: its rate, for as long as it
    /// has been silent, and for what is under way half a round trip and as long as a row waits
    /// for its turn: there as here. Who has said nothing of any open window is taken to be as
    /// busy as this replica.
    fn unheard(&self, key: usize, window: Window, now: Timestamp) -> impl Iterator<Item = u64> + '_ {
        let state = &self.keys[key];
        // Nothing was used before the window began.
        let age = now.since(window.start());
        self.roster.peers().map(move |(id, _)| {
            let actor = self.by_actor.get(&id);
            let rows = state.open.values().rev().filter_map(|account| account.peers.get(actor?));
            let rate = rows.map(|row| u64::from(row.demand)).next().unwrap_or(state.demand);
            let silence = self.peers.get(&id).map_or(age, |peer| {
                now.since(peer.heard) + self.interval * self.rounds + Duration::from_millis(peer.rtt_ms / 2)
            });
            let unheard = u128::from(rate) * silence.min(age).as_millis() / 1_000;
            unheard.min(u128::from(state.key.quota.amount())) as u64
        })
    }
}
