//! A flood of distinct names: of quotas, of replicas, of deployments. What is too much is
//! refused and said so, and no open window is forgotten for it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quotum::ledger::{
    Contact, Directory, Key, LimitId, MAX_MEMBERS, MAX_QUOTAS, Member, Message, Note, ReplicaId, RosterMessage,
    RosterNote, RosterSettings, Row, Slot, Timestamp, Unit,
};
use quotum::{BuildError, Builder, Claim, Clock, Limiter, Quota};

const NOON: Timestamp = Timestamp::from_unix_ms(1_800_000_000_000 + 30_000);

/// What one peer says it has reserved in the window that must not be forgotten.
const THEIRS: u64 = 300;

#[derive(Debug)]
struct Stopped;

impl Clock for Stopped {
    fn now(&self) -> Timestamp {
        NOON
    }
}

fn quota() -> Quota {
    Quota::tokens(1_000).per_minute()
}

fn builder(names: impl IntoIterator<Item = String>) -> Builder {
    let builder = Limiter::builder().clock(Stopped).seed(1);
    names.into_iter().fold(builder, |builder, name| builder.deployment(name, [quota()]))
}

fn replica(number: u128) -> ReplicaId {
    ReplicaId::new(NOON, number + 1_000)
}

fn addr(number: u128) -> SocketAddr {
    let [.., a, b] = (number as u16).to_be_bytes();
    SocketAddr::from(([10, 0, a, b], 7946))
}

fn member(number: u128) -> Member {
    let slot = Slot { node: format!("pod-{number}").into(), addr: addr(number), exclusive: true };
    Member { id: replica(number), slot, counts: Timestamp::ZERO, gone: None, seen: 0 }
}

/// A limiter in a fleet, in whose running window this replica has spent 200, and a peer 300.
fn limiter() -> Limiter {
    let limiter = builder(["gpt".to_owned()]).build().unwrap();
    limiter.handle("gpt").unwrap().try_acquire(Claim::tokens(200)).unwrap().settle(200);
    let settings = RosterSettings { directory: Directory::Static, ..RosterSettings::default() };
    let slot = Slot { node: "me".into(), addr: addr(0), exclusive: true };
    limiter.attach(ReplicaId::new(NOON, 1), slot, settings, Duration::from_millis(100)).unwrap();
    hear(&limiter, 1, Message::Row(row(1, "gpt", THEIRS)));
    assert_eq!(used(&limiter), 200 + THEIRS);
    limiter
}

fn hear(limiter: &Limiter, from: u128, message: Message) {
    limiter.with_ledger(|ledger, now| ledger.handle_message(replica(from), message, now));
}

fn row(from: u128, limit: &str, reserved: u64) -> Row {
    Row {
        replica: replica(from),
        key: Key { limit: LimitId::of(limit), quota: quota() },
        window: quota().window().window_at(NOON).id(),
        version: reserved,
        reserved,
        refunded: 0,
        given: Vec::new(),
        spendable: 0,
        demand: 0,
        typical: 0,
    }
}

fn used(limiter: &Limiter) -> u64 {
    limiter.with_ledger(|ledger, now| ledger.standings("gpt", now))[0].used
}

/// The window still knows what was spent in it, and still learns.
fn assert_nothing_was_forgotten(limiter: &Limiter) {
    assert_eq!(used(limiter), 200 + THEIRS);
    let windows = limiter.with_ledger(|ledger, _| ledger.open_windows("gpt", Unit::Tokens));
    assert_eq!(windows.iter().map(|(_, reserved, ..)| reserved).sum::<u64>(), 200, "what was spent here");
    hear(limiter, 1, Message::Row(row(1, "gpt", THEIRS + 50)));
    assert_eq!(used(limiter), 200 + THEIRS + 50, "what a peer has said since");
}

#[test]
fn quotas_of_peers_are_held_up_to_a_bound_and_counted_beyond() {
    let limiter = limiter();
    for number in 0..5_000 {
        hear(&limiter, 1, Message::Row(row(1, &format!("unknown-{number}"), 10)));
    }
    let status = limiter.status();
    assert_eq!((status.held, status.ignored.too_many_keys), (1_024, 5_000 - 1_024));
    assert_nothing_was_forgotten(&limiter);
}

#[test]
fn replicas_are_told_apart_up_to_a_bound_and_counted_beyond() {
    let limiter = limiter();
    let room = usize::from(u16::MAX) as u128 - 2; // Itself, and the peer that has spoken.
    for number in 0..room + 10 {
        hear(&limiter, 1, Message::Row(row(2 + number, "gpt", 0)));
    }
    assert_eq!(limiter.status().ignored.too_many_replicas, 10);
    // A gift to somebody who cannot be named changes nothing else in the row.
    hear(&limiter, 1, Message::Row(Row { given: vec![(replica(1 << 40), 5)], ..row(1, "gpt", THEIRS) }));
    assert_eq!(limiter.status().ignored.too_many_replicas, 11);
    assert_nothing_was_forgotten(&limiter);
}

