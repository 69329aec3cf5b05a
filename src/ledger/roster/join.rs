//! Looking at the directory, waiting for answers, joining, giving up.
//!
//! Knows who is listed and who has answered. Must not know how a death is proven. The
//! invariant it keeps: `first` is set when everybody in the roster has said from which window on
//! it counts this replica, or is gone, or was given up visibly; and it never falls.

use std::net::SocketAddr;

use super::report::{Blocked, RosterNote};
use super::settings::{Directory, FirstWindow, OnSilence};
use super::{MAX_MEMBERS, Roster, safe_floor};
use crate::ledger::message::ReplicaId;
use crate::ledger::window::{EPSILON, Timestamp};

/// From how many members on a roster is shown to be near what one message carries: 64
/// fragments, which hold 1,020 members with names of 24 bytes and 880 with names of 41.
const CROWDED: usize = 700;

impl Roster {
    /// Returns who keeps this replica from its share, or costs it a part.
    pub fn blocked(&self) -> Vec<Blocked> {
        let mut blocked = Vec::new();
        if !self.has_looked() {
            blocked.push(Blocked {
                who: self.slot.addr.to_string(),
                why: "the directory has not yet given an answer that lists this replica".into(),
                resolve: "check that the headless name or the seeds contain this replica's advertise address".into(),
            });
        }
        for address in self.unresolved() {
            blocked.push(Blocked {
                who: address.to_string(),
                why: "listed, but no replica has ever answered there".into(),
                resolve: format!("start it, remove it from the list, or: quotum forget {address}"),
            });
        }
        for (id, entry) in &self.members {
            let waits = self.first.is_none() || self.silent_ids.contains(id);
            if waits && entry.ack.is_none() && entry.gone.is_none() {
                blocked.push(Blocked {
                    who: id.to_string(),
                    why: if entry.ahead {
                        format!("{} at {} has a clock too far ahead to be believed", entry.slot.node, entry.slot.addr)
                    } else {
                        format!("{} at {} has not answered this replica", entry.slot.node, entry.slot.addr)
                    },
                    resolve: if entry.ahead {
                        format!("set the clock of {} and restart it", entry.slot.node)
                    } else {
                        format!("if it is dead: quotum forget {id}")
                    },
                });
            }
        }
        for address in self.unlisted() {
            blocked.push(Blocked {
                who: address.to_string(),
                why: "a live replica that the static list of seeds does not name".into(),
                resolve: format!("add {address} to gossip.seeds of every replica"),
            });
        }
        if self.members.len() >= CROWDED && !self.is_full() {
            let gone = self.members.values().filter(|entry| entry.gone.is_some()).count();
            blocked.push(Blocked {
                who: self.me.to_string(),
                why: format!(
                    "{} replicas are remembered, {gone} of them gone; a roster of about 1,000 is more than one \
                    message carries, and then no newcomer is answered",
                    self.members.len()
                ),
                resolve: "replace pods less often: the gone are forgotten an hour and a longest window later".into(),
            });
        }
        if let Some(off_ms) = self.clock_off {
            blocked.push(Blocked {
                who: self.me.to_string(),
                why: format!("this replica's clock is {off_ms} ms off the median of its peers: it takes no share"),
                resolve: "set this machine's clock (NTP)".into(),
            });
        }
        if self.is_declared_gone() {
            blocked.push(Blocked {
                who: self.me.to_string(),
                why: "the fleet has been told that this replica is dead; it takes no further share".into(),
                resolve: "restart this process: it comes back under a new id".into(),
            });
        }
        if self.is_full() {
            blocked.push(Blocked {
                who: self.me.to_string(),
                why: format!("the roster holds {MAX_MEMBERS} replicas: no newcomer is learnt, so none can join"),
                resolve:
                    "if they are alive: split the fleet (gossip.cluster); if not: restart pods less often, the dead \
                    are dropped an hour after their last window"
                        .into(),
            });
        }
        blocked
    }

    /// Takes an answer of the directory: every listed address, this replica's among them.
    pub fn handle_listing(&mut self, addresses: &[SocketAddr], now: Timestamp) {
        if self.settings.directory == Directory::Alone {
            return;
        }
        if !addresses.contains(&self.slot.addr) {
            // Not a look *after* the announcement: it may be older than my registration.
            self.note_once(RosterNote::NotListed);
            return;
        }
        self.confirmed = self.confirmed.max(now);
        self.listed = addresses.to_vec();
        if self.looked.is_none() {
            self.looked = Some(now);
            self.floor = safe_floor(now);
            self.changed();
        }
        if self.first.is_none() || self.wait_again(addresses, now) {
            self.expect_listed(addresses);
        }
        if self.settings.directory == Directory::Name {
            self.look_again(addresses, now);
            self.prove_absence(addresses, now);
        }
    }

    /// Takes back having joined, if this answer lists somebody that the first did not and the
    /// first window has not begun. My own address in the first answer says that it is no older
    /// than this process only if no other process had the address before: else it may have been
    /// too old to list whoever started since (docs/decisions/0015).
    fn wait_again(&mut self, addresses: &[SocketAddr], now: Timestamp) -> bool {
        let Some(first) = self.first else { return false };
        let has_begun = now >= first || self.max_start >= Some(first);
        let is_news = |address: &SocketAddr| {
            let is_known = self.members.values().any(|entry| entry.slot.addr == *address);
            *address != self.slot.addr && !is_known && !self.placeholders.contains_key(address)
        };
        if self.settings.directory != Directory::Name || has_begun || self.leaving || !addresses.iter().any(is_news) {
            return false;
        }
        self.promised = first;
        self.first = None;
        self.changed();
        true
    }

