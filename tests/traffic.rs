//! What a fleet sends: datagrams of a bounded size, and everything once more by chitchat.
//!
//! Whole replicas on a network in memory, in virtual time. A sleep here is the fleet's
//! time, which passes as soon as nobody has anything to do.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quotum::cluster::fragment::{self, Kind};
use quotum::cluster::frame::{Frames, KeyRing, MAX_DATAGRAM};
use quotum::cluster::{Cluster, ClusterConfig, Datagrams, Net, Seeds};
use quotum::ledger::{ReplicaId, Timestamp};
use quotum::{Claim, Clock, Limiter, Quota};
use tokio::sync::mpsc;
use tokio::time::Instant;

const KEY: [u8; 32] = [9; 32];

/// Two seconds into a minute.
const START_MS: u64 = 29_000_000 * 60_000 + 2_000;

#[derive(Clone, Copy)]
struct Virtual(Instant);

impl Clock for Virtual {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_ms(START_MS + self.0.elapsed().as_millis() as u64)
    }
}

type Arrival = (Vec<u8>, SocketAddr);

#[derive(Default)]
struct Wires {
    bound: HashMap<SocketAddr, mpsc::UnboundedSender<Arrival>>,
    /// The length of every datagram, and whether it was a part of chitchat's messages.
    sent: Vec<(usize, bool)>,
    /// Whether the network loses everything but chitchat's messages.
    only_chitchat: bool,
}

#[derive(Clone)]
struct MemoryNet {
    wires: Arc<Mutex<Wires>>,
    clock: Virtual,
}

struct MemorySocket {
    own: SocketAddr,
    wires: Arc<Mutex<Wires>>,
    arrivals: Mutex<mpsc::UnboundedReceiver<Arrival>>,
    /// A stranger of the cluster: what is for whoever is there it can read, and chitchat's is.
    stranger: Frames,
    clock: Virtual,
}

impl Net for MemoryNet {
    type Socket = MemorySocket;

    async fn bind(&self, own: SocketAddr) -> io::Result<MemorySocket> {
        let (sender, arrivals) = mpsc::unbounded_channel();
        self.wires.lock().unwrap().bound.insert(own, sender);
        let stranger = Frames::new(KeyRing::of(KEY), "quotum", ReplicaId::from_bits(1));
        let wires = Arc::clone(&self.wires);
        Ok(MemorySocket { own, wires, arrivals: Mutex::new(arrivals), stranger, clock: self.clock })
    }

    async fn lookup(&self, _: &str) -> io::Result<Vec<IpAddr>> {
        Err(io::ErrorKind::NotFound.into())
    }

    async fn local_ip_towards(&self, _: SocketAddr) -> io::Result<IpAddr> {
        Err(io::ErrorKind::NotFound.into())
    }
}

impl Datagrams for MemorySocket {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.own)
    }

    async fn send_to(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        let mut copy = datagram.to_vec();
        let opened = self.stranger.open(&mut copy, self.clock.now());
        let chitchats = opened.is_ok_and(|opened| fragment::kind(opened.payload) == Some(Kind::Chitchat));
        let mut wires = self.wires.lock().unwrap();
        wires.sent.push((datagram.len(), chitchats));
        if chitchats || !wires.only_chitchat {
            // Nobody there is as if it were lost.
            let _ = wires.bound.get(&to).map(|bound| bound.send((datagram.to_vec(), self.own)));
        }
        Ok(())
    }

    async fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let arrival = poll_fn(|cx| self.arrivals.lock().unwrap().poll_recv(cx)).await;
        copy(arrival, buffer)
    }

    fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        copy(self.arrivals.lock().unwrap().try_recv().ok(), buffer)
    }
}

fn copy(arrival: Option<Arrival>, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    let (datagram, from) = arrival.ok_or(io::ErrorKind::WouldBlock)?;
    let length = datagram.len().min(buffer.len());
    buffer[..length].copy_from_slice(&datagram[..length]);
    Ok((length, from))
}

