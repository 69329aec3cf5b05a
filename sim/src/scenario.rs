//! A scenario draws a plan from a seed: fleet, directory, network, clocks, workload,
//! faults, and what must hold.
//!
//! Knows what a run is made of. Must not know how a layer carries it out. The invariant it
//! keeps: a plan is a function of the scenario's name and the seed, and names every
//! condition of the promise (README, the promise) that it breaks.

use std::time::Duration;

use quotum::ledger::{Directory, FirstWindow, OnSilence, RosterSettings, WindowKind};
use quotum::{Mode, Quota};

use crate::Micros;
use crate::fault::Scheduled;
use crate::workload::Workload;

/// A named family of runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    /// How many of the seeds asked for are run: all, or at most so many.
    pub(crate) most_seeds: u64,
    /// Every how many-th seed is run twice.
    pub(crate) twice_every: u64,
    pub(crate) draw: fn(u64) -> Plan,
    pub(crate) requires: Requires,
}

/// What a sweep of at least 50 seeds must show.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Requires {
    /// Mean efficiency against the undivided central counter.
    pub(crate) efficiency: f64,
    /// Mean efficiency against a counter per component.
    pub(crate) efficiency_of_components: f64,
    /// Share of requests refused although the fleet had enough.
    pub(crate) wrongful: Option<f64>,
    /// Whether something must have been uncovered in some seed.
    pub(crate) uncovered: bool,
    /// What must have been reached, and in which share of seeds.
    pub(crate) sometimes: &'static [(&'static str, f64)],
}

impl Scenario {
    /// Draws the plan of a seed.
    pub(crate) fn plan(&self, seed: u64) -> Plan {
        Plan { scenario: self.name, ..(self.draw)(seed) }
    }

    /// Returns the layer that carries its plans out, the same for every seed.
    pub(crate) fn layer(&self) -> Layer {
        self.plan(1).layer
    }
}

impl Requires {
    pub(crate) const NOTHING: Self =
        Self { efficiency: 0.0, efficiency_of_components: 0.0, wrongful: None, uncovered: false, sometimes: &[] };
}

/// What carries a plan out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    /// Ledgers driven by hand, without I/O.
    Events,
    /// Whole pods: the cluster loop, chitchat, sealed frames, in turmoil.
    Turmoil,
}

impl Layer {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Turmoil => "turmoil",
        }
    }

    pub(crate) fn named(name: &str) -> Option<Self> {
        [Self::Events, Self::Turmoil].into_iter().find(|layer| layer.name() == name)
    }
}

/// One run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) scenario: &'static str,
    pub(crate) seed: u64,
    pub(crate) layer: Layer,
    pub(crate) quotas: Vec<Quota>,
    pub(crate) mode: Mode,
    /// The local midnights of the run, by the calendar, where a quota counts days.
    pub(crate) midnights: Vec<u64>,
    /// Whether replicas start without the deployment, and learn of it by a change of limits.
    pub(crate) unknown: bool,
    /// How many slots there are at the start.
    pub(crate) slots: usize,
    /// Listed slots at the end of the list in which no process ever starts.
    pub(crate) ghosts: usize,
    /// Within which time the first processes start.
    pub(crate) start_spread: Micros,
    /// Where in a window the run starts.
    pub(crate) phase: Micros,
    /// Faults happen until here.
    pub(crate) storm: Micros,
    /// The run ends here; from `storm` on the fleet must recover.
    pub(crate) end: Micros,
    pub(crate) interval: Duration,
    pub(crate) wait: Duration,
    pub(crate) edge: Duration,
    pub(crate) settings: RosterSettings,
    /// Whether processes bind their slots exclusively, so that a restart is a proof.
    pub(crate) exclusive: bool,
    /// How long after a death the headless name still lists it.
    pub(crate) delisted_after: Micros,
    /// How old the directory's answers are, at most.
    pub(crate) directory_lag: Micros,
    /// How long a leaving replica waits for requests in flight.
    pub(crate) drain: Micros,
    /// How far clocks are from true time, at most, at the start and after every step.
    pub(crate) clock_range_ms: u64,
    pub(crate) drift_ppm: u64,
    pub(crate) network: Network,
    pub(crate) workload: Workload,
    /// The load of the calm phase, as a part of the storm's.
    pub(crate) calm_load: f64,
    pub(crate) faults: Vec<Scheduled>,
    pub(crate) promise: Promise,
    /// From when on processes start with which keys, the first of each sealing; empty: one for all.
    pub(crate) keys: Vec<(Micros, &'static [u8])>,
    /// From when on processes start with which newest wire version: one below this release's makes
    /// them pods of the release before. Empty: all are of this one.
    pub(crate) releases: Vec<(Micros, u8)>,
    /// Whether frames are really sealed and opened; else the codec alone is exercised.
    pub(crate) sealed: bool,
    /// When efficiency is measured: whole windows that start after this.
    pub(crate) measure_from: Option<Micros>,
    /// Whether one more replica dies shortly before the end.
    pub(crate) finale: bool,
    /// Whether the end of the run checks that everybody recovered.
    pub(crate) recovers: bool,
    /// What is around the pods' proxies, where callers reach them over simulated TCP; else
    /// callers ask the limiter itself. Only whole pods have a proxy.
    pub(crate) http: Option<Http>,
}

