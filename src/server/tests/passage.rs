//! What passes in each direction, byte for byte, before an upstream that is anything.

use super::*;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// An upstream that says this to everybody and closes; returns its base and the head of
/// every request it is sent.
async fn saying(answer: impl AsRef<[u8]> + Send + Sync + 'static) -> (String, mpsc::UnboundedReceiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}/base", listener.local_addr().unwrap());
    let (tx, rx) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut io, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = io.read_u8().await else { break };
                head.push(byte);
            }
            let text = String::from_utf8_lossy(&head).into_owned();
            let length = text.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
            let _ = io.read_exact(&mut vec![0; length.unwrap_or(0)]).await;
            let _ = tx.send(head);
            let _ = io.write_all(answer.as_ref()).await;
            let _ = io.shutdown().await;
        }
    });
    (base, rx)
}

/// Sends these bytes and returns those that come back.
async fn raw(bench: &Bench, sent: &[u8]) -> Vec<u8> {
    let (mut io, _stop) = bench.connect(1 << 16);
    io.write_all(sent).await.unwrap();
    let mut came = Vec::new();
    io.read_to_end(&mut came).await.unwrap();
    came
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.to_ascii_lowercase().windows(part.len()).any(|window| window == part)
}

const USED_TWELVE: &str = r#"{"usage":{"prompt_tokens":10,"completion_tokens":2,"total_tokens":12}}"#;

fn fine(headers: &str, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\n{headers}content-length: {}\r\n\r\n{body}", body.len())
}

#[tokio::test]
async fn path_and_query_reach_the_upstream_byte_for_byte() {
    let (base, mut seen) = saying(fine("", USED_TWELVE)).await;
    let body = r#"{"model":"m"}"#;
    let target = "/v1/a%2Fb//c%20d;e,f/G~h?x=%zz&&y=a+b%20c&=&v=1?2/..";
    for upstream in [base.clone(), format!("{base}/?key=of-the-base")] {
        let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
        let sent =
            format!("POST {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 13\r\n\r\n{body}");
        assert!(raw(&bench, sent.as_bytes()).await.starts_with(b"HTTP/1.1 200"));
        let head = String::from_utf8(seen.recv().await.unwrap()).unwrap();
        let (_, below) = target.split_once("/v1").unwrap();
        let expected = match upstream.split_once('?') {
            Some((_, query)) => format!("POST /base{} HTTP/1.1", below.replacen('?', &format!("?{query}&"), 1)),
            None => format!("POST /base{below} HTTP/1.1"),
        };
        assert_eq!(head.lines().next(), Some(expected.as_str()));
    }
}

#[tokio::test]
async fn the_trace_context_of_a_caller_reaches_the_upstream() {
    let (base, mut seen) = saying(fine("", USED_TWELVE)).await;
    let bench = Bench::with(Extra { upstream: Some(&base), ..Extra::default() }).await;
    let context = [
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        ("baggage", "team=platform"),
    ];
    bench.chat(hello(), &context).await;
    let head = seen.recv().await.unwrap();
    for (name, value) in context {
        assert!(contains(&head, format!("{name}: {}\r\n", value.to_lowercase()).as_bytes()), "{name}");
    }
}

#[tokio::test]
async fn what_an_upstream_says_of_itself_to_browsers_reaches_no_caller() {
    let answer = fine(
        "Set-Cookie: __cf_bm=secret; path=/; domain=.upstream.invalid\r\nset-cookie: second=1\r\n\
         Strict-Transport-Security: max-age=31536000; includeSubDomains\r\nX-Request-Id: 7\r\n",
        USED_TWELVE,
    );
    let (upstream, _seen) = saying(answer).await;
    let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
    let told = bench.chat(hello(), &[]).await;
    // A cookie would be sent to us, which withhold it, or let one caller be taken for another.
    assert_eq!(told.header("set-cookie"), None);
    // It would speak for this pod's name, and for all below it.
    assert_eq!(told.header("strict-transport-security"), None);
    assert_eq!(told.header("x-request-id"), Some("7"));
}

