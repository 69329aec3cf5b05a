//! Who counts in which window: announce, then look.
//!
//! Knows the replicas, from when each counts and is gone, and whom this one still waits
//! for. Must not know amounts, wallets or sockets. The invariant it keeps (A2 of
//! docs/algorithm.md section 1): of two replicas that both have a share in a window, each counts the
//! other. The argument, in one paragraph: a replica registers first and reads the list
//! afterwards, so of two that do, at least one sees the other; the one that sees joins
//! only with the other's answer, and that answer names the first window the other has not
//! frozen yet.
//!
//! Every instant here is a *nominal window start* over all keys, except where a proof of
//! death turns the local clock into one.

mod death;
mod essence;
mod join;
mod report;
mod settings;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::hash::StableHash;
use super::message::{Contact, Member, ReplicaId, RosterMessage, Slot};
use super::quota::Key;
use super::window::{EPSILON, MAX_LEAD, Timestamp, Window};

pub use self::report::{Blocked, ForgetError, Gone, Proof, RosterNote};
pub use self::settings::{Directory, FirstWindow, OnSilence, RosterSettings};

/// The most replicas a roster holds, the dead ones of the last hours among them.
pub const MAX_MEMBERS: usize = 4_096;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Entry {
    slot: Slot,
    /// From which nominal start on I count it.
    counts: Timestamp,
    /// From which nominal start on it takes no share.
    gone: Option<Timestamp>,
    /// From which nominal start on it counts me.
    ack: Option<Timestamp>,
    /// Whether it described its own slot to me, rather than somebody else.
    spoke: bool,
    /// Whether it has echoed a frame I sent after my first look at the directory: it is
    /// the process that runs there now.
    alive_after_look: bool,
    /// Whether its answer named a window too far ahead to be true.
    ahead: bool,
    /// Whether it was noted that it has this replica's node name.
    namesake: bool,
    /// Whether its own floor matters to mine: it may have started after my look.
    floor: Timestamp,
    /// The last revision of its message that I have read.
    seen: u64,
    /// The last revision of my message that it has read.
    seen_of_mine: u64,
    /// When anything new of it came by any path.
    heard: Timestamp,
    /// Since when the headless name has lacked it.
    absent_since: Option<Timestamp>,
}

/// Someone listed at an address where nobody has answered yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Placeholder {
    absent_since: Option<Timestamp>,
    /// From which nominal start on nobody there takes a share: it was forgotten, or the
    /// name lacks it and nobody has answered.
    gone: Option<Timestamp>,
}

impl Placeholder {
    fn counts_in(&self, start: Timestamp) -> bool {
        self.gone.is_none_or(|gone| gone > start)
    }
}

/// The roster of one replica: a state machine of its own, as pure as the ledger around it.
///
/// A [`Ledger`](super::Ledger) drives one; nobody else has to. It is public so that it can
/// be checked by itself, as tests/model.rs does with every reachable state.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Roster {
    me: ReplicaId,
    slot: Slot,
    settings: RosterSettings,
    started: Timestamp,
    members: BTreeMap<ReplicaId, Entry>,
    placeholders: BTreeMap<SocketAddr, Placeholder>,
    /// When the first answer that counts was read.
    looked: Option<Timestamp>,
    /// Addresses of the last answer that counted.
    listed: Vec<SocketAddr>,
    floor: Timestamp,
    /// From which nominal start on I take shares.
    first: Option<Timestamp>,
    /// Before this one I have said that I take none.
    promised: Timestamp,
    /// Latest nominal start frozen here while entitled.
    max_start: Option<Timestamp>,
    leaving: bool,
    gone_me: Option<Timestamp>,
    /// Whom I gave up waiting for and who still has not answered.
    silent_ids: Vec<ReplicaId>,
    silent_addresses: Vec<SocketAddr>,
    /// Before this nominal start I take the smallest share, since I gave up.
    ranked_from: Timestamp,
    /// The last instant at which the directory or a peer confirmed that I exist.
    confirmed: Timestamp,
    watermark: Timestamp,
    /// How far this replica's clock is off its peers' median, in ms, if that is too much.
    clock_off: Option<i64>,
    /// Answers that name a window too far ahead to be true, and whose they were.
    future_answers: u64,
    revision: u64,
    message: Option<Arc<RosterMessage>>,
    notes: Vec<RosterNote>,
}

