//! What becomes of callers that are slow, silent, too many, or do not read.
//!
//! Connections are pipes in memory and the clock is paused: it jumps to the next timer
//! whenever nothing else is left to do.

use super::*;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::routing::post;
use http_body_util::Full;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

use super::super::connection::converse;
use super::super::listen::{self, Door};

/// How much is on its way in one direction.
const PIPE: usize = 64 << 10;

impl Bench {
    /// Opens a connection; the sender ends it when it turns true.
    pub(super) fn connect(&self, pipe: usize) -> (DuplexStream, watch::Sender<bool>) {
        let (ours, theirs) = tokio::io::duplex(pipe);
        let (stop, stopped) = watch::channel(false);
        let from = ([127, 0, 0, 1], 1).into();
        let (router, door) = (self.router.clone(), self.door());
        tokio::spawn(converse(theirs, from, router, Arc::new(door), stopped));
        (ours, stop)
    }

    /// Returns what callers meet.
    fn door(&self) -> Door {
        Door { tls: None, bounds: self.bounds, telemetry: self.telemetry.clone() }
    }

    /// Sends this over a connection of its own and returns what comes until it is closed.
    pub(super) async fn raw(&self, sent: impl AsRef<[u8]>) -> String {
        let (mut io, _stop) = self.connect(PIPE);
        // Who is refused early may not be able to send all of it.
        let _ = io.write_all(sent.as_ref()).await;
        rest(&mut io).await
    }
}

pub(super) async fn rest(io: &mut DuplexStream) -> String {
    let mut came = Vec::new();
    io.read_to_end(&mut came).await.unwrap();
    String::from_utf8(came).unwrap()
}

/// Reads up to and with the end of the answer's head, and its body by its length.
async fn answer(io: &mut DuplexStream) -> String {
    let mut came = Vec::new();
    loop {
        came.push(io.read_u8().await.unwrap());
        if came.ends_with(b"\r\n\r\n") {
            break;
        }
    }
    let head = String::from_utf8(came).unwrap();
    let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
    let mut body = vec![0; length.unwrap().parse().unwrap()];
    io.read_exact(&mut body).await.unwrap();
    head + std::str::from_utf8(&body).unwrap()
}

const MODELS: &str = "GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n";

fn seconds(from: Instant) -> u64 {
    from.elapsed().as_secs()
}

#[tokio::test(start_paused = true)]
async fn who_never_says_a_word_is_let_go() {
    let bench = Bench::new().await;
    let (mut io, _stop) = bench.connect(PIPE);
    let begun = Instant::now();
    assert_eq!(rest(&mut io).await, "");
    assert_eq!(seconds(begun), 10);
}

