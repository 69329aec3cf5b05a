//! Own rows as values for chitchat: how they are spread, and whose turn it is.
//!
//! Knows rows, the size of a value and what may be published in an interval. Must not know
//! chitchat. The invariant it keeps: intervals get no more bytes than their allowance, a value
//! more or less, and every row comes round: a value that changed waits for its turn, and rows
//! that do not fit their value together take turns in it.
//!
//! chitchat hands every value that changed to every replica, so what a replica publishes
//! arrives once at each peer, and each receives as much from all. Rows travel directly, too:
//! here it is only what datagrams lost, so lateness costs freshness and nothing else.

use std::time::Duration;

use super::text;
use super::wire::{self, OLDEST_WIRE_VERSION};
use crate::ledger::{Key, Message, ReplicaId, Row, WindowId};

/// Over how many values own rows are spread, so that a quiet account is hardly ever sent again
/// because a busy one changed.
pub(crate) const SHARDS: usize = 64;

/// The most bytes of one value with rows: no row is larger, and 64 of them hold about 900 rows.
pub(crate) const MAX_SHARD: usize = 1_152;

/// The most bytes of rows that a replica publishes in a second, over all peers. In chitchat's
/// compression they take a quarter of it, and three quarters if their bits were random: so
/// with what direct rows may take (`ledger/publish.rs`) and the digests, 50 replicas stay
/// below 1 MB/s each, however busy they are.
pub(crate) const BYTES_PER_S: usize = 100_000;

/// What a value takes in a delta of chitchat's besides its bytes: tag, two lengths, a name of
/// at most 3 bytes, version and status.
const VALUE_OVERHEAD: usize = 17;

/// Returns how many bytes a replica with so many peers may publish in an interval.
pub(crate) fn allowance(interval: Duration, peers: usize) -> usize {
    let bytes = BYTES_PER_S as u128 * interval.as_millis() / 1_000 / peers.max(1) as u128;
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Returns the name of a value.
pub(crate) fn name(shard: usize) -> String {
    format!("c{shard}")
}

/// Returns whether a value of this name holds rows.
pub(crate) fn is_shard(key: &str) -> bool {
    // Whatever the number: a later release may spread them over more.
    key.strip_prefix('c').is_some_and(|number| !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit()))
}

/// What tells the rows of one replica apart; the last part those that name many gifts.
type Place = (Key, WindowId, Option<ReplicaId>);

/// What was published, and what comes next.
#[derive(Debug)]
pub(crate) struct Shards {
    published: Vec<Published>,
    /// The shard whose turn it is.
    turn: usize,
    /// Bytes that may still be published.
    room: usize,
}

#[derive(Clone, Debug, Default)]
struct Published {
    value: Option<String>,
    /// Where the next value begins, if the rows do not all fit one.
    next: Option<Place>,
}

impl Default for Shards {
    fn default() -> Self {
        Self { published: vec![Published::default(); SHARDS], turn: 0, room: 0 }
    }
}

impl Shards {
    /// Returns the values to publish in this interval: on average of at most `allowance` bytes
    /// together, and never of more than one value besides.
    pub(crate) fn publish(&mut self, rows: &[Row], allowance: usize) -> Vec<(usize, String)> {
        // What the next value was too large for is kept for it, and nothing besides.
        self.room = self.room.min(MAX_SHARD + VALUE_OVERHEAD).saturating_add(allowance);
        let mut spread: Vec<Vec<&Row>> = vec![Vec::new(); SHARDS];
        rows.iter().for_each(|row| spread[shard_of(row)].push(row));
        let mut values = Vec::new();
        for shard in (self.turn..SHARDS).chain(0..self.turn) {
            let published = &mut self.published[shard];
            let (value, next) = value(&mut spread[shard], published.next);
            if published.value.as_ref().map_or(value.is_empty(), |before| *before == value) {
                continue;
            }
            let cost = value.len() + VALUE_OVERHEAD;
            if cost > self.room {
                self.turn = shard;
                return values;
            }
            self.room -= cost;
            *published = Published { value: Some(value.clone()), next };
            values.push((shard, value));
        }
        values
    }

    /// Returns within how many intervals everything comes round, if the rows of no shard need
    /// more than so many turns.
    #[cfg(test)]
    fn round(turns: usize, allowance: usize) -> usize {
        (turns * SHARDS * (MAX_SHARD + VALUE_OVERHEAD)).div_ceil(allowance).max(turns) + 1
    }
}

fn shard_of(row: &Row) -> usize {
    ((row.key.limit.bits() ^ row.key.quota.version()) % SHARDS as u64) as usize
}

/// Returns as many of the rows as one value holds, from `first` on in their order and then
/// from the front, and the first that it does not hold.
fn value(rows: &mut [&Row], first: Option<Place>) -> (String, Option<Place>) {
    // Sorted, so that what did not change is not published again.
    rows.sort_by_key(|row| place(row));
    let begin = first.map_or(0, |first| rows.partition_point(|row| place(row) < first));
    let mut bytes = Vec::new();
    for row in rows[begin..].iter().chain(&rows[..begin]) {
        let before = bytes.len();
        // Third replicas pass values on, so they are of the version that everybody reads.
        wire::encode(OLDEST_WIRE_VERSION, row.replica, [&Message::Row((*row).clone())], &mut bytes);
        if text::encoded_len(bytes.len()) > MAX_SHARD && before > 0 {
            bytes.truncate(before);
            return (text::encode(&bytes), Some(place(row)));
        }
    }
    (text::encode(&bytes), None)
}

fn place(row: &Row) -> Place {
    (row.key, row.window, row.given.first().map(|(to, _)| *to))
}

#[cfg(test)]
#[path = "shards_tests.rs"]
mod tests;
