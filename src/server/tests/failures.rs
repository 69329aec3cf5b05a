//! What is charged and said when an upstream fails.

use super::*;

use axum::routing::post;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

#[tokio::test]
async fn a_request_the_upstream_refuses_costs_a_request_and_no_tokens() {
    for fault in ["400", "404"] {
        let bench = Bench::new().await;
        let answer = bench.chat(hello(), &[("x-stub-fault", fault)]).await;
        assert_eq!(answer.status.as_str(), fault);
        assert_eq!(answer.json()["error"]["code"], fault, "the upstream's own words pass");
        assert_eq!((bench.tokens(), bench.requests()), (0, 1));
    }
}

#[tokio::test]
async fn a_request_the_upstream_failed_on_costs_its_prompt() {
    for fault in ["429", "500", "503"] {
        let bench = Bench::new().await;
        let answer = bench.chat(streaming(), &[("x-stub-fault", fault)]).await;
        assert_eq!(answer.status.as_str(), fault);
        assert_eq!((bench.tokens(), bench.requests()), (PROMPT, 1), "{fault}");
        let is_429 = fault == "429";
        assert_eq!(answer.header("x-quotum-refused-by"), is_429.then_some("upstream"));
        assert_eq!(answer.header("retry-after"), is_429.then_some("7"));
    }
}

#[tokio::test]
async fn what_was_never_written_costs_nothing() {
    // A port that was just free refuses connections.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let upstream = format!("http://{port}/v1");
    let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
    let answer = bench.chat(hello(), &[]).await;
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert_eq!(answer.error()["code"], "upstream_unreachable");
    assert_eq!((bench.tokens(), bench.requests()), (0, 0));
}

#[tokio::test]
async fn an_upstream_that_does_not_answer_costs_the_prompt() {
    let bench = Bench::with(Extra { deployment: "timeouts: { first_byte: 50ms }", ..Extra::default() }).await;
    let answer = bench.chat(hello(), &[("x-stub-fault", "hang")]).await;
    assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(answer.error()["code"], "upstream_timeout");
    assert_eq!((bench.tokens(), bench.requests()), (PROMPT, 1));
}

#[tokio::test]
async fn an_upstream_that_stops_in_mid_stream_costs_what_came() {
    let bench = Bench::with(Extra { deployment: "timeouts: { idle: 50ms }", ..Extra::default() }).await;
    let slow = [("x-stub-completion-tokens", "30"), ("x-stub-body-ms", "600000")];
    let answer = bench.chat(streaming(), &slow).await;
    assert!(answer.broke_off);
    assert!(answer.text.ends_with("\n\n") && answer.text.contains(r#""code":"upstream_cut""#), "{}", answer.text);
    assert!((PROMPT..PROMPT + 100).contains(&bench.tokens()), "{}", bench.tokens());
}

#[tokio::test]
async fn a_stream_that_is_cut_is_told_and_costs_what_came() {
    let bench = Bench::new().await;
    let cut = [("x-stub-completion-tokens", "16"), ("x-stub-fault", "cut"), ("x-stub-body-ms", "100")];
    let answer = bench.chat(streaming(), &cut).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert!(answer.broke_off, "{}", answer.text);
    let last = answer.text.trim_end().rsplit("data: ").next().unwrap();
    assert_eq!(serde_json::from_str::<Value>(last).unwrap()["error"]["type"], "server_error");
    let used = bench.tokens();
    assert!(used > PROMPT && used < PROMPT + 100, "{used}");
    assert_eq!(bench.requests(), 1);
}

#[tokio::test]
async fn a_whole_answer_that_is_cut_breaks_off() {
    let bench = Bench::new().await;
    let answer = bench.chat(hello(), &[("x-stub-fault", "cut"), ("x-stub-body-ms", "100")]).await;
    assert!(answer.broke_off);
    assert!(bench.tokens() > PROMPT);
    assert_eq!(bench.requests(), 1);
}

/// hyper throws away what it has not written when a body fails: the head, too.
#[tokio::test]
async fn the_head_of_an_answer_that_breaks_off_before_its_body_arrives() {
    for head in ["200 OK\r\ncontent-length: 10", "500 Broken\r\ntransfer-encoding: chunked"] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = format!("http://{}/v1", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut io, _) = listener.accept().await.unwrap();
            let _ = io.read(&mut [0; 4_096]).await.unwrap();
            io.write_all(format!("HTTP/1.1 {head}\r\n\r\n").as_bytes()).await.unwrap();
        });
        let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
        let body = hello().to_string();
        let asked = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
            content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = bench.raw(asked).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {}", &head[..3])), "{head}: {answer:?}");
        assert_eq!((bench.tokens(), bench.requests()), (PROMPT, 1), "{head}");
    }
}

