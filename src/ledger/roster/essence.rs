//! What of a roster still decides anything.
//!
//! Knows which parts of a roster matter to no share and no instant in a message any more.
//! Must not know who searches. The invariant it keeps: as long as `absent_for` and the
//! memory of the gone do not run out, a roster and its essence take the same shares and send
//! the same messages, but for their revisions, whatever comes.

use super::settings::Directory;
use super::{Entry, Placeholder, Roster};
use crate::ledger::window::Timestamp;

impl Roster {
    /// Returns the same roster without what no longer decides anything: revisions, what was
    /// read of whom and when it was heard, notes, counters, and, once it has joined, how it did.
    ///
    /// Of the many rosters that differ in nothing else, a search through all reachable
    /// states visits this one.
    #[must_use]
    pub fn essence(&self) -> Self {
        let joined = self.first.is_some() && self.silent_ids.is_empty() && self.placeholders.is_empty();
        let entry = |entry: &Entry| Entry {
            // An answer is read once, to join or to be counted again.
            ack: if joined { None } else { entry.ack },
            alive_after_look: joined || entry.alive_after_look,
            floor: if joined { Timestamp::ZERO } else { entry.floor },
            ahead: false,
            namesake: false,
            seen: 0,
            seen_of_mine: 0,
            heard: self.started,
            absent_since: None,
            ..entry.clone()
        };
        let placeholder = |placeholder: &Placeholder| Placeholder { absent_since: None, ..*placeholder };
        Self {
            members: self.members.iter().map(|(id, known)| (*id, entry(known))).collect(),
            placeholders: self.placeholders.iter().map(|(address, silent)| (*address, placeholder(silent))).collect(),
            looked: if joined { Some(self.started) } else { self.looked },
            listed: if self.settings.directory == Directory::Static { self.listed.clone() } else { Vec::new() },
            confirmed: self.started,
            future_answers: 0,
            revision: 1,
            message: None,
            notes: Vec::new(),
            ..self.clone()
        }
    }
}
