//! A fleet of real limiters in one thread, with a clock and a network that obey the test.
//!
//! Knows how to carry messages between limiters. Must not know what they mean. Nothing
//! here sleeps: time passes when a test says so.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of the harness")]

pub mod storm;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use quotum::ledger::{Contact, Directory, Message, ReplicaId, RosterSettings, Slot, Target, Timestamp, Transmit};
use quotum::{Claim, Clock, Handle, Limiter, Mode, Policy, Quota, Unit};

/// The deployment every test uses.
pub const DEPLOYMENT: &str = "gpt";

/// A clock that shows what the test says.
#[derive(Clone, Debug, Default)]
pub struct ManualClock(Arc<AtomicU64>);

impl ManualClock {
    pub fn set(&self, ms: u64) {
        self.0.store(ms, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_ms(self.0.load(Ordering::SeqCst))
    }
}

/// One pod.
#[derive(Debug)]
pub struct Pod {
    pub limiter: Limiter,
    pub handle: Handle,
    pub clock: ManualClock,
    pub id: ReplicaId,
    pub addr: SocketAddr,
    pub alive: bool,
    /// The latest send time this pod has seen from each other one.
    heard: BTreeMap<usize, Timestamp>,
}

impl Pod {
    /// Tokens reserved and not refunded here in the window that starts at `start_ms`.
    pub fn used(&self, start_ms: u64) -> u64 {
        self.column(start_ms, |(_, reserved, refunded, _)| reserved - refunded)
    }

    /// Rights this pod has held or holds in that window.
    pub fn rights(&self, start_ms: u64) -> u64 {
        self.column(start_ms, |(.., rights)| rights)
    }

    pub fn joined(&self) -> Option<u64> {
        self.limiter.status().joined.map(Timestamp::unix_ms)
    }

    pub fn try_take(&self, tokens: u64) -> bool {
        self.handle.try_acquire(Claim::tokens(tokens)).map(|mut permit| permit.start()).is_ok()
    }

    /// Takes as much as it can in steps of `step`; returns the sum.
    pub fn drain(&self, step: u64) -> u64 {
        let mut taken = 0;
        while self.try_take(step) {
            taken += step;
        }
        taken
    }

    fn column(&self, start_ms: u64, value: impl Fn((Timestamp, u64, u64, u64)) -> u64) -> u64 {
        let windows = self.limiter.with_ledger(|ledger, _| ledger.open_windows(DEPLOYMENT, Unit::Tokens));
        windows.into_iter().filter(|window| window.0.unix_ms() == start_ms).map(value).sum()
    }
}

/// A message on its way.
#[derive(Clone, Debug)]
pub struct Letter {
    pub from: usize,
    pub to: usize,
    pub contact: Contact,
    pub message: Option<Message>,
}

/// The fleet and its network.
#[derive(Debug)]
pub struct Fleet {
    pub now_ms: u64,
    pub pods: Vec<Pod>,
    pub quota: Quota,
    pub policy: Policy,
    /// What the next pod to start is configured with.
    pub deployment: &'static str,
    /// Directed links that lose everything.
    pub cut: BTreeSet<(usize, usize)>,
    /// Everything ever sent, if a test wants to play it again.
    pub sent: Vec<Letter>,
    /// How far a slot's clock is off, in milliseconds.
    pub offsets: BTreeMap<usize, i64>,
    seed: u64,
}

impl Fleet {
    pub fn new(quota: Quota, start_ms: u64) -> Self {
        let policy = Policy { edge: Duration::ZERO, ..Policy::default() };
        Self {
            now_ms: start_ms,
            pods: Vec::new(),
            quota,
            policy,
            deployment: DEPLOYMENT,
            cut: BTreeSet::new(),
            sent: Vec::new(),
            offsets: BTreeMap::new(),
            seed: 1,
        }
    }

    /// Three pods with a static list, joined at once.
    pub fn joined(quota: Quota, start_ms: u64, pods: usize) -> Self {
        Self::joined_in(Mode::Strict, quota, start_ms, pods)
    }

    /// The same in another mode.
    pub fn joined_in(mode: Mode, quota: Quota, start_ms: u64, pods: usize) -> Self {
        let mut fleet = Self::new(quota, start_ms);
        fleet.policy.mode = mode;
        let list: Vec<SocketAddr> = (0..pods).map(address).collect();
        for pod in 0..pods {
            let at = fleet.start(pod, Directory::Static, RosterSettings::default());
            fleet.list(at, &list);
        }
        fleet.run(3);
        for pod in &fleet.pods {
            assert!(pod.joined().is_some(), "{:?}", pod.limiter.status().blocked);
        }
        fleet
    }

