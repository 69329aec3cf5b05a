//! Pods find one another and share rights over UDP.
//!
//! Knows the order in which a pod joins, and its configuration. Must not know how a
//! decision is reached: the ledger says what to send and when to come back, and one task
//! does it. The invariant it keeps: the port is bound before the ledger is given its
//! identity, and the limiter has stopped admitting before the port is given up, so that a
//! later process at the port proves that this one spends no more.
//!
//! [`wire`], [`frame`], [`fragment`], [`inbox`] and [`outbox`] are pure: no socket, no
//! clock, no randomness of their own. The simulator drives a ledger with them alone.

pub(crate) mod complaints;
pub mod discovery;
mod events;
pub mod fragment;
pub mod frame;
pub mod inbox;
mod lasting;
mod membership;
pub mod outbox;
mod run;
mod shards;
pub mod socket;
mod text;
pub mod wire;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

pub use self::discovery::{Discovery, Fallback, SeedError, Seeds};
pub use self::frame::{KeyFileError, KeyRing, Rejected};
pub use self::socket::{Datagrams, Net, UdpDatagrams, UdpNet};

use self::discovery::Asking;
use self::frame::Frames;
use self::inbox::Inbox;
use self::membership::{Identity, Membership};
use self::outbox::Outbox;
use self::run::{Command, Run};
use self::wire::{OLDEST_WIRE_VERSION, WIRE_VERSION};
use crate::ledger::{Directory, FirstWindow, JoinedBefore, OnSilence, ReplicaId, RosterSettings, Slot};
use crate::limiter::Limiter;

/// How a pod takes part in a fleet. [`ClusterConfig::new`] has a default for everything
/// but the seeds.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// The fleet's name, the same on every pod: frames of another one are dropped.
    /// Default `"quotum"`.
    pub cluster: String,
    /// The name of this pod, unique in the fleet and at most 128 bytes. Default: the
    /// machine's host name.
    pub node: String,
    /// The address to bind. Default `[::]:7946`, which takes IPv4 too. Port 0 is any free
    /// one, which no static list can name; a pod on it cannot prove that an earlier one at
    /// its address is dead.
    pub listen: SocketAddr,
    /// The address that peers send to. Default: the bound one, or where that is none in
    /// particular the local address of a socket connected to the first seed. Port 0 stands
    /// for the bound port.
    pub advertise: Option<SocketAddr>,
    /// Where the other pods are listed.
    pub seeds: Seeds,
    /// How often news is sent, from 10 ms to 10 s. Default 100 ms.
    pub interval: Duration,
    /// The keys of the fleet. Default: none, which takes loopback addresses only.
    pub keys: KeyRing,
    /// Whether to go without a key beyond loopback: whoever reaches the port can then lie
    /// about what was spent. Default `false`.
    pub insecure: bool,
    /// How long a pod must be missing from the headless name to be proven dead. Default 5 min.
    pub absent_for: Duration,
    /// What a newcomer does about a listed pod that never answers. Default
    /// [`OnSilence::FairShare`].
    pub on_silence: OnSilence,
    /// How long a newcomer waits for it. Default 30 s.
    pub patience: Duration,
    /// What the first pod takes of the window that runs when it starts. Default
    /// [`FirstWindow::Admit`].
    pub first_window: FirstWindow,
    /// The newest wire version that this pod reads, writes and says it reads, from
    /// [`OLDEST_WIRE_VERSION`] to [`WIRE_VERSION`]. Default: the latter. Below it a pod is to its
    /// fleet what one of the release before is, which is for tests of a rolling update: pods
    /// find out for themselves what to write to whom.
    pub wire: u8,
}

