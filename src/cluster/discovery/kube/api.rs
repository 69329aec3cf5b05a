//! The API server: how pods are listed and watched.
//!
//! Knows the protocol: a consistent list, a watch from its version on, bookmarks, the version that
//! is too old. Must not know what a pod proves. The invariants it keeps: every answer is bounded in
//! size and every silence in time; and the pod's token goes to the API server alone.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;

use super::pods::{Event, Pod};

/// How long the head of an answer, or a whole list, may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// After how long the API server is asked to end a watch, so that every pod knows how old what it
/// knows can be: gossip fences itself off after half of `absent_for`, which is 30 s or more.
pub(super) const WATCH: Duration = Duration::from_secs(20);

/// The largest list: 4,096 pods of 16 kB each.
const MAX_LIST: usize = 64 << 20;

/// The longest line of a watch: far more than the 1.5 MB an object can have.
const MAX_LINE: usize = 4 << 20;

/// Where the API server is, and which pods are the fleet's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeConfig {
    /// Its address: `https://10.96.0.1:443`.
    pub api: String,
    /// The namespace of the pods.
    pub namespace: String,
    /// The label selector of the pods: `app.kubernetes.io/name=quotum`.
    pub selector: String,
    /// The file with this pod's token; read again for every request.
    pub token_file: Option<PathBuf>,
    /// The file with the authority of the API server.
    pub ca_file: Option<PathBuf>,
}

/// Why the API server gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// It said no.
    #[error("the API server refuses to {what} pods: {status}")]
    Refused { what: &'static str, status: StatusCode },
    /// The watch goes back too far: list again.
    #[error("the version to watch from is too old")]
    Expired,
    /// No answer, or one that cannot be read.
    #[error("the API server gives no answer: {0}")]
    Away(String),
}

fn away(error: impl fmt::Display) -> ApiError {
    ApiError::Away(error.to_string())
}

/// The client of one API server.
pub(super) struct Api {
    config: KubeConfig,
    client: HyperClient<HttpsConnector<HttpConnector>, Empty<Bytes>>,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("config", &self.config).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct List {
    metadata: super::pods::Metadata,
    items: Vec<Pod>,
}

#[derive(Deserialize)]
struct Line {
    r#type: String,
    object: Box<serde_json::value::RawValue>,
}

impl Api {
    /// Returns a client.
    ///
    /// # Errors
    /// If the authority's file cannot be used.
    pub(super) fn new(config: KubeConfig) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        if let Some(path) = &config.ca_file {
            let unusable = |error: &dyn fmt::Display| format!("{}: {error}", path.display());
            let pem = std::fs::read(path).map_err(|error| unusable(&error))?;
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                let certificate = certificate.map_err(|error| unusable(&error))?;
                roots.add(certificate).map_err(|error| unusable(&error))?;
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let tls = tls.map_err(|error| error.to_string())?.with_root_certificates(roots).with_no_client_auth();
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_connect_timeout(Some(PATIENCE));
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(connector);
        let client = HyperClient::builder(TokioExecutor::new()).build(connector);
        Ok(Self { config, client })
    }

    /// Returns what resolves this error.
    pub(super) fn resolve(&self, error: &ApiError) -> String {
        let KubeConfig { api, namespace, .. } = &self.config;
        match error {
            ApiError::Refused { .. } => format!(
                "allow this pod's service account to list and watch pods in the namespace {namespace}: a Role and a \
                 RoleBinding, as deploy/kubernetes/rbac.yaml has them"
            ),
            ApiError::Expired | ApiError::Away(_) => {
                format!("see whether the API server is up and this pod may reach {api}: it is tried again every 5 s")
            }
        }
    }

    /// Asks for the pods; `query` begins with `&`.
    async fn get(&self, what: &'static str, query: &str) -> Result<http::Response<Incoming>, ApiError> {
        let KubeConfig { api, namespace, selector, token_file, .. } = &self.config;
        let selector = escaped(selector);
        let url = format!("{api}/api/v1/namespaces/{namespace}/pods?labelSelector={selector}{query}");
        let mut request = Request::get(url).header(header::ACCEPT, "application/json");
        if let Some(path) = token_file {
            request = request.header(header::AUTHORIZATION, bearer(path).await?);
        }
        let request = request.body(Empty::new()).map_err(away)?;
        let answer = tokio::time::timeout(PATIENCE, self.client.request(request)).await;
        let answer =
            answer.map_err(|_| away("none in 5 s"))?.map_err(|error| match std::error::Error::source(&error) {
                Some(source) => away(format!("{error}: {source}")),
                None => away(error),
            })?;
        match answer.status() {
            status if status.is_success() => Ok(answer),
            StatusCode::GONE => Err(ApiError::Expired),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => Err(away(status)),
            status => Err(ApiError::Refused { what, status }),
        }
    }

