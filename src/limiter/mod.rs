//! The limiter: one cheap handle on all deployments of a pod.
//!
//! Knows how callers reserve, wait, settle and refund, and who is woken when. Must not
//! know sockets, gossip or HTTP. The invariant it keeps: a hit is one compare-and-swap per
//! claim on a [`Wallet`](crate::wallet::Wallet), without a lock, an allocation or shared
//! reference counts; everything else happens under one mutex around the [`Ledger`].

mod acquire;
mod builder;
mod handle;
mod pause;
mod permit;
mod reconfigure;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

pub use self::acquire::Acquire;
pub use self::builder::{BuildError, Builder, Policy};
pub use self::handle::Handle;
pub use self::pause::MAX_PAUSE;
use self::pause::Pause;
pub use self::permit::Permit;
use crate::ledger::{
    Admission, Counter, ForgetError, JoinedBefore, Ledger, LimitId, ReplicaId, RosterSettings, Slot, Status, Ticket,
    Timestamp,
};

/// Tells the time: milliseconds since the Unix epoch.
///
/// Windows are cut by it, so replicas' clocks should agree within two seconds.
pub trait Clock: Send + Sync + 'static {
    /// Returns now.
    fn now(&self) -> Timestamp;
}

/// One limiter for all deployments of a pod. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Limiter {
    inner: Arc<Inner>,
    handles: Arc<Handles>,
}

/// Handles by deployment. Hashed, because a proxy looks one up for every request; with a
/// fixed key, because only the configuration decides what is in it.
type Handles = HashMap<String, Handle, BuildHasherDefault<DefaultHasher>>;

/// What the handles of one limiter share.
struct Inner {
    clock: ClockSource,
    core: Mutex<Core>,
}

struct Core {
    ledger: Ledger,
    waiters: BTreeMap<Ticket, Waiter>,
    known: reconfigure::Known,
    /// The pause of each limit, by name, for as long as a deployment shares it.
    pauses: BTreeMap<String, Arc<Pause>>,
    /// The cluster loop, to be woken when there is something to send at once or a new
    /// deadline to keep.
    driver: Option<Waker>,
    /// Whether a request was parked since the driver last looked.
    parked: bool,
}

enum Waiter {
    Waiting(Waker),
    Decided(Admission),
}

enum ClockSource {
    System,
    Injected(Box<dyn Clock>),
}

impl ClockSource {
    #[inline]
    fn now(&self) -> Timestamp {
        match self {
            Self::System => system_now(),
            Self::Injected(clock) => clock.now(),
        }
    }
}

/// The coarse clock: a few nanoseconds to read, and at most 4 ms behind, which is far
/// within the edge.
#[inline]
fn system_now() -> Timestamp {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    Timestamp::from_unix_ms(now.tv_sec as u64 * 1_000 + now.tv_nsec as u64 / 1_000_000)
}

/// One deployment, as the hot path sees it.
struct Deployment {
    inner: Arc<Inner>,
    id: String,
    name: String,
    limit: usize,
    counters: Arc<[Counter]>,
    /// How close to a window's end a take goes out of line: the edge, until a successor
    /// makes it for ever. So a hit sees both in one word.
    hot_edge_ms: AtomicU64,
    edge_ms: u64,
    policy: Policy,
    /// Shared by the deployments of one limit: the upstream counts them together.
    pause: Arc<Pause>,
    /// What this deployment has become.
    successor: OnceLock<Handle>,
}

impl Deployment {
    fn new(
        inner: Arc<Inner>,
        id: String,
        name: String,
        limit: usize,
        counters: Arc<[Counter]>,
        policy: Policy,
        pause: Arc<Pause>,
    ) -> Self {
        let edge_ms = policy.edge.as_millis() as u64;
        let (hot_edge_ms, successor) = (AtomicU64::new(edge_ms), OnceLock::new());
        Self { inner, id, name, limit, counters, hot_edge_ms, edge_ms, policy, pause, successor }
    }
}

impl Limiter {
    /// Starts a limiter.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Returns the handle of a deployment: look it up once and keep it.
    ///
    /// # Errors
    /// If no deployment has this id.
    #[inline]
    pub fn handle(&self, deployment: &str) -> Result<Handle, UnknownDeployment> {
        self.get(deployment).cloned()
    }

    /// Returns the deployment's handle without a share in it, for whoever looks one up for
    /// every request: threads that do so share no reference count.
    ///
    /// # Errors
    /// If no deployment has this id.
    #[inline]
    pub fn get(&self, deployment: &str) -> Result<&Handle, UnknownDeployment> {
        self.handles.get(deployment).ok_or_else(|| unknown(deployment))
    }

