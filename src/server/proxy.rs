//! The proxy: from a caller's request to an upstream's answer, through a limit.
//!
//! Knows the order of the steps: credential, body, model, reservation, upstream. Must
//! not know how a limit decides or how bytes are metered. The invariant it keeps: a
//! request that is answered without having been sent upstream has charged nothing.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use axum::routing::{get, post};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use quotum::{Claim, Denied, Handle, Limiter, Permit, UnknownDeployment};
use serde_json::json;
use tokio::time::Instant;

use super::body::{Form, Metered};
use super::credentials::Credentials;
use super::dialect::{Call, Dialect, OpenAiChat};
use super::metering::{Charge, Meter};
use super::refusal;
use super::upstream::{Client, Failure, Upstream, is_hop_by_hop, named_by_connection};
use crate::config::Deployment;
use crate::telemetry::Telemetry;

/// One deployment, ready to serve.
#[derive(Debug)]
struct Served {
    id: String,
    handle: Handle,
    meter: Arc<Meter>,
    upstream: Upstream,
}

/// The deployments behind one model name.
#[derive(Debug)]
struct Model {
    deployments: Vec<Arc<Served>>,
    /// Where the next request begins to look.
    next: AtomicUsize,
}

/// The proxy.
#[derive(Debug)]
pub(crate) struct Proxy {
    models: BTreeMap<String, Model>,
    credentials: Arc<Credentials>,
    max_body: usize,
    telemetry: Arc<Telemetry>,
}

impl Proxy {
    /// Returns a proxy for these deployments, each with the client `client` makes.
    ///
    /// # Errors
    /// If the limiter does not know one of them.
    pub(crate) fn new(
        deployments: &[Deployment],
        limiter: &Limiter,
        credentials: Arc<Credentials>,
        max_body: usize,
        telemetry: Arc<Telemetry>,
        mut client: impl FnMut(&Deployment) -> Client,
    ) -> Result<Arc<Self>, UnknownDeployment> {
        let mut models: BTreeMap<String, Model> = BTreeMap::new();
        for deployment in deployments {
            let served = Served {
                id: deployment.id.clone(),
                handle: limiter.handle(&deployment.id)?,
                meter: Arc::new(Meter::new(deployment)),
                upstream: Upstream::new(deployment, client(deployment)),
            };
            let model = models.entry(deployment.model.clone());
            let model = model.or_insert_with(|| Model { deployments: Vec::new(), next: AtomicUsize::new(0) });
            model.deployments.push(Arc::new(served));
        }
        Ok(Arc::new(Self { models, credentials, max_body, telemetry }))
    }

    /// Returns the proxy's endpoints.
    pub(crate) fn router(self: Arc<Self>) -> Router {
        // Another dialect is another line here.
        Router::new()
            .route("/v1/chat/completions", post(chat_completions))
            .route("/v1/models", get(models))
            .method_not_allowed_fallback(wrong_method)
            .fallback(unknown)
            .with_state(self)
    }

    /// Serves one request in one dialect.
    async fn serve(&self, dialect: Arc<dyn Dialect>, request: Request) -> Result<Response<Body>, Response<Body>> {
        if let Some(refusal) = self.refuse_caller(request.headers()) {
            return Err(refusal);
        }
        let (head, body) = request.into_parts();
        let body = self.read(&head.headers, body).await?;
        let call = dialect
            .call(body)
            .map_err(|bad| refusal::invalid(StatusCode::BAD_REQUEST, &bad.message, bad.param, None))?;
        let model = self.models.get(&call.model).ok_or_else(|| unknown_model(&call.model))?;
        let (served, permit, waited) = self.reserve(model, &call).await?;
        let mut charge = Charge::new(permit, served.meter.clone(), self.telemetry.clone(), &call);
        let written = charge.written();
        let sent = served.upstream.send(dialect.path(), head.uri.query(), &head.headers, call.body.clone(), written);
        let mut response = match sent.await {
            Ok(answer) => pass(answer, charge, dialect, &call, &served),
            Err(failure) => {
                charge.settle_unanswered();
                tracing::debug!(deployment = %served.id, ?failure, "no answer from the upstream");
                failed(failure)
            }
        };
        refusal::set_standings(response.headers_mut(), &served.handle.standings());
        refusal::set_wait(response.headers_mut(), waited);
        Ok(response)
    }

