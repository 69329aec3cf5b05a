//! The fleet: who lives, what was ever published, what may happen next, what must hold.
//!
//! Knows processes, faults, the network and the directory. Must not know the roster's rule:
//! it asks [`Book`] what becomes of a replica, and the book asks the production code.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use quotum::ledger::FirstWindow;
use stateright::{Model, Property};

use super::calm::{self, Outcome};
use super::facts::{self, Fact, Facts};
use super::replica::{Book, Event, Frozen, GIFTS, LIVES, Removed, Rule, bits};

/// What a search covers.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Processes that run from the first instant on, each in its own slot, registered and
    /// not having looked.
    pub cold: u8,
    /// How many of those have joined already, with every letter between them delivered.
    pub warm: u8,
    /// Whether only the newest letter of each sender, living or dead, is still under way.
    pub newest: bool,
    /// Links that lose everything at the first instant, from one life to another. Time then
    /// passes only when nothing else but a fault or a proof can change anybody.
    pub cut: &'static [(u8, u8)],
    /// Whether letters reach a process before it has looked.
    pub early_letters: bool,
    /// Whether what was superseded before a process started may still reach it.
    pub old_letters: bool,
    /// Whether the directory is read again before joining.
    pub looks_again: bool,
    /// Processes that may ever start.
    pub lives: u8,
    /// Processes that run at once.
    pub alive: u8,
    pub crashes: u8,
    pub leaves: u8,
    /// Operators' proofs of death.
    pub proofs: u8,
    /// Whether a newcomer may give up waiting for the dead.
    pub gives_up: bool,
    pub gifts: u8,
    /// Facts of which the search must find an example.
    pub reaches: &'static [Fact],
    /// The instants of true time that are visited, in order.
    pub instants: &'static [u8],
}

/// One process, from its start to its end and as what remains of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Process {
    /// Its number in the book, 0 once it is dead.
    pub replica: u32,
    pub slot: u8,
    pub alive: bool,
    /// What it had frozen when it died.
    pub remains: [Option<Frozen>; 2],
    /// Who that was alive knew it when it died.
    pub known_at_death: u8,
    /// Who was alive when it looked.
    pub alive_at_look: u8,
    /// Whose windows it may spend again: `admit`'s promise excepts them.
    pub excepted: u8,
}

/// A transfer of one unit. What was ever published is credited as a maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gift {
    from: u8,
    to: u8,
    window: u8,
    credited: u8,
}

/// One state of the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Place in [`Bounds::instants`].
    pub time: u8,
    pub started: u8,
    pub crashes: u8,
    pub leaves: u8,
    pub proofs: u8,
    pub processes: [Process; LIVES],
    /// Every letter ever published that can still change somebody, and to whom its sender
    /// has sent it again after they looked.
    pub network: Vec<(u32, u8)>,
    pub gifts: Vec<Gift>,
    /// What holds of all the above.
    pub facts: Facts,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Time,
    Start {
        slot: u8,
    },
    Crash {
        life: u8,
    },
    /// An event, and the windows that were touched since the replica's last one.
    Happens {
        life: u8,
        touched: u8,
        event: Event,
    },
    Give {
        from: u8,
        to: u8,
        window: u8,
    },
    Credit {
        gift: u8,
    },
}

/// A search: the rule, what is covered, and everything met so far.
#[derive(Debug)]
pub struct Fleet {
    pub rule: Rule,
    pub bounds: Bounds,
    book: Mutex<Book>,
    /// What becomes of each fleet of living replicas, once nothing goes wrong any more.
    calms: Mutex<HashMap<Vec<u32>, Outcome>>,
}

