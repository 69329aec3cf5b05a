//! What gossip costs and how fast news travels, in fleets of up to 100 pods.
//!
//! `cargo bench -p quotum-bench --bench fleet [-- --quick | 50x200 ...]`. Every pod is whole: a
//! limiter and the product's own cluster loop, chitchat in it, on a simulated network with a
//! delay of 1 to 5 ms and no loss. All of them share one thread and virtual time: the clock
//! stands still while anybody works, so no figure but CPU depends on the machine, and 100 pods
//! are never late. Every pod reserves on every active account ten times a second, just before
//! its tick, so that every row of every pod changes at every tick: there is no busier fleet.
//! Prints the Markdown table that docs/cost.md quotes, and exits with 1 if a pod of 50 with 200
//! accounts sends more than it may, or a datagram is larger.
//!
//! Bytes and datagrams are counted by each pod's own `ClusterStats`, and the largest datagram
//! by the network. CPU is that of the thread, all of the runtime's included, less what the
//! network, the callers and the bookkeeping of this bench use, over the pods; only the
//! kernel's part of real sockets is not in it (the bench `idle` has that). Staleness is how
//! old what a peer knows of another pod's row is, at any time, over all rows of all pods and
//! the first ten peers; rows that arrive by chitchat are not looked at, so with them it can
//! only be less.

use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant as Stopwatch};

use quotum::cluster::frame::{Frames, KeyRing, MAX_DATAGRAM};
use quotum::cluster::inbox::{Content, Inbox};
use quotum::cluster::{Cluster, ClusterConfig, ClusterStats, Datagrams, Net, Seeds};
use quotum::ledger::{LimitId, Message, ReplicaId, Row, Timestamp};
use quotum::{Claim, Clock, Handle, Limiter, Permit, Quota};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc;
use tokio::time::Instant;

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
    (100, 1, 10),
    (100, 100, 5),
    (100, 1_000, 5),
    TARGET,
];
const QUICK: [(usize, usize, u64); 4] = [(3, 1, 5), (10, 100, 5), (30, 100, 5), (TARGET.0, TARGET.1, 5)];
const TARGET: (usize, usize, u64) = (50, 200, 10);

/// The most that a pod of [`TARGET`] may send, in MB/s (issue 4).
const MAX_TRAFFIC: f64 = 1.0;

/// The default of production, in ms.
const INTERVAL_MS: u64 = 100;

/// Just after the start of a minute: all is over before its end.
const START_MS: u64 = 1_800_000_000_000 + 1_000;

/// Tokens of one reservation: a row's count tells how many it includes.
const TOKENS: u64 = 10;

/// Every pod runs out of rights to one more deployment this often, and asks for some.
const PROBE_EVERY: Duration = Duration::from_millis(500);
const PROBE: &str = "probe";

/// How many pods are asked what they know; all are asked for the other figures.
const KNOWERS: usize = 10;

const KEY: [u8; 32] = [7; 32];
const CLUSTER: &str = "bench";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let named = |cell: &&(usize, usize, u64)| arguments.contains(&format!("{}x{}", cell.0, cell.1));
    let mut cells: Vec<_> = CELLS.iter().filter(named).collect();
    if cells.is_empty() {
        cells = if quick { QUICK.iter().collect() } else { CELLS.iter().collect() };
    }
    println!(
        "| pods | accounts | rows, kB/s | chitchat, kB/s | most of a pod, kB/s | datagrams/s | largest, B \
        | CPU a pod, % | stale p50 / p99 / max, ms | miss to rights p50 / p99 / max, ms | target |"
    );
    println!("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|");
    let mut missed = false;
    for cell in cells {
        let begun = Stopwatch::now();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let found = runtime.expect("a runtime without I/O needs nothing").block_on(measure(*cell));
        missed |= !found.print(*cell);
        eprintln!("fleet: {} pods x {} accounts took {:.1?}", cell.0, cell.1, begun.elapsed());
    }
    if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Per pod, and per second where there is a time in it.
