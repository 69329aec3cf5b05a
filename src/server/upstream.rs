//! The way to an upstream.
//!
//! Knows the upstream's base, its own key, its timeouts, and which headers may pass.
//! Must not know limits. The invariants it keeps: a caller's credential never reaches
//! an upstream, what our key is billed to is no caller's choice, and it is known whether
//! a failed request was ever written.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::uri::{PathAndQuery, Scheme};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::connect::{Connect, HttpConnector};
use hyper_util::client::legacy::{Client as HyperClient, ResponseFuture};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::config::{Deployment, Timeouts};
use crate::layer::Family;

/// How long an idle connection to an upstream is kept: under the 60 s after which load
/// balancers commonly forget one.
const KEEP_IDLE: Duration = Duration::from_secs(50);

/// How much of one answer may be under way on HTTP/2, and of all answers on one connection:
/// an answer that its caller does not read holds the first, and must leave room for others
/// in the second.
const STREAM_WINDOW: u32 = 128 << 10;
const CONNECTION_WINDOW: u32 = 32 << 20;

/// The longest path and query that a request can have, in bytes: what the type of an address holds.
const MAX_TARGET: usize = u16::MAX as usize - 1;

/// How often an upstream is asked on HTTP/2 whether it is still there while it owes an
/// answer, and how long it may take to say so: a connection that died silently would take
/// every request with it.
const ALIVE_EVERY: Duration = Duration::from_secs(20);
const ALIVE_WITHIN: Duration = Duration::from_secs(20);

/// An HTTP client over whatever connector it was built with.
#[derive(Clone)]
pub struct Client(Arc<dyn Fn(Request<Outgoing>) -> ResponseFuture + Send + Sync>);

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    /// Returns a client over this connector: a simulated network.
    pub fn over<C>(connector: C) -> Self
    where
        C: Connect + Clone + Send + Sync + 'static,
    {
        let client = over(connector);
        Self(Arc::new(move |request| client.request(request)))
    }

    /// Returns a client over TCP, with TLS where the scheme asks for it, and with HTTP/2
    /// where the upstream offers it there.
    pub(crate) fn tcp(timeouts: Timeouts, tls: rustls::ClientConfig) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(timeouts.connect));
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        let secure = HttpsConnectorBuilder::new().with_tls_config(tls).https_only().enable_all_versions();
        // A connection that might have TLS is as large as one that has.
        let (plain, secure) = (over(tcp.clone()), over(secure.wrap_connector(tcp)));
        Self(Arc::new(move |request| match request.uri().scheme() == Some(&Scheme::HTTPS) {
            true => secure.request(request),
            false => plain.request(request),
        }))
    }
}

fn over<C>(connector: C) -> HyperClient<C, Outgoing>
where
    C: Connect + Clone + Send + Sync + 'static,
{
    HyperClient::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(KEEP_IDLE)
        .http2_initial_stream_window_size(STREAM_WINDOW)
        .http2_initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(ALIVE_EVERY)
        .http2_keep_alive_timeout(ALIVE_WITHIN)
        .build(connector)
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// No connection could be made.
    Unreachable,
    /// The answer did not begin in time.
    Slow,
    /// The connection broke before the answer began.
    Broken,
}

/// What is asked of an upstream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    pub(crate) method: &'a Method,
    /// Below the base.
    pub(crate) path: &'a str,
    pub(crate) query: Option<&'a str>,
    /// Whose API it is: where the key goes.
    pub(crate) family: Family,
}

/// One deployment's upstream.
#[derive(Debug)]
pub(crate) struct Upstream {
    client: Client,
    base: Uri,
    /// The key as a bearer and by itself.
    api_key: Option<[HeaderValue; 2]>,
    timeouts: Timeouts,
}

impl Upstream {
    pub(crate) fn new(deployment: &Deployment, client: Client) -> Self {
        let api_key = deployment.api_key.as_ref().and_then(|key| {
            let sensitive = |text: &str| {
                let mut value = HeaderValue::from_str(text).ok()?;
                value.set_sensitive(true);
                Some(value)
            };
            Some([sensitive(&format!("Bearer {}", key.reveal()))?, sensitive(key.reveal())?])
        });
        Self { client, base: deployment.upstream.clone(), api_key, timeouts: deployment.timeouts }
    }

    /// Returns how long the answer's body may pause.
    pub(crate) fn idle(&self) -> Duration {
        self.timeouts.idle
    }

    /// Sends a request and returns the head of the answer, its body still to come.
    ///
    /// `written` is set as soon as bytes may have left.
    ///
    /// # Errors
    /// Says why there is no answer; what became of the request is in `written`.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection; the request may have been executed.
    pub(crate) async fn send(
        &self,
        to: Target<'_>,
        headers: &HeaderMap,
        body: Bytes,
        written: Arc<AtomicBool>,
    ) -> Result<Response<Incoming>, Failure> {
        let mut request = Request::new(Outgoing(Box::new(Unsent { bytes: Some(body), written })));
        *request.method_mut() = to.method.clone();
        *request.uri_mut() = self.uri(to.path, to.query).ok_or(Failure::Unreachable)?;
        *request.headers_mut() = self.headers(headers, to.family);
        let answer = tokio::time::timeout(self.timeouts.first_byte, (self.client.0)(request)).await;
        match answer {
            Err(_) => Err(Failure::Slow),
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(if error.is_connect() { Failure::Unreachable } else { Failure::Broken }),
        }
    }

