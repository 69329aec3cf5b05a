//! Whatever keeps a replica from its share is shown with what resolves it; and what a platform
//! proves costs nobody anything.

mod fleet;

use std::collections::BTreeMap;
use std::sync::Arc;

use fleet::{Fleet, address};
use quotum::Quota;
use quotum::ledger::{
    Blocked, Directory, Gone, Ledger, MAX_MEMBERS, Member, Message, Note, OnSilence, ReplicaId, RosterMessage,
    RosterNote, RosterSettings, Slot, Timestamp,
};

const MINUTE: u64 = 60_000;
const LIMIT: u64 = 9_000;
const START: u64 = 1_000 * MINUTE;

fn quota() -> Quota {
    Quota::tokens(LIMIT).per_minute()
}

fn closed() -> RosterSettings {
    RosterSettings { on_silence: OnSilence::Closed, ..RosterSettings::default() }
}

fn blocked(fleet: &Fleet, pod: usize) -> Vec<Blocked> {
    fleet.pods[pod].limiter.status().blocked
}

/// Says that of all that blocks a pod exactly one is `who`, and that `resolve` is what to do.
fn shows(fleet: &Fleet, pod: usize, who: &str, why: &str, resolve: &str) {
    let all = blocked(fleet, pod);
    let about: Vec<_> = all.iter().filter(|blocked| blocked.who == who).collect();
    assert_eq!(about.len(), 1, "{who}: {all:?}");
    assert!(about[0].why.contains(why) && about[0].resolve.contains(resolve), "{:?}", about[0]);
}

#[test]
fn a_listed_address_that_never_answers_is_shown() {
    let mut fleet = Fleet::new(quota(), START);
    let pod = fleet.start(0, Directory::Static, closed());
    fleet.list(pod, &[address(0), address(1)]);
    fleet.run(5);
    let silent = address(1).to_string();
    shows(&fleet, pod, &silent, "no replica has ever answered", &format!("quotum forget {silent}"));
    fleet.pods[pod].limiter.forget(&silent).unwrap();
    fleet.run(2);
    assert_eq!(blocked(&fleet, pod), []);
}

#[test]
fn a_known_replica_that_is_silent_is_shown() {
    let mut fleet = Fleet::new(quota(), START);
    for pod in 0..2 {
        fleet.start(pod, Directory::Name, closed());
        fleet.list(pod, &[address(0), address(1)]);
    }
    fleet.run(5);
    fleet.kill(1);
    let newcomer = fleet.start(2, Directory::Name, closed());
    fleet.list(newcomer, &[address(0), address(2)]);
    fleet.run(5);
    let dead = fleet.pods[1].id.to_string();
    shows(&fleet, newcomer, &dead, "has not answered", &format!("quotum forget {dead}"));
    fleet.pods[newcomer].limiter.forget(&dead).unwrap();
    fleet.run(2);
    assert_eq!(blocked(&fleet, newcomer), []);
    assert!(fleet.pods[newcomer].joined().is_some());
}

#[test]
fn a_peer_that_fell_silent_is_shown_until_it_is_proven_gone() {
    let mut fleet = Fleet::joined(quota(), START + 30_000, 3);
    let silent = |fleet: &Fleet| fleet.pods[0].limiter.status().silent;
    fleet.kill(1);
    fleet.run(40);
    assert_eq!(silent(&fleet), [], "a restart is over by then");
    fleet.run(15);
    let dead = fleet.pods[1].id.to_string();
    let shown = silent(&fleet);
    assert_eq!(shown.len(), 1, "{shown:?}");
    assert_eq!(shown[0].who, dead);
    assert!(shown[0].why.contains("has not been heard for 5 s"), "{shown:?}");
    assert!(shown[0].resolve.contains(&format!("quotum forget {dead}")), "{shown:?}");
    fleet.pods[0].limiter.forget(&dead).unwrap();
    assert_eq!(silent(&fleet), []);
    // One that is heard, and does not hear.
    fleet.cut = [(0, 2)].into();
    fleet.run(60);
    let shown = silent(&fleet);
    assert!(shown.len() == 1 && shown[0].why.contains("is heard, and has not heard this replica"), "{shown:?}");
}

#[test]
fn who_seals_with_another_key_is_said_to_and_not_to_be_forgotten() {
    let mut fleet = Fleet::joined(quota(), START + 30_000, 2);
    let rejected = BTreeMap::from([(address(1), "another key"), (address(3), "another key")]);
    let stranger = fleet.start(2, Directory::Static, closed());
    fleet.list(stranger, &[address(0), address(1), address(2), address(3)]);
    fleet.kill(1);
    fleet.run(60);
    for pod in [0, stranger] {
        let rejected = rejected.clone();
        fleet.pods[pod].limiter.with_ledger(|ledger, now| ledger.handle_rejected(rejected, now));
        // The next exchange has heard nothing from there.
        fleet.pods[pod].limiter.with_ledger(|ledger, now| ledger.handle_rejected(BTreeMap::new(), now));
    }
    shows(&fleet, stranger, &address(3).to_string(), "another key", "do not forget it");
    let silent = fleet.pods[0].limiter.status().silent;
    assert!(silent[0].why.contains("another key") && silent[0].resolve.contains("do not forget it"), "{silent:?}");
}