impl ClusterConfig {
    /// Returns the defaults with these seeds.
    pub fn new(seeds: Seeds) -> Self {
        let roster = RosterSettings::default();
        Self {
            cluster: "quotum".into(),
            node: hostname(),
            listen: SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), DEFAULT_PORT),
            advertise: None,
            seeds,
            interval: Duration::from_millis(100),
            keys: KeyRing::unkeyed(),
            insecure: false,
            absent_for: roster.absent_for,
            on_silence: roster.on_silence,
            patience: roster.patience,
            first_window: roster.first_window,
            wire: WIRE_VERSION,
        }
    }

    /// Looks at everything that can be judged before a port is bound.
    ///
    /// # Errors
    /// As [`Cluster::join`]; nothing was started.
    pub fn check(&self) -> Result<(), JoinError> {
        if self.node.is_empty() || self.node.len() > Slot::MAX_NODE {
            return Err(JoinError::Node);
        }
        if !(MIN_INTERVAL..=MAX_INTERVAL).contains(&self.interval) {
            return Err(JoinError::Interval(self.interval));
        }
        if !(OLDEST_WIRE_VERSION..=WIRE_VERSION).contains(&self.wire) {
            return Err(JoinError::Wire(self.wire));
        }
        if matches!(self.seeds, Seeds::Static(_)) && self.listen.port() == 0 {
            return Err(SeedError::ListenPort.into());
        }
        self.check_exposure(self.listen)
    }

    fn check_exposure(&self, addr: SocketAddr) -> Result<(), JoinError> {
        if self.keys.is_keyed() || self.insecure || addr.ip().to_canonical().is_loopback() {
            return Ok(());
        }
        Err(JoinError::Unkeyed { addr })
    }

    fn roster(&self, directory: Directory) -> RosterSettings {
        RosterSettings {
            directory,
            absent_for: self.absent_for,
            on_silence: self.on_silence,
            patience: self.patience,
            first_window: self.first_window,
        }
    }
}

/// Why a pod could not join. Nothing runs and the limiter is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The pod's name cannot be used; whoever configured it can mend it.
    #[error("the node's name must have 1 to 128 bytes; set node.name")]
    Node,
    /// The interval is out of range; whoever configured it can mend it.
    #[error("the gossip interval {0:?} is not between 10 ms and 10 s; the default is 100ms")]
    Interval(Duration),
    /// The wire version is none of this release's; whoever configured it can mend it.
    #[error("wire version {0} is not between {OLDEST_WIRE_VERSION} and {WIRE_VERSION}, which this release reads")]
    Wire(u8),
    /// The seeds are wrong; whoever configured them can mend them.
    #[error(transparent)]
    Seeds(#[from] SeedError),
    /// There is no key and the address can be reached from other machines.
    #[error(
        "gossip on {addr} without a key would let anybody who reaches it lie about what was spent; \
        set gossip.key_file, or listen on 127.0.0.1, or set gossip.insecure: true"
    )]
    Unkeyed {
        /// The address, bound or advertised.
        addr: SocketAddr,
    },
    /// The port could not be bound: mostly another process has it.
    #[error("cannot bind UDP {addr} for gossip; is another process there? set gossip.listen")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// The address that peers reach this pod at could not be found out.
    #[error("cannot find out the address that peers reach this pod at from {seeds}; set gossip.advertise")]
    Advertise {
        /// Where it was looked for.
        seeds: Seeds,
        /// What the operating system said.
        source: io::Error,
    },
    /// The advertised address is none in particular.
    #[error("{0} is no address that peers can send to; set gossip.advertise to this pod's own")]
    Unspecified(SocketAddr),
    /// The limiter has joined a fleet before; whoever wrote the program can mend it.
    #[error(transparent)]
    JoinedBefore(#[from] JoinedBefore),
    /// The operating system gave no randomness, without which ids and nonces repeat.
    #[error("the operating system gives no randomness: {0}")]
    Randomness(getrandom::Error),
}

/// Why the keys stayed as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RekeyError {
    /// The new ring has no key.
    #[error("a cluster that has a key is not left without one while it runs; restart the pods for that")]
    Unkeyed,
}

/// A pod's part in a fleet: the task that gossips for its [`Limiter`].
///
/// Dropping it ends the task at once: the limiter admits nothing more, and what it held is
/// out of reach until its windows end. [`Cluster::leave`] hands it over first.
pub struct Cluster {
    me: ReplicaId,
    local_addr: SocketAddr,
    advertise: SocketAddr,
    discovery: Arc<dyn Discovery>,
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    keys: watch::Sender<KeyRing>,
    task: JoinHandle<()>,
}

