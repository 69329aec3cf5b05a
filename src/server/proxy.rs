//! The proxy: from a caller's request to an upstream's answer, through a limit.
//!
//! Knows the order of the steps: credential, body, model, reservation, upstream. Must
//! not know how a limit decides or how bytes are metered. The invariant it keeps: a
//! request that is answered without having been sent upstream has charged nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::layer::parts::refusal::{self, Refusal};
use crate::layer::parts::{self, Charge, Meter, Metered, Prompts};
use crate::layer::{
    AnthropicMessages, BadRequest, Call, Dialect, Family, Metering, OpenAiChat, OpenAiCompletions, OpenAiEmbeddings,
    OpenAiResponses, Other, Tokenizer,
};
use crate::{Handle, Limiter, UnknownDeployment};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version, header};
use axum::routing::{MethodRouter, any, get, post};
use http_body::Body as _;
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::credentials::Credentials;
use super::intake::Intake;
use super::outcome::Outcomes;
use super::pause;
use super::routing::{Place, Route, Routes};
use super::search::Search;
use super::upstream::{Client, Failure, Target, Upstream, is_hop_by_hop, is_one_of, named_by_connection};
use crate::config::{self, Bounds, Deployment};
use crate::telemetry::Telemetry;

/// One deployment, ready to serve.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) id: String,
    pub(super) handle: Handle,
    pub(super) meter: Arc<Meter>,
    upstream_model: Option<String>,
    upstream: Upstream,
}

/// Who serves what, until the configuration changes: a request keeps what it began with.
type Models = BTreeMap<String, Routes<Served>>;