    /// Returns all pods as they are, and the version of that. No version is asked for, so the API
    /// server looks where they are kept and not into what it remembers of it.
    pub(super) async fn list(&self) -> Result<(Vec<Pod>, String), ApiError> {
        let answer = self.get("list", "").await?;
        let body = tokio::time::timeout(PATIENCE, Limited::new(answer.into_body(), MAX_LIST).collect()).await;
        let body = body.map_err(|_| away("a list that does not end"))?.map_err(away)?.to_bytes();
        read_list(&body)
    }

    /// Begins to watch from this version on.
    pub(super) async fn watch(&self, version: &str) -> Result<Watch, ApiError> {
        let (version, seconds) = (escaped(version), WATCH.as_secs());
        let query = format!("&watch=1&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={version}");
        let answer = self.get("watch", &query).await?;
        Ok(Watch {
            body: answer.into_body(),
            buffer: Vec::new(),
            deadline: tokio::time::Instant::now() + WATCH + PATIENCE,
        })
    }
}

/// A watch that is open.
#[derive(Debug)]
pub(super) struct Watch {
    body: Incoming,
    /// Bytes of a line that is not whole yet.
    buffer: Vec<u8>,
    /// When it must have ended.
    deadline: tokio::time::Instant,
}

/// What a watch says.
#[derive(Debug)]
pub(super) enum Said {
    /// Something happened, and the version from which to watch afterwards.
    Event(Event, String),
    /// Nothing happened up to this version.
    Bookmark(String),
    /// It is over, in order.
    End,
}

impl Watch {
    /// Waits for what it says next.
    ///
    /// # Cancel safety
    /// Dropped before it is ready, nothing that was said is lost.
    pub(super) async fn next(&mut self) -> Result<Said, ApiError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return read(&line);
            }
            if self.buffer.len() > MAX_LINE {
                return Err(away("a line without an end"));
            }
            let frame = tokio::time::timeout_at(self.deadline, self.body.frame()).await;
            match frame.map_err(|_| away("a watch that does not end"))? {
                Some(frame) => self.buffer.extend_from_slice(&frame.map_err(away)?.into_data().unwrap_or_default()),
                None => return Ok(Said::End),
            }
        }
    }
}

/// Reads a list: its pods, and the version of that.
pub(super) fn read_list(body: &[u8]) -> Result<(Vec<Pod>, String), ApiError> {
    let list: List = serde_json::from_slice(body).map_err(away)?;
    Ok((list.items, list.metadata.resource_version))
}

/// Reads a line of a watch.
pub(super) fn read(line: &[u8]) -> Result<Said, ApiError> {
    let line: Line = serde_json::from_slice(line).map_err(away)?;
    let pod = || serde_json::from_str::<Pod>(line.object.get()).map_err(away);
    match line.r#type.as_str() {
        "ADDED" | "MODIFIED" => pod().map(|pod| Said::Event(Event::Is(pod.clone()), pod.metadata.resource_version)),
        "DELETED" => pod().map(|pod| Said::Event(Event::Was(pod.clone()), pod.metadata.resource_version)),
        "BOOKMARK" => Ok(Said::Bookmark(pod()?.metadata.resource_version)),
        _ => {
            let status: serde_json::Value = serde_json::from_str(line.object.get()).map_err(away)?;
            match status["code"].as_u64() {
                Some(410) => Err(ApiError::Expired),
                _ => Err(away(status["message"].as_str().unwrap_or("an error without a message"))),
            }
        }
    }
}

async fn bearer(path: &Path) -> Result<http::HeaderValue, ApiError> {
    let read = path.to_owned();
    let token = tokio::task::spawn_blocking(move || std::fs::read_to_string(read)).await.map_err(away)?;
    let token = token.map_err(|error| away(format!("{}: {error}", path.display())))?;
    let mut value = http::HeaderValue::try_from(format!("Bearer {}", token.trim())).map_err(away)?;
    value.set_sensitive(true);
    Ok(value)
}

/// Returns the text as a part of a query.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}
