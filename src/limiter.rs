//! The limiter: one cheap handle on all deployments of a pod.
//!
//! Knows how callers reserve, wait, settle and refund, and who is woken when. Must not
//! know sockets, gossip or HTTP. The invariant it keeps: a hit is one compare-and-swap per
//! claim on a [`Wallet`](crate::wallet::Wallet), without a lock, an allocation or shared
//! reference counts; everything else happens under one mutex around the [`Ledger`].

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::ledger::{
    Admission, Ask, Claim, Counter, Denied, ForgetError, Ledger, Mode, Quota, ReplicaId, RosterSettings, Slot,
    Standing, Status, Ticket, Timestamp,
};

/// Tells the time: milliseconds since the Unix epoch.
///
/// Windows are cut by it, so replicas' clocks should agree within two seconds.
pub trait Clock: Send + Sync + 'static {
    /// Returns now.
    fn now(&self) -> Timestamp;
}

/// How a deployment's limits are applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether requests are refused.
    pub mode: Mode,
    /// How long [`Handle::acquire`] waits for rights from peers: two to three round trips
    /// between pods. Default 20 ms.
    pub wait: Duration,
    /// A reservation made this close to a window's end must fit in, and is charged to,
    /// both windows, so that the upstream's own count by arrival time stays within the
    /// limit for any transit time and clock difference up to this. At most a quarter of the
    /// shortest window, and 2 s. Default 50 ms; costs about edge / window of the budget.
    pub edge: Duration,
    /// Deployments with the same `limit_id` share one provider quota. Default: the
    /// deployment's own id.
    pub limit_id: Option<String>,
}

impl Default for Policy {
    fn default() -> Self {
        Self { mode: Mode::Strict, wait: Duration::from_millis(20), edge: Duration::from_millis(50), limit_id: None }
    }
}

/// Collects deployments; see [`Limiter::builder`].
#[derive(Default)]
pub struct Builder {
    deployments: Vec<(String, Vec<Quota>, Policy)>,
    clock: Option<Box<dyn Clock>>,
    seed: Option<u64>,
}

impl Builder {
    /// Adds a deployment with the default [`Policy`].
    #[must_use]
    pub fn deployment(self, id: impl Into<String>, quotas: impl IntoIterator<Item = Quota>) -> Self {
        self.deployment_with(id, quotas, Policy::default())
    }

    /// Adds a deployment.
    #[must_use]
    pub fn deployment_with(
        mut self,
        id: impl Into<String>,
        quotas: impl IntoIterator<Item = Quota>,
        policy: Policy,
    ) -> Self {
        self.deployments.push((id.into(), quotas.into_iter().collect(), policy));
        self
    }

    /// Uses this clock instead of the system's.
    #[must_use]
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.clock = Some(Box::new(clock));
        self
    }

    /// Uses this seed instead of the system's entropy, for reproducible runs.
    #[must_use]
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Builds the limiter: alone, until a cluster joins it to others.
    ///
    /// # Errors
    /// Says which deployment is wrong and how; nothing is built.
    pub fn build(self) -> Result<Limiter, BuildError> {
        let clock = self.clock.map_or(ClockSource::System, ClockSource::Injected);
        let now = clock.now();
        let seed = match self.seed {
            Some(seed) => seed,
            None => getrandom::u64().map_err(|_| BuildError::NoEntropy)?,
        };
        let mut ledger = Ledger::new(ReplicaId::new(now, u128::from(seed)), seed, now);
        let mut deployments = BTreeMap::new();
        let mut limits: BTreeMap<String, (String, Vec<Quota>)> = BTreeMap::new();
        for (id, quotas, policy) in self.deployments {
            let mut quotas = quotas;
            quotas.sort_unstable();
            check(&id, &quotas, &policy)?;
            let name = policy.limit_id.clone().unwrap_or_else(|| id.clone());
            match limits.get(&name) {
                Some((first, theirs)) if *theirs != quotas => {
                    return Err(BuildError::SharedLimit { limit: name, first: first.clone(), second: id });
                }
                Some(_) => {}
                None => {
                    limits.insert(name.clone(), (id.clone(), quotas.clone()));
                }
            }
            let (limit, counters) = ledger.add_limit(&name, &quotas);
            let edge_ms = policy.edge.as_millis() as u64;
            let deployment = Arc::new(Deployment { id: id.clone(), name, limit, counters, edge_ms, policy });
            if deployments.insert(id.clone(), deployment).is_some() {
                return Err(BuildError::DuplicateDeployment(id));
            }
        }
        let core = Core { ledger, waiters: BTreeMap::new(), driver: None };
        Ok(Limiter { inner: Arc::new(Inner { clock, deployments, core: Mutex::new(core) }) })
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("deployments", &self.deployments).finish_non_exhaustive()
    }
}