    /// Starts a process in slot `slot`; returns its place in `pods`.
    pub fn start(&mut self, slot: usize, directory: Directory, settings: RosterSettings) -> usize {
        let clock = ManualClock::default();
        let started = self.local_ms(slot);
        clock.set(started);
        self.seed += 1;
        let limiter = Limiter::builder()
            .deployment_with(self.deployment, [self.quota], self.policy.clone())
            .clock(clock.clone())
            .seed(self.seed)
            .build()
            .expect("a valid configuration");
        let id = ReplicaId::new(Timestamp::from_unix_ms(started), u128::from(self.seed) * 7_919);
        let addr = address(slot);
        let slot = Slot { node: format!("pod-{slot}").into(), addr, exclusive: true };
        limiter
            .attach(id, slot, RosterSettings { directory, ..settings }, Duration::from_millis(100))
            .expect("it joins once");
        let handle = limiter.handle(self.deployment).expect("configured above");
        self.pods.push(Pod { limiter, handle, clock, id, addr, alive: true, heard: BTreeMap::new() });
        self.pods.len() - 1
    }

    /// Gives a pod an answer of its directory.
    pub fn list(&mut self, pod: usize, addresses: &[SocketAddr]) {
        self.pods[pod].limiter.with_ledger(|ledger, now| ledger.handle_listing(addresses, now));
    }

    /// Changes a pod's limits. It keeps its old handle.
    pub fn reload(&mut self, pod: usize, quotas: impl IntoIterator<Item = Quota>) {
        let builder = Limiter::builder().deployment_with(DEPLOYMENT, quotas, self.policy.clone());
        let pod = &mut self.pods[pod];
        pod.limiter = pod.limiter.reconfigure(builder).expect("a valid configuration");
    }

    /// Gives a pod one deployment, which it may not have had before, and its handle.
    pub fn deploy(&mut self, pod: usize, deployment: &str, quota: Quota) {
        let builder = Limiter::builder().deployment_with(deployment, [quota], self.policy.clone());
        let pod = &mut self.pods[pod];
        pod.limiter = pod.limiter.reconfigure(builder).expect("a valid configuration");
        pod.handle = pod.limiter.handle(deployment).expect("configured above");
    }

    /// Drops a pod's only deployment from its configuration. It keeps its handle.
    pub fn remove(&mut self, pod: usize) {
        let pod = &mut self.pods[pod];
        pod.limiter = pod.limiter.reconfigure(Limiter::builder()).expect("a valid configuration");
    }

    /// Kills a pod: no goodbye.
    pub fn kill(&mut self, pod: usize) {
        self.pods[pod].alive = false;
    }

    /// Lets so many gossip intervals pass, delivering everything at once.
    pub fn run(&mut self, ticks: usize) {
        for _ in 0..ticks {
            self.pass(100);
            self.tick_all();
            self.settle();
        }
    }

    /// Runs until the clock shows at least `ms`.
    pub fn run_until(&mut self, ms: u64) {
        while self.now_ms < ms {
            self.run(1);
        }
    }

    /// Lets time pass without anything happening.
    pub fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        for pod in &self.pods {
            pod.clock.set(self.local_ms(slot_of(pod.addr)));
        }
    }

    pub fn tick_all(&mut self) {
        for pod in self.pods.iter().filter(|pod| pod.alive) {
            pod.limiter.with_ledger(|ledger, now| ledger.handle_tick(now));
        }
        self.heartbeat();
    }

    /// Everybody sends an empty frame to everybody it knows.
    pub fn heartbeat(&mut self) {
        for from in 0..self.pods.len() {
            if self.pods[from].alive {
                let peers = self.pods[from].limiter.with_ledger(|ledger, _| ledger.peers());
                for (_, addr) in peers {
                    for letter in self.letters(from, addr, None) {
                        self.deliver(&letter);
                    }
                }
            }
        }
    }

    /// Delivers until nobody has anything more to say.
    pub fn settle(&mut self) {
        for _ in 0..64 {
            let letters = self.collect();
            if letters.is_empty() {
                return;
            }
            for letter in letters {
                self.deliver(&letter);
            }
        }
        panic!("the fleet never stops talking");
    }

