//! OpenAI's chat completions.
//!
//! Knows the request's prompt fields and the chunks of a stream. Must not know limits.
//! The invariant it keeps: prompt and cap are upper bounds, each as far as `prompt.rs`
//! has one.

use std::fmt;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::fields::Fields;
use super::plain::Saving;
use super::prompt::Prompt;
use super::text::TextBytes;
use super::{BadRequest, Call, Dialect, Estimate, Event, ReadUsage, Report, request};
use crate::layer::tokenizer::Tokenizer;

/// What the chat template adds to each message: role, separators and a name.
const TOKENS_PER_MESSAGE: u64 = 8;

/// What the chat template adds once, to prime the answer.
const TOKENS_PER_PROMPT: u64 = 3;

/// What is written out for the model, punctuation and names included.
const WRITTEN: [&str; 6] = ["tools", "functions", "tool_choice", "function_call", "response_format", "prediction"];

/// `POST /v1/chat/completions`.
#[derive(Clone, Copy, Debug)]
pub struct OpenAiChat;

impl Estimate for OpenAiChat {
    fn call(&self, body: Bytes) -> Result<Call, BadRequest> {
        let fields = request::fields(&body)?;
        let model = request::model(&fields)?;
        let stream = request::flag(fields.get("stream"), "stream")?;
        let output = request::output(&fields, 1)?;
        let prompt = prompt(&fields, &model)?;
        let rewritten = if stream { request::ask_for_usage(&fields)? } else { None };
        let hide_usage = rewritten.is_some();
        let body = rewritten.unwrap_or_else(|| body.clone());
        Ok(Call { model, prompt, cap: output.cap, choices: output.choices, body, hide_usage })
    }

    fn prompt(&self, call: &Call, tokenizer: Tokenizer) -> u64 {
        let Ok(fields) = request::fields(&call.body) else { return call.prompt };
        let mut saving = Saving::new(tokenizer);
        saving.messages(fields.get("messages"));
        saving.of(call.prompt)
    }
}

impl ReadUsage for OpenAiChat {
    fn event(&self, event: &[u8]) -> Event {
        chunk(event)
    }

    fn text_bytes(&self, answer: &[u8]) -> u64 {
        choices_bytes(answer)
    }
}

impl Dialect for OpenAiChat {
    fn path(&self) -> &str {
        "/chat/completions"
    }
}

fn prompt(fields: &Fields<'_>, model: &str) -> Result<u64, BadRequest> {
    let messages = fields.get("messages").ok_or_else(|| BadRequest::new("messages", "'messages' is required"))?;
    let messages: Vec<Prompt> = serde_json::from_str(messages.get()).map_err(|_| {
        BadRequest::new("messages", "'messages' must be an array of messages, valid Unicode and not too deeply nested")
    })?;
    if messages.is_empty() {
        return Err(BadRequest::new("messages", "'messages' must hold at least one message"));
    }
    let text = messages.iter().fold(TOKENS_PER_PROMPT, |sum, message| {
        sum.saturating_add(message.tokens(model)).saturating_add(TOKENS_PER_MESSAGE)
    });
    Ok(text.saturating_add(request::written(fields, &WRITTEN)))
}

/// Returns what a chunk of a stream of chat or text completions means.
pub(super) fn chunk(event: &[u8]) -> Event {
    #[derive(Deserialize)]
    struct Chunk<'a> {
        #[serde(default)]
        choices: Option<Choices>,
        #[serde(default, borrow)]
        usage: Option<&'a RawValue>,
        #[serde(default)]
        error: Option<IgnoredAny>,
    }
    if event == b"[DONE]" {
        return Event { last: true, ..Event::default() };
    }
    let Ok(chunk) = serde_json::from_slice::<Chunk<'_>>(event) else { return Event::unread(event) };
    let report = Report::of(chunk.usage);
    let choices = chunk.choices.unwrap_or_default();
    let only_usage = report != Report::None && choices.count == 0;
    Event {
        report,
        text_bytes: choices.bytes,
        only_usage,
        // Some upstreams report with every chunk what was used so far: the last report
        // counts, and one without text is the last.
        last: only_usage,
        failed: chunk.error.is_some(),
    }
}

/// Returns an upper bound of the tokens generated in all choices of an answer.
pub(super) fn choices_bytes(answer: &[u8]) -> u64 {
    #[derive(Deserialize)]
    struct Answer {
        choices: Choices,
    }
    serde_json::from_slice::<Answer>(answer).map_or(answer.len() as u64, |answer| answer.choices.bytes)
}

