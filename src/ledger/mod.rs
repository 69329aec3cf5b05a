//! The ledger: all accounts and the roster of one replica, as a pure state machine.
//!
//! It is told the time and the messages and asks for nothing: no clock, no randomness of
//! its own, no log, no lock, no socket. What it shares with the hot path are the wallets.
//! The invariant it keeps: the rights of all replicas for one key and window never exceed
//! the quota, whatever is lost, repeated, reordered or delayed (docs/algorithm.md section 9).
//!
//! # Using it
//!
//! There are four kinds of method.
//!
//! 1. *Look*: `&self`, changes nothing: [`Ledger::standings`], [`Ledger::status`].
//! 2. *Handle*: something came from outside: [`Ledger::handle_contact`] for every opened
//!    frame, then [`Ledger::handle_message`] for what was in it;
//!    [`Ledger::handle_listing`] for an answer of the directory; [`Ledger::handle_tick`]
//!    every gossip interval and [`Ledger::handle_timeout`] when a deadline passed.
//! 3. *Act*: the limiter or an operator wants something: `admit`, `settled`,
//!    [`Ledger::leave`], [`Ledger::forget`].
//! 4. *Poll*: what the caller must do next. After any of the above, call
//!    [`Ledger::poll_transmit`] and [`Ledger::poll_note`] until they return `None`; then
//!    [`Ledger::poll_timeout`] says when to come back.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod account;
mod carry;
mod decision;
mod exchange;
mod few;
mod hash;
mod heard;
mod held;
mod kind;
mod limits;
mod message;
mod mode;
mod note;
mod parking;
mod publish;
mod quota;
mod random;
mod roll;
mod roster;
mod status;
mod sum;
mod version;
mod window;
mod zone;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

pub use self::decision::{Claim, Denied, Obstacle, Standing};
pub use self::kind::WindowKind;
pub use self::message::{
    Contact, Member, Message, ReplicaId, RequestKind, RightsRequest, RosterMessage, Row, Slot, Target, Transmit,
};
pub use self::mode::{Margin, Mode, Portion, PortionError};
pub use self::note::{Ignored, Note};
pub use self::quota::{Key, LimitId, Quota, QuotaAmount, QuotaError, Unit};
pub use self::roster::{
    Blocked, Directory, FirstWindow, ForgetError, Gone, MAX_MEMBERS, OnSilence, Place, Proof, Roster, RosterNote,
    RosterSettings,
};
pub use self::status::{Counters, LimitStatus, Mismatch, Overshoot, PeerStatus, Status};
pub use self::version::Switch;
pub use self::window::{EPSILON, Grid, MAX_LEAD, Timestamp, Window, WindowId, WindowLength};
pub use self::zone::{Day, Zone, ZoneError};

use self::account::Actor;
pub(crate) use self::limits::Counter;
pub use self::limits::MAX_QUOTAS;
use self::limits::{KeyState, Limit, Shape};
pub(crate) use self::parking::{Admission, Ask, Ticket};
use self::random::SplitMix64;

/// How long a peer may be silent before it is no longer asked for rights. Peers send
/// something at least every second tick, so this is three of those. It decides who is
/// asked, never who counts.
const REACHABLE_TICKS: u32 = 6;

/// How long it is remembered that frames from an address were thrown away.
const REJECTED_FOR: Duration = Duration::from_secs(60);

/// The most distinct replicas in one ledger's life: beyond, rows of newcomers are counted
/// as ignored. 65,535 pods replaced take years.
const MAX_ACTORS: usize = u16::MAX as usize;

