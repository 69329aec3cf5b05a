//! The stub upstream: OpenAI- and Anthropic-shaped, and a ledger of what it was sent.
//!
//! Knows how providers answer and how they fail. Must not know quotum: it is the other
//! side, and its count is what quotum is judged by. The invariant it keeps: an answer
//! depends on the request alone, and every request stands in the ledger by the arrival
//! of its last byte.
//!
//! A request may say what becomes of it by headers:
//!
//! | header | what it sets |
//! |---|---|
//! | `x-stub-id` | the record's `id` |
//! | `x-stub-prompt-tokens`, `x-stub-completion-tokens` | the tokens used |
//! | `x-stub-cached-tokens` | how many of the prompt's were read from the cache |
//! | `x-stub-first-byte-ms`, `x-stub-body-ms` | from the request's last byte to the first byte, and from there to the end |
//! | `x-stub-fault` | `400`, `404`, `429`, `500`, `503`, `529`, `redirect`, `garbage`, `no-usage`, `zero-usage`, `negative-usage`, `absurd-usage`, `gzip` (says so; it is not), `html` (the wrong content type), `error-event` (a stream's last), `cut` (in mid-stream), `stall` (a stream that goes silent in the middle) or `hang` (no first byte) |
//!
//! The query's `fault` does what `x-stub-fault` does, for one of several bases.

mod answer;

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, Uri, header};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

use answer::{Answer, Exchange, Shape};

use super::listen::{ACCEPT_AGAIN, Listener};
use crate::{Clock, Timestamp};

/// The longest ledger; the oldest records make room.
const MAX_RECORDS: usize = 1 << 20;

/// The largest request body.
const MAX_BODY: usize = 64 << 20;

/// How a stub behaves unless a request says otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Behaviour {
    /// From the request's last byte to the answer's first.
    pub first_byte: Duration,
    /// From the answer's first byte to its last.
    pub body: Duration,
    /// How many bytes of text its tokenizer counts as one token.
    pub bytes_per_token: u64,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self { first_byte: Duration::ZERO, body: Duration::ZERO, bytes_per_token: 4 }
    }
}

/// One request as the stub saw it.
#[derive(Clone, Debug)]
pub struct Record {
    pub id: String,
    pub path: &'static str,
    pub stream: bool,
    /// The arrival of the request's last byte.
    pub arrived_unix_ms: u64,
    pub prompt_tokens: u64,
    /// `None` until the answer has ended.
    pub completion_tokens: Option<u64>,
    /// From arrival to the answer's last byte, in microseconds.
    pub service_us: Option<u64>,
    pub status: u16,
}

#[derive(Debug, Default)]
struct Ledger {
    records: VecDeque<Record>,
    /// The number of the record at the front.
    first: u64,
}

/// The stub.
pub struct Stub {
    behaviour: Behaviour,
    /// Tells when a request arrives.
    clock: Box<dyn Clock>,
    /// What becomes of requests that do not say it.
    fault: Mutex<&'static str>,
    ledger: Mutex<Ledger>,
}

impl fmt::Debug for Stub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stub").field("behaviour", &self.behaviour).finish_non_exhaustive()
    }
}

impl Stub {
    pub fn new(behaviour: Behaviour) -> Arc<Self> {
        Self::with_clock(behaviour, SystemClock)
    }

    /// Returns a stub that takes the time of arrivals from this clock.
    pub fn with_clock(behaviour: Behaviour, clock: impl Clock) -> Arc<Self> {
        Arc::new(Self { behaviour, clock: Box::new(clock), fault: Mutex::default(), ledger: Mutex::default() })
    }

    /// From now on this becomes of requests that do not say it themselves; nothing bad if empty.
    pub fn fail(&self, fault: &'static str) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    fn fault(&self) -> String {
        (*self.fault.lock().unwrap_or_else(PoisonError::into_inner)).to_owned()
    }

    /// Returns what it was sent so far, by the begin of handling; of a long run the latest.
    pub fn records(&self) -> Vec<Record> {
        let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.records.iter().cloned().collect()
    }

    /// Returns the stub's endpoints.
    pub fn router(self: Arc<Self>) -> Router {
        let shaped = |shape: Shape| {
            post(move |State(stub): State<Arc<Self>>, uri: Uri, headers: HeaderMap, body: Body| async move {
                let fault = text(&headers, "x-stub-fault").or_else(|| fault_in(uri.query()?));
                let fault = fault.unwrap_or_else(|| stub.fault());
                stub.serve(shape, &fault, headers, body).await
            })
        };
        Router::new()
            .route(Shape::Chat.path(), shaped(Shape::Chat))
            .route(Shape::Completion.path(), shaped(Shape::Completion))
            .route(Shape::Embedding.path(), shaped(Shape::Embedding))
            .route(Shape::Responses.path(), shaped(Shape::Responses))
            .route(Shape::Messages.path(), shaped(Shape::Messages))
            .route("/v1/models", get(models))
            .route("/_ledger", get(ledger))
            .with_state(self)
    }

