//! One incarnation of a replica: a real limiter, and who drives it.
//!
//! Knows what a process holds and what its clock shows. Must not know when anything
//! happens. The invariant it keeps: what a process held dies with it; what clients and the
//! upstream saw of it does not.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use quotum::ledger::ReplicaId;
use quotum::{Clock, Denied, Handle, Limiter, Permit, Timestamp};

use super::events::Hand;
use super::pods::Pod;
use crate::Micros;
use crate::workload::Request;

pub(super) use crate::catalogue::EPOCH_MS;

/// One run of one process.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) slot: usize,
    pub(super) id: ReplicaId,
    pub(super) addr: SocketAddr,
    pub(super) born: Micros,
    pub(super) died: Option<Micros>,
    pub(super) leaving: Option<Micros>,
    /// The newest wire version that it reads, which tells its release.
    pub(super) wire: u8,
    /// How many datagrams of a newer one reached it that were for another process at its address.
    pub(super) misdirected: u64,
    pub(super) offset_ms: i64,
    pub(super) drift_ppm: i64,
    pub(super) paused: bool,
    /// Since when it is not paused.
    pub(super) free_since: Micros,
    /// How far the clock is behind until the first look: a canary's.
    pub(super) behind_ms: i64,
    pub(super) process: Option<Process>,
    /// What it owned when it died: quota, window, rights.
    pub(super) left_behind: Vec<(usize, u64, u64)>,
    /// Whether it said goodbye, so that everybody can know that it is gone.
    pub(super) left_in_order: bool,
    /// Whether a new process starts in its slot when it has gone.
    pub(super) respawns: bool,
    /// The latest that its clock has shown.
    pub(super) latest_ms: u64,
    /// Offered to it and refused by it although the fleet had enough, since the calm.
    pub(super) calm_wrongful: u64,
    pub(super) calm_offered: u64,
}

/// What dies with the process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) limiter: Limiter,
    /// Whether it has been told of the deployment.
    pub(super) knows: bool,
    /// The second worker of a canary.
    pub(super) twin: Option<Limiter>,
    pub(super) handle: Handle,
    pub(super) clock: SharedClock,
    pub(super) parked: BTreeMap<u64, Waiting>,
    pub(super) flights: BTreeMap<u64, Flight>,
    pub(super) woken: Woken,
    pub(super) drive: Drive,
}

/// Who drives a process's ledger.
#[derive(Debug)]
pub(super) enum Drive {
    /// The world, event by event.
    Hand(Box<Hand>),
    /// The product's own loop.
    Pod(Pod),
}

impl Process {
    /// Whether its ledger has an identity. Before, nobody is served.
    pub(super) fn is_running(&self) -> bool {
        match &self.drive {
            Drive::Hand(_) => true,
            Drive::Pod(pod) => pod.is_running(),
        }
    }
}

/// An admitted request.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) permit: Permit<'static>,
    pub(super) request: Request,
    pub(super) arrived_ms: u64,
    pub(super) ends: Micros,
}

type Reserving = Pin<Box<dyn Future<Output = Result<Permit<'static>, Denied>>>>;

/// A request that may wait.
pub(super) struct Waiting {
    pub(super) request: Request,
    pub(super) since: Micros,
    future: Reserving,
    waker: Waker,
}

impl Waiting {
    /// Asks, without looking at the answer yet.
    pub(super) fn ask(handle: &Handle, claim: quotum::Claim, request: Request, since: Micros, wake: Arc<Bell>) -> Self {
        let handle = handle.clone();
        let future = Box::pin(async move { handle.acquire(claim).await.map(Permit::into_owned) });
        Self { request, since, future, waker: Waker::from(wake) }
    }

    /// Looks at the answer.
    pub(super) fn poll(&mut self) -> Poll<Result<Permit<'static>, Denied>> {
        self.future.as_mut().poll(&mut Context::from_waker(&self.waker))
    }
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiting").field("request", &self.request).finish_non_exhaustive()
    }
}

/// The tickets whose answer is there, in the order in which they were woken.
#[derive(Clone, Debug, Default)]
pub(super) struct Woken(Arc<Mutex<Vec<u64>>>);

impl Woken {
    pub(super) fn take(&self) -> Vec<u64> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn bell(&self, ticket: u64) -> Arc<Bell> {
        Arc::new(Bell { ticket, woken: self.clone() })
    }
}

/// Wakes one request.
#[derive(Debug)]
pub(super) struct Bell {
    ticket: u64,
    woken: Woken,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.woken.0.lock().unwrap_or_else(PoisonError::into_inner).push(self.ticket);
    }
}

/// A clock that is set by hand.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedClock(Arc<AtomicU64>);

impl SharedClock {
    pub(super) fn set(&self, ms: u64) {
        self.0.store(ms, Ordering::Relaxed);
    }
}

impl Clock for SharedClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_ms(self.0.load(Ordering::Relaxed))
    }
}

impl Replica {
    /// Returns what this replica's clock shows at true time `true_us` since the epoch of
    /// the run, `at` after the run's start.
    pub(super) fn local_ms(&self, at: Micros, phase: Micros) -> u64 {
        let drifted = (at + phase) as i64 + (at as i64 / 1_000_000) * self.drift_ppm;
        (EPOCH_MS as i64 + drifted / 1_000 + self.offset_ms - self.behind_ms) as u64
    }

    pub(super) fn is_alive(&self) -> bool {
        self.process.is_some()
    }

    /// Returns whether clients are sent here.
    pub(super) fn serves(&self) -> bool {
        self.process.as_ref().is_some_and(Process::is_running) && self.leaving.is_none()
    }
}
