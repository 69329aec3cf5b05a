//! The limiter as middleware, as users of other services meet it.

#![cfg(feature = "server")]
#![allow(missing_docs)]

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use quotum::layer::{
    AnthropicMessages, BadRequest, Call, Dialect, Estimate, Event, LimitLayer, OpenAiChat, ReadUsage, Report, Usage,
};
use quotum::{Handle, Limiter, Quota};
use tower::{Layer, Service, ServiceExt};

#[allow(dead_code)] // its `main`
#[path = "../examples/axum_layer.rs"]
mod axum_layer;

const LIMIT: u64 = 1_000;
/// Does not end in the middle of a test.
const WINDOW: Duration = Duration::from_secs(100 * 86_400);
const CHAT: &str = r#"{"model":"m","max_tokens":100,"messages":[{"role":"user","content":"hello"}]}"#;
const STREAM: &str = r#"{"model":"m","max_tokens":100,"stream":true,"messages":[{"role":"user","content":"hello"}]}"#;
/// Bytes of the texts, 8 tokens for the message and 3 for the prompt.
const PROMPT: u64 = 4 + 5 + 8 + 3;

/// A service that notes what reaches it and answers with pieces of one body.
#[derive(Clone)]
struct Model {
    answer: &'static [&'static str],
    content_type: &'static str,
    asked: Arc<AtomicU32>,
}

impl Model {
    fn new(content_type: &'static str, answer: &'static [&'static str]) -> Self {
        Self { answer, content_type, asked: Arc::default() }
    }
}

impl Service<Request<Body>> for Model {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let length = request.headers().get(header::CONTENT_LENGTH).expect("the length of what was read");
        assert_ne!(length, "0");
        let pieces = self.answer.iter().map(|piece| Ok::<_, Infallible>(Bytes::from_static(piece.as_bytes())));
        let mut response = Response::new(Body::from_stream(tokio_stream::iter(pieces)));
        response.headers_mut().insert(header::CONTENT_TYPE, self.content_type.parse().unwrap());
        std::future::ready(Ok(response))
    }
}

fn handle() -> Handle {
    let limiter = Limiter::builder().deployment("d", [Quota::tokens(LIMIT).per(WINDOW).at_once()]).build().unwrap();
    limiter.handle("d").unwrap()
}

fn used(handle: &Handle) -> u64 {
    handle.standings()[0].used
}

async fn ask(
    limit: &LimitLayer,
    model: &Model,
    body: &'static str,
) -> (StatusCode, HeaderMap, quotum::layer::Answer<Body>) {
    let response = limit.layer(model.clone()).oneshot(Request::post("/").body(Body::from(body)).unwrap()).await;
    let (head, body) = response.unwrap().into_parts();
    (head.status, head.headers, body)
}

async fn text(body: quotum::layer::Answer<Body>) -> String {
    String::from_utf8(to_bytes(Body::new(body), 1 << 20).await.unwrap().to_vec()).unwrap()
}

const WHOLE: [&str; 1] = [r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":4,"total_tokens":11}}"#];
const EVENTS: [&str; 4] = [
    "data: {\"choices\":[{\"delta\":{\"content\":\"abc\"}}]}\n\n",
    "data: {\"choices\":[{\"delta\":{\"content\":\"defg\"}}]}\n\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":4,\"total_tokens\":11}}\n\n",
    "data: [DONE]\n\n",
];

#[tokio::test]
async fn an_answer_is_charged_with_what_it_says_it_used() {
    let (handle, model) = (handle(), Model::new("application/json", &WHOLE));
    let limit = LimitLayer::new(OpenAiChat, handle.clone());
    let (status, headers, body) = ask(&limit, &model, CHAT).await;
    assert_eq!((status, used(&handle)), (StatusCode::OK, PROMPT + 100));
    assert_eq!(headers["x-ratelimit-limit-tokens"], "1000");
    assert_eq!(headers["x-ratelimit-remaining-tokens"], (LIMIT - PROMPT - 100).to_string().as_str());
    assert_eq!(text(body).await, WHOLE[0]);
    assert_eq!(used(&handle), 11);
}

#[tokio::test]
async fn a_stream_is_asked_for_its_usage_and_the_caller_does_not_see_it() {
    let (handle, model) = (handle(), Model::new("text/event-stream", &EVENTS));
    let (_, _, body) = ask(&LimitLayer::new(OpenAiChat, handle.clone()), &model, STREAM).await;
    assert_eq!(text(body).await, [EVENTS[0], EVENTS[1], EVENTS[3]].concat());
    assert_eq!(used(&handle), 11);
}

#[tokio::test]
async fn a_stream_that_is_dropped_costs_what_came() {
    let (handle, model) = (handle(), Model::new("text/event-stream", &EVENTS));
    let (_, _, mut body) = ask(&LimitLayer::new(OpenAiChat, handle.clone()), &model, STREAM).await;
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), EVENTS[0]);
    drop(body);
    assert_eq!(used(&handle), PROMPT + 3);
}

