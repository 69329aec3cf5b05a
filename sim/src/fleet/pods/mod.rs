//! The turmoil layer: whole production pods, each with its own runtime in virtual time.
//!
//! Knows how a pod's process is started, stopped and stepped: the real cluster loop, real
//! chitchat, sealed frames and fragments, as in production. Must not know faults, clients or
//! what a plan is meant to show: those are the world's, the same as on the event layer. The
//! invariant it keeps: everything a pod can observe is a function of the seed: time is
//! turmoil's, entropy the thread's stream (`entropy.rs`), datagrams the world's.
//!
//! A step is a millisecond: first the world does what falls into it, then every pod runs
//! until it waits for something, then the world carries what they sent.

mod http;
mod net;
mod observe;
mod tamper;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use quotum::cluster::{Cluster, ClusterConfig, KeyRing, Seeds};
use quotum::ledger::{Directory, ReplicaId};
use quotum::{Builder, Limiter};
use tokio::sync::mpsc;

use self::http::{Site, Web};
use self::net::{PodNet, Wire};
use super::directory::PORT;
use super::network::{Bytes, Datagram};
use super::replica::{Drive, EPOCH_MS};
use super::world::World;
use crate::Micros;
use crate::canary::Canary;
use crate::scenario::Plan;

/// All pods of a run, dead ones too.
pub(super) struct Pods {
    sim: turmoil::Sim<'static>,
    wire: Wire,
    /// What is around the pods' proxies, if they have one.
    web: Option<Web>,
    /// What the next process of each host is started with.
    hosts: BTreeMap<IpAddr, Rc<RefCell<Option<Start>>>>,
}

/// What a process is started with.
struct Start {
    limiter: Limiter,
    config: ClusterConfig,
    net: PodNet,
    /// What it serves callers with, if it does.
    site: Option<Site>,
    orders: mpsc::UnboundedReceiver<Order>,
    seen: Rc<Seen>,
}

/// What the platform tells a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// Begin to leave.
    HandOver,
    /// Leave and end.
    Leave,
}

/// One run of a pod's process, from outside.
#[derive(Debug)]
pub(super) struct Pod {
    orders: mpsc::UnboundedSender<Order>,
    seen: Rc<Seen>,
    told_to_leave: Cell<bool>,
}

/// What is seen of a process from outside.
#[derive(Debug, Default)]
struct Seen {
    /// Its id, once it has joined.
    me: Cell<Option<ReplicaId>>,
    /// Whether it has left in order.
    left: Cell<bool>,
    /// Why it could not join.
    failed: RefCell<Option<String>>,
    /// What it is part of, to be asked for its counts.
    cluster: RefCell<Option<Arc<Cluster>>>,
    /// How many of the plan's key rings it has been given.
    rings: Cell<usize>,
    /// Since when its failure detector does not run.
    unwell_since: Cell<Option<Micros>>,
}

impl Pod {
    /// Whether it takes requests: it knows who it is in the fleet.
    pub(super) fn is_running(&self) -> bool {
        self.seen.me.get().is_some()
    }

    pub(super) fn hand_over(&self) {
        // An error is a process that has ended.
        let _ = self.orders.send(Order::HandOver);
    }

    /// Tells it to go, once, and returns whether it has gone.
    pub(super) fn leave(&self) -> bool {
        if !self.told_to_leave.replace(true) {
            let _ = self.orders.send(Order::Leave);
        }
        self.seen.left.get()
    }
}

impl Pods {
    pub(super) fn new(plan: &Plan, canary: Option<Canary>) -> Self {
        let epoch = UNIX_EPOCH + Duration::from_millis(EPOCH_MS) + Duration::from_micros(plan.phase);
        let mut sim = turmoil::Builder::new()
            .epoch(epoch)
            .rng_seed(plan.seed)
            .tick_duration(Duration::from_micros(step_of(plan)))
            .simulation_duration(Duration::from_micros(plan.end) + Duration::from_secs(1))
            .min_message_latency(LATENCY.0)
            .max_message_latency(LATENCY.1)
            .tcp_capacity(TCP_CAPACITY)
            .build();
        let web = Web::new(plan, canary, &mut sim);
        Self { sim, wire: Wire::default(), web, hosts: BTreeMap::new() }
    }