fn check(id: &str, quotas: &[Quota], policy: &Policy) -> Result<(), BuildError> {
    if quotas.is_empty() {
        return Err(BuildError::NoQuota(id.to_owned()));
    }
    if let Some(twice) = quotas.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(BuildError::DuplicateQuota { deployment: id.to_owned(), quota: twice[0] });
    }
    for quota in quotas {
        if policy.edge > quota.window().lead() {
            return Err(BuildError::Edge { deployment: id.to_owned(), edge: policy.edge, most: quota.window().lead() });
        }
    }
    Ok(())
}

/// Why a limiter could not be built. Whoever wrote the configuration can mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Two deployments have one id.
    #[error("deployment {0:?} is configured twice; ids must be unique")]
    DuplicateDeployment(String),
    /// A deployment without a quota limits nothing.
    #[error("deployment {0:?} has no quota; give it at least one")]
    NoQuota(String),
    /// One quota stands twice.
    #[error("deployment {deployment:?} has the quota {quota} twice")]
    DuplicateQuota {
        /// Which deployment.
        deployment: String,
        /// Which quota.
        quota: Quota,
    },
    /// Deployments that share a limit configure it differently.
    #[error("deployments {first:?} and {second:?} share limit {limit:?} with different quotas; make them equal")]
    SharedLimit {
        /// The limit.
        limit: String,
        /// One deployment.
        first: String,
        /// The other.
        second: String,
    },
    /// The edge reaches beyond the lead of a window.
    #[error(
        "deployment {deployment:?} has an edge of {edge:?}, over {most:?}, a quarter of its shortest window or 2 s"
    )]
    Edge {
        /// Which deployment.
        deployment: String,
        /// Its edge.
        edge: Duration,
        /// The most its windows allow.
        most: Duration,
    },
    /// The system gave no random number.
    #[error("the operating system gave no entropy for a replica id")]
    NoEntropy,
}

/// One limiter for all deployments of a pod. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Limiter {
    inner: Arc<Inner>,
}

struct Inner {
    clock: ClockSource,
    deployments: BTreeMap<String, Arc<Deployment>>,
    core: Mutex<Core>,
}

struct Core {
    ledger: Ledger,
    waiters: BTreeMap<Ticket, Waiter>,
    /// The cluster loop, to be woken when there is something to send at once.
    driver: Option<Waker>,
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
#[derive(Debug)]
struct Deployment {
    id: String,
    name: String,
    limit: usize,
    counters: Vec<Counter>,
    edge_ms: u64,
    policy: Policy,
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
    pub fn handle(&self, deployment: &str) -> Result<Handle, UnknownDeployment> {
        match self.inner.deployments.get(deployment) {
            Some(found) => Ok(Handle { inner: Arc::clone(&self.inner), deployment: Arc::clone(found) }),
            None => Err(UnknownDeployment(deployment.to_owned())),
        }
    }