    /// Returns whether a path and a query fit behind the base.
    pub(crate) fn fits(&self, path: &str, query: Option<&str>) -> bool {
        let base = self.base.path_and_query().map_or(0, |base| base.as_str().len());
        base + path.len() + query.map_or(0, |query| query.len() + 1) <= MAX_TARGET
    }

    /// Azure's API of old has its own header for a key; a bearer is another thing there.
    fn is_azure(&self) -> bool {
        self.base.path().contains("/openai/deployments/")
    }

    fn uri(&self, path: &str, query: Option<&str>) -> Option<Uri> {
        let mut joined = format!("{}{path}", self.base.path().trim_end_matches('/'));
        let queries = [self.base.query(), query];
        for (i, query) in queries.into_iter().flatten().enumerate() {
            joined.push(if i == 0 { '?' } else { '&' });
            joined.push_str(query);
        }
        let mut parts = self.base.clone().into_parts();
        parts.path_and_query = Some(PathAndQuery::try_from(joined).ok()?);
        Uri::from_parts(parts).ok()
    }

    fn headers(&self, from: &HeaderMap, family: Family) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(from.len() + 1);
        let named = named_by_connection(from);
        for (name, value) in from {
            if !is_hop_by_hop(name) && !WITHHELD.contains(name) && !is_one_of(&named, name) {
                headers.append(name, value.clone());
            }
        }
        if let Some([bearer, key]) = &self.api_key {
            match family {
                Family::OpenAi if self.is_azure() => headers.insert(API_KEY, key.clone()),
                Family::OpenAi => headers.insert(header::AUTHORIZATION, bearer.clone()),
                Family::Anthropic => headers.insert(X_API_KEY, key.clone()),
            };
        }
        // Usage must be readable; a header that is left out would allow any encoding.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers
    }
}

/// Where Anthropic's API reads the key.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Where Azure's API reads it, and where callers of Azure's SDKs write it.
const API_KEY: HeaderName = HeaderName::from_static("api-key");

/// What a caller sends that the upstream must not see: credentials, what our key would be billed
/// to, and what would make the answer unreadable for us.
const WITHHELD: [HeaderName; 12] = [
    header::AUTHORIZATION,
    header::COOKIE,
    X_API_KEY,
    API_KEY,
    // Azure's API Management and Google's APIs read a key here, too.
    HeaderName::from_static("ocp-apim-subscription-key"),
    HeaderName::from_static("x-goog-api-key"),
    // A key may be of several organizations or projects, each with limits and bills of its own.
    HeaderName::from_static("openai-organization"),
    HeaderName::from_static("openai-project"),
    HeaderName::from_static("x-goog-user-project"),
    header::ACCEPT_ENCODING,
    header::HOST,
    header::CONTENT_LENGTH,
];

/// Returns whether a header speaks of one connection only (RFC 9110, 7.6.1).
pub(super) fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "expect"
    )
}

/// Returns the headers that `connection` names as its own.
pub(super) fn named_by_connection(headers: &HeaderMap) -> Vec<&[u8]> {
    let values = headers.get_all(header::CONNECTION).iter().map(HeaderValue::as_bytes);
    values.flat_map(|value| value.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii).collect()
}

/// Returns whether `connection` names this header.
pub(super) fn is_one_of(named: &[&[u8]], name: &HeaderName) -> bool {
    named.iter().any(|named| named.eq_ignore_ascii_case(name.as_str().as_bytes()))
}

/// A request's body that tells when it is first read.
///
/// Boxed: hyper's client has room for 32 requests with every connection, and moves each about a dozen times.
#[derive(Debug)]
pub(super) struct Outgoing(Box<Unsent>);

#[derive(Debug)]
struct Unsent {
    bytes: Option<Bytes>,
    written: Arc<AtomicBool>,
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        // The client reads the body only when it is about to write on a connection.
        self.0.written.store(true, Ordering::Release);
        Poll::Ready(self.0.bytes.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.bytes.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, parse};

    #[test]
    fn a_key_goes_where_the_upstream_reads_it() {
        let sent = |base: &str, family: Family| {
            let text = format!(
                "deployments: [{{ model: m, upstream: '{base}', api_key: ours, limits: [{{ unit: requests, amount: 1, window: 1s }}] }}]"
            );
            let config = parse(&text, "test.yaml", &|_| None, &Flags::default()).unwrap();
            let upstream = Upstream::new(&config.deployments[0], Client::over(HttpConnector::new()));
            let from = [(header::AUTHORIZATION, "Bearer theirs"), (API_KEY, "theirs"), (X_API_KEY, "theirs")];
            let from = from.map(|(name, value)| (name, HeaderValue::from_static(value))).into_iter().collect();
            let headers = upstream.headers(&from, family);
            let keys = headers.iter().filter(|(_, value)| !value.to_str().unwrap().contains("identity"));
            keys.map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect::<Vec<_>>()
        };
        assert_eq!(sent("https://h.invalid/v1", Family::OpenAi), ["authorization: Bearer ours"]);
        assert_eq!(sent("https://h.invalid/v1", Family::Anthropic), ["x-api-key: ours"]);
        let azure = "https://h.invalid/openai/deployments/d?api-version=1";
        assert_eq!(sent(azure, Family::OpenAi), ["api-key: ours"]);
    }
}