impl Cluster {
    /// Joins the fleet: binds the port, gives the limiter its identity and starts to gossip.
    ///
    /// Returns as soon as the port is bound; the limiter refuses until the others have
    /// answered or sent it rights. With a headless name that does not resolve yet, and no
    /// address to advertise, it waits up to 30 s for it.
    ///
    /// A limiter joins once, and before it serves: until then it has the whole limit, and what
    /// it admits of that in the running window is beside what the fleet admits. To join again,
    /// after [`Cluster::leave`] or when the task has ended, build another limiter.
    ///
    /// # Errors
    /// See [`JoinError`]; nothing runs and the limiter is as it was.
    ///
    /// # Cancel safety
    /// Dropped before it is ready, nothing runs.
    ///
    /// # Panics
    /// Outside a tokio runtime with time and I/O.
    pub async fn join<N: Net>(limiter: &Limiter, config: ClusterConfig, net: N) -> Result<Self, JoinError> {
        config.check()?;
        let net = Arc::new(net);
        let bind = |source| JoinError::Bind { addr: config.listen, source };
        let socket = net.bind(config.listen).await.map_err(bind)?;
        let local_addr = socket.local_addr().map_err(bind)?;
        let discovery = config.seeds.discovery(&net);
        let advertise = advertise(&*net, &*discovery, &config, local_addr).await?;

        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(JoinError::Randomness)?;
        let me = ReplicaId::new(limiter.now(), u128::from_ne_bytes(random));
        let slot = Slot { node: config.node.as_str().into(), addr: advertise, exclusive: config.listen.port() != 0 };
        limiter.attach(me, slot.clone(), config.roster(discovery.directory()), config.interval)?;

        let frames = Frames::new(config.keys.clone(), &config.cluster, me).up_to(config.wire);
        let identity = Identity { cluster: config.cluster.clone(), me, slot, wire: config.wire };
        let shared = Arc::new(Shared::default());
        let (commands, received) = mpsc::channel(COMMANDS);
        let (keys, changed) = watch::channel(config.keys);
        let run = Run::<N>::new(run::Parts {
            limiter: limiter.clone(),
            interval: config.interval,
            outbox: Outbox::new(me, config.wire),
            advertise,
            socket,
            inbox: Inbox::new(frames.clone()),
            frames,
            membership: Membership::start(identity, config.interval).await,
            asking: Asking::new(Arc::clone(&discovery)),
            commands: received,
            keys: changed,
            shared: Arc::clone(&shared),
        });
        let task = tokio::spawn(run.run());
        Ok(Self { me, local_addr, advertise, discovery, shared, commands, keys, task })
    }

    /// Seals and opens with these keys from now on. Nothing is lost if every pod opens with a
    /// key before any pod seals with it: see [`KeyRing::parse`].
    ///
    /// # Errors
    /// If the ring has no key and the one in force does: nothing changed.
    pub fn rekey(&self, keys: KeyRing) -> Result<(), RekeyError> {
        if self.keys.borrow().is_keyed() && !keys.is_keyed() {
            return Err(RekeyError::Unkeyed);
        }
        // A file that is read again mostly says what it said before: that is no news.
        self.keys.send_if_modified(|known| {
            let is_new = !known.is_same(&keys);
            *known = keys;
            is_new
        });
        Ok(())
    }

    /// Begins to leave: the limiter admits nothing more, and hands its rights over at every
    /// tick, also those that requests still in flight refund, until [`Cluster::leave`] ends it.
    ///
    /// # Cancel safety
    /// Dropped before it is ready, it may not have begun.
    pub async fn hand_over(&self) {
        // An error is the end of the task: nothing is admitted any more.
        let _ = self.commands.send(Command::HandOver).await;
    }

    /// Leaves the fleet: the limiter admits nothing more, hands its rights over and says
    /// goodbye. Returns when nothing is left to hand over and every peer that answers has
    /// heard the goodbye. Then the port is closed.
    ///
    /// It does not know of requests in flight: what they refund afterwards is out of reach
    /// until their window ends. With such requests call [`Cluster::hand_over`], wait for
    /// them, and then call this, with a timeout around it: peers may not answer.
    ///
    /// # Cancel safety
    /// Dropped before it is ready, the leaving goes on until the [`Cluster`] is dropped, and
    /// calling it again waits for the same end.
    pub async fn leave(&self) {
        let (done, left) = oneshot::channel();
        if self.commands.send(Command::Leave(done)).await.is_ok() {
            // An error is the end of the task: there is nothing left to wait for.
            let _ = left.await;
        }
    }

    /// Returns this run's id.
    pub fn me(&self) -> ReplicaId {
        self.me
    }

    /// Returns the bound address.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Returns the address that peers send to.
    pub fn advertise(&self) -> SocketAddr {
        self.advertise
    }

    /// Returns since when and why the pods are looked for in a lesser way than configured, if they
    /// are now: the headless name alone, because the platform's API does not answer.
    pub fn fallback(&self) -> Option<Fallback> {
        self.discovery.fallback()
    }

