//! Whole replicas over real loopback UDP: they find one another, hold one limit together,
//! share rights, leave, and are not impressed by what strangers send.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quotum::cluster::discovery::{Answer, Scripted, Unanswered};
use quotum::cluster::wire::{OLDEST_WIRE_VERSION, WIRE_VERSION};
use quotum::cluster::{
    Cluster, ClusterConfig, Datagrams, JoinError, KeyRing, Net, SeedError, Seeds, UdpDatagrams, UdpNet,
};
use quotum::ledger::{Directory, Gone};
use quotum::{Claim, Limiter, Policy, Quota};

const LIMIT: u64 = 900;

/// Far more than anything here takes: it bounds a failure, it asserts nothing.
const PATIENCE: Duration = Duration::from_secs(30);

/// Loopback, with a port that is bound before its number is told to anybody, and names that
/// resolve to what the test says.
#[derive(Debug)]
struct TestNet {
    socket: Mutex<Option<UdpSocket>>,
    names: Vec<IpAddr>,
    broken: Arc<AtomicBool>,
    sent: Sent,
}

/// How many frames of which wire version a pod has sent to which address.
type Sent = Arc<Mutex<BTreeMap<(SocketAddr, u8), usize>>>;

impl TestNet {
    fn new(socket: UdpSocket, names: Vec<IpAddr>) -> Self {
        Self { socket: Mutex::new(Some(socket)), names, broken: Arc::default(), sent: Sent::default() }
    }
}

/// A socket whose receiving side can be broken, and whose sending side is looked at.
#[derive(Debug)]
struct TestSocket {
    inner: UdpDatagrams,
    broken: Arc<AtomicBool>,
    sent: Sent,
}

impl Net for TestNet {
    type Socket = TestSocket;

    async fn bind(&self, _: SocketAddr) -> io::Result<TestSocket> {
        let socket = self.socket.lock().unwrap().take().ok_or(io::ErrorKind::AddrInUse)?;
        let inner = UdpDatagrams::from_std(socket)?;
        Ok(TestSocket { inner, broken: Arc::clone(&self.broken), sent: Arc::clone(&self.sent) })
    }

    async fn lookup(&self, _: &str) -> io::Result<Vec<IpAddr>> {
        Ok(self.names.clone())
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
        // Behind the magic number, which has three bytes.
        *self.sent.lock().unwrap().entry((to, datagram[3])).or_default() += 1;
        self.inner.send_to(datagram, to).await
    }

    async fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.inner.recv_from(buffer).await
    }

    fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.inner.try_recv_from(buffer)
    }
}

fn limiter() -> Limiter {
    // An hour, so that no window ends while a test runs; twice in a million runs one does.
    let policy = Policy { wait: Duration::from_millis(500), ..Policy::default() };
    let quotas = [Quota::tokens(LIMIT).per(Duration::from_secs(3_600)).at_once()];
    Limiter::builder().deployment_with("model", quotas, policy).build().unwrap()
}

fn bound(ip: impl Into<IpAddr>) -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((ip.into(), 0)).unwrap();
    let addr = socket.local_addr().unwrap();
    (socket, addr)
}

fn config(seeds: Seeds, listen: SocketAddr, node: usize) -> ClusterConfig {
    ClusterConfig {
        listen,
        node: format!("pod-{node}"),
        interval: Duration::from_millis(20),
        keys: KeyRing::of([7; 32]),
        ..ClusterConfig::new(seeds)
    }
}

/// Starts replicas that list one another.
async fn fleet(size: usize) -> Vec<(Limiter, Cluster)> {
    let sockets: Vec<_> = (0..size).map(|_| bound(Ipv4Addr::LOCALHOST)).collect();
    let addrs: Vec<_> = sockets.iter().map(|(_, addr)| *addr).collect();
    let mut fleet = Vec::new();
    for (node, (socket, addr)) in sockets.into_iter().enumerate() {
        let limiter = limiter();
        let config = config(Seeds::Static(addrs.clone()), addr, node);
        let cluster = Cluster::join(&limiter, config, TestNet::new(socket, Vec::new())).await.unwrap();
        fleet.push((limiter, cluster));
    }
    for (limiter, _) in &fleet {
        until("every replica has its share", || limiter.status().has_share).await;
    }
    fleet
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let mut looks = tokio::time::interval(Duration::from_millis(5));
    let met = async {
        while !condition() {
            looks.tick().await;
        }
    };
    within(what, met).await;
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(done) => done,
        Err(_) => panic!("it never came that {what}"),
    }
}

