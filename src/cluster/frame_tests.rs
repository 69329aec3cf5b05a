//! Frames: everything that must be thrown away is, for the right reason.

use proptest::prelude::*;

use super::*;

const NOW: Timestamp = Timestamp::from_unix_ms(1_763_856_000_000);
const ME: ReplicaId = ReplicaId::from_bits(1);
const PEER: ReplicaId = ReplicaId::from_bits(2);

fn ring(byte: u8) -> KeyRing {
    KeyRing::of([byte; 32])
}

fn frames(keys: KeyRing, me: ReplicaId) -> Frames {
    Frames::new(keys, "test", me)
}

/// A frame of `PEER` with key 1, changed by `change`, opened by `ME` with key 1.
fn opened_after(change: impl FnOnce(&mut Vec<u8>)) -> Result<Vec<u8>, Rejected> {
    let mut frame = frames(ring(1), PEER).seal(WIRE_VERSION, Some(ME), NOW, None, [3; 24], b"rows");
    change(&mut frame);
    frames(ring(1), ME).open(&mut frame, NOW).map(|opened| opened.payload.to_vec())
}

#[test]
fn a_sealed_payload_comes_out_with_its_header() {
    let echo = Some(NOW.minus(Duration::from_millis(5)));
    let mut frame = frames(ring(1), PEER).seal(WIRE_VERSION, Some(ME), NOW, echo, [3; 24], b"rows");
    let ours = frames(ring(1), ME);
    let opened = ours.open(&mut frame, NOW).unwrap();
    assert_eq!(opened.contact, Contact { from: PEER, sent_at: NOW, echo });
    assert_eq!((opened.to, opened.payload), (Some(ME), &b"rows"[..]));
}