/// The proxy.
#[derive(Debug)]
pub(crate) struct Proxy {
    models: RwLock<Arc<Models>>,
    limiter: Limiter,
    credentials: Arc<Credentials>,
    intake: Intake,
    bounds: Bounds,
    telemetry: Arc<Telemetry>,
    outcomes: Arc<Outcomes>,
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
        config: &config::Proxy,
        telemetry: Arc<Telemetry>,
        client: impl FnMut(&Deployment) -> Client,
    ) -> Result<Arc<Self>, UnknownDeployment> {
        let (handles, intake, bounds) = (limiter.clone(), Intake::new(config), config.bounds);
        let models = RwLock::default();
        let outcomes = Outcomes::new(telemetry.clone());
        let proxy = Self { models, limiter: handles, credentials, intake, bounds, telemetry, outcomes };
        proxy.serve_these(deployments, limiter, client)?;
        Ok(Arc::new(proxy))
    }

    /// Serves these deployments from now on. Requests in flight are not disturbed, and what
    /// was learnt of a deployment that stays is kept.
    ///
    /// # Errors
    /// If the limiter does not know one of them; nothing has changed.
    pub(crate) fn serve_these(
        &self,
        deployments: &[Deployment],
        limiter: &Limiter,
        mut client: impl FnMut(&Deployment) -> Client,
    ) -> Result<(), UnknownDeployment> {
        let before = self.models();
        let meters: BTreeMap<&str, &Meter> =
            before.values().flat_map(Routes::all).map(|served| (served.id.as_str(), &*served.meter)).collect();
        let mut models: BTreeMap<String, Vec<(Served, Place)>> = BTreeMap::new();
        for deployment in deployments {
            let place = Place { order: deployment.order, weight: deployment.weight };
            let served = Served {
                id: deployment.id.clone(),
                handle: limiter.handle(&deployment.id)?,
                meter: Arc::new(meter(deployment).after(meters.get(deployment.id.as_str()).copied())),
                upstream_model: deployment.upstream_model.clone(),
                upstream: Upstream::new(deployment, client(deployment)),
            };
            models.entry(deployment.model.clone()).or_default().push((served, place));
        }
        let models: Models = models.into_iter().map(|(model, deployments)| (model, Routes::new(deployments))).collect();
        load_tokenizers(models.values().flat_map(Routes::all).map(|served| served.meter.tokenizer()));
        *self.models.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(models);
        Ok(())
    }

    fn models(&self) -> Arc<Models> {
        Arc::clone(&self.models.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the proxy's endpoints.
    pub(crate) fn router(self: Arc<Self>) -> Router {
        // Another dialect is another line here.
        Router::new()
            .route("/v1/chat/completions", metered(OpenAiChat))
            .route("/v1/completions", metered(OpenAiCompletions))
            .route("/v1/embeddings", metered(OpenAiEmbeddings))
            .route("/v1/responses", metered(OpenAiResponses))
            .route("/v1/messages", metered(AnthropicMessages))
            .route("/v1/models", get(models))
            .route("/v1/models/{*model}", get(model))
            .route("/v1/{*path}", any(other))
            .method_not_allowed_fallback(wrong_method)
            .fallback(unknown)
            .with_state(self)
    }

    /// Answers one request in one dialect, whatever becomes of it.
    async fn answer(&self, dialect: Arc<dyn Dialect>, head: &Parts, mut body: Body) -> Response<Body> {
        match self.serve(&dialect, head, &mut body).await {
            Ok(response) => response,
            Err(refusal) => {
                self.intake.discard(head, body).await;
                refusal.response(dialect.family())
            }
        }
    }

    /// Refuses a request, and first its caller.
    async fn refuse(&self, request: Request, refusal: impl FnOnce(&Parts) -> Refusal) -> Response<Body> {
        let (head, body) = request.into_parts();
        let refused = self.refuse_caller(&head.headers).err();
        let refusal = refused.unwrap_or_else(|| refusal(&head));
        self.intake.discard(&head, body).await;
        refusal.response(family(head.uri.path()))
    }

    /// Serves one request in one dialect.
    async fn serve(
        &self,
        dialect: &Arc<dyn Dialect>,
        head: &Parts,
        body: &mut Body,
    ) -> Result<Response<Body>, Refusal> {
        self.refuse_caller(&head.headers)?;
        if dialect.is_known() {
            refuse_type(&head.headers)?;
        }
        // Held until the answer begins: then the upstream has it all.
        let (body, _held) = self.intake.read(&head.headers, body).await?;
        let call = dialect.call(body).map_err(|bad| match (dialect.is_known(), bad.param) {
            (false, Some("model")) => unknown_url(&head.method, head.uri.path()),
            _ => mend(bad),
        })?;
        let models = self.models();
        let routes = models.get(&call.model).ok_or_else(|| unknown_model(&call.model))?;
        let family = dialect.family();
        let to = Target { method: &head.method, path: dialect.path(), query: head.uri.query(), family };
        if !routes.all().all(|served| served.upstream.fits(to.path, to.query)) {
            return Err(too_long());
        }
        let prompts = Prompts::count(dialect, &call, routes.all().map(|served| served.meter.tokenizer())).await;
        let mut search = Search::new(routes, (&call, &prompts), &self.limiter, &self.telemetry);
        let Some(mut granted) = search.next().await else {
            return Err(search.refusal(family).unwrap_or_else(|| unknown_model(&call.model)));
        };
        loop {
            let route = granted.route;
            let served = &route.to;
            let mut charge = Charge::new(granted.permit, served.meter.clone(), self.telemetry.clone(), &call);
            let written = charge.written();
            let sent =
                served.upstream.send(to, &head.headers, call.body_for(served.upstream_model.as_deref()), written).await;
            let was_not_executed = match &sent {
                Ok(answer) => answer.status() == StatusCode::TOO_MANY_REQUESTS,
                Err(_) => !charge.was_written(),
            };
            self.note(route, &sent, charge.was_written());
            // What may have been executed is never sent again.
            let next = if was_not_executed { search.next().await } else { None };
            if let Some(next) = next {
                if sent.is_ok() {
                    charge.settle_failed();
                } else {
                    charge.settle_unanswered();
                }
                granted = next;
                continue;
            }
            let mut response = match sent {
                Ok(answer) => self.outcomes.watched(&served.id, pass(answer, charge, dialect.clone(), &call, served)),
                Err(failure) => {
                    charge.settle_unanswered();
                    failed(failure).response(family)
                }
            };
            refusal::set_standings(response.headers_mut(), &served.handle.standings(), family);
            refusal::set_wait(response.headers_mut(), search.waited());
            return Ok(response);
        }
    }

    /// Remembers what an answer, or none, says of the upstream: whether it can be reached,
    /// and whether it wants to be left alone.
    fn note(&self, route: &Route<Served>, sent: &Result<Response<Incoming>, Failure>, was_written: bool) {
        self.outcomes.begun(&route.to.id, sent);
        match sent {
            Err(failure) => {
                tracing::debug!(deployment = %route.to.id, ?failure, "no answer from the upstream");
                if was_written { route.health.reached() } else { route.health.missed() }
            }
            Ok(answer) => {
                route.health.reached();
                if let Some(pause) = pause::asked(answer) {
                    tracing::debug!(deployment = %route.to.id, ?pause, "the upstream asks for a pause");
                    route.to.handle.pause(self.limiter.now().plus(pause));
                }
            }
        }
    }

    /// Refuses a caller without an accepted credential, or with too many headers.
    fn refuse_caller(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        self.refuse_headers(headers)?;
        if self.credentials.is_empty() || self.credentials.accept(headers) {
            return Ok(());
        }
        let message = "Incorrect API key provided: present a credential of this proxy, as a bearer or in x-api-key.";
        let mut refusal = Refusal::invalid(StatusCode::UNAUTHORIZED, message, None, Some("invalid_api_key"));
        refusal.headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        Err(refusal)
    }

    fn refuse_headers(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let Bounds { headers: most, header_bytes: most_bytes, .. } = self.bounds;
        let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        if headers.len() <= most && bytes <= most_bytes {
            return Ok(());
        }
        self.telemetry.turned_away("headers");
        let message = format!(
            "The request has {} headers of {bytes} bytes; this proxy takes {most} headers of {most_bytes} bytes.",
            headers.len()
        );
        let (status, code) = (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, Some("headers_too_large"));
        Err(Refusal::invalid(status, message, None, code))
    }
}

/// Refuses a body that says it is not JSON.
fn refuse_type(headers: &HeaderMap) -> Result<(), Refusal> {
    let Some(content_type) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let media_type = parts::media_type(content_type.as_bytes());
    let (_, suffix) = media_type.split_at(media_type.len().saturating_sub(b"+json".len()));
    let is_json = media_type.eq_ignore_ascii_case(b"application/json") || suffix.eq_ignore_ascii_case(b"+json");
    if media_type.is_empty() || is_json {
        return Ok(());
    }
    let message = "The body's content-type is not understood here: send application/json.";
    Err(Refusal::invalid(StatusCode::UNSUPPORTED_MEDIA_TYPE, message, None, Some("unsupported_media_type")))
}

/// Returns how a deployment is metered.
fn meter(deployment: &Deployment) -> Meter {
    let Deployment { reserve, unreported, default_max_tokens, cached_input, tokenizer, .. } = *deployment;
    Meter::new(
        Metering { reserve, unreported, default_max_tokens, cached_input, tokenizer },
        deployment.mode,
        deployment.quotas.clone(),
    )
}

/// Reads tokenizers' tables beside everything else; a request that comes before waits for them.
fn load_tokenizers(tokenizers: impl IntoIterator<Item = Tokenizer>) {
    let mut wanted: Vec<Tokenizer> =
        tokenizers.into_iter().filter(|tokenizer| *tokenizer != Tokenizer::Bytes).collect();
    wanted.dedup();
    if !wanted.is_empty() {
        let load = move || wanted.into_iter().for_each(Tokenizer::load);
        // Without a thread the first request that needs one reads it.
        let _ = std::thread::Builder::new().name("tokenizers".into()).spawn(load);
    }
}

fn mend(bad: BadRequest) -> Refusal {
    Refusal::invalid(StatusCode::BAD_REQUEST, bad.message, bad.param, None)
}

/// What an upstream says to clients that remember it for its host, which to callers is ours. Cookies would come back
/// to us, and callers' cookies are withheld.
const OF_THEIR_HOST: [HeaderName; 3] = [header::SET_COOKIE, header::STRICT_TRANSPORT_SECURITY, header::ALT_SVC];

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
        let message = "The upstream answered with a redirect, which is neither followed nor passed on: its address in \
                       this proxy's configuration is not where its API is.";
        return Refusal::upstream(StatusCode::BAD_GATEWAY, message, "upstream_redirect").response(dialect.family());
    }
    if status.is_informational() {
        // Nobody asked it to speak something else than HTTP.
        charge.settle_failed();
        let message = "The upstream answered with a change of protocol that nobody asked for.";
        return Refusal::upstream(StatusCode::BAD_GATEWAY, message, "upstream_cut").response(dialect.family());
    }
    let headers = &mut head.headers;
    let named = named_by_connection(headers);
    let stays = |name: &HeaderName| {
        !is_hop_by_hop(name)
            && !refusal::is_rate_limit(name)
            && !OF_THEIR_HOST.contains(name)
            && !is_one_of(&named, name)
    };
    let gone: Vec<HeaderName> = headers.keys().filter(|name| !stays(name)).cloned().collect();
    for name in gone {
        headers.remove(name);
    }
    if !tells_length(headers, body.size_hint().exact()) {
        // Beside an encoding of the transfer it does not count; the server says the right one.
        headers.remove(header::CONTENT_LENGTH);
    }
    let form = parts::form(status, headers, &mut charge, call.hide_usage);
    if status == StatusCode::TOO_MANY_REQUESTS {
        headers.insert(refusal::REFUSED_BY, HeaderValue::from_static("upstream"));
    }
    head.version = Version::default();
    head.extensions.clear();
    Response::from_parts(head, Body::new(Metered::new(body, charge, dialect, form, served.upstream.idle())))
}