/// Callers and upstreams of proxies.
#[derive(Clone, Debug)]
pub(crate) struct Http {
    /// How many upstreams serve the one model, each behind a deployment with the plan's limit:
    /// the next one is asked when the one before does not take a request.
    pub(crate) upstreams: usize,
    /// Share of requests that ask for a stream.
    pub(crate) streams: f64,
    /// The most of an answer's time that passes before its first byte.
    pub(crate) before_first: f64,
    /// Share of streams that go silent in the middle.
    pub(crate) stalls: f64,
    /// Share of answers that never begin.
    pub(crate) hangs: f64,
    /// How long callers still send to a pod that was told to leave.
    pub(crate) lag: Micros,
    /// The pods' settings of these names.
    pub(crate) linger: Duration,
    pub(crate) drain: Duration,
    pub(crate) first_byte: Duration,
    pub(crate) idle: Duration,
    /// From here on nobody asks.
    pub(crate) quiet_from: Micros,
    /// Whether upstreams fail, so that answers may.
    pub(crate) upstream_fails: bool,
}

/// The network when nothing is wrong.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Network {
    pub(crate) delay: (Micros, Micros),
    /// Share of datagrams that take ten times as long.
    pub(crate) tail: f64,
    pub(crate) loss: f64,
}

impl Network {
    /// A cluster network: 0.5 to 2.5 ms one way.
    pub(crate) const LAN: Self = Self { delay: (500, 2_500), tail: 0.01, loss: 0.0 };
}

/// What must hold in every window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Promise {
    /// Not a token over.
    Zero,
    /// A condition is broken, and so much of the limit over is the stated bound.
    Bounded {
        /// Which condition.
        broken: &'static str,
        /// The bound, as a part of the limit.
        limits: f64,
    },
}

impl Promise {
    /// Returns how much over a limit of `amount` the promise allows.
    pub(crate) fn allows(self, amount: u64) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Bounded { limits, .. } => (limits * amount as f64) as u64,
        }
    }
}

impl Plan {
    /// Returns the length of the window of the first quota.
    pub(crate) fn window(&self) -> Micros {
        self.quotas[0].window().ms().get() * 1_000
    }

    /// Says whether a part of an amount stays out of reach that a central counter has.
    pub(crate) fn is_plain(&self) -> bool {
        self.quotas.iter().all(|quota| quota.kind() == WindowKind::Fixed)
    }

    pub(crate) fn is_named(&self) -> bool {
        self.settings.directory == Directory::Name
    }
}

/// Settings under which the promise is zero, whatever dies.
pub(crate) fn strict_settings(directory: Directory, absent_for: Duration) -> RosterSettings {
    RosterSettings {
        directory,
        absent_for,
        on_silence: OnSilence::Closed,
        patience: Duration::from_secs(30),
        first_window: FirstWindow::Wait,
    }
}