    /// Returns the ids of all deployments, in order.
    pub fn deployments(&self) -> impl Iterator<Item = &str> {
        let mut ids: Vec<&str> = self.handles.keys().map(String::as_str).collect();
        ids.sort_unstable();
        ids.into_iter()
    }

    /// Returns the cluster and every limit as this replica sees them.
    pub fn status(&self) -> Status {
        let now = self.now();
        self.inner.lock().ledger.status(now)
    }

    /// Declares a replica dead, by id, or an address at which nobody ever answered: an
    /// operator's proof of death. Wrongly used it can cost up to that replica's share.
    ///
    /// # Errors
    /// Says why nothing was changed.
    pub fn forget(&self, target: &str) -> Result<String, ForgetError> {
        self.with_ledger(|ledger, now| ledger.forget(target, now))
    }

    /// Returns now, by the limiter's clock.
    pub fn now(&self) -> Timestamp {
        self.inner.clock.now()
    }

    /// Runs `act` on the ledger and wakes whoever it served: the door for the cluster
    /// loop, and for a simulator in its place.
    ///
    /// `act` runs under the limiter's one lock, which cannot be taken twice: if it calls this
    /// limiter, a handle or a permit of it, or drops a permit, it waits for itself for ever.
    pub fn with_ledger<R>(&self, act: impl FnOnce(&mut Ledger, Timestamp) -> R) -> R {
        let now = self.now();
        let mut core = self.inner.lock();
        let result = act(&mut core.ledger, now);
        let wake = core.take_served();
        drop(core);
        wake.into_iter().for_each(Waker::wake);
        result
    }

    /// Gives the ledger its place in a fleet; from now on [`Handle::acquire`] waits.
    /// Called by the cluster, before the first reservation: what was owned alone and not
    /// spent is forfeited.
    ///
    /// # Errors
    /// If it was done before: a limiter joins once. Nothing changed.
    pub fn attach(
        &self,
        me: ReplicaId,
        slot: Slot,
        settings: RosterSettings,
        interval: Duration,
    ) -> Result<(), JoinedBefore> {
        self.with_ledger(|ledger, now| ledger.attach(me, slot, settings, interval, now))
    }

    /// Ends waiting: nobody drives the ledger any more.
    pub fn detach(&self) {
        self.with_ledger(|ledger, now| ledger.detach(now));
    }

    /// Returns the pauses that upstreams asked of this replica and that are not over, by
    /// limit: what peers are told.
    pub fn own_pauses(&self) -> Vec<(LimitId, Timestamp)> {
        let now = self.now();
        let core = self.inner.lock();
        let own = core.pauses.values().filter_map(|pause| Some((pause.limit(), pause.asked_here(now)?)));
        own.collect()
    }

    /// Takes a peer's word that the upstream of a limit wants no requests until an instant.
    /// A limit that is not configured here, and an instant further away than a pause can be,
    /// are ignored.
    pub fn hear_pause(&self, limit: LimitId, until: Timestamp) {
        let now = self.now();
        let core = self.inner.lock();
        core.pauses.values().filter(|pause| pause.limit() == limit).for_each(|pause| pause.hear(until, now));
    }

    /// Is ready when the ledger has something to send at once, or a new deadline.
    pub fn poll_work(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut core = self.inner.lock();
        if std::mem::take(&mut core.parked) || core.ledger.has_transmits() {
            return Poll::Ready(());
        }
        match &mut core.driver {
            Some(driver) => driver.clone_from(cx.waker()),
            driver => *driver = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter").field("deployments", &self.deployments().collect::<Vec<_>>()).finish_non_exhaustive()
    }
}

/// No deployment has this id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no deployment has the id {0:?}")]
pub struct UnknownDeployment(String);

#[cold]
fn unknown(deployment: &str) -> UnknownDeployment {
    UnknownDeployment(deployment.to_owned())
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Core> {
        // A panic under the lock is a bug that tests must find; to stop serving because
        // of it would turn it into an outage.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Core {
    /// Hands decisions to those who wait for them and returns whom to wake, outside the
    /// lock.
    fn take_served(&mut self) -> Vec<Waker> {
        let mut wake = Vec::new();
        while let Some((ticket, admission)) = self.ledger.poll_served() {
            let Some(waiter) = self.waiters.get_mut(&ticket) else { continue };
            if let Waiter::Waiting(waker) = std::mem::replace(waiter, Waiter::Decided(admission)) {
                wake.push(waker);
            }
        }
        if self.ledger.take_switched() {
            self.follow();
        }
        if self.parked || self.ledger.has_transmits() {
            wake.extend(self.driver.take());
        }
        wake
    }
}
