//! The rivals: how each of them decides.
//!
//! Knows how a pod asks for tokens and gives back what it did not use. Must not know the
//! arrivals or what the judge counts. The invariant it keeps: each is used as its
//! documentation says, with the limit that makes its fleet right if it can be.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use limitador::limit::{Context, Limit, Namespace};
use limitador::reservation::ReservationId;
use quotum::cluster::discovery::{Answer, Scripted};
use quotum::cluster::{Cluster, ClusterConfig, Seeds, UdpNet};
use quotum::ledger::Directory;
use quotum::{Claim, Handle, Limiter, Permit, Quota};
use quotum_bench::{Failure, Process, Signal, free_addrs};

use super::redis;
use super::trace::{Extent, LIMIT, PODS};

/// The pods that are there from the start.
const FIRST: usize = PODS - 1;

/// What a pod holds for a request that was admitted.
#[derive(Debug)]
pub(crate) enum Held {
    /// What cannot be given back.
    Nothing,
    /// Of that window.
    Of(u64),
    Permit(Permit<'static>),
    /// By limitador's id.
    Reserved(Option<ReservationId>),
}

/// A fleet that decides.
pub(crate) enum Rival {
    /// A counter in each pod, with that part of the limit.
    Split { limit: u64, pods: Vec<Mutex<(u64, u64)>> },
    /// limitador's own counters in each pod, with the whole limit.
    Limitador { namespace: Namespace, pods: Vec<limitador::RateLimiter> },
    /// One counter for all. Without it, everything is let through or nothing.
    Redis { pods: Vec<redis::Client>, at: SocketAddr, server: Mutex<Option<Process>>, dies: bool, open: bool },
    /// Rights, given from pod to pod over UDP.
    Quotum(Fleet),
}

/// Pods that share rights.
pub(crate) struct Fleet {
    addrs: Vec<SocketAddr>,
    directories: Vec<Arc<Scripted>>,
    pods: Vec<OnceLock<Handle>>,
    clusters: Mutex<Vec<Cluster>>,
    window: Duration,
}

impl Rival {
    pub(crate) fn split(parts: u64) -> Self {
        Self::Split { limit: LIMIT / parts, pods: (0..PODS).map(|_| Mutex::default()).collect() }
    }

    pub(crate) fn limitador(extent: Extent) -> Self {
        let namespace = Namespace::from("m");
        let pod = |_| {
            let pod = limitador::RateLimiter::new(16);
            pod.add_limit(Limit::new(namespace.clone(), LIMIT, extent.window.as_secs(), [], []));
            pod
        };
        Self::Limitador { pods: (0..PODS).map(pod).collect(), namespace }
    }

    /// `None` if there is no such server here.
    pub(crate) fn redis(dies: bool, open: bool) -> Result<Option<Self>, Failure> {
        let at = free_addrs(1)?[0];
        let Some(server) = redis::server(at)? else { return Ok(None) };
        let pods = (0..PODS).map(|_| redis::Client::new(at)).collect();
        Ok(Some(Self::Redis { pods, at, server: Mutex::new(Some(server)), dies, open }))
    }

