//! One replica: the production roster, the two windows, and every clause that a test removes.
//!
//! Knows how an event changes one replica. Must not know the fleet. Every transition here is
//! a pure function of (replica, instant, event), so [`Book`] remembers it: the production
//! code runs once for each, however many states of the fleet it is a part of.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quotum::ledger::{
    Contact, Directory, FirstWindow, Key, LimitId, MAX_LEAD, Member, OnSilence, Quota, ReplicaId, Roster,
    RosterMessage, RosterSettings, Slot, Timestamp, Window, WindowLength,
};

/// The limit of each window.
pub const LIMIT: u64 = 4;

/// The most incarnations.
pub const LIVES: usize = 4;

/// The most transfers.
pub const GIFTS: usize = 3;

const HOUR: u64 = 3_600_000;
const MINUTE: u64 = 60_000;

/// Where the two windows start: an hour's, and a minute's inside that hour. So from the
/// second start on both may be frozen, in either order. The third is [`NEXT`].
pub const STARTS: [u64; 3] = [1_000 * HOUR, 1_000 * HOUR + 2 * MINUTE, 1_000 * HOUR + 3 * MINUTE];

/// The window that is opened after every calm: it starts after every floor that is read in one.
pub const NEXT: u8 = 2;

/// The instants of true time. With every clock at one end of epsilon they meet each
/// comparison of the rule at its edge.
///
/// 0. No floor read now reaches a window.
/// 1. A fast clock has just opened the first window; a slow one, asked for a floor, answers
///    1 ms after its start.
/// 2. The first window is open everywhere; a slow clock's floor is exactly the second
///    window's start, which no clock has opened.
/// 3. Both windows are open everywhere, and every floor is after both.
/// 4. [`CALM`].
/// 5. The next window is open everywhere.
pub const INSTANTS: [u64; 6] = [
    STARTS[0] - 20_000,
    STARTS[0] - 4_000,
    STARTS[1] - 4_001,
    STARTS[1] + 3_000,
    STARTS[1] + 30_000,
    STARTS[2] + 3_000,
];

/// The calm after everything, when even the slowest clock has passed every floor.
pub const CALM: u8 = 4;

/// What a search takes out of the rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Removed {
    /// Nothing: the rule as it ships.
    #[default]
    Nothing,
    /// `join` waits for no answer: hearing of a replica is taken as its answer.
    Acks,
    /// The floor is not read: the look at the directory happened long ago.
    Floor,
    /// `first` ignores deaths: a dead replica has answered, and its end is learnt later.
    GoneInFirst,
    /// An answer does not say from which window on the newcomer counts.
    Counts,
    /// A newcomer that gives up does not read its floor again (J2). With `admit` it takes
    /// the running window: silence was an answer (H3, J1).
    LateFloor,
    /// The process that answers at a listed address brings no floor (J3).
    FloorOfAnswer,
    /// A newcomer that is not entitled takes a part all the same (H5).
    Entitlement,
    /// A death is dated 1 ms too early, to exactly a start that the dead froze (H6).
    TickOfProof,
    /// A leaver dates its end to the last window it froze, not after it.
    TickOfGoodbye,
    /// A leaver takes shares on after its goodbye.
    LeavingStops,
    /// The directory leaves out a replica that registered before the look (D).
    Listing,
    /// A transfer is credited each time it arrives.
    MergeOfGifts,
    /// A donor publishes a transfer and is not debited.
    Debit,
    /// What a replica has to say is sent once, not until it is read: a newcomer whose question
    /// was lost never asks again.
    Repetition,
    /// A proof of death is not passed on.
    Telling,
    /// A leaver does not say so.
    Goodbye,
    /// Who was proven dead is never forgotten.
    Forgetting,
    /// No frame echoes another: nobody can tell who runs at an address now.
    Echo,
}

impl Removed {
    /// Whether it costs liveness and no safety.
    pub fn only_blocks(self) -> bool {
        matches!(self, Self::Repetition | Self::Telling | Self::Goodbye | Self::Forgetting | Self::Echo)
    }
}

