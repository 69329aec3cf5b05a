//! What a caller is told who asks for what cannot be had; nothing of it costs anything.

use super::*;

/// Sends a request that must be refused and returns its error.
async fn refused(bench: &Bench, request: Request<Body>, status: StatusCode) -> Value {
    let answer = Answer::of(bench.send(request).await).await;
    assert_eq!(answer.status, status, "{}", answer.text);
    let error = answer.error();
    assert_eq!((bench.tokens(), bench.requests()), (0, 0), "a refusal was charged");
    error
}

#[tokio::test]
async fn malformed_json_is_told_so_without_being_repeated() {
    let bench = Bench::new().await;
    for wrong in ["", "{", "null", "{\"model\":\"m\",\"messages\":\"my secret prompt\"", "\u{0}"] {
        let sent = request("POST", "/v1/chat/completions", &[], bytes(wrong));
        let error = refused(&bench, sent, StatusCode::BAD_REQUEST).await;
        assert_eq!(error["type"], "invalid_request_error");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}

#[tokio::test]
async fn a_wrong_field_is_named() {
    let bench = Bench::new().await;
    for (field, value) in [
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(1.5)),
        ("max_completion_tokens", json!(99_999_999_999u64)),
        ("n", json!(0)),
        ("stream", json!("yes")),
        ("messages", json!("text")),
        ("messages", json!([])),
        ("model", json!(5)),
    ] {
        let mut body = hello();
        body[field] = value;
        let error = refused(&bench, chat(body, &[]), StatusCode::BAD_REQUEST).await;
        assert_eq!(error["param"], field);
    }
}

#[tokio::test]
async fn an_unknown_model_is_not_found() {
    let bench = Bench::new().await;
    let mut body = hello();
    body["model"] = json!("gpt-9");
    let error = refused(&bench, chat(body, &[]), StatusCode::NOT_FOUND).await;
    assert_eq!(error["code"], "model_not_found");
    assert!(error["message"].as_str().unwrap().contains("gpt-9"));
}

#[tokio::test]
async fn an_unknown_path_and_a_wrong_method_are_told_so() {
    let bench = Bench::new().await;
    for path in ["/v1/files", "/v1/nothing", "/"] {
        let error = refused(&bench, request("POST", path, &[], "{}"), StatusCode::NOT_FOUND).await;
        assert_eq!(error["code"], "unknown_url");
    }
    let wrong = request("GET", "/v1/chat/completions", &[], "");
    refused(&bench, wrong, StatusCode::METHOD_NOT_ALLOWED).await;
}

#[tokio::test]
async fn a_wrong_credential_is_refused_everywhere() {
    let bench = Bench::with(Extra { credentials: &["right"], ..Extra::default() }).await;
    for headers in [&[][..], &[("authorization", "Bearer wrong")], &[("x-api-key", "righ")]] {
        for (method, path) in [
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/nothing"),
            ("GET", "/v1/chat/completions"),
        ] {
            let sent = request(method, path, headers, hello().to_string());
            let error = refused(&bench, sent, StatusCode::UNAUTHORIZED).await;
            assert_eq!(error["code"], "invalid_api_key");
        }
    }
    for right in [("authorization", "Bearer right"), ("x-api-key", "right")] {
        assert_eq!(bench.chat(hello(), &[right]).await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn an_oversized_body_is_refused_whether_it_says_so_or_not() {
    let bench = Bench::with(Extra { proxy: "max_body: 1KiB", ..Extra::default() }).await;
    let large = "x".repeat(1_025);
    let announced = request("POST", "/v1/chat/completions", &[("content-length", "1025")], large.clone());
    refused(&bench, announced, StatusCode::PAYLOAD_TOO_LARGE).await;
    let unannounced = request(
        "POST",
        "/v1/chat/completions",
        &[],
        Body::from_stream(tokio_stream::iter([Ok::<_, std::io::Error>(large)])),
    );
    let error = refused(&bench, unannounced, StatusCode::PAYLOAD_TOO_LARGE).await;
    assert!(error["message"].as_str().unwrap().contains("1024"));
}

#[tokio::test]
async fn an_encoded_body_is_refused() {
    let bench = Bench::new().await;
    let sent = chat(hello(), &[("content-encoding", "gzip")]);
    refused(&bench, sent, StatusCode::UNSUPPORTED_MEDIA_TYPE).await;
}

#[tokio::test]
async fn a_spent_limit_says_when_to_come_back() {
    let bench = Bench::new().await;
    let mut body = hello();
    body["max_tokens"] = json!(900);
    bench.chat(body.clone(), &[("x-stub-fault", "no-usage")]).await;
    let before = (bench.tokens(), bench.requests());
    let answer = bench.chat(body, &[]).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    let error = answer.error();
    assert_eq!((&error["type"], &error["code"]), (&json!("tokens"), &json!("rate_limit_exceeded")));
    let message = error["message"].as_str().unwrap();
    assert!(
        message.starts_with("Rate limit reached for m ") && message.contains("Limit 1000, Used 925, Requested 925"),
        "{message}"
    );
    assert_eq!(answer.header("x-quotum-refused-by"), Some("quotum"));
    assert_eq!(answer.header("x-quotum-limit"), Some("tokens=1000;window=60s;deployment=a"));
    let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    let ms: u64 = answer.header("retry-after-ms").unwrap().parse().unwrap();
    assert!(ms > 0 && seconds == ms.div_ceil(1_000), "{seconds} s, {ms} ms");
    assert_eq!(answer.header("x-ratelimit-remaining-tokens"), Some("75"));
    assert_eq!((bench.tokens(), bench.requests()), before);
}

#[tokio::test]
async fn a_limit_of_requests_speaks_of_requests() {
    let bench = Bench::new().await;
    for _ in 0..10 {
        assert_eq!(bench.chat(hello(), &[("x-stub-fault", "zero-usage")]).await.status, StatusCode::OK);
    }
    let answer = bench.chat(hello(), &[]).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(answer.error()["type"], "requests");
}

#[tokio::test]
async fn what_can_never_fit_invites_no_retry() {
    let bench = Bench::new().await;
    let mut body = hello();
    body["max_tokens"] = json!(5_000);
    let answer = bench.chat(body, &[]).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(answer.error()["message"].as_str().unwrap().starts_with("Request too large for m "));
    assert_eq!(answer.header("retry-after"), None);
    assert_eq!(answer.header("retry-after-ms"), None);
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    assert_eq!((bench.tokens(), bench.requests()), (0, 0));
}

#[tokio::test]
async fn a_request_without_a_cap_is_not_too_large() {
    let bench = Bench::new().await;
    let mut body = hello();
    body.as_object_mut().unwrap().remove("max_tokens");
    assert_eq!(bench.chat(body, &[]).await.status, StatusCode::OK);
}