#[test]
fn who_is_declared_gone_and_lives_is_not_ready_and_better_restarted() {
    let fleet = Fleet::joined(quota(), START + 30_000, 3);
    let status = |fleet: &Fleet| fleet.pods[1].limiter.status();
    assert!(status(&fleet).ready && status(&fleet).stuck().is_none());
    let id = fleet.pods[1].id.to_string();
    let teller = &fleet.pods[0];
    teller.limiter.forget(&id).unwrap();
    // As chitchat carries it: nobody writes to the dead.
    let roster = teller.limiter.with_ledger(|ledger, _| ledger.roster_message());
    let hear = |ledger: &mut Ledger, now| ledger.handle_message(teller.id, Message::Roster(roster), now);
    fleet.pods[1].limiter.with_ledger(hear);
    let told = status(&fleet);
    assert!(told.declared_gone && !told.ready && !told.has_share, "{told:?}");
    assert!(told.stuck().is_some_and(|why| why.contains("dead")));
}

#[test]
fn a_live_peer_that_the_static_list_lacks_is_shown() {
    let mut fleet = Fleet::new(quota(), START);
    let pod = fleet.start(0, Directory::Static, closed());
    fleet.list(pod, &[address(0)]);
    let stranger = fleet.start(5, Directory::Static, closed());
    fleet.list(stranger, &[address(0), address(5)]);
    fleet.run(5);
    let addr = address(5).to_string();
    shows(&fleet, pod, &addr, "does not name", &format!("add {addr} to gossip.seeds"));
}

#[test]
fn a_clock_off_the_median_is_shown() {
    let mut fleet = Fleet::new(quota(), START);
    fleet.offsets = BTreeMap::from([(2, 5_000)]);
    let list = [address(0), address(1), address(2)];
    for slot in 0..3 {
        fleet.start(slot, Directory::Static, RosterSettings::default());
        fleet.list(slot, &list);
    }
    fleet.run(20);
    let id = fleet.pods[2].id.to_string();
    shows(&fleet, 2, &id, "off the median", "NTP");
    fleet.offsets.clear();
    fleet.run(100);
    assert!(!blocked(&fleet, 2).iter().any(|blocked| blocked.who == id));
}

#[test]
fn a_fenced_replica_is_shown() {
    let mut fleet = Fleet::new(quota(), START);
    for pod in 0..2 {
        fleet.start(pod, Directory::Name, RosterSettings::default());
        fleet.list(pod, &[address(0), address(1)]);
    }
    fleet.run(5);
    assert_eq!(blocked(&fleet, 0), []);
    fleet.cut.extend([(0, 1), (1, 0)]);
    fleet.run_until(START + 3 * MINUTE);
    let id = fleet.pods[0].id.to_string();
    shows(&fleet, 0, &id, "no answer of the headless name and no peer", &address(0).to_string());
    fleet.list(0, &[address(0), address(1)]);
    assert_eq!(blocked(&fleet, 0), [], "one confirmation is enough");
}

#[test]
fn errors_of_the_directory_are_shown_until_it_answers() {
    let mut fleet = Fleet::new(quota(), START);
    let pod = fleet.start(0, Directory::Name, closed());
    let own = address(0).to_string();
    shows(&fleet, pod, &own, "not yet given an answer", "seeds");
    let fail = |fleet: &Fleet| {
        let (why, resolve) = ("the name does not resolve".to_owned(), "nslookup it".to_owned());
        fleet.pods[pod].limiter.with_ledger(|ledger, now| ledger.handle_no_listing(why, resolve, now));
    };
    fail(&fleet);
    shows(&fleet, pod, &own, "does not resolve", "nslookup it");
    fleet.list(pod, &[address(0)]);
    fleet.run(1);
    assert_eq!(blocked(&fleet, pod), []);
    fail(&fleet);
    assert!(fleet.pods[pod].joined().is_some());
    shows(&fleet, pod, &own, "does not resolve", "nslookup it");
}

