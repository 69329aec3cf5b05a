//! The life of a fleet: newcomers, crashes, rolling replacements, a wrong configuration and
//! a partition, with whole replicas over real loopback UDP.
//!
//! Windows last a minute and pass by moving the one clock that all replicas share. Whatever
//! happens, the tokens that all runs of all pods used in a window are counted here, outside,
//! and are never more than the limit.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quotum::cluster::{Cluster, ClusterConfig, Datagrams, KeyRing, Net, Seeds, UdpDatagrams, UdpNet};
use quotum::ledger::{PeerStatus, ReplicaId, Timestamp};
use quotum::{Claim, Clock, Limiter, Policy, Quota};
use tokio::time::{Interval, MissedTickBehavior};

const LIMIT: u64 = 900;
const WINDOW_MS: u64 = 60_000;

/// Far more than anything here takes, and less than a window: it bounds a failure, it
/// asserts nothing.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often pods gossip here.
const INTERVAL: Duration = Duration::from_millis(20);

/// How often a condition is looked at, and how far the clock moves in between.
const LOOK_MS: u64 = 5;

/// A clock that shows what the test says.
#[derive(Clone, Debug)]
struct TestClock(Arc<AtomicU64>);

impl TestClock {
    /// A second into some window.
    fn new() -> Self {
        Self(Arc::new(AtomicU64::new(29_000_000 * WINDOW_MS + 1_000)))
    }

    fn pass(&self, ms: u64) {
        self.0.fetch_add(ms, Ordering::SeqCst);
    }

    fn window(&self) -> u64 {
        self.now().unix_ms() / WINDOW_MS
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_ms(self.0.load(Ordering::SeqCst))
    }
}

/// What the network of a test does: what the headless name lists, and whom it keeps apart.
#[derive(Debug, Default)]
struct Wires {
    listed: Mutex<Vec<IpAddr>>,
    cut: Mutex<BTreeSet<(SocketAddr, SocketAddr)>>,
}

/// Loopback, with a port that is bound before its number is told to anybody.
#[derive(Debug)]
struct TestNet {
    socket: Mutex<Option<UdpSocket>>,
    wires: Arc<Wires>,
}

/// A socket that loses what the wires say.
#[derive(Debug)]
struct TestSocket {
    inner: UdpDatagrams,
    own: SocketAddr,
    wires: Arc<Wires>,
}

impl Net for TestNet {
    type Socket = TestSocket;

    async fn bind(&self, own: SocketAddr) -> io::Result<TestSocket> {
        let socket = self.socket.lock().unwrap().take().ok_or(io::ErrorKind::AddrInUse)?;
        Ok(TestSocket { inner: UdpDatagrams::from_std(socket)?, own, wires: Arc::clone(&self.wires) })
    }

    async fn lookup(&self, _: &str) -> io::Result<Vec<IpAddr>> {
        Ok(self.wires.listed.lock().unwrap().clone())
    }

    async fn local_ip_towards(&self, peer: SocketAddr) -> io::Result<IpAddr> {
        UdpNet.local_ip_towards(peer).await
    }
}

impl Datagrams for TestSocket {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    async fn send_to(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        if self.wires.cut.lock().unwrap().contains(&(self.own, to)) {
            return Ok(());
        }
        self.inner.send_to(datagram, to).await
    }

    async fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.inner.recv_from(buffer).await
    }

    fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.inner.try_recv_from(buffer)
    }
}

/// One run of one pod.
struct Pod {
    limiter: Limiter,
    cluster: Cluster,
    addr: SocketAddr,
}

impl Pod {
    fn has_share(&self) -> bool {
        self.limiter.status().has_share
    }

    fn peers(&self) -> Vec<PeerStatus> {
        self.limiter.status().peers.into_iter().filter(|peer| peer.gone.is_none()).collect()
    }

