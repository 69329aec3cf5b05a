//! What an API's requests and answers say about tokens: one implementation a dialect.
//!
//! Knows how to read what a request may use at most and what an answer says it used.
//! Must not know limits, permits or sockets. The invariant it keeps: what it reads is
//! either understood or refused with a sentence for the caller; it never guesses low.

mod fields;
mod openai_chat;
mod text;

use axum::body::Bytes;

pub(crate) use openai_chat::OpenAiChat;

/// What one request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// The name the caller uses for the model.
    pub(crate) model: String,
    /// Whether the answer is wanted as server-sent events.
    pub(crate) stream: bool,
    /// An upper bound of the prompt's tokens.
    pub(crate) prompt: u64,
    /// The largest output cap of one choice, if the request names one.
    pub(crate) cap: Option<u64>,
    /// How many choices are asked for.
    pub(crate) choices: u64,
    /// What is sent upstream: the caller's bytes, but for what usage needs.
    pub(crate) body: Bytes,
    /// Usage was asked for on our own account: the caller does not expect its chunk.
    pub(crate) hide_usage: bool,
}

/// A request that cannot be understood; the caller can mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BadRequest {
    pub(crate) message: String,
    /// The field that is wrong.
    pub(crate) param: Option<&'static str>,
}

impl BadRequest {
    fn new(param: impl Into<Option<&'static str>>, message: impl Into<String>) -> Self {
        Self { message: message.into(), param: param.into() }
    }
}

/// What an answer says it used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt: u64,
    pub(crate) completion: u64,
    pub(crate) total: u64,
}

/// What one server-sent event means for the count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) usage: Option<Usage>,
    /// Bytes of generated text: at least as many as its tokens.
    pub(crate) text_bytes: u64,
    /// It carries usage and nothing else.
    pub(crate) only_usage: bool,
}

/// How one API is metered.
pub(crate) trait Dialect: Send + Sync + 'static {
    /// Returns the path below the upstream's base.
    fn path(&self) -> &'static str;

    /// Returns what the request asks for.
    ///
    /// # Errors
    /// Says what the caller has to mend. Nothing was charged or sent.
    fn call(&self, body: Bytes) -> Result<Call, BadRequest>;

    /// Returns what a whole answer says it used; `None` if it does not say so in a way
    /// that can be believed.
    fn usage(&self, answer: &[u8]) -> Option<Usage>;

    /// Returns what the data of one server-sent event means.
    fn event(&self, data: &[u8]) -> Event;

    /// Returns an upper bound of the tokens generated in a whole answer.
    fn text_bytes(&self, answer: &[u8]) -> u64;
}
