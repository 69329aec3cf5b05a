//! Every endpoint: what is charged, and in whose words it is refused.

use super::*;

const THIRTY: (&str, &str) = ("x-stub-completion-tokens", "30");
const TEN: (&str, &str) = ("x-stub-prompt-tokens", "10");

/// One request for each endpoint with a dialect, all with a cap of 100 where there is one.
fn endpoints() -> Vec<(&'static str, Value)> {
    let messages = json!([{"role": "user", "content": "0123456789"}]);
    vec![
        ("/v1/chat/completions", json!({"model": "m", "messages": messages, "max_tokens": 100})),
        ("/v1/completions", json!({"model": "m", "prompt": "0123456789", "max_tokens": 100})),
        ("/v1/embeddings", json!({"model": "m", "input": "0123456789"})),
        ("/v1/responses", json!({"model": "m", "input": "0123456789", "max_output_tokens": 100})),
        ("/v1/messages", json!({"model": "m", "messages": messages, "max_tokens": 100})),
    ]
}

fn streams() -> Vec<(&'static str, Value)> {
    let mut streams = endpoints();
    streams.retain(|(path, _)| *path != "/v1/embeddings");
    for (_, body) in &mut streams {
        body["stream"] = json!(true);
    }
    streams
}

impl Bench {
    async fn post(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> Answer {
        Answer::of(self.send(request("POST", path, headers, body.to_string())).await).await
    }
}

fn output(path: &str) -> u64 {
    if path == "/v1/embeddings" { 0 } else { 30 }
}

#[tokio::test]
async fn every_endpoint_settles_what_it_used() {
    for (path, body) in endpoints().into_iter().chain(streams()) {
        let bench = Bench::new().await;
        let answer = bench.post(path, &body, &[THIRTY, TEN]).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text);
        assert_eq!((bench.tokens(), bench.requests()), (10 + output(path), 1), "{path} {body}");
        assert_eq!(answer.header("x-ratelimit-limit-tokens"), Some("1000"), "{path}");
        assert!(!answer.text.contains(r#""choices":[],"#), "{path}: {}", answer.text);
    }
}

#[tokio::test]
async fn input_and_output_are_counted_apart() {
    let more = "  - { id: b, model: split, upstream: 'STUB/v1', limits: [{ unit: input_tokens, amount: 1000, window: 60s }, { unit: output_tokens, amount: 1000, window: 60s }] }\n";
    for (path, mut body) in endpoints().into_iter().chain(streams()) {
        let bench = Bench::with(Extra { more, ..Extra::default() }).await;
        body["model"] = json!("split");
        let answer =
            bench.post(path, &body, &[THIRTY, ("x-stub-prompt-tokens", "40"), ("x-stub-cached-tokens", "15")]).await;
        let standings = bench.limiter.handle("b").unwrap().standings();
        let used = |unit: Unit| standings.iter().find(|standing| standing.quota.unit() == unit).unwrap().used;
        assert_eq!((used(Unit::InputTokens), used(Unit::OutputTokens)), (40, output(path)), "{path} {}", answer.text);
    }
}

#[tokio::test]
async fn a_prompt_of_every_kind_is_within_its_bound() {
    for (path, body) in endpoints() {
        let bench = Bench::new().await;
        // The stub counts a byte a token: more cannot be.
        let answer = bench.post(path, &body, &[("x-stub-fault", "no-usage"), THIRTY]).await;
        assert_eq!(answer.status, StatusCode::OK);
        let reserved = bench.tokens() - if output(path) == 0 { 0 } else { 100 };
        assert!((10..=40).contains(&reserved), "{path}: {reserved}");
    }
}

#[tokio::test]
async fn usage_that_lies_is_as_good_as_none_and_is_counted() {
    for fault in ["negative-usage", "absurd-usage"] {
        for (path, body) in endpoints().into_iter().chain(streams()) {
            let (lied, silent) = (Bench::new().await, Bench::new().await);
            lied.post(path, &body, &[("x-stub-fault", fault), THIRTY]).await;
            silent.post(path, &body, &[("x-stub-fault", "no-usage"), THIRTY]).await;
            assert_eq!(lied.tokens(), silent.tokens(), "{path} {fault}");
            assert!(lied.metrics().await.contains(r#"quotum_unreported_total{reason="lie"} 1"#), "{path} {fault}");
        }
    }
}

#[tokio::test]
async fn an_answer_in_another_encoding_keeps_its_reservation() {
    for (path, body) in endpoints() {
        for extra in ["", "unreported: counted"] {
            let bench = Bench::with(Extra { deployment: extra, ..Extra::default() }).await;
            let answer = bench.post(path, &body, &[("x-stub-fault", "gzip"), THIRTY]).await;
            assert_eq!(answer.header("content-encoding"), Some("gzip"));
            assert!(bench.tokens() >= 10 + if output(path) == 0 { 0 } else { 100 }, "{path}: {}", bench.tokens());
            assert!(bench.metrics().await.contains(r#"quotum_unreported_total{reason="encoded"} 1"#));
        }
    }
}

#[tokio::test]
async fn an_answer_of_the_wrong_type_is_read_all_the_same() {
    for (path, body) in endpoints() {
        let bench = Bench::new().await;
        let answer = bench.post(path, &body, &[("x-stub-fault", "html"), THIRTY, TEN]).await;
        assert_eq!(answer.header("content-type"), Some("text/html"));
        assert_eq!(bench.tokens(), 10 + output(path), "{path}");
    }
}

#[tokio::test]
async fn garbage_in_a_stream_passes_and_keeps_its_reservation() {
    for (path, body) in streams() {
        let bench = Bench::new().await;
        let answer = bench.post(path, &body, &[("x-stub-fault", "garbage")]).await;
        assert!(answer.text.contains("no JSON here"), "{path}");
        assert!(bench.tokens() >= 110, "{path}: {}", bench.tokens());
    }
}

#[tokio::test]
async fn a_stream_that_gives_up_costs_the_prompt_and_what_came() {
    for (path, mut body) in streams() {
        let bench = Bench::new().await;
        body[if path == "/v1/responses" { "max_output_tokens" } else { "max_tokens" }] = json!(500);
        let answer = bench.post(path, &body, &[("x-stub-fault", "error-event"), THIRTY]).await;
        assert!(answer.text.contains("error"), "{path}");
        // Thirty words of five bytes, and a prompt of ten and its template.
        assert!((160..=200).contains(&bench.tokens()), "{path}: {}", bench.tokens());
    }
}

#[tokio::test]
async fn a_cut_stream_is_told_in_the_words_of_its_api() {
    for (path, mut body) in streams() {
        let bench = Bench::new().await;
        body[if path == "/v1/responses" { "max_output_tokens" } else { "max_tokens" }] = json!(500);
        let cut = [THIRTY, ("x-stub-fault", "cut"), ("x-stub-body-ms", "100")];
        let answer = bench.post(path, &body, &cut).await;
        assert!(answer.broke_off, "{path}");
        assert!((10..300).contains(&bench.tokens()), "{path}: {}", bench.tokens());
        let (name, last) = answer.text.trim_end().rsplit_once("data: ").unwrap();
        let last: Value = serde_json::from_str(last).unwrap();
        match path {
            "/v1/messages" => {
                assert!(name.ends_with("event: error\n"), "{name}");
                assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("api_error")));
            }
            "/v1/responses" => assert_eq!((&last["type"], &last["code"]), (&json!("error"), &json!("upstream_cut"))),
            _ => assert_eq!(last["error"]["code"], "upstream_cut"),
        }
    }
}

#[tokio::test]
async fn a_caller_who_hangs_up_pays_in_every_dialect() {
    for (path, body) in streams() {
        let bench = Bench::new().await;
        let slow = [THIRTY, ("x-stub-body-ms", "600000")];
        let mut stream = bench.send(request("POST", path, &slow, body.to_string())).await.into_body();
        stream.frame().await.unwrap().unwrap();
        assert!(bench.tokens() >= 110, "{path}");
        drop(stream);
        assert!((10..110).contains(&bench.tokens()), "{path}: {}", bench.tokens());
        assert_eq!(bench.requests(), 1, "{path}");
    }
}

#[tokio::test]
async fn anthropics_callers_are_refused_in_anthropics_words() {
    let (_, body) = endpoints().pop().unwrap();
    let extra = Extra { credentials: &["right"], proxy: "max_body: 1KiB", ..Extra::default() };
    let bench = Bench::with(extra).await;
    let right = ("x-api-key", "right");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut body = body.clone();
        change(&mut body);
        body.to_string()
    };
    let (all, large) = (with(&|_| {}), with(&|body| body["system"] = json!("x".repeat(2_000))));
    let sent = |method: &str, headers: &[(&str, &str)], body: &str| {
        bench.send(request(method, "/v1/messages", headers, body.to_owned()))
    };
    for (answer, status, kind) in [
        (sent("POST", &[], &all).await, 401, "authentication_error"),
        (sent("GET", &[right], "").await, 405, "invalid_request_error"),
        (sent("POST", &[right], "{").await, 400, "invalid_request_error"),
        (sent("POST", &[right, ("content-type", "text/plain")], &all).await, 415, "invalid_request_error"),
        (sent("POST", &[right, ("content-encoding", "gzip")], &all).await, 415, "invalid_request_error"),
        (sent("POST", &[right], &with(&|body| body["max_tokens"] = json!(-1))).await, 400, "invalid_request_error"),
        (sent("POST", &[right], &with(&|body| body["model"] = json!("x"))).await, 404, "not_found_error"),
        (sent("POST", &[right], &large).await, 413, "request_too_large"),
        (sent("POST", &[right], &with(&|body| body["max_tokens"] = json!(5000))).await, 413, "request_too_large"),
        (sent("POST", &[right, ("x-stub-fault", "redirect")], &all).await, 502, "api_error"),
    ] {
        let answer = Answer::of(answer).await;
        assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
        let error = answer.json();
        assert_eq!((&error["type"], &error["error"]["type"]), (&json!("error"), &json!(kind)), "{error}");
        assert!(error["error"]["message"].is_string() && answer.header("content-type") == Some("application/json"));
    }
}

#[tokio::test]
async fn anthropics_callers_are_told_when_to_come_back() {
    let (_, mut body) = endpoints().pop().unwrap();
    body["max_tokens"] = json!(900);
    let bench = Bench::new().await;
    let first = bench.post("/v1/messages", &body, &[("x-stub-fault", "no-usage")]).await;
    assert_eq!(first.header("anthropic-ratelimit-tokens-limit"), Some("1000"));
    assert_eq!(first.header("anthropic-ratelimit-requests-remaining"), Some("9"));
    assert_eq!(first.header("anthropic-ratelimit-tokens-reset"), Some("2023-11-14T22:14:00Z"));
    let refused = bench.post("/v1/messages", &body, &[]).await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    assert_eq!(refused.header("x-quotum-refused-by"), Some("quotum"));
    assert!(refused.header("retry-after").is_some() && refused.header("retry-after-ms").is_some());
}

#[tokio::test]
async fn the_wrong_content_type_is_refused_before_anything_is_charged() {
    let bench = Bench::new().await;
    for (path, body) in endpoints() {
        for wrong in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"] {
            let answer = bench.post(path, &body, &[("content-type", wrong)]).await;
            assert_eq!(answer.status, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{path}");
        }
        for right in ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"] {
            let answer = bench.post(path, &body, &[("content-type", right), ("x-stub-fault", "400")]).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "the stub's: {path}");
            assert!(answer.text.contains("the stub was told"), "{}", answer.text);
            bench.limiter.handle("a").unwrap();
        }
        if bench.requests() > 6 {
            break;
        }
    }
    assert_eq!(bench.tokens(), 0);
}

#[tokio::test]
async fn anthropics_models_are_listed_for_anthropics_callers() {
    let bench = Bench::new().await;
    let version = [("anthropic-version", "2023-06-01")];
    let listed = Answer::of(bench.send(request("GET", "/v1/models", &version, "")).await).await.json();
    assert_eq!((&listed["data"][0]["type"], &listed["has_more"]), (&json!("model"), &json!(false)));
    let one = Answer::of(bench.send(request("GET", "/v1/models/m", &[], "")).await).await;
    assert_eq!(one.json()["object"], "model");
    let none = Answer::of(bench.send(request("GET", "/v1/models/a/b", &[], "")).await).await;
    assert_eq!((none.status, &none.error()["code"]), (StatusCode::NOT_FOUND, &json!("model_not_found")));
}