struct Found {
    direct: f64,
    chitchat: f64,
    /// Of the pod that sent most.
    most: f64,
    frames: f64,
    largest: usize,
    cpu: f64,
    stale: Ages,
    /// Waits that ended with rights, in ms, in order; and how many ended without.
    rights: Vec<u64>,
    refused: usize,
}

impl Found {
    /// Prints a line of the table; returns whether all that must be met is.
    fn print(&self, (pods, accounts, _): (usize, usize, u64)) -> bool {
        let is_target = (pods, accounts) == (TARGET.0, TARGET.1);
        let met = self.largest <= MAX_DATAGRAM && (!is_target || self.most <= MAX_TRAFFIC * 1e6);
        let target = match (is_target, met) {
            (true, true) => "<= 1 MB/s: met",
            (true, false) => "<= 1 MB/s: missed",
            (false, true) => "",
            (false, false) => "a datagram is too large",
        };
        let stale = [0.5, 0.99, 1.0].map(|part| self.stale.quantile(part).to_string()).join(" / ");
        println!(
            "| {pods} | {accounts} | {:.1} | {:.1} | {:.1} | {:.0} | {} | {:.2} | {stale} | {} | {target} |",
            self.direct / 1e3,
            self.chitchat / 1e3,
            self.most / 1e3,
            self.frames,
            self.largest,
            self.cpu * 100.0,
            self.waits(),
        );
        met
    }

    fn waits(&self) -> String {
        let last = self.rights.len().max(1) - 1;
        let at = |part: usize| self.rights.get((self.rights.len() * part / 100).min(last));
        let waits = [50, 99, 100].map(|part| at(part).map_or("-".to_owned(), ToString::to_string)).join(" / ");
        match self.refused {
            0 => waits,
            some => format!("{waits}, {some} of {} refused", some + self.rights.len()),
        }
    }
}

/// Virtual time, as a limiter wants it.
#[derive(Clone, Copy, Debug)]
struct Virtual(Instant);

impl Virtual {
    fn now_ms(self) -> u64 {
        START_MS + self.0.elapsed().as_millis() as u64
    }
}

impl Clock for Virtual {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_ms(self.now_ms())
    }
}

type Arrival = (Vec<u8>, SocketAddr);

/// The network: what arrives when, in the order in which it was sent.
#[derive(Debug)]
struct Wires {
    clock: Virtual,
    under_way: BTreeMap<u64, Vec<(SocketAddr, Arrival)>>,
    bound: HashMap<SocketAddr, mpsc::UnboundedSender<Arrival>>,
    random: u64,
    largest: usize,
}

#[derive(Clone, Debug)]
struct SimulatedNet(Arc<Mutex<Wires>>);

#[derive(Debug)]
struct SimulatedSocket {
    own: SocketAddr,
    wires: Arc<Mutex<Wires>>,
    arrivals: Mutex<mpsc::UnboundedReceiver<Arrival>>,
}

impl Net for SimulatedNet {
    type Socket = SimulatedSocket;

    async fn bind(&self, own: SocketAddr) -> io::Result<SimulatedSocket> {
        let (sender, arrivals) = mpsc::unbounded_channel();
        self.0.lock().expect("nobody panics with it").bound.insert(own, sender);
        Ok(SimulatedSocket { own, wires: Arc::clone(&self.0), arrivals: Mutex::new(arrivals) })
    }

    async fn lookup(&self, _: &str) -> io::Result<Vec<IpAddr>> {
        Err(io::ErrorKind::NotFound.into())
    }

    async fn local_ip_towards(&self, _: SocketAddr) -> io::Result<IpAddr> {
        Err(io::ErrorKind::NotFound.into())
    }
}

impl Datagrams for SimulatedSocket {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.own)
    }

    async fn send_to(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        let mut wires = self.wires.lock().expect("nobody panics with it");
        wires.largest = wires.largest.max(datagram.len());
        // splitmix64
        wires.random = wires.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = (wires.random ^ (wires.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let at = wires.clock.now_ms() + 1 + (bits >> 33) % 5;
        wires.under_way.entry(at).or_default().push((to, (datagram.to_vec(), self.own)));
        Ok(())
    }

    async fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let arrival = poll_fn(|cx| self.arrivals.lock().expect("nobody panics with it").poll_recv(cx)).await;
        copy(arrival, buffer)
    }

    fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        copy(self.arrivals.lock().expect("nobody panics with it").try_recv().ok(), buffer)
    }
}

