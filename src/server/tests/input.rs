//! Bad input of every kind, byte for byte as it arrives: what the caller is told, what
//! the upstream sees of it, and what it costs.

use super::*;

/// Returns a chat request, as its bytes.
fn post(path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}")
}

/// Returns the status of an answer and its error in the shape of `path`'s API.
fn told(path: &str, answer: &str) -> (u16, Value) {
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect(answer);
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error} in {answer}"));
    let error = &body["error"];
    if path.starts_with("/v1/messages") {
        assert_eq!(body["type"], "error", "{answer}");
        assert!(error["type"].is_string() && error["message"].is_string(), "{answer}");
    } else {
        for field in ["message", "type", "param", "code"] {
            assert!(error.get(field).is_some(), "{field} in {answer}");
        }
    }
    (status, error.clone())
}

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";
const PATHS: [&str; 5] = [CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", MESSAGES];

#[tokio::test]
async fn what_is_no_request_is_told_so_by_every_api_and_costs_nothing() {
    let bench = Bench::new().await;
    for path in PATHS {
        for (headers, body, status) in [
            // Malformed and truncated.
            ("", "", 400),
            ("", "{", 400),
            ("", "[]", 400),
            ("", "\"m\"", 400),
            ("", "{\"model\":\"m\",\"messages\":[{\"role\":\"user\"", 400),
            ("", "{\"model\":\"m\"}{\"model\":\"m\"}", 400),
            ("", "{\"model\":\"m\\ud800\"}", 400),
            ("", "{}", 400),
            // Said twice, in conflict or not.
            ("", "{\"model\":\"m\",\"model\":\"m\"}", 400),
            // Of another type, or in another encoding.
            ("content-type: text/plain\r\n", "{\"model\":\"m\"}", 415),
            ("content-type: application/x-www-form-urlencoded\r\n", "model=m", 415),
            ("content-type: multipart/form-data; boundary=b\r\n", "--b--", 415),
            ("content-encoding: gzip\r\n", "\u{1f}\u{8b}", 415),
            ("content-encoding: br\r\n", "{}", 415),
            ("content-encoding: deflate\r\n", "{}", 415),
            ("content-encoding: zstd\r\n", "{}", 415),
            ("content-encoding: identity, gzip\r\n", "{}", 415),
            ("content-encoding: identity\r\ncontent-encoding: gzip\r\n", "{}", 415),
        ] {
            let answer = bench.raw(post(path, headers, body)).await;
            let (found, error) = told(path, &answer);
            assert_eq!(found, status, "{path} {headers}{body}: {answer}");
            if let Some(encoding) = headers.strip_prefix("content-encoding: ") {
                let encoding = encoding.split(['\r']).next().unwrap().trim_start_matches("identity, ");
                let message = error["message"].as_str().unwrap();
                assert!(encoding == "identity" || message.contains(encoding), "{answer}");
                assert!(answer.contains("accept-encoding: identity"), "{answer}");
            }
        }
    }
    assert_eq!((bench.tokens(), bench.requests()), (0, 0));
}

#[tokio::test]
async fn a_body_that_breaks_off_costs_nothing() {
    let bench = Bench::new().await;
    for body in ["content-length: 100\r\n\r\n{\"model\"", "transfer-encoding: chunked\r\n\r\n5\r\n{\"mo"] {
        let (mut io, _stop) = bench.connect(1 << 16);
        let sent = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\n{body}");
        tokio::io::AsyncWriteExt::write_all(&mut io, sent.as_bytes()).await.unwrap();
        tokio::io::AsyncWriteExt::shutdown(&mut io).await.unwrap();
        let answer = callers::rest(&mut io).await;
        // Whoever has hung up is not there to be told.
        assert!(answer.is_empty() || told(CHAT, &answer).0 == 400, "{answer}");
    }
    let answer =
        bench.raw(format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")).await;
    assert_eq!(told(CHAT, &answer).0, 400, "{answer}");
    assert_eq!((bench.tokens(), bench.requests()), (0, 0));
}

#[tokio::test]
async fn caps_that_cannot_be_are_refused_and_of_several_the_largest_counts() {
    let bench = Bench::new().await;
    let with = |cap: &str| format!(r#"{{"model":"m","messages":[{{"role":"user","content":"0123456789"}}],{cap}}}"#);
    for cap in [
        r#""max_tokens":-1"#,
        r#""max_tokens":1e3"#,
        r#""max_tokens":"100""#,
        r#""max_tokens":99999999999999999999"#,
        r#""max_tokens":5,"max_tokens":5000"#,
        r#""max_tokens":5,"max_completion_tokens":-5"#,
        r#""max_tokens":5,"n":-1"#,
        r#""max_tokens":5,"n":1.5"#,
    ] {
        let answer = bench.raw(post(CHAT, "", &with(cap))).await;
        let (status, error) = told(CHAT, &answer);
        assert_eq!(status, 400, "{cap}: {answer}");
        // Of a field that stands twice nobody can say which was meant.
        assert!(error["param"].is_string() || cap.matches("max_tokens").count() == 2, "{cap}: {answer}");
    }
    assert_eq!((bench.tokens(), bench.requests()), (0, 0));
    for cap in [r#""max_tokens":5,"max_completion_tokens":60"#, r#""max_completion_tokens":5,"max_tokens":60"#] {
        let bench = Bench::new().await;
        let answer = bench.raw(post(CHAT, "x-stub-fault: no-usage\r\n", &with(cap))).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(bench.tokens(), PROMPT + 60, "{cap}");
    }
}

#[tokio::test]
async fn giant_prompts_are_too_large_for_the_limit_or_for_the_pod() {
    let bench = Bench::with(Extra { proxy: "max_body: 64KiB", ..Extra::default() }).await;
    for (path, limit, pod) in [(CHAT, 429, 413), (MESSAGES, 413, 413)] {
        for (length, status) in [(5_000, limit), (70_000, pod)] {
            let text = "x".repeat(length);
            let body = json!({"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": text}]});
            let answer = bench.raw(post(path, "", &body.to_string())).await;
            assert_eq!(told(path, &answer).0, status, "{path} {length}");
            assert!(!answer.contains("xxx") && !answer.contains("retry-after"), "{path} {length}");
        }
    }
    assert_eq!((bench.tokens(), bench.requests()), (0, 0));
}

#[tokio::test]
async fn too_many_headers_are_told_so_and_far_too_many_are_cut_off() {
    let bench = Bench::with(Extra { proxy: "max_headers: 20, max_header_bytes: 8KiB", ..Extra::default() }).await;
    let many = |count: usize| (0..count).map(|i| format!("x-{i}: 1\r\n")).collect::<String>();
    let large = |bytes: usize| format!("x-large: {}\r\n", "x".repeat(bytes));
    for path in [CHAT, MESSAGES, "/v1/models", "/v1/anything", "/nothing"] {
        for headers in [many(21), large(9_000)] {
            let answer = bench.raw(post(path, &headers, &hello().to_string())).await;
            assert_eq!(told(path, &answer).0, 431, "{path}: {answer}");
        }
    }
    for headers in [many(100), large(40_000)] {
        let answer = bench.raw(post(CHAT, &headers, &hello().to_string())).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
    assert_eq!((bench.tokens(), bench.requests()), (0, 0));
    // Two at each of five paths, and those that hyper cut off.
    assert!(bench.metrics().await.contains(r#"quotum_callers_turned_away_total{reason="headers"} 12"#));
    for headers in [many(15), large(7_000)] {
        let answer = bench.raw(post(CHAT, &headers, &hello().to_string())).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[tokio::test]
async fn a_request_is_read_however_its_first_bytes_come() {
    let bench = Bench::new().await;
    // It begins as HTTP/2 does.
    let sent = post(CHAT, "", &hello().to_string());
    for size in 1..6 {
        let (mut io, _stop) = bench.connect(1 << 16);
        for piece in sent.as_bytes().chunks(size) {
            tokio::io::AsyncWriteExt::write_all(&mut io, piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        let answer = super::callers::rest(&mut io).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{size}: {answer}");
    }
}

#[tokio::test]
async fn what_is_not_http_is_refused_before_it_reaches_anything() {
    let bench = Bench::new().await;
    let chat = hello().to_string();
    let length = chat.len();
    for sent in [
        "hello\r\n\r\n".to_owned(),
        "POST /v1/chat/completions HTTP/9.9\r\n\r\n".to_owned(),
        format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\nbad header: 1\r\n\r\n"),
        format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\nx: a\u{0}b\r\n\r\n"),
        // Lengths that differ, or are none.
        format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: {length}\r\n\r\n{chat}"),
        format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n{chat}"),
        format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: five\r\n\r\n{chat}"),
    ] {
        let answer = bench.raw(&sent).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{sent:?}: {answer}");
    }
    assert_eq!((bench.tokens(), bench.requests()), (0, 0));
}

#[tokio::test]
async fn methods_and_targets_that_lead_elsewhere_lead_nowhere() {
    let bench = Bench::new().await;
    let body = r#"{"model":"m"}"#;
    let length = body.len();
    for (line, status) in [
        ("CONNECT example.invalid:443", 404),
        ("CONNECT x", 404),
        ("TRACE /v1/chat/completions", 405),
        ("OPTIONS *", 404),
        ("BREW /v1/anything", 404),
        ("GET /v1/chat/completions", 405),
        ("POST //v1/chat/completions", 404),
        ("POST /v1//../admin", 404),
        ("POST /v1/../status", 404),
        ("POST /v1/x/..;/admin", 404),
        ("POST /v1/%2e%2e/admin", 404),
        ("POST /v1/x/..%2fadmin", 404),
        ("POST /v1/x/%252e%252e/admin", 404),
        ("POST /v1/x/%252e%252e%252fadmin", 404),
        ("POST /v1/x/..%5cadmin", 404),
        ("POST /v1%2fchat/completions", 404),
        ("POST /v1%00/x", 404),
        ("POST /V1/chat/completions", 404),
        ("POST /v1", 404),
        ("POST http://example.invalid/status", 404),
        ("POST /metrics", 404),
    ] {
        let sent = format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}");
        let answer = bench.raw(sent).await;
        assert_eq!(told("", &answer).0, status, "{line}: {answer}");
    }
    assert_eq!((bench.tokens(), bench.requests()), (0, 0));
    assert_eq!(bench.sent().await, 0);
}

#[tokio::test]
async fn unusual_but_right_requests_are_served() {
    let chat = hello().to_string();
    let length = chat.len();
    let ten = "x-stub-completion-tokens: 10\r\n";
    for (sent, first) in [
        // An absolute target, as a client with a proxy setting sends it.
        (
            format!(
                "POST http://other{CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{ten}content-length: {length}\r\n\r\n{chat}"
            ),
            "HTTP/1.1 200",
        ),
        (format!("POST {CHAT} HTTP/1.0\r\n{ten}content-length: {length}\r\n\r\n{chat}"), "HTTP/1.0 200"),
        (
            format!(
                "POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{ten}expect: 100-continue\r\ncontent-length: {length}\r\n\r\n{chat}"
            ),
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200",
        ),
        // Chunks, an extension, and trailers that nobody may take for headers.
        (
            format!(
                "POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{ten}trailer: x-stub-fault\r\ntransfer-encoding: chunked\r\n\r\n{length:x};a=b\r\n{chat}\r\n0\r\nx-stub-fault: 500\r\n\r\n"
            ),
            "HTTP/1.1 200",
        ),
        // An offer to speak something else is not taken up.
        (
            format!(
                "POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close, upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n{ten}content-length: {length}\r\n\r\n{chat}"
            ),
            "HTTP/1.1 200",
        ),
        (
            format!(
                "POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{ten}content-length: {length}\r\ncontent-length: {length}\r\n\r\n{chat}"
            ),
            "HTTP/1.1 200",
        ),
        (
            format!(
                "POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{ten}content-encoding: identity\r\ncontent-type: Application/JSON; charset=utf-8\r\ncontent-length: {length}\r\n\r\n{chat}"
            ),
            "HTTP/1.1 200",
        ),
    ] {
        let bench = Bench::new().await;
        let answer = bench.raw(&sent).await;
        assert!(answer.starts_with(first), "{sent}: {answer}");
        // The stub counts a prompt's bytes.
        assert_eq!((bench.tokens(), bench.requests()), (20, 1), "{sent}: {answer}");
    }
}

#[tokio::test]
async fn a_stream_to_http_1_0_ends_with_its_connection() {
    let bench = Bench::new().await;
    let chat = streaming().to_string();
    let length = chat.len();
    let answer = bench.raw(format!("POST {CHAT} HTTP/1.0\r\ncontent-length: {length}\r\n\r\n{chat}")).await;
    assert!(answer.starts_with("HTTP/1.0 200") && !answer.contains("transfer-encoding"), "{answer}");
    assert!(answer.ends_with("data: [DONE]\n\n"), "{answer}");
}
