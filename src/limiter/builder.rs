//! Building a limiter: which deployments, with which quotas, applied how.
//!
//! Knows what a valid configuration is. Must not know how a decision is reached. The
//! invariant it keeps: a limiter that exists has no zero quota, no duplicate id, and no
//! limit that two deployments understand differently.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Clock, ClockSource, Core, Inner, Limiter};
use crate::ledger::{Ledger, Mode, Quota, ReplicaId, WindowKind};

/// How a deployment's limits are applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What the limit promises. Deployments that share a limit must have one mode.
    pub mode: Mode,
    /// How long [`Handle::acquire`](crate::Handle::acquire) waits for rights from peers: two to three round trips
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
    node: String,
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

    /// Names the node this limiter runs on, for [`Status::node`](crate::Status). A cluster that is
    /// joined brings its own name.
    #[must_use]
    pub fn node(mut self, node: impl Into<String>) -> Self {
        self.node = node.into();
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
    pub fn build(mut self) -> Result<Limiter, BuildError> {
        let (clock, seed, node) = (self.clock.take(), self.seed, std::mem::take(&mut self.node));
        let deployments = self.settled()?;
        let clock = clock.map_or(ClockSource::System, ClockSource::Injected);
        let now = clock.now();
        let seed = match seed {
            Some(seed) => seed,
            None => getrandom::u64().map_err(|_| BuildError::NoEntropy)?,
        };
        let ledger = Ledger::new(ReplicaId::new(now, u128::from(seed)), &node, seed, now);
        let core = Core {
            ledger,
            waiters: BTreeMap::new(),
            known: BTreeMap::new(),
            pauses: BTreeMap::new(),
            driver: None,
            parked: false,
        };
        core.check_room(&deployments)?;
        let inner = Arc::new(Inner { clock, core: Mutex::new(core) });
        let handles = Arc::new(inner.lock().apply(&inner, deployments));
        Ok(Limiter { inner, handles })
    }

    /// Checks everything, before anything is built or changed.
    pub(super) fn settled(self) -> Result<BTreeMap<String, Settled>, BuildError> {
        let mut deployments = BTreeMap::new();
        let mut limits: BTreeMap<String, (String, Vec<Quota>, Mode)> = BTreeMap::new();
        for (id, mut quotas, policy) in self.deployments {
            quotas.sort_unstable();
            check(&id, &quotas, &policy)?;
            let limit = policy.limit_id.clone().unwrap_or_else(|| id.clone());
            let known = limits.entry(limit.clone());
            let (first, theirs, mode) = known.or_insert_with(|| (id.clone(), quotas.clone(), policy.mode));
            if *theirs != quotas {
                return Err(BuildError::SharedLimit { limit, first: first.clone(), second: id });
            }
            if *mode != policy.mode {
                let modes = (*mode, policy.mode);
                return Err(BuildError::SharedMode { limit, first: first.clone(), second: id, modes });
            }
            if deployments.insert(id.clone(), Settled { limit, quotas, policy }).is_some() {
                return Err(BuildError::DuplicateDeployment(id));
            }
        }
        Ok(deployments)
    }
}

/// A deployment that was checked.
pub(super) struct Settled {
    /// The name of its limit.
    pub(super) limit: String,
    pub(super) quotas: Vec<Quota>,
    pub(super) policy: Policy,
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
        let bucket = matches!(quota.kind(), WindowKind::Bucket { .. });
        if bucket && matches!(policy.mode, Mode::Sum { .. }) {
            return Err(BuildError::SumOfBucket { deployment: id.to_owned(), quota: *quota });
        }
        if policy.edge > quota.lead() {
            return Err(BuildError::Edge { deployment: id.to_owned(), edge: policy.edge, most: quota.lead() });
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
    /// Deployments that share a limit promise different things of it.
    #[error(
        "deployments {first:?} and {second:?} share limit {limit:?} in different modes, {} and {}; make them equal",
        modes.0, modes.1
    )]
    SharedMode {
        /// The limit.
        limit: String,
        /// One deployment.
        first: String,
        /// The other.
        second: String,
        /// Their modes.
        modes: (Mode, Mode),
    },
    /// A bucket's rights live on from slice to slice, and `sum` has none.
    #[error(
        "deployment {deployment:?} has a bucket, {quota}, in the mode sum, which keeps no rights over; use strict or elastic, or another kind of window"
    )]
    SumOfBucket {
        /// Which deployment.
        deployment: String,
        /// Its bucket.
        quota: Quota,
    },
    /// There are more quotas than a limiter keeps.
    #[error(
        "there is room for {most} quotas, and {needed} would need it; configure fewer, or wait until the windows \
        of those that were just removed have ended"
    )]
    TooManyQuotas {
        /// Those configured, and those of before whose windows are still open.
        needed: usize,
        /// [`MAX_QUOTAS`](crate::ledger::MAX_QUOTAS).
        most: usize,
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
