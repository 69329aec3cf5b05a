//! What is charged when an answer comes, whole and as a stream.

use super::*;

const THIRTY: (&str, &str) = ("x-stub-completion-tokens", "30");

#[tokio::test]
async fn an_answer_settles_what_it_used() {
    let bench = Bench::new().await;
    let answer = bench.chat(hello(), &[THIRTY]).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.json()["usage"]["total_tokens"], 40);
    assert_eq!((bench.tokens(), bench.requests()), (40, 1));
    assert_eq!(answer.header("x-ratelimit-limit-tokens"), Some("1000"));
    assert_eq!(answer.header("x-ratelimit-limit-requests"), Some("10"));
    assert_eq!(answer.header("x-ratelimit-remaining-requests"), Some("9"));
    assert_eq!(answer.header("x-ratelimit-reset-tokens"), Some("30s"));
    assert_eq!(answer.header("x-quotum-wait-ms"), None);
}

#[tokio::test]
async fn a_stream_settles_and_hides_what_its_caller_did_not_ask_for() {
    let bench = Bench::new().await;
    let answer = bench.chat(streaming(), &[THIRTY]).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    assert!(answer.text.ends_with("data: [DONE]\n\n"), "{}", answer.text);
    assert!(!answer.text.contains("total_tokens") && !answer.text.contains(r#""choices":[]"#), "{}", answer.text);
    assert_eq!((bench.tokens(), bench.requests()), (40, 1));
}

#[tokio::test]
async fn a_stream_shows_usage_to_a_caller_who_asked() {
    let bench = Bench::new().await;
    let mut body = streaming();
    body["stream_options"] = json!({"include_usage": true});
    let answer = bench.chat(body, &[THIRTY]).await;
    assert!(answer.text.contains(r#""total_tokens":40"#), "{}", answer.text);
    assert_eq!(bench.tokens(), 40);
}

#[tokio::test]
async fn an_answer_without_usage_keeps_its_reservation() {
    for body in [hello(), streaming()] {
        let bench = Bench::new().await;
        bench.chat(body, &[THIRTY, ("x-stub-fault", "no-usage")]).await;
        assert_eq!((bench.tokens(), bench.requests()), (PROMPT + 100, 1));
    }
}

#[tokio::test]
async fn an_answer_without_usage_is_counted_where_that_is_asked_for() {
    for (mut body, role) in [(hello(), "assistant".len() as u64), (streaming(), "assistant".len() as u64)] {
        body["max_tokens"] = json!(500);
        let bench = Bench::with(Extra { deployment: "unreported: counted", ..Extra::default() }).await;
        bench.chat(body, &[THIRTY, ("x-stub-fault", "no-usage")]).await;
        // Thirty words of five bytes: a bound, far below the reservation.
        assert_eq!(bench.tokens(), PROMPT + 150 + role);
    }
}

#[tokio::test]
async fn an_answer_that_used_nothing_gives_the_tokens_back() {
    for body in [hello(), streaming()] {
        let bench = Bench::new().await;
        bench.chat(body, &[("x-stub-fault", "zero-usage")]).await;
        assert_eq!((bench.tokens(), bench.requests()), (0, 1));
    }
}

#[tokio::test]
async fn garbage_passes_and_keeps_its_reservation() {
    for body in [hello(), streaming()] {
        let bench = Bench::new().await;
        let answer = bench.chat(body, &[("x-stub-fault", "garbage")]).await;
        assert!(answer.text.contains("no JSON here"), "{}", answer.text);
        assert_eq!(bench.tokens(), PROMPT + 100);
    }
}

#[tokio::test]
async fn more_than_was_reserved_is_charged_too() {
    let bench = Bench::new().await;
    let used = [("x-stub-prompt-tokens", "300"), THIRTY];
    bench.chat(hello(), &used).await;
    assert_eq!(bench.tokens(), 330);
}

#[tokio::test]
async fn a_caller_who_hangs_up_pays_for_what_was_streamed() {
    let bench = Bench::new().await;
    // The end is an hour away: only what came before the hang-up can be charged.
    let slow = [THIRTY, ("x-stub-body-ms", "600000")];
    let response = bench.send(chat(streaming(), &slow)).await;
    let mut body = response.into_body();
    body.frame().await.unwrap().unwrap();
    assert_eq!(bench.tokens(), PROMPT + 100);
    drop(body);
    let used = bench.tokens();
    assert!((PROMPT..PROMPT + 100).contains(&used), "{used}");
    assert_eq!(bench.requests(), 1);
}

#[tokio::test]
async fn a_second_deployment_takes_what_the_first_has_no_room_for() {
    let more = "  - { id: b, model: m, upstream: 'STUB/v1', limits: [{ unit: tokens, amount: 1000, window: 60s }] }\n";
    let bench = Bench::with(Extra { more, ..Extra::default() }).await;
    let mut body = hello();
    body["max_tokens"] = json!(900);
    let keep = [("x-stub-fault", "no-usage")];
    for _ in 0..2 {
        assert_eq!(bench.chat(body.clone(), &keep).await.status, StatusCode::OK);
    }
    assert_eq!(bench.tokens(), PROMPT + 900);
    assert_eq!(bench.limiter.handle("b").unwrap().standings()[0].used, PROMPT + 900);
    assert_eq!(bench.chat(body, &keep).await.status, StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn the_models_are_those_of_the_config() {
    let bench = Bench::new().await;
    let answer = Answer::of(bench.send(request("GET", "/v1/models", &[], "")).await).await;
    assert_eq!(answer.json()["data"][0]["id"], "m");
    assert_eq!(answer.json()["object"], "list");
}

#[tokio::test]
async fn the_stub_counts_what_it_was_sent() {
    let bench = Bench::new().await;
    bench.chat(hello(), &[THIRTY, ("x-stub-id", "one")]).await;
    let ledger = crate::client::Client::new().json(&format!("{}/_ledger", bench.stub)).await.unwrap();
    let record = &ledger[0];
    assert_eq!(
        (&record["id"], &record["prompt_tokens"], &record["completion_tokens"]),
        (&json!("one"), &json!(10), &json!(30))
    );
    assert!(record["arrived_unix_ms"].is_u64() && record["service_us"].is_u64());
}

#[tokio::test]
async fn tokens_of_the_cache_count_with_their_weight() {
    let cached = [THIRTY, ("x-stub-prompt-tokens", "50"), ("x-stub-cached-tokens", "40")];
    for (weights, used) in [("", 80), ("weights: { cached_input: 0.1 }", 44), ("weights: { cached_input: 0 }", 40)] {
        for body in [hello(), streaming()] {
            let bench = Bench::with(Extra { deployment: weights, ..Extra::default() }).await;
            bench.chat(body, &cached).await;
            assert_eq!(bench.tokens(), used, "{weights}");
        }
    }
}