    /// Takes everything that pods want to send now.
    pub fn collect(&mut self) -> Vec<Letter> {
        let mut letters = Vec::new();
        for from in 0..self.pods.len() {
            if !self.pods[from].alive {
                continue;
            }
            while let Some(Transmit { to, message }) =
                self.pods[from].limiter.with_ledger(|ledger, _| ledger.poll_transmit())
            {
                let addresses: Vec<SocketAddr> = match to {
                    Target::Everyone => {
                        let peers = self.pods[from].limiter.with_ledger(|ledger, _| ledger.peers());
                        peers.into_iter().map(|(_, addr)| addr).collect()
                    }
                    Target::Replica(id) => {
                        self.pods[from].limiter.with_ledger(|ledger, _| ledger.address_of(id)).into_iter().collect()
                    }
                    Target::Address(addr) => vec![addr],
                };
                for addr in addresses {
                    letters.extend(self.letters(from, addr, Some(message.clone())));
                }
            }
        }
        self.sent.extend(letters.iter().cloned());
        letters
    }

    /// Delivers a letter, if the link is up and the receiver lives.
    pub fn deliver(&mut self, letter: &Letter) {
        if self.cut.contains(&(letter.from, letter.to)) {
            return;
        }
        self.force(letter);
    }

    /// Delivers a letter whatever the link says: a message may arrive at any time.
    pub fn force(&mut self, letter: &Letter) {
        let receiver = &mut self.pods[letter.to];
        if !receiver.alive {
            return;
        }
        let heard = receiver.heard.entry(letter.from).or_default();
        *heard = (*heard).max(letter.contact.sent_at);
        receiver.limiter.with_ledger(|ledger, now| {
            ledger.handle_contact(letter.contact, now);
            if let Some(message) = letter.message.clone() {
                ledger.handle_message(letter.contact.from, message, now);
            }
        });
    }

    /// What the clock of a slot shows now.
    fn local_ms(&self, slot: usize) -> u64 {
        self.now_ms.saturating_add_signed(self.offsets.get(&slot).copied().unwrap_or(0))
    }

    /// The letters to whoever runs at an address now: at most one.
    fn letters(&self, from: usize, addr: SocketAddr, message: Option<Message>) -> Vec<Letter> {
        let to = self.pods.iter().rposition(|pod| pod.addr == addr && pod.alive);
        let contact = |to: usize| Contact {
            from: self.pods[from].id,
            sent_at: Timestamp::from_unix_ms(self.local_ms(slot_of(self.pods[from].addr))),
            echo: self.pods[from].heard.get(&to).copied(),
        };
        to.into_iter()
            .filter(|to| *to != from)
            .map(|to| Letter { from, to, contact: contact(to), message: message.clone() })
            .collect()
    }

    /// Tokens reserved and not refunded in a window over all pods, dead or alive.
    pub fn used(&self, start_ms: u64) -> u64 {
        self.pods.iter().map(|pod| pod.used(start_ms)).sum()
    }

    pub fn rights(&self, start_ms: u64) -> u64 {
        self.pods.iter().map(|pod| pod.rights(start_ms)).sum()
    }

    /// Everybody alive takes what it can, and asks for the rest; returns the sum taken.
    pub fn drain_all(&mut self, step: u64) -> u64 {
        self.pods.iter().filter(|pod| pod.alive).map(|pod| pod.drain(step)).sum()
    }
}

/// The address of a slot.
pub fn address(slot: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, u8::try_from(slot + 1).expect("few slots")], 7946))
}

/// The slot of an address.
fn slot_of(addr: SocketAddr) -> usize {
    match addr {
        SocketAddr::V4(addr) => usize::from(addr.ip().octets()[3]) - 1,
        SocketAddr::V6(_) => unreachable!("slots have IPv4 addresses"),
    }
}

/// Polls a future once, counting wake-ups.
#[derive(Debug, Default)]
pub struct WakeCount(AtomicU64);

impl Wake for WakeCount {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl WakeCount {
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// Polls once.
pub fn poll<F: Future + Unpin>(future: &mut F, wakes: &Arc<WakeCount>) -> Poll<F::Output> {
    let waker = Waker::from(Arc::clone(wakes));
    pin!(future).poll(&mut Context::from_waker(&waker))
}
