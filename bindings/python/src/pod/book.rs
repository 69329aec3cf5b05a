//! The reservations of a pod, in the worker that owns its rights.
//!
//! Knows which deployment takes a request, and what becomes of a reservation by its outcome:
//! the library's own rules (docs/algorithm.md section 4). Must not know sockets or Python. The
//! invariant it keeps: a reservation that nobody settles, because its worker died or forgot
//! it, stays charged.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use quotum::layer::parts::{Charge, Meter, Prompts};
use quotum::layer::{Call, Metering, Observer, Report, Tokenizer, Usage};
use quotum::ledger::{Timestamp, WindowKind};
use quotum::{Claim, Denied, Handle, Limiter, Permit, Policy, Portion, Unit};

use super::OWN;
use super::message::{self, Declared, Mode, Outcome, Refusal, Reply, Request, Reserve, Unreported};
use crate::limiter::LIMITS;
use crate::quota::kind_of;

/// How long a reservation is kept for a settlement: longer than any request takes.
const KEEP: Duration = Duration::from_secs(3_600);

/// How close to a window's end a reservation must fit into both, unless the windows are too
/// short for it: after its last hook LiteLLM connects and writes, in tens of milliseconds and
/// more under load.
const EDGE: Duration = Duration::from_millis(250);

/// More tokens than an answer can have: a mistake, as in the library's own reading.
const MAX_TOKENS: u64 = 1 << 28;

/// The reservations that are open, and where new ones are made.
#[derive(Debug)]
pub(crate) struct Book {
    served: RwLock<Served>,
    open: Mutex<AllOpen>,
    next: AtomicU64,
    late: AtomicU64,
    observer: Arc<dyn Observer>,
}

/// What is open, and who may have something open.
#[derive(Debug, Default)]
struct AllOpen {
    reservations: BTreeMap<u64, Open>,
    workers: BTreeSet<u64>,
}

#[derive(Debug)]
struct Served {
    limiter: Limiter,
    deployments: BTreeMap<String, Arc<Deployment>>,
}

#[derive(Debug)]
struct Deployment {
    declared: Declared,
    handle: Handle,
    meter: Arc<Meter>,
    edge: Duration,
}

#[derive(Debug)]
struct Open {
    charge: Charge,
    asked: Asked,
    worker: u64,
    since: Instant,
}

/// Where a reservation was made, and for what.
#[derive(Clone, Debug)]
struct Asked {
    deployment: Arc<Deployment>,
    call: Call,
    claim: Claim,
}

impl Book {
    /// Returns an empty book of these deployments.
    ///
    /// # Errors
    /// Says which deployment cannot be limited as it is declared.
    pub(crate) fn new(declared: &[Declared], observer: Arc<dyn Observer>) -> Result<Self, String> {
        let builder = declared.iter().try_fold(Limiter::builder(), |builder, one| one.add_to(builder))?;
        let limiter = builder.build().map_err(|error| error.to_string())?;
        let served = Served { limiter, deployments: BTreeMap::new() };
        // No number of an earlier owner's may mean a reservation of this one.
        let first = getrandom::u64().map_err(|error| error.to_string())? >> 12;
        let all_open = AllOpen { workers: BTreeSet::from([OWN]), ..AllOpen::default() };
        let (open, next) = (Mutex::new(all_open), AtomicU64::new(first | 1));
        let book = Self { served: RwLock::new(served), open, next, late: AtomicU64::new(0), observer };
        book.declare(declared)?;
        Ok(book)
    }

    pub(crate) fn limiter(&self) -> Limiter {
        self.served.read().unwrap_or_else(PoisonError::into_inner).limiter.clone()
    }

    fn all_open(&self) -> MutexGuard<'_, AllOpen> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that there is a worker, which may reserve from now on.
    pub(crate) fn enter(&self, worker: u64) {
        self.all_open().workers.insert(worker);
    }