/// The rule and the clocks of one search.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    pub first_window: FirstWindow,
    pub removed: Removed,
    /// How far each slot's clock is ahead of true time, in ms; at most epsilon either way.
    pub clocks: [i64; LIVES],
}

/// What may happen to one replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The directory answers with these slots.
    Look { listed: u8 },
    /// A frame arrives: this letter, and whether its sender has heard from us since we looked.
    Deliver { letter: u32, echoed: bool },
    /// An operator declares a replica dead.
    Forget { life: u8 },
    /// An operator declares whoever is listed there dead.
    ForgetSlot { slot: u8 },
    /// Patience has run out. The lives that are silent, for a rule that takes silence for an
    /// answer.
    GiveUp { silent: u8 },
    /// A window is touched for the first time.
    Freeze { window: u8 },
    /// The process is asked to stop.
    Leave,
}

/// What a replica took of a window, and whom it counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Frozen {
    pub share: u8,
    pub counted: u8,
    pub counted_slots: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Replica {
    life: u8,
    slot: u8,
    roster: Roster,
    frozen: [Option<Frozen>; 2],
}

/// What the fleet needs to know of a replica.
#[derive(Clone, Copy, Debug)]
pub struct View {
    pub life: u8,
    pub slot: u8,
    pub looked: bool,
    pub first: Option<Timestamp>,
    pub floor: Timestamp,
    pub leaving: bool,
    /// Whom it has ever heard of.
    pub knows: u8,
    /// Of those, who it knows is gone.
    pub gone: u8,
    /// The windows at whose very start one of those is gone.
    pub gone_at_start: u8,
    /// Of those, whose answer it waits for before it joins, or gave up waiting for.
    pub waits_for: u8,
    /// Listed slots at which nobody has answered.
    pub unresolved: u8,
    pub frozen: [Option<Frozen>; 2],
    /// What it publishes.
    pub letter: u32,
}

/// What a letter says, as far as the fleet must know.
#[derive(Clone, Copy, Debug)]
pub struct Envelope {
    pub from: u8,
}

/// Every replica and letter met so far, by number, and every step between them.
#[derive(Debug, Default)]
pub struct Book {
    replicas: Vec<(Arc<Replica>, View)>,
    numbers: HashMap<Arc<Replica>, u32>,
    letters: Vec<(Arc<RosterMessage>, Envelope)>,
    letter_numbers: HashMap<Arc<RosterMessage>, u32>,
    steps: HashMap<(u32, u8, Event), u32>,
    starts: HashMap<(u8, u8, u8), u32>,
    holds: HashMap<(u32, u8), [Option<Frozen>; 2]>,
}

impl Book {
    pub fn view(&self, replica: u32) -> &View {
        &self.replicas[replica as usize].1
    }

    pub fn letter(&self, letter: u32) -> Envelope {
        self.letters[letter as usize].1
    }

    /// How many distinct replicas, letters and steps between replicas were met.
    pub fn sizes(&self) -> (usize, usize, usize) {
        (self.replicas.len(), self.letters.len(), self.steps.len())
    }

    pub fn describe(&self, replica: u32) -> String {
        format!("{:#?}", self.replicas[replica as usize].0)
    }

    /// A process starts in a slot and registers.
    pub fn start(&mut self, rule: &Rule, life: u8, slot: u8, instant: u8) -> u32 {
        if let Some(known) = self.starts.get(&(life, slot, instant)) {
            return *known;
        }
        let now = rule.clock(slot, instant);
        let settings = RosterSettings {
            directory: Directory::Name,
            absent_for: Duration::from_secs(1 << 40),
            on_silence: OnSilence::FairShare,
            // Out at once: when a newcomer gives up is an event of the search.
            patience: Duration::ZERO,
            first_window: rule.first_window,
        };
        let roster = Roster::new(id(life, now), place(slot), settings, now);
        let number = self.number(Replica { life, slot, roster, frozen: [None; 2] });
        self.starts.insert((life, slot, instant), number);
        number
    }

