//! The wire format: golden bytes, round trips, and bytes that mean nothing.

use proptest::prelude::*;

use super::*;

fn key() -> Key {
    Key { limit: LimitId::from_bits(0x0123_4567_89ab_cdef), quota: Quota::tokens(100_000).per_minute() }
}

fn row() -> Row {
    Row {
        replica: ReplicaId::from_bits(7),
        key: key(),
        window: WindowId::starting(Timestamp::from_unix_ms(1_763_856_000_000)),
        version: 300,
        reserved: 41_000,
        refunded: 2_000,
        given: vec![],
        spendable: -5,
        demand: 900,
        typical: 450,
    }
}

/// Who sends the frames.
const SENDER: ReplicaId = ReplicaId::from_bits(7);

const BOTH: [u8; 2] = [OLDEST_WIRE_VERSION, WIRE_VERSION];

fn encoded<'a>(version: u8, messages: impl IntoIterator<Item = &'a Message>) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(version, SENDER, messages, &mut bytes);
    bytes
}

fn hex<'a>(version: u8, messages: impl IntoIterator<Item = &'a Message>) -> String {
    encoded(version, messages).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn golden_row() {
    let mut row = row();
    row.given = vec![(ReplicaId::from_bits(9), 128)];
    assert_eq!(
        hex(1, [&Message::Row(row)]),
        concat!(
            "01",
            "00000000000000000000000000000007", // row of replica 7
            "efcdab8967452301",
            "00",
            "a08d06",
            "e0d403",       // limit, tokens, 100,000 a 60,000 ms
            "80c88af0aa33", // window
            "ac02",
            "a8c002",
            "d00f", // version, reserved, refunded
            "01",
            "00000000000000000000000000000009",
            "8001", // one gift
            "09",
            "8407",
            "c203", // spendable, demand, typical
        )
    );
}

#[test]
fn golden_rows_of_version_2() {
    let first = row();
    let relayed = Row { replica: ReplicaId::from_bits(8), ..row() };
    let sibling = Row { key: Key { limit: LimitId::from_bits(1), ..key() }, ..row() };
    let requests = Row { key: Key { limit: LimitId::from_bits(1), quota: Quota::requests(600).per_minute() }, ..row() };
    let later = Row { window: WindowId::starting(Timestamp::from_unix_ms(1_763_856_060_000)), ..requests.clone() };
    let mut gift = later.clone();
    gift.given = vec![(ReplicaId::from_bits(9), 128)];
    let counts = concat!("ac02", "a8c002", "d00f", "00", "09", "8407", "c203");
    let rows = [first, relayed, sibling, requests, later, gift].map(Message::Row);
    assert_eq!(
        hex(2, &rows),
        [
            concat!("11", "efcdab8967452301", "00a08d06e0d403", "80c88af0aa33"), // All but whose.
            counts,
            concat!("1e", "00000000000000000000000000000008"), // Of another replica, and what the first is of.
            counts,
            concat!("1d", "0100000000000000"), // Of another limit.
            counts,
            concat!("1b", "01d804e0d403"), // Of another quota.
            counts,
            concat!("17", "e09c8ef0aa33"), // Of another window.
            counts,
            "1f", // Of the same: another part of its gifts.
            concat!("ac02", "a8c002", "d00f", "01", "00000000000000000000000000000009", "8001", "09", "8407", "c203"),
        ]
        .concat()
    );
}

#[test]
fn golden_keys_of_every_kind() {
    let berlin = Zone::parse_posix("CET-1CEST,M3.5.0,M10.5.0/3").expect("valid");
    for (quota, bytes) in [
        (Quota::tokens(100_000).per_minute(), "00a08d06e0d403"),
        (Quota::requests(600).per_minute().sliding(), "11d804e0d40304"),
        (Quota::input_tokens(100_000).per_minute().bucket(50_000), "22a08d06e0d403d08603"),
        (
            Quota::tokens(100_000).per_day(berlin).at_once(),
            "b0a08d0680b89929100e0000201c0000030500201c00000a0500302a0000",
        ),
    ] {
        let mut out = Vec::new();
        put_key(Key { limit: LimitId::from_bits(0), quota }, &mut out);
        let told: String = out[8..].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(told, bytes, "{quota}");
    }
}

#[test]
fn golden_request() {
    let request = RightsRequest {
        key: key(),
        window: row().window,
        seq: 3,
        need: 500,
        want: 1_000,
        kind: RequestKind::Parked,
        waiting_ms: 12,
    };
    let golden =
        concat!("02", "efcdab8967452301", "00", "a08d06", "e0d403", "80c88af0aa33", "03", "f403", "e807", "01", "0c");
    for version in BOTH {
        assert_eq!(hex(version, [&Message::Request(request)]), golden);
    }
}

#[test]
fn golden_roster() {
    let member = |id, addr: &str, gone| Member {
        id: ReplicaId::from_bits(id),
        slot: Slot { node: "pod-a".into(), addr: addr.parse().unwrap(), exclusive: true },
        counts: Timestamp::from_unix_ms(1),
        gone,
        seen: 2,
    };
    let roster = RosterMessage {
        from: ReplicaId::from_bits(1),
        revision: 4,
        floor: Timestamp::from_unix_ms(5),
        watermark: Timestamp::from_unix_ms(6),
        members: vec![member(1, "10.0.0.7:7946", None), member(2, "[::1]:1", Some(Timestamp::from_unix_ms(300)))],
    };
    let roster = Message::Roster(Arc::new(roster));
    assert_eq!(hex(1, [&roster]), hex(2, [&roster]));
    assert_eq!(
        hex(1, [&roster]),
        concat!(
            "03",
            "00000000000000000000000000000001",
            "04",
            "05",
            "06",
            "02",
            "00000000000000000000000000000001",
            "02",
            "0a000007",
            "0a1f",
            "05",
            "706f642d61",
            "01",
            "02",
            "00000000000000000000000000000002",
            "07",
            "00000000000000000000000000000001",
            "0100",
            "05",
            "706f642d61",
            "01",
            "ac02",
            "02",
        )
    );
}

#[test]
fn a_row_takes_about_55_bytes_and_in_version_2_less_than_half_of_it_behind_its_like() {
    let rows = [row(), Row { key: Key { limit: LimitId::from_bits(1), ..key() }, ..row() }].map(Message::Row);
    let lengths = BOTH.map(|version| [1, 2].map(|count| encoded(version, &rows[..count]).len()));
    let [[one, two], [short, both]] = lengths;
    assert_eq!([one, two - one, short, both - short], [51, 51, 35, 22]);
}

#[test]
fn too_many_gifts_become_several_rows() {
    let mut long = row();
    long.given = (0..50).map(|id| (ReplicaId::from_bits(id), 1)).collect();
    for version in BOTH {
        let bytes = encoded(version, [&Message::Row(long.clone())]);
        let parts = decode(version, SENDER, &bytes).unwrap();
        let given: Vec<_> = parts
            .iter()
            .flat_map(|message| match message {
                Message::Row(row) => row.given.clone(),
                _ => panic!("a row became something else"),
            })
            .collect();
        assert_eq!(given, long.given);
        assert_eq!(parts.len(), 3);
    }
}

#[test]
fn an_impossible_quota_is_an_error() {
    // The amount, 100,000, is three bytes behind replica, limit and kind; a zero in its place
    // is no quota.
    for (version, amount) in [(1, 26), (2, 10)] {
        let mut bytes = encoded(version, [&Message::Row(row())]);
        bytes.splice(amount..amount + 3, [0]);
        assert_eq!(decode(version, SENDER, &bytes), Err(WireError::Quota(QuotaError::ZeroAmount)));
    }
}

#[test]
fn rows_of_one_version_are_none_of_the_other() {
    let row = [&Message::Row(row())];
    assert_eq!(decode(2, SENDER, &encoded(1, row)), Err(WireError::Tag(0x01)));
    assert_eq!(decode(1, SENDER, &encoded(2, row)), Err(WireError::Tag(0x11)));
}

#[test]
fn a_first_row_leaves_out_nothing_but_its_sender() {
    for left_out in [SAME_LIMIT, SAME_QUOTA, SAME_WINDOW, LEFT_OUT] {
        let mut bytes = encoded(2, [&Message::Row(row())]);
        bytes[0] |= left_out;
        assert_eq!(decode(2, SENDER, &bytes), Err(WireError::LeftOut(bytes[0])));
    }
}

#[test]
fn what_can_be_left_out_is_not_written() {
    let bytes = encoded(2, [&Message::Row(row())]);
    // Read as of another sender, the row is whole; of its own sender it says too much.
    let mut whole = vec![TAG_SHORT_ROW];
    put_replica(SENDER, &mut whole);
    whole.extend_from_slice(&bytes[1..]);
    assert!(decode(2, ReplicaId::from_bits(8), &whole).is_ok());
    assert_eq!(decode(2, SENDER, &whole), Err(WireError::LeftOut(TAG_SHORT_ROW)));
    // Twice the same, the second time in full.
    let twice = [bytes.clone(), bytes].concat();
    assert_eq!(decode(2, SENDER, &twice), Err(WireError::LeftOut(TAG_SHORT_ROW | OF_SENDER)));
}

#[test]
fn a_row_of_the_sender_is_of_whoever_sealed_it() {
    let bytes = encoded(2, [&Message::Row(row())]);
    let thief = ReplicaId::from_bits(8);
    let [Message::Row(read)] = &decode(2, thief, &bytes).unwrap()[..] else { panic!("one row") };
    assert_eq!(*read, Row { replica: thief, ..row() });
}

#[test]
fn a_forged_count_is_refused_before_anything_is_allocated() {
    let mut bytes = vec![TAG_ROSTER];
    bytes.extend_from_slice(&[0; 16]);
    bytes.extend_from_slice(&[0, 0, 0]);
    put_number(4_000, &mut bytes);
    assert_eq!(decode(WIRE_VERSION, SENDER, &bytes), Err(WireError::Count(4_000)));
}

#[test]
fn numbers_have_one_form() {
    let read = |bytes: &[u8]| Reader(bytes).number();
    assert_eq!(read(&[0x00]), Ok(0));
    assert_eq!(read(&[0x80, 0x00]), Err(WireError::Number));
    assert_eq!(read(&[0xff; 10]), Err(WireError::Number));
    assert_eq!(read(&[0x80]), Err(WireError::Truncated));
    let mut most = Vec::new();
    put_number(u64::MAX, &mut most);
    assert_eq!(read(&most), Ok(u64::MAX));
}

#[test]
fn other_versions_are_not_read() {
    assert_eq!(decode(0, SENDER, &[]), Err(WireError::Version(0)));
    assert_eq!(decode(WIRE_VERSION + 1, SENDER, &[]), Err(WireError::Version(WIRE_VERSION + 1)));
}

prop_compose! {
    fn any_key()(
        limit: u64,
        unit in 0usize..4,
        amount in 1..=Quota::MAX_AMOUNT,
        window in 1u64..=366 * 86_400_000,
        kind in 0u8..5,
        number in 1..=Quota::MAX_AMOUNT,
        at_once: bool,
    ) -> Key {
        let quota = |window| Quota::new(Unit::ALL[unit], amount, Duration::from_millis(window)).unwrap();
        let berlin = Zone::parse_posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let of_kind = match kind {
            0 => Ok(quota(window)),
            1 => quota(window).of_kind(WindowKind::Sliding { parts: (number % 13) as u8 }),
            2 => quota(window).of_kind(WindowKind::Bucket { burst: NonZeroU64::new(number).unwrap() }),
            3 => quota(86_400_000).of_kind(WindowKind::Day { zone: Zone::UTC }),
            _ => quota(86_400_000).of_kind(WindowKind::Day { zone: berlin }),
        };
        // Not every kind fits every amount and window.
        let quota = of_kind.unwrap_or(quota(window));
        Key { limit: LimitId::from_bits(limit), quota: if at_once { quota.at_once() } else { quota } }
    }
}

prop_compose! {
    fn any_row()(
        key in any_key(),
        replica in prop_oneof![Just(SENDER.bits()), Just(8), any::<u128>()],
        numbers: [u64; 6],
        spendable: i64,
        given in proptest::collection::vec((any::<u128>(), any::<u64>()), 0..=Row::MAX_GIVEN),
    ) -> Message {
        let [window, version, reserved, refunded, demand, typical] = numbers;
        let given = given.into_iter().map(|(id, amount)| (ReplicaId::from_bits(id), amount)).collect();
        let window = WindowId::starting(Timestamp::from_unix_ms(window));
        let replica = ReplicaId::from_bits(replica);
        Message::Row(Row { replica, key, window, version, reserved, refunded, given, spendable, demand, typical })
    }
}

prop_compose! {
    fn any_request()(key in any_key(), numbers: [u64; 4], kind in 0u8..3, waiting_ms: u32) -> Message {
        let [window, seq, need, want] = numbers;
        let kind = [RequestKind::Debt, RequestKind::Parked, RequestKind::Prefetch][usize::from(kind)];
        let window = WindowId::starting(Timestamp::from_unix_ms(window));
        Message::Request(RightsRequest { key, window, seq, need, want, kind, waiting_ms })
    }
}

prop_compose! {
    fn any_member()(
        id: u128,
        node in "\\PC{0,32}",
        ip: std::net::IpAddr,
        port: u16,
        exclusive: bool,
        counts: u64,
        gone: Option<u64>,
        seen: u64,
    ) -> Member {
        let slot = Slot { node: node.into(), addr: SocketAddr::new(ip, port), exclusive };
        let counts = Timestamp::from_unix_ms(counts);
        Member { id: ReplicaId::from_bits(id), slot, counts, gone: gone.map(Timestamp::from_unix_ms), seen }
    }
}

prop_compose! {
    fn any_roster()(from: u128, numbers: [u64; 3], members in proptest::collection::vec(any_member(), 0..40)) -> Message {
        let [revision, floor, watermark] = numbers;
        let (floor, watermark) = (Timestamp::from_unix_ms(floor), Timestamp::from_unix_ms(watermark));
        Message::Roster(Arc::new(RosterMessage { from: ReplicaId::from_bits(from), revision, floor, watermark, members }))
    }
}

fn any_message() -> impl Strategy<Value = Message> {
    prop_oneof![any_row(), any_request(), any_roster()]
}

/// Messages among which rows often have parts in common with the row before.
fn any_messages() -> impl Strategy<Value = Vec<Message>> {
    proptest::collection::vec((any_message(), 0u8..16), 0..8).prop_map(|drawn| {
        let mut before: Option<(Key, WindowId)> = None;
        let mut alike = |(mut message, same): (Message, u8)| {
            if let Message::Row(row) = &mut message {
                if let Some((key, window)) = before {
                    row.key.limit = if same & SAME_LIMIT == 0 { row.key.limit } else { key.limit };
                    row.key.quota = if same & SAME_QUOTA == 0 { row.key.quota } else { key.quota };
                    row.window = if same & SAME_WINDOW == 0 { row.window } else { window };
                }
                before = Some((row.key, row.window));
            }
            message
        };
        drawn.into_iter().map(&mut alike).collect()
    })
}

proptest! {
    #[test]
    fn what_was_encoded_is_decoded(messages in any_messages()) {
        for version in BOTH {
            let bytes = encoded(version, &messages);
            prop_assert_eq!(decode(version, SENDER, &bytes), Ok(messages.clone()));
        }
        prop_assert!(encoded(2, &messages).len() <= encoded(1, &messages).len());
    }

    #[test]
    fn what_was_decoded_is_encoded_to_the_same_bytes(
        messages in any_messages(),
        at: prop::sample::Index,
        byte: u8,
        reader: bool,
    ) {
        prop_assume!(!messages.is_empty());
        let reader = if reader { SENDER } else { ReplicaId::from_bits(8) };
        for version in BOTH {
            let mut bytes = encoded(version, &messages);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(messages) = decode(version, reader, &bytes) {
                let mut again = Vec::new();
                encode(version, reader, &messages, &mut again);
                prop_assert_eq!(again, bytes);
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1_200), tag in 0u8..33) {
        let mut tagged = vec![tag];
        tagged.extend_from_slice(&bytes);
        for version in BOTH {
            let _ = decode(version, SENDER, &bytes);
            let _ = decode(version, SENDER, &tagged);
        }
    }
}