/// How many replicas count in a window, and this one's place among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// How many replicas count, this one among them; at least one.
    pub replicas: u64,
    /// `None`: no place of its own in the remainder, because this replica gave up
    /// waiting for somebody.
    pub rank: Option<u64>,
}

impl Place {
    /// Returns this replica's share of `amount` (docs/algorithm.md section 2).
    ///
    /// Safe by A2 alone: whoever counts one more replica than the holders has a share no
    /// larger than with the holders only, and those shares sum up to `amount`.
    pub fn share(self, amount: u64) -> u64 {
        match self.rank {
            Some(rank) => (amount + self.replicas - 1 - rank) / self.replicas,
            None => amount / self.replicas,
        }
    }
}

impl Roster {
    /// Returns the roster of a replica that has registered and not looked yet.
    pub fn new(me: ReplicaId, slot: Slot, settings: RosterSettings, now: Timestamp) -> Self {
        Self {
            me,
            slot,
            settings,
            started: now,
            members: BTreeMap::new(),
            placeholders: BTreeMap::new(),
            looked: (settings.directory == Directory::Alone).then_some(now),
            listed: Vec::new(),
            floor: safe_floor(now),
            first: None,
            promised: Timestamp::ZERO,
            max_start: None,
            leaving: false,
            gone_me: None,
            silent_ids: Vec::new(),
            silent_addresses: Vec::new(),
            ranked_from: Timestamp::ZERO,
            confirmed: now,
            watermark: Timestamp::ZERO,
            clock_off: None,
            future_answers: 0,
            revision: 1,
            message: None,
            notes: Vec::new(),
        }
    }

    /// Returns the roster of a replica that belongs to no fleet: it owns every window.
    pub(crate) fn alone(me: ReplicaId, node: &str, now: Timestamp) -> Self {
        let slot = Slot { node: node.into(), addr: SocketAddr::from(([0, 0, 0, 0], 0)), exclusive: false };
        Self { first: Some(Timestamp::ZERO), ..Self::new(me, slot, RosterSettings::default(), now) }
    }

    // Look.

    /// Returns this replica's id.
    pub const fn me(&self) -> ReplicaId {
        self.me
    }

    pub(crate) const fn slot(&self) -> &Slot {
        &self.slot
    }

    pub(crate) const fn directory(&self) -> Directory {
        self.settings.directory
    }

    /// Returns from which nominal start on this replica takes shares, once it has joined.
    pub const fn first(&self) -> Option<Timestamp> {
        self.first
    }

    /// Returns whether [`Roster::leave`] was called.
    pub const fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Returns whether the fleet was told that this replica is dead, which it is not.
    pub const fn is_declared_gone(&self) -> bool {
        self.gone_me.is_some() && !self.leaving
    }

    /// Returns whether the directory has given an answer that counts.
    pub const fn has_looked(&self) -> bool {
        self.looked.is_some()
    }

    /// Returns the replicas other than this one that are not known to be gone.
    pub(crate) fn peers(&self) -> impl Iterator<Item = (ReplicaId, &Slot)> {
        self.members.iter().filter(|(_, entry)| entry.gone.is_none()).map(|(id, entry)| (*id, &entry.slot))
    }

    /// Returns every other replica ever heard of and still remembered, with its end.
    pub fn everybody(&self) -> impl Iterator<Item = (ReplicaId, &Slot, Option<Timestamp>)> {
        self.members.iter().map(|(id, entry)| (*id, &entry.slot, entry.gone))
    }

    pub(crate) fn knows(&self, id: ReplicaId) -> bool {
        id == self.me || self.members.contains_key(&id)
    }

    pub(crate) fn is_gone(&self, id: ReplicaId) -> bool {
        self.members.get(&id).is_some_and(|entry| entry.gone.is_some())
    }

    /// Returns listed addresses at which nobody has answered yet.
    pub fn unresolved(&self) -> impl Iterator<Item = SocketAddr> {
        self.placeholders.iter().filter(|(_, placeholder)| placeholder.gone.is_none()).map(|(address, _)| *address)
    }