fn copy(arrival: Option<Arrival>, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    let (datagram, from) = arrival.ok_or(io::ErrorKind::WouldBlock)?;
    let length = datagram.len().min(buffer.len());
    buffer[..length].copy_from_slice(&datagram[..length]);
    Ok((length, from))
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
    cluster: Cluster,
    accounts: Vec<Handle>,
    /// Opens what arrives a second time, for the bookkeeping.
    inbox: Inbox,
    /// When its ticks are, from the start of each interval.
    phase: u64,
    /// Reservations so far on each account.
    loads: u64,
    /// When the first one is made.
    loaded_ms: u64,
}

impl Pod {
    async fn join(number: usize, addrs: &[SocketAddr], names: &[String], net: &SimulatedNet, clock: Virtual) -> Self {
        let quota = Quota::tokens(1_000_000_000).per_minute();
        let builder = Limiter::builder().clock(clock).seed(number as u64 + 1);
        let builder = builder.deployment(PROBE, [Quota::tokens(10_000_000).per_minute()]);
        let builder = names.iter().fold(builder, |builder, name| builder.deployment(name, [quota]));
        let limiter = builder.build().expect("the configuration is right");
        let config = ClusterConfig {
            cluster: CLUSTER.into(),
            node: format!("pod-{number}"),
            listen: addrs[number],
            keys: KeyRing::of(KEY),
            ..ClusterConfig::new(Seeds::Static(addrs.to_vec()))
        };
        let phase = clock.now_ms() % INTERVAL_MS;
        let cluster = Cluster::join(&limiter, config, net.clone()).await.expect("the address is free");
        let frames = Frames::new(KeyRing::of(KEY), CLUSTER, cluster.me());
        Self {
            accounts: names.iter().map(|name| limiter.handle(name).expect("configured")).collect(),
            inbox: Inbox::new(frames),
            limiter,
            cluster,
            phase,
            loads: 0,
            loaded_ms: u64::MAX,
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
}

/// What a pod knows of a row: how many reservations are in it, and since when.
#[derive(Clone, Copy, Default)]
struct Knows {
    loads: u32,
    since_ms: u32,
}

struct Fleet {
    clock: Virtual,
    wires: Arc<Mutex<Wires>>,
    pods: Vec<Pod>,
    by_addr: HashMap<SocketAddr, usize>,
    by_id: HashMap<ReplicaId, usize>,
    by_limit: HashMap<u64, usize>,
    /// By knower, known pod and account.
    known: Vec<Knows>,
    stale: Ages,
    measuring: bool,
    /// What this bench itself has used.
    own_cpu: Duration,
}

async fn measure((pods, accounts, seconds): (usize, usize, u64)) -> Found {
    let mut fleet = Fleet::start(pods, accounts).await;
    fleet.settle().await;
    let probes: Arc<Mutex<(Vec<u64>, usize)>> = Arc::default();
    let probing = fleet.pods.iter().enumerate().map(|(number, pod)| {
        // Not all at once: somebody must have rights to give.
        let first = PROBE_EVERY * (number as u32 * 41 % 500) / 500;
        tokio::spawn(probe(pod.limiter.clone(), first, Arc::clone(&probes)))
    });
    let probing: Vec<_> = probing.collect();
    fleet.begin();
    let (cpu_before, own_before, before) = (cpu(), fleet.own_cpu, fleet.stats());
    fleet.run(seconds * 1_000).await;
    let spent = (cpu() - cpu_before).saturating_sub(fleet.own_cpu - own_before);
    let after = fleet.stats();
    probing.iter().for_each(tokio::task::JoinHandle::abort);
    fleet.end();
    let sent: Vec<_> = before.iter().zip(&after).map(|(before, after)| Sent::between(before, after)).collect();
    let per_pod = 1.0 / (seconds as f64 * pods as f64);
    let sum = |of: fn(&Sent) -> u64| sent.iter().map(of).sum::<u64>() as f64 * per_pod;
    let (mut rights, refused) = std::mem::take(&mut *probes.lock().expect("nobody panics with it"));
    rights.sort_unstable();
    Found {
        direct: sum(|sent| sent.bytes - sent.chitchat),
        chitchat: sum(|sent| sent.chitchat),
        most: sent.iter().map(|sent| sent.bytes.max(sent.received)).max().unwrap_or(0) as f64 / seconds as f64,
        frames: sum(|sent| sent.frames),
        largest: fleet.wires.lock().expect("nobody panics with it").largest,
        cpu: spent.as_secs_f64() * per_pod,
        stale: fleet.stale,
        rights,
        refused,
    }
}

/// What one pod sent and received in the time that is measured.
struct Sent {
    bytes: u64,
    chitchat: u64,
    frames: u64,
    received: u64,
}

impl Sent {
    fn between(before: &ClusterStats, after: &ClusterStats) -> Self {
        Self {
            bytes: after.bytes_sent - before.bytes_sent,
            chitchat: after.chitchat_bytes_sent - before.chitchat_bytes_sent,
            frames: after.frames_sent - before.frames_sent,
            received: after.bytes_received - before.bytes_received,
        }
    }
}

impl Fleet {
    async fn start(count: usize, accounts: usize) -> Self {
        let clock = Virtual(Instant::now());
        let wires = Arc::new(Mutex::new(Wires {
            clock,
            under_way: BTreeMap::new(),
            bound: HashMap::new(),
            random: 1,
            largest: 0,
        }));
        let names: Vec<String> = (0..accounts).map(|number| format!("account-{number}")).collect();
        let addrs: Vec<SocketAddr> = (0..count).map(|pod| SocketAddr::from(([10, 0, 0, pod as u8], 7946))).collect();
        let mut fleet = Self {
            clock,
            by_addr: addrs.iter().enumerate().map(|(pod, addr)| (*addr, pod)).collect(),
            by_id: HashMap::new(),
            by_limit: names.iter().enumerate().map(|(place, name)| (LimitId::of(name).bits(), place)).collect(),
            known: vec![Knows::default(); count.min(KNOWERS) * count * accounts],
            stale: Ages::new(),
            measuring: false,
            own_cpu: Duration::ZERO,
            pods: Vec::new(),
            wires: Arc::clone(&wires),
        };
        for number in 0..count {
            // Nobody started at the same instant, and all within one interval.
            let due = START_MS + number as u64 * INTERVAL_MS / count as u64;
            fleet.run(due.saturating_sub(clock.now_ms())).await;
            let pod = Pod::join(number, &addrs, &names, &SimulatedNet(Arc::clone(&wires)), clock).await;
            fleet.by_id.insert(pod.cluster.me(), number);
            fleet.pods.push(pod);
        }
        fleet
    }

    /// Lets the fleet join, load and come to rest.
    async fn settle(&mut self) {
        while !self.pods.iter().all(|pod| pod.limiter.status().has_share) {
            self.run(INTERVAL_MS).await;
            assert!(self.clock.now_ms() < START_MS + 25_000, "the fleet does not join");
        }
        let now_ms = self.clock.now_ms();
        eprintln!("fleet: joined after {} ms", now_ms - START_MS);
        self.pods.iter_mut().for_each(|pod| pod.loaded_ms = now_ms);
        while self.known.iter().enumerate().any(|(place, known)| known.loads == 0 && !self.is_own(place)) {
            self.run(INTERVAL_MS).await;
            assert!(self.clock.now_ms() < START_MS + 45_000, "some rows never arrive");
        }
        self.run(1_000).await;
    }

    fn begin(&mut self) {
        self.measuring = true;
        let since_ms = (self.clock.now_ms() - START_MS) as u32;
        self.known.iter_mut().for_each(|known| known.since_ms = since_ms);
    }

    fn end(&mut self) {
        assert!(self.clock.now_ms() < START_MS + 58_900, "the window is over");
        for place in 0..self.known.len() {
            if !self.is_own(place) {
                self.age(place);
            }
        }
    }

    fn stats(&self) -> Vec<ClusterStats> {
        self.pods.iter().map(|pod| pod.cluster.stats()).collect()
    }

    /// Lets time pass: delivers what is due and lets callers come.
    async fn run(&mut self, ms: u64) {
        for _ in 0..ms {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let begun = cpu();
            let now_ms = self.clock.now_ms();
            self.deliver(now_ms);
            for pod in &mut self.pods {
                if (now_ms + 1) % INTERVAL_MS == pod.phase {
                    pod.reserve(now_ms);
                }
            }
            self.own_cpu += cpu() - begun;
        }
    }

    fn deliver(&mut self, now_ms: u64) {
        let due: Vec<_> = {
            let mut wires = self.wires.lock().expect("nobody panics with it");
            let later = wires.under_way.split_off(&(now_ms + 1));
            std::mem::replace(&mut wires.under_way, later).into_values().flatten().collect()
        };
        for (to, (mut datagram, from)) in due {
            let bound = self.wires.lock().expect("nobody panics with it").bound.get(&to).cloned();
            let Some(bound) = bound else { continue };
            let Some(pod) = self.by_addr.get(&to).copied().filter(|pod| *pod < self.pods.len().min(KNOWERS)) else {
                let _ = bound.send((datagram, from));
                continue;
            };
            let _ = bound.send((datagram.clone(), from));
            let received = self.pods[pod].inbox.receive(&mut datagram, self.clock.now());
            let Ok(Content::Messages(messages)) = received.map(|received| received.content) else { continue };
            for message in messages {
                if let Message::Row(row) = message {
                    self.observe(pod, &row, now_ms);
                }
            }
        }
    }

    /// Notes what a pod has just learnt of a row.
    fn observe(&mut self, pod: usize, row: &Row, now_ms: u64) {
        let Some(account) = self.by_limit.get(&row.key.limit.bits()) else { return };
        let Some(about) = self.by_id.get(&row.replica).filter(|about| **about != pod) else { return };
        let place = (pod * self.pods.len() + about) * self.by_limit.len() + account;
        let loads = (row.reserved / TOKENS) as u32;
        if loads > self.known[place].loads {
            if self.measuring {
                self.age(place);
            }
            self.known[place] = Knows { loads, since_ms: (now_ms - START_MS) as u32 };
        }
    }

    /// Counts how old what is known has become since it was learnt.
    fn age(&mut self, place: usize) {
        let known = self.known[place];
        let about = &self.pods[place / self.by_limit.len() % self.pods.len()];
        let as_of = about.loaded_ms + u64::from(known.loads.max(1) - 1) * INTERVAL_MS;
        let learnt = START_MS + u64::from(known.since_ms);
        self.stale.add(learnt.saturating_sub(as_of), self.clock.now_ms().saturating_sub(as_of));
    }

    fn is_own(&self, place: usize) -> bool {
        let pair = place / self.by_limit.len();
        pair / self.pods.len() == pair % self.pods.len()
    }
}

/// A pod spends all it has, and then wants more; again and again, for ever.
async fn probe(limiter: Limiter, first: Duration, probes: Arc<Mutex<(Vec<u64>, usize)>>) {
    let handle = limiter.handle(PROBE).expect("configured");
    tokio::time::sleep(first).await;
    loop {
        let emptied: Vec<Permit<'_>> =
            (0..27).rev().filter_map(|bit| handle.try_acquire(Claim::tokens(1 << bit)).ok()).collect();
        let since = Instant::now();
        let asked = handle.acquire(Claim::tokens(1_000)).await;
        let waited = since.elapsed().as_millis() as u64;
        drop(emptied);
        {
            let mut probes = probes.lock().expect("nobody panics with it");
            match asked {
                Ok(permit) => {
                    permit.refund();
                    probes.0.push(waited);
                }
                Err(_) => probes.1 += 1,
            }
        }
        tokio::time::sleep_until(since + PROBE_EVERY).await;
    }
}

/// Returns the CPU time that this thread has used.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