impl Fleet {
    pub fn new(rule: Rule, bounds: Bounds) -> Self {
        Self { rule, bounds, book: Mutex::default(), calms: Mutex::default() }
    }

    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("no step panicked")
    }

    fn initial(&self) -> State {
        let mut state = State {
            time: 0,
            started: 0,
            crashes: 0,
            leaves: 0,
            proofs: 0,
            processes: [Process::default(); LIVES],
            network: Vec::new(),
            gifts: Vec::new(),
            facts: Facts::default(),
        };
        let mut book = self.book();
        for slot in 0..self.bounds.cold {
            if slot == self.bounds.warm {
                self.warm_up(&mut state, &mut book);
            }
            self.start(&mut state, &mut book, slot);
        }
        if self.bounds.warm == self.bounds.cold {
            self.warm_up(&mut state, &mut book);
        }
        state
    }

    /// Everybody looks, and every letter reaches everybody.
    fn warm_up(&self, state: &mut State, book: &mut Book) {
        let listed = state.slots(state.alive());
        for life in bits(state.alive()) {
            self.happens(state, book, life, 0, Event::Look { listed }, 0);
        }
        let mut events = Vec::new();
        while bits(state.alive()).any(|life| {
            events.clear();
            self.events(state, book, life, &mut events);
            events.retain(|event| matches!(event, Event::Deliver { .. }));
            events.iter().any(|event| self.happens(state, book, life, 0, *event, 0))
        }) {}
        for life in bits(state.alive()) {
            assert!(book.view(state.processes[usize::from(life)].replica).first.is_some(), "everybody has joined");
        }
        state.network.clear();
        bits(state.alive()).for_each(|life| state.publish(book, life));
    }

    fn instant(&self, state: &State) -> u8 {
        self.bounds.instants[usize::from(state.time)]
    }

    fn start(&self, state: &mut State, book: &mut Book, slot: u8) {
        let life = state.started;
        let replica = book.start(&self.rule, life, slot, self.instant(state));
        state.processes[usize::from(life)] = Process { replica, slot, alive: true, ..Process::default() };
        state.started += 1;
        state.publish(book, life);
    }

    fn happens(&self, state: &mut State, book: &mut Book, life: u8, touched: u8, event: Event, instant: u8) -> bool {
        let place = usize::from(life);
        let mut before = state.processes[place].replica;
        if touched != 0 {
            // When exactly a window was touched before the event matters only if the event
            // changes what the window would be.
            let after = book.step(&self.rule, before, instant, event);
            let learns = book.view(before).knows != book.view(after).knows;
            let moves = book.holds(&self.rule, before, instant) != book.holds(&self.rule, after, instant);
            if before == after || !(learns || moves || event == Event::Leave) {
                return false;
            }
        }
        for window in bits(touched) {
            before = book.step(&self.rule, before, instant, Event::Freeze { window });
        }
        let after = book.step(&self.rule, before, instant, event);
        if before == after {
            return false;
        }
        let (old, new) = (*book.view(before), *book.view(after));
        state.processes[place].replica = after;
        let admits = self.rule.first_window == FirstWindow::Admit;
        if new.looked && !old.looked {
            state.processes[place].alive_at_look = if admits { state.alive() } else { 0 };
            // Whatever lives may send what it has to say once more.
            for other in bits(state.alive()) {
                let letter = book.view(state.processes[usize::from(other)].replica).letter;
                state.post(letter, 1 << life);
            }
        }
        let admitting = self.rule.admitting_floor(state.processes[place].slot, instant);
        if admits && new.first.is_some() && old.first.is_none() && new.floor == admitting {
            state.processes[place].excepted = state.excepted_for(life);
        }
        if new.first.is_some() {
            state.processes[place].alive_at_look = 0;
        }
        if new.letter != old.letter {
            if self.bounds.newest {
                state.network.retain(|(letter, _)| *letter != old.letter);
            }
            state.publish(book, life);
        }
        match event {
            Event::Leave => state.leaves += 1,
            Event::Forget { .. } | Event::ForgetSlot { .. } => state.proofs += 1,
            _ => {}
        }
        true
    }

    /// Everything that may happen to one replica now, faults apart.
    fn events(&self, state: &State, book: &Book, life: u8, events: &mut Vec<Event>) {
        let process = &state.processes[usize::from(life)];
        let view = book.view(process.replica);
        if view.first.is_none() && (self.bounds.looks_again || !view.looked) {
            let running = state.slots(state.alive());
            let dead = state.slots(state.ended()) & !running;
            // The list may or may not still hold the dead.
            let mut some = dead;
            loop {
                events.push(Event::Look { listed: running | some });
                if self.rule.removed == Removed::Listing {
                    events.push(Event::Look { listed: 1 << process.slot | some });
                }
                if some == 0 {
                    break;
                }
                some = (some - 1) & dead;
            }
        }
        if view.first.is_none() {
            let silent = view.waits_for | state.lives_at(view.unresolved);
            if self.bounds.gives_up && view.looked && silent != 0 && silent & state.alive() == 0 {
                events.push(Event::GiveUp { silent });
            }
        }
        let reads = view.looked || self.bounds.early_letters;
        for (letter, echoed) in state.network.iter().filter(|_| reads) {
            let from = book.letter(*letter).from;
            let is_cut = state.time == 0 && self.bounds.cut.contains(&(from, life));
            if from != life && !is_cut {
                events.push(Event::Deliver { letter: *letter, echoed: echoed & (1 << life) != 0 });
            }
        }
        if state.proofs < self.bounds.proofs {
            for dead in bits(view.knows & !view.gone & state.ended()) {
                events.push(Event::Forget { life: dead });
            }
            for slot in bits(view.unresolved & !state.slots(state.alive())) {
                events.push(Event::ForgetSlot { slot });
            }
        }
    }

    fn step(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        let mut book = self.book();
        match action {
            Action::Time => next.time += 1,
            Action::Start { slot } => self.start(&mut next, &mut book, slot),
            Action::Crash { life } => {
                let process = next.processes[usize::from(life)];
                // A leaver that exits is no fault.
                next.crashes += u8::from(!book.view(process.replica).leaving);
                // To have touched every window it could is the worst a dead replica can
                // have done: nobody else ever learns of it.
                let remains = book.holds(&self.rule, process.replica, self.instant(state));
                next.processes[usize::from(life)] =
                    Process { replica: 0, alive: false, remains, alive_at_look: 0, ..process };
                if self.rule.first_window == FirstWindow::Admit {
                    let knew = bits(next.alive()).filter(|other| {
                        book.view(next.processes[usize::from(*other)].replica).knows & (1 << life) != 0
                    });
                    next.processes[usize::from(life)].known_at_death = knew.fold(0, |mask, other| mask | 1 << other);
                }
            }
            Action::Happens { life, touched, event } => {
                if !self.happens(&mut next, &mut book, life, touched, event, self.instant(state)) {
                    return None;
                }
            }
            Action::Give { from, to, window } => {
                let process = &mut next.processes[usize::from(from)];
                process.replica = book.step(&self.rule, process.replica, self.instant(state), Event::Freeze { window });
                next.gifts.push(Gift { from, to, window, credited: 0 });
                next.gifts.sort_unstable();
            }
            Action::Credit { gift } => {
                next.gifts[usize::from(gift)].credited += 1;
                next.gifts.sort_unstable();
            }
        }
        self.prune(&mut next, &mut book);
        next.facts = facts::of(self, &next, &mut book);
        Some(next)
    }

    /// Forgets letters that can change nobody any more. A letter that changes nothing now
    /// never will: everything in it is merged by union, minimum or first word.
    fn prune(&self, state: &mut State, book: &mut Book) {
        if state.started < self.bounds.lives && self.bounds.old_letters {
            return;
        }
        let instant = self.instant(state);
        let alive: Vec<u8> = bits(state.alive()).collect();
        let processes = state.processes;
        state.network.retain_mut(|(letter, echoed)| {
            let from = book.letter(*letter).from;
            *echoed &= alive.iter().fold(0, |mask, life| mask | 1 << life);
            let is_said =
                processes[usize::from(from)].alive && book.view(processes[usize::from(from)].replica).letter == *letter;
            is_said
                || alive.iter().any(|life| {
                    let echoed = *echoed & (1 << life) != 0;
                    let replica = processes[usize::from(*life)].replica;
                    *life != from
                        && book.step(&self.rule, replica, instant, Event::Deliver { letter: *letter, echoed })
                            != replica
                })
        });
    }

    /// What a process holds of a window, or would if it were touched now.
    pub fn held(&self, state: &State, book: &mut Book, life: u8, window: u8) -> Option<Frozen> {
        let process = &state.processes[usize::from(life)];
        let held =
            if process.alive { book.holds(&self.rule, process.replica, self.instant(state)) } else { process.remains };
        held[usize::from(window)]
    }

    pub fn rights(&self, state: &State, book: &mut Book, life: u8, window: u8) -> i64 {
        let mut rights = self.held(state, book, life, window).map_or(0, |frozen| i64::from(frozen.share));
        for gift in state.gifts.iter().filter(|gift| gift.window == window) {
            if gift.from == life && self.rule.removed != Removed::Debit {
                rights -= 1;
            }
            if gift.to == life {
                rights += i64::from(gift.credited);
            }
        }
        rights
    }

    /// What becomes of the living if nothing goes wrong any more.
    pub fn calm(&self, state: &State, book: &mut Book) -> Outcome {
        let living = state.living();
        let mut calms = self.calms.lock().expect("no step panicked");
        *calms.entry(living.clone()).or_insert_with(|| calm::outcome(&self.rule, book, &living))
    }

    /// How many different fleets were met by a calm, and the most rounds that one took.
    pub fn calms(&self) -> (usize, u8) {
        let calms = self.calms.lock().expect("no step panicked");
        (calms.len(), calms.values().map(|outcome| outcome.rounds).max().unwrap_or_default())
    }

    /// Whether nothing but a fault, a proof or time can change anybody.
    fn is_settled(&self, state: &State, book: &mut Book) -> bool {
        let mut events = Vec::new();
        bits(state.alive()).all(|life| {
            events.clear();
            self.events(state, book, life, &mut events);
            events.retain(|event| !matches!(event, Event::Forget { .. } | Event::ForgetSlot { .. }));
            let replica = state.processes[usize::from(life)].replica;
            events.iter().all(|event| book.step(&self.rule, replica, self.instant(state), *event) == replica)
        })
    }
}

