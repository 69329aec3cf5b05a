//! What has no dialect: passed on byte for byte, or not found.

use super::*;

use axum::extract::Request as Sent;

/// An upstream that answers with what it was sent, in an order and spacing no JSON
/// library would choose; returns its base.
async fn echo() -> String {
    async fn answer(sent: Sent) -> Response<Body> {
        let (head, body) = sent.into_parts();
        let seen = format!("{} {} {:?}", head.method, head.uri, head.headers);
        let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        let mut answer = Response::new(Body::from(body));
        answer.headers_mut().insert("x-seen", seen.parse().unwrap());
        answer.headers_mut().insert("x-ratelimit-limit-tokens", "5".parse().unwrap());
        answer.headers_mut().insert("content-type", "application/x-new".parse().unwrap());
        answer
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}/base", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
    base
}

async fn bench() -> Bench {
    let upstream = echo().await;
    let deployment = "api_key: sk-upstream, default_max_tokens: 50";
    Bench::with(Extra { upstream: Some(&upstream), deployment, ..Extra::default() }).await
}

#[tokio::test]
async fn a_future_endpoint_passes_byte_for_byte() {
    let bench = bench().await;
    let body = "{ \"new\" : [1.50,  {\"x\":\"\\u0061\"}],\n \"model\":\"m\", \"stream\": true }\n";
    for method in ["POST", "PUT", "PATCH"] {
        let answer = Answer::of(bench.send(request(method, "/v1/new/thing?a=b", &[("x-kept", "1")], body)).await).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.text, body);
        let seen = answer.header("x-seen").unwrap();
        assert!(seen.starts_with(&format!("{method} /base/new/thing?a=b ")) && seen.contains("x-kept"), "{seen}");
        assert_eq!(answer.header("content-type"), Some("application/x-new"));
        assert_eq!(answer.header("x-ratelimit-limit-tokens"), Some("1000"));
    }
    // The echo holds no usage: the estimate stays. 27 for the text and 50 for the output.
    assert!(bench.tokens() > 150 && bench.tokens() < 400, "{}", bench.tokens());
    assert_eq!(bench.requests(), 3);
}

#[tokio::test]
async fn usage_in_an_unknown_answer_is_charged() {
    let bench = bench().await;
    let body = r#"{"model":"m","usage":{"input_tokens":20,"output_tokens":3}}"#;
    bench.send(request("POST", "/v1/images/generations", &[], body)).await.into_body().collect().await.unwrap();
    assert_eq!((bench.tokens(), bench.requests()), (23, 1));
}

#[tokio::test]
async fn a_form_goes_to_the_model_it_names() {
    let bench = bench().await;
    let form = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.mp3\"\r\n\r\n\u{1}\u{2}\r\n--b--\r\n";
    let typed = [("content-type", "multipart/form-data; boundary=b")];
    let answer = Answer::of(bench.send(request("POST", "/v1/audio/transcriptions", &typed, form)).await).await;
    assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, form));
    assert_eq!(bench.tokens(), form.len().div_ceil(20) as u64 + 50);
}

#[tokio::test]
async fn what_names_no_model_is_not_found() {
    let bench = bench().await;
    for (method, path, body) in [
        ("GET", "/v1/files", ""),
        ("DELETE", "/v1/responses/resp_1", ""),
        ("POST", "/v1/responses/resp_1/cancel", ""),
        ("POST", "/v1/new", "{}"),
        ("POST", "/v2/new", r#"{"model":"m"}"#),
        ("POST", "/v1/x/../../admin", r#"{"model":"m"}"#),
        ("POST", "/v1/x/%2E%2e/admin", r#"{"model":"m"}"#),
        ("POST", "/v1/x/..%2fadmin", r#"{"model":"m"}"#),
    ] {
        let answer = Answer::of(bench.send(request(method, path, &[], body)).await).await;
        assert_eq!((answer.status, &answer.error()["code"]), (StatusCode::NOT_FOUND, &json!("unknown_url")), "{path}");
    }
    let unknown = Answer::of(bench.send(request("POST", "/v1/new", &[], r#"{"model":"x"}"#)).await).await;
    assert_eq!((unknown.status, &unknown.error()["code"]), (StatusCode::NOT_FOUND, &json!("model_not_found")));
    for wrong in ["{", r#"{"model":"m","model":"x"}"#, r#"{"model":"m","max_tokens":-5}"#] {
        let answer = Answer::of(bench.send(request("POST", "/v1/new", &[], wrong)).await).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{wrong}");
    }
    assert_eq!((bench.tokens(), bench.requests()), (0, 0));
}

#[tokio::test]
async fn the_key_goes_where_the_api_reads_it() {
    let bench = bench().await;
    let version = ("anthropic-version", "2023-06-01");
    for (path, theirs, not) in [
        ("/v1/messages", "\"x-api-key\": Sensitive", "authorization"),
        ("/v1/messages/count_tokens", "x-api-key", "authorization"),
        ("/v1/responses", "authorization", "x-api-key"),
        ("/v1/new", "authorization", "x-api-key"),
    ] {
        let body = json!({"model": "m", "messages": [{}], "input": "", "max_tokens": 1, "max_output_tokens": 1});
        let sent = request(
            "POST",
            path,
            &[version, ("authorization", "Bearer sk-caller"), ("accept-encoding", "gzip")],
            body.to_string(),
        );
        let answer = Answer::of(bench.send(sent).await).await;
        let seen = answer.header("x-seen").unwrap();
        // Over the wire nothing is marked as sensitive any more.
        assert!(seen.contains(theirs.trim_start_matches('"').split('"').next().unwrap()), "{path}: {seen}");
        assert!(
            seen.contains("sk-upstream") && !seen.contains("sk-caller") && !seen.contains(&format!("\"{not}\"")),
            "{path}: {seen}"
        );
        assert!(
            seen.contains(r#""anthropic-version": "2023-06-01""#) && seen.contains(r#""accept-encoding": "identity""#),
            "{seen}"
        );
    }
}
