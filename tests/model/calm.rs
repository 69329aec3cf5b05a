//! The calm after any state: no fault happens any more, the dead are proven, and every letter of
//! the living arrives.
//!
//! Knows what operators, the directory and the network then do, and what everybody alive must come
//! to. Must not know how a state came about: what becomes of the living is a function of the living,
//! as letters of the dead need never arrive.
//!
//! Liveness is a property of each state here, not of paths: "eventually" is a calm of at most
//! [`MOST_ROUNDS`] rounds, run to its end from every state that a search reaches. So a
//! counterexample is a finite schedule, and cycles hide nothing.

use super::replica::{Book, CALM, Event, LIMIT, LIVES, NEXT, Removed, Rule, bits};

/// In so many rounds everybody knows all there is to know, or never will.
pub const MOST_ROUNDS: u8 = 6;

/// What is left open about a calm. Each state sees all of [`CALMS`].
#[derive(Clone, Copy, Debug)]
struct Calm {
    /// Whether the directory is read again by those who wait, without the dead.
    looks_again: bool,
    /// Whether the newest replica that knows a dead one is told of its death, or the oldest.
    newest_is_told: bool,
    /// Whether both windows are touched by everybody before the first letter arrives.
    touches: bool,
}

const CALMS: [Calm; 2] = [
    Calm { looks_again: false, newest_is_told: false, touches: false },
    Calm { looks_again: true, newest_is_told: true, touches: true },
];

/// What the living come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// How many rounds changed somebody.
    pub rounds: u8,
    /// Somebody who is not leaving takes no share of the next window.
    pub stuck: bool,
    /// The shares of the next window do not sum up to the limit, or somebody counts others than
    /// the living: a part of the limit is nobody's.
    pub withheld: bool,
    /// Somebody could not gather the whole limit of the next window from those it can ask.
    pub refused: bool,
}

impl Outcome {
    fn or(self, other: Self) -> Self {
        Self {
            rounds: self.rounds.max(other.rounds),
            stuck: self.stuck || other.stuck,
            withheld: self.withheld || other.withheld,
            refused: self.refused || other.refused,
        }
    }
}

/// Returns the worst that any calm makes of the living.
pub fn outcome(rule: &Rule, book: &mut Book, living: &[u32]) -> Outcome {
    CALMS.iter().fold(Outcome::default(), |worst, calm| worst.or(calm.outcome(rule, book, living).0))
}

/// Returns the living as the first calm that ends badly leaves them.
pub fn example(rule: &Rule, book: &mut Book, living: &[u32]) -> Option<(String, Vec<u32>)> {
    let mut ends = CALMS.iter().map(|calm| (format!("{calm:?}"), calm.outcome(rule, book, living)));
    ends.find_map(|(calm, (outcome, living))| {
        (outcome.stuck || outcome.withheld || outcome.refused).then(|| (format!("{calm}: {outcome:?}"), living))
    })
}

impl Calm {
    fn outcome(self, rule: &Rule, book: &mut Book, living: &[u32]) -> (Outcome, Vec<u32>) {
        let mut fleet = Living::new(book, living);
        let rounds = self.settle(rule, book, &mut fleet);
        let outcome = fleet.in_next_window(rule, book);
        let outcome =
            Outcome { rounds: rounds.unwrap_or(MOST_ROUNDS), stuck: outcome.stuck | rounds.is_none(), ..outcome };
        (outcome, fleet.replicas)
    }

    /// Rounds until one changes nobody. Returns how many did, `None` if there was no end.
    fn settle(self, rule: &Rule, book: &mut Book, fleet: &mut Living) -> Option<u8> {
        if self.touches {
            (0..2).for_each(|window| fleet.everybody(rule, book, Event::Freeze { window }));
        }
        for round in 0..=MOST_ROUNDS {
            let before = (fleet.replicas.clone(), fleet.heard);
            self.look(rule, book, fleet);
            self.prove(rule, book, fleet);
            fleet.exchange(rule, book);
            if before == (fleet.replicas.clone(), fleet.heard) {
                return Some(round);
            }
        }
        None
    }

    /// The directory has forgotten the dead.
    fn look(self, rule: &Rule, book: &mut Book, fleet: &mut Living) {
        for place in 0..fleet.replicas.len() {
            let view = book.view(fleet.replicas[place]);
            if !view.looked || self.looks_again && view.first.is_none() {
                fleet.step(rule, book, place, Event::Look { listed: fleet.slots });
            }
        }
    }