/// Returns whether the headers tell this length of the body, once and as a number.
fn tells_length(headers: &HeaderMap, length: Option<u64>) -> bool {
    let mut told = headers.get_all(header::CONTENT_LENGTH).iter();
    let is_right = told.next().is_some_and(|told| told.to_str().ok().and_then(|told| told.parse().ok()) == length);
    is_right && length.is_some() && told.next().is_none()
}

fn failed(failure: Failure) -> Refusal {
    let (status, message, code) = match failure {
        Failure::Unreachable => (StatusCode::BAD_GATEWAY, "The upstream cannot be reached.", "upstream_unreachable"),
        Failure::Broken => (StatusCode::BAD_GATEWAY, "The upstream broke off before it answered.", "upstream_cut"),
        Failure::Slow => (StatusCode::GATEWAY_TIMEOUT, "The upstream did not answer in time.", "upstream_timeout"),
    };
    Refusal::upstream(status, message, code)
}

fn too_long() -> Refusal {
    let message = "The request's path and query are too long to be sent on.";
    Refusal::invalid(StatusCode::URI_TOO_LONG, message, None, Some("uri_too_long"))
}

fn unknown_model(model: &str) -> Refusal {
    let message = format!("The model `{model}` does not exist or is not served here.");
    Refusal::invalid(StatusCode::NOT_FOUND, message, Some("model"), Some("model_not_found"))
}

