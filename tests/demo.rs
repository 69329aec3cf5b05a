//! The demo, small: the contract's object, the limit held, and nobody left behind.

#![cfg(feature = "server")]
#![allow(missing_docs)]

use std::process::{Command, Stdio};

use serde_json::Value;

#[test]
fn two_small_pods_hold_one_limit_that_they_break_when_isolated() {
    let output = Command::new(env!("CARGO_BIN_EXE_quotum"))
        .args(["demo", "--replicas", "2", "--limit", "12000", "--window", "2s", "--windows", "1", "--json"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{errors}"));
    assert_eq!(output.status.code(), Some(0), "{report:#} {errors}");
    assert_eq!(report["replicas"], 2);
    assert_eq!(report["limit_tokens"], 12_000);
    assert_eq!(report["window_seconds"], 2.0);
    assert!(report["offered_tokens"].as_u64().unwrap() > 0);
    let [isolated, strict] = report["runs"].as_array().unwrap().as_slice() else { panic!("two runs in {report}") };
    assert_eq!((&isolated["mode"], &strict["mode"]), (&"isolated".into(), &"strict".into()));
    assert!(isolated["overshoot_tokens"].as_u64().unwrap() > 0, "{report:#}");
    assert_eq!(strict["overshoot_tokens"], 0);
    assert_eq!(strict["failed_requests"], 0);
    for run in [isolated, strict] {
        assert!(run["windows"][0]["start_unix_ms"].is_u64() && run["windows"][0]["admitted_tokens"].is_u64());
        for name in ["admitted_tokens_max", "utilization", "admitted_requests", "refused_requests"] {
            assert!(run[name].is_number(), "{name}");
        }
        for name in ["added_latency_ms", "refusal_latency_ms", "decision_ns"] {
            assert!(run[name]["p50"].is_number() && run[name]["p99"].is_number(), "{name}");
        }
    }
}

#[test]
fn a_demo_that_cannot_be_run_says_so() {
    let output = Command::new(env!("CARGO_BIN_EXE_quotum")).args(["demo", "--limit", "5"]).output().unwrap();
    assert_eq!(output.status.code(), Some(64));
}