    /// Returns what was sent, received and thrown away so far.
    pub fn stats(&self) -> ClusterStats {
        let mut stats = self.shared.with(|stats| stats.clone());
        stats.healthy &= !self.task.is_finished();
        stats
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("me", &self.me)
            .field("local_addr", &self.local_addr)
            .field("advertise", &self.advertise)
            .finish_non_exhaustive()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What the gossip of one pod has done so far. Counts never fall.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClusterStats {
    /// Datagrams thrown away, by reason; every reason is there.
    pub frames_rejected: BTreeMap<&'static str, u64>,
    /// Datagrams sent.
    pub frames_sent: u64,
    /// Datagrams that the operating system would not send, or that had no nonce.
    pub frames_unsent: u64,
    /// Datagrams received whose seal was good.
    pub frames_received: u64,
    /// Bytes of the datagrams sent, without IP and UDP headers.
    pub bytes_sent: u64,
    /// Bytes of the datagrams received whose seal was good.
    pub bytes_received: u64,
    /// How many of `frames_sent` carried messages of chitchat's, or parts of them.
    pub chitchat_frames_sent: u64,
    /// How many of `bytes_sent` did.
    pub chitchat_bytes_sent: u64,
    /// How many of `frames_received` did.
    pub chitchat_frames_received: u64,
    /// How many of `bytes_received` did.
    pub chitchat_bytes_received: u64,
    /// Messages that could not be sent: too large, or for a replica whose address is not known.
    pub messages_unsent: u64,
    /// Times that the failure detector was started again.
    pub membership_restarts: u64,
    /// Other replicas that the failure detector takes for alive. Shown, never counted with.
    pub peers: usize,
    /// Whether the socket works and the failure detector runs.
    pub healthy: bool,
}

/// What the task and the handle share.
#[derive(Debug)]
pub(crate) struct Shared {
    stats: Mutex<ClusterStats>,
}

impl Shared {
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut ClusterStats) -> R) -> R {
        // Counters are whole after every single change, so a panic elsewhere spoils nothing.
        f(&mut self.stats.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Default for Shared {
    fn default() -> Self {
        let frames_rejected = Rejected::ALL.iter().map(|rejected| (rejected.reason(), 0)).collect();
        let stats = ClusterStats { frames_rejected, healthy: true, ..ClusterStats::default() };
        Self { stats: Mutex::new(stats) }
    }
}

/// Finds the address that peers send to, and judges it.
async fn advertise<N: Net>(
    net: &N,
    discovery: &dyn Discovery,
    config: &ClusterConfig,
    bound: SocketAddr,
) -> Result<SocketAddr, JoinError> {
    let addr = match config.advertise {
        Some(addr) if addr.port() == 0 => SocketAddr::new(addr.ip(), bound.port()),
        Some(addr) => addr,
        None => found(net, discovery, config, bound).await?,
    };
    let addr = socket::canonical(addr);
    if addr.ip().is_unspecified() {
        return Err(JoinError::Unspecified(addr));
    }
    config.check_exposure(addr)?;
    match &config.seeds {
        Seeds::Static(addrs) if !addrs.contains(&addr) => Err(SeedError::NotListed { advertise: addr }.into()),
        _ => Ok(addr),
    }
}

/// A headless name has no address until its first pod is known to the platform, which takes
/// seconds after that pod has started: so it is asked for again, for a while.
async fn found<N: Net>(
    net: &N,
    discovery: &dyn Discovery,
    config: &ClusterConfig,
    bound: SocketAddr,
) -> Result<SocketAddr, JoinError> {
    let mut tries = 1;
    loop {
        match discovery::advertised(net, discovery, bound).await {
            Ok(addr) => return Ok(addr),
            Err(_) if tries < ADVERTISE_TRIES && discovery.directory() == Directory::Name => {
                tries += 1;
                tokio::time::sleep(discovery::LOOKUP_EVERY_JOINING).await;
            }
            Err(source) => return Err(JoinError::Advertise { seeds: config.seeds.clone(), source }),
        }
    }
}

/// The name of the machine, as Linux tells it without a system call of libc; elsewhere it
/// must be configured to be useful.
fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "unnamed".into(),
        name => name.into(),
    }
}

/// The UDP port of gossip.
pub const DEFAULT_PORT: u16 = 7946;

/// Below, a pod does little but gossip.
const MIN_INTERVAL: Duration = Duration::from_millis(10);

/// Above, shares of a window of a minute come too late to be useful.
const MAX_INTERVAL: Duration = Duration::from_secs(10);

/// How often a headless name is asked for before a pod gives up finding its own address.
const ADVERTISE_TRIES: u32 = 30;

/// Calls of [`Cluster::hand_over`] and [`Cluster::leave`] that may be under way at once before they wait for one another.
const COMMANDS: usize = 8;
