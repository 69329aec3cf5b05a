//! Random walks through fleets too large to search: everything that may happen, together.
//!
//! Knows how to pick a step. Must not know what a step does. The invariant it keeps: the same
//! seed takes the same walks, so what one finds is found again.

use std::collections::BTreeSet;
use std::mem::discriminant;

use stateright::{Expectation, Model};

use super::fleet::{Action, Bounds, Fleet, State};
use super::replica::Rule;

/// The longest walk.
const LONGEST: usize = 250;

/// After so many walks the book is closed: few of its pages are read twice.
const WALKS_OF_A_BOOK: usize = 500;

/// What walks have seen.
#[derive(Debug, Default)]
pub struct Walked {
    pub walks: usize,
    /// How many states were met; the first ones of a walk again and again.
    pub steps: usize,
    /// The most rounds that a calm took.
    pub rounds: u8,
    /// The names of everything that was reached.
    pub reached: BTreeSet<&'static str>,
}

/// A walk that broke an invariant, the invariant's name, and the fleet it walked through.
pub type Broken = (Fleet, &'static str, Vec<(State, Option<Action>)>);

/// Walks at least so many steps, or until an invariant is broken.
pub fn walk(rule: Rule, bounds: Bounds, seed: u64, steps: usize) -> Result<Walked, Box<Broken>> {
    let mut walked = Walked::default();
    let mut random = Random(seed);
    let mut fleet = Fleet::new(rule, bounds);
    let properties = fleet.properties();
    while walked.steps < steps {
        if walked.walks.is_multiple_of(WALKS_OF_A_BOOK) {
            fleet = Fleet::new(rule, bounds);
        }
        walked.walks += 1;
        let mut path = Vec::new();
        let mut state = fleet.init_states().remove(0);
        loop {
            for property in &properties {
                match (&property.expectation, (property.condition)(&fleet, &state)) {
                    (Expectation::Always, false) => {
                        path.push((state, None));
                        return Err(Box::new((fleet, property.name, path)));
                    }
                    (Expectation::Sometimes, true) => drop(walked.reached.insert(property.name)),
                    _ => {}
                }
            }
            if path.len() == LONGEST {
                break;
            }
            let Some((action, next)) = random.step(&fleet, &state) else { break };
            path.push((std::mem::replace(&mut state, next), Some(action)));
            walked.steps += 1;
        }
        walked.rounds = walked.rounds.max(fleet.calms().1);
    }
    Ok(walked)
}

/// splitmix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }

    /// A step that changes something, if there is one. Every other one is of a kind chosen first:
    /// letters are many, and everything else would come too seldom.
    fn step(&mut self, fleet: &Fleet, state: &State) -> Option<(Action, State)> {
        let mut actions = Vec::new();
        fleet.actions(state, &mut actions);
        while !actions.is_empty() {
            let mut chosen = self.below(actions.len());
            if self.below(2) == 0 {
                let mut kinds: Vec<_> = actions.iter().map(kind).collect();
                kinds.dedup();
                let wanted = kinds[self.below(kinds.len())];
                let of_kind: Vec<usize> = (0..actions.len()).filter(|place| kind(&actions[*place]) == wanted).collect();
                chosen = of_kind[self.below(of_kind.len())];
            }
            let action = actions.swap_remove(chosen);
            if let Some(next) = fleet.next_state(state, action) {
                return Some((action, next));
            }
        }
        None
    }
}

fn kind(action: &Action) -> (std::mem::Discriminant<Action>, Option<std::mem::Discriminant<super::replica::Event>>) {
    let event = match action {
        Action::Happens { event, .. } => Some(discriminant(event)),
        _ => None,
    };
    (discriminant(action), event)
}
