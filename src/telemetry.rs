//! What the pod tells its operator: the names of all metrics, and its status.
//!
//! Knows every metric's name, unit and labels. Must not know who scrapes. The invariant
//! it keeps: labels are ids, addresses and reasons; no credential and no prompt text
//! ever gets here.

mod status;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

pub use self::status::{limit_json, status_json};
use crate::Status;
use crate::layer::Observer;

/// One decision in so many is timed.
const DECISION_SAMPLE: u64 = 4;

/// How many timed decisions are remembered.
const DECISIONS: usize = 4_096;

/// What the proxy measures itself; the rest is read from the limiter when scraped.
#[derive(Debug)]
pub struct Telemetry {
    waits: Histogram,
    estimate_errors: Family<Labels, Histogram, fn() -> Histogram>,
    unreported: Family<Labels, Counter>,
    reloads: Family<Labels, Counter>,
    config_refused: Gauge,
    turned_away: Family<Labels, Counter>,
    answered: Family<Labels, Counter>,
    /// Requests that were not sent for the upstream's sake, by deployment and reason.
    refused: Mutex<BTreeMap<(String, &'static str), u64>>,
    decisions: AtomicU64,
    decision_ns: Mutex<Vec<u64>>,
    traffic: Mutex<Vec<Traffic>>,
    fallback: Mutex<Option<bool>>,
}

/// What gossip has carried since the start in one of its two ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// The label: `"direct"` or `"chitchat"`.
    pub way: &'static str,
    /// Datagrams sent.
    pub sent: u64,
    /// Their bytes, without IP and UDP headers.
    pub sent_bytes: u64,
    /// Datagrams received whose seal was good.
    pub received: u64,
    /// Their bytes, without IP and UDP headers.
    pub received_bytes: u64,
}

impl Default for Telemetry {
    fn default() -> Self {
        let reloads = Family::<Labels, Counter>::default();
        let estimate_errors: Family<_, _, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 2.0, 10.0]));
        // There from the start: of a series that begins with 1, Prometheus knows no increase.
        for result in ["changed", "refused"] {
            drop(reloads.get_or_create(&labels(&[("result", result)])));
        }
        for way in ["over", "under"] {
            drop(estimate_errors.get_or_create(&labels(&[("way", way)])));
        }
        Self {
            waits: Histogram::new([0.001, 0.002, 0.005, 0.010, 0.015, 0.020, 0.050, 0.100, 0.500, 1.0, 5.0]),
            estimate_errors,
            unreported: Family::default(),
            reloads,
            config_refused: Gauge::default(),
            turned_away: Family::default(),
            answered: Family::default(),
            refused: Mutex::default(),
            decisions: AtomicU64::new(0),
            decision_ns: Mutex::default(),
            traffic: Mutex::default(),
            fallback: Mutex::default(),
        }
    }
}

impl Telemetry {
    /// Returns one that has measured nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes how long an admitted or refused request was parked.
    pub fn waited(&self, wait: Duration) {
        self.waits.observe(wait.as_secs_f64());
    }

    /// Notes a request that no limit refused and that was not sent all the same.
    pub fn refused(&self, deployment: &str, why: &'static str) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        *refused.entry((deployment.to_owned(), why)).or_default() += 1;
    }

    /// Notes that the configuration was read again, and what came of it: `changed`, or `refused`.
    pub fn reloaded(&self, result: &'static str) {
        self.config_refused.set(i64::from(result == "refused"));
        self.reloads.get_or_create(&labels(&[("result", result)])).inc();
    }

    /// Notes what gossip has carried since the start; without it no traffic is rendered.
    pub fn carried(&self, traffic: Vec<Traffic>) {
        *self.traffic.lock().unwrap_or_else(PoisonError::into_inner) = traffic;
    }

    /// Notes whether the pods are looked for in a lesser way than configured; without it, as in a
    /// pod that is alone, nothing is rendered of that.
    pub fn fell_back(&self, fallback: bool) {
        *self.fallback.lock().unwrap_or_else(PoisonError::into_inner) = Some(fallback);
    }

