//! Proofs that a replica is gone, and what follows from them.
//!
//! Knows what proves a death (docs/algorithm.md section 3) and from which window on the dead takes no
//! share. Must not know shares or amounts. The invariant it keeps: `gone` only falls, and
//! lies after every window that the dead can have frozen. Silence alone proves nothing.

use std::net::SocketAddr;
use std::time::Duration;

use super::report::{Blocked, ForgetError, Gone, Proof, RosterNote};
use super::settings::Directory;
use super::{Entry, Roster, safe_floor};
use crate::ledger::message::{ReplicaId, Slot};
use crate::ledger::window::{EPSILON, Timestamp};

/// How long a gone replica is remembered beyond the longest window.
const REMEMBER_GONE: Duration = Duration::from_secs(3_600);

impl Roster {
    /// Declares dead the replica with this id, or whoever is listed at this address and
    /// never answered. Returns what was forgotten.
    ///
    /// # Errors
    /// Says why nothing was changed.
    pub fn forget(&mut self, target: &str, now: Timestamp) -> Result<String, ForgetError> {
        if let Some(id) = ReplicaId::parse(target) {
            if id == self.me {
                return Err(ForgetError::Myself);
            }
            if !self.members.contains_key(&id) {
                return Err(ForgetError::Unknown(target.to_owned()));
            }
            self.declare_gone(id, safe_floor(now), Proof::Forgotten);
            return Ok(id.to_string());
        }
        let address: SocketAddr = target.parse().map_err(|_| ForgetError::NotATarget(target.to_owned()))?;
        if !self.dismiss(address, now) {
            return Err(ForgetError::Unknown(target.to_owned()));
        }
        Ok(address.to_string())
    }

    /// Takes a proof of the platform. Of itself no replica believes one that does not come
    /// from a peer: it runs.
    pub fn handle_gone(&mut self, gone: &Gone, now: Timestamp) {
        let at = safe_floor(now);
        match gone {
            Gone::Replica(id) => self.declare_gone(*id, at, Proof::Platform),
            Gone::Address { addr, started_by } => {
                // Ids bear their own clock, which may be off by epsilon, as may the platform's.
                let ended = |id: &ReplicaId| id.started().plus(EPSILON * 2) <= *started_by;
                let there = self.members.iter().filter(|(id, entry)| entry.slot.addr == *addr && ended(id));
                let ended: Vec<ReplicaId> = there.map(|(id, _)| *id).collect();
                for id in ended {
                    self.declare_gone(id, at, Proof::Platform);
                }
                // While it is listed, a later process may be the one that is waited for.
                if !self.listed.contains(addr) {
                    self.dismiss(*addr, now);
                }
            }
        }
    }

    /// `gone[d] := min(gone[d], at)`.
    pub(super) fn declare_gone(&mut self, id: ReplicaId, at: Timestamp, proof: Proof) {
        let Some(entry) = self.members.get_mut(&id) else { return };
        if entry.gone.is_none_or(|known| at < known) {
            if entry.gone.is_none() {
                self.notes.push(RosterNote::Gone { replica: id, proof });
            }
            entry.gone = Some(at);
            self.changed();
            self.settle_silence();
        }
    }

    /// Whoever else was in this replica's exclusive slot has died there: this one runs there
    /// now. Only the process itself concludes so, and tells the others. Ids say nothing about
    /// who came later: the clock of a slot may step back between two processes, and still be
    /// within epsilon of the truth all the time.
    pub(super) fn prove_by_slot(&mut self, now: Timestamp) {
        let at = safe_floor(now);
        // By ids 2 epsilon apart the order is certain: never a successor, should this process
        // have lost its socket and not noticed yet.
        let latest = self.me.started().plus(EPSILON * 2);
        let died: Vec<ReplicaId> = (self.members.iter())
            .filter(|(id, entry)| entry.gone.is_none() && self.slot.excludes(&entry.slot) && id.started() <= latest)
            .map(|(id, _)| *id)
            .collect();
        for id in died {
            self.declare_gone(id, at, Proof::SameSlot);
        }
    }

