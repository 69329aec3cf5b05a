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
    pub(super) async fn sent(&self) -> usize {
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

/// A deployment of model `m` with its own limit of requests.
fn with_requests(id: &str, requests: u64, fields: &str) -> String {
    let limits = format!("limits: [{{ unit: requests, amount: {requests}, window: 60s }}]");
    format!("  - {{ id: {id}, model: m, upstream: 'STUB/v1', {limits}, {fields} }}\n")
}

#[tokio::test]
async fn a_lower_order_is_spent_before_a_higher_one_is_asked() {
    let more = [with_requests("c", 4, "order: 3"), with_requests("b", 2, "order: 2")].concat();
    let bench = Bench::with(Extra { deployment: "order: 7", more: &more, ..Extra::default() }).await;
    let mut used = Vec::new();
    for _ in 0..7 {
        assert_eq!(bench.chat(hello(), &[("x-stub-fault", "zero-usage")]).await.status, StatusCode::OK);
        used.push(["b", "c", "a"].map(|id| bench.requests_of(id)));
    }
    assert_eq!(used[1], [2, 0, 0]);
    assert_eq!(used[5], [2, 4, 0]);
    assert_eq!(used[6], [2, 4, 1]);
    // They had no room, and no request was refused.
    assert!(!bench.metrics().await.contains("quotum_refused_total{"), "{}", bench.metrics().await);
}

#[tokio::test]
async fn deployments_are_asked_in_proportion_to_their_weights_or_else_to_their_limits() {
    let firsts = async |fields: [&str; 2]| {
        let more = [with_requests("b", 1_000, fields[0]), with_requests("c", 250, fields[1])].concat();
        let bench = Bench::with(Extra { deployment: "order: 2", more: &more, ..Extra::default() }).await;
        for _ in 0..20 {
            assert_eq!(bench.chat(hello(), &[("x-stub-fault", "zero-usage")]).await.status, StatusCode::OK);
        }
        ["b", "c"].map(|id| bench.requests_of(id))
    };
    assert_eq!(firsts(["", ""]).await, [16, 4]);
    assert_eq!(firsts(["weight: 1", "weight: 3"]).await, [5, 15]);
    assert_eq!(firsts(["", "weight: 4"]).await, [4, 16]);
    assert_eq!(firsts(["weight: 0", "weight: 1"]).await, [0, 20]);
}

#[tokio::test]
async fn a_request_that_nobody_takes_is_one_refusal_with_the_earliest_end() {
    let bench = Bench::with(Extra { more: &more(&["", ""]), ..Extra::default() }).await;
    // `b` is paused for 7 s, `a` and `c` are spent until the window ends in 50 s.
    bench.limiter.get("b").unwrap().pause(bench.limiter.now().plus(std::time::Duration::from_secs(7)));
    let mut body = hello();
    body["max_tokens"] = json!(900);
    for _ in 0..2 {
        assert_eq!(bench.chat(body.clone(), &[("x-stub-fault", "no-usage")]).await.status, StatusCode::OK);
    }
    let answer = bench.chat(body.clone(), &[]).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!((answer.header("x-quotum-refused-by"), left(&answer)), (Some("upstream"), 7));
    let metrics = bench.metrics().await;
    let refused: Vec<&str> = metrics.lines().filter(|line| line.starts_with("quotum_refused_total{")).collect();
    assert_eq!(refused, ["quotum_refused_total{deployment=\"b\",reason=\"upstream_paused\"} 1"]);
    assert!(metrics.contains("quotum_upstream_paused_seconds{deployment=\"b\"} 7"), "{metrics}");
}

#[tokio::test]
async fn a_refusal_by_all_limits_is_counted_once() {
    let bench = Bench::with(Extra { more: &more(&["", ""]), ..Extra::default() }).await;
    let mut body = hello();
    body["max_tokens"] = json!(900);
    for _ in 0..3 {
        assert_eq!(bench.chat(body.clone(), &[("x-stub-fault", "no-usage")]).await.status, StatusCode::OK);
    }
    let answer = bench.chat(body, &[]).await;
    assert_eq!(answer.header("x-quotum-refused-by"), Some("quotum"));
    let metrics = bench.metrics().await;
    let refused = metrics.lines().filter(|line| line.starts_with("quotum_refused_total{"));
    let counts: Vec<&str> = refused.filter_map(|line| line.rsplit(' ').next()).collect();
    assert_eq!(counts, ["1"], "{metrics}");
}

#[tokio::test]
async fn an_upstream_that_cannot_be_reached_is_left_alone_for_a_while() {
    let upstream = dead_upstream();
    let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
    let first = bench.chat(hello(), &[]).await;
    assert_eq!((first.status, first.header("retry-after")), (StatusCode::BAD_GATEWAY, None));
    let second = bench.chat(hello(), &[]).await;
    assert_eq!((second.status, left(&second)), (StatusCode::BAD_GATEWAY, 1));
    assert_eq!(second.header("x-quotum-refused-by"), Some("upstream"));
    assert!(second.error()["message"].as_str().unwrap().contains("nothing was sent"), "{}", second.text);
    assert_eq!((bench.tokens(), bench.requests()), (0, 0));
    let metrics = bench.metrics().await;
    assert!(metrics.contains("{deployment=\"a\",reason=\"upstream_unreachable\"} 1"), "{metrics}");
}

#[tokio::test]
async fn an_overloaded_upstream_that_says_until_when_is_left_alone() {
    let bench = Bench::with(Extra { more: &more(&[""]), ..Extra::default() }).await;
    let first = bench.chat(hello(), &[("x-stub-fault", "529")]).await;
    assert_eq!((first.status.as_u16(), bench.sent().await), (529, 1), "it may have been executed");
    let paused = |id: &str| bench.limiter.get(id).unwrap().paused_until().is_some();
    assert_eq!((paused("a"), paused("b")), (true, false));
}

#[tokio::test]
async fn an_upstream_hears_its_own_name_of_the_model() {
    let bench = Bench::with(Extra { deployment: "upstream_model: real", ..Extra::default() }).await;
    for body in [hello(), streaming()] {
        let answer = bench.chat(body, &[TEN_TOKENS]).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert!(answer.text.contains(r#""model":"real""#), "{}", answer.text);
    }
}