/// All accounts and the roster of one replica. See the [module's docs](self).
#[derive(Debug)]
pub struct Ledger {
    roster: Roster,
    /// Whether it was given its place in a fleet: once in its life.
    joined: bool,
    /// Whether a cluster drives this ledger: only then can anything be waited for.
    attached: bool,
    interval: Duration,
    /// The latest instant seen. A clock that steps back re-opens nothing.
    now: Timestamp,
    /// What the clock showed last: earlier, if it has stepped back.
    clock: Timestamp,
    last_tick: Timestamp,
    random: SplitMix64,
    limits: Vec<Limit>,
    by_limit: BTreeMap<LimitId, usize>,
    keys: Vec<KeyState>,
    by_shape: BTreeMap<Shape, usize>,
    /// Keys with an open window: a tick costs nothing for the others.
    active: BTreeSet<usize>,
    /// The longest window of any key.
    longest: Duration,
    /// Limits that the configuration no longer names.
    unconfigured: BTreeSet<usize>,
    /// Limits of which something changes later.
    switching: BTreeSet<usize>,
    /// Keys that no request is checked against any more.
    running_out: BTreeSet<usize>,
    /// Places of limits and keys that are gone.
    free_limits: Vec<usize>,
    free_keys: Vec<usize>,
    /// Whether counters have changed since [`Ledger::take_switched`].
    switched: bool,
    actors: Vec<ReplicaId>,
    by_actor: BTreeMap<ReplicaId, Actor>,
    peers: BTreeMap<ReplicaId, Peer>,
    /// Limits with parked requests.
    waiting: BTreeSet<usize>,
    /// Open windows in which more was spent than this replica's rights.
    indebted: BTreeSet<(usize, u64)>,
    /// Rises with every changed row: what the relay has sent and has not.
    changes: u64,
    relay_cursor: usize,
    /// The key whose rows are published first at the next tick.
    publish_turn: usize,
    /// In how many ticks every key has its turn, as of the last one.
    rounds: u32,
    next_ticket: u64,
    next_seq: u64,
    outbox: VecDeque<Transmit>,
    served: VecDeque<(Ticket, Admission)>,
    notes: VecDeque<Note>,
    ignored: Ignored,
    /// What is wrong with the directory, since its last answer.
    trouble: Option<Blocked>,
    /// Where frames came from lately that were thrown away, and why.
    rejected: BTreeMap<SocketAddr, (&'static str, Timestamp)>,
}

/// A limiter joins a fleet once; nothing changed. Whoever wrote the program can mend it: build
/// another limiter to join again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this limiter has joined before, and what it gave then is known by its id of then; build another one to join again"
)]
pub struct JoinedBefore(());

/// What is known of a peer as a sender of frames.
#[derive(Clone, Copy, Debug, Default)]
struct Peer {
    heard: Timestamp,
    echo: Timestamp,
    /// When it sent what it sent last, by its clock.
    sent: Timestamp,
    rtt_ms: u64,
    skew_ms: i64,
    contact: Option<Contact>,
    /// Up to which change the relay has sent it.
    relayed: u64,
    roster_sent: Timestamp,
    roster_tries: u32,
}

impl Ledger {
    /// Returns the ledger of a replica that is alone: it owns every right. `node` is the name it
    /// shows until [`Ledger::attach`] gives it another.
    ///
    /// `seed` is all the randomness it will ever use: which peer to ask, how refused
    /// callers are spread.
    pub fn new(me: ReplicaId, node: &str, seed: u64, now: Timestamp) -> Self {
        Self {
            roster: Roster::alone(me, node, now),
            joined: false,
            attached: false,
            interval: Duration::from_millis(100),
            now,
            clock: now,
            last_tick: now,
            random: SplitMix64(seed),
            limits: Vec::new(),
            by_limit: BTreeMap::new(),
            keys: Vec::new(),
            by_shape: BTreeMap::new(),
            active: BTreeSet::new(),
            longest: Duration::ZERO,
            unconfigured: BTreeSet::new(),
            switching: BTreeSet::new(),
            running_out: BTreeSet::new(),
            free_limits: Vec::new(),
            free_keys: Vec::new(),
            switched: false,
            actors: vec![me],
            by_actor: BTreeMap::from([(me, Actor::ME)]),
            peers: BTreeMap::new(),
            waiting: BTreeSet::new(),
            indebted: BTreeSet::new(),
            changes: 0,
            relay_cursor: 0,
            publish_turn: 0,
            rounds: 1,
            next_ticket: 0,
            next_seq: 0,
            outbox: VecDeque::new(),
            served: VecDeque::new(),
            notes: VecDeque::new(),
            ignored: Ignored::default(),
            trouble: None,
            rejected: BTreeMap::new(),
        }
    }

    // Handle.

