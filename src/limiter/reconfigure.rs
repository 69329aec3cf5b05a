//! Changing what is limited while handles and permits are out.
//!
//! Knows how a deployment that changed is followed by its successor. Must not know when a
//! limit switches: the ledger says so. The invariant it keeps: a handle kept from before
//! reserves as its deployment is configured now, and a permit is settled into exactly what
//! it was charged to.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use super::builder::Settled;
use super::{BuildError, Builder, Core, Deployment, Handle, Handles, Inner, Limiter, Pause};
use crate::ledger::{MAX_QUOTAS, Quota};

/// Every deployment that anybody may still have a handle of, by id: the latest one.
pub(super) type Known = BTreeMap<String, Weak<Deployment>>;

impl Limiter {
    /// Changes the deployments, their quotas and policies, and returns the limiter with the
    /// new ones. It is the same replica: the clock and the seed of `builder` are not used.
    ///
    /// Handles and clones from before stay good: they reserve as their deployment is
    /// configured now, at the price of a few nanoseconds until they are looked up again. A
    /// deployment that is configured no more goes on being limited as it was, for whoever
    /// still has its handle. Permits settle into what they were charged to.
    ///
    /// A policy changes at once. A quota changes at a window start, the first one that
    /// nobody can have touched here: up to one window and 2 s later. Until then the old one
    /// holds, so that in a fleet whose replicas are reconfigured one after another nobody
    /// spends more than the larger limit. A quota of a unit that was not limited starts with
    /// its next window: one per day at the next midnight. A quota that none of its unit follows
    /// ends at once if nothing is still to start, and otherwise with the start of the last of
    /// what is: a deployment that is told to count requests instead of tokens, or prompts and
    /// outputs apart, is never without a limit. [`LimitStatus::switches`] lists what is still to
    /// come, and until when what holds.
    ///
    /// A deployment that is new is limited at once, by this replica's share of the running
    /// window. A replica that joined its fleet in the course of a day has no share of what had
    /// been dealt of that day before, and none at all of a day that comes
    /// [at once](Quota::at_once): nothing until midnight but what peers give it.
    ///
    /// [`LimitStatus::switches`]: crate::ledger::LimitStatus::switches
    ///
    /// # Errors
    /// Says which deployment is wrong and how; nothing has changed.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use quotum::{Claim, Limiter, Quota};
    ///
    /// let limiter = Limiter::builder().deployment("gpt", [Quota::tokens(1_000).per_minute()]).build()?;
    /// let limiter = limiter.reconfigure(Limiter::builder()
    ///     .deployment("gpt", [Quota::tokens(2_000).per_minute()])
    ///     .deployment("claude", [Quota::tokens(500).per_minute()]))?;
    /// limiter.handle("claude")?.try_acquire(Claim::tokens(500))?.settle(500);
    /// assert_eq!(limiter.status().limits[0].switches[0].to, Quota::tokens(2_000).per_minute());
    /// # Ok(())
    /// # }
    /// ```
    pub fn reconfigure(&self, builder: Builder) -> Result<Self, BuildError> {
        let deployments = builder.settled()?;
        let mut core = self.inner.lock();
        core.check_room(&deployments)?;
        // What was decided until now was decided by the old limits.
        let mut wake = core.take_served();
        let handles = core.apply(&self.inner, deployments);
        wake.extend(core.take_served());
        drop(core);
        wake.into_iter().for_each(std::task::Waker::wake);
        Ok(Self { inner: Arc::clone(&self.inner), handles: Arc::new(handles) })
    }
}

impl Core {
    /// Says whether there is room for all quotas of these deployments.
    pub(super) fn check_room(&self, deployments: &BTreeMap<String, Settled>) -> Result<(), BuildError> {
        let limits: BTreeMap<&str, &[Quota]> =
            deployments.values().map(|settled| (settled.limit.as_str(), &settled.quotas[..])).collect();
        match self.ledger.places_with(limits) {
            needed if needed > MAX_QUOTAS => Err(BuildError::TooManyQuotas { needed, most: MAX_QUOTAS }),
            _ => Ok(()),
        }
    }

    /// Makes these the deployments, and returns their handles.
    pub(super) fn apply(&mut self, inner: &Arc<Inner>, deployments: BTreeMap<String, Settled>) -> Handles {
        let now = inner.clock.now();
        let mut limits = BTreeMap::new();
        for deployment in deployments.values() {
            if !limits.contains_key(&deployment.limit) {
                let configured =
                    self.ledger.configure(&deployment.limit, &deployment.quotas, deployment.policy.mode, now);
                limits.insert(deployment.limit.clone(), configured);
            }
        }
        self.ledger.configure_only(&limits.values().map(|(limit, _)| *limit).collect::<Vec<_>>());
        let mut handles = Handles::default();
        for (id, deployment) in deployments {
            let (limit, counters) = limits[&deployment.limit].clone();
            let before = self.known.get(&id).and_then(Weak::upgrade);
            let same = before.as_ref().is_some_and(|before| {
                before.limit == limit && Arc::ptr_eq(&before.counters, &counters) && before.policy == deployment.policy
            });
            let handle = match before {
                Some(deployment) if same => Handle { deployment },
                before => {
                    let inner = Arc::clone(inner);
                    let Settled { limit: name, policy, .. } = deployment;
                    let pause = self.pauses.entry(name.clone()).or_insert_with(|| Arc::new(Pause::new(&name)));
                    let pause = Arc::clone(pause);
                    let next = Deployment::new(inner, id.clone(), name, limit, counters, policy, pause);
                    let handle = Handle { deployment: Arc::new(next) };
                    if let Some(before) = before {
                        before.retire(handle.clone());
                    }
                    handle
                }
            };
            self.known.insert(id.clone(), Arc::downgrade(&handle.deployment));
            handles.insert(id, handle);
        }
        self.follow();
        self.pauses.retain(|_, pause| Arc::strong_count(pause) > 1);
        handles
    }

    /// Gives every deployment whose limit is checked against other quotas now a successor.
    pub(super) fn follow(&mut self) {
        let ledger = &self.ledger;
        self.known.retain(|_, known| {
            let Some(deployment) = known.upgrade() else { return false };
            let counters = ledger.counters_of(deployment.limit);
            if !Arc::ptr_eq(&deployment.counters, &counters) {
                let next = Handle { deployment: Arc::new(deployment.charging(counters)) };
                *known = Arc::downgrade(&next.deployment);
                deployment.retire(next);
            }
            true
        });
    }
}

impl Deployment {
    /// The same deployment, charged to other quotas.
    pub(super) fn charging(&self, counters: Arc<[super::Counter]>) -> Self {
        let (inner, pause) = (Arc::clone(&self.inner), Arc::clone(&self.pause));
        Self::new(inner, self.id.clone(), self.name.clone(), self.limit, counters, self.policy.clone(), pause)
    }

    /// From now on `next` decides. Whoever is about to take from the old wallets still may:
    /// nothing of what is new is in force yet.
    fn retire(&self, next: Handle) {
        let _ = self.successor.set(next);
        // An edge that no window is longer than: every take goes out of line.
        self.hot_edge_ms.store(u64::MAX, Ordering::Release);
    }
}