    fn reaches(&self, id: ReplicaId) -> bool {
        self.peers().iter().any(|peer| peer.id == id && peer.reachable)
    }
}

/// The pods that run, what they run on, and what all runs have used in each window.
struct Fleet {
    clock: TestClock,
    wires: Arc<Wires>,
    seeds: Seeds,
    pods: Vec<Pod>,
    used: BTreeMap<u64, u64>,
    limit: u64,
}

impl Fleet {
    /// Pods that a list names, all started.
    async fn listed(size: usize) -> Self {
        let sockets: Vec<_> = (0..size).map(|_| bound((Ipv4Addr::LOCALHOST, 0).into()).unwrap()).collect();
        let seeds = Seeds::Static(sockets.iter().map(|socket| socket.local_addr().unwrap()).collect());
        let mut fleet = Self::new(seeds);
        for socket in sockets {
            fleet.start(socket).await;
        }
        fleet.until_all_have_a_share().await;
        fleet
    }

    /// Pods behind a headless name, all started, and the sockets of others that may follow.
    async fn named(size: usize, followers: usize) -> (Self, Vec<UdpSocket>) {
        let mut sockets = loop {
            // One port at several addresses of loopback; somebody may have it at one of them.
            let port = bound(address(0, 0)).unwrap().local_addr().unwrap().port();
            let sockets: Option<Vec<_>> = (0..size + followers).map(|pod| bound(address(pod, port))).collect();
            if let Some(sockets) = sockets {
                break sockets;
            }
        };
        let port = sockets[0].local_addr().unwrap().port();
        let mut fleet = Self::new(Seeds::Name { host: "quotum-headless".into(), port });
        let followers = sockets.split_off(size);
        for socket in &sockets {
            fleet.list(socket);
        }
        for socket in sockets {
            fleet.start(socket).await;
        }
        fleet.until_all_have_a_share().await;
        (fleet, followers)
    }

    fn new(seeds: Seeds) -> Self {
        let (clock, wires) = (TestClock::new(), Arc::default());
        Self { clock, wires, seeds, pods: Vec::new(), used: BTreeMap::new(), limit: LIMIT }
    }

    /// Adds an address to the headless name.
    fn list(&self, socket: &UdpSocket) {
        self.wires.listed.lock().unwrap().push(socket.local_addr().unwrap().ip());
    }

    async fn start(&mut self, socket: UdpSocket) {
        self.start_with(socket, Quota::tokens(LIMIT).per_minute()).await;
    }

    async fn start_with(&mut self, socket: UdpSocket, quota: Quota) {
        let policy = Policy { wait: Duration::from_millis(100), ..Policy::default() };
        let limiter = Limiter::builder().deployment_with("model", [quota], policy).clock(self.clock.clone());
        let limiter = limiter.build().unwrap();
        let addr = socket.local_addr().unwrap();
        let config = ClusterConfig {
            listen: addr,
            // The pod's name belongs to its slot.
            node: format!("pod-{addr}"),
            interval: INTERVAL,
            keys: KeyRing::of([7; 32]),
            ..ClusterConfig::new(self.seeds.clone())
        };
        let net = TestNet { socket: Mutex::new(Some(socket)), wires: Arc::clone(&self.wires) };
        let cluster = Cluster::join(&limiter, config, net).await.unwrap();
        self.pods.push(Pod { limiter, cluster, addr });
    }

    /// Starts a pod behind all others and waits until it may take traffic.
    async fn start_ready(&mut self, socket: UdpSocket) {
        self.start(socket).await;
        let newcomer = &self.pods[self.pods.len() - 1];
        self.until("the newcomer is ready", || newcomer.limiter.status().ready).await;
        self.until_all_hear_one_another().await;
    }

    /// Ends a pod as `kill -9` does: nothing more is sent, not even a goodbye. Returns what
    /// the operating system gives back.
    async fn kill(&mut self, pod: usize) -> UdpSocket {
        let Pod { cluster, addr, .. } = self.pods.remove(pod);
        drop(cluster);
        self.until_free(addr).await
    }

