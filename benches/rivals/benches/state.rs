//! What a replica's state costs in memory, and that it stays within bounds.
//!
//! `cargo bench -p quotum-bench --bench state`, a second. One limiter of a fleet of 100, with
//! 10,000 deployments of two quotas each, built up through the public API as a pod's is:
//! reservations here, rows and requests of peers. Prints the Markdown table that docs/cost.md
//! quotes, and exits with 1 if anything is larger than it may be.
//!
//! Bytes are what the heap was asked for and has not been given back, by a counting allocator.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use allocation_counter::measure;
use quotum::ledger::{
    Contact, Directory, Key, LimitId, Member, Message, ReplicaId, RequestKind, RightsRequest, RosterMessage,
    RosterSettings, Row, Slot, Timestamp, WindowId,
};
use quotum::{Claim, Clock, Limiter, Quota};

const DEPLOYMENTS: usize = 10_000;
const ROSTER: usize = 100;
const TOUCHED_BY: usize = 5;

/// The most bytes for an open window, and for each replica that touched it (issue 4).
const MAX_WINDOW: f64 = 512.0;
const MAX_REPLICA: f64 = 64.0;

/// The most bytes for all of it, in MB (issue 4).
const MAX_TOTAL: f64 = 64.0;

/// In the middle of a minute.
const NOON: u64 = 1_800_000_000_000 + 30_000;
const INTERVAL: Duration = Duration::from_millis(100);

#[derive(Clone, Debug)]
struct Set(Arc<AtomicU64>);

impl Clock for Set {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_ms(self.0.load(Ordering::Relaxed))
    }
}