#[tokio::test]
async fn a_caller_chooses_neither_the_key_nor_what_our_key_is_billed_to() {
    let (base, mut seen) = saying(fine("", USED_TWELVE)).await;
    let with_key = Extra { upstream: Some(&base), deployment: "api_key: ours", ..Extra::default() };
    for extra in [Extra { upstream: Some(&base), ..Extra::default() }, with_key] {
        let bench = Bench::with(extra).await;
        let withheld = [
            "authorization",
            "cookie",
            "api-key",
            "x-api-key",
            "ocp-apim-subscription-key",
            "x-goog-api-key",
            "openai-organization",
            "openai-project",
            "x-goog-user-project",
        ];
        let sent: Vec<_> = withheld.iter().map(|name| (*name, "theirs")).collect();
        let known = [("openai-beta", "assistants=v2"), ("anthropic-beta", "x"), ("anthropic-version", "2023-06-01")];
        for path in ["/v1/chat/completions", "/v1/messages", "/v1/images/generations"] {
            let all: Vec<_> = sent.iter().chain(&known).copied().collect();
            bench.send(request("POST", path, &all, hello().to_string())).await;
            let head = String::from_utf8(seen.recv().await.unwrap()).unwrap();
            assert!(!head.contains("theirs"), "{path}: {head}");
            for (name, value) in known {
                assert!(head.contains(&format!("{name}: {value}\r\n")), "{path}: {head}");
            }
        }
    }
}

#[tokio::test]
async fn headers_of_one_connection_stay_on_it_and_the_rest_pass_as_bytes() {
    let answer = fine(
        "Connection: X-Theirs, Close\r\nX-Theirs: 1\r\nAlt-Svc: h3=\":443\"\r\nTrailer: x-late\r\nKeep-Alive: timeout=5\r\n\
         X-Bytes: BYTES\r\nServer: theirs\r\nX-Twice: 1\r\nX-Twice: 2\r\n",
        USED_TWELVE,
    );
    let (upstream, mut seen) = saying(answer.replace("BYTES", "\u{e9}")).await;
    let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
    let body = hello().to_string();
    let mut sent = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: caller.invalid\r\nConnection: Close ,X-Mine,  TE\r\nX-Mine: 1\r\nTE: trailers\r\n\
         Upgrade: websocket\r\nProxy-Authorization: Basic eDp5\r\nKeep-Alive: 5\r\nX-Large: {}\r\nX-Empty:\r\nX-Twice: 1\r\n\
         X-Twice: 2\r\nContent-Length: {}\r\nX-Bytes: ",
        "l".repeat(30_000),
        body.len()
    )
    .into_bytes();
    sent.extend_from_slice(b"\xff\xfe\x80\r\n\r\n");
    sent.extend_from_slice(body.as_bytes());
    let came = raw(&bench, &sent).await;
    let head = seen.recv().await.unwrap();
    for gone in ["x-mine", "te: ", "upgrade", "proxy-authorization", "keep-alive", "caller.invalid", "close"] {
        assert!(!contains(&head, gone.as_bytes()), "{gone} in {}", String::from_utf8_lossy(&head));
    }
    assert!(contains(&head, b"x-bytes: \xff\xfe\x80\r\n") && contains(&head, b"x-empty: \r\n"));
    assert!(contains(&head, b"x-twice: 1\r\n") && contains(&head, b"x-twice: 2\r\n"));
    assert!(contains(&head, &[b'l'; 30_000]));
    for gone in ["x-theirs", "alt-svc", "trailer", "timeout=5"] {
        assert!(!contains(&came, gone.as_bytes()), "{gone} in {}", String::from_utf8_lossy(&came));
    }
    assert!(contains(&came, "x-bytes: \u{e9}\r\n".as_bytes()) && contains(&came, b"server: theirs\r\n"));
    assert!(contains(&came, b"x-twice: 1\r\n") && contains(&came, b"x-twice: 2\r\n"));
    assert!(came.ends_with(USED_TWELVE.as_bytes()));
    assert_eq!((bench.tokens(), bench.requests()), (12, 1));
}

