//! A small HTTP client for this program's own commands: `status`, `forget`, `demo`.
//!
//! Knows plain HTTP on a trusted network. Must not know what is asked. The invariant it
//! keeps: an answer is read whole and up to a bound.

use std::time::Duration;

use anyhow::{Context, Result};
use axum::body::Bytes;
use axum::http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

/// The longest answer.
const MAX_ANSWER: usize = 256 << 20;

/// The client; cheap to clone.
#[derive(Clone, Debug)]
pub struct Client(HyperClient<HttpConnector, Full<Bytes>>);

impl Default for Client {
    fn default() -> Self {
        Self::new()
    }
}

impl Client {
    pub fn new() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(5)));
        Self(HyperClient::builder(TokioExecutor::new()).build(connector))
    }

    /// Sends a request and returns the head of the answer.
    pub async fn send(&self, method: Method, url: &str, headers: HeaderMap, body: Bytes) -> Result<Response<Incoming>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = url.parse().with_context(|| format!("{url} is not a URL"))?;
        *request.headers_mut() = headers;
        request.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        self.0.request(request).await.with_context(|| format!("{url} does not answer"))
    }

    /// Sends a request and returns the whole answer.
    pub async fn ask(&self, method: Method, url: &str, body: Bytes) -> Result<(StatusCode, Bytes)> {
        let response = self.send(method, url, HeaderMap::new(), body).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("{url} broke off its answer: {error}"))?;
        Ok((status, body.to_bytes()))
    }

    /// Asks for JSON.
    pub async fn json(&self, url: &str) -> Result<serde_json::Value> {
        let (status, body) = self.ask(Method::GET, url, Bytes::new()).await?;
        anyhow::ensure!(status.is_success(), "{url} answers {status}");
        serde_json::from_slice(&body).with_context(|| format!("{url} does not answer with JSON"))
    }
}
