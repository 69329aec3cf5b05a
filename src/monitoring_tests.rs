//! What dashboard and alerts ask for is what this binary shows at /metrics: names and labels.
//!
//! Knows how queries are written, as far as ours go. Must not judge what a query means: whether an alert fires when it
//! should is for Prometheus' own tool (`tests/alerts/run`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use quotum::ledger::{Blocked, Mismatch, PeerStatus};
use quotum::telemetry::{Telemetry, Traffic};
use quotum::{Limiter, Quota};
use serde_json::Value;

use crate::deploy_tests::{deploy, documents, read};

/// What Prometheus adds to every sample of a pod.
const TARGET: [&str; 2] = ["namespace", "pod"];

/// Returns every metric's name that stands in the text, as queries write them.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("quotum_")).map(str::to_owned).collect()
}

/// Everything that a pod to which all happened shows at /metrics: names, and the labels of each.
pub(crate) fn every_metric() -> BTreeMap<String, BTreeSet<String>> {
    let quota = Quota::tokens(1_000).per_minute();
    let limiter = Limiter::builder().deployment("a", [quota]).build().unwrap();
    let mut status = limiter.status();
    let id = status.replica;
    status.peers.push(PeerStatus {
        id,
        node: "b".into(),
        addr: ([10, 0, 0, 2], 7946).into(),
        reachable: true,
        staleness: Some(Duration::from_millis(100)),
        skew_ms: Some(-3),
        gone: None,
    });
    status.blocked.push(Blocked { who: "b".into(), why: String::new(), resolve: String::new() });
    status.limits[0].mismatches.push(Mismatch { peer: id, theirs: quota });
    status.limits[0].refused.insert("exhausted", 1);
    let telemetry = Telemetry::new();
    telemetry.reloaded("refused");
    telemetry.turned_away("connections");
    telemetry.fell_back(true);
    telemetry.answered("a", "ok");
    telemetry.refused("a", "upstream_paused");
    telemetry.carried(vec![Traffic { way: "direct", ..Traffic::default() }]);
    telemetry.waited(Duration::from_millis(3));
    quotum::layer::Observer::unreported(&telemetry, "none");
    let paused = [("a".to_owned(), Duration::from_secs(1))].into();
    let text = telemetry.render(&status, &paused, &[("key", 1)].into());
    let mut metrics = BTreeMap::<String, BTreeSet<String>>::new();
    for sample in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, rest) = sample.split_at(sample.find(['{', ' ']).unwrap());
        metrics.entry(name.to_owned()).or_default().extend(labels_in(rest));
    }
    metrics
}

/// Returns the labels that stand in braces at the beginning: `{a="x",b=~"y"}`.
fn labels_in(text: &str) -> BTreeSet<String> {
    let Some(inside) = text.strip_prefix('{').and_then(|text| text.split_once('}')) else { return BTreeSet::new() };
    let mut labels = BTreeSet::new();
    let mut left = inside.0;
    while let Some((label, rest)) = left.split_once('"') {
        labels.insert(label.trim_matches([',', ' ', '=', '~', '!']).to_owned());
        left = rest.split_once('"').unwrap().1;
    }
    labels
}

/// Returns the labels that a query groups or joins by.
fn grouped_by(query: &str) -> BTreeSet<String> {
    let clauses = [" by (", " on ("].iter().flat_map(|clause| query.split(clause).skip(1));
    clauses.flat_map(|text| text.split_once(')').unwrap().0.split(',')).map(|label| label.trim().to_owned()).collect()
}