    /// Returns the ids of all deployments, in order.
    pub fn deployments(&self) -> impl Iterator<Item = &str> {
        self.inner.deployments.keys().map(String::as_str)
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
    pub fn attach(&self, me: ReplicaId, slot: Slot, settings: RosterSettings, interval: Duration) {
        self.with_ledger(|ledger, now| ledger.attach(me, slot, settings, interval, now));
    }

    /// Ends waiting: nobody drives the ledger any more.
    pub fn detach(&self) {
        self.with_ledger(|ledger, now| ledger.detach(now));
    }

    /// Is ready when the ledger has something to send at once.
    pub fn poll_work(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut core = self.inner.lock();
        if core.ledger.has_transmits() {
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
        f.debug_struct("Limiter").field("deployments", &self.inner.deployments.keys()).finish_non_exhaustive()
    }
}

/// No deployment has this id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no deployment has the id {0:?}")]
pub struct UnknownDeployment(String);

/// Reserves for one deployment. Cheap to clone; reserving does not clone it.
#[derive(Clone)]
pub struct Handle {
    inner: Arc<Inner>,
    deployment: Arc<Deployment>,
}

impl Handle {
    /// Reserves if this replica's own rights cover the claim. Never waits.
    ///
    /// # Errors
    /// Why not, and when to try again; nothing is charged.
    #[inline]
    pub fn try_acquire(&self, claim: Claim) -> Result<Permit<'_>, Denied> {
        let now = self.inner.clock.now();
        if self.take(&claim, now) {
            return Ok(self.permit(claim, now));
        }
        self.admit_now(claim)
    }

    /// Reserves, and waits up to the policy's `wait` for rights from peers.
    ///
    /// Without a cluster there is nobody to ask, and this is [`Handle::try_acquire`].
    ///
    /// # Errors
    /// Why not, and when to try again; nothing is charged.
    ///
    /// # Cancel safety
    /// A dropped future holds nothing: what it had just been given goes to the next in
    /// line.
    pub fn acquire(&self, claim: Claim) -> Acquire<'_> {
        Acquire { handle: self, claim, state: Waiting::NotAsked, asked_at: Timestamp::ZERO }
    }

    /// Returns where each quota stands in the running window, in key order.
    pub fn standings(&self) -> Vec<Standing> {
        let now = self.inner.clock.now();
        self.inner.lock().ledger.standings(&self.deployment.name, now)
    }

    /// Returns the deployment's id.
    pub fn deployment(&self) -> &str {
        &self.deployment.id
    }

    /// Returns the deployment's quotas, in key order.
    pub fn quotas(&self) -> impl Iterator<Item = Quota> + '_ {
        self.deployment.counters.iter().map(|counter| counter.key.quota)
    }

    /// Returns how the deployment's limits are applied.
    pub fn policy(&self) -> &Policy {
        &self.deployment.policy
    }

    /// The hot path: every claim or none, in key order.
    #[inline]
    fn take(&self, claim: &Claim, now: Timestamp) -> bool {
        let charges = self.charges(claim, now);
        for (done, (counter, number, amount)) in charges.clone().enumerate() {
            if counter.ring.take(number, amount).is_err() {
                if done > 0 {
                    self.put_back(charges.take(done));
                }
                return false;
            }
        }
        true
    }

    /// Undoes a part of a reservation that does not fit as a whole.
    #[cold]
    fn put_back<'a>(&'a self, charges: impl Iterator<Item = (&'a Counter, u64, u64)>) {
        let mut parked = false;
        for (counter, number, amount) in charges {
            parked |= counter.ring.refund(number, amount).is_some_and(|after| after.parked);
        }
        if parked {
            self.settled();
        }
    }