#[test]
fn answers_without_my_own_address_are_shown() {
    let mut fleet = Fleet::new(quota(), START);
    let pod = fleet.start(0, Directory::Name, closed());
    let own = address(0).to_string();
    fleet.list(pod, &[address(1), address(2)]);
    shows(&fleet, pod, &own, &format!("it lists 2: [{}, {}]", address(1), address(2)), "publishNotReadyAddresses");
    fleet.list(pod, &[]);
    shows(&fleet, pod, &own, "it lists 0: []", "gossip.advertise");
    fleet.list(pod, &[address(0)]);
    fleet.run(1);
    assert_eq!(blocked(&fleet, pod), []);
}

#[test]
fn too_many_members_are_shown() {
    let fleet = Fleet::joined(quota(), START, 1);
    let member = |number: usize| Member {
        id: ReplicaId::new(Timestamp::from_unix_ms(START + 1), number as u128 + 1),
        slot: Slot { node: format!("n-{number}").into(), addr: ([10, 1, 1, 1], 7946).into(), exclusive: false },
        counts: Timestamp::ZERO,
        gone: None,
        seen: 0,
    };
    let mut members: Vec<_> = (0..MAX_MEMBERS).map(member).collect();
    members.sort_by_key(|member| member.id);
    let from = members[0].id;
    let (floor, watermark) = (Timestamp::ZERO, Timestamp::ZERO);
    let message = Message::Roster(Arc::new(RosterMessage { from, revision: 1, floor, watermark, members }));
    fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.handle_message(from, message, now));
    let id = fleet.pods[0].id.to_string();
    shows(&fleet, 0, &id, &format!("holds {MAX_MEMBERS} replicas"), "split the fleet");
}

#[test]
fn another_replica_of_the_same_node_name_is_noted_once() {
    let fleet = Fleet::joined(quota(), START, 1);
    let from = ReplicaId::new(Timestamp::from_unix_ms(START + 1), 5);
    let slot = Slot { node: "pod-0".into(), addr: address(5), exclusive: false };
    for revision in 1..50 {
        let members = vec![Member { id: from, slot: slot.clone(), counts: Timestamp::ZERO, gone: None, seen: 0 }];
        let (floor, watermark) = (Timestamp::ZERO, Timestamp::ZERO);
        let message = Message::Roster(Arc::new(RosterMessage { from, revision, floor, watermark, members }));
        let noted = fleet.pods[0].limiter.with_ledger(|ledger, now| {
            ledger.handle_message(from, message, now);
            std::iter::from_fn(|| ledger.poll_note()).collect::<Vec<_>>()
        });
        let named = Note::Roster(RosterNote::DuplicateNode { node: "pod-0".into(), replica: from });
        assert_eq!(noted.contains(&named), revision == 1, "{noted:?}");
    }
}

#[test]
fn a_platform_that_proves_a_death_frees_the_share_of_the_dead() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 3);
    fleet.kill(2);
    let gone = [Gone::Replica(fleet.pods[2].id)];
    fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.handle_gone(&gone, now));
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.drain_all(1), LIMIT, "one pod was told and told the other");
}

#[test]
fn a_platform_speaks_of_those_at_an_address_that_started_before() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 3);
    fleet.run_until(START + 20_000);
    let tell = |fleet: &Fleet, started_by: u64| {
        let started_by = Timestamp::from_unix_ms(started_by);
        let gone = [Gone::Address { addr: address(2), started_by }];
        fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.handle_gone(&gone, now));
    };
    let dead = |fleet: &Fleet| {
        let peers = fleet.pods[0].limiter.status().peers;
        peers.iter().any(|peer| peer.addr == address(2) && peer.gone.is_some())
    };
    // Its start and this are nearer to one another than clocks may be apart.
    tell(&fleet, START + 4_900);
    assert!(!dead(&fleet));
    tell(&fleet, START + 5_100);
    assert!(dead(&fleet));
}

#[test]
fn a_platform_that_knows_nobody_at_a_silent_address_lets_a_newcomer_join() {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    let pod = fleet.start(0, Directory::Name, closed());
    fleet.list(pod, &[address(0), address(1)]);
    fleet.run(5);
    let gone = [Gone::Address { addr: address(1), started_by: Timestamp::from_unix_ms(fleet.now_ms) }];
    let tell = |fleet: &Fleet| fleet.pods[pod].limiter.with_ledger(|ledger, now| ledger.handle_gone(&gone, now));
    tell(&fleet);
    fleet.run(2);
    assert_eq!(fleet.pods[pod].joined(), None, "it is listed: a later process may run there");
    fleet.list(pod, &[address(0)]);
    tell(&fleet);
    fleet.run(2);
    assert!(fleet.pods[pod].joined().is_some(), "{:?}", blocked(&fleet, pod));
    assert_eq!(fleet.drain_all(1), 0, "whoever ran there may have had this window");
    fleet.run_until(START + MINUTE + 10_000);
    assert_eq!(fleet.drain_all(1), LIMIT);
}