    /// What limiters are built of, where the pods have a configuration.
    pub(super) fn configured(&self) -> Option<Builder> {
        self.web.as_ref().map(Web::builder)
    }

    /// Starts a process.
    pub(super) fn start(&mut self, replica: usize, limiter: Limiter, config: ClusterConfig) -> Pod {
        let ip = config.listen.ip();
        let (orders, received) = mpsc::unbounded_channel();
        let seen = Rc::new(Seen::default());
        let net = PodNet { wire: self.wire.clone(), ip, replica };
        let site = self.web.as_ref().map(Web::site);
        let start = Start { limiter, config, net, site, orders: received, seen: Rc::clone(&seen) };
        if let Some(next) = self.hosts.get(&ip) {
            *next.borrow_mut() = Some(start);
            self.sim.bounce(ip);
        } else {
            let next = Rc::new(RefCell::new(Some(start)));
            self.hosts.insert(ip, Rc::clone(&next));
            self.sim.host(ip, move || process(next.take()));
        }
        self.link_upstreams(ip);
        Pod { orders, seen, told_to_leave: Cell::new(false) }
    }

    /// Ends the process at an address, if one runs there, without its knowing.
    pub(super) fn stop(&mut self, addr: SocketAddr) {
        self.wire.set_stuck(addr, false);
        self.sim.crash(addr.ip());
    }

    /// A process's loop stands still, as if its socket took nothing, or goes on.
    pub(super) fn set_stuck(&mut self, addr: SocketAddr, stuck: bool) {
        self.wire.set_stuck(addr, stuck);
    }

    /// A datagram arrives.
    pub(super) fn deliver(&mut self, datagram: Datagram) {
        if let Bytes::Sealed(bytes) = datagram.bytes {
            self.wire.deliver(super::directory::address(datagram.from_slot), datagram.to, bytes);
        }
    }
}

impl fmt::Debug for Pods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pods").field("hosts", &self.hosts.len()).finish_non_exhaustive()
    }
}

/// A pod's process: `quotum serve` without its files and signals, and without its server where
/// nobody asks that.
async fn process(start: Option<Start>) -> turmoil::Result {
    let Some(Start { limiter, config, net, site, mut orders, seen }) = start else {
        return Ok(());
    };
    let cluster = match Cluster::join(&limiter, config, net).await {
        Ok(cluster) => Arc::new(cluster),
        Err(error) => {
            *seen.failed.borrow_mut() = Some(error.to_string());
            return Ok(());
        }
    };
    *seen.cluster.borrow_mut() = Some(Arc::clone(&cluster));
    let mut serving = None;
    if let Some(site) = site {
        match site.serve(&limiter, &cluster).await {
            Ok(served) => serving = Some(served),
            Err(why) => {
                *seen.failed.borrow_mut() = Some(why);
                return Ok(());
            }
        }
    }
    seen.me.set(Some(cluster.me()));
    while let Some(order) = orders.recv().await {
        match order {
            // Who serves hands over in its time.
            Order::HandOver if serving.is_some() => {}
            Order::HandOver => cluster.hand_over().await,
            Order::Leave => {
                if let Some(serving) = serving.take() {
                    serving.leave().await;
                    seen.left.set(true);
                    // Its sockets close when the process is taken down.
                    return std::future::pending().await;
                }
                cluster.leave().await;
                seen.left.set(true);
                return Ok(());
            }
        }
    }
    Ok(())
}

