//! What the ledger keeps of each limit and of each of its quotas.
//!
//! Knows which quotas a limit's requests are checked against at an instant, and in which
//! version a window is counted. Must not know who changes them or when
//! ([`version`](super::version)). The invariant it keeps: a window is counted in one
//! version only, the one in force at its start.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::account::{Account, WalletRing};
use super::carry::Carry;
use super::few::Few;
use super::kind::{Slices, WindowKind};
use super::message::ReplicaId;
use super::mode::Mode;
use super::parking::Parked;
use super::quota::{Key, Quota, Unit};
use super::status::Counters;
use super::window::{Grid, Timestamp, Window, WindowId};
use super::{Ledger, window_of};

/// The most quotas that a configuration can name, over all its limits, together with those it
/// named before and whose windows are still open: 0.1 GB before anything is used.
pub const MAX_QUOTAS: usize = 65_536;

/// One limit: the quotas that requests of its deployments are checked against together,
/// and the requests that wait for them.
#[derive(Debug)]
pub(super) struct Limit {
    pub(super) name: Arc<str>,
    pub(super) mode: Mode,
    /// Whether the configuration names it: otherwise it is kept for whoever still holds a
    /// handle, and for peers.
    pub(super) configured: bool,
    /// What requests are checked against, now or from a later window on, in key order: the
    /// order in which several claims are taken.
    pub(super) keys: Vec<usize>,
    /// The same for the hot path.
    pub(super) counters: Arc<[Counter]>,
    /// Every quota with an account here: those of `keys`, those that run out, and those held
    /// for peers.
    pub(super) slots: Vec<usize>,
    pub(super) queue: VecDeque<Parked>,
    /// When rights are asked for again while requests are parked.
    pub(super) ask_again: Timestamp,
    pub(super) refused: BTreeMap<&'static str, u64>,
    pub(super) observed: u64,
    /// What peers enforce instead of a quota of this limit, by unit.
    pub(super) mismatches: BTreeMap<(ReplicaId, Unit), Other>,
}

/// What a peer enforced when it last spoke of a unit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Other {
    /// In the window that starts here: whatever it said of earlier ones may come late.
    pub(super) since: Timestamp,
    /// `None`: what this replica enforces there.
    pub(super) quota: Option<Quota>,
}

/// One quota of a limit: its windows, whatever the amount. A change of the amount changes
/// the version and not the windows, so handles, wallets and permits outlive it.
#[derive(Debug)]
pub(super) struct KeyState {
    /// The latest version. Its unit and windows hold for all of them.
    pub(super) key: Key,
    /// How the latest version is kept; only the amount can differ in another one.
    pub(super) slices: Slices,
    /// Every version that an open or later window may be counted in, with the start of the
    /// first such window; the last one is `key`.
    pub(super) versions: Vec<(Timestamp, Key)>,
    pub(super) limit: usize,
    /// What is promised of windows that are frozen from now on.
    pub(super) mode: Mode,
    /// Whether requests of this replica are or were checked against it.
    pub(super) own: bool,
    /// From when on they are not, because quotas of other units are in force instead. Its windows
    /// go on: what was charged to them stays so, and peers may still enforce it.
    pub(super) lifted: Timestamp,
    pub(super) ring: Arc<WalletRing>,
    pub(super) open: Few<Account>,
    /// Only a bucket's rights outlive their slice.
    pub(super) carry: Option<Carry>,
    /// Units offered per second, admitted or not, smoothed over one second.
    pub(super) demand: u64,
    /// What the demand's rounding left, in thousandths of a unit per second.
    pub(super) demand_rest: u16,
    /// The mean request in units, smoothed over 16 requests that took the slow path.
    pub(super) typical: u64,
    /// Of closed windows.
    pub(super) closed: Counters,
}