    /// Returns the answer to a caller without an accepted credential.
    fn refuse_caller(&self, headers: &HeaderMap) -> Option<Response<Body>> {
        if self.credentials.is_empty() || self.credentials.accept(headers) {
            return None;
        }
        let message = "Incorrect API key provided: present a credential of this proxy, as a bearer or in x-api-key.";
        let mut response = refusal::invalid(StatusCode::UNAUTHORIZED, message, None, Some("invalid_api_key"));
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        Some(response)
    }

    async fn read(&self, headers: &HeaderMap, body: Body) -> Result<Bytes, Response<Body>> {
        let too_large = || {
            let message =
                format!("The request's body is larger than {} bytes, the most this proxy takes.", self.max_body);
            refusal::invalid(StatusCode::PAYLOAD_TOO_LARGE, &message, None, Some("request_too_large"))
        };
        if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
            let message = "Encoded request bodies are not understood: send plain JSON without content-encoding.";
            return Err(refusal::invalid(StatusCode::UNSUPPORTED_MEDIA_TYPE, message, None, None));
        }
        let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if length.is_some_and(|length| length > self.max_body as u64) {
            return Err(too_large());
        }
        match Limited::new(body, self.max_body).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
            Err(_) => Err(refusal::invalid(StatusCode::BAD_REQUEST, "The request's body broke off.", None, None)),
        }
    }

    /// Reserves what the call may use at the first deployment that has room.
    async fn reserve(
        &self,
        model: &Model,
        call: &Call,
    ) -> Result<(Arc<Served>, Permit<'static>, Duration), Response<Body>> {
        let count = model.deployments.len();
        let start = model.next.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..count).map(|i| &model.deployments[(start + i) % count]);
        let mut waiting = None;
        for served in in_turn {
            let claim = served.meter.claim(call);
            if count > 1 {
                // Nobody waits here while there may be room next door.
                match served.handle.try_acquire(claim) {
                    Ok(permit) => return Ok((served.clone(), permit.into_owned(), Duration::ZERO)),
                    Err(Denied::TooLarge { .. }) if waiting.is_some() => continue,
                    Err(_) => {}
                }
            }
            waiting.get_or_insert((served, claim));
        }
        let Some((served, claim)) = waiting else { return Err(unknown_model(&call.model)) };
        let (result, decision, waited) = timed(served.handle.acquire(claim)).await;
        if let Some(decision) = decision {
            self.telemetry.decided(decision);
        } else {
            self.telemetry.waited(waited);
        }
        match result {
            Ok(permit) => Ok((served.clone(), permit.into_owned(), waited)),
            Err(denied) => Err(refused(&denied, call, served, claim, waited)),
        }
    }
}

/// Runs a decision; says how long it took if it was made at once, else how long it was
/// waited for.
async fn timed<F: Future>(decision: F) -> (F::Output, Option<Duration>, Duration) {
    let mut decision = pin!(decision);
    let begun = std::time::Instant::now();
    let first = std::future::poll_fn(|cx| Poll::Ready(decision.as_mut().poll(cx))).await;
    if let Poll::Ready(output) = first {
        return (output, Some(begun.elapsed()), Duration::ZERO);
    }
    let parked = Instant::now();
    let output = decision.await;
    (output, None, parked.elapsed())
}

fn refused(denied: &Denied, call: &Call, served: &Served, claim: Claim, waited: Duration) -> Response<Body> {
    let mut response = refusal::denied(denied, &call.model, &served.id, claim);
    refusal::set_standings(response.headers_mut(), &served.handle.standings());
    refusal::set_wait(response.headers_mut(), waited);
    response
}