fn main() -> ExitCode {
    let clock = Set(Arc::new(AtomicU64::new(NOON)));
    let names: Vec<String> = (0..DEPLOYMENTS).map(|number| format!("gpt-4o-region-{number:05}")).collect();
    let quotas = [Quota::tokens(1_000_000).per_minute(), Quota::requests(100_000).per_minute()];
    let keys: Vec<Key> =
        names.iter().flat_map(|name| quotas.map(|quota| Key { limit: LimitId::of(name), quota })).collect();
    let windows = keys.len() as f64;
    let mut table = Table::default();
    println!("| {DEPLOYMENTS} deployments x 2 quotas | bytes each | MB | target |");
    println!("|---|---:|---:|---|");

    let mut limiter = None;
    let bytes = allocated(|| {
        let builder = Limiter::builder().clock(clock.clone()).seed(1);
        let build = names.iter().fold(builder, |builder, name| builder.deployment(name, quotas)).build();
        limiter = Some(build.expect("the configuration is right"));
    });
    let limiter = limiter.expect("built above");
    table.line("a configured quota without an open window", bytes, windows, None);
    let bytes = allocated(|| join(&limiter));
    table.line("a replica of the roster", bytes, ROSTER as f64, None);

    let bytes = allocated(|| {
        for name in &names {
            limiter.get(name).expect("configured").try_acquire(Claim::tokens(5)).expect("rights").settle(5);
        }
    });
    table.line("an open window", bytes, windows, Some(MAX_WINDOW));
    let bytes = allocated(|| tell(&limiter, &keys, false));
    table.line("a replica that touched it", bytes, windows * TOUCHED_BY as f64, Some(MAX_REPLICA));
    let total = table.total;
    let bytes = allocated(|| tell(&limiter, &keys, true));
    table.line("... that gave rights", bytes, windows * TOUCHED_BY as f64, None);
    let bytes = allocated(|| ask(&limiter, &keys));
    table.line("... and that asked for some, and was answered", bytes, windows * TOUCHED_BY as f64, None);
    let before = limiter.status().ignored;
    let bytes = allocated(|| tick(&limiter));
    table.line("rows on their way out, room that is kept", bytes, windows, None);

    let (total_mb, all_mb) = (total / 1e6, table.total / 1e6);
    let met = total_mb <= MAX_TOTAL && all_mb <= MAX_TOTAL;
    table.missed |= !met;
    println!("| together, without gifts and questions | | {total_mb:.1} | <= {MAX_TOTAL} MB: {} |", verdict(met));
    println!("| together | | {all_mb:.1} | <= {MAX_TOTAL} MB: {} |", verdict(met));

    let ignored = limiter.status().ignored;
    if ignored != before || ignored.stale_request + ignored.unknown_key + ignored.too_many_replicas != 0 {
        eprintln!("state: messages were ignored, so this measured too little: {ignored:?}");
        return ExitCode::from(2);
    }
    if table.missed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

#[derive(Default)]
struct Table {
    total: f64,
    missed: bool,
}

impl Table {
    fn line(&mut self, what: &str, bytes: f64, count: f64, most: Option<f64>) {
        let (each, mb) = (bytes / count, bytes / 1e6);
        self.total += bytes;
        let target = most.map_or(String::new(), |most| {
            self.missed |= each > most;
            format!("<= {most}: {}", verdict(each <= most))
        });
        println!("| {what} | {each:.0} | {mb:.1} | {target} |");
    }
}

const fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

/// Returns how many more bytes are allocated after `act` than before.
fn allocated(act: impl FnOnce()) -> f64 {
    measure(act).bytes_current as f64
}

fn id(replica: usize) -> ReplicaId {
    ReplicaId::new(Timestamp::from_unix_ms(NOON - 100_000 + replica as u64), replica as u128)
}

fn slot(replica: usize) -> Slot {
    let addr = SocketAddr::from(([10, 0, 0, replica as u8], 7946));
    Slot { node: format!("pod-{replica}").into(), addr, exclusive: true }
}

/// Joins a fleet: everybody is listed and has answered.
fn join(limiter: &Limiter) {
    let settings = RosterSettings { directory: Directory::Static, ..RosterSettings::default() };
    limiter.attach(id(0), slot(0), settings, INTERVAL).expect("it joins once");
    let addrs: Vec<SocketAddr> = (0..ROSTER).map(|replica| slot(replica).addr).collect();
    limiter.with_ledger(|ledger, now| {
        ledger.handle_listing(&addrs, now);
        let members: Vec<Member> = (0..ROSTER)
            .map(|replica| Member {
                id: id(replica),
                slot: slot(replica),
                counts: Timestamp::ZERO,
                gone: None,
                seen: 1 << 20,
            })
            .collect();
        for peer in (1..ROSTER).map(id) {
            let members = members.clone();
            let message =
                RosterMessage { from: peer, revision: 1, floor: Timestamp::ZERO, watermark: Timestamp::ZERO, members };
            ledger.handle_contact(Contact { from: peer, sent_at: now, echo: Some(now) }, now);
            ledger.handle_message(peer, Message::Roster(Arc::new(message)), now);
        }
        while ledger.poll_transmit().is_some() {}
        while ledger.poll_note().is_some() {}
    });
    assert!(limiter.status().has_share, "{:?}", limiter.status().blocked);
}

/// Rows of peers about every window, each replica a fifth of the deployments after the last.
fn tell(limiter: &Limiter, keys: &[Key], gifts: bool) {
    limiter.with_ledger(|ledger, now| {
        for (number, key) in keys.iter().enumerate() {
            for replica in touching(number / 2) {
                let row = Row {
                    replica: id(replica),
                    key: *key,
                    window: window(key),
                    version: 1 + u64::from(gifts),
                    reserved: 1_000,
                    refunded: 100,
                    given: if gifts { vec![(id(0), 1)] } else { Vec::new() },
                    spendable: 5_000,
                    demand: 100,
                    typical: 10,
                };
                ledger.handle_message(id(replica), Message::Row(row), now);
            }
        }
    });
}

/// Which peers touch a deployment.
fn touching(deployment: usize) -> impl Iterator<Item = usize> {
    (0..TOUCHED_BY).map(move |place| 1 + (deployment + place * 17) % (ROSTER - 1))
}

fn ask(limiter: &Limiter, keys: &[Key]) {
    limiter.with_ledger(|ledger, now| {
        for (number, key) in keys.iter().enumerate() {
            for (place, replica) in touching(number / 2).enumerate() {
                let seq = (1 + number * TOUCHED_BY + place) as u64;
                let (need, want, kind, window) = (1, 1, RequestKind::Parked, window(key));
                let request = RightsRequest { key: *key, window, seq, need, want, kind, waiting_ms: 0 };
                ledger.handle_message(id(replica), Message::Request(request), now);
                while ledger.poll_transmit().is_some() {}
            }
        }
    });
}

/// Three ticks, as long as a row is repeated; whatever is sent is taken away at once.
fn tick(limiter: &Limiter) {
    for _ in 0..3 {
        limiter.with_ledger(|ledger, now| {
            ledger.handle_tick(now);
            while ledger.poll_transmit().is_some() {}
        });
    }
}

fn window(key: &Key) -> WindowId {
    key.quota.window().window_at(Timestamp::from_unix_ms(NOON)).id()
}