impl KeyState {
    pub(super) fn new(key: Key, limit: usize, mode: Mode, own: bool, from: Timestamp) -> Self {
        let slices = key.quota.slices();
        let first = slices.grid.window_at(from);
        let first = first.number() + u64::from(first.start() < from);
        Self {
            key,
            slices,
            versions: vec![(from, key)],
            limit,
            mode,
            own,
            lifted: Timestamp::NEVER,
            ring: Arc::new(WalletRing::new(from)),
            open: Few::default(),
            carry: (!slices.guarded).then(|| Carry::new(slices.lifetime, first)),
            demand: 0,
            demand_rest: 0,
            typical: 0,
            closed: Counters::default(),
        }
    }

    /// Makes this the latest version: another amount, in the same windows.
    pub(super) fn set_latest(&mut self, key: Key) {
        self.key = key;
        self.slices = key.quota.slices();
    }

    /// Returns the version that windows starting at `start` are counted in.
    pub(super) fn version_at(&self, start: Timestamp) -> Key {
        let version = self.versions.iter().rev().find(|(from, _)| *from <= start);
        version.unwrap_or(&self.versions[0]).1
    }

    /// Returns what a window promises: whatever is configured later, an open one keeps it.
    pub(super) fn mode_in(&self, window: Window) -> Mode {
        self.open.get(&window.number()).map_or(self.mode, |account| account.mode)
    }

    /// Returns the version of a window that may have an account here, `None` for any other.
    pub(super) fn version_in(&self, window: Window) -> Option<Key> {
        self.ring.is_in_force(window.start()).then(|| self.version_at(window.start()))
    }

    /// Says whether requests at `now` must come to the ledger: the window is over, or ends
    /// early, at an instant that a hit does not know.
    pub(super) fn is_shut_to_hits(&self, window: Window, now: Timestamp) -> bool {
        window.end() <= now || window.end() > self.ring.until()
    }

    /// Says whether a window was cut short and is over: what is left in it is nobody's, or
    /// the part of the next version that covers the same time would come on top.
    pub(super) fn is_cut_off(&self, window: Window, now: Timestamp) -> bool {
        let until = self.ring.until();
        window.end() > until && until <= now
    }

    /// Returns which windows a reservation at `at` is charged to, as [`Counter::windows`] does.
    pub(super) fn windows(&self, at: Timestamp, edge_ms: u64) -> impl Iterator<Item = Window> + Clone + use<> {
        let (grid, window) = (self.slices.grid, window_of(self, at));
        let left_ms = window.end().unix_ms() - at.unix_ms() + unguarded_ms(&self.slices);
        charged(&self.ring, at, left_ms, edge_ms).map(move |ahead| if ahead == 0 { window } else { grid.next(window) })
    }

    /// Returns when the next thing happens to it at or after `now` by time alone.
    pub(super) fn next_change(&self, now: Timestamp) -> Timestamp {
        if now < self.ring.from() { self.ring.from() } else { window_of(self, now).end().min(self.ring.until()) }
    }
}

/// What the hot path needs of one key. A hit reads the first four fields and nothing else, so
/// they share a cache line.
#[derive(Clone, Debug)]
#[repr(C)]
pub(crate) struct Counter {
    pub(crate) ring: Arc<WalletRing>,
    /// The length of a window; `None` for days, whose length varies.
    length_ms: Option<NonZeroU64>,
    /// Added to what is left of a window: nothing, or more than any edge.
    unguarded_ms: u64,
    pub(crate) unit: Unit,
    /// Its number in the ledger.
    pub(crate) number: usize,
    pub(crate) key: Key,
}

impl Counter {
    pub(super) fn of(number: usize, state: &KeyState) -> Self {
        let length_ms = match state.slices.grid {
            Grid::Even(length) => Some(length.ms()),
            Grid::Days(_) => None,
        };
        let unguarded_ms = unguarded_ms(&state.slices);
        let unit = state.key.quota.unit();
        Self { ring: Arc::clone(&state.ring), length_ms, unguarded_ms, unit, number, key: state.key }
    }