    /// Before joining, every listed address is expected to answer.
    pub(super) fn expect_listed(&mut self, addresses: &[SocketAddr]) {
        for address in addresses {
            let answered =
                self.members.values().any(|entry| entry.spoke && entry.alive_after_look && entry.slot.addr == *address);
            if *address != self.slot.addr && !answered && self.placeholders.len() < MAX_MEMBERS {
                self.placeholders.entry(*address).or_default();
            }
        }
    }

    /// A newer answer is a look as good as the first, if the floor is read with it. It is
    /// trusted only where two sources agree: the name no longer lists the address, and the
    /// replica known to have run there is gone. So a pod that left while this one started
    /// does not hold it up.
    pub(super) fn look_again(&mut self, addresses: &[SocketAddr], now: Timestamp) {
        if self.first.is_some() {
            return;
        }
        let left: Vec<SocketAddr> = self
            .unresolved()
            .filter(|address| {
                let mut there = self.members.values().filter(|entry| entry.slot.addr == *address).peekable();
                !addresses.contains(address) && there.peek().is_some() && there.all(|entry| entry.gone.is_some())
            })
            .collect();
        for address in left {
            self.dismiss(address, now);
        }
    }

    /// The id that answers at a listed address takes the placeholder's place.
    pub(super) fn resolve_placeholders(&mut self) {
        if self.placeholders.is_empty() {
            return;
        }
        let Some(looked) = self.looked else { return };
        for (id, entry) in &self.members {
            if entry.spoke && entry.alive_after_look && self.placeholders.remove(&entry.slot.addr).is_some() {
                // If it started after my look, another process may have run there before
                // and frozen windows up to the later one's floor (J3). Its clock may be
                // off by epsilon in either direction.
                if id.started().plus(EPSILON * 2) >= looked {
                    self.floor = self.floor.max(entry.floor);
                }
                if let Some(place) = self.silent_addresses.iter().position(|silent| *silent == entry.slot.addr) {
                    self.silent_addresses.swap_remove(place);
                    self.silent_ids.push(*id);
                }
            }
        }
        self.settle_silence();
    }

    pub(super) fn join(&mut self, running: Timestamp, now: Timestamp) {
        if self.first.is_some() || self.leaving || !self.has_looked() {
            return;
        }
        let missing: Vec<ReplicaId> = self
            .members
            .iter()
            .filter(|(_, entry)| entry.ack.is_none() && entry.gone.is_none())
            .map(|(id, _)| *id)
            .collect();
        let complete = missing.is_empty() && self.unresolved().next().is_none() && self.unlisted().is_empty();
        if complete {
            // Everybody listed answered for itself and nobody has died: the fleet is
            // cold, or the answers name windows that start later anyway.
            let admitted = self.settings.first_window == FirstWindow::Admit
                && self.placeholders.is_empty()
                && self.members.values().all(|entry| entry.ack.is_some() && entry.gone.is_none());
            if admitted {
                self.floor = running;
            }
        } else {
            let given_up =
                self.settings.on_silence == OnSilence::FairShare && now.since(self.started) >= self.settings.patience;
            if !given_up {
                return;
            }
            // The floor is read now, not at the start: whoever is silent may have died
            // at any moment since (J2).
            self.floor = self.floor.max(safe_floor(now));
            self.notes.push(RosterNote::GaveUp {
                silent: missing
                    .iter()
                    .map(ToString::to_string)
                    .chain(self.unresolved().map(|address| address.to_string()))
                    .collect(),
            });
            self.silent_ids = missing;
            self.silent_addresses = self.unresolved().collect();
        }
        let dismissed = self.placeholders.values().filter_map(|placeholder| placeholder.gone);
        let known = self.members.values().flat_map(|entry| [entry.ack, entry.gone]).flatten().chain(dismissed);
        let first = known.fold(self.floor.max(self.unfrozen()).max(self.promised), Timestamp::max);
        self.first = Some(first);
        self.notes.push(RosterNote::Joined { first });
        self.changed();
    }

    /// Whoever I gave up on and who has answered or is gone since no longer costs me my
    /// place, from the window on in which it counts me.
    pub(super) fn settle_silence(&mut self) {
        let members = &self.members;
        let mut ranked_from = self.ranked_from;
        self.silent_ids.retain(|id| match members.get(id).map(|entry| (entry.ack.or(entry.gone), entry.floor)) {
            Some((None, _)) => true,
            Some((Some(counts_me), floor)) => {
                // Its floor is beyond everything an earlier process at its address froze.
                ranked_from = ranked_from.max(counts_me).max(floor);
                false
            }
            None => false,
        });
        self.ranked_from = ranked_from;
    }

    /// Live replicas that a static list does not name: the list is not complete, so
    /// nobody may conclude anything from it.
    pub(super) fn unlisted(&self) -> Vec<SocketAddr> {
        if self.settings.directory != Directory::Static || self.looked.is_none() {
            return Vec::new();
        }
        self.members
            .values()
            .filter(|entry| entry.spoke && entry.gone.is_none() && !self.listed.contains(&entry.slot.addr))
            .map(|entry| entry.slot.addr)
            .collect()
    }
}