/// Takes permits of 10 until the replica refuses; returns how many tokens.
async fn spend_all(limiter: &Limiter) -> u64 {
    let handle = limiter.handle("model").unwrap();
    let mut spent = 0;
    while let Ok(mut permit) = within("a decision is reached", handle.acquire(Claim::tokens(10))).await {
        permit.start();
        permit.settle(10);
        spent += 10;
    }
    spent
}

#[tokio::test]
async fn two_replicas_hold_one_limit_and_one_can_spend_it_all() {
    let fleet = fleet(2).await;
    // The first has half of it, the rest comes from the second.
    assert_eq!(spend_all(&fleet[0].0).await, LIMIT);
    assert_eq!(spend_all(&fleet[1].0).await, 0);
}

#[tokio::test]
async fn three_replicas_at_once_never_go_over_and_leave_nothing() {
    let fleet = fleet(3).await;
    let (a, b, c) = tokio::join!(spend_all(&fleet[0].0), spend_all(&fleet[1].0), spend_all(&fleet[2].0));
    let mut spent = a + b + c;
    assert!(spent <= LIMIT, "{spent}");
    // Who was refused while rights were under way tries again.
    for (limiter, _) in &fleet {
        spent += spend_all(limiter).await;
    }
    assert!(spent <= LIMIT, "{spent}");
    assert!(spent >= LIMIT * 9 / 10, "{spent}");
}

#[tokio::test]
async fn a_headless_name_is_enough_to_find_one_another() {
    let (socket, first) = bound([127, 0, 0, 1]);
    let port = first.port();
    let mut sockets = vec![(socket, first)];
    for last in 2..=3 {
        // Another address of loopback: the port is free there unless the machine is very busy.
        let socket = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, last), port)).unwrap();
        let addr = socket.local_addr().unwrap();
        sockets.push((socket, addr));
    }
    let names: Vec<_> = sockets.iter().map(|(_, addr)| addr.ip()).collect();
    let mut fleet = Vec::new();
    for (node, (socket, addr)) in sockets.into_iter().enumerate() {
        let limiter = limiter();
        let config = config(Seeds::Name { host: "quotum-headless".into(), port }, addr, node);
        let cluster = Cluster::join(&limiter, config, TestNet::new(socket, names.clone())).await.unwrap();
        fleet.push((limiter, cluster));
    }
    for (limiter, _) in &fleet {
        until("every replica has its share", || limiter.status().has_share).await;
    }
    assert_eq!(spend_all(&fleet[2].0).await, LIMIT);
}

#[tokio::test]
async fn the_failure_detector_sees_every_other_replica() {
    let fleet = fleet(3).await;
    for (_, cluster) in &fleet {
        until("two others are seen alive", || cluster.stats().peers == 2).await;
        let stats = cluster.stats();
        assert!(stats.healthy && stats.frames_received > 0 && stats.bytes_sent > 0);
        assert_eq!(stats.membership_restarts, 0);
        let rejected: u64 = stats.frames_rejected.values().sum();
        assert_eq!(rejected, 0, "{:?}", stats.frames_rejected);
    }
}

#[tokio::test]
async fn pods_of_two_releases_hold_one_limit_and_nobody_is_sent_what_it_cannot_read() {
    let sockets: Vec<_> = (0..3).map(|_| bound(Ipv4Addr::LOCALHOST)).collect();
    let addrs: Vec<_> = sockets.iter().map(|(_, addr)| *addr).collect();
    let (mut fleet, mut sent) = (Vec::new(), Vec::new());
    for (node, (socket, addr)) in sockets.into_iter().enumerate() {
        let limiter = limiter();
        let wire = if node == 0 { OLDEST_WIRE_VERSION } else { WIRE_VERSION };
        let config = ClusterConfig { wire, ..config(Seeds::Static(addrs.clone()), addr, node) };
        let net = TestNet::new(socket, Vec::new());
        sent.push(Arc::clone(&net.sent));
        fleet.push((limiter.clone(), Cluster::join(&limiter, config, net).await.unwrap()));
    }
    for (limiter, _) in &fleet {
        until("every replica has its share", || limiter.status().has_share).await;
    }
    let frames = |from: usize, to: usize, version| {
        sent[from].lock().unwrap().get(&(addrs[to], version)).copied().unwrap_or_default()
    };
    for (from, to) in [(1, 2), (2, 1)] {
        until("they find out that both read the newest version", || frames(from, to, WIRE_VERSION) > 0).await;
    }
    // The one of the release before has its part of it all.
    let mut spent = spend_all(&fleet[0].0).await;
    assert!(spent > LIMIT / 3, "{spent}");
    for (limiter, _) in &fleet {
        spent += spend_all(limiter).await;
    }
    assert!(spent > LIMIT * 9 / 10 && spent <= LIMIT, "{spent}");
    for other in [1, 2] {
        let before = [frames(0, other, OLDEST_WIRE_VERSION), frames(other, 0, OLDEST_WIRE_VERSION)];
        until("both go on in the oldest version", || {
            frames(0, other, OLDEST_WIRE_VERSION) > before[0] + 8
                && frames(other, 0, OLDEST_WIRE_VERSION) > before[1] + 8
        })
        .await;
        assert_eq!([frames(0, other, WIRE_VERSION), frames(other, 0, WIRE_VERSION)], [0, 0]);
    }
    for (_, cluster) in &fleet {
        let rejected = cluster.stats().frames_rejected;
        assert!(rejected.values().all(|count| *count == 0), "{rejected:?}");
    }
}

