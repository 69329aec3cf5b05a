//! Who counts in which window: announce, then look.
//!
//! Knows the replicas, from when each counts and is gone, and whom this one still waits
//! for. Must not know amounts, wallets or sockets. The invariant it keeps (A2 of
//! algorithm.md 0.1): of two replicas that both have a share in a window, each counts the
//! other. The argument, in one paragraph: a replica registers first and reads the list
//! afterwards, so of two that do, at least one sees the other; the one that sees joins
//! only with the other's answer, and that answer names the first window the other has not
//! frozen yet.
//!
//! Every instant here is a *nominal window start* over all keys, except where a proof of
//! death turns the local clock into one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::message::{Contact, Member, ReplicaId, RosterMessage, Slot};
use super::quota::{Key, StableHash};
use super::window::{EPSILON, MAX_LEAD, Timestamp, Window};

/// The most replicas a roster holds, the dead ones of the last hours among them.
pub const MAX_MEMBERS: usize = 4_096;

/// How long a gone replica is remembered beyond the longest window.
const REMEMBER_GONE: Duration = Duration::from_secs(3_600);

/// What lists the replicas (algorithm.md 0.1, Directories).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Directory {
    /// Nothing: this replica is alone.
    #[default]
    Alone,
    /// A list that names every replica, this one among them; complete by construction.
    Static,
    /// A headless name: an answer counts only if it contains this replica's address.
    Name,
}

/// What a newcomer does about a listed replica that never answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnSilence {
    /// Joins without it after `patience`, with at most L/n over if it is alive after all.
    #[default]
    FairShare,
    /// Waits for ever, visibly.
    Closed,
}

/// What a replica takes of the window that runs when it starts and nobody else knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FirstWindow {
    /// A share, once everybody listed has answered: a cold start serves at once, and a
    /// restart of the whole fleet inside one window may spend up to L again.
    #[default]
    Admit,
    /// Nothing: zero over even then, at the price of up to one closed window.
    Wait,
}

/// The rules a roster follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RosterSettings {
    /// What lists the replicas.
    pub directory: Directory,
    /// How long a replica must be missing from the headless name to be proven gone.
    pub absent_for: Duration,
    /// What to do about silence.
    pub on_silence: OnSilence,
    /// How long to wait before giving up, from this replica's start.
    pub patience: Duration,
    /// What to take of the first window.
    pub first_window: FirstWindow,
}

impl Default for RosterSettings {
    fn default() -> Self {
        Self {
            directory: Directory::Alone,
            absent_for: Duration::from_secs(300),
            on_silence: OnSilence::FairShare,
            patience: Duration::from_secs(30),
            first_window: FirstWindow::Admit,
        }
    }
}

/// What happened to the roster that an operator may want to know.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RosterNote {
    /// This replica has joined: it takes shares of windows that start at or after this.
    Joined {
        /// The first such window start.
        first: Timestamp,
    },
    /// This replica stopped waiting for these and joined with the smallest share.
    GaveUp {
        /// Whom it no longer waits for.
        silent: Vec<String>,
    },
    /// A replica is proven dead.
    Gone {
        /// Which.
        replica: ReplicaId,
        /// What proves it.
        proof: Proof,
    },
    /// Somebody has declared this replica dead: it takes no further share.
    DeclaredGone,
    /// Two live replicas use one node name.
    DuplicateNode {
        /// The name.
        node: Arc<str>,
        /// The other one.
        replica: ReplicaId,
    },
    /// The directory's answer does not contain this replica's own address.
    NotListed,
    /// The roster is full: the newcomer is not learnt, so it cannot join.
    Full,
}

/// Why a replica counts as dead (algorithm.md 0.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Proof {
    /// It said goodbye.
    Goodbye,
    /// A later process runs in the same exclusive slot.
    SameSlot,
    /// It was missing from the headless name for `absent_for`.
    Absent,
    /// An operator said so.
    Forgotten,
}

/// Who keeps this replica from its share, and how to resolve it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// The replica's id, or the address nobody has answered at.
    pub who: String,
    /// What is missing.
    pub why: String,
    /// The command or change that resolves it.
    pub resolve: String,
}

#[derive(Clone, Debug)]
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
#[derive(Clone, Copy, Debug, Default)]
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

/// The roster of one replica.
#[derive(Debug)]
pub(crate) struct Roster {
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
    revision: u64,
    message: Option<Arc<RosterMessage>>,
    notes: Vec<RosterNote>,
}

/// How many replicas count in a window, and this one's place among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) replicas: u64,
    /// `None`: no place of its own in the remainder, because this replica gave up
    /// waiting for somebody.
    pub(crate) rank: Option<u64>,
}