    /// Which amounts a claim made at `at` is charged, and in which windows.
    #[inline]
    fn charges<'a>(
        &'a self,
        claim: &Claim,
        at: Timestamp,
    ) -> impl Iterator<Item = (&'a Counter, u64, u64)> + Clone + use<'a> {
        let claim = *claim;
        let edge_ms = self.deployment.edge_ms;
        self.deployment.counters.iter().flat_map(move |counter| {
            let amount = claim.amount(counter.key.quota.unit());
            let number = counter.ring.number_at(at.unix_ms());
            let edge = at.unix_ms() + edge_ms >= counter.ring.end_ms(number);
            let windows = if amount == 0 { 0 } else { 1 + u64::from(edge) };
            (0..windows).map(move |ahead| (counter, number + ahead, amount))
        })
    }

    #[inline]
    fn permit(&self, claim: Claim, at: Timestamp) -> Permit<'_> {
        Permit { handle: Cow::Borrowed(self), claim, at, waited: Duration::ZERO, state: Charge::Reserved }
    }

    #[cold]
    fn admit_now(&self, claim: Claim) -> Result<Permit<'_>, Denied> {
        match self.admit(claim, Duration::ZERO, None).1 {
            Admission::Admitted(at) => Ok(self.permit(claim, at)),
            Admission::Denied(denied) => Err(denied),
            Admission::Parked(_) => unreachable!("a request that must not wait is never parked"),
        }
    }

    /// Decides under the lock. A parked request leaves `waker` behind.
    fn admit(&self, claim: Claim, wait: Duration, waker: Option<&Waker>) -> (Timestamp, Admission) {
        let now = self.inner.clock.now();
        let policy = &self.deployment.policy;
        let ask = Ask { claim, edge_ms: self.deployment.edge_ms, wait, observe: policy.mode == Mode::Observe };
        let mut core = self.inner.lock();
        let admission = core.ledger.admit(self.deployment.limit, ask, now);
        if let (Admission::Parked(ticket), Some(waker)) = (&admission, waker) {
            core.waiters.insert(*ticket, Waiter::Waiting(waker.clone()));
        }
        let wake = core.take_served();
        drop(core);
        wake.into_iter().for_each(Waker::wake);
        (now, admission)
    }

    /// Lets the ledger look at what was put back or overdrawn.
    #[cold]
    fn settled(&self) {
        let now = self.inner.clock.now();
        let mut core = self.inner.lock();
        core.ledger.settled(self.deployment.limit, now);
        let wake = core.take_served();
        drop(core);
        wake.into_iter().for_each(Waker::wake);
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("deployment", &self.deployment.id).finish_non_exhaustive()
    }
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
            if let Some(waiter) = self.waiters.get_mut(&ticket) {
                if let Waiter::Waiting(waker) = std::mem::replace(waiter, Waiter::Decided(admission)) {
                    wake.push(waker);
                }
            }
        }
        if self.ledger.has_transmits() {
            wake.extend(self.driver.take());
        }
        wake
    }
}

/// The future of [`Handle::acquire`].
#[must_use = "futures do nothing unless polled"]
pub struct Acquire<'a> {
    handle: &'a Handle,
    claim: Claim,
    state: Waiting,
    asked_at: Timestamp,
}

enum Waiting {
    NotAsked,
    Parked(Ticket),
    Done,
}

impl<'a> Future for Acquire<'a> {
    type Output = Result<Permit<'a>, Denied>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let handle = this.handle;
        let (asked_at, admission) = match this.state {
            Waiting::NotAsked => {
                let now = handle.inner.clock.now();
                if handle.take(&this.claim, now) {
                    this.state = Waiting::Done;
                    return Poll::Ready(Ok(handle.permit(this.claim, now)));
                }
                let (asked_at, admission) = handle.admit(this.claim, handle.deployment.policy.wait, Some(cx.waker()));
                // NotAsked => Parked
                if let Admission::Parked(ticket) = admission {
                    this.state = Waiting::Parked(ticket);
                    this.asked_at = asked_at;
                    return Poll::Pending;
                }
                (asked_at, admission)
            }
            Waiting::Parked(ticket) => {
                let mut core = handle.inner.lock();
                match core.waiters.remove(&ticket) {
                    Some(Waiter::Decided(admission)) => (this.asked_at, admission),
                    _ => {
                        core.waiters.insert(ticket, Waiter::Waiting(cx.waker().clone()));
                        return Poll::Pending;
                    }
                }
            }
            Waiting::Done => panic!("an acquire future was polled after it had finished"),
        };
        // (NotAsked | Parked) => Done
        this.state = Waiting::Done;
        Poll::Ready(match admission {
            Admission::Admitted(at) => {
                let mut permit = handle.permit(this.claim, at);
                permit.waited = handle.inner.clock.now().since(asked_at);
                Ok(permit)
            }
            Admission::Denied(denied) => Err(denied),
            Admission::Parked(_) => unreachable!("handled above"),
        })
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        let Waiting::Parked(ticket) = self.state else { return };
        let handle = self.handle;
        let now = handle.inner.clock.now();
        let mut core = handle.inner.lock();
        let decided = core.waiters.remove(&ticket);
        core.ledger.cancel(handle.deployment.limit, ticket, now);
        let wake = core.take_served();
        drop(core);
        wake.into_iter().for_each(Waker::wake);
        if let Some(Waiter::Decided(Admission::Admitted(at))) = decided {
            // It was given something and never took it: the next in line gets it.
            drop(handle.permit(self.claim, at));
        }
    }
}

