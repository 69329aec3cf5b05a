//! Several deployments behind one model name.

use super::*;

/// Further deployments of model `m`: `b` and so on, each with its own fault.
fn more(faults: &[&str]) -> String {
    let limits = "limits: [{ unit: tokens, amount: 1000, window: 60s }, { unit: requests, amount: 10, window: 60s }]";
    let one = |(i, fault): (usize, &&str)| {
        let id = char::from(b'b' + i as u8);
        format!("  - {{ id: {id}, model: m, upstream: 'STUB/v1?fault={fault}', {limits} }}\n")
    };
    faults.iter().enumerate().map(one).collect()
}

impl Bench {
    fn requests_of(&self, deployment: &str) -> u64 {
        let standings = self.limiter.handle(deployment).unwrap().standings();
        standings.iter().find(|standing| standing.quota.unit() == Unit::Requests).unwrap().used
    }

    /// Returns how many requests the stub has seen.
    async fn sent(&self) -> usize {
        let ledger = crate::client::Client::new().json(&format!("{}/_ledger", self.stub)).await.unwrap();
        ledger.as_array().unwrap().len()
    }
}

/// Returns the whole seconds that a refusal asks to wait.
fn left(refusal: &Answer) -> u64 {
    refusal.header("retry-after").unwrap().parse().unwrap()
}

fn dead_upstream() -> String {
    // A port that was just free refuses connections.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    format!("http://{port}/v1")
}

#[tokio::test]
async fn deployments_take_turns() {
    let bench = Bench::with(Extra { more: &more(&["", ""]), ..Extra::default() }).await;
    for _ in 0..6 {
        assert_eq!(bench.chat(hello(), &[("x-stub-fault", "zero-usage")]).await.status, StatusCode::OK);
    }
    assert_eq!(["a", "b", "c"].map(|id| bench.requests_of(id)), [2, 2, 2]);
}

#[tokio::test]
async fn a_pause_that_an_upstream_asks_for_is_kept() {
    let bench = Bench::new().await;
    let first = bench.chat(hello(), &[("x-stub-fault", "429")]).await;
    assert_eq!((first.status, first.header("retry-after")), (StatusCode::TOO_MANY_REQUESTS, Some("7")));
    let charged = (bench.tokens(), bench.requests());
    let second = bench.chat(hello(), &[]).await;
    assert_eq!(second.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(second.header("x-quotum-refused-by"), Some("upstream"));
    assert_eq!(second.error()["code"], "rate_limit_exceeded");
    assert!(left(&second) <= 7);
    // Nothing was sent and nothing charged.
    assert_eq!((bench.tokens(), bench.requests()), charged);
    assert_eq!(bench.sent().await, 1);
}

#[tokio::test]
async fn what_an_upstream_refused_goes_to_the_next() {
    let bench = Bench::with(Extra { more: &more(&["429", ""]), ..Extra::default() }).await;
    for _ in 0..6 {
        assert_eq!(bench.chat(hello(), &[TEN_TOKENS]).await.status, StatusCode::OK);
    }
    // Asked once, it is left alone until its pause is over; the rest take its turns.
    assert_eq!(bench.requests_of("b"), 1);
    assert_eq!(bench.requests_of("a") + bench.requests_of("c"), 6);
    assert_eq!(bench.sent().await, 7);
}

const TEN_TOKENS: (&str, &str) = ("x-stub-completion-tokens", "10");

#[tokio::test]
async fn a_refusal_of_all_upstreams_is_passed_on() {
    let bench = Bench::with(Extra { more: &more(&["", ""]), ..Extra::default() }).await;
    let refused = [("x-stub-fault", "429")];
    let first = bench.chat(hello(), &refused).await;
    assert_eq!((first.status, first.header("x-quotum-refused-by")), (StatusCode::TOO_MANY_REQUESTS, Some("upstream")));
    assert!(first.text.contains("the stub was told"), "the upstream's own words: {}", first.text);
    assert_eq!(["a", "b", "c"].map(|id| bench.requests_of(id)), [1, 1, 1]);
    let second = bench.chat(hello(), &refused).await;
    assert_eq!(second.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(left(&second) <= 7);
    assert_eq!(bench.sent().await, 3);
}

#[tokio::test]
async fn what_was_never_sent_goes_to_the_next_and_costs_nothing() {
    let upstream = dead_upstream();
    let bench = Bench::with(Extra { upstream: Some(&upstream), more: &more(&[""]), ..Extra::default() }).await;
    for _ in 0..4 {
        assert_eq!(bench.chat(hello(), &[TEN_TOKENS]).await.status, StatusCode::OK);
    }
    assert_eq!((bench.requests_of("a"), bench.requests_of("b")), (0, 4));
    assert_eq!(bench.tokens(), 0);
}

#[tokio::test]
async fn what_may_have_been_executed_is_never_sent_again() {
    for fault in ["500", "503", "redirect"] {
        let bench = Bench::with(Extra { more: &more(&["", ""]), ..Extra::default() }).await;
        assert!(!bench.chat(hello(), &[("x-stub-fault", fault)]).await.status.is_success());
        assert_eq!(bench.sent().await, 1, "{fault}");
    }
    let deployment = "timeouts: { first_byte: 50ms }";
    let bench = Bench::with(Extra { deployment, more: &more(&[""]), ..Extra::default() }).await;
    let answer = bench.chat(hello(), &[("x-stub-fault", "hang")]).await;
    assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(bench.sent().await, 1);
}

#[tokio::test]
async fn a_request_that_only_one_deployment_can_take_is_not_too_large() {
    let more = "  - { id: b, model: m, upstream: 'STUB/v1', limits: [{ unit: tokens, amount: 9000, window: 60s }] }\n";
    let bench = Bench::with(Extra { more, ..Extra::default() }).await;
    let mut body = hello();
    body["max_tokens"] = json!(5_000);
    for expected in [200, 429] {
        let answer = bench.chat(body.clone(), &[("x-stub-fault", "no-usage")]).await;
        assert_eq!(answer.status.as_u16(), expected);
        assert_eq!(answer.header("x-should-retry"), None, "{}", answer.text);
    }
}
