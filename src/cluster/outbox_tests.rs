//! Packing: order, bounds, heartbeats, echoes and versions.

use std::sync::Arc;

use super::super::fragment::{Assembled, Assembler};
use super::super::wire::{self, WIRE_VERSION};
use super::*;
use crate::ledger::{Key, LimitId, Member, Quota, RosterMessage, Row, Slot, WindowId};

const NOW: Timestamp = Timestamp::from_unix_ms(1_763_856_000_000);
const A: ReplicaId = ReplicaId::from_bits(1);
const B: ReplicaId = ReplicaId::from_bits(2);
const ME: ReplicaId = ReplicaId::from_bits(9);

fn addr(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn outbox() -> Outbox {
    let mut outbox = Outbox::new(ME, WIRE_VERSION);
    outbox.set_peers(&[(A, addr(1)), (B, addr(2))]);
    outbox
}

fn row(version: u64) -> Message {
    Message::Row(Row {
        replica: ME,
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
        if let Assembled::Whole(kind, bytes) = assembler.accept(ME, parcel.version, &parcel.payload, NOW).unwrap() {
            assert_eq!(kind, Kind::Messages);
            messages.extend(wire::decode(parcel.version, ME, &bytes).unwrap());
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
fn everyone_is_written_to_in_what_it_reads() {
    let mut outbox = outbox();
    outbox.set_versions([(B, WIRE_VERSION)]);
    let sent: Vec<_> = (0..100).map(row).chain([roster(200), row(100)]).collect();
    let parcels = outbox.pack(sent.clone().into_iter().map(|message| to(Target::Everyone, message)));
    let bytes = [(A, OLDEST_WIRE_VERSION), (B, WIRE_VERSION)].map(|(id, version)| {
        let of: Vec<_> = parcels.iter().filter(|parcel| parcel.receiver == Some(id)).cloned().collect();
        assert!(of.iter().all(|parcel| parcel.version == version));
        assert_eq!(read(&of), sent);
        of.iter().map(|parcel| parcel.payload.len()).sum::<usize>()
    });
    // Rows after the first of a payload say neither whose they are nor of what.
    assert!(bytes[1] + 100 * 30 < bytes[0], "{bytes:?}");
}

#[test]
fn whoever_has_announced_nothing_is_written_to_in_the_oldest_version() {
    let mut outbox = outbox();
    outbox.set_versions([(A, WIRE_VERSION)]);
    outbox.set_address(ReplicaId::from_bits(3), || Some(addr(3)));
    let targets = [Target::Replica(A), Target::Replica(B), Target::Replica(ReplicaId::from_bits(3))];
    let targets = targets.into_iter().chain([Target::Address(addr(1))]);
    let parcels = outbox.pack(targets.map(|target| to(target, row(1))));
    let versions: Vec<_> =
        parcels.iter().map(|parcel| (parcel.receiver.map(ReplicaId::bits), parcel.version)).collect();
    assert_eq!(versions, [(None, 1), (Some(1), 2), (Some(2), 1), (Some(3), 1)]);
    assert!(outbox.pack_chitchat(addr(1), &[0; 3_000]).iter().all(|parcel| parcel.version == OLDEST_WIRE_VERSION));
    outbox.tick();
    let beats = outbox.tick();
    assert_eq!(beats.iter().map(|beat| beat.version).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn a_process_that_starts_again_has_announced_nothing() {
    let mut outbox = outbox();
    outbox.set_versions([(A, WIRE_VERSION), (B, WIRE_VERSION)]);
    // The same address, another process; and one that is away for a moment.
    let again = ReplicaId::from_bits(4);
    outbox.set_peers(&[(again, addr(1))]);
    outbox.set_versions([(A, WIRE_VERSION)]);
    outbox.set_peers(&[(again, addr(1)), (B, addr(2))]);
    let versions = |outbox: &mut Outbox| {
        outbox.pack([to(Target::Everyone, row(1))]).iter().map(|parcel| parcel.version).collect::<Vec<_>>()
    };
    assert_eq!(versions(&mut outbox), [1, 1]);
    outbox.set_versions([(B, WIRE_VERSION)]);
    assert_eq!(versions(&mut outbox), [2, 1]);
    assert_eq!(outbox.peers.len(), 2, "nobody else is remembered");
}

#[test]
fn whatever_is_announced_a_version_of_ours_is_written() {
    for (newest, announced, written) in [(2, 0, 1), (2, 3, 2), (2, 255, 2), (1, 2, 1), (1, 255, 1)] {
        let mut outbox = Outbox::new(ME, newest);
        outbox.set_peers(&[(A, addr(1))]);
        outbox.set_versions([(A, announced)]);
        assert_eq!(outbox.pack([to(Target::Everyone, row(1))])[0].version, written);
    }
}

#[test]
fn what_cannot_be_sent_is_counted() {
    let mut outbox = outbox();
    let unknown = to(Target::Replica(ReplicaId::from_bits(8)), row(1));
    let huge = to(Target::Replica(A), roster(3_000));
    outbox.tick();
    assert!(outbox.pack([unknown, huge]).is_empty());
    assert_eq!(outbox.unsent(), 2);
    assert_eq!(outbox.tick().len(), 2, "nothing was sent, so both get their heartbeats");
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
    let mut outbox = Outbox::new(ME, WIRE_VERSION);
    for id in 0..5_000u64 {
        outbox.heard(ReplicaId::from_bits(u128::from(id)), Timestamp::from_unix_ms(id));
    }
    assert_eq!(outbox.heard.len(), MAX_HEARD);
    assert!(!outbox.heard.contains_key(&ReplicaId::from_bits(0)));
}
