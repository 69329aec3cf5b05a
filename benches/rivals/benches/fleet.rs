//! What gossip costs and how fast news travels, in fleets of up to 100 pods.
//!
//! `cargo bench -p quotum-bench --bench fleet [-- --quick]`, minutes, or half a one. Whole limiters
//! with the pure layers of the cluster (outbox, frames, fragments, wire) in one thread, by a
//! simulated clock, on a network with a delay of 1 to 5 ms and no loss. Every pod reserves on
//! every active account ten times a second, so that every row of every pod changes at every
//! tick: there is no busier fleet. Prints the Markdown table that docs/cost.md quotes, and
//! exits with 1 if 50 pods with 200 accounts send more than they may, or a datagram is larger.
//!
//! CPU is what a pod's ledger, sealing and opening take, by the thread's clock; neither the
//! kernel's part nor chitchat's is in it, nor the reservations themselves. Staleness is how old
//! what a peer knows of another pod's row is, at any time, over all rows and pairs.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use quotum::cluster::frame::{Frames, KeyRing, MAX_DATAGRAM};
use quotum::cluster::inbox::{Content, Inbox};
use quotum::cluster::outbox::{Outbox, Parcel};
use quotum::ledger::{Directory, LimitId, Message, ReplicaId, RosterSettings, Row, Slot, Target, Timestamp};
use quotum::{Acquire, Claim, Clock, Handle, Limiter, Permit, Quota};
use rustix::time::{ClockId, clock_gettime};

/// Pods, active accounts, seconds measured; the last one is held against the target.
const CELLS: [(usize, usize, u64); 13] = [
    (3, 1, 20),
    (3, 100, 20),
    (3, 1_000, 20),
    (10, 1, 20),
    (10, 100, 20),
    (10, 1_000, 20),
    (30, 1, 20),
    (30, 100, 20),
    (30, 1_000, 10),
    (100, 1, 20),
    (100, 100, 10),
    (100, 1_000, 10),
    TARGET,
];
const QUICK: [(usize, usize, u64); 4] = [(3, 1, 5), (10, 100, 5), (30, 100, 5), (TARGET.0, TARGET.1, 5)];
const TARGET: (usize, usize, u64) = (50, 200, 20);

/// The most that a pod of [`TARGET`] may send, in MB/s (issue 4).
const MAX_TRAFFIC: f64 = 1.0;

/// The default of production, in ms.
const INTERVAL_MS: u64 = 100;

/// Just after the start of a minute: all is over before its end.
const START_MS: u64 = 1_800_000_000_000 + 1_000;

/// Tokens of one reservation: a row's count tells how many it includes.
const TOKENS: u64 = 10;

/// Every pod runs out of rights to one more deployment this often, and asks for some.
const PROBE_EVERY_MS: u64 = 500;
const PROBE: &str = "probe";

/// The most datagrams taken at once, and as often between two looks at the clock as the
/// product's loop does.
const BATCH: usize = 64;

#[derive(Clone, Debug, Default)]
struct Simulated(Arc<AtomicU64>);

impl Clock for Simulated {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_ms(self.0.load(Ordering::Relaxed))
    }
}