    /// Takes these deployments in, and what has changed of those it has.
    ///
    /// # Errors
    /// Says which deployment cannot be limited as it is declared; nothing has changed.
    pub(crate) fn declare(&self, declared: &[Declared]) -> Result<(), String> {
        let mut served = self.served.write().unwrap_or_else(PoisonError::into_inner);
        let mut all: BTreeMap<&str, &Declared> =
            served.deployments.values().map(|known| (known.declared.id.as_str(), &known.declared)).collect();
        all.extend(declared.iter().map(|one| (one.id.as_str(), one)));
        let builder = all.values().try_fold(Limiter::builder(), |builder, one| one.add_to(builder))?;
        let limiter = served.limiter.reconfigure(builder).map_err(|error| error.to_string())?;
        let mut deployments = BTreeMap::new();
        for (id, declared) in all {
            let handle = limiter.handle(id).map_err(|error| error.to_string())?;
            let before = served.deployments.get(id).map(|known| &*known.meter);
            let policy = declared.policy()?;
            let meter = Arc::new(Meter::new(declared.metering(), policy.mode, declared.quotas()?).after(before));
            let deployment = Deployment { declared: declared.clone(), handle, meter, edge: policy.edge };
            deployments.insert(id.to_owned(), Arc::new(deployment));
        }
        *served = Served { limiter, deployments };
        Ok(())
    }

    fn deployment(&self, id: &str) -> Option<Arc<Deployment>> {
        self.served.read().unwrap_or_else(PoisonError::into_inner).deployments.get(id).cloned()
    }

    /// Charges all that can be spent now: an earlier owner, of which nothing is known but that
    /// it is dead, may have spent it.
    pub(crate) fn forfeit(&self) {
        let served = self.served.read().unwrap_or_else(PoisonError::into_inner);
        for deployment in served.deployments.values() {
            while charge_what_stands(&deployment.handle) {}
        }
    }

    /// Reserves at the first deployment with room; waits at one of a level for peers' rights
    /// before the next level is asked.
    pub(crate) async fn reserve(&self, request: Request, worker: u64) -> Reply {
        let mut soonest: Option<(Arc<Deployment>, Denied)> = None;
        // Before the decision: what waits for it makes the reservation no fresher.
        let at = self.limiter().now();
        for level in &request.levels {
            let mut short = None;
            for id in level {
                let Some(deployment) = self.deployment(id) else {
                    return Reply::Granted { id: 0, deployment: id.clone(), until: f64::MAX };
                };
                let (call, claim) = deployment.claim(&request);
                let asked = Asked { deployment, call, claim };
                match asked.now(claim, &self.observer) {
                    Ok(charge) => return self.granted(charge, asked, at, worker),
                    Err(denied) => {
                        keep_sooner(&mut soonest, &asked.deployment, &denied);
                        if short.is_none() && !matches!(denied, Denied::TooLarge { .. }) {
                            short = Some(asked);
                        }
                    }
                }
            }
            let Some(asked) = short else { continue };
            match asked.soon(&self.observer).await {
                Ok(charge) => return self.granted(charge, asked, at, worker),
                Err(denied) => keep_sooner(&mut soonest, &asked.deployment, &denied),
            }
        }
        match soonest {
            Some((deployment, denied)) => {
                deployment.handle.count_refusal(&denied);
                Reply::Refused(Refusal::of(&deployment.declared.id, &denied))
            }
            None => Reply::Wrong("no deployment was named".to_owned()),
        }
    }

    /// Returns which deployments would take the request now.
    pub(crate) async fn room(&self, request: Request) -> Reply {
        let mut room = Vec::new();
        let mut refusal = None;
        for id in request.levels.iter().flatten() {
            let Some(deployment) = self.deployment(id) else {
                room.push(id.clone());
                continue;
            };
            let (_, claim) = deployment.claim(&request);
            // Dropped at once, the permit gives itself back.
            let decision = deployment.handle.acquire(claim).tentative().await.map(drop);
            match decision {
                Ok(()) => room.push(id.clone()),
                Err(denied) => keep_sooner(&mut refusal, &deployment, &denied),
            }
        }
        match refusal {
            Some((deployment, denied)) if room.is_empty() => {
                deployment.handle.count_refusal(&denied);
                Reply::Refused(Refusal::of(&deployment.declared.id, &denied))
            }
            _ => Reply::Room(room),
        }
    }