    /// Takes what the header of an authenticated frame says about its sender.
    pub fn handle_contact(&mut self, contact: Contact, now: Timestamp) {
        let now = self.advance(now);
        if contact.from == self.roster.me() {
            return;
        }
        self.roster.handle_contact(&contact, now);
        if self.roster.knows(contact.from) {
            // It may be asked for rights before it has ever sent a row.
            let _ = self.actor(contact.from);
        }
        if !self.peers.contains_key(&contact.from) && self.peers.len() >= MAX_MEMBERS {
            let stalest = self.peers.iter().min_by_key(|(_, peer)| peer.heard).map(|(id, _)| *id);
            stalest.and_then(|id| self.peers.remove(&id));
        }
        let clock = self.clock;
        let peer = self.peers.entry(contact.from).or_default();
        peer.heard = now;
        peer.contact = Some(contact);
        if contact.sent_at >= peer.sent {
            peer.sent = contact.sent_at;
        }
        if let Some(echo) = contact.echo.filter(|echo| *echo <= now) {
            peer.echo = peer.echo.max(echo);
            // The sample holds the peer's own delay, so the smallest is the truest; it
            // rises by a sixteenth a frame when the path has become longer. By the clock: that
            // is what the echo came from.
            if echo <= clock {
                let sample = (clock.since(echo).as_millis() as u64).max(1);
                peer.rtt_ms = if peer.rtt_ms == 0 { sample } else { sample.min(peer.rtt_ms + peer.rtt_ms / 16 + 1) };
            }
        }
        peer.skew_ms = contact.sent_at.unix_ms() as i64 + (peer.rtt_ms / 2) as i64 - clock.unix_ms() as i64;
    }

    /// Takes a message. `from` is the authenticated sender of the frame; rows and roster
    /// messages may speak of another replica whose message it relays.
    pub fn handle_message(&mut self, from: ReplicaId, message: Message, now: Timestamp) {
        let now = self.advance(now);
        if from == self.roster.me() {
            return;
        }
        match message {
            Message::Row(row) => self.handle_row(from, &row, now),
            Message::Request(request) => self.handle_request(from, &request, now),
            Message::Roster(message) => self.handle_roster(&message, now),
        }
    }

    /// Takes an answer of the directory: all listed addresses. One that lacks this
    /// replica's own address does not count, because it may be older than the
    /// registration.
    pub fn handle_listing(&mut self, addresses: &[SocketAddr], now: Timestamp) {
        let now = self.advance(now);
        let own = self.roster.slot().addr;
        self.trouble = (self.attached && !addresses.contains(&own)).then(|| Blocked::unlisted(own, addresses));
        self.roster.handle_listing(addresses, now);
        self.roster_moved(now);
    }

    /// Notes that the directory could not be read: why, and what resolves it. Nothing
    /// follows from it but that it is shown until the next answer.
    pub fn handle_no_listing(&mut self, why: String, resolve: String, now: Timestamp) {
        self.advance(now);
        self.trouble = Some(Blocked { who: self.roster.slot().addr.to_string(), why, resolve });
    }

    /// Takes where frames came from, since this was last called, that could not be opened, and
    /// why not. Nothing follows from it but what is said of whoever does not answer there.
    pub fn handle_rejected(&mut self, rejected: BTreeMap<SocketAddr, &'static str>, now: Timestamp) {
        let now = self.advance(now);
        // Whoever is not answered writes once a second: what is said of it must not come and go.
        self.rejected.retain(|_, (_, at)| now.since(*at) < REJECTED_FOR);
        for (addr, why) in rejected {
            if self.rejected.len() < MAX_MEMBERS || self.rejected.contains_key(&addr) {
                self.rejected.insert(addr, (why, now));
            }
        }
    }

    /// Takes proofs of the platform that replicas are gone (docs/algorithm.md section 3 a).
    pub fn handle_gone(&mut self, gone: &[Gone], now: Timestamp) {
        let now = self.advance(now);
        gone.iter().for_each(|gone| self.roster.handle_gone(gone, now));
        self.roster_moved(now);
    }

