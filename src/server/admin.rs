//! The admin endpoints: is it alive, is it ready, what does it see.
//!
//! Knows how the limiter's status is written as JSON and as metrics. Must not know how
//! requests are proxied. The invariant it keeps: reading is open to whoever reaches the
//! port, and changing is open only to loopback and to holders of a credential.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::Limiter;
use crate::cluster::{Cluster, ClusterStats};
use crate::ledger::LimitStatus;
use crate::telemetry::{self, Telemetry, Traffic};
use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::credentials::Credentials;
use crate::config::Deployment;
use crate::layer::parts::refusal;

/// The largest body of a request to forget somebody.
const MAX_BODY: usize = 4 << 10;

/// How often to look whether the pod has become ready.
const LOOK_FOR_READINESS: Duration = Duration::from_millis(100);

/// The admin endpoints of one pod.
#[derive(Debug)]
pub(crate) struct Admin {
    limiter: Limiter,
    cluster: Option<Arc<Cluster>>,
    credentials: Arc<Credentials>,
    telemetry: Arc<Telemetry>,
    served: Mutex<Served>,
    /// Why the configuration file is not in force, if it is not.
    refused: Mutex<Option<String>>,
    draining: AtomicBool,
}

impl Admin {
    pub(crate) fn new(
        limiter: Limiter,
        cluster: Option<Arc<Cluster>>,
        credentials: Arc<Credentials>,
        telemetry: Arc<Telemetry>,
        deployments: &[Deployment],
    ) -> Arc<Self> {
        let served = Mutex::new(Served { limiter: limiter.clone(), sharers: sharers(deployments) });
        let refused = Mutex::default();
        let draining = AtomicBool::new(false);
        Arc::new(Self { limiter, cluster, credentials, telemetry, served, refused, draining })
    }

    /// Names these deployments from now on.
    pub(crate) fn serve_these(&self, deployments: &[Deployment], limiter: Limiter) {
        *self.served() = Served { limiter, sharers: sharers(deployments) };
    }

    fn served(&self) -> MutexGuard<'_, Served> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says from now on why the configuration file is not in force, or that it is.
    pub(crate) fn reloaded(&self, refused: Option<String>) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = refused;
    }

    /// Says from now on that no more traffic should be sent here.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Says once in the log that this pod may take traffic.
    pub(crate) async fn say_when_ready(self: Arc<Self>) {
        while self.unready().is_some() {
            tokio::time::sleep(LOOK_FOR_READINESS).await;
        }
        tracing::info!(event = "ready", "ready: may take traffic");
    }

    /// Returns the endpoints.
    pub(crate) fn router(self: Arc<Self>) -> Router {
        Router::new()
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .route("/status", get(status))
            .route("/forget", post(forget))
            .fallback(unknown)
            .with_state(self)
    }

    fn unready(&self) -> Option<&'static str> {
        let status = self.limiter.status();
        if self.draining.load(Ordering::Relaxed) || status.leaving {
            Some("shutting down")
        } else if !status.ready {
            Some("the first exchange with the other replicas is not done")
        } else {
            None
        }
    }

    fn status(&self) -> Value {
        let status = self.limiter.status();
        let stats = self.cluster.as_ref().map(|cluster| cluster.stats());
        let (p50, p99, samples) = self.telemetry.decisions();
        let draining = self.draining.load(Ordering::Relaxed);
        let pauses = self.pauses();
        let mut shown = telemetry::status_json(&status);
        shown["ready"] = json!(status.ready && !draining);
        shown["leaving"] = json!(status.leaving || draining);
        shown["limits"] = status.limits.iter().map(|limit| self.limit(limit, pauses.get(&limit.name))).collect();
        shown["config_refused"] = json!(*self.refused.lock().unwrap_or_else(PoisonError::into_inner));
        let fallback = self.cluster.as_ref().and_then(|cluster| cluster.fallback());
        shown["discovery_fallback"] = json!(fallback.map(|fallback| json!({
            "since_unix_ms": fallback.since.unix_ms(),
            "why": fallback.why,
            "meanwhile": fallback.meanwhile,
            "resolve": fallback.resolve,
        })));
        shown["gossip"] = json!(stats.map(|stats| json!({
            "healthy": stats.healthy,
            "frames_sent": stats.frames_sent,
            "frames_unsent": stats.frames_unsent,
            "frames_received": stats.frames_received,
            "frames_rejected": stats.frames_rejected,
            "bytes_sent": stats.bytes_sent,
            "bytes_received": stats.bytes_received,
            "chitchat_frames_sent": stats.chitchat_frames_sent,
            "chitchat_bytes_sent": stats.chitchat_bytes_sent,
            "chitchat_frames_received": stats.chitchat_frames_received,
            "chitchat_bytes_received": stats.chitchat_bytes_received,
            "messages_unsent": stats.messages_unsent,
            "membership_restarts": stats.membership_restarts,
        })));
        shown["decision_ns"] = json!({"p50": p50, "p99": p99, "samples": samples});
        shown
    }

    /// Returns how long each limit's upstream still wants no requests, where it does.
    fn pauses(&self) -> BTreeMap<String, Duration> {
        let served = self.served();
        let now = self.limiter.now();
        let left = |sharers: &Vec<String>| {
            let until = served.limiter.get(sharers.first()?).ok()?.paused_until()?;
            Some(until.since(now))
        };
        served.sharers.iter().filter_map(|(limit, sharers)| Some((limit.clone(), left(sharers)?))).collect()
    }

    fn limit(&self, limit: &LimitStatus, paused: Option<&Duration>) -> Value {
        let mut shown = telemetry::limit_json(limit);
        shown["deployments"] = json!(self.served().sharers.get(limit.name.as_str()));
        shown["upstream_paused_ms"] = json!(paused.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)));
        shown
    }
}

