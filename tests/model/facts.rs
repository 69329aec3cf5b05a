//! What holds of a state of the fleet, good and bad.
//!
//! Knows what each name of docs/algorithm.md section 7 means as a state. Must not know how a state comes
//! about.

use stateright::Property;

use super::fleet::{Bounds, Fleet, State};
use super::replica::{Book, LIMIT, LIVES, Removed, STARTS, View, bits};

/// Something that holds of a state or does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The rights of all replicas, dead or alive, exceed the limit in a window.
    OverLimit,
    /// Two hold a share of the same window, and one did not count the other.
    HolderNotCounted,
    /// After a calm, somebody alive takes no share of the next window.
    Stuck,
    /// After a calm, a part of the next window's limit is nobody's.
    Withheld,
    /// After a calm, somebody cannot gather the next window's limit.
    Refused,
    /// One process holds the later window and has not touched the earlier one yet.
    LaterWindowFirst,
    /// A process runs in the slot of a dead one and has joined.
    Restarted,
    /// A cold start may spend again what nobody it could hear had heard of.
    Excepted,
    /// H1: two leave, and each has answered another joiner.
    TwoLeaversTwoJoiners,
    /// H2: two are dead, and each of two joiners holds one's old answer and the other's end.
    OldAckAndGone,
    /// H3: two have looked, list each other, and neither has heard anything.
    SilentAtColdStart,
    /// H4: a process died holding the running window and its successor, alone, has joined.
    RestartedAlone,
    /// H5: a newcomer has joined and is not entitled to a window that others hold.
    NewcomerWithoutEntitlement,
    /// H6: a replica is gone exactly at a window's start.
    GoneAtStart,
    /// J1: a holder died, then the only one that knew it, whom a newcomer still waits for.
    OnlyWitnessDied,
    /// J2: a newcomer gave up on a dead holder, and is not entitled to what that one froze.
    GaveUpOnHolder,
    /// J3: a holder died unheard, and a new process at its address answered a newcomer.
    AnsweredForTheDead,
}

/// What a search can be asked to reach.
type Condition = fn(&Fleet, &State) -> bool;

macro_rules! reachable {
    ($($fact:ident),* $(,)?) => {
        /// Each fact that is no violation, with its name and condition.
        const REACHABLE: &[(Fact, &str, Condition)] =
            &[$((Fact::$fact, stringify!($fact), |_, state| state.facts.has(Fact::$fact))),*];
    };
}

reachable!(
    LaterWindowFirst,
    Restarted,
    Excepted,
    TwoLeaversTwoJoiners,
    OldAckAndGone,
    SilentAtColdStart,
    RestartedAlone,
    NewcomerWithoutEntitlement,
    GoneAtStart,
    OnlyWitnessDied,
    GaveUpOnHolder,
    AnsweredForTheDead,
);

impl Fact {
    /// Returns the name under which the checker keeps an example.
    pub fn name(self) -> &'static str {
        let known = REACHABLE.iter().find(|(fact, ..)| *fact == self);
        known.expect("violations are not asked for").1
    }
}

const STUCK: &str = "everybody takes its share after a calm";
const WITHHELD: &str = "the whole limit is somebody's after a calm";
const REFUSED: &str = "whoever is asked for the whole limit after a calm can gather it";

/// Whether an invariant of this name promises that something will happen.
pub fn is_liveness(name: &str) -> bool {
    [STUCK, WITHHELD, REFUSED].contains(&name)
}

/// All facts of one state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Facts(u32);

impl Facts {
    fn add(&mut self, fact: Fact, holds: bool) {
        self.0 |= u32::from(holds) << fact as u32;
    }

    fn has(self, fact: Fact) -> bool {
        self.0 & (1 << fact as u32) != 0
    }
}

/// Returns what the checker asks of every state.
pub fn properties(bounds: &Bounds) -> Vec<Property<Fleet>> {
    let mut properties = vec![
        Property::always("rights never exceed the limit", |_, state: &State| !state.facts.has(Fact::OverLimit)),
        Property::always("holders count each other", |_, state: &State| !state.facts.has(Fact::HolderNotCounted)),
        Property::always(STUCK, |_, state: &State| !state.facts.has(Fact::Stuck)),
        Property::always(WITHHELD, |_, state: &State| !state.facts.has(Fact::Withheld)),
        Property::always(REFUSED, |_, state: &State| !state.facts.has(Fact::Refused)),
    ];
    for (fact, name, condition) in REACHABLE {
        if bounds.reaches.contains(fact) {
            properties.push(Property::sometimes(name, *condition));
        }
    }
    properties
}

/// Returns what holds of a state.
pub fn of(fleet: &Fleet, state: &State, book: &mut Book) -> Facts {
    let mut facts = Facts::default();
    // Who holds each window, or would if it were touched now.
    let mut held = [0_u8; 2];
    for window in 0..2 {
        held[usize::from(window)] = of_window(fleet, state, book, window, &mut facts);
    }
    for life in bits(state.alive()) {
        of_process(state, book, life, held, &mut facts);
    }
    of_pairs(state, book, &mut facts);
    if fleet.rule.removed == Removed::Nothing || fleet.rule.removed.only_blocks() {
        let calm = fleet.calm(state, book);
        facts.add(Fact::Stuck, calm.stuck);
        facts.add(Fact::Withheld, calm.withheld);
        facts.add(Fact::Refused, calm.refused);
    }
    facts
}