    fn granted(&self, charge: Charge, asked: Asked, at: Timestamp, worker: u64) -> Reply {
        let (deployment, until) = (asked.deployment.declared.id.clone(), asked.deployment.until(at));
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut open = self.all_open();
        if !open.workers.contains(&worker) {
            // It ended while its request waited: dropped, the reservation gives itself back.
            drop(open);
            return Reply::Wrong("the worker that asked is gone".to_owned());
        }
        let reservations = &mut open.reservations;
        let now = Instant::now();
        while let Some(oldest) =
            reservations.first_entry().filter(|oldest| now.duration_since(oldest.get().since) > KEEP)
        {
            keep(oldest.remove().charge);
        }
        reservations.insert(id, Open { charge, asked, worker, since: now });
        Reply::Granted { id, deployment, until }
    }

    /// Moves a reservation to the window that its request arrives in, because it leaves only
    /// now. Nobody can hold it back any more: where that window has no room, what the request
    /// uses is charged there once it is known, as what it uses beyond a reservation is.
    pub(crate) async fn late(&self, id: u64) {
        let found = self.all_open().reservations.get(&id).map(|open| open.asked.clone());
        let Some(asked) = found else { return };
        self.late.fetch_add(1, Ordering::Relaxed);
        let charge = match asked.now(asked.claim, &self.observer) {
            Ok(charge) => Ok(charge),
            Err(_) => asked.soon(&self.observer).await,
        };
        // Of nothing there would be nothing to settle.
        let least = Claim::prompt_and_output(1, 1).with(Unit::Tokens, 1);
        let Ok(charge) = charge.or_else(|_| asked.now(least, &self.observer)) else { return };
        let mut open = self.all_open();
        // Settled meanwhile, it stays as it was; dropped, either gives itself back.
        let before = open.reservations.get_mut(&id).map(|open| mem::replace(&mut open.charge, charge));
        drop(open);
        drop(before);
    }

    /// Settles a reservation; of one that is settled, or was made by an earlier owner, nothing
    /// changes.
    pub(crate) fn settle(&self, id: u64, outcome: Outcome) {
        let open = self.all_open().reservations.remove(&id);
        let Some(Open { mut charge, .. }) = open else { return };
        if outcome != Outcome::Unsent {
            charge.start();
        }
        match outcome {
            Outcome::Used { prompt, cached, completion, total } => {
                let told = if [prompt, cached, completion, total].iter().all(|count| *count <= MAX_TOKENS) {
                    let total = total.max(prompt + completion);
                    Report::from(Usage { prompt, cached: cached.min(prompt), completion, total })
                } else {
                    Report::Lie
                };
                charge.told(told);
                charge.settle();
            }
            Outcome::Unreported => charge.settle(),
            Outcome::Rejected => charge.settle_rejected(),
            Outcome::Failed => charge.settle_failed(),
            Outcome::Unsent => charge.settle_unanswered(),
        }
    }

    /// Leaves charged what a worker had open that is gone; what it still waits for is not reserved.
    pub(crate) fn abandon(&self, worker: u64) {
        let mut open = self.all_open();
        open.workers.remove(&worker);
        let of_worker = open.reservations.iter().filter(|(_, open)| open.worker == worker);
        let gone: Vec<u64> = of_worker.map(|(id, _)| *id).collect();
        let gone: Vec<Open> = gone.iter().filter_map(|id| open.reservations.remove(id)).collect();
        drop(open);
        gone.into_iter().for_each(|open| keep(open.charge));
    }

    /// Returns how many requests left later than their reservation covered.
    pub(crate) fn late_ones(&self) -> u64 {
        self.late.load(Ordering::Relaxed)
    }

    /// Returns how many reservations are open.
    pub(crate) fn open(&self) -> usize {
        self.all_open().reservations.len()
    }
}

fn keep(mut charge: Charge) {
    charge.start();
}