    /// Notes a caller that asked no limit: `connections` if it came over one too many, `headers` if
    /// its request's head is larger than allowed.
    pub fn turned_away(&self, why: &'static str) {
        self.turned_away.get_or_create(&labels(&[("reason", why)])).inc();
    }

    /// Notes what became of a request that an upstream got: a word of the table in docs/operating.md.
    pub fn answered(&self, deployment: &str, outcome: &'static str) {
        self.answered.get_or_create(&labels(&[("deployment", deployment), ("outcome", outcome)])).inc();
    }

    /// Notes how long a decision took that needed no wait.
    pub fn decided(&self, took: Duration) {
        let number = self.decisions.fetch_add(1, Ordering::Relaxed);
        if !number.is_multiple_of(DECISION_SAMPLE) {
            return;
        }
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let mut ring = self.decision_ns.lock().unwrap_or_else(PoisonError::into_inner);
        let place = usize::try_from(number / DECISION_SAMPLE).unwrap_or(0) % DECISIONS;
        match ring.get_mut(place) {
            Some(oldest) => *oldest = ns,
            None => ring.push(ns),
        }
    }

    /// Returns p50, p99 and number of the timed decisions, in nanoseconds.
    pub fn decisions(&self) -> (u64, u64, usize) {
        let mut ns = self.decision_ns.lock().unwrap_or_else(PoisonError::into_inner).clone();
        ns.sort_unstable();
        let at = |share: usize| ns.get((ns.len() * share / 100).min(ns.len().saturating_sub(1))).copied().unwrap_or(0);
        (at(50), at(99), ns.len())
    }

    /// Returns every metric as OpenMetrics text, which every Prometheus since 2.5 asks for; [`classic`] is the same
    /// for others.
    pub fn render(
        &self,
        status: &Status,
        pauses: &BTreeMap<String, Duration>,
        rejected: &BTreeMap<&'static str, u64>,
    ) -> String {
        let mut registry = Registry::with_prefix("quotum");
        registry.register("wait_seconds", "Time requests were parked before they were decided", self.waits.clone());
        let help = "|reserved - used| / reserved of settled requests: over, or under what they used";
        registry.register("estimate_error", help, self.estimate_errors.clone());
        registry.register(
            "unreported",
            "Answers without usage that can be believed: none given, a lie, or unreadable",
            self.unreported.clone(),
        );
        registry.register("config_reloads", "Times the configuration was read again", self.reloads.clone());
        let help = "1 while the configuration file is not in force because it cannot be used";
        registry.register("config_refused", help, self.config_refused.clone());
        let help = "Connections over max_connections and requests with too large a head, refused before any limit";
        registry.register("callers_turned_away", help, self.turned_away.clone());
        let help = "Requests that an upstream got, by what became of them";
        registry.register("upstream_responses", help, self.answered.clone());
        let refused = limits(&mut registry, status);
        for ((deployment, reason), count) in self.refused.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            refused.get_or_create(&labels(&[("deployment", deployment), ("reason", reason)])).inc_by(*count);
        }
        let paused = Seconds::default();
        registry.register("upstream_paused_seconds", "How long the upstream still wants no requests", paused.clone());
        for (limit, left) in pauses {
            paused.get_or_create(&labels(&[("deployment", limit)])).set(left.as_secs_f64());
        }
        peers(&mut registry, status);
        if let Some(fallback) = *self.fallback.lock().unwrap_or_else(PoisonError::into_inner) {
            let help = "1 while the pods are looked for in a lesser way than configured: no API server, only the name";
            let gauge: Gauge = Gauge::default();
            gauge.set(i64::from(fallback));
            registry.register("discovery_fallback", help, gauge);
        }
        let frames = counters(&mut registry, "frames_rejected", "Datagrams that were dropped unread");
        for (reason, count) in rejected {
            frames.get_or_create(&labels(&[("reason", reason)])).inc_by(*count);
        }
        traffic(&mut registry, &self.traffic.lock().unwrap_or_else(PoisonError::into_inner));
        let mut text = String::new();
        // Writing to a string fails only if a metric's own encoding does.
        let _ = encode(&mut text, &registry);
        text
    }
}

