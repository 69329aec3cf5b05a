//! The model check of who counts: every reachable state of small fleets, on the production
//! roster.
//!
//! What is real: [`quotum::ledger::Roster`], whole, with its messages, its shares by rank and
//! its clocks. What is modelled: processes that start, crash, leave and start again in the same
//! slot or a new one; a directory that lists every live registered process, and the dead or not;
//! operators who prove deaths; patience that runs out (only while everybody silent is dead: the
//! promise excepts the rest); a network that holds every roster message ever published, any of
//! which arrives at any time, again, or never; two windows of 4 units that run at once, touched in
//! any order or not at all; transfers of single units.
//!
//! From every state that is reached, `calm.rs` lets everything go well: no more faults, the dead
//! proven, letters of the living delivered in rounds. Within a handful of rounds everybody alive must
//! take its share of the next window, the shares must sum up to the limit, and whoever is asked for
//! all of it must be able to gather it. So liveness is an invariant of states as well.
//!
//! Time is five instants, chosen in `replica.rs` so that every comparison of the rule is met at
//! its edge with clocks at either end of epsilon.
//!
//! # What is left out
//!
//! Absence as a proof, self-fencing, garbage collection, a static list, a clock judged wrong, and
//! giving up on somebody alive: tests/roster.rs and the simulator have those. How often a
//! letter is repeated until it is read is the ledger's business, and the simulator's. Letters are read by
//! the process they reach, with the frame they came in; relays are not distinguished.
//!
//! # Why it is small
//!
//! What becomes of a replica is a function of itself, the instant and one event, so the production
//! code runs once for each such triple; a state of the fleet is a handful of numbers. A window that
//! could be touched now counts as touched in every check, and is touched for good only right before
//! an event that would change what it holds; a process that dies has touched all it could. Letters
//! that can change nobody any more are forgotten, and `Roster::essence` forgets what no longer
//! decides anything. None of this loses a violation: rights only grow by touching, and what is
//! merged by union, minimum or first word changes nobody twice.
//!
//! # What is covered
//!
//! | search | lives | covers | states |
//! |---|---|---|---|
//! | `two_lives_*` | 2 | all: every letter, early and late, a crash, a leave, a proof, giving up, looking again | exhausted |
//! | `three_lives_*` | 3 | as each test says; of the searches with `newest`, only the newest letter of each sender is under way | exhausted |
//! | `four_lives_*` | 4 | two members, two joiners, links cut as H1 and H2 want it | breadth-first, to a number of steps |
//! | `three_lives_crash_*` | 3 | a crash, a leave, a proof and a newcomer that gives up; `wait` and `admit` | breadth-first, to a number of steps |
//! | `everything_at_once_*` | 4 | three at once; every bound of [`EVERYTHING`] and every letter ever sent, three transfers | random walks, the same in every run |
//! | `without_*`, `a_*`, `admit_*` | 2-3 | the rule without one clause: a violation must be found | to the first violation |
//!
//! Each scenario of docs/algorithm.md section 7 must be reached by a search: H1 and H2 by `four_lives_*`, H3, H4, H5,
//! H6 and J2 by `two_lives_wait`, J1 by `three_lives_admit_*`, J3 by `three_lives_restart_*`.
//!
//! `QUOTUM_MODEL=full cargo test --release --no-default-features --test model -- --nocapture`
//! searches the larger bounds: minutes and gigabytes.

#![allow(unreachable_pub, reason = "a test binary has no reachable items")]

mod model {
    pub mod calm;
    pub mod facts;
    pub mod fleet;
    pub mod replica;
    pub mod walk;
}

use std::time::Instant;

use model::calm;
use model::facts::{self, Fact};
use model::fleet::{Action, Bounds, Fleet, State};
use model::replica::{Removed, Rule};
use model::walk::walk;
use quotum::ledger::FirstWindow::{self, Admit, Wait};
use stateright::{Checker, Expectation, HasDiscoveries, Model};

/// The first slot's clock is fast, the next two are slow.
const FAST_FIRST: [i64; 4] = [2_000, -2_000, -2_000, 2_000];

/// The other way round.
const SLOW_FIRST: [i64; 4] = [-2_000, 2_000, -2_000, -2_000];