#[test]
fn golden_frame() {
    // The seal is that of XChaCha20-Poly1305, so another release must write the same bytes.
    let frame = |version| {
        let frame = frames(ring(1), PEER).seal(version, None, Timestamp::from_unix_ms(256), None, [3; 24], b"rows");
        frame.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    assert_eq!(frame(1), GOLDEN_1);
    // The same but for the version, which is authenticated, and so for the tag.
    let [before, after] = ["71746d01", "71746d02"];
    let cut = GOLDEN_1.len() - 2 * TAG;
    assert_eq!(frame(2), GOLDEN_1[..cut].replacen(before, after, 1) + GOLDEN_2_TAG);
}

#[test]
fn the_largest_payload_makes_the_largest_datagram() {
    let frame = frames(ring(1), PEER).seal(WIRE_VERSION, None, NOW, None, [3; 24], &[0; MAX_PAYLOAD]);
    assert_eq!(frame.len(), MAX_DATAGRAM);
}

#[test]
fn garbage_is_foreign() {
    let ours = frames(ring(1), ME);
    assert_eq!(ours.open(&mut [], NOW), Err(Rejected::Foreign));
    assert_eq!(ours.open(&mut [7; 400], NOW), Err(Rejected::Foreign));
    assert_eq!(opened_after(|frame| frame.resize(MAX_DATAGRAM + 1, 0)), Err(Rejected::TooLong));
}

#[test]
fn a_cut_frame_is_truncated_or_its_seal_broken() {
    assert_eq!(opened_after(|frame| frame.truncate(HEADER - 1)), Err(Rejected::Truncated));
    assert_eq!(opened_after(|frame| frame.truncate(HEADER + TAG - 1)), Err(Rejected::Truncated));
    assert_eq!(opened_after(|frame| frame.truncate(HEADER + TAG)), Err(Rejected::Seal));
}

#[test]
fn another_key_is_unknown_and_no_key_is_unsealed() {
    let ours = frames(ring(1), ME);
    let mut other = frames(ring(2), PEER).seal(WIRE_VERSION, None, NOW, None, [3; 24], b"rows");
    assert_eq!(ours.open(&mut other, NOW), Err(Rejected::Key));
    let mut none = frames(KeyRing::unkeyed(), PEER).seal(WIRE_VERSION, None, NOW, None, [3; 24], b"rows");
    assert_eq!(ours.open(&mut none.clone(), NOW), Err(Rejected::Unsealed));
    assert!(frames(KeyRing::unkeyed(), ME).open(&mut none, NOW).is_ok());
}

#[test]
fn every_key_of_the_ring_opens_and_the_first_seals() {
    let (one, two) = ("01".repeat(32), "02".repeat(32));
    let rotating = KeyRing::parse(&format!("# new\n{two}\n\n{one}\n")).unwrap();
    let mut old = frames(ring(1), PEER).seal(WIRE_VERSION, None, NOW, None, [3; 24], b"rows");
    assert!(frames(rotating.clone(), ME).open(&mut old, NOW).is_ok());
    let mut new = frames(rotating, PEER).seal(WIRE_VERSION, None, NOW, None, [3; 24], b"rows");
    assert!(frames(ring(2), ME).open(&mut new, NOW).is_ok());
}

#[test]
fn frames_of_others_for_others_and_of_ourselves_are_dropped() {
    let ours = frames(ring(1), ME);
    let mut cluster = Frames::new(ring(1), "staging", PEER).seal(WIRE_VERSION, None, NOW, None, [3; 24], b"");
    assert_eq!(ours.open(&mut cluster, NOW), Err(Rejected::Cluster));
    let mut own = ours.seal(WIRE_VERSION, None, NOW, None, [3; 24], b"");
    assert_eq!(ours.open(&mut own, NOW), Err(Rejected::Own));
    let mut other = frames(ring(1), PEER).seal(WIRE_VERSION, Some(ReplicaId::from_bits(9)), NOW, None, [3; 24], b"");
    assert_eq!(ours.open(&mut other, NOW), Err(Rejected::Receiver));
}

#[test]
fn frames_are_fresh_for_fourteen_seconds_either_way() {
    let ours = frames(ring(1), ME);
    let at = |now: Timestamp| {
        let mut frame = frames(ring(1), PEER).seal(WIRE_VERSION, None, NOW, None, [3; 24], b"");
        ours.open(&mut frame, now).map(drop)
    };
    assert_eq!(at(NOW.plus(MAX_AGE)), Ok(()));
    assert_eq!(at(NOW.plus(MAX_AGE).next()), Err(Rejected::Old));
    assert_eq!(at(NOW.minus(MAX_AGE)), Ok(()));
    assert_eq!(at(NOW.minus(MAX_AGE + Duration::from_millis(1))), Err(Rejected::Early));
}

#[test]
fn another_version_is_not_read() {
    assert_eq!(opened_after(|frame| frame[3] = WIRE_VERSION + 1), Err(Rejected::Version));
    assert_eq!(opened_after(|frame| frame[3] = OLDEST_WIRE_VERSION - 1), Err(Rejected::Version));
}

#[test]
fn both_versions_are_read_and_neither_passes_for_the_other() {
    let ours = frames(ring(1), ME);
    for version in [1, 2] {
        let mut frame = frames(ring(1), PEER).seal(version, None, NOW, None, [3; 24], b"rows");
        assert_eq!(ours.open(&mut frame.clone(), NOW).map(|opened| opened.version), Ok(version));
        frame[3] = 3 - version;
        assert_eq!(ours.open(&mut frame, NOW), Err(Rejected::Seal));
    }
}

#[test]
fn the_release_before_reads_what_it_writes_and_nothing_newer() {
    let before = frames(ring(1), ME).up_to(1);
    let mut old = frames(ring(1), PEER).seal(1, None, NOW, None, [3; 24], b"rows");
    assert_eq!(before.open(&mut old, NOW).map(|opened| opened.version), Ok(1));
    let mut new = frames(ring(1), PEER).seal(2, None, NOW, None, [3; 24], b"rows");
    assert_eq!(before.open(&mut new, NOW), Err(Rejected::Version));
}

#[test]
fn errors_of_a_key_file_name_the_line_and_never_the_key() {
    let key = "ab".repeat(32);
    let error = |text: &str| KeyRing::parse(text).unwrap_err();
    assert_eq!(error(" \n# none\n"), KeyFileError::Empty);
    assert_eq!(error(&format!("{key}\n{}", &key[1..])), KeyFileError::Line { line: 2 });
    assert_eq!(error(&format!("{}é", &key[2..])), KeyFileError::Line { line: 1 });
    assert_eq!(error(&format!("{key}\n\n{key}")), KeyFileError::Repeated { line: 3, first: 1 });
    assert_eq!(error(&"00".repeat(32)), KeyFileError::Zero { line: 1 });
    let many: String = (1..=17).map(|byte| format!("{}\n", format!("{byte:02x}").repeat(32))).collect();
    assert_eq!(error(&many), KeyFileError::TooMany { line: 17 });
    let said = format!("{} {:?}", error(&format!("{key}\n{key}")), KeyRing::parse(&key).unwrap());
    assert!(!said.contains("abab"), "{said}");
}

#[test]
fn every_reason_has_a_name_of_its_own() {
    let names: std::collections::BTreeSet<_> = Rejected::ALL.iter().map(|rejected| rejected.reason()).collect();
    assert_eq!(names.len(), Rejected::ALL.len());
}

proptest! {
    #[test]
    fn one_changed_byte_is_never_believed(at in 0usize..HEADER + 4 + TAG, flip in 1u8..) {
        prop_assert!(opened_after(|frame| frame[at] ^= flip).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..1_300), version in 0u8..4) {
        if version > 0 && bytes.len() > 8 {
            bytes[..3].copy_from_slice(b"qtm");
            bytes[3] = version;
            bytes[4..8].fill(0);
        }
        prop_assert!(frames(ring(1), ME).open(&mut bytes.clone(), NOW).is_err());
        prop_assert!(frames(KeyRing::unkeyed(), ME).open(&mut bytes, NOW).is_err());
    }
}

const GOLDEN_1: &str = concat!(
    "71746d",
    "01",
    "44dd55ff",
    "e787463043d21b69",                 // magic, version, key id, cluster
    "00000000000000000000000000000002", // sender
    "00000000000000000000000000000000", // receiver: whoever is there
    "0000000000000100",
    "0000000000000000",                                 // sent at, echo
    "030303030303030303030303030303030303030303030303", // nonce
    "3c6f7802",                                         // sealed payload
    "d56acf09a0ee834e9928972595fd854f",                 // tag
);

const GOLDEN_2_TAG: &str = "70d875c11d78e6c6160bb44ddd42d56a";