#[tokio::test(start_paused = true)]
async fn who_never_ends_the_beginning_of_http2_is_let_go_as_soon_as_with_a_head() {
    let whole = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let bench = Bench::new().await;
    for sent in [&whole[..3], &whole[..24], &whole[..32]] {
        let (mut io, _stop) = bench.connect(PIPE);
        let begun = Instant::now();
        io.write_all(sent).await.unwrap();
        io.read_to_end(&mut Vec::new()).await.unwrap();
        assert!((10..13).contains(&seconds(begun)), "{} bytes: {} s", sent.len(), seconds(begun));
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_end_is_told_so() {
    let bench = Bench::with(Extra { proxy: "timeouts: { header: 3s }", ..Extra::default() }).await;
    for first in ["", MODELS] {
        let (mut io, _stop) = bench.connect(PIPE);
        io.write_all(first.as_bytes()).await.unwrap();
        if !first.is_empty() {
            answer(&mut io).await;
            // Between two requests it may take its time.
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
        let begun = Instant::now();
        for byte in MODELS.as_bytes() {
            // A byte a second is progress, and not enough.
            if io.write_u8(*byte).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let told = rest(&mut io).await;
        assert!(told.starts_with("HTTP/1.1 408 ") && told.contains(r#""code":"request_timeout""#), "{told}");
        let (head, body) = told.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())), "{told}");
        serde_json::from_str::<Value>(body).unwrap();
        assert!(seconds(begun) <= 7, "{}", seconds(begun));
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_kept_for_its_time() {
    let bench = Bench::new().await;
    let (mut io, _stop) = bench.connect(PIPE);
    for _ in 0..3 {
        io.write_all(MODELS.as_bytes()).await.unwrap();
        assert!(answer(&mut io).await.starts_with("HTTP/1.1 200"));
        tokio::time::sleep(Duration::from_secs(74)).await;
    }
    let begun = Instant::now();
    assert_eq!(rest(&mut io).await, "");
    assert_eq!(seconds(begun), 1);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_stops_or_dribbles_is_told_so_in_the_callers_shape() {
    for (path, pause, within) in [
        ("/v1/chat/completions", 100_000, 30..=31),
        ("/v1/messages", 100_000, 30..=31),
        ("/v1/anything", 100_000, 30..=31),
        ("/v1/chat/completions", 20, 300..=320),
    ] {
        let bench = Bench::new().await;
        let (io, _stop) = bench.connect(PIPE);
        let (mut reading, mut writing) = tokio::io::split(io);
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{{");
        writing.write_all(head.as_bytes()).await.unwrap();
        let sending = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(pause)).await;
                if writing.write_all(b" ").await.is_err() {
                    return;
                }
            }
        });
        let begun = Instant::now();
        let mut told = Vec::new();
        reading.read_to_end(&mut told).await.unwrap();
        let told = String::from_utf8(told).unwrap();
        sending.abort();
        assert!(within.contains(&seconds(begun)), "{path}: {}", seconds(begun));
        assert!(told.starts_with("HTTP/1.1 408 "), "{told}");
        let error: Value = serde_json::from_str(told.split_once("\r\n\r\n").unwrap().1).unwrap();
        match path {
            "/v1/messages" => assert_eq!(error["error"]["type"], "invalid_request_error"),
            _ => assert_eq!(error["error"]["code"], "request_timeout"),
        }
        assert_eq!((bench.tokens(), bench.requests()), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn who_does_not_read_an_answer_is_let_go() {
    let bench = Bench::new().await;
    // Smaller than the answer.
    let (mut io, _stop) = bench.connect(64);
    let begun = Instant::now();
    io.write_all(MODELS.as_bytes()).await.unwrap();
    while io.write_u8(b'x').await.is_ok() {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!((120..=130).contains(&seconds(begun)), "{}", seconds(begun));
    assert_eq!(rest(&mut io).await.len(), 64);
}

#[tokio::test(start_paused = true)]
async fn who_reads_slowly_is_not() {
    let bench = Bench::new().await;
    let (mut io, _stop) = bench.connect(64);
    io.write_all(MODELS.as_bytes()).await.unwrap();
    let mut came = Vec::new();
    while !came.ends_with(b"\"list\"}") {
        tokio::time::sleep(Duration::from_secs(100)).await;
        let mut some = [0; 32];
        let read = io.read(&mut some).await.unwrap();
        assert_ne!(read, 0, "closed after {}", String::from_utf8_lossy(&came));
        came.extend_from_slice(&some[..read]);
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_http2_connection_is_told_that_it_ends() {
    let bench = Bench::new().await;
    let (io, _stop) = bench.connect(PIPE);
    let (mut send, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
    let connection = tokio::spawn(connection);
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_secs(70)).await;
        let asked = Request::get("http://x/v1/models").body(Full::<Bytes>::default()).unwrap();
        assert_eq!(send.send_request(asked).await.unwrap().status(), StatusCode::OK);
    }
    let begun = Instant::now();
    // In order: an end without a word would be an error.
    connection.await.unwrap().unwrap();
    assert!((75..=85).contains(&seconds(begun)), "{}", seconds(begun));
}

#[tokio::test]
async fn one_connection_too_many_is_refused_until_another_ends() {
    let bench = Bench::with(Extra { proxy: "max_connections: 1", ..Extra::default() }).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let (stop, stopped) = watch::channel(false);
    let serving = tokio::spawn(listen::serve(listener, bench.router.clone(), bench.door(), stopped));
    let mut first = TcpStream::connect(at).await.unwrap();
    first.write_all(MODELS.as_bytes()).await.unwrap();
    first.read_u8().await.unwrap();
    let mut told = String::new();
    TcpStream::connect(at).await.unwrap().read_to_string(&mut told).await.unwrap();
    assert!(told.starts_with("HTTP/1.1 503 ") && told.contains("retry-after: 1"), "{told}");
    let (head, body) = told.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("content-length: {}", body.len())), "{told}");
    assert_eq!(serde_json::from_str::<Value>(body).unwrap()["error"]["code"], "too_many_connections");
    let refused = r#"quotum_callers_turned_away_total{reason="connections"} 1"#;
    assert!(bench.metrics().await.contains(refused));
    first.shutdown().await.unwrap();
    first.read_to_end(&mut Vec::new()).await.unwrap();
    // Its place is free once the task that served it has ended.
    loop {
        let mut next = TcpStream::connect(at).await.unwrap();
        let _ = next.write_all(MODELS.as_bytes()).await;
        let mut came = [0; 12];
        if next.read_exact(&mut came).await.is_ok() && came == *b"HTTP/1.1 200" {
            break;
        }
    }
    stop.send_replace(true);
    serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn an_answer_that_is_not_read_is_not_fetched_either() {
    const PIECE: usize = 64 << 10;
    const PIECES: usize = 1_024;
    static MADE: AtomicUsize = AtomicUsize::new(0);
    let endless = || async {
        let piece = format!("data: {}\n\n", "x".repeat(PIECE - 8));
        let pieces = (0..PIECES).map(move |_| {
            MADE.fetch_add(1, Ordering::Relaxed);
            Ok::<_, std::io::Error>(piece.clone())
        });
        ([("content-type", "text/event-stream")], Body::from_stream(tokio_stream::iter(pieces)))
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = format!("http://{}/v1", listener.local_addr().unwrap());
    let router = Router::new().route("/v1/chat/completions", post(endless));
    tokio::spawn(async move { axum::serve(listener, router).await });
    let bench = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
    let (mut io, _stop) = bench.connect(PIPE);
    let body = streaming().to_string();
    let length = body.len();
    let sent = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    io.write_all(sent.as_bytes()).await.unwrap();
    let mut came = 1;
    io.read_u8().await.unwrap();
    // From here on the clock moves only when nothing else does.
    tokio::time::pause();
    for _ in 0..1_000 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let made = MADE.load(Ordering::Relaxed) * PIECE;
    // Two sockets' buffers and our own, not the 64 MiB there are.
    assert!(made < 20 << 20, "{made} bytes were fetched for one that were read");
    let mut some = vec![0; 1 << 20];
    loop {
        match io.read(&mut some).await.unwrap() {
            0 => break,
            read => came += read,
        }
    }
    assert!(came > PIECE * PIECES, "{came}");
}

#[tokio::test]
async fn more_bodies_than_a_pod_holds_are_refused_until_others_are_gone() {
    let bench = Bench::with(Extra { proxy: "max_body: 1KiB, max_bodies: 1500B", ..Extra::default() }).await;
    // Held while the rest of it is awaited.
    let (mut first, _stop) = bench.connect(PIPE);
    let begun = "x".repeat(900);
    let head = format!("POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{begun}");
    first.write_all(head.as_bytes()).await.unwrap();
    let mut body = hello();
    body["user"] = json!("y".repeat(700));
    // A pipe in memory on one thread: whatever can be read has been.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let refused = bench.chat(body.clone(), &[]).await;
    assert_eq!((refused.status, refused.header("retry-after")), (StatusCode::SERVICE_UNAVAILABLE, Some("1")));
    assert_eq!(refused.error()["code"], "too_many_bodies");
    drop(first);
    while bench.chat(body.clone(), &[("x-stub-fault", "zero-usage")]).await.status != StatusCode::OK {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.tokens(), 0);
}