#[tokio::test]
async fn a_pause_that_an_upstream_asked_of_one_is_kept_by_all() {
    let fleet = fleet(3).await;
    let paused = |replica: usize| fleet[replica].0.get("model").unwrap().paused_until();
    let end = fleet[1].0.now().plus(Duration::from_secs(300));
    fleet[1].0.get("model").unwrap().pause(end);
    until("both others keep it", || paused(0) == Some(end) && paused(2) == Some(end)).await;
    assert_eq!(fleet[0].0.own_pauses(), [], "what was heard is not said again");
}

#[tokio::test]
async fn a_leaving_replica_hands_its_rights_over() {
    let mut fleet = fleet(2).await;
    let (_left, cluster) = fleet.remove(0);
    within("it has left", cluster.leave()).await;
    within("it has left already", cluster.leave()).await;
    assert!(!cluster.stats().healthy);
    drop(cluster);
    assert_eq!(spend_all(&fleet[0].0).await, LIMIT);
}

#[tokio::test]
async fn a_dropped_cluster_stops_admitting_and_then_gives_the_port_up() {
    let mut fleet = fleet(2).await;
    let (limiter, cluster) = fleet.remove(0);
    let addr = cluster.local_addr();
    drop(cluster);
    until("the port is free", || UdpSocket::bind(addr).is_ok()).await;
    assert!(limiter.handle("model").unwrap().try_acquire(Claim::tokens(1)).is_err());
}

#[tokio::test]
async fn a_lost_socket_stops_admission_and_is_reported() {
    let (socket, addr) = bound(Ipv4Addr::LOCALHOST);
    let net = TestNet::new(socket, Vec::new());
    let broken = Arc::clone(&net.broken);
    let limiter = limiter();
    let cluster = Cluster::join(&limiter, config(Seeds::Static(vec![addr]), addr, 0), net).await.unwrap();
    until("it has its share", || limiter.status().has_share).await;
    assert!(limiter.handle("model").unwrap().try_acquire(Claim::tokens(1)).is_ok());
    broken.store(true, Ordering::Relaxed);
    // Nothing arrives, so nothing fails until the loop looks again: a stranger's datagram.
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    stranger.send_to(b"wake up", addr).unwrap();
    until("it stops admitting", || limiter.handle("model").unwrap().try_acquire(Claim::tokens(1)).is_err()).await;
    assert!(!cluster.stats().healthy);
}