/// Everything that two lives can do.
const TWO: Bounds = Bounds {
    cold: 0,
    warm: 0,
    lives: 2,
    alive: 2,
    crashes: 1,
    leaves: 1,
    proofs: 1,
    gives_up: true,
    gifts: 0,
    newest: false,
    cut: &[],
    early_letters: true,
    old_letters: true,
    looks_again: true,
    reaches: &[],
    instants: &[0, 1, 2, 3],
};

/// One process runs; of three lives, two at once.
const RESTART: Bounds = Bounds {
    cold: 1,
    lives: 3,
    leaves: 0,
    gives_up: false,
    newest: true,
    early_letters: false,
    looks_again: false,
    instants: &[0, 1, 3],
    ..TWO
};

/// Two have joined, and a third comes.
const NEWCOMER: Bounds = Bounds {
    cold: 2,
    warm: 2,
    lives: 3,
    alive: 3,
    leaves: 0,
    early_letters: false,
    looks_again: false,
    instants: &[0, 3],
    ..TWO
};

/// Two have joined; two more have registered and hear one of them each, not one another.
const CROSSED: Bounds = Bounds {
    cold: 4,
    warm: 2,
    lives: 4,
    alive: 4,
    gives_up: false,
    newest: true,
    cut: &[(1, 2), (2, 1), (0, 3), (3, 0), (2, 3), (3, 2)],
    early_letters: false,
    old_letters: false,
    looks_again: false,
    instants: &[0, 3],
    ..TWO
};

/// Two have joined, and a third comes while one crashes and one leaves.
const JOINT: Bounds = Bounds { leaves: 1, newest: true, old_letters: false, ..NEWCOMER };

/// All of it at once: three run, of four lives, and every letter ever sent.
const EVERYTHING: Bounds = Bounds { lives: 4, alive: 3, crashes: 2, leaves: 1, proofs: 3, gifts: 3, ..TWO };

fn rule(first_window: FirstWindow, clocks: [i64; 4]) -> Rule {
    Rule { first_window, removed: Removed::Nothing, clocks }
}

fn is_full() -> bool {
    std::env::var("QUOTUM_MODEL").is_ok_and(|wanted| wanted == "full")
}

/// How far a search must get, so that it cannot shrink unseen.
#[derive(Clone, Copy)]
enum Until {
    /// Every reachable state, at least this many.
    Exhausted { states: usize },
    /// This many steps from the initial state, breadth-first.
    Steps(usize),
}

/// Searches, and expects every invariant to hold and everything in `reaches` to happen.
fn holds(name: &str, rule: Rule, bounds: Bounds, until: Until) {
    let begin = Instant::now();
    let search = Fleet::new(rule, bounds).checker();
    let search = match until {
        Until::Steps(steps) => search.target_state_count(steps),
        Until::Exhausted { .. } => search,
    };
    // Not before every state was seen: nothing is done when its examples are found.
    let checker = search.finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let states = checker.unique_state_count();
    let (replicas, letters, steps) = checker.model().book().sizes();
    let (calms, rounds) = checker.model().calms();
    println!(
        "{name}: {states} states, {} steps, {} deep; {replicas} replicas, {letters} letters, {steps} steps of one \
         replica; {calms} fleets calm after at most {rounds} rounds; {:?}",
        checker.state_count(),
        checker.max_depth(),
        begin.elapsed()
    );
    if let Some(violation) = violation(&checker) {
        panic!("{name}: {violation}");
    }
    for fact in bounds.reaches {
        assert!(checker.discovery(fact.name()).is_some(), "{name}: {fact:?} was never reached");
    }
    if let Until::Exhausted { states: least } = until {
        assert!(states >= least, "{name}: {states} states of at least {least}");
    }
}

/// Walks at random, and expects every invariant to hold and everything in `reaches` to happen.
fn holds_on_walks(name: &str, rule: Rule, bounds: Bounds, steps: usize) {
    let begin = Instant::now();
    let walked = match walk(rule, bounds, 4, steps) {
        Ok(walked) => walked,
        Err(found) => panic!("{name}: {}", story(&found.0, found.1, &found.2)),
    };
    println!("{name}: {walked:?}; {:?}", begin.elapsed());
    for fact in bounds.reaches {
        assert!(walked.reached.contains(fact.name()), "{name}: {fact:?} was never reached");
    }
}