    pub(crate) async fn quotum(extent: Extent) -> Result<Self, Failure> {
        let fleet = Fleet {
            addrs: free_addrs(PODS)?,
            directories: (0..PODS).map(|_| Arc::new(Scripted::new(Directory::Name))).collect(),
            pods: (0..PODS).map(|_| OnceLock::new()).collect(),
            clusters: Mutex::default(),
            window: extent.window,
        };
        for pod in 0..FIRST {
            fleet.directories[pod].say(Ok(Answer::listing(fleet.addrs[..FIRST].iter().copied())));
        }
        for pod in 0..FIRST {
            fleet.start(pod).await?;
        }
        // Until each has a share, and a path to the others.
        for pod in &fleet.pods[..FIRST] {
            let spends = || pod.get().is_some_and(|pod| pod.try_acquire(Claim::tokens(LIMIT / 4)).is_ok());
            while !spends() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        Ok(Self::Quotum(fleet))
    }

    /// Decides about a request at a pod. `window` is the number of the running one.
    pub(crate) async fn admit(&self, pod: usize, window: u64, tokens: u64, keep: Duration) -> Option<Held> {
        match self {
            Self::Split { limit, pods } => {
                let mut pod = pods[pod].lock().unwrap_or_else(PoisonError::into_inner);
                if pod.0 != window {
                    *pod = (window, 0);
                }
                (pod.1 + tokens <= *limit).then(|| {
                    pod.1 += tokens;
                    Held::Of(window)
                })
            }
            Self::Limitador { namespace, pods } => {
                let answer = pods[pod].reserve(namespace, &Context::default(), tokens, None).ok()?;
                (!answer.limited).then_some(Held::Reserved(answer.reservation_id))
            }
            Self::Redis { pods, open, .. } => match pods[pod].reserve(window, LIMIT, tokens, keep).await {
                Ok(fits) => fits.then_some(Held::Of(window)),
                Err(_) => open.then_some(Held::Nothing),
            },
            Self::Quotum(fleet) => {
                let permit = fleet.pods[pod].get()?.acquire(Claim::tokens(tokens)).await.ok()?;
                Some(Held::Permit(permit.into_owned()))
            }
        }
    }

    /// Gives back what a request did not use.
    pub(crate) fn settle(&self, pod: usize, held: Held, reserved: u64, used: u64) {
        match (self, held) {
            (Self::Split { pods, .. }, Held::Of(window)) => {
                let mut pod = pods[pod].lock().unwrap_or_else(PoisonError::into_inner);
                if pod.0 == window {
                    pod.1 -= reserved - used;
                }
            }
            (Self::Redis { pods, .. }, Held::Of(window)) => pods[pod].give_back(window, reserved - used),
            (Self::Limitador { namespace, pods }, Held::Reserved(id)) => {
                // It fails only for storage that is elsewhere.
                let _ = pods[pod].commit_reservation(namespace, &Context::default(), id.as_ref(), used);
            }
            (_, Held::Permit(permit)) => permit.settle(used),
            (_, Held::Of(_) | Held::Nothing | Held::Reserved(_)) => {}
        }
    }

    /// What happens to the fleet while it is asked, in its own time.
    pub(crate) async fn live(&self, extent: Extent) -> Result<(), Failure> {
        match self {
            Self::Redis { at, server, dies: true, .. } => {
                let away = f64::from(extent.windows) / 4.0;
                tokio::time::sleep(extent.at(away + 0.3)).await;
                let killed = server.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(killed) = killed {
                    killed.signal(Signal::KILL)?;
                }
                tokio::time::sleep(extent.at(away)).await;
                let again = redis::server(*at)?;
                *server.lock().unwrap_or_else(PoisonError::into_inner) = again;
                Ok(())
            }
            Self::Quotum(fleet) => {
                tokio::time::sleep(extent.joins().saturating_sub(Duration::from_millis(500))).await;
                // It is listed before it looks; the others are told a second later, as by a name.
                for directory in &fleet.directories[..FIRST] {
                    directory.then(Duration::from_secs(1), Ok(Answer::listing(fleet.addrs.iter().copied())));
                }
                fleet.directories[FIRST].say(Ok(Answer::listing(fleet.addrs.iter().copied())));
                fleet.start(FIRST).await
            }
            _ => Ok(()),
        }
    }

    /// Ends what runs by itself.
    pub(crate) async fn end(self) {
        if let Self::Quotum(fleet) = self {
            let clusters = std::mem::take(&mut *fleet.clusters.lock().unwrap_or_else(PoisonError::into_inner));
            for cluster in clusters {
                cluster.leave().await;
            }
        }
    }
}

impl Fleet {
    async fn start(&self, pod: usize) -> Result<(), Failure> {
        let limiter = Limiter::builder().deployment("m", [Quota::tokens(LIMIT).per(self.window)]).build()?;
        let config = ClusterConfig {
            node: format!("pod-{pod}"),
            listen: self.addrs[pod],
            ..ClusterConfig::new(Seeds::By(self.directories[pod].clone()))
        };
        let cluster = Cluster::join(&limiter, config, UdpNet).await?;
        self.clusters.lock().unwrap_or_else(PoisonError::into_inner).push(cluster);
        let _ = self.pods[pod].set(limiter.handle("m")?);
        Ok(())
    }
}
