//! The limiter as middleware for HTTP services: axum's, hyper's, anybody's.
//!
//! Knows the order of the steps: read the request, reserve, let the service answer, settle
//! in the body. Must not know sockets or upstreams. The invariant it keeps: a request that
//! is refused has charged nothing and has not reached the service.
//!
//! A [`LimitLayer`] stands around what answers one API's requests for one deployment. The
//! permit lives in the answer's body and is settled with what the answer says it used: at
//! its end, when it fails, and when it is dropped in the middle. What cannot be known stays
//! charged ([`Unreported`]). `quotum serve` is built from the same parts.
//!
//! ```
//! use quotum::layer::{LimitLayer, Metering, OpenAiChat};
//! use quotum::{Limiter, Quota};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let limiter = Limiter::builder().deployment("gpt-4o", [Quota::tokens(100_000).per_minute()]).build()?;
//! let limit = LimitLayer::new(OpenAiChat, limiter.handle("gpt-4o")?).metering(Metering::default());
//! // axum: Router::new().route("/v1/chat/completions", post(chat).layer(limit))
//! # let _ = limit;
//! # Ok(())
//! # }
//! ```
//!
//! How a request is estimated and an answer read are two small traits, [`Estimate`] and
//! [`ReadUsage`]; each dialect of the known APIs implements both, and so can yours.

mod answer;
mod body;
#[doc(hidden)]
pub mod date;
mod dialect;
mod metering;
mod prompts;
#[doc(hidden)]
pub mod refusal;
mod sse;
mod tokenizer;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body::Body;
use http_body_util::{BodyExt, Either, Full, LengthLimitError, Limited};
use tower_layer::Layer;
use tower_service::Service;

use crate::Handle;
pub use body::{BoxError, Metered};
pub use dialect::{
    AnthropicMessages, BadRequest, Call, Dialect, Estimate, Event, Family, OpenAiChat, OpenAiCompletions,
    OpenAiEmbeddings, OpenAiResponses, Other, ReadUsage, Report, Tally, Usage,
};
use metering::{Charge, Meter};
pub use metering::{Metering, Observer, Reserve, Unreported};
use prompts::Prompts;
use refusal::Refusal;
pub use tokenizer::Tokenizer;

/// What `quotum serve` is made of beside: no part of the public API.
#[doc(hidden)]
pub mod parts {
    pub use super::answer::{encoding, form, media_type};
    pub use super::body::{Form, Metered};
    pub use super::metering::{Charge, Meter};
    pub use super::prompts::Prompts;
    pub use super::{date, refusal};
}

/// The largest body of a request, unless told otherwise: the proxy's default.
const MAX_BODY: usize = 32 << 20;

/// How long an answer may be silent, unless told otherwise: the proxy's default.
const IDLE: Duration = Duration::from_secs(120);

/// The body of an answer: the service's, metered, or a refusal's.
pub type Answer<B> = Either<Metered<B>, Full<Bytes>>;

/// Puts a limit before a service that answers one API's requests for one deployment.
///
/// Cheap to clone; the clones share what they learn of the deployment's outputs.
#[derive(Clone)]
pub struct LimitLayer {
    shared: Arc<Shared>,
}

#[derive(Clone)]
struct Shared {
    dialect: Arc<dyn Dialect>,
    handle: Handle,
    meter: Arc<Meter>,
    observer: Arc<dyn Observer>,
    max_body: usize,
    idle: Duration,
}

impl LimitLayer {
    /// Returns the layer of an API in front of a deployment, metered by default.
    pub fn new(dialect: impl Dialect, handle: Handle) -> Self {
        let meter = Arc::new(Meter::of(&handle, Metering::default()));
        let dialect = Arc::new(dialect);
        let shared = Shared { dialect, handle, meter, observer: Arc::new(()), max_body: MAX_BODY, idle: IDLE };
        Self { shared: Arc::new(shared) }
    }

    /// Meters otherwise; what was learned before is forgotten.
    #[must_use]
    pub fn metering(self, metering: Metering) -> Self {
        self.with(|shared| shared.meter = Arc::new(Meter::of(&shared.handle, metering)))
    }

    /// Tells somebody how good the estimates are; by default nobody.
    #[must_use]
    pub fn observer(self, observer: impl Observer + 'static) -> Self {
        self.with(|shared| shared.observer = Arc::new(observer))
    }

    /// Refuses larger bodies of requests with 413; by default 32 MiB.
    #[must_use]
    pub fn max_body(self, bytes: usize) -> Self {
        self.with(|shared| shared.max_body = bytes)
    }

    /// Breaks off answers that are silent for longer; by default two minutes.
    #[must_use]
    pub fn idle(self, idle: Duration) -> Self {
        self.with(|shared| shared.idle = idle)
    }

    fn with(self, change: impl FnOnce(&mut Shared)) -> Self {
        let mut shared = Arc::unwrap_or_clone(self.shared);
        change(&mut shared);
        Self { shared: Arc::new(shared) }
    }
}

