//! Fragments: lost, repeated, reordered, forged, and too many of them.

use proptest::prelude::*;

use super::super::wire::{OLDEST_WIRE_VERSION, WIRE_VERSION};
use super::*;

const NOW: Timestamp = Timestamp::from_unix_ms(1_763_856_000_000);
const PEER: ReplicaId = ReplicaId::from_bits(2);

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

#[test]
fn what_fits_is_one_payload() {
    let mut assembler = Assembler::default();
    let payloads = split(Kind::Messages, 1, &bytes(MAX_PAYLOAD - 1)).unwrap();
    assert_eq!(payloads.len(), 1);
    let whole = assembler.accept(PEER, WIRE_VERSION, &payloads[0], NOW).unwrap();
    assert_eq!(whole, Assembled::Whole(Kind::Messages, bytes(MAX_PAYLOAD - 1)));
    assert_eq!(assembler.accept(PEER, WIRE_VERSION, &[], NOW), Ok(Assembled::Empty));
}

#[test]
fn sixty_four_fragments_and_no_more() {
    assert_eq!(split(Kind::Chitchat, 1, &bytes(MAX_SPLIT)).unwrap().len(), MAX_FRAGMENTS);
    assert_eq!(split(Kind::Chitchat, 1, &bytes(MAX_SPLIT + 1)), Err(TooLong(MAX_SPLIT + 1)));
    let longest = split(Kind::Chitchat, 1, &bytes(MAX_SPLIT)).unwrap();
    assert!(longest.iter().all(|payload| payload.len() <= MAX_PAYLOAD));
}

#[test]
fn a_lost_fragment_loses_the_message_and_nothing_else() {
    let mut assembler = Assembler::default();
    let lost = split(Kind::Messages, 1, &bytes(3_000)).unwrap();
    let whole = split(Kind::Messages, 2, &bytes(3_000)).unwrap();
    for payload in lost.iter().skip(1) {
        assert_eq!(assembler.accept(PEER, WIRE_VERSION, payload, NOW), Ok(Assembled::Partial));
    }
    let last = whole.iter().map(|payload| assembler.accept(PEER, WIRE_VERSION, payload, NOW).unwrap()).last();
    assert_eq!(last, Some(Assembled::Whole(Kind::Messages, bytes(3_000))));
}

#[test]
fn fragments_of_two_senders_do_not_mix() {
    let mut assembler = Assembler::default();
    let payloads = split(Kind::Messages, 1, &bytes(2_000)).unwrap();
    assert_eq!(assembler.accept(PEER, WIRE_VERSION, &payloads[0], NOW), Ok(Assembled::Partial));
    assert_eq!(assembler.accept(ReplicaId::from_bits(3), WIRE_VERSION, &payloads[1], NOW), Ok(Assembled::Partial));
}

#[test]
fn fragments_of_two_versions_do_not_mix() {
    let mut assembler = Assembler::default();
    let payloads = split(Kind::Messages, 1, &bytes(2_000)).unwrap();
    assert_eq!(assembler.accept(PEER, OLDEST_WIRE_VERSION, &payloads[0], NOW), Ok(Assembled::Partial));
    assert_eq!(assembler.accept(PEER, WIRE_VERSION, &payloads[1], NOW), Err(Rejected::Fragment));
    let whole = assembler.accept(PEER, OLDEST_WIRE_VERSION, &payloads[1], NOW);
    assert_eq!(whole, Ok(Assembled::Whole(Kind::Messages, bytes(2_000))));
}

#[test]
fn an_unfinished_message_is_forgotten_after_five_seconds() {
    let mut assembler = Assembler::default();
    let late = split(Kind::Messages, 1, &bytes(2_000)).unwrap();
    let other = split(Kind::Messages, 2, &bytes(2_000)).unwrap();
    assembler.accept(PEER, WIRE_VERSION, &late[0], NOW).unwrap();
    let later = NOW.plus(MAX_PARTIAL_AGE).next();
    assembler.accept(PEER, WIRE_VERSION, &other[0], later).unwrap();
    assert_eq!(assembler.partials.len(), 1);
}

#[test]
fn the_buffer_is_bounded_in_all_and_by_sender() {
    let mut assembler = Assembler::default();
    for id in 0..50 {
        let payloads = split(Kind::Messages, id, &bytes(2_000)).unwrap();
        assembler.accept(PEER, WIRE_VERSION, &payloads[0], NOW).unwrap();
    }
    assert_eq!(assembler.partials.len(), MAX_PARTIALS_PER_SENDER);
    assert!(assembler.partials.contains_key(&(PEER, 49)) && !assembler.partials.contains_key(&(PEER, 41)));
    for sender in 10..500 {
        let payloads = split(Kind::Messages, 1, &bytes(2_000)).unwrap();
        assembler.accept(ReplicaId::from_bits(sender), WIRE_VERSION, &payloads[0], NOW).unwrap();
    }
    assert_eq!(assembler.partials.len(), MAX_PARTIALS);
}

#[test]
fn fragments_that_do_not_fit_are_refused() {
    let mut assembler = Assembler::default();
    let good = split(Kind::Messages, 1, &bytes(3_000)).unwrap();
    let mut changed = |at: usize, byte: u8| {
        let mut payload = good[0].clone();
        payload[at] = byte;
        assembler.accept(PEER, WIRE_VERSION, &payload, NOW)
    };
    assert_eq!(changed(1, 9), Err(Rejected::Fragment)); // Kind.
    assert_eq!(changed(6, 3), Err(Rejected::Fragment)); // Index beyond the count.
    assert_eq!(changed(7, 1), Err(Rejected::Fragment)); // A count of one.
    assert_eq!(changed(7, 65), Err(Rejected::Fragment)); // A count beyond the most.
    assert_eq!(changed(7, 3), Ok(Assembled::Partial));
    assert_eq!(changed(7, 4), Err(Rejected::Fragment)); // Another count than before.
    assert_eq!(changed(1, Kind::Chitchat as u8), Err(Rejected::Fragment)); // Another kind.
    assert_eq!(assembler.accept(PEER, WIRE_VERSION, &good[0][..8], NOW), Err(Rejected::Fragment)); // Empty.
    assert_eq!(assembler.accept(PEER, WIRE_VERSION, &[9], NOW), Err(Rejected::Payload));
}

proptest! {
    #[test]
    fn order_and_repetition_do_not_matter(
        length in MAX_PAYLOAD..20_000usize,
        order in proptest::collection::vec(any::<prop::sample::Index>(), 0..60),
    ) {
        let mut assembler = Assembler::default();
        let payloads = split(Kind::Chitchat, 7, &bytes(length)).unwrap();
        let mut whole = 0;
        let mut came = std::collections::BTreeSet::new();
        let arrivals = order.iter().map(|index| index.index(payloads.len())).chain((0..payloads.len()).rev());
        for at in arrivals {
            came.insert(at);
            let assembled = assembler.accept(PEER, WIRE_VERSION, &payloads[at], NOW).unwrap();
            if assembled != Assembled::Partial {
                prop_assert_eq!(assembled, Assembled::Whole(Kind::Chitchat, bytes(length)));
                prop_assert_eq!(came.len(), payloads.len());
                came.clear();
                whole += 1;
            }
        }
        prop_assert!(whole >= 1);
    }

    #[test]
    fn arbitrary_payloads_never_panic(payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..50)) {
        let mut assembler = Assembler::default();
        for payload in payloads {
            let _ = assembler.accept(PEER, WIRE_VERSION, &payload, NOW);
        }
    }
}
