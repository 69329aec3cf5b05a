//! Changing limits while requests run: which version is in force when.
//!
//! Knows how a limit's old and new quotas follow one another. Must not know who asks for
//! the change, or what a window's rights do. The invariant it keeps: this replica takes its
//! share of a window in one version, and a version that was in force when a window was
//! opened here stays in force for it. A replica's place in a window does not depend on the
//! version, so with old and new side by side the shares sum up to at most the larger limit
//! (docs/decisions/0007). And a limit that is configured is never without a quota in force, once
//! it had one: what nothing follows holds until all that is new has started.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::limits::{Counter, Shape};
use super::mode::Mode;
use super::quota::{Key, LimitId, Quota};
use super::window::{MAX_LEAD, Timestamp};
use super::{Ledger, window_of};

/// A quota that starts, and what it follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switch {
    /// What is in force until then: of the same unit or, where that one is configured no more, of
    /// another. `None` if nothing ends then.
    pub from: Option<Quota>,
    /// What is in force from then on.
    pub to: Quota,
    /// The window start at which it changes.
    pub at: Timestamp,
}

impl Ledger {
    /// Makes these the quotas of a limit, and returns its number and hot-path counters, in
    /// key order.
    ///
    /// A limit that is new is in force at once. Of one that is known each quota goes on
    /// until the one that follows it starts: at the first start of a window of the new one
    /// that nobody can have touched here. A quota of a unit that was not limited starts with
    /// its next window. One that nothing follows ends at once, or with the start of the last of
    /// those that are new.
    pub(crate) fn configure(
        &mut self,
        name: &str,
        quotas: &[Quota],
        mode: Mode,
        now: Timestamp,
    ) -> (usize, Arc<[Counter]>) {
        let now = self.advance(now);
        let id = LimitId::of(name);
        let limit = match self.by_limit.get(&id) {
            Some(limit) => *limit,
            None => {
                let limit = self.push_limit(name.into());
                self.by_limit.insert(id, limit);
                limit
            }
        };
        self.switch(limit, now);
        self.limits[limit].name = name.into();
        self.limits[limit].configured = true;
        self.limits[limit].mode = mode;
        for key in self.limits[limit].slots.clone() {
            self.keys[key].mode = mode;
        }
        let mut wanted = quotas.to_vec();
        wanted.sort_unstable();
        wanted.dedup();
        if self.wanted(limit) != wanted {
            self.take_back(limit, now);
            self.rearrange(limit, id, &wanted, now);
            self.list_counters(limit, now);
        }
        (limit, Arc::clone(&self.limits[limit].counters))
    }