/// What is served, until the configuration changes.
#[derive(Debug)]
struct Served {
    limiter: Limiter,
    /// Which deployments share each limit.
    sharers: BTreeMap<String, Vec<String>>,
}

fn sharers(deployments: &[Deployment]) -> BTreeMap<String, Vec<String>> {
    let mut sharers = BTreeMap::<String, Vec<String>>::new();
    for deployment in deployments {
        let limit = deployment.limit_id.as_ref().unwrap_or(&deployment.id);
        sharers.entry(limit.clone()).or_default().push(deployment.id.clone());
    }
    sharers
}

async fn livez(State(admin): State<Arc<Admin>>) -> Response<Body> {
    match admin.limiter.status().stuck() {
        None => text(StatusCode::OK, "text/plain", "alive\n".into()),
        Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{why}\n")),
    }
}

async fn readyz(State(admin): State<Arc<Admin>>) -> Response<Body> {
    match admin.unready() {
        None => text(StatusCode::OK, "text/plain", "ready\n".into()),
        Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{why}\n")),
    }
}

async fn metrics(State(admin): State<Arc<Admin>>, headers: HeaderMap) -> Response<Body> {
    let stats = admin.cluster.as_ref().map(|cluster| cluster.stats());
    if let Some(cluster) = &admin.cluster {
        admin.telemetry.fell_back(cluster.fallback().is_some());
    }
    admin.telemetry.carried(stats.as_ref().map(traffic).unwrap_or_default());
    let rejected = stats.map(|stats| stats.frames_rejected).unwrap_or_default();
    let metrics = admin.telemetry.render(&admin.limiter.status(), &admin.pauses(), &rejected);
    let accept = headers.get_all(header::ACCEPT).iter().filter_map(|accept| accept.to_str().ok());
    if accept.into_iter().any(|accept| accept.contains("application/openmetrics-text")) {
        return text(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", metrics);
    }
    text(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", telemetry::classic(&metrics))
}

fn traffic(stats: &ClusterStats) -> Vec<Traffic> {
    let chitchat = Traffic {
        way: "chitchat",
        sent: stats.chitchat_frames_sent,
        sent_bytes: stats.chitchat_bytes_sent,
        received: stats.chitchat_frames_received,
        received_bytes: stats.chitchat_bytes_received,
    };
    let direct = Traffic {
        way: "direct",
        sent: stats.frames_sent - chitchat.sent,
        sent_bytes: stats.bytes_sent - chitchat.sent_bytes,
        received: stats.frames_received - chitchat.received,
        received_bytes: stats.bytes_received - chitchat.received_bytes,
    };
    vec![direct, chitchat]
}

async fn status(State(admin): State<Arc<Admin>>) -> Response<Body> {
    text(StatusCode::OK, "application/json", format!("{:#}\n", admin.status()))
}

async fn forget(State(admin): State<Arc<Admin>>, request: Request) -> Response<Body> {
    let caller =
        request.extensions().get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(addr)| addr.ip().to_canonical());
    let trusted = caller.is_some_and(|ip| ip.is_loopback()) || admin.credentials.accept(request.headers());
    if !trusted {
        let message = "Forgetting a replica needs a credential of the proxy, or a connection from loopback.";
        return refusal::invalid(StatusCode::UNAUTHORIZED, message, None, Some("invalid_api_key"));
    }
    let wrong = || {
        let message = "Send {\"replica\": \"<id or address>\"} as JSON.";
        refusal::invalid(StatusCode::BAD_REQUEST, message, Some("replica"), None)
    };
    let Ok(body) = axum::body::to_bytes(request.into_body(), MAX_BODY).await else { return wrong() };
    let Ok(body) = serde_json::from_slice::<Value>(&body) else { return wrong() };
    let Some(replica) = body["replica"].as_str() else { return wrong() };
    match admin.limiter.forget(replica) {
        Ok(forgotten) => {
            tracing::info!(event = "forgotten", replica = %forgotten, "forgotten by an operator");
            text(StatusCode::OK, "application/json", json!({"forgotten": forgotten}).to_string())
        }
        Err(error) => refusal::invalid(StatusCode::NOT_FOUND, &error.to_string(), Some("replica"), None),
    }
}

async fn unknown() -> Response<Body> {
    text(StatusCode::NOT_FOUND, "text/plain", "there are /livez, /readyz, /metrics, /status and POST /forget\n".into())
}

fn text(status: StatusCode, content_type: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