fn main() -> ExitCode {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let mut missed = false;
    println!(
        "| pods | accounts | kB/s a pod | datagrams/s | largest, B | CPU a pod, % | stale p50 / p99 / max, ms \
        | miss to rights p50 / p99, ms | target |"
    );
    println!("|---:|---:|---:|---:|---:|---:|---:|---:|---|");
    for cell in if quick { &QUICK[..] } else { &CELLS[..] } {
        let begun = Instant::now();
        let found = Fleet::new(cell.0, cell.1).measure(cell.2);
        let is_target = (cell.0, cell.1) == (TARGET.0, TARGET.1);
        let met = found.largest <= MAX_DATAGRAM && (!is_target || found.bytes <= MAX_TRAFFIC * 1e6);
        missed |= !met;
        let target = match (is_target, met) {
            (true, true) => "<= 1 MB/s: met",
            (true, false) => "<= 1 MB/s: missed",
            (false, true) => "",
            (false, false) => "a datagram is too large",
        };
        println!(
            "| {} | {} | {:.1} | {:.0} | {} | {:.2} | {} / {} / {} | {} | {target} |",
            cell.0,
            cell.1,
            found.bytes / 1e3,
            found.frames,
            found.largest,
            found.cpu * 100.0,
            found.stale.quantile(0.5),
            found.stale.quantile(0.99),
            found.stale.quantile(1.0),
            found.waits(),
        );
        eprintln!("fleet: {} pods x {} accounts took {:.1?}", cell.0, cell.1, begun.elapsed());
    }
    if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Per pod, and per second where there is a time in it.
struct Found {
    bytes: f64,
    frames: f64,
    largest: usize,
    cpu: f64,
    stale: Ages,
    /// Waits that ended with rights, in ms, in order; and how many ended without.
    rights: Vec<u64>,
    refused: usize,
}

impl Found {
    fn waits(&self) -> String {
        let at = |part: usize| self.rights.get((self.rights.len() * part / 100).min(self.rights.len().max(1) - 1));
        let [p50, p99] = [50, 99].map(|part| at(part).map_or("-".to_owned(), ToString::to_string));
        match self.refused {
            0 => format!("{p50} / {p99}"),
            some => format!("{p50} / {p99}, {some} of {} refused", some + self.rights.len()),
        }
    }
}

/// How long something was how old, by milliseconds.
struct Ages {
    /// Differences of the counts of neighbouring ages.
    steps: Vec<i64>,
}

impl Ages {
    fn new() -> Self {
        Self { steps: vec![0; 65_537] }
    }

    /// Adds something that was `from` ms old and then got older, until it was `until`.
    fn add(&mut self, from: u64, until: u64) {
        let [from, until] = [from, until].map(|age| age.min(65_536) as usize);
        self.steps[from] += 1;
        self.steps[until.max(from)] -= 1;
    }

    fn quantile(&self, part: f64) -> usize {
        let counts: Vec<i64> = self.steps.iter().scan(0, |count, step| Some((*count += step, *count).1)).collect();
        let total: i64 = counts.iter().sum();
        let mut sum = 0;
        let reached = |count: &i64| {
            sum += count;
            sum as f64 >= total as f64 * part
        };
        counts.iter().position(reached).unwrap_or(0)
    }
}

struct Pod {
    limiter: Limiter,
    accounts: Vec<Handle>,
    /// For ever: a request that waits borrows it.
    probe: &'static Handle,
    frames: Frames,
    inbox: Inbox,
    outbox: Outbox,
    addr: SocketAddr,
    /// Reservations so far on each account.
    loads: u64,
    /// When the first one is made.
    loaded_ms: u64,
    cpu: Duration,
    sent: (u64, u64),
    largest: usize,
}

/// A request that waits for rights, and what emptied the wallet before.
struct Probe {
    pod: usize,
    since_ms: u64,
    acquire: Pin<Box<Acquire<'static>>>,
    _emptied: Vec<Permit<'static>>,
}

/// What a pod knows of a row: how many reservations are in it, and since when.
#[derive(Clone, Copy, Default)]
struct Knows {
    loads: u32,
    since_ms: u32,
}

struct Fleet {
    clock: Simulated,
    now_ms: u64,
    pods: Vec<Pod>,
    by_addr: HashMap<SocketAddr, usize>,
    by_id: HashMap<ReplicaId, usize>,
    by_limit: HashMap<u64, usize>,
    /// What arrives when, in the order in which it was sent.
    network: BTreeMap<u64, Vec<(usize, Vec<u8>)>>,
    random: u64,
    nonces: u64,
    probes: Vec<Probe>,
    rights: Vec<u64>,
    refused: usize,
    /// By knower, known pod and account.
    known: Vec<Knows>,
    stale: Ages,
    measuring: bool,
}

impl Fleet {
    fn new(pods: usize, accounts: usize) -> Self {
        let clock = Simulated::default();
        clock.0.store(START_MS, Ordering::Relaxed);
        let names: Vec<String> = (0..accounts).map(|number| format!("account-{number}")).collect();
        let addrs: Vec<SocketAddr> = (0..pods).map(|pod| SocketAddr::from(([10, 0, 0, pod as u8], 7946))).collect();
        let pods: Vec<Pod> = (0..pods).map(|pod| Pod::start(pod, &addrs, &names, &clock)).collect();
        Self {
            now_ms: START_MS,
            by_addr: addrs.iter().enumerate().map(|(pod, addr)| (*addr, pod)).collect(),
            by_id: pods.iter().enumerate().map(|(pod, own)| (own.limiter.status().replica, pod)).collect(),
            by_limit: names.iter().enumerate().map(|(place, name)| (LimitId::of(name).bits(), place)).collect(),
            network: BTreeMap::new(),
            random: 1,
            nonces: 0,
            probes: Vec::new(),
            rights: Vec::new(),
            refused: 0,
            known: vec![Knows::default(); pods.len() * pods.len() * accounts],
            stale: Ages::new(),
            measuring: false,
            clock,
            pods,
        }
    }

    fn measure(mut self, seconds: u64) -> Found {
        while !self.pods.iter().all(|pod| pod.limiter.status().has_share) {
            self.run(INTERVAL_MS);
            assert!(self.now_ms < START_MS + 20_000, "the fleet does not join");
        }
        // Until everybody has heard of every row, and everything has come to rest.
        let now_ms = self.now_ms;
        self.pods.iter_mut().for_each(|pod| pod.loaded_ms = now_ms);
        while self.known.iter().enumerate().any(|(place, known)| known.loads == 0 && !self.is_own(place)) {
            self.run(INTERVAL_MS);
            assert!(self.now_ms < START_MS + 40_000, "some rows never arrive");
        }
        self.run(1_000);
        self.measuring = true;
        let begun = self.now_ms;
        for known in &mut self.known {
            known.since_ms = (begun - START_MS) as u32;
        }
        for pod in &mut self.pods {
            (pod.cpu, pod.sent, pod.largest) = Default::default();
        }
        self.run(seconds * 1_000);
        assert!(self.now_ms < START_MS + 58_000, "the window is over");
        for place in 0..self.known.len() {
            if !self.is_own(place) {
                self.age(place);
            }
        }
        self.rights.sort_unstable();
        let per_pod = 1.0 / (seconds as f64 * self.pods.len() as f64);
        Found {
            bytes: self.pods.iter().map(|pod| pod.sent.0).sum::<u64>() as f64 * per_pod,
            frames: self.pods.iter().map(|pod| pod.sent.1).sum::<u64>() as f64 * per_pod,
            largest: self.pods.iter().map(|pod| pod.largest).max().unwrap_or(0),
            cpu: self.pods.iter().map(|pod| pod.cpu.as_secs_f64()).sum::<f64>() * per_pod,
            stale: self.stale,
            rights: self.rights,
            refused: self.refused,
        }
    }

    fn run(&mut self, ms: u64) {
        for _ in 0..ms {
            self.now_ms += 1;
            self.clock.0.store(self.now_ms, Ordering::Relaxed);
            self.deliver();
            for pod in 0..self.pods.len() {
                // Nobody started at the same instant.
                let phase = pod as u64 * 37 % INTERVAL_MS;
                if self.now_ms % INTERVAL_MS == phase {
                    self.pods[pod].reserve(self.now_ms);
                    self.work(pod, Pod::tick);
                }
                let probes = self.measuring && self.pods.len() > 1;
                if probes && (self.now_ms + pod as u64 * 41).is_multiple_of(PROBE_EVERY_MS) {
                    self.probe(pod);
                }
            }
            self.look_at_probes();
        }
    }

    fn deliver(&mut self) {
        let mut arrived: BTreeMap<usize, Vec<Vec<u8>>> = BTreeMap::new();
        for (pod, datagram) in self.network.remove(&self.now_ms).unwrap_or_default() {
            arrived.entry(pod).or_default().push(datagram);
        }
        for (pod, mut datagrams) in arrived {
            for batch in datagrams.chunks_mut(BATCH) {
                let begun = cpu();
                let heard = self.pods[pod].open(batch);
                self.pods[pod].cpu += cpu() - begun;
                for (_, messages) in &heard {
                    for message in messages {
                        if let Message::Row(row) = message {
                            self.observe(pod, row);
                        }
                    }
                }
                self.work(pod, |own| own.hear(heard));
            }
        }
    }

    /// Lets a pod work, at its expense, and puts on the wire what it wants sent.
    fn work(&mut self, pod: usize, work: impl FnOnce(&mut Pod) -> Vec<Parcel>) {
        let own = &mut self.pods[pod];
        let begun = cpu();
        let parcels = work(own);
        let mut sealed = Vec::with_capacity(parcels.len());
        for parcel in parcels {
            self.nonces += 1;
            let mut nonce = [0; 24];
            nonce[..8].copy_from_slice(&self.nonces.to_le_bytes());
            sealed.push((parcel.to, parcel.seal(&own.frames, Timestamp::from_unix_ms(self.now_ms), nonce)));
        }
        own.cpu += cpu() - begun;
        for (to, frame) in sealed {
            own.sent.0 += frame.len() as u64;
            own.sent.1 += 1;
            own.largest = own.largest.max(frame.len());
            // splitmix64
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut bits = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let at = self.now_ms + 1 + (bits >> 33) % 5;
            self.network.entry(at).or_default().push((self.by_addr[&to], frame));
        }
    }

    /// Notes what a pod has just learnt of a row.
    fn observe(&mut self, pod: usize, row: &Row) {
        let Some(account) = self.by_limit.get(&row.key.limit.bits()) else { return };
        let Some(about) = self.by_id.get(&row.replica).filter(|about| **about != pod) else { return };
        let accounts = self.by_limit.len();
        let place = (pod * self.pods.len() + about) * accounts + account;
        let loads = (row.reserved / TOKENS) as u32;
        if loads > self.known[place].loads {
            if self.measuring {
                self.age(place);
            }
            self.known[place] = Knows { loads, since_ms: (self.now_ms - START_MS) as u32 };
        }
    }

    /// Counts how old what is known has become since it was learnt.
    fn age(&mut self, place: usize) {
        let known = self.known[place];
        let about = &self.pods[place / self.by_limit.len() % self.pods.len()];
        let as_of = about.loaded_ms + u64::from(known.loads - 1) * INTERVAL_MS;
        self.stale.add((START_MS + u64::from(known.since_ms)).saturating_sub(as_of), self.now_ms - as_of);
    }

    fn is_own(&self, place: usize) -> bool {
        let pair = place / self.by_limit.len();
        pair / self.pods.len() == pair % self.pods.len()
    }

    /// A pod spends all it has, and then wants more.
    fn probe(&mut self, pod: usize) {
        let handle = self.pods[pod].probe;
        let emptied = (0..27).rev().filter_map(|bit| handle.try_acquire(Claim::tokens(1 << bit)).ok()).collect();
        let acquire = Box::pin(handle.acquire(Claim::tokens(1_000)));
        self.probes.push(Probe { pod, since_ms: self.now_ms, acquire, _emptied: emptied });
    }

    fn look_at_probes(&mut self) {
        for mut probe in std::mem::take(&mut self.probes) {
            let limiter = &self.pods[probe.pod].limiter;
            limiter.with_ledger(|ledger, now| {
                if ledger.poll_timeout().is_some_and(|at| at <= now) {
                    ledger.handle_timeout(now);
                }
            });
            let polled = probe.acquire.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            self.work(probe.pod, Pod::flush);
            match polled {
                Poll::Pending => self.probes.push(probe),
                Poll::Ready(Ok(permit)) => {
                    permit.refund();
                    self.rights.push(self.now_ms - probe.since_ms);
                }
                Poll::Ready(Err(_)) => self.refused += 1,
            }
        }
    }
}

impl Pod {
    fn start(number: usize, addrs: &[SocketAddr], names: &[String], clock: &Simulated) -> Self {
        let quota = Quota::tokens(1_000_000_000).per_minute();
        let builder = Limiter::builder().clock(clock.clone()).seed(number as u64 + 1);
        let builder = builder.deployment(PROBE, [Quota::tokens(10_000_000).per_minute()]);
        let builder = names.iter().fold(builder, |builder, name| builder.deployment(name, [quota]));
        let limiter = builder.build().expect("the configuration is right");
        let id = ReplicaId::new(clock.now(), number as u128 + 1);
        let slot = Slot { node: format!("pod-{number}").into(), addr: addrs[number], exclusive: true };
        let settings = RosterSettings { directory: Directory::Static, ..RosterSettings::default() };
        limiter.attach(id, slot, settings, Duration::from_millis(INTERVAL_MS));
        limiter.with_ledger(|ledger, now| ledger.handle_listing(addrs, now));
        let frames = Frames::new(KeyRing::of([7; 32]), "bench", id);
        Self {
            accounts: names.iter().map(|name| limiter.handle(name).expect("configured")).collect(),
            probe: Box::leak(Box::new(limiter.handle(PROBE).expect("configured"))),
            limiter,
            inbox: Inbox::new(frames.clone()),
            frames,
            outbox: Outbox::new(),
            addr: addrs[number],
            loads: 0,
            loaded_ms: u64::MAX,
            cpu: Duration::ZERO,
            sent: (0, 0),
            largest: 0,
        }
    }

    /// Callers come, if they do yet: one for each account.
    fn reserve(&mut self, now_ms: u64) {
        if self.loaded_ms > now_ms {
            return;
        }
        if self.loads == 0 {
            self.loaded_ms = now_ms;
        }
        self.loads += 1;
        for account in &self.accounts {
            account.try_acquire(Claim::tokens(TOKENS)).expect("the quota is large enough").settle(TOKENS);
        }
    }

    fn tick(&mut self) -> Vec<Parcel> {
        self.limiter.with_ledger(|ledger, now| ledger.handle_tick(now));
        let mut parcels = self.flush();
        let peers = self.limiter.with_ledger(|ledger, _| ledger.peers());
        self.outbox.set_peers(&peers);
        parcels.extend(self.outbox.tick());
        parcels
    }

    fn open(&mut self, datagrams: &mut [Vec<u8>]) -> Vec<(quotum::ledger::Contact, Vec<Message>)> {
        let now = self.limiter.now();
        let open = |datagram: &mut Vec<u8>| {
            let received = self.inbox.receive(datagram, now).ok()?;
            self.outbox.heard(received.contact.from, received.contact.sent_at);
            let messages = if let Content::Messages(messages) = received.content { messages } else { Vec::new() };
            Some((received.contact, messages))
        };
        datagrams.iter_mut().filter_map(open).collect()
    }

    fn hear(&mut self, heard: Vec<(quotum::ledger::Contact, Vec<Message>)>) -> Vec<Parcel> {
        self.limiter.with_ledger(|ledger, now| {
            for (contact, messages) in heard {
                ledger.handle_contact(contact, now);
                messages.into_iter().for_each(|message| ledger.handle_message(contact.from, message, now));
            }
        });
        self.flush()
    }

    fn flush(&mut self) -> Vec<Parcel> {
        let outbox = &mut self.outbox;
        let transmits: Vec<_> = self.limiter.with_ledger(|ledger, _| {
            let transmits: Vec<_> = std::iter::from_fn(|| ledger.poll_transmit()).collect();
            while ledger.poll_note().is_some() {}
            if !transmits.is_empty() {
                outbox.set_peers(&ledger.peers());
            }
            for transmit in &transmits {
                if let Target::Replica(id) = transmit.to {
                    outbox.set_address(id, || ledger.address_of(id));
                }
            }
            transmits
        });
        let own = self.addr;
        outbox.pack(transmits).into_iter().filter(|parcel| parcel.to != own).collect()
    }
}

/// Returns the CPU time that this thread has used.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