    /// Returns the number of the window that `unix_ms` falls into, and how many
    /// milliseconds of it are left: at least one, and more than any edge in a bucket.
    #[inline(always)]
    pub(crate) fn place_at(&self, unix_ms: u64) -> (u64, u64) {
        let Some(length_ms) = self.length_ms else { return self.day_at(unix_ms) };
        (unix_ms / length_ms, length_ms.get() - unix_ms % length_ms + self.unguarded_ms)
    }

    #[cold]
    #[inline(never)]
    fn day_at(&self, unix_ms: u64) -> (u64, u64) {
        let day = self.key.quota.grid().window_at(Timestamp::from_unix_ms(unix_ms));
        (day.number(), day.end().unix_ms() - unix_ms)
    }

    /// Returns the numbers of the windows that a reservation at `at` is charged to: the one
    /// it falls into and, within the edge of its end, the next; each only if this quota is
    /// in force there.
    #[inline]
    pub(crate) fn windows(&self, at: Timestamp, edge_ms: u64) -> impl Iterator<Item = u64> + Clone + use<> {
        let (number, left_ms) = self.place_at(at.unix_ms());
        charged(&self.ring, at, left_ms, edge_ms).map(move |ahead| number + ahead)
    }
}

/// Which windows a reservation is charged to, counted from the one it falls into: what the hot
/// path takes, what the ledger takes, and what a permit settles. There is no other place that
/// says so.
#[inline]
fn charged(ring: &WalletRing, at: Timestamp, left_ms: u64, edge_ms: u64) -> Range<u64> {
    let here = ring.is_in_force(at);
    let then = left_ms <= edge_ms && ring.is_in_force(at.plus(Duration::from_millis(edge_ms)));
    u64::from(!here)..1 + u64::from(then)
}

/// Added to what is left of a window: more than any edge where there is no border to guard.
fn unguarded_ms(slices: &Slices) -> u64 {
    if slices.guarded { 0 } else { u64::from(u32::MAX) }
}

/// A quota without its amount: what two versions with the same windows have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shape(Key);

impl Shape {
    pub(super) fn of(key: &Key) -> Self {
        // A bucket's amount decides its slices, so another amount is another shape.
        let is_bucket = matches!(key.quota.kind(), WindowKind::Bucket { .. });
        Self(if is_bucket { *key } else { Key { quota: key.quota.of_one(), ..*key } })
    }
}