/// Charges what stands as spendable, unit by unit, and says whether anything was charged. What
/// stands may be more than is there, near a window's end, or less, before anybody has touched
/// it: so this is asked again until nothing is left.
fn charge_what_stands(handle: &Handle) -> bool {
    let mut charged = false;
    for standing in handle.standings() {
        let nothing = Claim::tokens(0).with(Unit::Requests, 0);
        let mut amount = standing.spendable;
        while amount > 0 {
            match handle.probe(nothing.with(standing.quota.unit(), amount)) {
                Ok(mut permit) => {
                    permit.start();
                    charged = true;
                    break;
                }
                Err(_) => amount /= 2,
            }
        }
    }
    charged
}

/// Keeps who may take the request first; never comes last.
fn keep_sooner(soonest: &mut Option<(Arc<Deployment>, Denied)>, deployment: &Arc<Deployment>, denied: &Denied) {
    let after = |denied: &Denied| denied.retry_after().unwrap_or(Duration::MAX);
    if soonest.as_ref().is_none_or(|(_, sooner)| after(denied) < after(sooner)) {
        *soonest = Some((deployment.clone(), denied.clone()));
    }
}

impl Asked {
    /// Reserves, and waits for nobody.
    fn now(&self, claim: Claim, observer: &Arc<dyn Observer>) -> Result<Charge, Denied> {
        let permit = self.deployment.handle.probe(claim)?.into_owned();
        Ok(self.charge(permit, observer))
    }

    /// Reserves, and waits for rights of peers.
    async fn soon(&self, observer: &Arc<dyn Observer>) -> Result<Charge, Denied> {
        let permit = self.deployment.handle.acquire(self.claim).tentative().await?.into_owned();
        Ok(self.charge(permit, observer))
    }

    fn charge(&self, permit: Permit<'static>, observer: &Arc<dyn Observer>) -> Charge {
        Charge::new(permit, self.deployment.meter.clone(), observer.clone(), &self.call)
    }
}

impl Deployment {
    /// Returns until when a request may leave whose reservation was made after `at`: as long
    /// as it is charged in every window that it can arrive in within an edge, in Unix time in
    /// seconds. A bucket sets an edge aside, which is halved between this and the arrival.
    fn until(&self, at: Timestamp) -> f64 {
        let until = self.handle.quotas().map(|quota| match quota.kind() {
            WindowKind::Bucket { .. } => at.plus(self.edge / 2),
            _ => quota.grid().window_at(at.plus(self.edge)).end().minus(self.edge),
        });
        until.min().unwrap_or(Timestamp::NEVER).unix_ms() as f64 / 1_000.0
    }

    /// Returns what a request asks of this deployment, and what is reserved for it.
    fn claim(&self, request: &Request) -> (Call, Claim) {
        let prompt = match self.meter.tokenizer() {
            Tokenizer::Bytes => request.bytes,
            Tokenizer::O200k => request.o200k,
            Tokenizer::Cl100k => request.cl100k,
        };
        let (cap, choices) = (request.cap, request.choices.max(1));
        let call = Call { model: String::new(), prompt, cap, choices, body: bytes::Bytes::new(), hide_usage: false };
        let claim = self.meter.claim(&call, &Prompts::new(&call));
        (call, claim)
    }
}

impl Declared {
    fn add_to(&self, builder: quotum::Builder) -> Result<quotum::Builder, String> {
        Ok(builder.deployment_with(&self.id, self.quotas()?, self.policy()?))
    }

    /// Returns the quotas of its limits.
    ///
    /// # Errors
    /// Says which limit cannot be kept.
    fn quotas(&self) -> Result<Vec<quotum::Quota>, String> {
        let kind = self.terms.kind.as_deref().unwrap_or("fixed");
        let kind = kind_of(kind, self.terms.parts, self.terms.burst).map_err(|why| self.wrong("kind", &why))?;
        let amounts = [self.tpm, self.rpm, self.itpm, self.otpm];
        let written = LIMITS.into_iter().zip(amounts).filter_map(|(limit, amount)| Some((limit, amount?)));
        let quotas = written.map(|((name, unit), amount)| {
            let quota = quotum::Quota::new(unit, amount, Duration::from_secs(60));
            quota.and_then(|quota| quota.of_kind(kind)).map_err(|error| self.wrong(name, &error.to_string()))
        });
        quotas.collect()
    }