    async fn serve(self: Arc<Self>, shape: Shape, fault: &str, headers: HeaderMap, body: Body) -> Response<Body> {
        let Ok(body) = axum::body::to_bytes(body, MAX_BODY).await else {
            return json_response(
                StatusCode::BAD_REQUEST,
                &json!({"error": {"message": "the body could not be read"}}),
            );
        };
        let (arrived, arrived_unix_ms) = (Instant::now(), self.clock.now().unix_ms());
        let Ok(request) = serde_json::from_slice::<Value>(&body) else {
            return json_response(StatusCode::BAD_REQUEST, &json!({"error": {"message": "not JSON"}}));
        };
        let exchange = Exchange::of(shape, &request, &body, &headers, self.behaviour.bytes_per_token);
        let (status, failure) = failure(fault, shape);
        let record = Record {
            id: text(&headers, "x-stub-id").unwrap_or_default(),
            path: shape.path(),
            stream: exchange.stream,
            arrived_unix_ms,
            prompt_tokens: exchange.prompt_tokens,
            completion_tokens: None,
            service_us: None,
            status: status.as_u16(),
        };
        let open = OpenRecord { number: self.open(record), stub: self.clone(), arrived, streamed: 0 };
        let first_byte = millis(&headers, "x-stub-first-byte-ms").unwrap_or(self.behaviour.first_byte);
        let rest = millis(&headers, "x-stub-body-ms").unwrap_or(self.behaviour.body);
        if fault == "hang" {
            // The caller's timeout ends this; the record closes when it hangs up.
            std::future::pending::<()>().await;
        }
        due(arrived + first_byte).await;
        if let Some(failure) = failure {
            return failure;
        }
        let answer = Answer::new(&exchange, fault);
        if exchange.stream || fault == "cut" {
            return streamed(open, answer, arrived + first_byte, rest, fault);
        }
        due(arrived + first_byte + rest).await;
        let body = if fault == "garbage" { "<html>no JSON here".to_owned() } else { answer.whole() };
        open.close(exchange.completion_tokens);
        let content_type = if fault == "html" { "text/html" } else { "application/json" };
        let mut response = typed_response(StatusCode::OK, content_type, Body::from(body));
        if fault == "gzip" {
            response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        response
    }

    fn open(&self, record: Record) -> u64 {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        if ledger.records.len() == MAX_RECORDS {
            ledger.records.pop_front();
            ledger.first += 1;
        }
        ledger.records.push_back(record);
        ledger.first + ledger.records.len() as u64 - 1
    }

    fn amend(&self, number: u64, change: impl FnOnce(&mut Record)) {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let place = number.checked_sub(ledger.first).and_then(|place| usize::try_from(place).ok());
        if let Some(record) = place.and_then(|place| ledger.records.get_mut(place)) {
            change(record);
        }
    }
}

/// A record whose answer has not ended; closing it says what was used.
struct OpenRecord {
    stub: Arc<Stub>,
    number: u64,
    arrived: Instant,
    /// What has been sent so far: what a hang-up leaves as the actual use.
    streamed: u64,
}

impl OpenRecord {
    fn close(mut self, completion_tokens: u64) {
        self.streamed = completion_tokens;
    }
}

impl Drop for OpenRecord {
    fn drop(&mut self) {
        let service_us = u64::try_from(self.arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
        let completion_tokens = self.streamed;
        self.stub.amend(self.number, |record| {
            record.completion_tokens.get_or_insert(completion_tokens);
            record.service_us.get_or_insert(service_us);
        });
    }
}

/// Returns the answer in pieces, the first now and the last after `rest`.
fn streamed(mut open: OpenRecord, answer: Answer, start: Instant, rest: Duration, fault: &str) -> Response<Body> {
    let (tx, rx) = mpsc::channel::<Result<Bytes, std::io::Error>>(4);
    let pieces = answer.pieces();
    let content_type = answer.content_type();
    let (cut, stall) = (fault == "cut", fault == "stall");
    tokio::spawn(async move {
        let last = u32::try_from(pieces.len().saturating_sub(1).max(1)).unwrap_or(u32::MAX);
        let stop = if cut || stall { pieces.len() / 2 } else { pieces.len() };
        for (i, piece) in pieces.into_iter().take(stop.max(1)).enumerate() {
            let share = rest * u32::try_from(i).unwrap_or(u32::MAX) / last;
            let at = start + share;
            // A closed channel is a caller that hung up: the answer ends here.
            tokio::select! {
                biased;
                () = tx.closed() => return,
                () = due(at) => {}
            }
            open.streamed += piece.tokens;
            if piece.last {
                // The record must be whole before anybody can have read the end.
                let streamed = open.streamed;
                let service_us = u64::try_from(open.arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
                open.stub.amend(open.number, |record| {
                    record.completion_tokens = Some(streamed);
                    record.service_us = Some(service_us);
                });
            }
            if tx.send(Ok(piece.bytes)).await.is_err() {
                return;
            }
        }
        if stall {
            // The caller's patience ends this.
            return tx.closed().await;
        }
        if cut {
            // Due when the next piece would be, so that what came before is on its way.
            let share = rest * u32::try_from(stop.max(1)).unwrap_or(u32::MAX) / last;
            tokio::time::sleep_until(start + share).await;
            let _ = tx.send(Err(std::io::Error::other("cut"))).await;
        }
    });
    typed_response(StatusCode::OK, content_type, Body::from_stream(ReceiverStream::new(rx)))
}

/// Waits until then, and not at all if that is over: the runtime's clock would make a
/// millisecond of it.
async fn due(at: Instant) {
    if at > Instant::now() {
        tokio::time::sleep_until(at).await;
    }
}

/// Returns the status a fault leads to, and the answer if it is a failure.
fn failure(fault: &str, shape: Shape) -> (StatusCode, Option<Response<Body>>) {
    let status = match fault {
        "400" => StatusCode::BAD_REQUEST,
        "404" => StatusCode::NOT_FOUND,
        "429" => StatusCode::TOO_MANY_REQUESTS,
        "500" => StatusCode::INTERNAL_SERVER_ERROR,
        "503" => StatusCode::SERVICE_UNAVAILABLE,
        "529" => StatusCode::from_u16(529).unwrap_or(StatusCode::SERVICE_UNAVAILABLE),
        "redirect" => StatusCode::TEMPORARY_REDIRECT,
        _ => return (StatusCode::OK, None),
    };
    let message = "the stub was told to fail";
    let error = match shape {
        Shape::Messages => json!({"type": "error", "error": {"type": "stub", "message": message}}),
        _ => json!({"error": {"message": message, "type": "stub", "param": null, "code": fault}}),
    };
    let mut response = json_response(status, &error);
    if status == StatusCode::TOO_MANY_REQUESTS || fault == "529" {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("7"));
    }
    if status == StatusCode::TEMPORARY_REDIRECT {
        response.headers_mut().insert(header::LOCATION, HeaderValue::from_static("http://127.0.0.1:9/"));
    }
    (status, Some(response))
}

async fn models() -> Response<Body> {
    let model = json!({"id": "stub", "object": "model", "created": 0, "owned_by": "quotum"});
    json_response(StatusCode::OK, &json!({"object": "list", "data": [model]}))
}

async fn ledger(State(stub): State<Arc<Stub>>) -> Response<Body> {
    let records = stub.records().into_iter();
    let records: Vec<Value> = records
        .map(|record| {
            json!({
                "id": record.id,
                "path": record.path,
                "stream": record.stream,
                "status": record.status,
                "arrived_unix_ms": record.arrived_unix_ms,
                "prompt_tokens": record.prompt_tokens,
                "completion_tokens": record.completion_tokens,
                "service_us": record.service_us,
            })
        })
        .collect();
    json_response(StatusCode::OK, &Value::Array(records))
}

fn json_response(status: StatusCode, value: &Value) -> Response<Body> {
    typed_response(status, "application/json", Body::from(value.to_string()))
}

fn typed_response(status: StatusCode, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn fault_in(query: &str) -> Option<String> {
    query.split('&').find_map(|pair| pair.strip_prefix("fault=")).map(str::to_owned)
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

fn millis(headers: &HeaderMap, name: &str) -> Option<Duration> {
    number(headers, name).map(|ms| Duration::from_millis(ms.min(600_000)))
}

/// The system's clock.
struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp::from_unix_ms(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

/// Serves the stub at a listener until `stop` resolves.
pub async fn serve(stub: Arc<Stub>, listener: impl Listener, stop: impl Future<Output = ()> + Send + 'static) {
    let serving = axum::serve(Port(listener), stub.router());
    tokio::select! {
        biased;
        () = stop => {}
        _ = serving => {}
    }
}

/// A listener as axum's server takes it.
struct Port<L>(L);

impl<L: Listener> axum::serve::Listener for Port<L> {
    type Io = L::Stream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (L::Stream, SocketAddr) {
        loop {
            match self.0.accept().await {
                Ok(accepted) => return accepted,
                Err(error) => {
                    tracing::debug!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        // Nobody asks: there are no signals of axum's to say it to.
        Err(std::io::ErrorKind::Unsupported.into())
    }
}