/// Returns the upstream's answer for the caller, the reservation in its body.
fn pass(
    answer: Response<Incoming>,
    mut charge: Charge,
    dialect: Arc<dyn Dialect>,
    call: &Call,
    served: &Served,
) -> Response<Body> {
    let (mut head, body) = answer.into_parts();
    let status = head.status;
    if status.is_redirection() {
        // Followed by a caller's SDK it would lead the prompt past every limit.
        charge.settle_failed();
        return refusal::upstream(
            StatusCode::BAD_GATEWAY,
            "The upstream answered with a redirect.",
            "upstream_redirect",
        );
    }
    let may_have_worked = matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
    if status.is_client_error() && !may_have_worked {
        charge.settle_rejected();
    }
    let named: Vec<String> = named_by_connection(&head.headers).into_iter().map(str::to_owned).collect();
    let kept = head.headers.iter().filter(|(name, _)| {
        !is_hop_by_hop(name)
            && !name.as_str().starts_with("x-ratelimit-")
            && !named.iter().any(|other| name.as_str() == other)
    });
    let mut headers: HeaderMap = kept.map(|(name, value)| (name.clone(), value.clone())).collect();
    let is_stream = status.is_success() && is_event_stream(&headers);
    let form = if is_stream {
        // Its length changes where a chunk is hidden.
        headers.remove(header::CONTENT_LENGTH);
        Form::stream(call.hide_usage)
    } else {
        Form::whole(!status.is_success())
    };
    if status == StatusCode::TOO_MANY_REQUESTS {
        headers.insert(refusal::REFUSED_BY, HeaderValue::from_static("upstream"));
    }
    head.headers = headers;
    head.version = axum::http::Version::default();
    head.extensions.clear();
    Response::from_parts(head, Body::new(Metered::new(body, charge, dialect, form, served.upstream.idle())))
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let media_type = content_type.split(|byte| *byte == b';').next().unwrap_or_default();
    media_type.trim_ascii().eq_ignore_ascii_case(b"text/event-stream")
}

fn failed(failure: Failure) -> Response<Body> {
    let (status, message, code) = match failure {
        Failure::Unreachable => (StatusCode::BAD_GATEWAY, "The upstream cannot be reached.", "upstream_unreachable"),
        Failure::Broken => (StatusCode::BAD_GATEWAY, "The upstream broke off before it answered.", "upstream_cut"),
        Failure::Slow => (StatusCode::GATEWAY_TIMEOUT, "The upstream did not answer in time.", "upstream_timeout"),
    };
    refusal::upstream(status, message, code)
}

fn unknown_model(model: &str) -> Response<Body> {
    let message = format!("The model `{model}` does not exist or is not served here.");
    refusal::invalid(StatusCode::NOT_FOUND, &message, Some("model"), Some("model_not_found"))
}

async fn chat_completions(State(proxy): State<Arc<Proxy>>, request: Request) -> Response<Body> {
    proxy.serve(Arc::new(OpenAiChat), request).await.unwrap_or_else(|refusal| refusal)
}

async fn models(State(proxy): State<Arc<Proxy>>, headers: HeaderMap) -> Response<Body> {
    if let Some(refusal) = proxy.refuse_caller(&headers) {
        return refusal;
    }
    let models = proxy.models.keys();
    let models: Vec<_> =
        models.map(|model| json!({"id": model, "object": "model", "created": 0, "owned_by": "quotum"})).collect();
    let mut response = Response::new(Body::from(json!({"object": "list", "data": models}).to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

async fn unknown(State(proxy): State<Arc<Proxy>>, request: Request) -> Response<Body> {
    if let Some(refusal) = proxy.refuse_caller(request.headers()) {
        return refusal;
    }
    let message = format!("Unknown request URL: {} {}.", request.method(), request.uri().path());
    refusal::invalid(StatusCode::NOT_FOUND, &message, None, Some("unknown_url"))
}

async fn wrong_method(State(proxy): State<Arc<Proxy>>, request: Request) -> Response<Body> {
    if let Some(refusal) = proxy.refuse_caller(request.headers()) {
        return refusal;
    }
    let message = format!("Not allowed to {} on {}.", request.method(), request.uri().path());
    refusal::invalid(StatusCode::METHOD_NOT_ALLOWED, &message, None, Some("method_not_supported"))
}