    /// Ends a pod in order; returns its port.
    async fn leave(&mut self, pod: usize) -> UdpSocket {
        let Pod { cluster, addr, .. } = self.pods.remove(pod);
        self.while_time_passes("it has left", cluster.leave()).await;
        drop(cluster);
        self.wires.listed.lock().unwrap().retain(|ip| *ip != addr.ip() || matches!(self.seeds, Seeds::Static(_)));
        self.until_free(addr).await
    }

    async fn until_free(&self, addr: SocketAddr) -> UdpSocket {
        let mut free = None;
        self.until("the port is free", || {
            free = bound(addr);
            free.is_some()
        })
        .await;
        free.unwrap()
    }

    /// Loses everything between these pods and all others, or nothing any more.
    fn cut(&self, apart: &[usize]) {
        let mut cut = self.wires.cut.lock().unwrap();
        cut.clear();
        for (i, a) in self.pods.iter().enumerate() {
            for (j, b) in self.pods.iter().enumerate() {
                if apart.contains(&i) != apart.contains(&j) {
                    cut.insert((a.addr, b.addr));
                }
            }
        }
    }

    /// Lets the clock pass into the next window, through the time in which shares are frozen.
    async fn next_window(&self) {
        let next = (self.clock.window() + 1) * WINDOW_MS;
        self.clock.pass(next - 1_000 - self.clock.now().unix_ms());
        self.until_all_hear_one_another().await;
        self.clock.pass(next + 1_000 - self.clock.now().unix_ms());
        self.until_all_hear_one_another().await;
    }

    /// Nothing is known of the others' rights until they have been heard again.
    async fn until_all_hear_one_another(&self) {
        let cut = self.wires.cut.lock().unwrap().clone();
        self.until("all that can hear one another do", || {
            self.pods.iter().all(|a| {
                let others = self.pods.iter().filter(|b| a.addr != b.addr && !cut.contains(&(a.addr, b.addr)));
                others.into_iter().all(|b| a.reaches(b.cluster.me()))
            })
        })
        .await;
    }

    async fn until_all_have_a_share(&self) {
        self.until("every replica has its share", || self.pods.iter().all(Pod::has_share)).await;
        self.until_all_hear_one_another().await;
    }

