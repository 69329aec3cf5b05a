//! Whatever there is to publish, it stays within its allowance and all of it comes round.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::ledger::{Key, LimitId, Quota, Timestamp, WindowId, Zone};

const INTERVAL: Duration = Duration::from_millis(500);

fn row(limit: u64, version: u64) -> Row {
    Row {
        replica: ReplicaId::from_bits(u128::MAX),
        key: Key { limit: LimitId::from_bits(limit), quota: Quota::tokens(100).per_minute() },
        window: WindowId::starting(Timestamp::from_unix_ms(1_763_856_000_000)),
        version,
        reserved: version,
        refunded: 0,
        given: vec![],
        spendable: 0,
        demand: 0,
        typical: 0,
    }
}

fn rows_in(value: &str) -> Vec<Row> {
    let messages =
        wire::decode(OLDEST_WIRE_VERSION, ReplicaId::from_bits(u128::MAX), &text::decode(value).unwrap()).unwrap();
    messages
        .into_iter()
        .map(|message| if let Message::Row(row) = message { row } else { panic!("{message:?}") })
        .collect()
}

/// What peers read, by limit and first gift: the highest version.
#[derive(Default)]
struct Peers(BTreeMap<(u64, Option<ReplicaId>), u64>);

impl Peers {
    fn read(&mut self, values: &[(usize, String)]) {
        for row in values.iter().flat_map(|(_, value)| rows_in(value)) {
            let known = self.0.entry((row.key.limit.bits(), row.given.first().map(|(to, _)| *to))).or_default();
            *known = row.version.max(*known);
        }
    }
}

fn cost(values: &[(usize, String)]) -> usize {
    values.iter().map(|(_, value)| value.len() + VALUE_OVERHEAD).sum()
}

#[test]
fn the_largest_row_fits_a_value() {
    let given = (0..Row::MAX_GIVEN as u128).map(|to| (ReplicaId::from_bits(u128::MAX - to), u64::MAX)).collect();
    let day = Quota::tokens(Quota::MAX_AMOUNT).per_day(Zone::UTC);
    let largest = Row {
        key: Key { limit: LimitId::from_bits(u64::MAX), quota: day },
        version: u64::MAX,
        reserved: u64::MAX,
        refunded: u64::MAX,
        given,
        spendable: i64::MIN,
        demand: u64::MAX,
        typical: u64::MAX,
        ..row(1, 1)
    };
    let mut bytes = Vec::new();
    wire::encode(OLDEST_WIRE_VERSION, largest.replica, [&Message::Row(largest.clone())], &mut bytes);
    assert!(text::encoded_len(bytes.len()) <= MAX_SHARD, "{}", bytes.len());
}

#[test]
fn the_larger_the_fleet_the_less_each_publishes() {
    assert_eq!(allowance(INTERVAL, 49), 1_020);
    assert_eq!(allowance(INTERVAL, 2), 25_000);
    assert_eq!(allowance(INTERVAL, 0), 50_000);
}

#[test]
fn what_does_not_change_is_published_once() {
    let rows: Vec<Row> = (0..200).map(|limit| row(limit, 1)).collect();
    let mut shards = Shards::default();
    let mut peers = Peers::default();
    for _ in 0..Shards::round(1, 2_000) {
        peers.read(&shards.publish(&rows, 2_000));
    }
    assert_eq!(peers.0.len(), 200);
    // Whatever the order in which they are told.
    let reversed: Vec<Row> = rows.into_iter().rev().collect();
    assert_eq!(shards.publish(&reversed, 100_000), []);
}

#[test]
fn a_closed_window_leaves_its_value() {
    let mut shards = Shards::default();
    assert_eq!(shards.publish(&[row(5, 1)], 2_000).len(), 1);
    assert_eq!(shards.publish(&[], 2_000), [(shard_of(&row(5, 1)), String::new())]);
    assert_eq!(shards.publish(&[], 2_000), []);
}

#[test]
fn rows_that_name_many_gifts_come_round_in_parts() {
    let part = |from: u128| Row {
        given: (from..from + Row::MAX_GIVEN as u128).map(|to| (ReplicaId::from_bits(to), u64::MAX)).collect(),
        ..row(1, 1)
    };
    let parts: Vec<Row> = (0..8).map(|number| part(1 + number * 24)).collect();
    let mut shards = Shards::default();
    let mut peers = Peers::default();
    for _ in 0..Shards::round(parts.len(), 600) {
        peers.read(&shards.publish(&parts, 600));
    }
    assert_eq!(peers.0.len(), parts.len());
}

#[test]
fn only_numbered_names_are_values_with_rows() {
    assert!((0..SHARDS).all(|shard| is_shard(&name(shard))));
    assert!(
        ["c", "cluster", "node", "wire", "roster", "pauses", "c1x", "C1", "cé", ""].iter().all(|key| !is_shard(key))
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Every row changes before every interval: nothing can be busier.
    #[test]
    fn an_interval_stays_within_its_allowance_and_every_row_comes_round(
        limits in proptest::collection::btree_set(any::<u64>(), 1..1_200),
        allowance in 250usize..30_000,
        busy in 1u64..5,
    ) {
        let mut shards = Shards::default();
        let mut published = 0;
        let mut spread = [0usize; SHARDS];
        for limit in &limits {
            spread[shard_of(&row(*limit, 1))] += 1;
        }
        // How often the fullest has its turn before all of it was told: 14 rows a turn.
        let turns = spread.iter().max().unwrap().div_ceil(14);
        let round = Shards::round(turns, allowance);
        let mut now = 1;
        for _ in 0..2 {
            let since = now;
            let mut peers = Peers::default();
            for _ in 0..round {
                let rows: Vec<Row> = limits.iter().map(|limit| row(*limit, if limit % busy == 0 { now } else { since })).collect();
                now += 1;
                let values = shards.publish(&rows, allowance);
                published += cost(&values);
                prop_assert!(cost(&values) <= allowance + MAX_SHARD + VALUE_OVERHEAD);
                prop_assert!(values.iter().all(|(shard, value)| *shard < SHARDS && value.len() <= MAX_SHARD));
                peers.read(&values);
            }
            for limit in &limits {
                let known = peers.0.get(&(*limit, None)).copied().unwrap_or(0);
                prop_assert!(known >= since, "{limit} is known as of {known} after {round} intervals from {since} on");
            }
        }
        prop_assert!(published <= (now as usize - 1) * allowance + MAX_SHARD + VALUE_OVERHEAD);
    }
}
