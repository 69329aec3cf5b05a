//! What is published, what is read back, and bytes that mean nothing.

use proptest::prelude::*;

use super::super::wire::WIRE_VERSION;
use super::*;

#[test]
fn text_is_base64_of_urls_without_padding() {
    // The examples of RFC 4648, section 10.
    for (bytes, text) in [("", ""), ("f", "Zg"), ("fo", "Zm8"), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
        assert_eq!(text::encode(bytes.as_bytes()), text);
        assert_eq!(text::decode(text).as_deref(), Some(bytes.as_bytes()));
    }
    assert_eq!(text::decode("Zh"), None, "bits that no byte has");
    assert_eq!(text::decode("Zm9vY"), None, "a digit alone");
    assert_eq!(text::decode("Zm=v"), None);
}

#[test]
fn a_replica_keeps_its_id_through_chitchat() {
    let me = ReplicaId::from_bits(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
    let id = chitchat_id(me, 7, ([127, 0, 0, 1], 1).into());
    assert_eq!(replica_id(&id), Some(me));
    assert_eq!(replica_id(&ChitchatId::new("é", 1, ([127, 0, 0, 1], 1).into())), None);
}

#[test]
fn the_digest_of_a_full_fleet_fits_a_message() {
    let id = chitchat_id(ReplicaId::from_bits(1), 1, "[::1]:1".parse().unwrap());
    // A heartbeat and two versions of 8 bytes each; a delta wants at least 100 more.
    let digest = 2 + MAX_MEMBERS * (id.serialized_len() + 24);
    assert!(digest + 100 < 65_507, "{digest}");
}

#[test]
fn a_value_of_either_version_is_read() {
    let id = ReplicaId::from_bits(1);
    let quota = crate::ledger::Quota::tokens(100).per_minute();
    let row = |limit| {
        let key = crate::ledger::Key { limit: LimitId::from_bits(limit), quota };
        let window = crate::ledger::WindowId::starting(Timestamp::ZERO);
        let [version, reserved, refunded, demand, typical] = [1; 5];
        let given = vec![];
        Message::Row(Row {
            replica: id,
            key,
            window,
            version,
            reserved,
            refunded,
            given,
            spendable: 0,
            demand,
            typical,
        })
    };
    let rows = [row(1), row(2)];
    for version in OLDEST_WIRE_VERSION..=WIRE_VERSION {
        let mut bytes = Vec::new();
        wire::encode(version, id, &rows, &mut bytes);
        let value = text::encode(&bytes);
        assert_eq!(messages(id, WIRE_VERSION, &value), rows);
        let before = messages(id, OLDEST_WIRE_VERSION, &value);
        assert_eq!(before.len(), if version == OLDEST_WIRE_VERSION { 2 } else { 0 });
    }
}

proptest! {
    #[test]
    fn text_comes_back(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let text = text::encode(&bytes);
        prop_assert_eq!(text.len(), text::encoded_len(bytes.len()));
        prop_assert_eq!(text::decode(&text), Some(bytes));
    }

    #[test]
    fn pauses_come_back_the_longest_first(ends in proptest::collection::vec((any::<u64>(), any::<u64>()), 0..200)) {
        let told: Vec<_> =
            ends.into_iter().map(|(limit, end)| (LimitId::from_bits(limit), Timestamp::from_unix_ms(end))).collect();
        let value = pauses_value(&told);
        prop_assert!(value.len() <= 2_731, "{}", value.len());
        let heard = pauses(&value);
        prop_assert_eq!(heard.len(), told.len().min(MAX_PAUSES));
        prop_assert!(heard.is_sorted_by_key(|(_, until)| std::cmp::Reverse(*until)));
        prop_assert!(heard.iter().all(|pause| told.contains(pause)));
        prop_assert_eq!(pauses(&format!("{value}A")), []);
    }

    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}", url in "[A-Za-z0-9_-]{0,200}") {
        for text in [text, url] {
            for newest in OLDEST_WIRE_VERSION..=WIRE_VERSION {
                let _ = messages(ReplicaId::from_bits(1), newest, &text);
            }
            let _ = pauses(&text);
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_message_of_chitchat(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0u8..5) {
        let _ = decode(&bytes);
        // chitchat's magic and version, so that its codec gets further.
        let mut framed = vec![0x53, 0xb0, 0, kind];
        framed.extend_from_slice(&bytes);
        let _ = decode(&framed);
    }
}

mod running {
    use super::*;
    use crate::ledger::{Key, Member, Quota, WindowId};

    const INTERVAL: Duration = Duration::from_millis(100);

    fn addr(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    fn identity(bits: u128) -> Identity {
        let slot = Slot { node: format!("pod-{bits}").into(), addr: addr(bits as u16), exclusive: true };
        Identity { cluster: "test".into(), me: ReplicaId::from_bits(bits), slot, wire: WIRE_VERSION }
    }

    fn roster(from: u128, revision: u64) -> RosterMessage {
        let member = Member {
            id: ReplicaId::from_bits(from),
            slot: identity(from).slot,
            counts: Timestamp::ZERO,
            gone: None,
            seen: 0,
        };
        let from = ReplicaId::from_bits(from);
        RosterMessage { from, revision, floor: Timestamp::ZERO, watermark: Timestamp::ZERO, members: vec![member] }
    }

    fn row(replica: u128, limit: u64, version: u64) -> Row {
        Row {
            replica: ReplicaId::from_bits(replica),
            key: Key { limit: LimitId::from_bits(limit), quota: Quota::tokens(100).per_minute() },
            window: WindowId::starting(Timestamp::ZERO),
            version,
            reserved: version,
            refunded: 0,
            given: vec![],
            spendable: 0,
            demand: 0,
            typical: 0,
        }
    }

    /// A network of two, without sockets: hands over what each wants sent for a while.
    async fn talk(a: &mut Membership, b: &mut Membership) {
        let until = Instant::now() + INTERVAL * INTERVALS * 4;
        while Instant::now() < until {
            tokio::select! {
                biased;
                Event::Send(to, bytes) = a.next() => assert!(to != b.identity.slot.addr || b.receive(addr(1), &bytes)),
                Event::Send(to, bytes) = b.next() => assert!(to != a.identity.slot.addr || a.receive(addr(2), &bytes)),
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn rosters_and_own_rows_reach_the_other_once() {
        let mut a = Membership::start(identity(1), INTERVAL).await;
        let mut b = Membership::start(identity(2), INTERVAL).await;
        // What is relayed by chitchat is only what its writer says about itself.
        let rows = [row(1, 7, 3), row(9, 8, 1)];
        a.exchange(&roster(1, 1), &rows, &[], &[(ReplicaId::from_bits(2), addr(2))]);
        b.exchange(&roster(2, 1), &[], &[], &[]);
        talk(&mut a, &mut b).await;
        let heard = b.exchange(&roster(2, 1), &[], &[], &[]).messages;
        let from = ReplicaId::from_bits(1);
        assert_eq!(heard.len(), 2);
        assert!(heard.contains(&(from, Message::Row(row(1, 7, 3)))));
        assert!(heard.contains(&(from, Message::Roster(Arc::new(roster(1, 1))))));
        let back = a.exchange(&roster(1, 1), &rows, &[], &[]);
        assert_eq!((back.messages.len(), a.live(), b.live()), (1, 1, 1));
        talk(&mut a, &mut b).await;
        assert_eq!(b.exchange(&roster(2, 1), &[], &[], &[]).messages, []);
    }

    #[tokio::test(start_paused = true)]
    async fn what_each_reads_is_heard_every_time_and_what_is_published_is_of_the_oldest_version() {
        let mut a = Membership::start(identity(1), INTERVAL).await;
        let before = Identity { wire: OLDEST_WIRE_VERSION, ..identity(2) };
        let mut b = Membership::start(before, INTERVAL).await;
        let (one, two) = (ReplicaId::from_bits(1), ReplicaId::from_bits(2));
        a.exchange(&roster(1, 1), &[row(1, 7, 3)], &[], &[(two, addr(2))]);
        b.exchange(&roster(2, 1), &[row(2, 7, 3)], &[], &[]);
        talk(&mut a, &mut b).await;
        let heard = b.exchange(&roster(2, 1), &[], &[], &[]);
        assert_eq!(heard.versions, BTreeMap::from([(one, WIRE_VERSION)]));
        assert_eq!(heard.messages.len(), 2, "the release before reads it");
        for _ in 0..2 {
            let heard = a.exchange(&roster(1, 1), &[], &[], &[]);
            assert_eq!(heard.versions, BTreeMap::from([(two, OLDEST_WIRE_VERSION)]));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nonsense_is_announced_by_whoever_reads_the_oldest_version() {
        let mut a = Membership::start(identity(1), INTERVAL).await;
        let mut b = Membership::start(identity(2), INTERVAL).await;
        b.exchange(&roster(2, 1), &[], &[], &[(ReplicaId::from_bits(1), addr(1))]);
        for (announced, taken_for) in [("", 1), ("two", 1), ("-1", 1), ("256", 1), ("2.0", 1), ("0", 0), ("3", 3)] {
            let State::Running { handle, .. } = &b.state else { panic!("it runs") };
            handle.chitchat().lock().await.self_node_state().set(WIRE, announced);
            talk(&mut a, &mut b).await;
            let heard = a.exchange(&roster(1, 1), &[], &[], &[]).versions;
            // The outbox has the last word on what there is not.
            assert_eq!(heard, BTreeMap::from([(ReplicaId::from_bits(2), taken_for)]), "{announced:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_reach_the_other_and_end() {
        let mut a = Membership::start(identity(1), INTERVAL).await;
        let mut b = Membership::start(identity(2), INTERVAL).await;
        let pause = (LimitId::of("gpt"), Timestamp::from_unix_ms(1_700_000_000_000));
        a.exchange(&roster(1, 1), &[], &[pause], &[(ReplicaId::from_bits(2), addr(2))]);
        b.exchange(&roster(2, 1), &[], &[], &[]);
        talk(&mut a, &mut b).await;
        assert_eq!(b.exchange(&roster(2, 1), &[], &[], &[]).pauses, [pause]);
        a.exchange(&roster(1, 1), &[], &[], &[]);
        talk(&mut a, &mut b).await;
        assert_eq!(b.exchange(&roster(2, 1), &[], &[], &[]).pauses, []);
    }

    #[tokio::test(start_paused = true)]
    async fn if_it_dies_it_is_started_again_and_heard_again() {
        let mut a = Membership::start(identity(1), INTERVAL).await;
        let mut b = Membership::start(identity(2), INTERVAL).await;
        let to_b = [(ReplicaId::from_bits(2), addr(2))];
        // Many versions, so that those of the second life are below those of the first.
        for version in 1..20 {
            a.exchange(&roster(1, version), &[row(1, 7, version)], &[], &to_b);
        }
        talk(&mut a, &mut b).await;
        assert_ne!(b.exchange(&roster(2, 1), &[], &[], &[]).messages, []);
        if let State::Running { handle, .. } = &a.state {
            handle.abort();
        }
        let ended = loop {
            match a.next().await {
                Event::Send(..) => {}
                event => break event,
            }
        };
        assert!(matches!(ended, Event::Ended(_)) && !a.is_running());
        assert_eq!(a.exchange(&roster(1, 20), &[], &[], &[]), Heard::default());
        assert!(matches!(a.next().await, Event::Started));
        a.exchange(&roster(1, 21), &[row(1, 7, 30)], &[], &to_b);
        talk(&mut a, &mut b).await;
        let heard = b.exchange(&roster(2, 1), &[], &[], &[]).messages;
        assert!(heard.contains(&(ReplicaId::from_bits(1), Message::Row(row(1, 7, 30)))));
    }

    #[tokio::test(start_paused = true)]
    async fn however_busy_a_replica_publishes_no_more_than_its_allowance_in_an_interval() {
        let mut a = Membership::start(identity(1), INTERVAL).await;
        // A fleet of fifty, in which every row changes between any two exchanges.
        let peers: Vec<_> = (2..51).map(|bits| (ReplicaId::from_bits(bits), addr(bits as u16))).collect();
        let allowance = shards::allowance(INTERVAL * INTERVALS, peers.len());
        let (mut read, mut total) = (0, 0);
        for version in 1..=40 {
            let rows: Vec<_> = (0..2_000).map(|limit| row(1, limit * 0x9e37_79b9, version)).collect();
            a.exchange(&roster(1, 1), &rows, &[], &peers);
            let State::Running { handle, .. } = &a.state else { panic!("it runs") };
            let chitchat = handle.chitchat();
            let mut chitchat = chitchat.lock().await;
            let own = chitchat.self_node_state();
            let changed = own.key_values_including_deleted().filter(|(_, value)| value.version > read);
            let rows = changed.filter(|(key, _)| !["node", "wire", "roster", "pauses"].contains(key));
            let bytes: usize = rows.map(|(key, value)| key.len() + value.value.len()).sum();
            assert!(bytes <= allowance + shards::MAX_SHARD, "{bytes} bytes in an interval");
            total += bytes;
            read = own.max_version();
        }
        assert!(total <= 40 * allowance && total > 30 * allowance, "{total} bytes in 40 intervals");
    }
}