#[tokio::test]
async fn an_upstream_that_speaks_no_http_is_told_apart_from_one_that_does() {
    let all = PROMPT + 100;
    let early = format!("HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n{}", fine("", USED_TWELVE));
    for (answer, status, code, tokens) in [
        ("hello\r\n\r\n".to_owned(), 502, "upstream_cut", PROMPT),
        (String::new(), 502, "upstream_cut", PROMPT),
        ("HTTP/1.1 200 OK\r\ncontent-le".to_owned(), 502, "upstream_cut", PROMPT),
        (
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n".into(),
            502,
            "upstream_cut",
            PROMPT,
        ),
        ("HTTP/1.1 304 Not Modified\r\n\r\n".into(), 502, "upstream_redirect", PROMPT),
        ("HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n".into(), 502, "upstream_redirect", PROMPT),
        (early, 200, "", 12),
        // No usage, in whatever form: everything that was reserved.
        (fine("", ""), 200, "", all),
        (fine("content-type: application/json\r\n", "[[[["), 200, "", all),
        (fine("content-type: application/json\r\n", r#"{"usage":{"total_tokens":-5}}"#), 200, "", all),
        (fine("content-type: application/json\r\n", r#"{"usage":"many"}"#), 200, "", all),
    ] {
        let (upstream, _seen) = saying(answer.clone()).await;
        for (path, is_openai) in [("/v1/chat/completions", true), ("/v1/messages", false)] {
            let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
            let sent = request("POST", path, &[], hello().to_string());
            let told = Answer::of(bench.send(sent).await).await;
            assert_eq!(told.status.as_u16(), status, "{answer:?}: {}", told.text);
            assert_eq!(told.header("upgrade"), None);
            match (code, is_openai) {
                ("", _) => {}
                (code, true) => assert_eq!(told.error()["code"], code, "{answer:?}"),
                (_, false) => assert_eq!(told.json()["error"]["type"], "api_error", "{answer:?}"),
            }
            if is_openai {
                assert_eq!((bench.tokens(), bench.requests()), (tokens, 1), "{answer:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_stream_of_garbage_passes_byte_for_byte_and_costs_what_was_reserved() {
    let stream = "content-type: text/event-stream\r\n";
    for garbage in [
        "no event at all",
        "data: {\"choices\":[{\"delta\":{\"content\":\n\ndata: }\n\n\n\n",
        "event\r\n\r\n: \u{7f}\n\ndata\n\ndata:\n\nid: 1\nretry: x\n\n",
        "data: [DONE]\n\ndata: {\"late\":1}\n\n",
        "data: {\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":-1,\"total_tokens\":0}}\n\n",
        "data: {\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":99999999999999999999999}}\n\n",
    ] {
        let (upstream, _seen) = saying(fine(stream, garbage)).await;
        let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
        let mut body = streaming();
        body["stream_options"] = json!({"include_usage": true});
        let answer = bench.chat(body, &[]).await;
        assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, garbage));
        assert!(!answer.broke_off);
        assert_eq!((bench.tokens(), bench.requests()), (PROMPT + 100, 1), "{garbage:?}");
    }
    // Bytes that are no text at all, and an end before the length that was promised.
    for (answer, broke_off) in [
        (&b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 9\r\n\r\ndata: \xff\n\n"[..], false),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99\r\n\r\ndata: \xff\n\n", true),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", true),
    ] {
        let (upstream, _seen) = saying(answer).await;
        let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
        let response = bench.send(chat(streaming(), &[])).await;
        let body = response.into_body().collect().await;
        assert_eq!(body.is_err(), broke_off, "{}", String::from_utf8_lossy(answer));
        let most = if broke_off { PROMPT + 99 } else { PROMPT + 100 };
        assert!((PROMPT..=most).contains(&bench.tokens()), "{}", bench.tokens());
        assert_eq!(bench.requests(), 1);
    }
}

/// A request as it comes over a connection of its own.
fn over_a_connection(path: &str, body: &str) -> String {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
}

#[tokio::test]
async fn an_answer_without_a_body_is_settled_as_one_with_a_body() {
    let all = PROMPT + 100;
    for (head, unreported, tokens) in [
        ("500 Internal Server Error", "reserved", PROMPT),
        ("503 Service Unavailable", "reserved", PROMPT),
        ("429 Too Many Requests", "reserved", PROMPT),
        ("400 Bad Request", "reserved", 0),
        ("200 OK", "reserved", all),
        ("200 OK", "counted", PROMPT),
        ("204 No Content", "counted", PROMPT),
        ("200 OK\r\ncontent-encoding: br", "counted", all),
    ] {
        // On a connection nobody asks for the body of an answer that says that it has none.
        for length in ["content-length: 0\r\n\r\n", "transfer-encoding: chunked\r\n\r\n0\r\n\r\n"] {
            let (upstream, _seen) = saying(format!("HTTP/1.1 {head}\r\n{length}")).await;
            let deployment = format!("unreported: {unreported}");
            let extra = Extra { upstream: Some(&upstream), deployment: &deployment, ..Extra::default() };
            let bench = Bench::with(extra).await;
            let sent = over_a_connection("/v1/chat/completions", &hello().to_string());
            let came = raw(&bench, sent.as_bytes()).await;
            assert!(came.starts_with(format!("HTTP/1.1 {}", &head[..3]).as_bytes()), "{head}");
            assert_eq!((bench.tokens(), bench.requests()), (tokens, 1), "{head} {unreported} {length}");
        }
    }
}

#[tokio::test]
async fn a_caller_is_told_the_length_that_its_answer_has() {
    let chunked = format!("transfer-encoding: chunked\r\n\r\n{:x}\r\n{USED_TWELVE}\r\n0\r\n\r\n", USED_TWELVE.len());
    let (length, plain) = (USED_TWELVE.len(), format!("\r\n{USED_TWELVE}"));
    for (answer, told) in [
        // Of both the encoding counts (RFC 9112, 6.3).
        (format!("content-length: 3\r\n{chunked}"), None),
        (format!("content-length: 300\r\n{chunked}"), None),
        (format!("content-length: {length}\r\n{plain}"), Some(length)),
        (format!("content-length: {length}, {length}\r\n{plain}"), Some(length)),
        (format!("content-length: {length}\r\ncontent-length: {length}\r\n{plain}"), Some(length)),
    ] {
        let (upstream, _seen) = saying(format!("HTTP/1.1 200 OK\r\n{answer}")).await;
        let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
        let came = bench.raw(over_a_connection("/v1/chat/completions", &hello().to_string())).await;
        let (head, body) = came.split_once("\r\n\r\n").unwrap();
        let said: Vec<_> = head.lines().filter(|line| line.starts_with("content-length")).collect();
        let expected: Vec<_> = told.iter().map(|length| format!("content-length: {length}")).collect();
        assert_eq!(said, expected, "{answer}");
        let whole = format!("{length:x}\r\n{USED_TWELVE}\r\n0\r\n\r\n");
        assert_eq!(body, if told.is_some() { USED_TWELVE } else { &whole }, "{answer}");
        assert_eq!((bench.tokens(), bench.requests()), (12, 1), "{answer}");
    }
}

#[tokio::test]
async fn a_target_that_fits_behind_no_upstreams_base_is_no_fault_of_the_upstreams() {
    let (upstream, _seen) = saying(fine("", USED_TWELVE)).await;
    let upstream = format!("{upstream}/{}?api-version=1", "b".repeat(500));
    let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
    // All that a request can be: 65,534 bytes of path and query.
    for (path, query) in [(65_100, 0), (65_529, 0), (10, 65_400), (40_000, 25_500)] {
        let path = format!("/v1/{}?{}", "p".repeat(path), "q".repeat(query));
        let came = bench.raw(over_a_connection(&path, r#"{"model":"m","max_tokens":5}"#)).await;
        assert!(came.starts_with("HTTP/1.1 414 ") && came.contains(r#""code":"uri_too_long""#), "{came}");
        assert_eq!((bench.tokens(), bench.requests()), (0, 0));
    }
    let path = format!("/v1/{}", "p".repeat(64_900));
    let came = bench.raw(over_a_connection(&path, r#"{"model":"m","max_tokens":5}"#)).await;
    assert!(came.starts_with("HTTP/1.1 200 "), "{came}");
    assert_eq!((bench.tokens(), bench.requests()), (12, 1));
}