    /// Returns what becomes of a replica: itself, if the event changes nothing.
    pub fn step(&mut self, rule: &Rule, replica: u32, instant: u8, event: Event) -> u32 {
        if let Some(known) = self.steps.get(&(replica, instant, event)) {
            return *known;
        }
        let mut next = Replica::clone(&self.replicas[replica as usize].0);
        let letter = match event {
            Event::Deliver { letter, .. } => Some(Arc::clone(&self.letters[letter as usize].0)),
            _ => None,
        };
        next.handle(rule, rule.clock(next.slot, instant), event, letter.as_deref());
        let number = self.number(next);
        self.steps.insert((replica, instant, event), number);
        number
    }

    /// What a replica holds of each window, or would if it were touched now.
    pub fn holds(&mut self, rule: &Rule, replica: u32, instant: u8) -> [Option<Frozen>; 2] {
        if let Some(known) = self.holds.get(&(replica, instant)) {
            return *known;
        }
        let mut touched = Replica::clone(&self.replicas[replica as usize].0);
        let now = rule.clock(touched.slot, instant);
        (0..2).for_each(|window| touched.freeze(rule, window, now));
        self.holds.insert((replica, instant), touched.frozen);
        touched.frozen
    }

    /// What a replica takes of a window if it touches it first when it is open everywhere.
    pub fn takes(&self, rule: &Rule, replica: u32, window: u8) -> Option<Frozen> {
        let mut replica = Replica::clone(&self.replicas[replica as usize].0);
        let now = rule.clock(replica.slot, INSTANTS.len() as u8 - 1);
        replica.take(rule, window, now)
    }

    fn number(&mut self, mut replica: Replica) -> u32 {
        replica.roster = replica.roster.essence();
        if let Some(known) = self.numbers.get(&replica) {
            return *known;
        }
        let mut message = RosterMessage::clone(&replica.roster.clone().message());
        // Revisions pace messages and decide nothing.
        message.revision = 0;
        message.members.iter_mut().for_each(|member| member.seen = 0);
        let floor = message.floor;
        let message = Arc::new(message);
        let next = self.letters.len() as u32;
        let letter = *self.letter_numbers.entry(Arc::clone(&message)).or_insert(next);
        if letter == next {
            self.letters.push((message, Envelope { from: replica.life }));
        }
        let number = u32::try_from(self.replicas.len()).expect("fewer than 2^32");
        let view = replica.view(letter, floor);
        let replica = Arc::new(replica);
        self.replicas.push((Arc::clone(&replica), view));
        self.numbers.insert(replica, number);
        number
    }
}

impl Rule {
    /// The floor that `admit` puts in the place of one that was read: no other can be equal.
    pub fn admitting_floor(&self, slot: u8, instant: u8) -> Timestamp {
        running(self.clock(slot, instant))
    }

    fn clock(&self, slot: u8, instant: u8) -> Timestamp {
        Timestamp::from_unix_ms(INSTANTS[usize::from(instant)].wrapping_add_signed(self.clocks[usize::from(slot)]))
    }
}

impl Replica {
    fn handle(&mut self, rule: &Rule, now: Timestamp, event: Event, letter: Option<&RosterMessage>) {
        match event {
            Event::Look { listed } => {
                let addresses: Vec<SocketAddr> = bits(listed).map(address).collect();
                let read = if rule.removed == Removed::Floor { Timestamp::ZERO } else { now };
                self.roster.handle_listing(&addresses, read);
            }
            Event::Deliver { echoed, .. } => {
                let message = letter.expect("a letter is delivered");
                self.receive(rule, message, echoed, now);
            }
            Event::Forget { .. } | Event::ForgetSlot { .. } if rule.removed == Removed::Forgetting => {}
            Event::Forget { life } => {
                let id = self.roster.everybody().map(|(id, ..)| id).find(|id| life_of(*id) == life);
                let id = id.expect("only whom it knows").to_string();
                let now = if rule.removed == Removed::TickOfProof { before(now) } else { now };
                self.roster.forget(&id, now).expect("it is on the roster");
            }
            Event::ForgetSlot { slot } => {
                let now = if rule.removed == Removed::TickOfProof { before(now) } else { now };
                self.roster.forget(&address(slot).to_string(), now).expect("nobody answered there");
            }
            Event::GiveUp { silent } => {
                if rule.removed == Removed::LateFloor {
                    for life in bits(silent & !(1 << self.life)) {
                        self.answer_for(rule, life, now);
                    }
                }
                self.roster.handle_time(running(now), WindowLength::HOUR.duration(), now);
            }
            Event::Freeze { window } => self.freeze(rule, window, now),
            Event::Leave => self.roster.leave(),
        }
        // As the ledger does after everything; whether to give up is another event.
        if self.roster.first().is_none() && self.roster.blocked().iter().all(|blocked| blocked.who == self.me()) {
            self.roster.handle_time(running(now), WindowLength::HOUR.duration(), now);
        }
    }