impl State {
    pub fn alive(&self) -> u8 {
        self.mask(|process| process.alive)
    }

    /// The replicas that run, by number in the book.
    pub fn living(&self) -> Vec<u32> {
        bits(self.alive()).map(|life| self.processes[usize::from(life)].replica).collect()
    }

    pub fn ended(&self) -> u8 {
        self.mask(|process| !process.alive)
    }

    fn mask(&self, is_meant: impl Fn(&Process) -> bool) -> u8 {
        (0..self.started)
            .filter(|life| is_meant(&self.processes[usize::from(*life)]))
            .fold(0, |mask, life| mask | 1 << life)
    }

    pub fn slots(&self, lives: u8) -> u8 {
        bits(lives).fold(0, |mask, life| mask | 1 << self.processes[usize::from(life)].slot)
    }

    pub fn lives_at(&self, slots: u8) -> u8 {
        self.mask(|process| slots & (1 << process.slot) != 0)
    }

    fn publish(&mut self, book: &Book, life: u8) {
        let looked = bits(self.alive()).filter(|life| book.view(self.processes[usize::from(*life)].replica).looked);
        let looked = looked.fold(0, |mask, life| mask | 1 << life);
        self.post(book.view(self.processes[usize::from(life)].replica).letter, looked);
    }