impl Ledger {
    /// Returns the keys that a limit's requests at `now` are checked against, in key order.
    pub(super) fn in_force(&self, limit: usize, now: Timestamp) -> impl Iterator<Item = usize> + '_ {
        let is_in_force = move |key: &usize| self.keys[*key].ring.is_in_force(now) && now < self.keys[*key].lifted;
        self.limits[limit].keys.iter().copied().filter(is_in_force)
    }

    /// Returns the key and window that a message speaks of, if they are this replica's: `None`
    /// for any other version of that window.
    pub(super) fn find(&self, key: &Key, window: WindowId) -> Option<(usize, Window)> {
        let number = *self.by_shape.get(&Shape::of(key))?;
        let window = key.quota.grid().window_of(window)?;
        let state = &self.keys[number];
        let version = match state.open.get(&window.number()) {
            Some(account) => Some(account.key),
            None => state.version_in(window),
        };
        (version == Some(*key)).then_some((number, window))
    }

    /// Adds an empty limit, without quotas.
    pub(super) fn push_limit(&mut self, name: Arc<str>) -> usize {
        let limit = Limit {
            name,
            mode: Mode::default(),
            configured: false,
            keys: Vec::new(),
            counters: Arc::new([]),
            slots: Vec::new(),
            queue: VecDeque::new(),
            ask_again: Timestamp::NEVER,
            refused: BTreeMap::new(),
            observed: 0,
            mismatches: BTreeMap::new(),
        };
        if let Some(free) = self.free_limits.pop() {
            self.limits[free] = limit;
            return free;
        }
        self.limits.push(limit);
        self.limits.len() - 1
    }

    /// Adds a quota to a limit.
    pub(super) fn push_key(&mut self, key: Key, limit: usize, own: bool, from: Timestamp) -> usize {
        let state = KeyState::new(key, limit, self.limits[limit].mode, own, from);
        let number = match self.free_keys.pop() {
            Some(free) => {
                self.keys[free] = state;
                free
            }
            None => {
                self.keys.push(state);
                self.keys.len() - 1
            }
        };
        self.limits[limit].slots.push(number);
        self.by_shape.insert(Shape::of(&key), number);
        self.longest = self.longest.max(key.quota.window().duration());
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{LimitId, Zone};
    use proptest::prelude::*;

    fn quotas() -> impl Strategy<Value = Quota> {
        let of = |ms: u64| Quota::tokens(1_000_000).per(Duration::from_millis(ms));
        const ZONES: [&str; 3] = ["UTC0", "CET-1CEST,M3.5.0,M10.5.0/3", "<+1030>-10:30<+11>-11,M10.1.0,M4.1.0"];
        prop_oneof![
            (1u64..100_000).prop_map(of),
            (1u64..20_000, 1u8..=12)
                .prop_map(
                    move |(slice_ms, parts)| of(slice_ms * u64::from(parts)).of_kind(WindowKind::Sliding { parts })
                )
                .prop_map(|quota| quota.expect("divides")),
            (1_000u64..100_000, 1_000_000u64..9_000_000).prop_map(move |(ms, burst)| of(ms).bucket(burst)),
            prop::sample::select(&ZONES[..])
                .prop_map(|zone| Quota::tokens(1_000_000).per_day(Zone::parse_posix(zone).expect("valid"))),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]

        /// What the hot path takes, the ledger takes and a permit settles are the same windows;
        /// and they are those that an edge reaches, by a look at both of its ends.
        #[test]
        fn everybody_charges_a_reservation_to_the_same_windows(
            quota in quotas(),
            near_ms in 1_700_000_000_000u64..1_800_000_000_000,
            // Around a border, or anywhere.
            off_ms in prop_oneof![-3_000i64..3_000, Just(0), Just(-1), any::<i32>().prop_map(i64::from)],
            edge in prop_oneof![Just(0u64), Just(1_000), 0u64..=1_000],
            (from, until) in (-2i64..3, -2i64..4),
        ) {
            let slices = quota.slices();
            let window = slices.grid.window_at(Timestamp::from_unix_ms(near_ms));
            let at = Timestamp::from_unix_ms(window.start().unix_ms().saturating_add_signed(off_ms));
            let edge_ms = quota.lead().as_millis() as u64 * edge / 1_000;
            // In force from or until a start near by, or always.
            let start = |ahead: i64| {
                let ms = slices.length().as_millis() as i64 * ahead;
                slices.grid.window_at(Timestamp::from_unix_ms(window.start().unix_ms().saturating_add_signed(ms))).start()
            };
            let from = if from == -2 { Timestamp::ZERO } else { start(from) };
            let state = KeyState::new(Key { limit: LimitId::of("a"), quota }, 0, Mode::Strict, true, from);
            state.ring.end_at(if until == 3 { Timestamp::NEVER } else { start(until) });
            let ledger: Vec<Window> = state.windows(at, edge_ms).collect();
            let numbers: Vec<u64> = ledger.iter().map(|window| window.number()).collect();
            prop_assert_eq!(Counter::of(0, &state).windows(at, edge_ms).collect::<Vec<_>>(), &numbers[..]);
            let reach = if slices.guarded { at.plus(Duration::from_millis(edge_ms)) } else { at };
            let mut expected: Vec<Window> = [at, reach]
                .into_iter()
                .filter(|at| state.ring.is_in_force(*at))
                .map(|at| slices.grid.window_at(at))
                .collect();
            expected.dedup();
            prop_assert_eq!(ledger, expected);
        }
    }
}