    /// An operator forgets each of the dead once, at one replica that knows it and is not about to
    /// leave, and an address where nobody runs wherever it is shown: addresses are not passed on.
    /// A leaver may take what it was told with it; who waits goes on saying so.
    fn prove(self, rule: &Rule, book: &mut Book, fleet: &mut Living) {
        let views: Vec<_> = fleet.replicas.iter().map(|replica| *book.view(*replica)).collect();
        let stay = || views.iter().filter(|view| !view.leaving);
        let known_gone = stay().fold(fleet.proven, |mask, view| mask | view.gone);
        let dead = stay().fold(0, |mask, view| mask | view.knows) & !fleet.lives & !known_gone;
        for life in bits(dead) {
            let knows = |place: &usize| !views[*place].leaving && views[*place].knows & (1 << life) != 0;
            let mut places = 0..views.len();
            let told = if self.newest_is_told { places.rfind(knows) } else { places.find(knows) };
            fleet.step(rule, book, told.expect("somebody knows it"), Event::Forget { life });
        }
        fleet.proven |= dead;
        for (place, view) in views.iter().enumerate() {
            for slot in bits(view.unresolved & !fleet.slots) {
                fleet.step(rule, book, place, Event::ForgetSlot { slot });
            }
        }
    }
}

/// The living, as one calm changes them.
struct Living {
    replicas: Vec<u32>,
    lives: u8,
    slots: u8,
    /// What each said when the calm began.
    said: Vec<u32>,
    /// Of whom each has heard since that one looked: it can echo them.
    heard: [u8; LIVES],
    /// Whose deaths an operator has proven.
    proven: u8,
}

impl Living {
    fn new(book: &Book, living: &[u32]) -> Self {
        let views = || living.iter().map(|replica| book.view(*replica));
        Self {
            replicas: living.to_vec(),
            lives: views().fold(0, |mask, view| mask | 1 << view.life),
            slots: views().fold(0, |mask, view| mask | 1 << view.slot),
            said: views().map(|view| view.letter).collect(),
            heard: [0; LIVES],
            proven: 0,
        }
    }

    fn step(&mut self, rule: &Rule, book: &mut Book, place: usize, event: Event) {
        self.replicas[place] = book.step(rule, self.replicas[place], CALM, event);
    }

    fn everybody(&mut self, rule: &Rule, book: &mut Book, event: Event) {
        (0..self.replicas.len()).for_each(|place| self.step(rule, book, place, event));
    }

    /// Everybody sends what it has to say to those it takes for alive and to the addresses where
    /// nobody has answered it, as the ledger does until it is read; all of it arrives at once.
    fn exchange(&mut self, rule: &Rule, book: &mut Book) {
        let views: Vec<_> = self.replicas.iter().map(|replica| *book.view(*replica)).collect();
        let heard = self.heard;
        for (place, from) in views.iter().enumerate() {
            if rule.removed == Removed::Repetition && from.letter == self.said[place] {
                continue;
            }
            for (other, to) in views.iter().enumerate().filter(|(other, _)| *other != place) {
                let writes = from.knows & !from.gone & (1 << to.life) != 0 || from.unresolved & (1 << to.slot) != 0;
                if writes {
                    let echoed = heard[place] & (1 << to.life) != 0;
                    self.step(rule, book, other, Event::Deliver { letter: from.letter, echoed });
                    self.heard[other] |= u8::from(from.looked) << from.life;
                }
            }
        }
    }

    /// What everybody takes of the window after the two of the search.
    fn in_next_window(&self, rule: &Rule, book: &Book) -> Outcome {
        let views: Vec<_> = self.replicas.iter().map(|replica| book.view(*replica)).collect();
        let members: Vec<usize> = (0..views.len()).filter(|place| !views[*place].leaving).collect();
        let lives = members.iter().fold(0, |mask, place| mask | 1 << views[*place].life);
        let mut outcome = Outcome::default();
        let mut shares = [0_u64; LIVES];
        for place in &members {
            let Some(taken) = book.takes(rule, self.replicas[*place], NEXT) else {
                outcome.stuck = true;
                continue;
            };
            shares[*place] = u64::from(taken.share);
            outcome.withheld |= taken.counted | 1 << views[*place].life != lives || taken.counted_slots != 0;
        }
        outcome.withheld |= !members.is_empty() && !outcome.stuck && shares.iter().sum::<u64>() != LIMIT;
        // A request for all of it: everybody asked gives what it has, if each knows the other alive.
        let takes_for_alive = |a: usize, b: usize| views[a].knows & !views[a].gone & (1 << views[b].life) != 0;
        for asks in &members {
            let gives =
                |gives: &&usize| *gives == asks || takes_for_alive(*asks, **gives) && takes_for_alive(**gives, *asks);
            outcome.refused |= members.iter().filter(gives).map(|place| shares[*place]).sum::<u64>() != LIMIT;
        }
        outcome
    }
}