    /// Does what is due every gossip interval.
    pub fn handle_tick(&mut self, now: Timestamp) {
        let now = self.advance(now);
        self.compare_clocks(now);
        self.roster_moved(now);
        self.switch_all(now);
        // First what nobody wants any more: a roll would freeze its next window.
        self.forget_versions(now);
        self.roll(now);
        self.measure(now);
        self.follow_sums(now);
        self.publish_rows();
        self.notice_debts();
        self.ask_for_debts(now);
        self.prefetch(now);
        if self.roster.is_leaving() {
            self.hand_over(now);
        }
        self.relay(now);
        self.announce(now);
        self.handle_timeout(now);
        self.last_tick = now;
    }

    /// Does what is due now: parked requests whose time is up, questions to repeat.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        let now = self.advance(now);
        for limit in self.waiting.clone() {
            self.serve(limit, now);
            self.expire(limit, now);
            if now >= self.limits[limit].ask_again && !self.limits[limit].queue.is_empty() {
                self.ask_for_parked(limit, now);
            }
        }
    }

    // Act.

    /// Gives the ledger its place in a fleet. From now on it owns only what the roster
    /// gives it: what it owned alone and has not spent is forfeited.
    ///
    /// # Errors
    /// If it was done before; nothing changed. What a ledger has given stands under the id it
    /// had then: said again under another one, peers would take it for other rights.
    pub fn attach(
        &mut self,
        me: ReplicaId,
        slot: Slot,
        settings: RosterSettings,
        interval: Duration,
        now: Timestamp,
    ) -> Result<(), JoinedBefore> {
        let now = self.advance(now);
        if std::mem::replace(&mut self.joined, true) {
            return Err(JoinedBefore(()));
        }
        self.roster = Roster::new(me, slot, settings, now);
        self.trouble = None;
        self.attached = settings.directory != Directory::Alone;
        self.interval = interval;
        self.actors[0] = me;
        self.by_actor.retain(|_, actor| *actor != Actor::ME);
        self.by_actor.insert(me, Actor::ME);
        for key in self.active.clone() {
            let state = &mut self.keys[key];
            for account in state.open.values_mut() {
                // It stays frozen: a second share of a window it spent from alone would
                // put the fleet over.
                account.forfeit(&state.ring);
            }
            if let Some(carry) = &mut state.carry {
                carry.forfeit();
            }
        }
        self.roster_moved(now);
        Ok(())
    }

    /// Ends parking: whoever waits is refused, and from now on nobody waits.
    pub fn detach(&mut self, now: Timestamp) {
        let now = self.advance(now);
        self.attached = false;
        for limit in self.waiting.clone() {
            self.expire_all(limit, now);
        }
    }

    /// Leaves the fleet: admits nothing more, hands rights over at every tick, says
    /// goodbye. Once, irrevocable.
    pub fn leave(&mut self, now: Timestamp) {
        let now = self.advance(now);
        self.open_entitled(now);
        self.roster.leave();
        for limit in 0..self.limits.len() {
            self.expire_all(limit, now);
            self.mark_parked(limit);
        }
        self.hand_over(now);
        self.publish_rows();
        self.announce(now);
    }

    /// Declares dead the replica with this id, or whoever is listed at this address and
    /// has never answered: an operator's proof.
    ///
    /// # Errors
    /// Says why nothing was changed.
    pub fn forget(&mut self, target: &str, now: Timestamp) -> Result<String, ForgetError> {
        let now = self.advance(now);
        let forgotten = self.roster.forget(target, now)?;
        self.roster_moved(now);
        Ok(forgotten)
    }

    // Poll.

    /// Returns the next message to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.outbox.pop_front()
    }

    /// Says whether there is something to send.
    pub fn has_transmits(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Returns the next thing worth a log line.
    pub fn poll_note(&mut self) -> Option<Note> {
        self.notes.pop_front()
    }

    /// Returns when [`Ledger::handle_timeout`] has something to do, besides the ticks.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.waiting.iter().filter_map(|limit| self.next_deadline(*limit)).min()
    }

    /// Returns the next parked request that was decided.
    pub(crate) fn poll_served(&mut self) -> Option<(Ticket, Admission)> {
        self.served.pop_front()
    }

    // Behind the door.

    fn advance(&mut self, now: Timestamp) -> Timestamp {
        self.clock = now;
        self.now = self.now.max(now);
        self.now
    }

    /// Returns how far the clock is behind the latest instant that it ever showed: for so long
    /// this replica stays in the windows of that instant.
    fn behind(&self, clock: Timestamp) -> Duration {
        self.now.since(clock)
    }

    fn handle_roster(&mut self, message: &RosterMessage, now: Timestamp) {
        let known = self.roster.knows(message.from);
        let owed = self.roster.handle_message(message, now);
        self.roster.handle_news_of(message.from, now);
        if !known && let Some(contact) = self.peers.get(&message.from).and_then(|peer| peer.contact) {
            // The header came first, when nobody knew its sender yet.
            self.roster.handle_contact(&contact, now);
        }
        self.roster_moved(now);
        if owed {
            self.send_roster(message.from, now);
        }
    }

    /// Compares this clock with the median of all fresh ones, its own among them, if there
    /// are at least two others: fewer cannot tell who is wrong.
    fn compare_clocks(&mut self, now: Timestamp) {
        let fresh = self.peers.iter().filter(|(id, _)| self.is_reachable(**id, now));
        let mut skews: Vec<i64> = fresh.map(|(_, peer)| peer.skew_ms).chain([0]).collect();
        skews.sort_unstable();
        let middle = skews.len() / 2;
        let median = match skews.len() {
            1 | 2 => None,
            odd if odd % 2 == 1 => Some(skews[middle]),
            _ => Some(i64::midpoint(skews[middle - 1], skews[middle])),
        };
        self.roster.handle_clock(median.map(i64::wrapping_neg));
    }

    /// Draws the consequences of a changed roster: joins, freezes what it may freeze now.
    fn roster_moved(&mut self, now: Timestamp) {
        let joined = self.roster.first().is_some();
        let own =
            || self.limits.iter().flat_map(|limit| &limit.keys).map(|key| window_of(&self.keys[*key], now).start());
        let running = || own().min().unwrap_or(now);
        let running = if joined { now } else { running() };
        self.roster.handle_time(running, self.longest, now);
        if !joined && self.roster.first().is_some() {
            for key in self.active.clone() {
                self.freeze_open(key, now);
            }
            for limit in self.waiting.clone() {
                self.serve(limit, now);
            }
        }
        for note in self.roster.take_notes() {
            self.note(Note::Roster(note));
        }
    }

    fn note(&mut self, note: Note) {
        // A reader that never polls must not make the ledger grow.
        if self.notes.len() >= 1_024 {
            self.notes.pop_front();
        }
        self.notes.push_back(note);
    }

    fn actor(&mut self, id: ReplicaId) -> Option<Actor> {
        if let Some(actor) = self.by_actor.get(&id) {
            return Some(*actor);
        }
        if self.actors.len() >= MAX_ACTORS {
            self.ignored.too_many_replicas += 1;
            return None;
        }
        let actor = Actor(self.actors.len() as u16);
        self.actors.push(id);
        self.by_actor.insert(id, actor);
        Some(actor)
    }

    fn id_of(&self, actor: Actor) -> ReplicaId {
        self.actors[usize::from(actor.0)]
    }

    /// Says whether a peer hears us and we hear it: whom to ask and whom to give to.
    fn is_reachable(&self, id: ReplicaId, now: Timestamp) -> bool {
        let Some(peer) = self.peers.get(&id) else { return false };
        let silence =
            (self.interval * REACHABLE_TICKS).max(Duration::from_millis(300)) + Duration::from_millis(4 * peer.rtt_ms);
        // The echo is of what this clock showed, even if it had shown a later instant before.
        let unheard = self.clock.min(now).since(peer.echo);
        now.since(peer.heard) < silence && unheard < silence * 2 && !self.roster.is_gone(id)
    }
}

impl KeyState {
    /// Returns the rights still spendable in the window with this number: what can be given
    /// away. Negative is debt.
    fn owned(&self, number: u64) -> i64 {
        self.open.get(&number).map_or(0, |account| account.owned(&self.ring))
    }

    /// Returns how much a claim wants here, as demand is measured: more than can ever fit is
    /// as much as can.
    fn claimed(&self, claim: &Claim) -> u64 {
        claim.amount(self.key.quota.unit()).min(self.slices.most())
    }
}

fn window_of(state: &KeyState, now: Timestamp) -> Window {
    state.slices.grid.window_at(now)
}

fn next_window(state: &KeyState, now: Timestamp) -> Window {
    state.slices.grid.next(window_of(state, now))
}