fn unknown_url(method: &Method, path: &str) -> Refusal {
    let message = format!("Unknown request URL: {method} {path}, or its body does not say for which model it is.");
    Refusal::invalid(StatusCode::NOT_FOUND, message, None, Some("unknown_url"))
}

fn metered<D: Dialect + Copy>(dialect: D) -> MethodRouter<Arc<Proxy>> {
    post(move |State(proxy): State<Arc<Proxy>>, request: Request| {
        let (head, body) = request.into_parts();
        async move { proxy.answer(Arc::new(dialect), &head, body).await }
    })
}

/// Whatever else there is under /v1, if the body says for which model.
async fn other(State(proxy): State<Arc<Proxy>>, request: Request) -> Response<Body> {
    let path = request.uri().path().strip_prefix("/v1").unwrap_or_default();
    let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let dialect = Other::new(path, content_type.unwrap_or_default());
    let may_name_a_model = matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH);
    if !may_name_a_model || leads_elsewhere(path) {
        return unknown(State(proxy), request).await;
    }
    let (head, body) = request.into_parts();
    proxy.answer(Arc::new(dialect), &head, body).await
}

/// Returns whether a path would leave the upstream's base, where our key opens more than
/// its models.
fn leads_elsewhere(path: &str) -> bool {
    let mut plain = path.to_ascii_lowercase();
    loop {
        // However often it is decoded on its way.
        let decoded = plain.replace("%2e", ".").replace("%2f", "/").replace("%5c", "\\").replace("%25", "%");
        if decoded == plain {
            break;
        }
        plain = decoded;
    }
    let segments = plain.split(['/', '\\']).map(|segment| segment.split(';').next());
    segments.into_iter().any(|segment| matches!(segment, Some("." | "..")))
}

