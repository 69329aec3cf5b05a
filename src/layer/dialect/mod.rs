//! What an API's requests and answers say about tokens: one implementation a dialect.
//!
//! Knows how to read what a request may use at most and what an answer says it used.
//! Must not know limits, permits or sockets. The invariant it keeps: what it reads is
//! either understood or refused with a sentence for the caller; it never guesses low.

mod anthropic_messages;
mod fields;
mod openai_chat;
mod openai_completions;
mod openai_embeddings;
mod openai_responses;
mod other;
mod plain;
mod prompt;
mod request;
mod text;
mod usage;

use std::fmt;

use bytes::Bytes;

pub use anthropic_messages::AnthropicMessages;
pub use openai_chat::OpenAiChat;
pub use openai_completions::OpenAiCompletions;
pub use openai_embeddings::OpenAiEmbeddings;
pub use openai_responses::OpenAiResponses;
pub use other::Other;
pub use usage::{Report, Tally, Usage};

use super::refusal;
pub use super::refusal::Family;
use super::tokenizer::Tokenizer;

/// What one request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The name the caller uses for the model.
    pub model: String,
    /// An upper bound of the prompt's tokens, its text by its bytes.
    pub prompt: u64,
    /// The largest output cap of one choice, if the request names one; zero where the
    /// API has no output.
    pub cap: Option<u64>,
    /// How many choices are asked for.
    pub choices: u64,
    /// What is sent upstream: the caller's bytes, but for what usage needs.
    pub body: Bytes,
    /// Usage was asked for on our own account: the caller does not expect its chunk.
    pub hide_usage: bool,
}

impl Call {
    /// Returns the body with the upstream's own name for the model, where it has one; every
    /// other byte of a value stays as it was written.
    pub fn body_for(&self, upstream_model: Option<&str>) -> Bytes {
        let Some(model) = upstream_model else { return self.body.clone() };
        match request::fields(&self.body) {
            Ok(fields) => fields.with("model", &serde_json::Value::from(model).to_string()),
            Err(_) => other::with_model(&self.body, model).unwrap_or_else(|| self.body.clone()),
        }
    }
}

/// A request that cannot be understood; the caller can mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRequest {
    /// What is wrong, for the caller.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<&'static str>,
}

impl BadRequest {
    /// Returns what is wrong with a field, or with all of it.
    pub fn new(param: impl Into<Option<&'static str>>, message: impl Into<String>) -> Self {
        Self { message: message.into(), param: param.into() }
    }
}

/// What one server-sent event means for the count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// What it says of the use.
    pub report: Report,
    /// Bytes of generated text: at least as many as its tokens.
    pub text_bytes: u64,
    /// It carries usage and nothing else.
    pub only_usage: bool,
    /// Nothing that counts comes after it.
    pub last: bool,
    /// The upstream gives up.
    pub failed: bool,
}

impl Event {
    /// Returns what an event means that is not understood: it may be all text.
    pub fn unread(event: &[u8]) -> Self {
        Self { text_bytes: event.len() as u64, ..Self::default() }
    }
}

/// Reads how much a request may use: its prompt and, if it names one, its cap.
pub trait Estimate: fmt::Debug + Send + Sync + 'static {
    /// Returns what the request asks for.
    ///
    /// # Errors
    /// Says what the caller has to mend. Nothing was charged or sent.
    fn call(&self, body: Bytes) -> Result<Call, BadRequest>;

    /// Returns a bound of the prompt's tokens, no larger than the call's own, where a
    /// tokenizer counts its text. By default it is the call's own.
    fn prompt(&self, call: &Call, tokenizer: Tokenizer) -> u64 {
        let _ = tokenizer;
        call.prompt
    }
}

/// Reads how much an answer used.
pub trait ReadUsage: Send + Sync + 'static {
    /// Returns what a whole answer says it used.
    fn report(&self, answer: &[u8]) -> Report {
        Report::in_answer(answer)
    }

    /// Returns what the data of one server-sent event means.
    fn event(&self, event: &[u8]) -> Event;

    /// Returns an upper bound of the tokens generated in a whole answer.
    fn text_bytes(&self, answer: &[u8]) -> u64;
}

/// How one API is metered, and where and how it speaks.
pub trait Dialect: Estimate + ReadUsage {
    /// Returns the path below the API's base.
    fn path(&self) -> &str;

    /// Returns whose errors and credentials the API has.
    fn family(&self) -> Family {
        Family::OpenAi
    }

    /// Returns whether the path is known to be one of the API's: what is not and names no
    /// model is not found.
    fn is_known(&self) -> bool {
        true
    }

    /// Returns the last event of a stream that the upstream broke off.
    fn cut(&self, why: &str) -> String {
        format!("data: {}\n\n", refusal::openai_error(why, "server_error", None, Some("upstream_cut")))
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
use tests::call;