    /// Returns how many listed addresses, at which nobody has answered, count in a window
    /// that starts then.
    pub(crate) fn silent_in(&self, start: Timestamp) -> u64 {
        self.placeholders.values().filter(|placeholder| placeholder.counts_in(start)).count() as u64
    }

    /// Returns whether `id` has not read my latest message, or not answered at all.
    pub(crate) fn owes_answer(&self, id: ReplicaId) -> bool {
        let revision = self.revision;
        self.members
            .get(&id)
            .is_some_and(|entry| entry.gone.is_none() && (entry.seen_of_mine < revision || entry.ack.is_none()))
    }

    /// Says whether every peer that could has read my latest message.
    pub(crate) fn everybody_knows(&self, reachable: impl Fn(ReplicaId) -> bool) -> bool {
        self.members
            .iter()
            .all(|(id, entry)| entry.gone.is_some() || !reachable(*id) || entry.seen_of_mine >= self.revision)
    }

    // Handle.

    /// Notes that a frame of `contact.from` was opened.
    pub fn handle_contact(&mut self, contact: &Contact, now: Timestamp) {
        if contact.echo.is_some() {
            self.confirmed = self.confirmed.max(now);
        }
        let looked = self.looked;
        let Some(entry) = self.members.get_mut(&contact.from) else { return };
        entry.heard = entry.heard.max(now);
        if !entry.alive_after_look && looked.is_some_and(|looked| contact.echo.is_some_and(|echo| echo >= looked)) {
            entry.alive_after_look = true;
            self.resolve_placeholders();
        }
    }

    /// Notes that something new of `id` came by any path.
    pub(crate) fn handle_news_of(&mut self, id: ReplicaId, now: Timestamp) {
        if let Some(entry) = self.members.get_mut(&id) {
            entry.heard = entry.heard.max(now);
        }
    }

    /// Takes how far this replica's clock is off the median of its fresh peers, in ms;
    /// `None` if too few are fresh to tell. Beyond epsilon it takes no share: the proofs of
    /// death of everybody else rest on clocks within it.
    pub fn handle_clock(&mut self, off_ms: Option<i64>) {
        let off = off_ms.filter(|off| off.unsigned_abs() > EPSILON.as_millis() as u64);
        if off.is_some() != self.clock_off.is_some() {
            self.notes.push(off.map_or(RosterNote::ClockRight, |off_ms| RosterNote::ClockOff { off_ms }));
        }
        self.clock_off = off;
    }

    /// Returns how many answers were ignored because they named windows too far ahead.
    pub const fn future_answers(&self) -> u64 {
        self.future_answers
    }

    /// Takes a roster message, direct or relayed. Returns whether its sender is owed mine.
    pub fn handle_message(&mut self, message: &RosterMessage, now: Timestamp) -> bool {
        if message.from == self.me {
            return false;
        }
        let Some(own) = message.members.iter().find(|member| member.id == message.from) else {
            return false; // A replica that does not list itself has not said who it is.
        };
        self.watermark = self.watermark.max(message.watermark);
        if !self.learn(message.from, &own.slot, Some(message.floor), now) {
            return false;
        }
        for member in &message.members {
            self.merge_member(member, now);
        }
        let me = self.me;
        let revision = self.revision;
        let mine = message.members.iter().find(|member| member.id == me);
        let Some(entry) = self.members.get_mut(&message.from) else { return false };
        entry.floor = entry.floor.max(message.floor);
        // It has joined, and takes no share of what starts earlier: to count it there would leave
        // that part to nobody (docs/decisions/0014).
        entry.counts = entry.counts.max(own.counts);
        if let Some(mine) = mine {
            // Before I join, what is said of me never changes, so an old message says the same.
            // A holder answers with this replica's own floor, which others may have raised.
            let credible = mine.counts <= latest_answer(now).max(self.floor);
            entry.ahead = entry.ack.is_none() && !credible;
            if credible {
                entry.ack.get_or_insert(mine.counts);
            }
            self.future_answers += u64::from(entry.ahead);
        }
        // An answer that was not believed counts as unread, so that it is repeated; but not
        // at once, or the two would talk without end.
        let news = message.revision > entry.seen && !entry.ahead;
        if news {
            entry.seen = message.revision;
            self.message = None;
        }
        let mut owed = news;
        if let Some(mine) = mine {
            entry.seen_of_mine = entry.seen_of_mine.max(mine.seen.min(revision));
            owed |= mine.seen < revision;
        } else {
            owed = true;
        }
        // It says so with every message, and is to be told of once.
        let namesake = own.slot.node == self.slot.node && own.slot.addr != self.slot.addr && entry.gone.is_none();
        if namesake && !std::mem::replace(&mut entry.namesake, true) {
            let node = Arc::clone(&own.slot.node);
            self.notes.push(RosterNote::DuplicateNode { node, replica: message.from });
        }
        self.prove_by_slot(now);
        self.resolve_placeholders();
        self.settle_silence();
        owed
    }