impl fmt::Debug for Acquire<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acquire").field("claim", &self.claim).finish_non_exhaustive()
    }
}

/// A reservation. Settle or refund it; dropped, it refunds itself if the request was never
/// started, and stays charged if it was.
#[derive(Debug)]
#[must_use = "a permit that is dropped at once refunds itself"]
pub struct Permit<'a> {
    handle: Cow<'a, Handle>,
    claim: Claim,
    /// When it was reserved: it names the windows charged.
    at: Timestamp,
    waited: Duration,
    state: Charge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Charge {
    Reserved,
    Started,
    Settled,
}

impl Permit<'_> {
    /// Says that the request may reach the upstream from now on: dropped after this, the
    /// whole reservation stays charged.
    pub fn start(&mut self) {
        self.state = Charge::Started;
    }

    /// Replaces the estimate by what was used, in tokens. More than was reserved is
    /// charged at once, to the window of the reservation, and covered by peers' rights.
    pub fn settle(self, total_tokens: u64) {
        let actual = self.claim.with(crate::ledger::Unit::Tokens, total_tokens);
        self.settle_claim(actual);
    }

    /// Replaces the estimate by what was used, in every unit.
    pub fn settle_claim(mut self, actual: Claim) {
        self.replace(&actual);
    }

    /// Gives everything back: the request never reached the upstream.
    pub fn refund(mut self) {
        self.refund_all();
    }

    /// Returns what was reserved.
    pub const fn claim(&self) -> Claim {
        self.claim
    }

    /// Returns when it was reserved.
    pub const fn reserved_at(&self) -> Timestamp {
        self.at
    }

    /// Returns how long the request was parked.
    pub const fn waited(&self) -> Duration {
        self.waited
    }

    /// Returns the permit on its own: it can outlive the handle it was taken from, as in a
    /// response body.
    pub fn into_owned(mut self) -> Permit<'static> {
        let handle = Cow::Owned(self.handle.as_ref().clone());
        let state = std::mem::replace(&mut self.state, Charge::Settled);
        Permit { handle, claim: self.claim, at: self.at, waited: self.waited, state }
    }

    fn refund_all(&mut self) {
        self.replace(&Claim::tokens(0).with(crate::ledger::Unit::Requests, 0));
    }

    fn replace(&mut self, actual: &Claim) {
        self.state = Charge::Settled;
        let handle = self.handle.as_ref();
        let mut look = false;
        for (counter, number, reserved) in handle.charges(&self.claim, self.at) {
            let used = actual.amount(counter.key.quota.unit());
            if used < reserved {
                let after = counter.ring.refund(number, reserved - used);
                look |= after.is_some_and(|after| after.parked);
            } else if used > reserved {
                match counter.ring.charge(number, used - reserved) {
                    Some(after) => look |= after.balance < 0,
                    None => self.overdrawn_late(counter, used - reserved),
                }
            }
        }
        if look {
            handle.settled();
        }
    }

    /// The window of an excess has closed: nobody can cover it any more.
    #[cold]
    fn overdrawn_late(&self, counter: &Counter, excess: u64) {
        let handle = self.handle.as_ref();
        let position = handle.deployment.counters.iter().position(|other| other.key == counter.key);
        if let Some(position) = position {
            handle.inner.lock().ledger.settled_late(handle.deployment.limit, position, self.at, excess);
        }
    }
}

impl Drop for Permit<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.state == Charge::Reserved {
            self.refund_all();
        }
    }
}
