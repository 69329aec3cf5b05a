//! The demo, small: the contract's object, the limit held, and nobody left behind.

#![cfg(feature = "server")]
#![allow(missing_docs)]

mod process;

use std::fs;
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
    for (arguments, why) in [
        (["--limit", "5"], "--limit is between 2000 and 2199023255552"),
        (["--limit", "2199023255553"], "--limit is between 2000 and 2199023255552"),
        (["--limit", "2199023255552"], "requests in a run, and 1000000 are the most"),
        (["--overload", "1e-300"], "less than one request"),
        (["--overload", "NaN"], "--overload is above 0 and at most 100"),
        (["--overload", "inf"], "--overload is above 0 and at most 100"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_quotum")).arg("demo").args(arguments).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {told}");
        assert!(told.contains(why), "{arguments:?}: {told}");
    }
}

#[test]
fn a_result_that_cannot_be_printed_is_no_success() {
    let full = || fs::File::create("/dev/full").unwrap();
    let arguments = ["demo", "--replicas", "1", "--limit", "2000", "--window", "1s", "--windows", "1"];
    let mut demo = Command::new(env!("CARGO_BIN_EXE_quotum"));
    let ended = demo.args(arguments).stdin(Stdio::null()).stdout(full()).stderr(full()).status().unwrap();
    assert_eq!(ended.code(), Some(2), "and no panic, which is 101");
}

/// Returns the processes that have not ended and are such, by their id and their parent's.
#[cfg(target_os = "linux")]
fn alive(is_one: impl Fn(u32, u32) -> bool) -> Vec<u32> {
    let named = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().file_name());
    let processes = named.filter_map(|name| name.to_str()?.parse().ok());
    let living = processes.filter(|pid| {
        // One that has just ended has no file any more.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let (state, parent) = (fields.next(), fields.next().and_then(|parent| parent.parse().ok()));
        state.is_some_and(|state| state != "Z") && parent.is_some_and(|parent| is_one(*pid, parent))
    });
    living.collect()
}

#[test]
#[cfg(target_os = "linux")]
fn no_child_outlives_a_demo_that_is_killed() {
    let mut demo = Command::new(env!("CARGO_BIN_EXE_quotum"));
    let mut demo = demo.args(["demo", "--replicas", "2"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let own = demo.id();
    let mut children = Vec::new();
    process::until("the stub and both pods run", || {
        children = alive(|_, parent| parent == own);
        children.len() == 3
    });
    demo.kill().unwrap();
    demo.wait().unwrap();
    process::until("they have ended", || alive(|pid, _| children.contains(&pid)).is_empty());
}