    /// Joins if nothing is missing, or gives up if the time has come. `running` is the
    /// earliest start of the windows that run now, over all keys.
    pub fn handle_time(&mut self, running: Timestamp, longest: Duration, now: Timestamp) {
        self.join(running, now);
        self.collect_garbage(longest, now);
    }

    // Act.

    /// Freezes the roster of a window for one key and returns this replica's place in it,
    /// or `None` if it is not entitled to a share.
    pub fn freeze(&mut self, key: &Key, window: Window, now: Timestamp) -> Option<Place> {
        let place = self.place(key, window, now)?;
        self.max_start = self.max_start.max(Some(window.start()));
        Some(place)
    }

    /// Says whether a window that starts then, or later, has been frozen here for some key: were
    /// this replica to leave, it would still count in every window up to that start.
    pub(crate) fn has_frozen(&self, start: Timestamp) -> bool {
        self.max_start >= Some(start)
    }

    /// Says whether a window starts before this replica's first: it has no share in it, now
    /// or later.
    pub(crate) fn is_too_early(&self, window: Window) -> bool {
        self.first.is_some_and(|first| window.start() < first)
    }

    /// Returns the place that freezing a window now would give.
    pub(crate) fn place(&self, key: &Key, window: Window, now: Timestamp) -> Option<Place> {
        let start = window.start();
        let entitled = self.first.is_some_and(|first| start >= first)
            && self.gone_me.is_none_or(|gone| start < gone)
            && !self.leaving
            && self.clock_off.is_none()
            && !self.is_fenced(now);
        if !entitled {
            return None;
        }
        let mine = order(self.me.bits(), key, window);
        let mut replicas = 1;
        let mut rank = 0;
        for (id, entry) in &self.members {
            if entry.counts <= start && entry.gone.is_none_or(|gone| gone > start) {
                replicas += 1;
                rank += u64::from((order(id.bits(), key, window), *id) < (mine, self.me));
            }
        }
        let silent = self.silent_in(start);
        replicas += silent;
        let ranked = silent == 0 && self.silent_ids.is_empty() && start >= self.ranked_from;
        Some(Place { replicas, rank: ranked.then_some(rank) })
    }

    /// Leaves: no share from the next unfrozen window on. Once, irrevocable.
    pub fn leave(&mut self) {
        if !self.leaving {
            self.leaving = true;
            let gone = self.unfrozen();
            self.gone_me = Some(self.gone_me.map_or(gone, |known| known.min(gone)));
            self.changed();
        }
    }

    /// Returns the one roster message, as it stands now.
    pub fn message(&mut self) -> Arc<RosterMessage> {
        if let Some(message) = &self.message {
            return Arc::clone(message);
        }
        let mut members: Vec<Member> = self
            .members
            .iter()
            .map(|(id, entry)| Member {
                id: *id,
                slot: entry.slot.clone(),
                counts: entry.counts,
                gone: entry.gone,
                seen: entry.seen,
            })
            .collect();
        let me = Member {
            id: self.me,
            slot: self.slot.clone(),
            counts: self.first.unwrap_or(Timestamp::ZERO),
            gone: self.gone_me,
            seen: self.revision,
        };
        let place = members.partition_point(|member| member.id < self.me);
        members.insert(place, me);
        let message = Arc::new(RosterMessage {
            from: self.me,
            revision: self.revision,
            floor: self.floor,
            watermark: self.watermark,
            members,
        });
        self.message = Some(Arc::clone(&message));
        message
    }