/// Returns every query with the texts that name labels of what it returns.
fn queries() -> Vec<(String, Vec<String>)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let dashboard: Value = serde_json::from_str(&read("chart/monitoring/dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().unwrap());
    let mut queries: Vec<_> =
        targets.map(|target| (text(&target["expr"]), vec![text(&target["legendFormat"])])).collect();
    let rules = documents(&read("chart/monitoring/prometheusrule.yaml")).remove(0);
    for rule in rules["spec"]["groups"][0]["rules"].as_array().unwrap() {
        let notes = &rule["annotations"];
        queries.push((text(&rule["expr"]), vec![text(&notes["summary"]), text(&notes["description"])]));
    }
    queries
}

#[test]
fn dashboard_and_alerts_ask_for_labels_that_exist() {
    let metrics = every_metric();
    let queries = queries();
    assert!(queries.len() > 25);
    for (query, shown) in queries {
        let grouped = grouped_by(&query);
        for name in metrics_in(&query) {
            let mut has = metrics[&name].clone();
            has.extend(TARGET.map(str::to_owned));
            let wanted = query.split(&name).skip(1).flat_map(labels_in).chain(grouped.iter().cloned());
            let missing: Vec<_> = wanted.filter(|label| !has.contains(label)).collect();
            assert_eq!(missing, Vec::<String>::new(), "{name} has {has:?}: {query}");
        }
        for text in shown {
            for label in text.split("{{").skip(1).map(|text| text.split_once("}}").unwrap().0.trim()) {
                let label = label.trim_start_matches("$labels.");
                assert!(label == "$value" || grouped.contains(label), "{text} shows {label}: {query}");
            }
        }
    }
}

#[test]
fn the_metrics_of_the_contract_are_all_there() {
    let metrics = every_metric();
    for name in [
        "limit",
        "used",
        "margin",
        "spendable",
        "admitted_total",
        "refused_total",
        "refunded_total",
        "uncovered_total",
        "wait_seconds_bucket",
        "staleness_seconds",
        "clock_skew_seconds",
        "peers",
        "roster_blocked",
        "rights_unreachable",
        "config_mismatch",
        "overshoot_bound",
        "frames_rejected_total",
        "estimate_error_bucket",
    ] {
        assert!(metrics.contains_key(&format!("quotum_{name}")), "{name} of {metrics:?}");
    }
}

#[test]
fn dashboard_and_alerts_ask_for_metrics_that_exist() {
    let metrics: BTreeSet<_> = every_metric().into_keys().collect();
    for file in ["chart/monitoring/dashboard.json", "chart/monitoring/prometheusrule.yaml"] {
        let asked = metrics_in(&read(file));
        assert!(asked.len() > 5, "{file}");
        assert_eq!(asked.difference(&metrics).collect::<Vec<_>>(), Vec::<&String>::new(), "{file}");
    }
    let dashboard: Value = serde_json::from_str(&read("chart/monitoring/dashboard.json")).unwrap();
    let shown = metrics_in(&dashboard["panels"].to_string());
    for name in [
        "limit",
        "used",
        "margin",
        "spendable",
        "refused_total",
        "wait_seconds_bucket",
        "staleness_seconds",
        "clock_skew_seconds",
        "peers",
        "roster_blocked",
        "uncovered_total",
        "rights_unreachable",
        "config_mismatch",
        "config_refused",
        "discovery_fallback",
        "upstream_responses_total",
    ] {
        assert!(shown.contains(&format!("quotum_{name}")), "{name}");
    }
}

/// Returns every event that the sources log: `event = "..."`, and the names that notes of the ledger have.
fn events_logged(folder: &Path, events: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            events_logged(&path, events);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with(file!()) {
            let source = fs::read_to_string(&path).unwrap();
            let before = if path.ends_with("cluster/events.rs") { "=> \"" } else { "event = \"" };
            let named = source.split(before).skip(1).map(|rest| rest.split('"').next().unwrap().to_owned());
            events.extend(named);
        }
    }
}

#[test]
fn the_operating_guide_lists_the_events_of_the_log_and_no_others() {
    let mut logged = BTreeSet::new();
    events_logged(&deploy().join("../src"), &mut logged);
    // These two are said as what blocks.
    assert!(logged.remove("not_listed") && logged.remove("roster_full"));
    let guide = fs::read_to_string(deploy().join("../docs/operating.md")).unwrap();
    let (_, table) = guide.split_once("| `event` | level |").unwrap();
    let rows = table.split("\n\n").next().unwrap().lines().skip(2);
    let cells = rows.map(|row| row.split('|').nth(1).unwrap());
    let listed: BTreeSet<String> =
        cells.flat_map(|cell| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()).collect();
    assert!(logged.len() > 20);
    assert_eq!(listed, logged);
}

#[test]
fn every_alert_has_its_section_in_the_operating_guide() {
    let guide = fs::read_to_string(deploy().join("../docs/operating.md")).unwrap();
    let rules = documents(&read("chart/monitoring/prometheusrule.yaml")).remove(0);
    let rules = rules["spec"]["groups"][0]["rules"].as_array().unwrap();
    assert!(rules.len() >= 5);
    for rule in rules {
        let alert = rule["alert"].as_str().unwrap();
        assert!(guide.contains(&format!("### {alert}\n")), "{alert} has no section");
        assert!(rule["annotations"]["description"].as_str().unwrap().contains(&format!("docs/operating.md, {alert}")));
    }
}