/// Searches the rule without a clause, and expects an invariant to fail.
fn fails(removed: Removed, rule: Rule, bounds: Bounds) {
    let rule = Rule { removed, ..rule };
    let search = Fleet::new(rule, bounds).checker().finish_when(HasDiscoveries::AnyFailures);
    let checker = search.target_state_count(3_000_000).spawn_bfs().join();
    let broken = broken(&checker);
    assert!(!broken.is_empty(), "{removed:?} is removed and nobody noticed");
    let is_liveness = broken.iter().all(|name| facts::is_liveness(name));
    assert_eq!(is_liveness, removed.only_blocks(), "{removed:?} broke {broken:?}");
}

/// Returns the names of the invariants that do not hold.
fn broken(checker: &impl Checker<Fleet>) -> Vec<&'static str> {
    let properties = checker.model().properties();
    let invariants = properties.iter().filter(|property| property.expectation == Expectation::Always);
    invariants.map(|invariant| invariant.name).filter(|name| checker.discovery(name).is_some()).collect()
}

/// Returns how the first invariant that does not hold was broken.
fn violation(checker: &impl Checker<Fleet>) -> Option<String> {
    let name = *broken(checker).first()?;
    Some(story(checker.model(), name, &checker.discovery(name)?.into_vec()))
}

/// What happened, and what everybody was at its end.
fn story(fleet: &Fleet, name: &str, path: &[(State, Option<Action>)]) -> String {
    let mut text = format!("not so: {name}");
    for (state, action) in path {
        if let Some(action) = action {
            text += &format!("\n  at {}: {action:?}", state.time);
        }
    }
    let (last, _) = path.last().expect("a path has a state");
    let mut book = fleet.book();
    let example = calm::example(&fleet.rule, &mut book, &last.living());
    if let Some((how, calmed)) = example.filter(|_| facts::is_liveness(name)) {
        text += &format!("\nafter {how}");
        calmed.into_iter().for_each(|replica| text += &format!("\n{}", book.describe(replica)));
        return text;
    }
    for life in 0..usize::from(last.started) {
        let process = &last.processes[life];
        let what = if process.alive { book.describe(process.replica) } else { format!("{process:#?}") };
        text += &format!("\n{what}");
    }
    text
}

#[test]
fn two_lives_wait() {
    let reaches = &[
        Fact::LaterWindowFirst,
        Fact::Restarted,
        Fact::SilentAtColdStart,
        Fact::RestartedAlone,
        Fact::NewcomerWithoutEntitlement,
        Fact::GoneAtStart,
        Fact::GaveUpOnHolder,
    ];
    let bounds = Bounds { reaches, ..TWO };
    if is_full() {
        let bounds = Bounds { crashes: 2, leaves: 2, proofs: 2, ..bounds };
        holds("two lives, slow first", rule(Wait, SLOW_FIRST), bounds, Until::Exhausted { states: 1_000_000 });
        holds("two lives", rule(Wait, FAST_FIRST), bounds, Until::Exhausted { states: 1_000_000 });
    }
    holds("two lives", rule(Wait, FAST_FIRST), bounds, Until::Exhausted { states: 700_000 });
}

#[test]
fn two_lives_admit() {
    let reaches = &[Fact::Excepted, Fact::SilentAtColdStart, Fact::Restarted, Fact::NewcomerWithoutEntitlement];
    let bounds = Bounds { reaches, ..TWO };
    if is_full() {
        let bounds = Bounds { crashes: 2, leaves: 2, proofs: 2, ..bounds };
        holds("two lives, admit", rule(Admit, FAST_FIRST), bounds, Until::Exhausted { states: 5_000_000 });
        holds("two lives, admit, slow first", rule(Admit, SLOW_FIRST), bounds, Until::Exhausted { states: 1_000_000 });
    }
    let bounds = Bounds { instants: &[0, 1, 3], gives_up: false, ..bounds };
    holds("two lives, admit", rule(Admit, SLOW_FIRST), bounds, Until::Exhausted { states: 200_000 });
}