/// The invariants, in one window. Returns its holders.
fn of_window(fleet: &Fleet, state: &State, book: &mut Book, window: u8, facts: &mut Facts) -> u8 {
    let mut held = [None; LIVES];
    (0..state.started).for_each(|life| held[usize::from(life)] = fleet.held(state, book, life, window));
    let holders =
        (0..state.started).filter(|life| held[usize::from(*life)].is_some()).fold(0, |mask, life| mask | 1 << life);
    let excepted = bits(holders).fold(0, |mask, life| mask | state.processes[usize::from(life)].excepted);
    let mut total = 0;
    for life in (0..state.started).filter(|life| excepted & (1 << life) == 0) {
        total += fleet.rights(state, book, life, window);
    }
    facts.add(Fact::OverLimit, total > LIMIT as i64);
    for a in bits(holders) {
        for b in bits(holders & !(1 << a)) {
            let (of_a, of_b) = (&state.processes[usize::from(a)], &state.processes[usize::from(b)]);
            let is_excepted = of_a.excepted & (1 << b) != 0 || of_b.excepted & (1 << a) != 0;
            let frozen = held[usize::from(a)].expect("a holder");
            let counts = frozen.counted & (1 << b) != 0 || frozen.counted_slots & (1 << of_b.slot) != 0;
            facts.add(Fact::Excepted, is_excepted);
            facts.add(Fact::HolderNotCounted, !is_excepted && !counts);
        }
    }
    holders
}

fn of_process(state: &State, book: &Book, life: u8, held: [u8; 2], facts: &mut Facts) {
    let process = &state.processes[usize::from(life)];
    let view = book.view(process.replica);
    let dead = |other: &u8| !state.processes[usize::from(*other)].alive;
    let held_by_dead = |other: u8| state.processes[usize::from(other)].remains;
    // What it may not take and somebody has taken.
    let barred = |window: usize| view.first.is_some_and(|first| first.unix_ms() > STARTS[window]);
    let joined = view.first.is_some();
    let before = || (0..life).filter(dead).filter(|other| state.processes[usize::from(*other)].slot == process.slot);
    facts.add(Fact::LaterWindowFirst, view.frozen[1].is_some() && view.frozen[0].is_none());
    facts.add(Fact::Restarted, joined && before().next().is_some());
    facts.add(Fact::GoneAtStart, view.gone_at_start != 0);
    for (window, held) in held.into_iter().enumerate() {
        let holds = |other: u8| held_by_dead(other)[window].is_some();
        let alone = state.alive() == 1 << life;
        facts.add(Fact::RestartedAlone, alone && barred(window) && before().any(holds));
        facts.add(Fact::NewcomerWithoutEntitlement, barred(window) && view.knows & held & state.alive() != 0);
        let silent = view.waits_for | state.lives_at(view.unresolved);
        facts.add(Fact::GaveUpOnHolder, barred(window) && bits(silent & state.ended()).any(holds));
        let unheard = bits(state.ended() & !view.knows).filter(|other| holds(*other));
        let answered =
            |slot: u8| bits(view.knows & state.alive()).any(|other| state.processes[usize::from(other)].slot == slot);
        let replaced = unheard.into_iter().any(|other| answered(state.processes[usize::from(other)].slot));
        facts.add(Fact::AnsweredForTheDead, replaced && barred(window));
        let witnessed = bits(state.ended() & !view.knows).filter(|other| holds(*other)).any(|other| {
            let witnesses = state.processes[usize::from(other)].known_at_death;
            witnesses != 0 && witnesses & state.alive() == 0 && witnesses & process.alive_at_look != 0
        });
        facts.add(Fact::OnlyWitnessDied, witnessed && !joined);
    }
}

fn of_pairs(state: &State, book: &Book, facts: &mut Facts) {
    let view = |life: u8| book.view(state.processes[usize::from(life)].replica);
    let joining = |life: &u8| view(*life).first.is_none() && view(*life).looked;
    let answered = |view: &View| view.knows & !view.waits_for & !view.gone;
    let pairs = |lives: u8| bits(lives).flat_map(move |a| bits(lives & !(1 << a)).map(move |b| (a, b)));
    let joiners = bits(state.alive()).filter(joining).fold(0, |mask, life| mask | 1 << life);
    for (c, d) in pairs(joiners) {
        let (of_c, of_d) = (view(c), view(d));
        let list_each_other = of_c.unresolved & state.slots(1 << d) != 0 && of_d.unresolved & state.slots(1 << c) != 0;
        facts.add(Fact::SilentAtColdStart, list_each_other && of_c.knows | of_d.knows == 0);
        let leaving = bits(state.alive()).filter(|life| view(*life).leaving).fold(0, |mask, life| mask | 1 << life);
        let crossed = pairs(leaving).any(|(a, b)| {
            answered(of_c) & (1 << a) != 0
                && answered(of_d) & (1 << b) != 0
                && (answered(of_c) & (1 << b) == 0 && answered(of_d) & (1 << a) == 0)
        });
        facts.add(Fact::TwoLeaversTwoJoiners, crossed);
        let old = pairs(state.ended()).any(|(a, b)| {
            answered(of_c) & (1 << a) != 0
                && of_c.gone & (1 << b) != 0
                && answered(of_d) & (1 << b) != 0
                && of_d.gone & (1 << a) != 0
        });
        facts.add(Fact::OldAckAndGone, old);
    }
}