impl Place {
    /// Returns this replica's share of `amount` (algorithm.md 0.2).
    ///
    /// Safe by A2 alone: whoever counts one more replica than the holders has a share no
    /// larger than with the holders only, and those shares sum up to `amount`.
    pub(crate) fn share(self, amount: u64) -> u64 {
        match self.rank {
            Some(rank) => (amount + self.replicas - 1 - rank) / self.replicas,
            None => amount / self.replicas,
        }
    }
}

impl Roster {
    /// Returns the roster of a replica that has registered and not looked yet.
    pub(crate) fn new(me: ReplicaId, slot: Slot, settings: RosterSettings, now: Timestamp) -> Self {
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
            max_start: None,
            leaving: false,
            gone_me: None,
            silent_ids: Vec::new(),
            silent_addresses: Vec::new(),
            ranked_from: Timestamp::ZERO,
            confirmed: now,
            watermark: Timestamp::ZERO,
            revision: 1,
            message: None,
            notes: Vec::new(),
        }
    }

    /// Returns the roster of a replica that belongs to no fleet: it owns every window.
    pub(crate) fn alone(me: ReplicaId, now: Timestamp) -> Self {
        let slot = Slot { node: "".into(), addr: SocketAddr::from(([0, 0, 0, 0], 0)), exclusive: false };
        Self { first: Some(Timestamp::ZERO), ..Self::new(me, slot, RosterSettings::default(), now) }
    }

    // Look.

    pub(crate) const fn me(&self) -> ReplicaId {
        self.me
    }

    pub(crate) const fn slot(&self) -> &Slot {
        &self.slot
    }

    pub(crate) const fn directory(&self) -> Directory {
        self.settings.directory
    }

    pub(crate) const fn first(&self) -> Option<Timestamp> {
        self.first
    }

    pub(crate) const fn is_leaving(&self) -> bool {
        self.leaving
    }

    pub(crate) const fn has_looked(&self) -> bool {
        self.looked.is_some()
    }

    /// Returns the replicas other than this one that are not known to be gone.
    pub(crate) fn peers(&self) -> impl Iterator<Item = (ReplicaId, &Slot)> {
        self.members.iter().filter(|(_, entry)| entry.gone.is_none()).map(|(id, entry)| (*id, &entry.slot))
    }

    /// Returns every other replica ever heard of and still remembered, with its end.
    pub(crate) fn everybody(&self) -> impl Iterator<Item = (ReplicaId, &Slot, Option<Timestamp>)> {
        self.members.iter().map(|(id, entry)| (*id, &entry.slot, entry.gone))
    }

    pub(crate) fn knows(&self, id: ReplicaId) -> bool {
        id == self.me || self.members.contains_key(&id)
    }

    pub(crate) fn is_gone(&self, id: ReplicaId) -> bool {
        self.members.get(&id).is_some_and(|entry| entry.gone.is_some())
    }

    /// Returns listed addresses at which nobody has answered yet.
    pub(crate) fn unresolved(&self) -> impl Iterator<Item = SocketAddr> {
        self.placeholders.iter().filter(|(_, placeholder)| placeholder.gone.is_none()).map(|(address, _)| *address)
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

    /// Returns who keeps this replica from its share, or costs it a part.
    pub(crate) fn blocked(&self) -> Vec<Blocked> {
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
                    why: format!("{} at {} has not answered this replica", entry.slot.node, entry.slot.addr),
                    resolve: format!("if it is dead: quotum forget {id}"),
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
        if self.gone_me.is_some() && !self.leaving {
            blocked.push(Blocked {
                who: self.me.to_string(),
                why: "the fleet has been told that this replica is dead; it takes no further share".into(),
                resolve: "restart this process: it comes back under a new id".into(),
            });
        }
        blocked
    }

    // Handle.

    /// Takes an answer of the directory: every listed address, this replica's among them.
    pub(crate) fn handle_listing(&mut self, addresses: &[SocketAddr], now: Timestamp) {
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
        if self.first.is_none() {
            self.expect_listed(addresses);
        }
        if self.settings.directory == Directory::Name {
            self.look_again(addresses, now);
            self.prove_absence(addresses, now);
        }
    }

    /// Notes that a frame of `contact.from` was opened.
    pub(crate) fn handle_contact(&mut self, contact: &Contact, now: Timestamp) {
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

    /// Takes a roster message, direct or relayed. Returns whether its sender is owed mine.
    pub(crate) fn handle_message(&mut self, message: &RosterMessage, now: Timestamp) -> bool {
        if message.from == self.me {
            return false;
        }
        let Some(own) = message.members.iter().find(|member| member.id == message.from) else {
            return false; // A replica that does not list itself has not said who it is.
        };
        self.watermark = self.watermark.max(message.watermark);
        if !self.learn(message.from, &own.slot, true, now) {
            return false;
        }
        for member in &message.members {
            self.merge_member(member, message.from, now);
        }
        let me = self.me;
        let revision = self.revision;
        let mine = message.members.iter().find(|member| member.id == me);
        let Some(entry) = self.members.get_mut(&message.from) else { return false };
        let news = message.revision > entry.seen;
        if news {
            entry.seen = message.revision;
            self.message = None;
        }
        let entry = self.members.get_mut(&message.from).expect("looked up above");
        entry.floor = entry.floor.max(message.floor);
        let mut owed = news;
        if let Some(mine) = mine {
            // `counts` never changes once said, so an old message says the same.
            entry.ack.get_or_insert(mine.counts);
            entry.seen_of_mine = entry.seen_of_mine.max(mine.seen.min(revision));
            owed |= mine.seen < revision;
        } else {
            owed = true;
        }
        self.prove_by_slot(message.from, &own.slot, now);
        self.resolve_placeholders();
        self.settle_silence();
        owed
    }

    /// Joins if nothing is missing, or gives up if the time has come. `running` is the
    /// earliest start of the windows that run now, over all keys.
    pub(crate) fn handle_time(&mut self, running: Timestamp, longest: Duration, now: Timestamp) {
        self.join(running, now);
        self.collect_garbage(longest, now);
    }

    // Act.

    /// Freezes the roster of a window for one key and returns this replica's place in it,
    /// or `None` if it is not entitled to a share.
    pub(crate) fn freeze(&mut self, key: &Key, window: Window, now: Timestamp) -> Option<Place> {
        let start = window.start();
        let entitled = self.first.is_some_and(|first| start >= first)
            && self.gone_me.is_none_or(|gone| start < gone)
            && !self.leaving
            && !self.is_fenced(now);
        if !entitled {
            return None;
        }
        self.max_start = self.max_start.max(Some(start));
        let mine = order(self.me.bits(), key, window);
        let mut replicas = 1;
        let mut rank = 0;
        for (id, entry) in &self.members {
            if entry.gone.is_none_or(|gone| gone > start) {
                replicas += 1;
                rank += u64::from((order(id.bits(), key, window), *id) < (mine, self.me));
            }
        }
        let silent = self.placeholders.values().filter(|placeholder| placeholder.counts_in(start)).count() as u64;
        replicas += silent;
        let ranked = silent == 0 && self.silent_ids.is_empty() && start >= self.ranked_from;
        Some(Place { replicas, rank: ranked.then_some(rank) })
    }

    /// Leaves: no share from the next unfrozen window on. Once, irrevocable.
    pub(crate) fn leave(&mut self) {
        if !self.leaving {
            self.leaving = true;
            let gone = self.unfrozen();
            self.gone_me = Some(self.gone_me.map_or(gone, |known| known.min(gone)));
            self.changed();
        }
    }

    /// Declares dead the replica with this id, or whoever is listed at this address and
    /// never answered. Returns what was forgotten.
    pub(crate) fn forget(&mut self, target: &str, now: Timestamp) -> Result<String, ForgetError> {
        if let Some(id) = ReplicaId::parse(target) {
            if id == self.me {
                return Err(ForgetError::Myself);
            }
            if !self.members.contains_key(&id) {
                return Err(ForgetError::Unknown(target.to_owned()));
            }
            self.declare_gone(id, safe_floor(now), Proof::Forgotten);
            // Whoever was listed there and never answered is what the operator means.
            let address = self.members[&id].slot.addr;
            self.dismiss(address, now);
            return Ok(id.to_string());
        }
        let address: SocketAddr = target.parse().map_err(|_| ForgetError::NotATarget(target.to_owned()))?;
        if !self.dismiss(address, now) {
            return Err(ForgetError::Unknown(target.to_owned()));
        }
        Ok(address.to_string())
    }

    /// Returns the one roster message, as it stands now.
    pub(crate) fn message(&mut self) -> Arc<RosterMessage> {
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
            counts: Timestamp::ZERO,
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

    /// The first nominal start not yet frozen here.
    fn unfrozen(&self) -> Timestamp {
        self.max_start.map_or(Timestamp::ZERO, Timestamp::next)
    }

    /// `learn(j)`: on any mention, from then on j counts. Returns whether it is known.
    fn learn(&mut self, id: ReplicaId, slot: &Slot, itself: bool, now: Timestamp) -> bool {
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
        if self.members.len() + 1 >= MAX_MEMBERS {
            self.note_once(RosterNote::Full);
            return false;
        }
        let counts = self.unfrozen();
        self.members.insert(
            id,
            Entry {
                slot: slot.clone(),
                counts,
                gone: None,
                ack: None,
                spoke: itself,
                alive_after_look: false,
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

    fn merge_member(&mut self, member: &Member, from: ReplicaId, now: Timestamp) {
        if member.id == self.me {
            if let Some(gone) = member.gone {
                if self.gone_me.is_none_or(|known| gone < known) {
                    // Others already count without me from there on. To go on taking
                    // shares would put the sum over the limit.
                    self.gone_me = Some(gone);
                    if !self.leaving {
                        self.notes.push(RosterNote::DeclaredGone);
                    }
                    self.changed();
                }
            }
            return;
        }
        if !self.learn(member.id, &member.slot, member.id == from, now) {
            return;
        }
        if let Some(gone) = member.gone {
            self.declare_gone(member.id, gone, Proof::Goodbye);
        }
    }

    /// `gone[d] := min(gone[d], at)`.
    fn declare_gone(&mut self, id: ReplicaId, at: Timestamp, proof: Proof) {
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

    /// A process that runs in the same exclusive slot proves that earlier ones died there.
    fn prove_by_slot(&mut self, from: ReplicaId, slot: &Slot, now: Timestamp) {
        let at = safe_floor(now);
        let mine = (self.me, self.slot.clone());
        for (later, later_slot) in [(from, slot), (mine.0, &mine.1)] {
            let died: Vec<ReplicaId> = self
                .members
                .iter()
                .filter(|(id, entry)| {
                    **id != later
                        && entry.gone.is_none()
                        && later_slot.excludes(&entry.slot)
                        && id.started() < later.started()
                })
                .map(|(id, _)| *id)
                .collect();
            for id in died {
                self.declare_gone(id, at, Proof::SameSlot);
            }
        }
        if slot.node == self.slot.node && slot.addr != self.slot.addr {
            self.note_once(RosterNote::DuplicateNode { node: Arc::clone(&slot.node), replica: from });
        }
    }

    /// Before joining, every listed address is expected to answer.
    fn expect_listed(&mut self, addresses: &[SocketAddr]) {
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
    fn look_again(&mut self, addresses: &[SocketAddr], now: Timestamp) {
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

    /// Nobody will answer at this address any more. Whoever ran there may have frozen
    /// windows up to now, as with a proven death. Returns whether somebody was expected.
    fn dismiss(&mut self, address: SocketAddr, now: Timestamp) -> bool {
        let Some(placeholder) = self.placeholders.get_mut(&address).filter(|placeholder| placeholder.gone.is_none())
        else {
            return false;
        };
        placeholder.gone = Some(safe_floor(now));
        self.changed();
        true
    }

    /// The id that answers at a listed address takes the placeholder's place.
    fn resolve_placeholders(&mut self) {
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

    /// Missing from the headless name, for long enough and with nothing new from it, is
    /// taken as a proof that a replica is gone (algorithm.md 0.3 e).
    fn prove_absence(&mut self, addresses: &[SocketAddr], now: Timestamp) {
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

    fn join(&mut self, running: Timestamp, now: Timestamp) {
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
        let first = known.fold(self.floor.max(self.unfrozen()), Timestamp::max);
        self.first = Some(first);
        self.notes.push(RosterNote::Joined { first });
        self.changed();
    }

    /// Whoever I gave up on and who has answered or is gone since no longer costs me my
    /// place, from the window on in which it counts me.
    fn settle_silence(&mut self) {
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
    fn unlisted(&self) -> Vec<SocketAddr> {
        if self.settings.directory != Directory::Static || self.looked.is_none() {
            return Vec::new();
        }
        self.members
            .values()
            .filter(|entry| entry.spoke && entry.gone.is_none() && !self.listed.contains(&entry.slot.addr))
            .map(|entry| entry.slot.addr)
            .collect()
    }

    /// Behind a headless name, a replica that neither the name nor any peer has confirmed
    /// for half of `absent_for` must expect to be declared gone (algorithm.md 0.1).
    fn is_fenced(&self, now: Timestamp) -> bool {
        self.settings.directory == Directory::Name && now.since(self.confirmed) >= self.settings.absent_for / 2
    }

    fn collect_garbage(&mut self, longest: Duration, now: Timestamp) {
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

/// Why `quotum forget` did nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForgetError {
    /// The target is this replica.
    #[error("this replica is alive: it cannot be forgotten by itself; stop it to make it leave")]
    Myself,
    /// Nobody of that id or unanswered address is on the roster.
    #[error("{0} is not on this replica's roster; `quotum status` lists who is")]
    Unknown(String),
    /// The text is neither an id nor an address.
    #[error("{0:?} is neither a replica id (32 hex digits) nor an address (ip:port)")]
    NotATarget(String),
}

/// The first nominal start that nobody who is dead by `now` can have frozen: a dead
/// replica's clock was at most epsilon ahead and froze at most the longest lead ahead of
/// it, and mine is at most epsilon behind.
fn safe_floor(now: Timestamp) -> Timestamp {
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