    /// Nobody will answer at this address any more. Whoever ran there may have frozen
    /// windows up to now, as with a proven death. Returns whether somebody was expected.
    pub(super) fn dismiss(&mut self, address: SocketAddr, now: Timestamp) -> bool {
        let Some(placeholder) = self.placeholders.get_mut(&address).filter(|placeholder| placeholder.gone.is_none())
        else {
            return false;
        };
        placeholder.gone = Some(safe_floor(now));
        self.changed();
        true
    }

    /// Missing from the headless name, for long enough and with nothing new from it, is
    /// taken as a proof that a replica is gone (docs/algorithm.md section 3 e).
    pub(super) fn prove_absence(&mut self, addresses: &[SocketAddr], now: Timestamp) {
        let is_listed = |slot: &Slot| addresses.contains(&slot.addr);
        let fresh = now.minus(self.settings.absent_for);
        let live_peer_listed =
            self.members.values().any(|entry| entry.gone.is_none() && is_listed(&entry.slot) && entry.heard > fresh);
        let all_absent_and_silent = self
            .members
            .values()
            .filter(|entry| entry.gone.is_none())
            .all(|entry| !is_listed(&entry.slot) && entry.heard <= fresh);
        let may_prove = live_peer_listed || all_absent_and_silent;
        let mut gone = Vec::new();
        for (id, entry) in &mut self.members {
            if entry.gone.is_some() || is_listed(&entry.slot) {
                entry.absent_since = None;
                continue;
            }
            let since = *entry.absent_since.get_or_insert(now);
            if may_prove && now.since(since.max(entry.heard)) >= self.settings.absent_for {
                gone.push(*id);
            }
        }
        for id in gone {
            self.declare_gone(id, safe_floor(now), Proof::Absent);
        }
        let absent_for = self.settings.absent_for;
        let mut absent = Vec::new();
        for (address, placeholder) in &mut self.placeholders {
            if addresses.contains(address) {
                placeholder.absent_since = None;
            } else if now.since(*placeholder.absent_since.get_or_insert(now)) >= absent_for {
                absent.push(*address);
            }
        }
        for address in absent {
            self.dismiss(address, now);
        }
    }

    /// Behind a headless name, a replica that neither the name nor any peer has confirmed
    /// for half of `absent_for` must expect to be declared gone (docs/algorithm.md section 1).
    pub(super) fn is_fenced(&self, now: Timestamp) -> bool {
        self.settings.directory == Directory::Name && now.since(self.confirmed) >= self.settings.absent_for / 2
    }

    /// Says that this replica is fenced, if it is.
    pub(in crate::ledger) fn fenced(&self, now: Timestamp) -> Option<Blocked> {
        let why = || {
            format!(
                "no answer of the headless name and no peer has confirmed it for {:?}",
                self.settings.absent_for / 2
            )
        };
        self.is_fenced(now).then(|| Blocked {
            who: self.me.to_string(),
            why: why() + ": it takes no further share, because others may take it for gone",
            resolve: format!(
                "let the name list {} again, or let UDP through between the pods; it goes on by itself",
                self.slot.addr
            ),
        })
    }

    pub(super) fn collect_garbage(&mut self, longest: Duration, now: Timestamp) {
        self.placeholders.retain(|_, placeholder| placeholder.gone.is_none_or(|gone| gone.plus(longest) > now));
        let keep = longest + REMEMBER_GONE;
        // Who leaves before it ever froze a window is gone from the epoch on; it must be
        // remembered all the same, or its next mention would bring it back.
        let expired = |entry: &Entry| entry.gone.is_some_and(|gone| gone.max(entry.heard).plus(keep) <= now);
        if !self.members.values().any(expired) {
            return;
        }
        let watermark =
            self.members.iter().filter(|(_, entry)| expired(entry)).map(|(id, _)| id.started().next()).max();
        self.members.retain(|_, entry| !expired(entry));
        self.watermark = self.watermark.max(watermark.unwrap_or_default());
        self.changed();
    }
}
