//! OpenAI's text completions.
//!
//! Knows the ways a prompt may be written: text or tokens, one or many. Must not know
//! limits. The invariant it keeps: each prompt is completed as often as the larger of
//! `n` and `best_of` says.

use bytes::Bytes;
use serde::Deserialize;

use super::openai_chat::{choices_bytes, chunk};
use super::plain::Saving;
use super::{BadRequest, Call, Dialect, Estimate, Event, ReadUsage, request};
use crate::layer::tokenizer::Tokenizer;

/// What a tokenizer adds to a text: where it begins and where it ends.
const TOKENS_PER_TEXT: u64 = 2;

/// `POST /v1/completions`.
#[derive(Clone, Copy, Debug)]
pub struct OpenAiCompletions;

impl Estimate for OpenAiCompletions {
    fn call(&self, body: Bytes) -> Result<Call, BadRequest> {
        let fields = request::fields(&body)?;
        let model = request::model(&fields)?;
        let stream = request::flag(fields.get("stream"), "stream")?;
        let output = request::output(&fields, 0)?;
        // A prompt may be left out: the model begins a document.
        let texts = Texts::of(fields.get("prompt").map_or("\"\"", |prompt| prompt.get()), "prompt")?;
        let prompt = texts.tokens.saturating_add(request::written(&fields, &["suffix"]));
        let rewritten = if stream { request::ask_for_usage(&fields)? } else { None };
        let hide_usage = rewritten.is_some();
        let choices = output.choices.saturating_mul(texts.count);
        let body = rewritten.unwrap_or_else(|| body.clone());
        Ok(Call { model, prompt, cap: output.cap, choices, body, hide_usage })
    }

    fn prompt(&self, call: &Call, tokenizer: Tokenizer) -> u64 {
        let Ok(fields) = request::fields(&call.body) else { return call.prompt };
        let mut saving = Saving::new(tokenizer);
        saving.texts(fields.get("prompt"));
        saving.of(call.prompt)
    }
}

impl ReadUsage for OpenAiCompletions {
    fn event(&self, event: &[u8]) -> Event {
        chunk(event)
    }

    fn text_bytes(&self, answer: &[u8]) -> u64 {
        choices_bytes(answer)
    }
}

impl Dialect for OpenAiCompletions {
    fn path(&self) -> &str {
        "/completions"
    }
}

/// One text or many, as text or as tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Texts {
    /// An upper bound of the tokens of all of them.
    pub(super) tokens: u64,
    pub(super) count: u64,
}

impl Texts {
    pub(super) fn of(value: &str, param: &'static str) -> Result<Self, BadRequest> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(String),
            Texts(Vec<String>),
            Tokens(Vec<u32>),
            ManyTokens(Vec<Vec<u32>>),
        }
        let wrong = || {
            BadRequest::new(
                param,
                format!("'{param}' must be a text of valid Unicode, tokens, or a non-empty array of one of them"),
            )
        };
        let bytes = |text: &String| text.len() as u64;
        let (tokens, count) = match serde_json::from_str(value).map_err(|_| wrong())? {
            Written::Text(text) => (bytes(&text), 1),
            Written::Texts(texts) => (texts.iter().map(bytes).sum(), texts.len()),
            Written::Tokens(tokens) => (tokens.len() as u64, 1),
            Written::ManyTokens(many) => (many.iter().map(|tokens| tokens.len() as u64).sum(), many.len()),
        };
        if count == 0 {
            return Err(wrong());
        }
        let count = count as u64;
        Ok(Self { tokens: tokens + count * TOKENS_PER_TEXT, count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(body: &str) -> Result<Call, BadRequest> {
        super::super::call(&OpenAiCompletions, body)
    }

    #[test]
    fn texts_count_with_their_bytes_and_tokens_with_their_number() {
        for (prompt, tokens, count) in [
            (r#""héllo""#, 6 + 2, 1),
            (r#"["ab","cde"]"#, 5 + 4, 2),
            ("[1,2,70000]", 3 + 2, 1),
            ("[[1,2],[3]]", 3 + 4, 2),
        ] {
            assert_eq!(Texts::of(prompt, "prompt"), Ok(Texts { tokens, count }), "{prompt}");
        }
        for wrong in ["5", "{}", "[]", "[\"a\",1]", "[-1]", "[[\"a\"]]"] {
            assert_eq!(Texts::of(wrong, "prompt").unwrap_err().param, Some("prompt"), "{wrong}");
        }
    }

    #[test]
    fn every_prompt_is_completed_as_often_as_asked_for() {
        let asked = call(r#"{"model":"m","prompt":["a","b"],"n":2,"best_of":3,"max_tokens":10}"#).unwrap();
        assert_eq!((asked.cap, asked.choices), (Some(10), 6));
        assert_eq!(call(r#"{"model":"m","max_tokens":0,"echo":true}"#).unwrap().cap, Some(0));
    }

    #[test]
    fn a_stream_asks_for_usage() {
        let asked = call(r#"{"model":"m","prompt":"a","stream":true}"#).unwrap();
        assert!(asked.hide_usage && asked.body.ends_with(br#""stream_options":{"include_usage":true}}"#));
    }

    #[test]
    fn text_of_a_chunk_counts() {
        let event = OpenAiCompletions.event(br#"{"choices":[{"text":"abc","index":0}]}"#);
        assert_eq!(event, Event { text_bytes: 3, ..Event::default() });
    }
}
