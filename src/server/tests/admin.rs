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
        r#"quotum_estimate_error_count{way="over"} 1"#,
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
}

#[tokio::test]
async fn metrics_come_in_the_format_that_is_asked_for() {
    let bench = Bench::new().await;
    let ask = async |accept: &[(&str, &str)]| {
        Answer::of(bench.admin.clone().oneshot(request("GET", "/metrics", accept, "")).await.unwrap()).await
    };
    // What Prometheus 2.42 sends.
    let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
        text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
    let open = ask(&[("accept", prometheus)]).await;
    assert!(open.header("content-type").unwrap().starts_with("application/openmetrics-text; version=1.0.0"));
    assert!(open.text.contains("# TYPE quotum_admitted counter\n") && open.text.ends_with("# EOF\n"));
    for accept in [&[][..], &[("accept", "*/*")], &[("accept", "text/plain;version=0.0.4")]] {
        let plain = ask(accept).await;
        assert!(plain.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
        for line in ["# HELP quotum_admitted_total Units", "# TYPE quotum_admitted_total counter\n"] {
            assert!(plain.text.contains(line), "{line} in {}", plain.text);
        }
        assert!(plain.text.contains("# TYPE quotum_wait_seconds histogram\n"), "{}", plain.text);
        assert!(!plain.text.contains("EOF"));
        let samples = |text: &str| {
            let mut lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(samples(&plain.text), samples(&open.text));
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

#[cfg(feature = "kube")]
#[tokio::test]
async fn a_directory_that_fell_back_is_shown_with_since_when_and_why() {
    use crate::cluster::discovery::kube::{Kube, KubeConfig};
    use crate::cluster::{Cluster, ClusterConfig, Seeds, UdpNet};

    let limiter = Limiter::builder().clock(Still).build().unwrap();
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let api = KubeConfig {
        api: format!("http://{nobody}"),
        namespace: "prod".into(),
        selector: "app=quotum".into(),
        token_file: None,
        ca_file: None,
    };
    let kube = Kube::new(Arc::new(UdpNet), "localhost", nobody.port(), api).unwrap();
    let listen = "127.0.0.1:0".parse().unwrap();
    let config = ClusterConfig { listen, ..ClusterConfig::new(Seeds::By(Arc::new(kube))) };
    let cluster = Arc::new(Cluster::join(&limiter, config, UdpNet).await.unwrap());
    let credentials = Arc::new(Credentials::new(&[]));
    let admin = Admin::new(limiter, Some(Arc::clone(&cluster)), credentials, Arc::new(Telemetry::new()), &[]).router();
    let get = async |path: &str| Answer::of(admin.clone().oneshot(request("GET", path, &[], "")).await.unwrap()).await;
    while cluster.fallback().is_none() {
        tokio::task::yield_now().await;
    }
    let fallback = get("/status").await.json()["discovery_fallback"].take();
    assert_eq!(fallback["since_unix_ms"], 1_700_000_010_000_u64);
    assert!(fallback["why"].as_str().unwrap().contains("the API server gives no answer"), "{fallback}");
    assert!(fallback["resolve"].as_str().unwrap().contains(&nobody.to_string()), "{fallback}");
    assert!(get("/metrics").await.text.contains("quotum_discovery_fallback 1"));
    assert!(get("/readyz").await.text.contains("first exchange"), "falling back holds up nothing of its own");
    let alone = Bench::new().await;
    assert_eq!(self::get(&alone, "/status").await.json()["discovery_fallback"], Value::Null);
    assert!(!alone.metrics().await.contains("quotum_discovery_fallback"));
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