#[test]
fn three_lives_restart_in_any_slot_j3() {
    let reaches = &[Fact::Restarted, Fact::RestartedAlone, Fact::AnsweredForTheDead, Fact::NewcomerWithoutEntitlement];
    let bounds = Bounds { reaches, ..RESTART };
    if is_full() {
        let bounds = Bounds { gives_up: true, instants: &[0, 1, 2, 3], ..bounds };
        holds("three lives, restart", rule(Wait, FAST_FIRST), bounds, Until::Exhausted { states: 5_000_000 });
    }
    holds("three lives, restart", rule(Wait, FAST_FIRST), bounds, Until::Exhausted { states: 900_000 });
}

#[test]
fn three_lives_and_every_letter_ever_published() {
    if is_full() {
        let bounds = Bounds { instants: &[0, 1, 3], ..NEWCOMER };
        holds("three lives, newcomer", rule(Wait, FAST_FIRST), bounds, Until::Exhausted { states: 1_000_000 });
    }
    holds("three lives, newcomer", rule(Wait, SLOW_FIRST), NEWCOMER, Until::Exhausted { states: 100_000 });
}

#[test]
fn three_lives_cold_at_once() {
    let bounds = Bounds {
        cold: 3,
        warm: 0,
        newest: true,
        gives_up: false,
        reaches: &[Fact::SilentAtColdStart],
        instants: if is_full() { &[0, 1, 3] } else { &[0, 3] },
        ..NEWCOMER
    };
    holds("three lives, cold", rule(Wait, FAST_FIRST), bounds, Until::Exhausted { states: 100_000 });
}

#[test]
fn three_lives_admit_after_the_only_witness_died_j1() {
    let bounds = Bounds {
        crashes: 2,
        proofs: 2,
        newest: true,
        gives_up: is_full(),
        reaches: &[Fact::OnlyWitnessDied, Fact::Excepted],
        ..NEWCOMER
    };
    holds("three lives, admit", rule(Admit, FAST_FIRST), bounds, Until::Exhausted { states: 100_000 });
}

#[test]
fn four_lives_two_leavers_and_two_joiners_h1() {
    let bounds = Bounds { crashes: 0, leaves: 2, proofs: 0, reaches: &[Fact::TwoLeaversTwoJoiners], ..CROSSED };
    let steps = if is_full() { 200_000_000 } else { 1_200_000 };
    holds("four lives, two leave", rule(Wait, FAST_FIRST), bounds, Until::Steps(steps));
}

#[test]
fn four_lives_two_crashes_and_two_joiners_h2() {
    let bounds = Bounds { crashes: 2, leaves: 0, proofs: 2, reaches: &[Fact::OldAckAndGone], ..CROSSED };
    let steps = if is_full() { 200_000_000 } else { 1_200_000 };
    holds("four lives, two crash", rule(Wait, FAST_FIRST), bounds, Until::Steps(steps));
}

#[test]
fn three_transfers_among_three_holders() {
    let bounds = Bounds { cold: 3, warm: 3, gifts: 3, leaves: 1, newest: true, ..NEWCOMER };
    holds("three transfers", rule(Wait, FAST_FIRST), bounds, Until::Exhausted { states: 9_000 });
}

#[test]
fn three_lives_crash_leave_and_newcomer_wait() {
    let reaches = &[Fact::NewcomerWithoutEntitlement];
    let steps = if is_full() { 15_000_000 } else { 1_000_000 };
    holds("three lives, all", rule(Wait, FAST_FIRST), Bounds { reaches, ..JOINT }, Until::Steps(steps));
}

#[test]
fn three_lives_crash_leave_and_newcomer_admit() {
    let reaches = &[Fact::Excepted];
    let steps = if is_full() { 15_000_000 } else { 1_000_000 };
    holds("three lives, all, admit", rule(Admit, FAST_FIRST), Bounds { reaches, ..JOINT }, Until::Steps(steps));
}

#[test]
fn everything_at_once_wait() {
    let reaches = &[
        Fact::LaterWindowFirst,
        Fact::Restarted,
        Fact::SilentAtColdStart,
        Fact::RestartedAlone,
        Fact::NewcomerWithoutEntitlement,
        Fact::GoneAtStart,
        Fact::GaveUpOnHolder,
    ];
    let steps = if is_full() { 2_000_000 } else { 60_000 };
    holds_on_walks("everything, wait", rule(Wait, FAST_FIRST), Bounds { reaches, ..EVERYTHING }, steps);
}

