//! Packing: order, bounds, heartbeats and echoes.

use std::sync::Arc;

use super::super::fragment::{Assembled, Assembler};
use super::*;
use crate::ledger::{Key, LimitId, Member, Quota, RosterMessage, Row, Slot, WindowId};

const NOW: Timestamp = Timestamp::from_unix_ms(1_763_856_000_000);
const A: ReplicaId = ReplicaId::from_bits(1);
const B: ReplicaId = ReplicaId::from_bits(2);

fn addr(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn outbox() -> Outbox {
    let mut outbox = Outbox::new();
    outbox.set_peers(&[(A, addr(1)), (B, addr(2))]);
    outbox
}

fn row(version: u64) -> Message {
    Message::Row(Row {
        replica: ReplicaId::from_bits(9),
        key: Key { limit: LimitId::of("a"), quota: Quota::tokens(100).per_minute() },
        window: WindowId::starting(Timestamp::ZERO),
        version,
        reserved: 1,
        refunded: 0,
        given: vec![],
        spendable: 0,
        demand: 0,
        typical: 0,
    })
}

fn roster(members: u128) -> Message {
    let member = |id| Member {
        id: ReplicaId::from_bits(id),
        slot: Slot { node: "pod".into(), addr: addr(7), exclusive: true },
        counts: Timestamp::ZERO,
        gone: None,
        seen: 0,
    };
    let members = (0..members).map(member).collect();
    Message::Roster(Arc::new(RosterMessage {
        from: A,
        revision: 1,
        floor: Timestamp::ZERO,
        watermark: Timestamp::ZERO,
        members,
    }))
}

fn to(to: Target, message: Message) -> Transmit {
    Transmit { to, message }
}

/// What a receiver reads out of these parcels.
fn read(parcels: &[Parcel]) -> Vec<Message> {
    let mut assembler = Assembler::default();
    let mut messages = Vec::new();
    for parcel in parcels {
        assert!(parcel.payload.len() <= MAX_PAYLOAD);
        if let Assembled::Whole(kind, bytes) = assembler.accept(A, &parcel.payload, NOW).unwrap() {
            assert_eq!(kind, Kind::Messages);
            messages.extend(wire::decode(wire::WIRE_VERSION, &bytes).unwrap());
        }
    }
    messages
}

#[test]
fn messages_of_one_peer_share_a_payload_in_order() {
    let parcels = outbox().pack((0..5).map(|version| to(Target::Replica(A), row(version))));
    assert_eq!(parcels.len(), 1);
    assert_eq!((parcels[0].to, parcels[0].receiver), (addr(1), Some(A)));
    assert_eq!(read(&parcels), (0..5).map(row).collect::<Vec<_>>());
}

#[test]
fn everyone_gets_what_is_for_everyone_and_payloads_stay_in_bounds() {
    let parcels = outbox().pack((0..100).map(|version| to(Target::Everyone, row(version))));
    for id in [A, B] {
        let of: Vec<_> = parcels.iter().filter(|parcel| parcel.receiver == Some(id)).cloned().collect();
        assert!(of.len() > 1);
        assert_eq!(read(&of), (0..100).map(row).collect::<Vec<_>>());
    }
}

#[test]
fn a_long_roster_is_split_and_keeps_its_place() {
    let sent = [row(1), roster(200), row(2)];
    let parcels = outbox().pack(sent.clone().map(|message| to(Target::Replica(A), message)));
    assert!(parcels.len() > 3);
    assert_eq!(read(&parcels), sent);
}

#[test]
fn what_cannot_be_sent_is_counted() {
    let mut outbox = outbox();
    let unknown = to(Target::Replica(ReplicaId::from_bits(8)), row(1));
    let huge = to(Target::Replica(A), roster(3_000));
    assert!(outbox.pack([unknown, huge]).is_empty());
    assert_eq!(outbox.unsent(), 2);
}

#[test]
fn an_address_is_whoever_is_there() {
    let parcels = outbox().pack([to(Target::Address(addr(5)), row(1))]);
    assert_eq!((parcels[0].to, parcels[0].receiver, parcels[0].echo), (addr(5), None, None));
}

#[test]
fn an_idle_peer_gets_a_heartbeat_every_second_tick() {
    let mut outbox = outbox();
    let beats: Vec<usize> = (0..6).map(|_| outbox.tick().len()).collect();
    assert_eq!(beats, [0, 2, 0, 2, 0, 2]);
    outbox.tick();
    outbox.pack([to(Target::Replica(A), row(1))]);
    let beat = outbox.tick();
    assert_eq!(beat.iter().map(|parcel| parcel.receiver).collect::<Vec<_>>(), [Some(B)]);
    assert!(beat[0].payload.is_empty());
}

#[test]
fn chitchat_does_not_count_as_having_been_heard_of_us() {
    let mut outbox = outbox();
    outbox.tick();
    assert_eq!(outbox.pack_chitchat(addr(1), b"syn").len(), 1);
    assert_eq!(outbox.tick().len(), 2);
}

#[test]
fn the_echo_is_the_latest_send_time() {
    let mut outbox = outbox();
    outbox.heard(A, NOW);
    outbox.heard(A, NOW.minus(std::time::Duration::from_secs(1)));
    let parcels = outbox.pack([to(Target::Everyone, row(1))]);
    assert_eq!(parcels.iter().map(|parcel| parcel.echo).collect::<Vec<_>>(), [Some(NOW), None]);
}

#[test]
fn what_was_heard_is_bounded_and_the_stalest_is_forgotten() {
    let mut outbox = Outbox::new();
    for id in 0..5_000u64 {
        outbox.heard(ReplicaId::from_bits(u128::from(id)), Timestamp::from_unix_ms(id));
    }
    assert_eq!(outbox.heard.len(), MAX_HEARD);
    assert!(!outbox.heard.contains_key(&ReplicaId::from_bits(0)));
}