/// Returns whose errors a caller of this path expects.
fn family(path: &str) -> Family {
    if path == "/v1/messages" || path.starts_with("/v1/messages/") { Family::Anthropic } else { Family::OpenAi }
}

async fn models(State(proxy): State<Arc<Proxy>>, headers: HeaderMap) -> Response<Body> {
    // Anthropic's SDKs ask at the same path, and say who they are.
    let family = if headers.contains_key("anthropic-version") { Family::Anthropic } else { Family::OpenAi };
    if let Err(refusal) = proxy.refuse_caller(&headers) {
        return refusal.response(family);
    }
    let models = proxy.models();
    let names = || models.keys();
    let listed: Vec<_> = names().map(|name| listed(name, family)).collect();
    json_response(match family {
        Family::OpenAi => json!({"object": "list", "data": listed}),
        Family::Anthropic => {
            json!({"data": listed, "has_more": false, "first_id": names().next(), "last_id": names().next_back()})
        }
    })
}

async fn model(State(proxy): State<Arc<Proxy>>, Path(name): Path<String>, headers: HeaderMap) -> Response<Body> {
    let family = if headers.contains_key("anthropic-version") { Family::Anthropic } else { Family::OpenAi };
    if let Err(refusal) = proxy.refuse_caller(&headers) {
        return refusal.response(family);
    }
    match proxy.models().contains_key(&name) {
        true => json_response(listed(&name, family)),
        false => unknown_model(&name).response(family),
    }
}

fn listed(model: &str, family: Family) -> Value {
    match family {
        Family::OpenAi => json!({"id": model, "object": "model", "created": 0, "owned_by": "quotum"}),
        Family::Anthropic => {
            json!({"type": "model", "id": model, "display_name": model, "created_at": "1970-01-01T00:00:00Z"})
        }
    }
}

fn json_response(value: Value) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

async fn unknown(State(proxy): State<Arc<Proxy>>, request: Request) -> Response<Body> {
    proxy.refuse(request, |head| unknown_url(&head.method, head.uri.path())).await
}

async fn wrong_method(State(proxy): State<Arc<Proxy>>, request: Request) -> Response<Body> {
    let refusal = |head: &Parts| {
        let message = format!("Not allowed to {} on {}.", head.method, head.uri.path());
        Refusal::invalid(StatusCode::METHOD_NOT_ALLOWED, message, None, Some("method_not_supported"))
    };
    proxy.refuse(request, refusal).await
}