    /// Returns how many quotas would have a place here with these configured, by name of their
    /// limit: they, and those of before that keep theirs until their windows end. What is held
    /// for peers has a bound of its own.
    pub(crate) fn places_with<'a>(&self, limits: impl IntoIterator<Item = (&'a str, &'a [Quota])>) -> usize {
        let mut needed = self.keys_held() - self.held();
        for (name, quotas) in limits {
            let limit = LimitId::of(name);
            let mut shapes: Vec<Shape> = quotas.iter().map(|quota| Shape::of(&Key { limit, quota: *quota })).collect();
            shapes.retain(|shape| !self.by_shape.get(shape).is_some_and(|key| self.keys[*key].own));
            needed += shapes.len();
        }
        needed
    }

    /// Drops every limit but these from the configuration. Whoever still holds a handle is
    /// limited as before.
    pub(crate) fn configure_only(&mut self, limits: &[usize]) {
        let limits: BTreeSet<usize> = limits.iter().copied().collect();
        for limit in 0..self.limits.len() {
            if self.limits[limit].configured && !limits.contains(&limit) {
                self.limits[limit].configured = false;
                self.unconfigured.insert(limit);
            }
        }
        // It is read once and kept for days: half of the room would stay empty.
        self.limits.shrink_to_fit();
        self.keys.shrink_to_fit();
    }

    /// Returns a limit's hot-path counters.
    pub(crate) fn counters_of(&self, limit: usize) -> Arc<[Counter]> {
        Arc::clone(&self.limits[limit].counters)
    }

    /// Says whether counters of a limit have changed by time alone since this was asked.
    pub(crate) fn take_switched(&mut self) -> bool {
        std::mem::take(&mut self.switched)
    }

    /// Returns what changes later, by time.
    pub(super) fn switches(&self, limit: usize, now: Timestamp) -> Vec<Switch> {
        let mut switches = Vec::new();
        for key in &self.limits[limit].keys {
            let state = &self.keys[*key];
            let start = state.ring.from();
            if start > now {
                let (to, at) = (state.versions[0].1.quota, start);
                let before = self.keys_until(limit, start, state.key.quota);
                let lifted = self.limits[limit].keys.iter().filter(|key| self.keys[**key].lifted == start);
                let ends = before.iter().chain(lifted).map(|key| Some(self.keys[*key].key.quota));
                let ends: Vec<_> = ends.collect();
                let ends = if ends.is_empty() { vec![None] } else { ends };
                switches.extend(ends.into_iter().map(|from| Switch { from, to, at }));
            }
            for pair in state.versions.windows(2).filter(|pair| pair[1].0 > now) {
                switches.push(Switch { from: Some(pair[0].1.quota), to: pair[1].1.quota, at: pair[1].0 });
            }
        }
        switches.sort_unstable_by_key(|switch| (switch.at, switch.to, switch.from));
        switches
    }

    /// Ends what has run out, and forgets versions that no window needs any more.
    pub(super) fn switch(&mut self, limit: usize, now: Timestamp) {
        let ended = |key: &usize| self.keys[*key].ring.until().min(self.keys[*key].lifted) <= now;
        if !self.limits[limit].keys.iter().any(ended) {
            return;
        }
        for key in self.limits[limit].keys.clone() {
            let state = &mut self.keys[key];
            let until = state.ring.until();
            if state.lifted <= now {
                self.hold_for_others(key);
            } else if until <= now {
                self.running_out.insert(key);
                for account in state.open.values_mut().filter(|account| account.window.end() > until) {
                    account.forfeit(&state.ring);
                }
                if let Some(carry) = &mut state.carry {
                    carry.forfeit();
                }
            }
        }
        self.list_counters(limit, now);
        self.switched = true;
    }

    /// Ends what has run out, in all limits.
    pub(super) fn switch_all(&mut self, now: Timestamp) {
        for limit in self.switching.clone() {
            self.switch(limit, now);
            if self.switches(limit, now).is_empty() {
                self.switching.remove(&limit);
            }
        }
    }

    /// What a limit's quotas will be when every change has come into force.
    fn wanted(&self, limit: usize) -> Vec<Quota> {
        let states = self.limits[limit].keys.iter().map(|key| &self.keys[*key]);
        let lasting = states.filter(|state| state.ring.until().min(state.lifted) == Timestamp::NEVER);
        let mut quotas: Vec<Quota> = lasting.map(|state| state.key.quota).collect();
        quotas.sort_unstable();
        quotas
    }

    /// The last instant at which a window of a key may have started that is no longer free
    /// to be counted in another version: shares are frozen up to the longest lead ahead, and
    /// a peer whose clock is ahead may have opened one before that.
    fn horizon(&self, key: usize, now: Timestamp) -> Timestamp {
        now.plus(MAX_LEAD).max(self.last_open(key)).max(self.keys[key].ring.from())
    }

    fn last_open(&self, key: usize) -> Timestamp {
        let last = self.keys[key].open.values().map(|account| account.window.start()).max();
        last.unwrap_or(Timestamp::ZERO)
    }

    /// Takes back every change that no window has seen yet.
    fn take_back(&mut self, limit: usize, now: Timestamp) {
        for key in self.limits[limit].keys.clone() {
            let horizon = self.horizon(key, now);
            let state = &mut self.keys[key];
            state.lifted = Timestamp::NEVER;
            while state.versions.len() > 1 && state.versions.last().is_some_and(|(from, _)| *from > horizon) {
                state.versions.pop();
            }
            state.set_latest(state.versions.last().expect("the first one stays").1);
        }
        for key in self.limits[limit].keys.clone() {
            let state = &self.keys[key];
            let from = state.ring.from();
            if from <= now.plus(MAX_LEAD) || !state.open.is_empty() {
                continue;
            }
            let before = self.keys_until(limit, from, state.key.quota);
            if let Some(before) = before {
                if from <= self.horizon(before, now) {
                    continue;
                }
                self.keys[before].ring.end_at(Timestamp::NEVER);
            }
            // No window of it is open, and none will be.
            self.keys[key].ring.end_at(Timestamp::ZERO);
            self.run_out(key);
        }
    }

    /// The key of a limit that another of the same unit follows at this instant.
    fn keys_until(&self, limit: usize, at: Timestamp, after: Quota) -> Option<usize> {
        let before = |key: &&usize| {
            let state = &self.keys[**key];
            state.ring.until() == at && state.key.quota.unit() == after.unit()
        };
        self.limits[limit].keys.iter().find(before).copied()
    }

    fn rearrange(&mut self, limit: usize, id: LimitId, wanted: &[Quota], now: Timestamp) {
        let is_new = self.limits[limit].keys.is_empty();
        let mut wanted = wanted.to_vec();
        for key in self.limits[limit].slots.clone() {
            if !self.keys[key].own && self.keys[key].open.is_empty() {
                self.run_out(key); // Held once: no window of it is open.
            }
        }
        let mut lasting: Vec<usize> = self.limits[limit].slots.clone();
        lasting.retain(|key| {
            let state = &self.keys[*key];
            let found = self.by_shape.get(&Shape::of(&state.key)) == Some(key);
            found && state.ring.until() == Timestamp::NEVER
        });
        // The same windows: another amount, or none.
        lasting.retain(|key| {
            let shape = Shape::of(&self.keys[*key].key);
            let Some(place) = wanted.iter().position(|quota| Shape::of(&Key { limit: id, quota: *quota }) == shape)
            else {
                return true;
            };
            let quota = wanted.remove(place);
            let horizon = match self.keys[*key].own {
                true => self.horizon(*key, now),
                // No reservation here was ever checked against it.
                false => self.last_open(*key),
            };
            self.keys[*key].own = true;
            self.running_out.remove(key);
            if self.keys[*key].key.quota != quota {
                let at = first_after(quota, horizon);
                let state = &mut self.keys[*key];
                state.set_latest(Key { limit: id, quota });
                state.versions.push((at, state.key));
                self.switching.insert(limit);
            }
            false
        });
        // Other windows of the same unit: the shorter follows the shorter.
        lasting.sort_unstable_by_key(|key| self.keys[*key].key.quota.by_length());
        wanted.sort_unstable_by_key(|quota| quota.by_length());
        let mut left = Vec::new();
        for old in lasting {
            let unit = self.keys[old].key.quota.unit();
            if let Some(place) = wanted.iter().position(|quota| quota.unit() == unit) {
                let quota = wanted.remove(place);
                let at = first_after(quota, self.horizon(old, now));
                self.keys[old].own = true;
                self.running_out.remove(&old);
                self.end(old, at);
                self.push_key(Key { limit: id, quota }, limit, true, at);
                self.switching.insert(limit);
            } else if self.keys[old].own {
                left.push(old);
            }
        }
        for quota in wanted {
            let from = if is_new { Timestamp::ZERO } else { first_after(quota, now) };
            self.push_key(Key { limit: id, quota }, limit, true, from);
            if !is_new {
                self.switching.insert(limit);
            }
        }
        self.lift(limit, &left, now);
    }

    /// Ends what nothing follows: at once if nothing new is still to start, and with the start of
    /// the last one otherwise, or nothing would be limited until then.
    fn lift(&mut self, limit: usize, left: &[usize], now: Timestamp) {
        let stays = |key: &usize| !left.contains(key) && self.keys[*key].ring.until() == Timestamp::NEVER;
        let new = self.limits[limit].slots.iter().filter(|key| self.keys[**key].own && stays(key));
        let last = new.map(|key| self.keys[*key].ring.from()).max().filter(|last| *last > now);
        for old in left.iter().copied() {
            let from = self.keys[old].ring.from();
            // It was still to start itself, and nothing ends for it.
            let never = from > now && self.keys_until(limit, from, self.keys[old].key.quota).is_none();
            match last.filter(|_| !never) {
                Some(last) => {
                    self.keys[old].lifted = last;
                    self.switching.insert(limit);
                }
                None => self.hold_for_others(old),
            }
        }
    }

    /// Ends a key at a later instant. A window that is longer is cut short there.
    fn end(&mut self, key: usize, at: Timestamp) {
        let state = &self.keys[key];
        state.ring.end_at(at);
        for account in state.open.values().filter(|account| account.window.end() > at) {
            state.ring.set_parked(account.window.number(), true);
        }
    }

    /// Lists what a limit's requests are checked against now or later.
    fn list_counters(&mut self, limit: usize, now: Timestamp) {
        let is_listed = |key: &usize| self.keys[*key].own && self.keys[*key].ring.until() > now;
        let mut keys: Vec<usize> = self.limits[limit].slots.iter().copied().filter(is_listed).collect();
        keys.sort_unstable_by_key(|key| self.keys[*key].key);
        let mut known = self.limits[limit].keys.clone();
        let mut found = keys.clone();
        known.sort_unstable();
        found.sort_unstable();
        if known == found {
            return; // Another amount changes no handle.
        }
        self.limits[limit].counters = keys.iter().map(|key| Counter::of(*key, &self.keys[*key])).collect();
        self.limits[limit].keys = keys;
    }

    /// Lets a key's accounts run out: nothing is checked against it any more, no window of it
    /// opens, and what is open is settled.
    fn run_out(&mut self, key: usize) {
        let shape = Shape::of(&self.keys[key].key);
        if self.by_shape.get(&shape) == Some(&key) {
            self.by_shape.remove(&shape);
        }
        self.running_out.insert(key);
    }

    /// Stops checking requests against a key, and lets its accounts run out. A change that no
    /// window has seen is off: nobody may ever have enforced it.
    fn hold_for_others(&mut self, key: usize) {
        let last = self.last_open(key);
        let state = &mut self.keys[key];
        (state.own, state.lifted) = (false, Timestamp::NEVER);
        while state.versions.len() > 1 && state.versions.last().is_some_and(|(from, _)| *from > last) {
            state.versions.pop();
        }
        state.set_latest(state.versions.last().expect("the first one stays").1);
        self.running_out.insert(key);
    }

    /// Forgets versions and keys that no window needs any more.
    pub(super) fn forget_versions(&mut self, now: Timestamp) {
        for key in self.active.iter().copied() {
            let state = &mut self.keys[key];
            if state.versions.len() > 1 {
                let oldest = state.open.values().map(|account| account.window.start()).min();
                let oldest = oldest.unwrap_or(now).min(window_of(state, now).start());
                let needed = state.versions.iter().rposition(|(from, _)| *from <= oldest).unwrap_or(0);
                state.versions.drain(..needed);
            }
        }
        for limit in self.unconfigured.clone() {
            let state = &mut self.limits[limit];
            if state.configured {
                self.unconfigured.remove(&limit);
            } else if Arc::strong_count(&state.counters) == 1 && state.queue.is_empty() {
                // The last handle is gone.
                state.counters = Arc::new([]);
                for key in std::mem::take(&mut state.keys) {
                    self.hold_for_others(key);
                }
                self.switching.remove(&limit);
                if self.limits[limit].slots.is_empty() {
                    self.free_limit(limit);
                }
            }
        }
        for key in self.running_out.clone() {
            let state = &self.keys[key];
            let unused = state.open.is_empty() && Arc::strong_count(&state.ring) == 1;
            if unused && !self.limits[state.limit].keys.contains(&key) {
                self.free_key(key);
            }
        }
    }

    fn free_key(&mut self, key: usize) {
        let limit = self.keys[key].limit;
        self.run_out(key);
        self.running_out.remove(&key);
        self.limits[limit].slots.retain(|slot| *slot != key);
        self.free_keys.push(key);
        if self.limits[limit].slots.is_empty() && !self.limits[limit].configured {
            self.free_limit(limit);
        }
    }

    fn free_limit(&mut self, limit: usize) {
        self.by_limit.retain(|_, number| *number != limit);
        self.unconfigured.remove(&limit);
        self.free_limits.push(limit);
    }
}

/// The first start of a window of a quota after an instant.
fn first_after(quota: Quota, at: Timestamp) -> Timestamp {
    quota.grid().window_at(at).end()
}