    fn receive(&mut self, rule: &Rule, message: &RosterMessage, echoed: bool, now: Timestamp) {
        let me = self.id();
        let mut message = message.clone();
        match rule.removed {
            Removed::Acks if !message.members.iter().any(|member| member.id == me) => {
                let place = message.members.partition_point(|member| member.id < me);
                message.members.insert(place, member(me, self.slot));
            }
            Removed::Counts => message.members.iter_mut().for_each(|member| member.counts = Timestamp::ZERO),
            Removed::FloorOfAnswer => message.floor = Timestamp::ZERO,
            Removed::Telling => message.members.iter_mut().for_each(|member| {
                member.gone = member.gone.filter(|_| member.id == message.from);
            }),
            Removed::Goodbye => message.members.iter_mut().for_each(|member| {
                member.gone = member.gone.filter(|_| member.id != message.from);
            }),
            Removed::TickOfGoodbye => message.members.iter_mut().for_each(|member| {
                member.gone = member.gone.map(|gone| if member.id == message.from { before(gone) } else { gone });
            }),
            Removed::GoneInFirst if self.roster.first().is_none() => {
                let gone: Vec<ReplicaId> =
                    message.members.iter().filter(|member| member.gone.is_some()).map(|member| member.id).collect();
                message.members.iter_mut().for_each(|member| member.gone = None);
                self.hear(rule, &message, echoed, now);
                for id in gone.into_iter().filter(|id| *id != me) {
                    self.answer_for(rule, life_of(id), now);
                }
                return;
            }
            _ => {}
        }
        self.hear(rule, &message, echoed, now);
    }

    /// Takes a frame as the ledger does: its header, the message, and the header again if
    /// nobody knew its sender yet.
    fn hear(&mut self, rule: &Rule, message: &RosterMessage, echoed: bool, now: Timestamp) {
        // The latest send time: at or after the look, whenever that was.
        let echoed = echoed && rule.removed != Removed::Echo;
        let contact = Contact { from: message.from, sent_at: now, echo: echoed.then_some(now) };
        self.roster.handle_contact(&contact, now);
        self.roster.handle_message(message, now);
        self.roster.handle_contact(&contact, now);
    }

    /// A forged answer: `life` counts this replica from the epoch on.
    fn answer_for(&mut self, rule: &Rule, life: u8, now: Timestamp) {
        let known = self.roster.everybody().find(|(id, ..)| life_of(*id) == life);
        let Some((from, slot)) = known.map(|(id, slot, _)| (id, slot.clone())) else { return };
        let me = self.id();
        let mut members = vec![Member { slot, ..member(from, 0) }, member(me, self.slot)];
        members.sort_by_key(|member| member.id);
        let message = RosterMessage { from, revision: 0, floor: Timestamp::ZERO, watermark: Timestamp::ZERO, members };
        self.hear(rule, &message, true, now);
    }

    fn freeze(&mut self, rule: &Rule, window: u8, now: Timestamp) {
        if self.frozen[usize::from(window)].is_none() {
            self.frozen[usize::from(window)] = self.take(rule, window, now);
        }
    }