    async fn until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let mut looks = looks();
        let met = async {
            while !condition() {
                looks.tick().await;
                self.clock.pass(LOOK_MS);
            }
        };
        match tokio::time::timeout(PATIENCE, met).await {
            Ok(()) => {}
            Err(_) => panic!("it never came that {what}"),
        }
    }

    async fn while_time_passes<T>(&self, what: &str, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        let mut looks = looks();
        let done = async {
            loop {
                tokio::select! {
                    biased;
                    done = &mut future => return done,
                    _ = looks.tick() => self.clock.pass(LOOK_MS),
                }
            }
        };
        match tokio::time::timeout(PATIENCE, done).await {
            Ok(done) => done,
            Err(_) => panic!("it never came that {what}"),
        }
    }

    /// Uses tokens at a pod if it admits them, and counts them.
    async fn take(&mut self, pod: usize, tokens: u64) -> bool {
        let window = self.clock.window();
        let handle = self.pods[pod].limiter.handle("model").unwrap();
        let acquire = handle.acquire(Claim::tokens(tokens));
        let Ok(mut permit) = self.while_time_passes("a decision is reached", acquire).await else { return false };
        assert_eq!(window, self.clock.window(), "a test that spends across the end of a window cannot count");
        permit.start();
        permit.settle(tokens);
        let used = self.used.entry(window).or_default();
        *used += tokens;
        assert!(*used <= self.limit, "{used} of {} in window {window}", self.limit);
        true
    }

    /// Uses tokens at a pod that has them or gets them from its peers.
    async fn serve(&mut self, pod: usize, tokens: u64) {
        let tries = PATIENCE.as_millis() as u64 / LOOK_MS;
        for _ in 0..tries {
            if self.take(pod, tokens).await {
                return;
            }
        }
        panic!("pod {pod} starves: {:?}", self.pods[pod].limiter.status());
    }

    /// Uses what these pods can get, in turns, until none of them gets any more: not even when
    /// what was under way has arrived, as rights that a busy peer gave to somebody who had
    /// stopped waiting.
    async fn spend(&mut self, pods: &[usize]) -> u64 {
        let mut spent = 0;
        for tokens in [30, 1] {
            let mut in_vain = 0;
            while in_vain < 2 {
                let before = spent;
                for pod in pods {
                    spent += if self.take(*pod, tokens).await { tokens } else { 0 };
                }
                in_vain = if spent == before { in_vain + 1 } else { 0 };
                self.ticks(if in_vain > 0 { 4 } else { 0 }).await;
            }
        }
        spent
    }

    /// Lets so many gossip intervals pass.
    async fn ticks(&self, ticks: u64) {
        let mut looks_left = ticks * INTERVAL.as_millis() as u64 / LOOK_MS;
        let passed = || {
            looks_left = looks_left.saturating_sub(1);
            looks_left == 0
        };
        self.until("some intervals pass", passed).await;
    }

    async fn spend_all(&mut self) -> u64 {
        self.spend(&(0..self.pods.len()).collect::<Vec<_>>()).await
    }

    /// What all runs of all pods have used in the running window.
    fn used(&self) -> u64 {
        self.used.get(&self.clock.window()).copied().unwrap_or_default()
    }
}

/// The address of a pod behind the headless name.
fn address(pod: usize, port: u16) -> SocketAddr {
    (Ipv4Addr::new(127, 0, 0, u8::try_from(pod + 1).unwrap()), port).into()
}

fn bound(addr: SocketAddr) -> Option<UdpSocket> {
    UdpSocket::bind(addr).ok()
}

/// Looks that are late are not made up for: the clock of a busy machine goes slower.
fn looks() -> Interval {
    let mut looks = tokio::time::interval(Duration::from_millis(LOOK_MS));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks
}

#[tokio::test]
async fn a_newcomer_serves_with_its_peers_rights_and_has_its_share_of_the_next_window() {
    let (mut fleet, mut followers) = Fleet::named(2, 1).await;
    fleet.serve(0, 100).await;
    fleet.serve(1, 50).await;
    let newcomer = followers.pop().unwrap();
    fleet.list(&newcomer);
    fleet.start_ready(newcomer).await;
    fleet.serve(2, 100).await;
    assert!(!fleet.pods[2].has_share());
    fleet.spend_all().await;
    assert_eq!(fleet.used(), LIMIT);

    fleet.next_window().await;
    fleet.until_all_have_a_share().await;
    // Apart from the others it has a third of the limit, and they have the rest.
    fleet.cut(&[2]);
    assert_eq!(fleet.spend(&[2]).await, LIMIT / 3);
    assert_eq!(fleet.spend(&[0, 1]).await, LIMIT / 3 * 2);
}

#[tokio::test]
async fn a_dropped_cluster_says_no_goodbye() {
    let mut fleet = Fleet::listed(2).await;
    let id = fleet.pods[1].cluster.me();
    fleet.kill(1).await;
    fleet.until("its silence is noticed", || !fleet.pods[0].reaches(id)).await;
    let dead = fleet.pods[0].peers().into_iter().find(|peer| peer.id == id);
    assert_eq!(dead.expect("it still counts").gone, None);
}