    // Poll.

    pub(crate) fn take_notes(&mut self) -> Vec<RosterNote> {
        std::mem::take(&mut self.notes)
    }

    // Behind the door.

    fn is_full(&self) -> bool {
        self.members.len() + 1 >= MAX_MEMBERS
    }

    /// The first nominal start not yet frozen here.
    fn unfrozen(&self) -> Timestamp {
        self.max_start.map_or(Timestamp::ZERO, Timestamp::next)
    }

    /// `learn(j)`: on any mention, from then on j counts. Returns whether it is known.
    ///
    /// `floor` is the floor of a replica that speaks for itself. It joins no earlier than
    /// every answer it gets, and its floor never falls below what it has said; so a holder
    /// need not count it in windows before that floor, which would be a share for nobody.
    fn learn(&mut self, id: ReplicaId, slot: &Slot, floor: Option<Timestamp>, now: Timestamp) -> bool {
        let itself = floor.is_some();
        if id == self.me {
            return false;
        }
        if let Some(entry) = self.members.get_mut(&id) {
            if itself && !entry.spoke {
                entry.spoke = true;
                entry.slot = slot.clone();
                self.changed();
            }
            return true;
        }
        // A mention of somebody long dead must not bring it back: its `gone` has been
        // forgotten. Whoever speaks for itself is alive.
        if !itself && id.started() < self.watermark {
            return false;
        }
        if self.is_full() {
            self.note_once(RosterNote::Full);
            return false;
        }
        let holder = self.first.is_some();
        let counts = self.unfrozen().max(floor.filter(|_| holder).unwrap_or(Timestamp::ZERO));
        self.members.insert(
            id,
            Entry {
                slot: slot.clone(),
                counts,
                gone: None,
                ack: None,
                spoke: itself,
                alive_after_look: false,
                ahead: false,
                namesake: false,
                floor: Timestamp::ZERO,
                seen: 0,
                seen_of_mine: 0,
                heard: now,
                absent_since: None,
            },
        );
        self.changed();
        true
    }

    fn merge_member(&mut self, member: &Member, now: Timestamp) {
        if member.id == self.me {
            if let Some(gone) = member.gone.filter(|gone| self.gone_me.is_none_or(|known| *gone < known)) {
                // Others already count without me from there on. To go on taking shares
                // would put the sum over the limit.
                self.gone_me = Some(gone);
                if !self.leaving {
                    self.notes.push(RosterNote::DeclaredGone);
                }
                self.changed();
            }
            return;
        }
        // Whoever speaks for itself was learnt before its mentions, with its floor.
        if !self.learn(member.id, &member.slot, None, now) {
            return;
        }
        if let Some(gone) = member.gone {
            self.declare_gone(member.id, gone, Proof::Told);
        }
    }

    fn changed(&mut self) {
        self.revision += 1;
        self.message = None;
    }

    fn note_once(&mut self, note: RosterNote) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }
}

/// The first nominal start that nobody who is dead by `now` can have frozen: a dead
/// replica's clock was at most epsilon ahead and froze at most the longest lead ahead of
/// it, and mine is at most epsilon behind.
fn safe_floor(now: Timestamp) -> Timestamp {
    now.plus(MAX_LEAD + EPSILON * 2).next()
}

/// The latest window start an honest peer can name: its clock is at most twice epsilon
/// ahead of mine, and it froze at most the longest lead ahead of that.
fn latest_answer(now: Timestamp) -> Timestamp {
    now.plus(MAX_LEAD + EPSILON * 2).next()
}

/// A replica's place in the order of a window: the same on every replica and in every
/// version of the quota, and another one in every window.
fn order(id: u128, key: &Key, window: Window) -> u64 {
    let mut hash = StableHash::new();
    hash.write_u64(id as u64);
    hash.write_u64((id >> 64) as u64);
    hash.write_u64(key.limit.bits());
    hash.write_u64(key.quota.unit() as u64);
    hash.write_u64(window.start().unix_ms());
    hash.finish()
}