/// What a process at an address is configured with.
pub(super) fn config(plan: &Plan, slots: &[SocketAddr], addr: SocketAddr, keys: KeyRing) -> ClusterConfig {
    let settings = &plan.settings;
    let seeds = match settings.directory {
        Directory::Name => Seeds::Name { host: "fleet".into(), port: PORT },
        Directory::Static => Seeds::Static(slots.to_vec()),
        _ => Seeds::Alone,
    };
    let port = if plan.exclusive { addr.port() } else { 0 };
    ClusterConfig {
        cluster: super::CLUSTER.into(),
        node: super::lives::node(addr),
        listen: SocketAddr::new(addr.ip(), port),
        advertise: Some(addr),
        interval: plan.interval,
        keys,
        absent_for: settings.absent_for,
        on_silence: settings.on_silence,
        patience: settings.patience,
        first_window: settings.first_window,
        ..ClusterConfig::new(seeds)
    }
}

impl World {
    /// Carries the plan out to its end, or to a violation.
    pub(super) fn run_pods(&mut self) {
        let step = step_of(&self.plan);
        while self.at < self.plan.end && self.oracle.violation.is_none() {
            let until = self.at - self.at % step + step;
            while let Some((at, event)) = self.queue.pop_before(until) {
                self.at = at;
                self.step(event);
            }
            self.at = until;
            self.step_pods();
        }
    }

    fn step_pods(&mut self) {
        let alive: Vec<usize> = (0..self.replicas.len()).filter(|number| self.replicas[*number].is_alive()).collect();
        for replica in &alive {
            self.set_clock(*replica);
        }
        self.set_web_clock();
        let Some(pods) = &mut self.pods else { return };
        if let Err(error) = pods.sim.step() {
            self.oracle.violated(self.at, "nothing panics", || error.to_string());
        }
        let (sent, questions) = (pods.wire.take_sent(), pods.wire.take_questions());
        if let Some(length) = pods.wire.take_oversized() {
            self.oracle.violated(self.at, "a datagram fits", || format!("{length} bytes were to be sent"));
        }
        for sent in sent {
            let sent = self.tampered(sent);
            let Some(from_slot) = super::faults::slot_of(sent.from) else { continue };
            self.trace.note(&[14, from_slot as u64, self.at]);
            self.trace.note_bytes(&sent.bytes);
            let bytes = Bytes::Sealed(sent.bytes);
            self.put_on_the_wire(Datagram { to: sent.to, from_slot, bytes, repeated: false, delayed: false });
        }
        for question in questions {
            let replica = question.replica;
            let answer = self.directory_answer(replica).into_iter().map(|addr| addr.ip()).collect();
            // Whoever asked may be dead by now.
            let _ = question.answer.send(answer);
        }
        self.listen_to_callers();
        for replica in alive {
            self.serve_woken(replica);
            self.look_at(replica);
            self.leave_at_last(replica);
        }
    }

    /// Takes note of what a process has become.
    fn look_at(&mut self, replica: usize) {
        let Some(process) = &self.replicas[replica].process else { return };
        let Drive::Pod(pod) = &process.drive else { return };
        if let Some(why) = pod.seen.failed.take() {
            self.oracle.violated(self.at, "a pod joins", || format!("replica {replica}: {why}"));
            return;
        }
        let Some(id) = pod.seen.me.get().filter(|id| self.replicas[replica].id != *id) else { return };
        self.replicas[replica].id = id;
        self.by_id.insert(id, replica);
        self.trace.note(&[15, replica as u64, id.bits() as u64]);
        self.line(Some(replica), || format!("is {id}"));
    }
}

/// How long a segment of TCP is on its way.
const LATENCY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(3));

/// How many segments a connection holds, and how many connections a port that are not accepted.
const TCP_CAPACITY: usize = 256;

/// How long a step is: what tokio's timers can tell apart.
const STEP: Micros = 1_000;

/// The same for large fleets, where every host costs at every step.
const LONG_STEP: Micros = 5_000;

fn step_of(plan: &Plan) -> Micros {
    if plan.slots < 50 { STEP } else { LONG_STEP }
}