#[tokio::test]
async fn what_requests_in_flight_refund_while_a_pod_drains_is_handed_over_too() {
    let mut fleet = Fleet::listed(2).await;
    let handle = fleet.pods[0].limiter.handle("model").unwrap();
    let permit = handle.try_acquire(Claim::tokens(200)).unwrap();
    fleet.pods[0].cluster.hand_over().await;
    let left = || fleet.pods[1].limiter.handle("model").unwrap().standings()[0].spendable;
    // The other one has touched nothing of this window yet.
    assert!(fleet.pods[1].limiter.handle("model").unwrap().try_acquire(Claim::tokens(1)).is_ok());
    fleet.until("all that is not in flight is handed over", || left() >= LIMIT - 201).await;
    permit.settle(50);
    fleet.until("the refund is handed over", || left() >= LIMIT - 51).await;
    drop(fleet.leave(0).await);
    assert_eq!(fleet.spend(&[0]).await, LIMIT - 50);
}

#[tokio::test]
async fn after_kill_9_a_new_process_in_the_slot_serves_at_once_and_the_fleet_loses_one_window() {
    let mut fleet = Fleet::listed(3).await;
    fleet.serve(2, 100).await;
    fleet.serve(0, 100).await;
    let slot = fleet.kill(2).await;
    // Two thirds of its share have died with it. The others do not notice.
    for _ in 0..5 {
        fleet.serve(0, 10).await;
        fleet.serve(1, 10).await;
    }
    fleet.start_ready(slot).await;
    fleet.serve(2, 50).await;
    fleet.spend_all().await;
    assert_eq!(fleet.used(), LIMIT - 200, "the dead run used 100 of its share of 300");
    for _ in 0..2 {
        fleet.next_window().await;
        fleet.until_all_have_a_share().await;
        fleet.spend_all().await;
        assert_eq!(fleet.used(), LIMIT);
    }
}

#[tokio::test]
async fn every_pod_killed_and_replaced_in_one_window_neither_starves_nor_goes_over() {
    let mut fleet = Fleet::listed(3).await;
    for alive_of_the_first in [2, 1, 0] {
        let slot = fleet.kill(0).await;
        fleet.start_ready(slot).await;
        if alive_of_the_first > 0 {
            // They have rights, and the newcomer gets some of them.
            fleet.serve(0, 20).await;
            fleet.serve(2, 20).await;
        }
    }
    fleet.spend_all().await;
    fleet.next_window().await;
    fleet.until_all_have_a_share().await;
    fleet.spend_all().await;
    assert_eq!(fleet.used(), LIMIT);
}

#[tokio::test]
async fn a_crash_without_a_proof_costs_its_own_share_until_it_is_forgotten() {
    let mut fleet = Fleet::listed(3).await;
    let dead = fleet.pods[2].cluster.me();
    let port = fleet.kill(2).await;
    fleet.next_window().await;
    fleet.spend_all().await;
    assert_eq!(fleet.used(), LIMIT / 3 * 2);
    fleet.pods[0].limiter.forget(&dead.to_string()).unwrap();
    fleet.until("the other has heard of it", || fleet.pods[1].peers().len() == 1).await;
    fleet.next_window().await;
    fleet.spend_all().await;
    assert_eq!(fleet.used(), LIMIT);
    drop(port);
}

#[tokio::test]
async fn a_rolling_replacement_in_the_same_slots_spends_every_window_to_the_full() {
    let mut fleet = Fleet::listed(3).await;
    // All three in one window, then one in each of three windows.
    for (windows, pods) in [(1, 3), (3, 1)] {
        for _ in 0..windows {
            for _ in 0..pods {
                for pod in 0..3 {
                    fleet.serve(pod, 20).await;
                }
                let slot = fleet.leave(0).await;
                fleet.serve(0, 20).await;
                fleet.serve(1, 20).await;
                fleet.start_ready(slot).await;
                fleet.serve(2, 20).await;
            }
            fleet.spend_all().await;
            assert_eq!(fleet.used(), LIMIT);
            fleet.next_window().await;
            fleet.until_all_have_a_share().await;
        }
    }
    fleet.spend_all().await;
    assert_eq!(fleet.used(), LIMIT);
}