#[tokio::test]
async fn an_answer_that_is_dropped_whole_keeps_its_reservation() {
    let (handle, model) = (handle(), Model::new("application/json", &WHOLE));
    drop(ask(&LimitLayer::new(OpenAiChat, handle.clone()), &model, CHAT).await);
    assert_eq!(used(&handle), PROMPT + 100);
}

#[tokio::test]
async fn what_is_refused_does_not_reach_the_service() {
    let large = r#"{"model":"m","max_tokens":2000,"messages":[{"role":"user","content":"hello"}]}"#;
    let (handle, model) = (handle(), Model::new("application/json", &WHOLE));
    let limit = LimitLayer::new(OpenAiChat, handle.clone());
    let (status, headers, body) = ask(&limit, &model, large).await;
    assert_eq!((status, &headers["x-should-retry"]), (StatusCode::TOO_MANY_REQUESTS, &"false".parse().unwrap()));
    assert!(text(body).await.contains("Request too large for m (deployment d)"));
    let (status, ..) = ask(&LimitLayer::new(AnthropicMessages, handle.clone()), &model, large).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    for wrong in ["", "[]", r#"{"model":"m"}"#] {
        assert_eq!(ask(&limit, &model, wrong).await.0, StatusCode::BAD_REQUEST, "{wrong}");
    }
    let (status, ..) = ask(&limit.clone().max_body(10), &model, CHAT).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!((used(&handle), model.asked.load(Ordering::Relaxed)), (0, 0));
}

/// An API of somebody else's: bytes in, lines out, and the use in the last one.
#[derive(Clone, Copy, Debug)]
struct Lines;

impl Estimate for Lines {
    fn call(&self, body: Bytes) -> Result<Call, BadRequest> {
        let prompt = body.len() as u64;
        Ok(Call { model: "lines".into(), prompt, cap: Some(50), choices: 1, body, hide_usage: false })
    }
}

impl ReadUsage for Lines {
    fn report(&self, answer: &[u8]) -> Report {
        let last = String::from_utf8_lossy(answer).lines().last().and_then(|line| line.parse().ok());
        last.map_or(Report::None, |completion| Usage { prompt: 3, cached: 0, completion, total: 3 + completion }.into())
    }

    fn event(&self, _: &[u8]) -> Event {
        Event::default()
    }

    fn text_bytes(&self, answer: &[u8]) -> u64 {
        answer.len() as u64
    }
}

impl Dialect for Lines {
    fn path(&self) -> &str {
        "/lines"
    }
}

#[tokio::test]
async fn an_api_of_ones_own_is_metered_by_three_functions() {
    let (handle, model) = (handle(), Model::new("text/plain", &["one\ntwo\n", "17"]));
    let (_, _, body) = ask(&LimitLayer::new(Lines, handle.clone()), &model, "count").await;
    assert_eq!(used(&handle), 5 + 50);
    assert_eq!(text(body).await, "one\ntwo\n17");
    assert_eq!(used(&handle), 20);
}

#[tokio::test]
async fn the_example_runs() {
    let lines = axum_layer::run().await.unwrap();
    assert!(lines[0].starts_with("max_tokens 500: 200 OK"), "{lines:?}");
    assert!(lines[1].starts_with("max_tokens 995: 429 Too Many Requests"), "{lines:?}");
}