    fn policy(&self) -> Result<Policy, String> {
        let usual = Policy::default();
        let duration = |name: &str, seconds: Option<f64>, usual: Duration| match seconds {
            None => Ok(usual),
            Some(seconds) => Duration::try_from_secs_f64(seconds)
                .map_err(|_| self.wrong(name, &format!("{seconds} is not a number of seconds"))),
        };
        let mode = match self.terms.mode {
            None | Some(Mode::Strict) => quotum::Mode::Strict,
            Some(Mode::Observe) => quotum::Mode::Observe,
            Some(Mode::Elastic { beta }) => {
                let beta = Portion::new(beta).map_err(|error| self.wrong("mode", &error.to_string()))?;
                quotum::Mode::Elastic { beta }
            }
        };
        Ok(Policy {
            mode,
            wait: duration("wait", self.terms.wait, usual.wait)?,
            edge: match self.terms.edge {
                Some(_) => duration("edge", self.terms.edge, EDGE)?,
                None => self.quotas()?.iter().fold(EDGE, |edge, quota| edge.min(quota.lead())),
            },
            limit_id: self.terms.limit_id.clone(),
        })
    }

    /// Returns what this deployment's prompts are counted with.
    pub(crate) fn tokenizer(&self) -> Tokenizer {
        match self.terms.tokenizer {
            Some(message::Tokenizer::Bytes) => Tokenizer::Bytes,
            Some(message::Tokenizer::O200k) => Tokenizer::O200k,
            Some(message::Tokenizer::Cl100k) => Tokenizer::Cl100k,
            None => Tokenizer::of_model(&self.model),
        }
    }

    fn metering(&self) -> Metering {
        let usual = Metering::default();
        let Self { terms, .. } = self;
        Metering {
            reserve: match terms.reserve {
                None | Some(Reserve::Auto) => quotum::layer::Reserve::Auto,
                Some(Reserve::Bound) => quotum::layer::Reserve::Bound,
                Some(Reserve::Learned) => quotum::layer::Reserve::Learned,
            },
            unreported: match terms.unreported {
                None | Some(Unreported::Reserved) => quotum::layer::Unreported::Reserved,
                Some(Unreported::Counted) => quotum::layer::Unreported::Counted,
            },
            tokenizer: self.tokenizer(),
            default_max_tokens: terms.default_max_tokens.unwrap_or(usual.default_max_tokens),
            ..usual
        }
    }

    fn wrong(&self, field: &str, why: &str) -> String {
        format!("deployment {:?}: {field}: {why}", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::message::Terms;
    use super::*;

    fn declared(terms: Terms) -> Declared {
        // So slow that no slice of a bucket ends while this runs: one takes two hours.
        let amount = Some(100);
        Declared { id: "gpt".into(), tpm: amount, rpm: amount, itpm: amount, otpm: amount, model: String::new(), terms }
    }

    #[test]
    fn all_that_an_earlier_owner_may_have_spent_is_charged_whatever_the_kind() {
        let bucket = Terms { kind: Some("bucket".into()), burst: Some(100_000), ..Terms::default() };
        let elastic = Terms { mode: Some(Mode::Elastic { beta: 0.1 }), ..bucket.clone() };
        let sliding = Terms { kind: Some("sliding".into()), ..Terms::default() };
        for terms in [bucket, elastic, sliding, Terms::default()] {
            let book = Book::new(&[declared(terms.clone())], Arc::new(())).expect("it can be kept");
            book.forfeit();
            let handle = book.limiter().handle("gpt").expect("it was declared");
            // A window of a minute may have ended meanwhile, and the next one is the new owner's.
            let standings = handle.standings().into_iter();
            let left: Vec<_> = standings.filter(|standing| standing.used > 0).collect();
            assert!(left.len() == 4 || terms.burst.is_none(), "{left:?}");
            assert!(left.iter().all(|standing| standing.spendable == 0), "{left:?}");
            assert!(left.iter().all(|standing| standing.used >= standing.limit), "{left:?}");
        }
    }
}
