//! The admin endpoints.

use super::*;

use std::net::SocketAddr;

use axum::extract::ConnectInfo;

async fn get(bench: &Bench, path: &str) -> Answer {
    Answer::of(bench.admin.clone().oneshot(request("GET", path, &[], "")).await.unwrap()).await
}

#[tokio::test]
async fn a_pod_alone_is_alive_and_ready() {
    let bench = Bench::new().await;
    assert_eq!(get(&bench, "/livez").await.status, StatusCode::OK);
    assert_eq!(get(&bench, "/readyz").await.status, StatusCode::OK);
    assert_eq!(get(&bench, "/nothing").await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn status_and_metrics_show_where_a_limit_stands() {
    let bench = Bench::new().await;
    bench.chat(hello(), &[("x-stub-completion-tokens", "30")]).await;
    let status = get(&bench, "/status").await.json();
    let quota = &status["limits"][0]["quotas"][0];
    assert_eq!((&quota["unit"], &quota["limit"], &quota["used"]), (&json!("tokens"), &json!(1000), &json!(40)));
    assert_eq!(status["limits"][0]["deployments"], json!(["a"]));
    let metrics = get(&bench, "/metrics").await.text;
    for line in [
        r#"quotum_limit{deployment="a",unit="tokens",window="60s"} 1000"#,
        r#"quotum_used{deployment="a",unit="tokens",window="60s"} 40"#,
        r#"quotum_admitted_total{deployment="a",unit="requests",window="60s"} 1"#,
        r#"quotum_overshoot_bound{deployment="a",unit="tokens",window="60s"} 0"#,
        "quotum_wait_seconds_count 0",
        "quotum_estimate_error_count 1",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
}

#[tokio::test]
async fn a_mode_shows_what_it_promises() {
    let extra = Extra { deployment: "mode: { elastic: { beta: 0.05 } }", ..Extra::default() };
    let bench = Bench::with(extra).await;
    bench.chat(hello(), &[("x-stub-completion-tokens", "30")]).await;
    let status = get(&bench, "/status").await.json();
    let limit = &status["limits"][0];
    assert_eq!(limit["mode"], json!({"elastic": {"beta": 0.05}}));
    assert_eq!(limit["quotas"][0]["spendable"], 1_010, "alone: the limit and its twentieth, less 40");
    assert_eq!(
        (&limit["quotas"][0]["overshoot_bound"], &limit["quotas"][0]["overshoot_expected"]),
        (&json!(50), &json!(0))
    );
    let metrics = get(&bench, "/metrics").await.text;
    for line in [
        r#"quotum_overshoot_bound{deployment="a",unit="tokens",window="60s"} 50"#,
        r#"quotum_overshoot_expected{deployment="a",unit="tokens",window="60s"} 0"#,
        r#"quotum_overshoot_total{deployment="a",unit="tokens",window="60s"} 0"#,
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    let sum = Bench::with(Extra { deployment: "mode: { sum: { margin: 10% } }", ..Extra::default() }).await;
    let status = get(&sum, "/status").await.json();
    assert_eq!(status["limits"][0]["mode"], json!({"sum": {"margin": "10%"}}));
    assert_eq!(status["limits"][0]["quotas"][0]["spendable"], 900);
    assert_eq!(status["limits"][0]["quotas"][0]["overshoot_bound"], 0, "alone");
    let observing = Bench::with(Extra { deployment: "mode: observe", ..Extra::default() }).await;
    let status = get(&observing, "/status").await.json();
    assert_eq!(
        (&status["limits"][0]["mode"], &status["limits"][0]["quotas"][0]["overshoot_bound"]),
        (&json!("observe"), &Value::Null)
    );
    assert!(!get(&observing, "/metrics").await.text.contains("quotum_overshoot_bound{"), "it promises nothing");
}

#[tokio::test]
async fn no_credential_and_no_prompt_is_shown() {
    let extra = Extra { credentials: &["sk-caller"], deployment: "api_key: sk-upstream", ..Extra::default() };
    let bench = Bench::with(extra).await;
    let mut body = hello();
    body["messages"][0]["content"] = json!("a secret prompt");
    for fault in ["", "500", "400", "cut"] {
        bench.chat(body.clone(), &[("x-api-key", "sk-caller"), ("x-stub-fault", fault)]).await;
    }
    for path in ["/status", "/metrics"] {
        let text = get(&bench, path).await.text;
        for secret in ["sk-caller", "sk-upstream", "secret prompt"] {
            assert!(!text.contains(secret), "{secret} in {path}");
        }
    }
}

#[tokio::test]
async fn only_loopback_and_credentials_may_forget() {
    let bench = Bench::with(Extra { credentials: &["right"], ..Extra::default() }).await;
    let forget = |from: &str, headers: &[(&str, &str)]| {
        let mut sent = request("POST", "/forget", headers, r#"{"replica":"10.0.0.9:7946"}"#);
        sent.extensions_mut().insert(ConnectInfo(from.parse::<SocketAddr>().unwrap()));
        bench.admin.clone().oneshot(sent)
    };
    let far = "10.0.0.1:5000";
    assert_eq!(forget(far, &[]).await.unwrap().status(), StatusCode::UNAUTHORIZED);
    assert_eq!(forget(far, &[("x-api-key", "wrong")]).await.unwrap().status(), StatusCode::UNAUTHORIZED);
    // Both may, and both are told that nobody is known there.
    for (from, headers) in
        [(far, &[("x-api-key", "right")][..]), ("127.0.0.1:5000", &[]), ("[::ffff:127.0.0.1]:5000", &[])]
    {
        let answer = Answer::of(forget(from, headers).await.unwrap()).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
        assert!(answer.error()["message"].as_str().unwrap().contains("not on this replica's roster"));
    }
}