/// Returns rendered metrics in Prometheus' own, older text format: there a counter is declared under the name of its
/// samples, and nothing marks the end.
pub fn classic(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut help = None;
    for line in openmetrics.lines().filter(|line| *line != "# EOF") {
        if let Some(of) = line.strip_prefix("# HELP ") {
            // What it is of is a counter or not, as the next line says.
            help = Some(of);
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|of| of.split_once(' ')) {
            let total = if kind == "counter" { "_total" } else { "" };
            if let Some(says) = help.take().and_then(|of| of.strip_prefix(name)) {
                text.push_str(&format!("# HELP {name}{total}{says}\n"));
            }
            text.push_str(&format!("# TYPE {name}{total} {kind}\n"));
        } else {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

impl Observer for Telemetry {
    fn estimated(&self, reserved: u64, used: u64) {
        if reserved > 0 {
            // By direction: OpenMetrics has no sum of negative values.
            let way = if reserved < used { "under" } else { "over" };
            let error = reserved.abs_diff(used) as f64 / reserved as f64;
            self.estimate_errors.get_or_create(&labels(&[("way", way)])).observe(error);
        }
    }

    fn unreported(&self, why: &'static str) {
        self.unreported.get_or_create(&labels(&[("reason", why)])).inc();
    }
}

type Labels = Vec<(String, String)>;
type Seconds = Family<Labels, Gauge<f64, AtomicU64>>;

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn gauges(registry: &mut Registry, name: &str, help: &str) -> Family<Labels, Gauge> {
    let family = Family::<Labels, Gauge>::default();
    registry.register(name, help, family.clone());
    family
}

fn counters(registry: &mut Registry, name: &str, help: &str) -> Family<Labels, Counter> {
    let family = Family::<Labels, Counter>::default();
    registry.register(name, help, family.clone());
    family
}

fn gauge_value(units: u64) -> i64 {
    i64::try_from(units).unwrap_or(i64::MAX)
}

fn limits(registry: &mut Registry, status: &Status) -> Family<Labels, Counter> {
    let limit = gauges(
        registry,
        "limit",
        "Units of a window; of a slice where it is sliding, and in a bucket what can be full at once",
    );
    let used = gauges(registry, "used", "Units reserved and not refunded in the window, all replicas, as known here");
    let margin = gauges(registry, "margin", "Units of the window that cannot be spent here now");
    let spendable = gauges(registry, "spendable", "Units this replica may spend without asking anybody");
    let unreachable = gauges(registry, "rights_unreachable", "Units held where nobody answers");
    let bound = gauges(registry, "overshoot_bound", "Units a window can be reserved over its limit, at most");
    let help = "Units a window is expected to be reserved over its limit, by what is known here; no promise";
    let expected = gauges(registry, "overshoot_expected", help);
    let admitted = counters(registry, "admitted", "Units reserved here");
    let refunded = counters(registry, "refunded", "Units given back here");
    let help = "Units spent here beyond the rights of their window, as far as the mode allows it";
    let overshoot = counters(registry, "overshoot", help);
    let help = "Units used beyond all rights left in their window, and beyond what the mode allows";
    let uncovered = counters(registry, "uncovered", help);
    let refused = counters(registry, "refused", "Requests refused here");
    let mismatch = gauges(registry, "config_mismatch", "1 for a peer that has another limit for the deployment");
    for status in &status.limits {
        let name = status.name.as_str();
        for (standing, counts, over) in &status.quotas {
            let window = format!("{:?}", standing.quota.window());
            let unit = standing.quota.unit().name();
            let set = labels(&[("deployment", name), ("unit", unit), ("window", &window)]);
            limit.get_or_create(&set).set(gauge_value(standing.limit));
            used.get_or_create(&set).set(gauge_value(standing.used));
            spendable.get_or_create(&set).set(gauge_value(standing.spendable));
            unreachable.get_or_create(&set).set(gauge_value(standing.margin_unreachable));
            admitted.get_or_create(&set).inc_by(counts.admitted);
            refunded.get_or_create(&set).inc_by(counts.refunded);
            overshoot.get_or_create(&set).inc_by(counts.overshoot);
            uncovered.get_or_create(&set).inc_by(counts.uncovered);
            // Observing promises nothing, so it has no bound to show.
            if let Some(over) = over {
                bound.get_or_create(&set).set(gauge_value(over.bound));
                expected.get_or_create(&set).set(gauge_value(over.expected));
            }
            for (reachable, units) in [("true", standing.margin_reachable), ("false", standing.margin_unreachable)] {
                let mut set = set.clone();
                set.push(("reachable".into(), reachable.into()));
                margin.get_or_create(&set).set(gauge_value(units));
            }
        }
        for (reason, count) in &status.refused {
            refused.get_or_create(&labels(&[("deployment", name), ("reason", reason)])).inc_by(*count);
        }
        for other in &status.mismatches {
            mismatch.get_or_create(&labels(&[("deployment", name), ("peer", &other.peer.to_string())])).set(1);
        }
    }
    refused
}

fn traffic(registry: &mut Registry, traffic: &[Traffic]) {
    let sent = counters(registry, "gossip_sent", "Datagrams of gossip sent");
    let sent_bytes = counters(registry, "gossip_sent_bytes", "Their bytes, without IP and UDP headers");
    let received = counters(registry, "gossip_received", "Datagrams of gossip received whose seal was good");
    let received_bytes = counters(registry, "gossip_received_bytes", "Their bytes, without IP and UDP headers");
    for way in traffic {
        let set = labels(&[("way", way.way)]);
        sent.get_or_create(&set).inc_by(way.sent);
        sent_bytes.get_or_create(&set).inc_by(way.sent_bytes);
        received.get_or_create(&set).inc_by(way.received);
        received_bytes.get_or_create(&set).inc_by(way.received_bytes);
    }
}

fn peers(registry: &mut Registry, status: &Status) {
    let count = gauges(registry, "peers", "Peers by whether they answer");
    let staleness = Seconds::default();
    registry.register("staleness_seconds", "Age of the latest news of a peer", staleness.clone());
    let skew = Seconds::default();
    registry.register("clock_skew_seconds", "A peer's clock minus ours", skew.clone());
    let blocked = gauges(registry, "roster_blocked", "1 for a replica whose silence holds something up");
    for reachable in [true, false] {
        let among = status.peers.iter().filter(|peer| peer.reachable == reachable && peer.gone.is_none()).count();
        count
            .get_or_create(&labels(&[("reachable", if reachable { "true" } else { "false" })]))
            .set(gauge_value(among as u64));
    }
    for peer in status.peers.iter().filter(|peer| peer.gone.is_none()) {
        let set = labels(&[("peer", &peer.id.to_string())]);
        if let Some(age) = peer.staleness {
            staleness.get_or_create(&set).set(age.as_secs_f64());
        }
        if let Some(ms) = peer.skew_ms {
            skew.get_or_create(&set).set(ms as f64 / 1_000.0);
        }
    }
    for block in &status.blocked {
        blocked.get_or_create(&labels(&[("replica", &block.who)])).set(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_estimates_are_counted_by_their_direction_and_never_negative() {
        let telemetry = Telemetry::new();
        telemetry.estimated(100, 75);
        telemetry.estimated(100, 100);
        telemetry.estimated(100, 400);
        telemetry.estimated(0, 5);
        let limiter = crate::Limiter::builder().build().unwrap();
        let text = telemetry.render(&limiter.status(), &BTreeMap::new(), &BTreeMap::new());
        for line in [
            r#"quotum_estimate_error_sum{way="over"} 0.25"#,
            r#"quotum_estimate_error_bucket{le="0.0",way="over"} 1"#,
            r#"quotum_estimate_error_count{way="over"} 2"#,
            r#"quotum_estimate_error_sum{way="under"} 3.0"#,
            r#"quotum_estimate_error_count{way="under"} 1"#,
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        assert!(!text.contains(r#"le="-"#), "{text}");
    }
}