#[tokio::test]
async fn strangers_are_counted_and_never_answered() {
    let mut fleet = fleet(2).await;
    let (_, cluster) = fleet.remove(0);
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    stranger.set_nonblocking(true).unwrap();
    stranger.send_to(b"hello", cluster.local_addr()).unwrap();
    stranger.send_to(&[0; 1_201], cluster.local_addr()).unwrap();
    // Sealed with another key, by a replica that lists ours.
    let (socket, addr) = bound(Ipv4Addr::LOCALHOST);
    let seeds = Seeds::Static(vec![cluster.advertise(), addr]);
    let config = ClusterConfig { keys: KeyRing::of([8; 32]), ..config(seeds.clone(), addr, 8) };
    let other = limiter();
    let wrong_key = Cluster::join(&other, config, TestNet::new(socket, Vec::new())).await.unwrap();
    // Sealed without one.
    let (socket, addr) = bound(Ipv4Addr::LOCALHOST);
    let seeds = Seeds::Static(vec![cluster.advertise(), addr]);
    let config = ClusterConfig { keys: KeyRing::unkeyed(), ..self::config(seeds, addr, 9) };
    let another = limiter();
    let unkeyed = Cluster::join(&another, config, TestNet::new(socket, Vec::new())).await.unwrap();

    let rejected = |reason: &str| cluster.stats().frames_rejected[reason];
    until("garbage is counted", || rejected("foreign") >= 1 && rejected("too_long") >= 1).await;
    until("another key is counted", || rejected("key") >= 1).await;
    until("no key is counted", || rejected("unsealed") >= 1).await;
    assert_eq!(stranger.recv_from(&mut [0; 64]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(wrong_key.stats().frames_received + unkeyed.stats().frames_received, 0);
    assert!(!other.status().has_share && !another.status().has_share);
}

/// What a pod tells the world, as somebody records it who is listed and has no key.
#[tokio::test]
async fn recordings_and_forgeries_are_counted_and_never_answered() {
    let (tap, tap_addr) = bound(Ipv4Addr::LOCALHOST);
    tap.set_nonblocking(true).unwrap();
    let (socket, addr) = bound(Ipv4Addr::LOCALHOST);
    let (other, other_addr) = bound(Ipv4Addr::LOCALHOST);
    let seeds = Seeds::Static(vec![addr, other_addr, tap_addr]);
    let mut fleet = Vec::new();
    for (node, (socket, addr)) in [(socket, addr), (other, other_addr)].into_iter().enumerate() {
        let limiter = limiter();
        let net = TestNet::new(socket, Vec::new());
        fleet.push(Cluster::join(&limiter, config(seeds.clone(), addr, node), net).await.unwrap());
    }
    let record = || {
        let mut recorded = vec![0; 1_200];
        let (length, from) = tap.recv_from(&mut recorded).ok()?;
        Some((recorded[..length].to_vec(), from))
    };
    let frame = Mutex::new(Vec::new());
    until("the tap hears the first pod", || {
        let found = std::iter::from_fn(record).find(|(_, from)| *from == addr);
        found.map(|(recorded, _)| *frame.lock().unwrap() = recorded).is_some()
    })
    .await;
    let frame = frame.into_inner().unwrap();
    // From an address that no list names, so that whatever came back would be an answer.
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    stranger.set_nonblocking(true).unwrap();
    stranger.send_to(&frame, addr).unwrap();
    for forge in [frame.len() - 1, 16, 50] {
        // The last byte is the seal's, the 17th the sender's, the 51st the time's.
        let mut forged = frame.clone();
        forged[forge] ^= 1;
        stranger.send_to(&forged, other_addr).unwrap();
    }
    stranger.send_to(&frame[..frame.len() / 2], other_addr).unwrap();
    let rejected = |pod: usize, reason: &str| fleet[pod].stats().frames_rejected[reason];
    until("the pod knows its own frame", || rejected(0, "own") == 1).await;
    until("forgeries and a torn frame are found", || rejected(1, "seal") + rejected(1, "truncated") == 4).await;
    // Both have sent for a while since then, and nothing of it to the stranger.
    let sent = |pod: usize| fleet[pod].stats().frames_sent;
    let before = [sent(0), sent(1)];
    until("both went on", || sent(0) > before[0] + 20 && sent(1) > before[1] + 20).await;
    assert_eq!(stranger.recv_from(&mut [0; 64]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn keys_are_changed_step_by_step_while_the_fleet_runs() {
    let fleet = fleet(3).await;
    let key = |byte: u8| format!("{byte:02x}").repeat(32);
    let (old, new) = (key(7), key(9));
    // Each pod takes each step on its own, in another order.
    for (step, ring) in [format!("{old}\n{new}"), format!("{new}\n{old}"), new.clone()].into_iter().enumerate() {
        for pod in 0..3 {
            let (_, cluster) = &fleet[(pod + step) % 3];
            cluster.rekey(KeyRing::parse(&ring).unwrap()).unwrap();
            let received: Vec<u64> = fleet.iter().map(|(_, cluster)| cluster.stats().frames_received).collect();
            until("everybody still hears the others", || {
                fleet.iter().zip(&received).all(|((_, cluster), before)| cluster.stats().frames_received > before + 8)
            })
            .await;
        }
    }
    for (limiter, cluster) in &fleet {
        let rejected = cluster.stats().frames_rejected;
        assert_eq!((rejected["key"], rejected["seal"], rejected["unsealed"]), (0, 0, 0));
        assert!(limiter.status().peers.iter().all(|peer| peer.reachable));
    }
    // The old key opens nothing any more.
    let (socket, addr) = bound(Ipv4Addr::LOCALHOST);
    let seeds = Seeds::Static(vec![addr, fleet[0].1.advertise()]);
    let outsider = Cluster::join(&limiter(), config(seeds, addr, 9), TestNet::new(socket, Vec::new())).await.unwrap();
    until("the old key is refused", || fleet[0].1.stats().frames_rejected["key"] > 0).await;
    assert!(outsider.rekey(KeyRing::unkeyed()).is_err(), "nobody is left without a key by mistake");
}

#[tokio::test]
async fn a_directory_of_ones_own_lists_fails_and_proves() {
    let sockets = [bound(Ipv4Addr::LOCALHOST), bound(Ipv4Addr::LOCALHOST)];
    let addrs: Vec<_> = sockets.iter().map(|(_, addr)| *addr).collect();
    let mut fleet = Vec::new();
    for (node, (socket, addr)) in sockets.into_iter().enumerate() {
        let script = Arc::new(Scripted::new(Directory::Name));
        let error = Unanswered { why: "the platform is away".into(), resolve: "call it".into() };
        script.say(Err(error));
        let limiter = limiter();
        let config = config(Seeds::By(script.clone()), addr, node);
        let cluster = Cluster::join(&limiter, config, TestNet::new(socket, Vec::new())).await.unwrap();
        fleet.push((limiter, cluster, script));
    }
    for (limiter, _, script) in &fleet {
        let away = || {
            let blocked = limiter.status().blocked;
            blocked.iter().any(|blocked| blocked.why == "the platform is away" && blocked.resolve == "call it")
        };
        until("the error is shown with what resolves it", away).await;
        script.then(Duration::from_millis(1), Ok(Answer::listing(addrs.clone())));
    }
    for (limiter, _, script) in &fleet {
        until("every replica has its share", || limiter.status().has_share).await;
        assert_eq!(limiter.status().blocked, []);
        assert_eq!(script.left(), 0);
    }
    let (_, dead, _) = fleet.pop().unwrap();
    let (limiter, _, script) = &fleet[0];
    assert!(limiter.status().peers.iter().all(|peer| peer.gone.is_none()));
    script.say(Ok(Answer::gone([Gone::Replica(dead.me())])));
    until("the proof is believed", || limiter.status().peers.iter().all(|peer| peer.gone.is_some())).await;
}

#[tokio::test]
async fn alone_a_replica_has_everything_at_once() {
    let limiter = limiter();
    let config = ClusterConfig { listen: ([127, 0, 0, 1], 0).into(), ..ClusterConfig::new(Seeds::Alone) };
    let cluster = Cluster::join(&limiter, config, UdpNet).await.unwrap();
    assert_eq!(cluster.advertise(), cluster.local_addr());
    assert_eq!(spend_all(&limiter).await, LIMIT);
    within("it has left", cluster.leave()).await;
}

#[tokio::test]
async fn what_cannot_be_safe_is_refused_before_anything_runs() {
    let limiter = limiter();
    let refused = async |config: ClusterConfig| Cluster::join(&limiter, config, UdpNet).await.unwrap_err();
    let loopback = |seeds| ClusterConfig { listen: ([127, 0, 0, 1], 0).into(), ..ClusterConfig::new(seeds) };

    let open = ClusterConfig::new(Seeds::Alone);
    assert!(matches!(refused(open).await, JoinError::Unkeyed { .. }));
    let advertised = ClusterConfig { advertise: Some("10.0.0.1:1".parse().unwrap()), ..loopback(Seeds::Alone) };
    assert!(matches!(refused(advertised).await, JoinError::Unkeyed { .. }));
    let any_port = loopback(Seeds::Static(vec![([127, 0, 0, 1], 1).into()]));
    assert!(matches!(refused(any_port).await, JoinError::Seeds(SeedError::ListenPort)));
    let (socket, addr) = bound(Ipv4Addr::LOCALHOST);
    let taken = ClusterConfig { listen: addr, ..loopback(Seeds::Static(vec![addr])) };
    assert!(matches!(refused(taken.clone()).await, JoinError::Bind { .. }));
    let unlisted = ClusterConfig { seeds: Seeds::Static(vec![([127, 0, 0, 1], 1).into()]), ..taken };
    let net = TestNet::new(socket, Vec::new());
    let error = Cluster::join(&limiter, unlisted, net).await.unwrap_err();
    assert!(matches!(error, JoinError::Seeds(SeedError::NotListed { .. })));
    let nameless = ClusterConfig { node: String::new(), ..loopback(Seeds::Alone) };
    assert!(matches!(refused(nameless).await, JoinError::Node));
    let next = ClusterConfig { wire: WIRE_VERSION + 1, ..loopback(Seeds::Alone) };
    assert!(matches!(refused(next).await, JoinError::Wire(_)));
    // After all that it is still a limiter that is alone.
    assert_eq!(spend_all(&limiter).await, LIMIT);
}