    fn post(&mut self, letter: u32, echoed: u8) {
        match self.network.binary_search_by_key(&letter, |(letter, _)| *letter) {
            Ok(place) => self.network[place].1 |= echoed,
            Err(place) => self.network.insert(place, (letter, echoed)),
        }
    }

    /// Whose windows a cold start may spend again: those who died before anybody that a
    /// newcomer could still hear had heard them.
    fn excepted_for(&self, life: u8) -> u8 {
        let at_look = self.processes[usize::from(life)].alive_at_look;
        self.mask(|process| !process.alive)
            & (0..self.started).fold(0, |mask, dead| {
                let process = &self.processes[usize::from(dead)];
                let is_unheard = bits(process.known_at_death | 1 << dead).all(|witness| {
                    let slot = self.processes[usize::from(witness)].slot;
                    let replaced =
                        (witness + 1..self.started).any(|later| self.processes[usize::from(later)].slot == slot);
                    !self.processes[usize::from(witness)].alive && (at_look & (1 << witness) == 0 || replaced)
                });
                mask | u8::from(is_unheard) << dead
            })
    }
}

impl Model for Fleet {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.initial()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let mut book = self.book();
        let bounds = &self.bounds;
        let may_pass = bounds.cut.is_empty() || self.is_settled(state, &mut book);
        if usize::from(state.time) + 1 < bounds.instants.len() && may_pass {
            actions.push(Action::Time);
        }
        let alive = state.alive();
        if state.started < bounds.lives && alive.count_ones() < u32::from(bounds.alive) {
            let taken = state.slots((1 << state.started) - 1);
            let fresh = (0..).find(|slot| taken & (1 << slot) == 0).expect("a slot is free");
            for slot in bits(taken & !state.slots(alive) | 1 << fresh) {
                actions.push(Action::Start { slot });
            }
        }
        let mut events = Vec::new();
        for life in bits(alive) {
            let view = book.view(state.processes[usize::from(life)].replica);
            if view.leaving || state.crashes < bounds.crashes {
                actions.push(Action::Crash { life });
            }
            if !view.leaving && state.leaves < bounds.leaves {
                events.push(Event::Leave);
            }
            let frozen = view.frozen;
            let holds = book.holds(&self.rule, state.processes[usize::from(life)].replica, self.instant(state));
            let may_touch = (0..2).filter(|window| frozen[*window].is_none() && holds[*window].is_some());
            let may_touch = may_touch.fold(0_u8, |mask, window| mask | 1 << window);
            self.events(state, &book, life, &mut events);
            for event in events.drain(..) {
                let touched = (0..4_u8).filter(|touched| touched & !may_touch == 0);
                actions.extend(touched.map(|touched| Action::Happens { life, touched, event }));
            }
            self.gifts(state, &mut book, life, actions);
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        self.step(state, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        facts::properties(&self.bounds)
    }
}

impl Fleet {
    fn gifts(&self, state: &State, book: &mut Book, life: u8, actions: &mut Vec<Action>) {
        for (place, gift) in state.gifts.iter().enumerate() {
            let most = if self.rule.removed == Removed::MergeOfGifts { 2 } else { 1 };
            if gift.to == life && gift.credited < most {
                actions.push(Action::Credit { gift: place as u8 });
            }
        }
        if state.gifts.len() >= usize::from(self.bounds.gifts).min(GIFTS) {
            return;
        }
        let knows = book.view(state.processes[usize::from(life)].replica).knows;
        for window in 0..2 {
            if self.rights(state, book, life, window) > 0 {
                actions.extend(bits(knows).map(|to| Action::Give { from: life, to, window }));
            }
        }
    }
}