struct Fleet {
    net: MemoryNet,
    pods: Vec<(Limiter, Cluster)>,
    accounts: usize,
}

impl Fleet {
    /// Returns a fleet in which everybody has its share.
    async fn start(pods: u8, accounts: usize) -> Self {
        let clock = Virtual(Instant::now());
        let net = MemoryNet { wires: Arc::default(), clock };
        let addrs: Vec<SocketAddr> = (1..=pods).map(|pod| ([10, 0, 0, pod], 7946).into()).collect();
        let mut fleet = Self { net: net.clone(), pods: Vec::new(), accounts };
        for (number, addr) in addrs.iter().enumerate() {
            let quota = Quota::tokens(1_000_000).per_minute();
            let builder = Limiter::builder().clock(clock).seed(number as u64);
            let names = (0..accounts).map(|account| account.to_string());
            let limiter = names.fold(builder, |builder, name| builder.deployment(name, [quota])).build().unwrap();
            let config = ClusterConfig {
                node: format!("pod-{number}"),
                listen: *addr,
                keys: KeyRing::of(KEY),
                ..ClusterConfig::new(Seeds::Static(addrs.clone()))
            };
            let cluster = Cluster::join(&limiter, config, net.clone()).await.unwrap();
            fleet.pods.push((limiter, cluster));
        }
        for _ in 0..100 {
            if fleet.pods.iter().all(|(limiter, _)| limiter.status().has_share) {
                return fleet;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("the fleet does not join");
    }

    /// Every pod uses so much of every account.
    fn load(&self, tokens: u64) {
        for (limiter, _) in &self.pods {
            for account in 0..self.accounts {
                let handle = limiter.handle(&account.to_string()).unwrap();
                handle.try_acquire(Claim::tokens(tokens)).unwrap().settle(tokens);
            }
        }
    }

    /// Returns how many of its accounts the pod knows to have been used by all pods to `used`.
    fn knows(&self, pod: usize, used: u64) -> usize {
        let status = self.pods[pod].0.status();
        status.limits.iter().filter(|limit| limit.quotas[0].0.used == used).count()
    }
}

#[tokio::test(start_paused = true)]
async fn no_datagram_is_ever_larger_than_1200_bytes() {
    let fleet = Fleet::start(8, 120).await;
    for _ in 0..10 {
        fleet.load(10);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let sent = std::mem::take(&mut fleet.net.wires.lock().unwrap().sent);
    let largest = |chitchats: bool| sent.iter().filter(|sent| sent.1 == chitchats).map(|sent| sent.0).max();
    // Both kinds were cut to fit, so neither was small by chance.
    assert_eq!(largest(true), Some(MAX_DATAGRAM));
    assert!((MAX_DATAGRAM - 80..=MAX_DATAGRAM).contains(&largest(false).unwrap()), "{:?}", largest(false));
    assert_eq!(MAX_DATAGRAM, 1_200);
    let counted: u64 = fleet.pods.iter().map(|(_, cluster)| cluster.stats().frames_sent).sum();
    let chitchats: u64 = fleet.pods.iter().map(|(_, cluster)| cluster.stats().chitchat_bytes_sent).sum();
    assert_eq!(counted, sent.len() as u64);
    assert_eq!(chitchats, sent.iter().filter(|sent| sent.1).map(|sent| sent.0 as u64).sum::<u64>());
}

/// 1,200 rows are more than the values of a replica hold, so they have to take turns.
#[tokio::test(start_paused = true)]
async fn what_no_datagram_of_ours_delivers_comes_by_chitchat_all_of_it() {
    let fleet = Fleet::start(2, 1_200).await;
    fleet.net.wires.lock().unwrap().only_chitchat = true;
    fleet.load(7);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(fleet.knows(0, 14), 0, "something else gets through");
    // 94 kB of text at 100 kB/s, and as many rounds as the fullest value takes turns.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!([fleet.knows(0, 14), fleet.knows(1, 14)], [1_200, 1_200]);
}