#[tokio::test]
async fn a_caller_who_leaves_before_the_answer_gives_nothing_back() {
    let bench = Bench::new().await;
    let mut sending = Box::pin(bench.send(chat(hello(), &[("x-stub-fault", "hang")])));
    // The record stands in the stub's ledger once the request was written.
    let client = crate::client::Client::new();
    let ledger = format!("{}/_ledger", bench.stub);
    loop {
        tokio::select! {
            biased;
            _ = &mut sending => panic!("a hanging upstream answered"),
            records = client.json(&ledger) => if records.unwrap()[0].is_object() { break },
        }
    }
    drop(sending);
    assert_eq!((bench.tokens(), bench.requests()), (PROMPT + 100, 1));
}

#[tokio::test]
async fn a_redirect_is_not_passed_on() {
    let bench = Bench::new().await;
    let answer = bench.chat(hello(), &[("x-stub-fault", "redirect")]).await;
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert_eq!(answer.error()["code"], "upstream_redirect");
    assert_eq!(answer.header("location"), None);
}

#[tokio::test]
async fn the_upstream_sees_its_own_key_and_never_the_callers() {
    let echo = |headers: HeaderMap| async move {
        let seen: Vec<String> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        json!({"seen": seen, "usage": {"total_tokens": 1}}).to_string()
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = format!("http://{}/base?key=of-the-base", listener.local_addr().unwrap());
    let router = Router::new().route("/base/chat/completions", post(echo));
    tokio::spawn(async move { axum::serve(listener, router).await });
    let extra = Extra {
        upstream: Some(&upstream),
        deployment: "api_key: sk-upstream",
        credentials: &["sk-caller"],
        ..Extra::default()
    };
    let bench = Bench::with(extra).await;
    let sent = [
        ("x-api-key", "sk-caller"),
        ("authorization", "Bearer sk-caller"),
        ("api-key", "sk-caller"),
        ("cookie", "sk-caller"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
        ("accept-encoding", "gzip"),
        ("x-kept", "1"),
    ];
    let answer = bench.chat(hello(), &sent).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    assert!(
        !answer.text.contains("sk-caller") && !answer.text.contains("x-hop") && !answer.text.contains("gzip"),
        "{}",
        answer.text
    );
    assert!(
        answer.text.contains("authorization: Bearer sk-upstream") && answer.text.contains("x-kept: 1"),
        "{}",
        answer.text
    );
}

#[tokio::test]
async fn what_becomes_of_an_upstreams_requests_is_counted_once_each() {
    let bench = Bench::with(Extra { deployment: "timeouts: { first_byte: 50ms }", ..Extra::default() }).await;
    let count = async |outcome: &str| {
        let line = format!(r#"quotum_upstream_responses_total{{deployment="a",outcome="{outcome}"}} "#);
        bench.metrics().await.lines().find_map(|text| text.strip_prefix(&line)?.parse::<u64>().ok())
    };
    for (fault, outcome) in [
        ("400", "client_error"),
        ("500", "server_error"),
        ("redirect", "unusable"),
        ("hang", "timeout"),
        ("cut", "cut"),
        ("", "ok"),
        ("429", "throttled"),
    ] {
        bench.chat(streaming(), &[("x-stub-fault", fault)]).await;
        assert_eq!(count(outcome).await, Some(1), "{fault}: {}", bench.metrics().await);
    }
    assert_eq!(count("ok").await, Some(1), "what was cut, or answered with 502 here, is no success");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nobody = Bench::with(Extra { upstream: Some(&format!("http://{port}/v1")), ..Extra::default() }).await;
    nobody.chat(hello(), &[]).await;
    let line = r#"quotum_upstream_responses_total{deployment="a",outcome="unreachable"} 1"#;
    assert!(nobody.metrics().await.contains(line));
}