#[tokio::test]
async fn a_rolling_replacement_at_new_addresses_spends_every_window_to_the_full() {
    let (mut fleet, followers) = Fleet::named(3, 3).await;
    for follower in followers {
        for pod in 0..3 {
            fleet.serve(pod, 20).await;
        }
        fleet.list(&follower);
        fleet.start_ready(follower).await;
        fleet.serve(3, 20).await;
        drop(fleet.leave(0).await);
        fleet.spend_all().await;
        assert_eq!(fleet.used(), LIMIT);
        fleet.next_window().await;
        fleet.until_all_have_a_share().await;
    }
    fleet.spend_all().await;
    assert_eq!(fleet.used(), LIMIT);
}

#[tokio::test]
async fn a_peer_with_another_limit_is_named_and_the_sum_stays_at_or_below_the_larger() {
    let sockets: Vec<_> = (0..3).map(|_| bound((Ipv4Addr::LOCALHOST, 0).into()).unwrap()).collect();
    let seeds = Seeds::Static(sockets.iter().map(|socket| socket.local_addr().unwrap()).collect());
    let mut fleet = Fleet::new(seeds);
    let (small, large) = (Quota::tokens(LIMIT / 3).per_minute(), Quota::tokens(LIMIT).per_minute());
    for (socket, quota) in sockets.into_iter().zip([small, large, large]) {
        fleet.start_with(socket, quota).await;
    }
    fleet.until_all_have_a_share().await;
    for pod in 0..3 {
        fleet.serve(pod, 10).await;
    }
    for (pod, others) in [(0, vec![(1, large), (2, large)]), (1, vec![(0, small)]), (2, vec![(0, small)])] {
        let expected = others.iter().map(|(other, quota)| (fleet.pods[*other].cluster.me(), *quota));
        let expected: BTreeSet<_> = expected.collect();
        fleet
            .until("the mismatch is named", || {
                let mismatches = fleet.pods[pod].limiter.status().limits.remove(0).mismatches;
                mismatches.iter().map(|other| (other.peer, other.theirs)).collect::<BTreeSet<_>>() == expected
            })
            .await;
    }
    // Each spends shares of its own version only.
    fleet.spend_all().await;
    assert_eq!(fleet.used(), LIMIT / 9 + LIMIT / 3 * 2);
    fleet.next_window().await;
    fleet.spend_all().await;
    assert!(fleet.used() <= LIMIT, "{}", fleet.used());
}

#[tokio::test]
async fn a_partition_costs_no_token_over_and_heals() {
    let mut fleet = Fleet::listed(4).await;
    let all: Vec<_> = fleet.pods.iter().map(|pod| pod.cluster.me()).collect();
    fleet.cut(&[0, 1]);
    fleet.until("both sides notice", || !fleet.pods[0].reaches(all[2]) && !fleet.pods[3].reaches(all[1])).await;
    // Each side has its half, whoever of it spends.
    assert_eq!(fleet.spend(&[0]).await, LIMIT / 2);
    fleet.serve(2, 100).await;
    fleet.cut(&[]);
    fleet.until_all_hear_one_another().await;
    assert_eq!(fleet.spend(&[1]).await, LIMIT / 2 - 100);

    // Through the start of a window, with one side idle before it heals.
    fleet.cut(&[0, 1, 2]);
    fleet.next_window().await;
    assert_eq!(fleet.spend(&[0, 1, 2]).await, LIMIT / 4 * 3);
    fleet.cut(&[]);
    fleet.until_all_hear_one_another().await;
    fleet.spend(&[0, 1, 2]).await;
    assert_eq!(fleet.used(), LIMIT);
    fleet.next_window().await;
    fleet.spend_all().await;
    assert_eq!(fleet.used(), LIMIT);
}
