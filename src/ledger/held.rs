//! Holding for peers what this replica's configuration does not know.
//!
//! A replica counts in every window of every limit, whether it knows the limit or not: its
//! share must not be lost while a new deployment reaches one pod after another. Knows when
//! an unknown quota is worth an account. Must not know how rights are asked for or given:
//! that is the same for all. The invariant it keeps: of all versions of a limit's unit, this
//! replica takes its share in one at a time.

use super::Ledger;
use super::limits::Shape;
use super::quota::Key;
use super::window::{EPSILON, MAX_LEAD, Timestamp, Window, WindowId};

/// The most quotas held for peers: a fleet with more deployments than that under way at once
/// loses the shares of who does not know them, no more.
const MAX_HELD: usize = 1_024;

impl Ledger {
    /// Returns the key and window that a message speaks of; an unknown one is held from now
    /// on. `None` if this replica is in another version.
    pub(super) fn find_or_hold(&mut self, key: &Key, window: WindowId, now: Timestamp) -> Option<(usize, Window)> {
        self.find(key, window).or_else(|| self.hold(key, window, now))
    }

    fn hold(&mut self, key: &Key, window: WindowId, now: Timestamp) -> Option<(usize, Window)> {
        let window = key.quota.grid().window_of(window)?;
        if window.end() <= now || window.start() > now.plus(MAX_LEAD + EPSILON * 2) {
            return None; // Nobody can use a share of it.
        }
        let limit = self.by_limit.get(&key.limit).copied();
        let slots = limit.map_or(&[][..], |limit| &self.limits[limit].slots);
        let shape = Shape::of(key);
        for slot in slots.iter().map(|slot| &self.keys[*slot]) {
            let other = slot.key.quota;
            let overlaps = |open: Window| open.start() < window.end() && window.start() < open.end();
            let taken = || slot.open.values().any(|account| overlaps(account.window));
            if other.unit() == key.quota.unit() && (slot.own || taken()) {
                return None; // Its share of this time is taken in another version.
            }
        }
        if let Some(&held) = self.by_shape.get(&shape) {
            let state = &mut self.keys[held];
            let last = state.open.values().map(|account| account.window.start()).max();
            if last.is_some_and(|last| last > window.start()) {
                return None;
            }
            state.versions.retain(|(from, _)| *from < window.start());
            state.versions.push((window.start(), *key));
            state.set_latest(*key);
            return Some((held, window));
        }
        if self.running_out.len() >= MAX_HELD {
            self.ignored.too_many_keys += 1;
            return None;
        }
        let limit = match limit {
            Some(limit) => limit,
            None => {
                let limit = self.push_limit("(unknown)".into());
                self.by_limit.insert(key.limit, limit);
                limit
            }
        };
        let held = self.push_key(*key, limit, false, Timestamp::ZERO);
        self.running_out.insert(held);
        Some((held, window))
    }

    /// Returns how many quotas are held for peers.
    pub(super) fn held(&self) -> usize {
        self.running_out.iter().filter(|key| !self.keys[**key].own).count()
    }
}