    fn take(&mut self, rule: &Rule, window: u8, now: Timestamp) -> Option<Frozen> {
        let (key, span) = key_and_window(window);
        if now < span.opens() || now >= span.end() {
            return None;
        }
        let start = span.start();
        let said = self.roster.clone().message();
        let counts = |member: &&Member| member.counts <= start && member.gone.is_none_or(|gone| gone > start);
        let others = said.members.iter().filter(|member| member.id != self.id());
        let counted = others.filter(counts).fold(0_u8, |counted, member| counted | 1 << life_of(member.id));
        let counted_slots = self.unresolved();
        let least = 1 + u64::from(counted.count_ones() + counted_slots.count_ones());
        let share = match self.roster.freeze(&key, span, now) {
            Some(place) => {
                assert!(place.replicas >= least, "whoever is known or silent counts");
                place.share(LIMIT)
            }
            None if self.takes_unentitled(rule) => LIMIT / least,
            None => return None,
        };
        Some(Frozen { share: share as u8, counted, counted_slots })
    }

    fn takes_unentitled(&self, rule: &Rule) -> bool {
        match rule.removed {
            Removed::Entitlement => self.roster.has_looked() && !self.roster.is_leaving(),
            Removed::LeavingStops => self.roster.first().is_some() && self.roster.is_leaving(),
            _ => false,
        }
    }

    fn view(&self, letter: u32, floor: Timestamp) -> View {
        let mask = |lives: &mut dyn Iterator<Item = ReplicaId>| lives.fold(0, |mask, id| mask | 1 << life_of(id));
        let waits: Vec<String> = self.roster.blocked().into_iter().map(|blocked| blocked.who).collect();
        let everybody = || self.roster.everybody();
        View {
            life: self.life,
            slot: self.slot,
            looked: self.roster.has_looked(),
            first: self.roster.first(),
            floor,
            leaving: self.roster.is_leaving(),
            knows: mask(&mut everybody().map(|(id, ..)| id)),
            gone: mask(&mut everybody().filter(|(.., gone)| gone.is_some()).map(|(id, ..)| id)),
            gone_at_start: (0..2_u8).fold(0, |mask, window| {
                let start = Timestamp::from_unix_ms(STARTS[usize::from(window)]);
                mask | u8::from(everybody().any(|(.., gone)| gone == Some(start))) << window
            }),
            waits_for: mask(&mut everybody().map(|(id, ..)| id).filter(|id| waits.contains(&id.to_string()))),
            unresolved: self.unresolved(),
            frozen: self.frozen,
            letter,
        }
    }

    fn unresolved(&self) -> u8 {
        self.roster.unresolved().fold(0, |mask, address| mask | 1 << (address.port() - 7_000))
    }

    fn id(&self) -> ReplicaId {
        self.roster.me()
    }

    fn me(&self) -> String {
        self.id().to_string()
    }
}

/// The set bits of a mask.
pub fn bits(mask: u8) -> impl Iterator<Item = u8> {
    (0..8).filter(move |bit| mask & (1 << bit) != 0)
}

/// Ids sort and rank by start, then by life.
fn id(life: u8, started: Timestamp) -> ReplicaId {
    let started = started.plus(Duration::from_millis(u64::from(life)));
    ReplicaId::new(started, 1 + u128::from(life))
}

fn life_of(id: ReplicaId) -> u8 {
    (id.bits() & 0xff) as u8 - 1
}

fn address(slot: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], 7_000 + u16::from(slot)))
}

fn place(slot: u8) -> Slot {
    Slot { node: format!("pod-{slot}").into(), addr: address(slot), exclusive: true }
}

fn member(id: ReplicaId, slot: u8) -> Member {
    Member { id, slot: place(slot), counts: Timestamp::ZERO, gone: None, seen: 0 }
}

fn before(at: Timestamp) -> Timestamp {
    at.minus(Duration::from_millis(1))
}

fn key_and_window(window: u8) -> (Key, Window) {
    let length = if window == 0 { WindowLength::HOUR } else { WindowLength::MINUTE };
    let quota: Quota = Quota::tokens(LIMIT).per(length.duration());
    let start = Timestamp::from_unix_ms(STARTS[usize::from(window)]);
    (Key { limit: LimitId::of("gpt"), quota }, length.window_at(start))
}

/// The earliest start of the windows that run now, over both keys.
fn running(now: Timestamp) -> Timestamp {
    WindowLength::HOUR.window_at(now).start().min(WindowLength::MINUTE.window_at(now).start())
}

const _: () = assert!(MAX_LEAD.as_millis() == 2_000, "the instants above are chosen for it");
