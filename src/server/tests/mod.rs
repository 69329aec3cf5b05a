//! The proxy and the admin endpoints, without sockets on the caller's side: the upstream
//! is the stub on loopback, and the clock stands still.

mod admin;
mod callers;
mod dialects;
mod failures;
mod input;
mod others;
mod passage;
mod prompts;
mod refusals;
mod routing;
mod secured;
mod usage;

use std::sync::Arc;

use crate::{Clock, Limiter, Timestamp, Unit};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::admin::Admin;
use super::credentials::Credentials;
use super::proxy::Proxy;
use super::stub::{Behaviour, Stub};
use super::upstream::Client;
use crate::config::{Bounds, Deployment, Flags, Tokenizer, parse};
use crate::telemetry::Telemetry;

/// A clock that stands still in the middle of a minute: windows never roll in a test.
struct Still;

impl Clock for Still {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_ms(1_700_000_010_000)
    }
}

/// What a test adds to the usual config.
#[derive(Clone, Copy, Default)]
struct Extra<'a> {
    /// Fields of the deployment.
    deployment: &'a str,
    /// Further deployments.
    more: &'a str,
    /// Fields of the proxy.
    proxy: &'a str,
    /// Instead of the stub.
    upstream: Option<&'a str>,
    credentials: &'a [&'a str],
}

/// A proxy before a stub, with a limit of 1,000 tokens and 10 requests.
struct Bench {
    router: Router,
    admin: Router,
    limiter: Limiter,
    stub: String,
    bounds: Bounds,
    telemetry: Arc<Telemetry>,
}

impl Bench {
    async fn new() -> Self {
        Self::with(Extra::default()).await
    }

    async fn with(extra: Extra<'_>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stub = format!("http://{}", listener.local_addr().unwrap());
        let behaviour = Behaviour { bytes_per_token: 1, ..Behaviour::default() };
        tokio::spawn(super::stub::serve(Stub::new(behaviour), listener, std::future::pending()));
        let upstream = extra.upstream.map_or_else(|| format!("{stub}/v1"), str::to_owned);
        let limits =
            "limits: [{ unit: tokens, amount: 1000, window: 60s }, { unit: requests, amount: 10, window: 60s }]";
        let text = format!(
            "proxy: {{ {} }}\ndeployments:\n  - {{ id: a, model: m, upstream: '{upstream}', {limits}, {} }}\n{}",
            extra.proxy, extra.deployment, extra.more,
        )
        .replace("STUB", &stub);
        let config = parse(&text, "test.yaml", &|_| None, &Flags::default()).unwrap();
        let builder = config.deployments.iter().fold(Limiter::builder().clock(Still), |builder, deployment| {
            builder.deployment_with(&deployment.id, deployment.quotas.iter().copied(), super::policy(deployment))
        });
        let limiter = builder.build().unwrap();
        let telemetry = Arc::new(Telemetry::new());
        let secrets: Vec<_> = extra.credentials.iter().map(|text| crate::config::Secret::new(*text)).collect();
        let credentials = Arc::new(Credentials::new(&secrets));
        let tls = super::tls::client(&config.proxy.upstream_ca).unwrap();
        let client = |deployment: &Deployment| Client::tcp(deployment.timeouts, tls.clone());
        let proxy =
            Proxy::new(&config.deployments, &limiter, credentials.clone(), &config.proxy, telemetry.clone(), client);
        let admin = Admin::new(limiter.clone(), None, credentials, telemetry.clone(), &config.deployments);
        let bounds = config.proxy.bounds;
        Self { router: proxy.unwrap().router(), admin: admin.router(), limiter, stub, bounds, telemetry }
    }

    async fn send(&self, request: Request<Body>) -> Response<Body> {
        self.router.clone().oneshot(request).await.unwrap()
    }

    /// Sends a chat request and returns the whole answer; the body's error is `None`.
    async fn chat(&self, body: Value, headers: &[(&str, &str)]) -> Answer {
        Answer::of(self.send(chat(body, headers)).await).await
    }

    /// Returns the known use of one unit in the running window.
    fn used(&self, unit: Unit) -> u64 {
        let standings = self.limiter.handle("a").unwrap().standings();
        standings.iter().find(|standing| standing.quota.unit() == unit).unwrap().used
    }

    async fn metrics(&self) -> String {
        Answer::of(self.admin.clone().oneshot(request("GET", "/metrics", &[], "")).await.unwrap()).await.text
    }

    fn tokens(&self) -> u64 {
        self.used(Unit::Tokens)
    }

    fn requests(&self) -> u64 {
        self.used(Unit::Requests)
    }
}

/// An answer, read to its end.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    /// What came before the end or the error.
    text: String,
    broke_off: bool,
}

impl Answer {
    async fn of(response: Response<Body>) -> Self {
        let (head, mut body) = response.into_parts();
        let (mut bytes, mut broke_off) = (Vec::new(), false);
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => bytes.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Err(_) => broke_off = true,
            }
        }
        let text = String::from_utf8(bytes).unwrap();
        Self { status: head.status, headers: head.headers, text, broke_off }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Checks OpenAI's error shape and returns the error.
    fn error(&self) -> Value {
        let error = self.json()["error"].take();
        let fields = error.as_object().unwrap();
        for field in ["message", "type", "param", "code"] {
            assert!(fields.contains_key(field), "{field} in {error}");
        }
        assert_eq!(self.header("content-type"), Some("application/json"));
        error
    }
}

fn request(method: &str, path: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(body.into()).unwrap()
}

fn chat(body: Value, headers: &[(&str, &str)]) -> Request<Body> {
    request("POST", "/v1/chat/completions", headers, body.to_string())
}

/// A prompt of ten bytes and so, by the stub's count, ten tokens; reserved are 10 for the
/// text, 4 for the role, 11 for the template and 100 for the output.
fn hello() -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": "0123456789"}], "max_tokens": 100})
}

/// The part of [`hello`]'s reservation that is the prompt's.
const PROMPT: u64 = 25;

fn streaming() -> Value {
    let mut body = hello();
    body["stream"] = json!(true);
    body
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}