impl fmt::Debug for LimitLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LimitLayer").field("handle", &self.shared.handle).finish_non_exhaustive()
    }
}

impl<S> Layer<S> for LimitLayer {
    type Service = Limit<S>;

    fn layer(&self, service: S) -> Limit<S> {
        Limit { shared: self.shared.clone(), service }
    }
}

/// A service behind a limit: see [`LimitLayer`].
///
/// Needs a tokio runtime with time, and a body of requests that can be made of bytes: axum's
/// and `http_body_util::Full` can, hyper's `Incoming` is collected before. A future that is dropped before the service was called
/// has charged nothing; after that, what may have been used stays charged.
#[derive(Clone)]
pub struct Limit<S> {
    shared: Arc<Shared>,
    service: S,
}

impl<S: fmt::Debug> fmt::Debug for Limit<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limit").field("handle", &self.shared.handle).field("service", &self.service).finish()
    }
}

impl<S, B, A> Service<Request<B>> for Limit<S>
where
    S: Service<Request<B>, Response = Response<A>> + Clone + Send + 'static,
    S::Future: Send,
    B: Body<Data = Bytes> + From<Bytes> + Send + 'static,
    B::Error: Into<BoxError> + Send,
    A: Body<Data = Bytes> + Unpin + Send + 'static,
{
    type Response = Response<Answer<A>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The one that is ready is the one that is called.
        let clone = self.service.clone();
        let service = std::mem::replace(&mut self.service, clone);
        let shared = self.shared.clone();
        Box::pin(async move { shared.serve(service, request).await })
    }
}

impl Shared {
    async fn serve<S, B, A>(
        self: Arc<Self>,
        mut service: S,
        request: Request<B>,
    ) -> Result<Response<Answer<A>>, S::Error>
    where
        S: Service<Request<B>, Response = Response<A>>,
        B: Body<Data = Bytes> + From<Bytes>,
        B::Error: Into<BoxError>,
        A: Body<Data = Bytes> + Unpin,
    {
        let (mut head, body) = request.into_parts();
        let (call, mut charge) = match self.reserve(&head.headers, body).await {
            Ok(reserved) => reserved,
            Err(refusal) => {
                let mut response = refusal.response::<Full<Bytes>>(self.dialect.family()).map(Either::Right);
                self.set_standings(response.headers_mut());
                return Ok(response);
            }
        };
        head.headers.remove(header::TRANSFER_ENCODING);
        head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(call.body.len()));
        // From here on it may be used.
        charge.start();
        let answer = match service.call(Request::from_parts(head, B::from(call.body.clone()))).await {
            Ok(answer) => answer,
            Err(error) => {
                charge.settle_unanswered();
                return Err(error);
            }
        };
        let (mut head, body) = answer.into_parts();
        let form = answer::form(head.status, &mut head.headers, &mut charge, call.hide_usage);
        self.set_standings(&mut head.headers);
        let metered = Metered::new(body, charge, self.dialect.clone(), form, self.idle);
        Ok(Response::from_parts(head, Either::Left(metered)))
    }

    /// Reads a request and reserves what it may use.
    async fn reserve<B>(&self, headers: &HeaderMap, body: B) -> Result<(Call, Charge), Refusal>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<BoxError>,
    {
        let call = self
            .dialect
            .call(self.read(headers, body).await?)
            .map_err(|bad| Refusal::invalid(StatusCode::BAD_REQUEST, bad.message, bad.param, None))?;
        let prompts = Prompts::count(&self.dialect, &call, [self.meter.tokenizer()]).await;
        let claim = self.meter.claim(&call, &prompts);
        match self.handle.acquire(claim).await {
            Ok(permit) => {
                let charge = Charge::new(permit.into_owned(), self.meter.clone(), self.observer.clone(), &call);
                Ok((call, charge))
            }
            Err(denied) => {
                Err(refusal::denied(&denied, &call.model, self.handle.deployment(), claim, self.dialect.family()))
            }
        }
    }

    async fn read<B>(&self, headers: &HeaderMap, body: B) -> Result<Bytes, Refusal>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<BoxError>,
    {
        if let Some(encoding) = answer::encoding(headers) {
            return Err(refusal::encoded(encoding));
        }
        match Limited::new(body, self.max_body).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => {
                let message =
                    format!("The request's body is larger than {} bytes, the most that is taken here.", self.max_body);
                Err(Refusal::invalid(StatusCode::PAYLOAD_TOO_LARGE, message, None, Some("request_too_large")))
            }
            Err(_) => Err(Refusal::invalid(StatusCode::BAD_REQUEST, "The request's body broke off.", None, None)),
        }
    }

    fn set_standings(&self, headers: &mut HeaderMap) {
        refusal::set_standings(headers, &self.handle.standings(), self.dialect.family());
    }
}