/// Whoever holds the key can lie about gifts; the rights of one replica still stay within the limit.
#[test]
fn gifts_are_credited_up_to_the_limit_and_counted_beyond() {
    let limiter = limiter();
    let rights = || limiter.with_ledger(|ledger, _| ledger.open_windows("gpt", Unit::Tokens)).iter().map(|w| w.3).sum();
    let spent: u64 = rights();
    assert_eq!(spent, 200);
    for (number, total) in [(1, 500), (2, 299), (3, 1_000_000), (3, 1 << 61), (4, 1)] {
        let given = vec![(ReplicaId::new(NOON, 1), total)];
        hear(&limiter, number, Message::Row(Row { given, ..row(number, "gpt", 0) }));
    }
    assert_eq!(rights(), 1_000, "the whole limit, and no more");
    assert_eq!(limiter.status().ignored.impossible_gift, 3);
}

#[test]
fn a_roster_takes_members_up_to_a_bound_and_says_so_beyond() {
    let limiter = limiter();
    let members: Vec<Member> = (1..MAX_MEMBERS as u128 + 200).map(member).collect();
    let message =
        RosterMessage { from: replica(1), revision: 1, floor: Timestamp::ZERO, watermark: Timestamp::ZERO, members };
    hear(&limiter, 1, Message::Roster(Arc::new(message)));
    assert_eq!(limiter.status().peers.len(), MAX_MEMBERS - 1);
    let notes: Vec<Note> = limiter.with_ledger(|ledger, _| std::iter::from_fn(|| ledger.poll_note()).collect());
    assert!(notes.contains(&Note::Roster(RosterNote::Full)), "{notes:?}");
    // Frames of strangers leave no trace beyond the same bound.
    for number in 0..2 * MAX_MEMBERS as u128 {
        let contact = Contact { from: replica(10_000 + number), sent_at: NOON, echo: None };
        limiter.with_ledger(|ledger, now| ledger.handle_contact(contact, now));
    }
    assert_eq!(limiter.status().peers.len(), MAX_MEMBERS - 1);
    assert_nothing_was_forgotten(&limiter);
}

#[test]
fn a_configuration_has_room_for_so_many_quotas_and_is_refused_beyond() {
    let names = |count: usize| (0..count).map(|number| format!("deployment-{number}"));
    let refused = builder(names(MAX_QUOTAS + 1)).build().unwrap_err();
    assert_eq!(refused, BuildError::TooManyQuotas { needed: MAX_QUOTAS + 1, most: MAX_QUOTAS });
    let text = refused.to_string();
    assert!(text.contains("65537") && text.contains("65536") && text.contains("fewer"), "{text}");

    let limiter = builder(names(MAX_QUOTAS - 1).chain(["gpt".to_owned()])).build().unwrap();
    limiter.handle("gpt").unwrap().try_acquire(Claim::tokens(900)).unwrap().settle(900);
    // The same names again need no room; one more does, even in place of another: what was
    // spent under the old one counts until its window ends.
    let limiter = limiter.reconfigure(builder(names(MAX_QUOTAS - 1).chain(["gpt".to_owned()]))).unwrap();
    let refused = limiter.reconfigure(builder(names(MAX_QUOTAS - 1).chain(["claude".to_owned()]))).unwrap_err();
    assert_eq!(refused, BuildError::TooManyQuotas { needed: MAX_QUOTAS + 1, most: MAX_QUOTAS });
    // Nothing has changed, and the window is not made again.
    assert!(limiter.handle("claude").is_err());
    assert!(limiter.handle("gpt").unwrap().try_acquire(Claim::tokens(101)).is_err());
    assert_eq!(used(&limiter), 900);
}

#[test]
fn a_roster_that_hardly_fits_a_message_is_shown() {
    let limiter = limiter();
    let hear_of = |members: std::ops::Range<u128>| {
        let (revision, floor) = (members.end as u64, Timestamp::ZERO);
        let members: Vec<Member> = members.map(member).collect();
        let message = RosterMessage { from: replica(1), revision, floor, watermark: floor, members };
        hear(&limiter, 1, Message::Roster(Arc::new(message)));
        limiter.status().blocked.into_iter().filter(|blocked| blocked.why.contains("replicas are remembered")).count()
    };
    assert_eq!(hear_of(1..600), 0);
    assert_eq!(hear_of(1..800), 1);
}

#[test]
fn a_newcomer_is_heard_after_any_number_of_predecessors() {
    let limiter = limiter();
    for number in 0..2 * MAX_MEMBERS as u128 {
        let contact = Contact { from: replica(10_000 + number), sent_at: NOON, echo: None };
        limiter.with_ledger(|ledger, now| ledger.handle_contact(contact, now));
    }
    let members = vec![member(1)];
    let message =
        RosterMessage { from: replica(1), revision: 1, floor: Timestamp::ZERO, watermark: Timestamp::ZERO, members };
    hear(&limiter, 1, Message::Roster(Arc::new(message)));
    let contact = Contact { from: replica(1), sent_at: NOON, echo: Some(NOON) };
    limiter.with_ledger(|ledger, now| ledger.handle_contact(contact, now));
    let peers = limiter.status().peers;
    assert!(peers.iter().any(|peer| peer.id == replica(1) && peer.reachable), "{peers:?}");
}