#[test]
fn everything_at_once_admit() {
    let reaches = &[
        Fact::LaterWindowFirst,
        Fact::Restarted,
        Fact::Excepted,
        Fact::SilentAtColdStart,
        Fact::NewcomerWithoutEntitlement,
        Fact::OnlyWitnessDied,
    ];
    let steps = if is_full() { 2_000_000 } else { 60_000 };
    holds_on_walks("everything, admit", rule(Admit, SLOW_FIRST), Bounds { reaches, ..EVERYTHING }, steps);
}

#[test]
fn walks_notice_what_is_removed() {
    for removed in [
        Removed::Acks,
        Removed::Floor,
        Removed::Entitlement,
        Removed::LeavingStops,
        Removed::Listing,
        Removed::Debit,
        Removed::Repetition,
        Removed::Telling,
        Removed::Goodbye,
        Removed::Forgetting,
        Removed::Echo,
    ] {
        let rule = Rule { removed, ..rule(Wait, FAST_FIRST) };
        let Err(found) = walk(rule, EVERYTHING, 4, 60_000) else {
            panic!("{removed:?} is removed and nobody noticed");
        };
        assert_eq!(facts::is_liveness(found.1), removed.only_blocks(), "{removed:?} broke {:?}", found.1);
    }
}

#[test]
fn without_acks_a_newcomer_shares_with_a_holder_that_does_not_count_it() {
    fails(Removed::Acks, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn without_the_floor_a_restarted_process_takes_the_window_again_h4() {
    fails(Removed::Floor, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn without_gone_in_first_a_newcomer_shares_with_the_dead() {
    fails(Removed::GoneInFirst, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn admit_although_somebody_is_gone_shares_with_the_dead() {
    fails(Removed::GoneInFirst, rule(Admit, FAST_FIRST), NEWCOMER);
}

#[test]
fn without_the_first_unfrozen_start_in_answers_a_newcomer_shares_what_is_frozen() {
    fails(Removed::Counts, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn without_a_floor_read_when_giving_up_a_newcomer_shares_with_the_dead_j2() {
    fails(Removed::LateFloor, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn admit_although_somebody_is_silent_shares_with_the_dead_h3_j1() {
    fails(Removed::LateFloor, rule(Admit, FAST_FIRST), Bounds { crashes: 2, newest: true, ..NEWCOMER });
}

#[test]
fn without_the_floor_of_the_one_that_answers_it_answers_for_the_dead_j3() {
    fails(Removed::FloorOfAnswer, rule(Wait, FAST_FIRST), RESTART);
}

#[test]
fn without_entitlement_newcomers_take_a_part_that_is_taken_h5() {
    fails(Removed::Entitlement, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn a_proof_dated_one_tick_early_forgets_a_share_h6() {
    fails(Removed::TickOfProof, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn a_goodbye_dated_one_tick_early_forgets_a_share_h6() {
    fails(Removed::TickOfGoodbye, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn a_leaver_that_takes_shares_on_is_over() {
    fails(Removed::LeavingStops, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn a_list_that_lacks_a_registered_replica_is_over() {
    fails(Removed::Listing, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn a_transfer_credited_twice_is_over() {
    fails(
        Removed::MergeOfGifts,
        rule(Wait, FAST_FIRST),
        Bounds { cold: 3, warm: 3, gifts: 3, newest: true, ..NEWCOMER },
    );
}

#[test]
fn a_transfer_without_debit_is_over() {
    fails(Removed::Debit, rule(Wait, FAST_FIRST), Bounds { cold: 3, warm: 3, gifts: 3, newest: true, ..NEWCOMER });
}

#[test]
fn a_newcomer_that_asks_once_is_stuck() {
    fails(Removed::Repetition, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn a_proof_of_death_that_is_not_passed_on_blocks() {
    fails(Removed::Telling, rule(Wait, FAST_FIRST), NEWCOMER);
}

#[test]
fn a_leaver_that_does_not_say_so_keeps_its_part() {
    fails(Removed::Goodbye, rule(Wait, FAST_FIRST), TWO);
}

#[test]
fn a_roster_that_never_forgets_the_dead_keeps_their_part() {
    fails(Removed::Forgetting, rule(Admit, FAST_FIRST), TWO);
}

#[test]
fn without_echoes_a_listed_address_blocks_for_ever() {
    fails(Removed::Echo, rule(Admit, FAST_FIRST), TWO);
}