/// How many choices there are, and an upper bound of the tokens generated in all of them.
#[derive(Clone, Copy, Default)]
struct Choices {
    count: usize,
    bytes: u64,
}

impl<'de> Deserialize<'de> for Choices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Count;

        impl<'de> Visitor<'de> for Count {
            type Value = Choices;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of choices")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Choices, A::Error> {
                let mut choices = Choices::default();
                while let Some(choice) = seq.next_element::<&'de RawValue>()? {
                    choices.count += 1;
                    choices.bytes = choices.bytes.saturating_add(generated(choice));
                }
                Ok(choices)
            }
        }

        deserializer.deserialize_seq(Count)
    }
}

/// Returns an upper bound of the tokens generated in one choice.
fn generated(choice: &RawValue) -> u64 {
    #[derive(Deserialize)]
    struct Choice {
        #[serde(default)]
        delta: Option<TextBytes>,
        #[serde(default)]
        message: Option<TextBytes>,
        #[serde(default)]
        text: Option<TextBytes>,
    }
    let Ok(read) = serde_json::from_str::<Choice>(choice.get()) else { return choice.get().len() as u64 };
    read.delta.or(read.message).or(read.text).map_or(0, |text| text.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(body: &str) -> Result<Call, BadRequest> {
        super::super::call(&OpenAiChat, body)
    }

    #[test]
    fn the_largest_cap_counts() {
        let call = call(r#"{"model":"m","messages":[{"role":"user","content":"hello"}],"max_tokens":5,"max_completion_tokens":9,"n":2}"#).unwrap();
        assert_eq!((call.cap, call.choices), (Some(9), 2));
        assert_eq!(call.prompt, 4 + 5 + 8 + 3);
    }

    #[test]
    fn a_body_that_is_not_streamed_passes_as_it_is() {
        let body = r#"{ "model":"m" , "messages":[{"content":"x"}], "unknown": 1.0e5 }"#;
        let call = call(body).unwrap();
        assert_eq!(&call.body[..], body.as_bytes());
        assert!(!call.hide_usage);
    }

    #[test]
    fn a_stream_asks_for_usage_unless_the_caller_did() {
        let ours = call(r#"{"model":"m","messages":[{}],"stream":true}"#).unwrap();
        assert!(ours.hide_usage);
        assert!(ours.body.ends_with(br#""stream_options":{"include_usage":true}}"#));
        let options = r#"{"model":"m","messages":[{}],"stream":true,"stream_options":{"include_usage":false,"x":1}}"#;
        let ours = call(options).unwrap();
        assert!(ours.hide_usage);
        assert!(ours.body.ends_with(br#""stream_options":{"x":1,"include_usage":true}}"#));
        let theirs = r#"{"model":"m","messages":[{}],"stream":true,"stream_options":{"include_usage":true}}"#;
        let call = call(theirs).unwrap();
        assert!(!call.hide_usage);
        assert_eq!(&call.body[..], theirs.as_bytes());
    }

    #[test]
    fn what_is_not_json_is_refused_without_being_repeated() {
        for wrong in ["", "{", "[]", "5", "{\"secret prompt", "{\"a\":1,\"a\":2}", "nul", "\u{feff}{}"] {
            let refusal = call(wrong).unwrap_err();
            assert!(!refusal.message.contains("secret"), "{wrong}");
        }
        let deep = format!(r#"{{"model":"m","messages":[{}{}]}}"#, "[".repeat(500), "]".repeat(500));
        assert!(call(&deep).is_err());
    }

    #[test]
    fn only_a_chunk_without_choices_is_nothing_but_usage() {
        let event = OpenAiChat.event(br#"{"choices":[],"usage":{"total_tokens":7}}"#);
        assert!(event.only_usage && event.last && event.report.is_told());
        let event = OpenAiChat.event(br#"{"choices":[{"delta":{"content":"abc"}}],"usage":null}"#);
        assert_eq!((event.only_usage, event.report, event.text_bytes), (false, Report::None, 3));
        assert_eq!(OpenAiChat.event(b"[DONE]"), Event { last: true, ..Event::default() });
        assert!(OpenAiChat.event(br#"{"error":{"message":"overloaded"}}"#).failed);
        assert_eq!(OpenAiChat.event(b"{garbage"), Event { text_bytes: 8, ..Event::default() });
    }
}
