//! Anthropic's messages.
//!
//! Knows the request's prompt fields and the events of a stream. Must not know limits.
//! The invariant it keeps: tokens of the cache are part of the prompt, read or written,
//! as the caller's limit cannot know what a model's provider forgives.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::fields::Fields;
use super::prompt::Prompt;
use super::text::TextBytes;
use super::{BadRequest, Call, Dialect, Estimate, Event, ReadUsage, Report, Tally, request};
use crate::layer::refusal::{self, Family};

/// What the template adds to each message.
const TOKENS_PER_MESSAGE: u64 = 8;

/// What tools add beside their own text: Anthropic's system prompt for them (up to 530
/// tokens), and the definition of each tool that Anthropic itself brings (up to 735).
const TOKENS_OF_TOOLS: u64 = 1_024;

/// What is written out for the model, punctuation and names included.
const WRITTEN: [&str; 4] = ["tools", "tool_choice", "output_format", "output_config"];

/// `POST /v1/messages`.
#[derive(Clone, Copy, Debug)]
pub struct AnthropicMessages;

impl Estimate for AnthropicMessages {
    fn call(&self, body: Bytes) -> Result<Call, BadRequest> {
        let fields = request::fields(&body)?;
        let model = request::model(&fields)?;
        request::flag(fields.get("stream"), "stream")?;
        // A cap of zero has the prompt cached.
        let output = request::output(&fields, 0)?;
        let prompt = prompt(&fields, &model)?;
        Ok(Call { model, prompt, cap: output.cap, choices: output.choices, body: body.clone(), hide_usage: false })
    }
}

impl ReadUsage for AnthropicMessages {
    fn event(&self, event: &[u8]) -> Event {
        #[derive(Deserialize)]
        struct Sent<'a> {
            #[serde(rename = "type")]
            kind: String,
            #[serde(default, borrow)]
            message: Option<&'a RawValue>,
            #[serde(default, borrow)]
            usage: Option<&'a RawValue>,
            #[serde(default)]
            delta: Option<Generated>,
            #[serde(default)]
            content_block: Option<Generated>,
        }
        let Ok(sent) = serde_json::from_slice::<Sent<'_>>(event) else { return Event::unread(event) };
        let report = match &*sent.kind {
            // Its output is that of the first token alone.
            "message_start" => sent
                .message
                .map_or(Report::None, |message| Report::in_answer(message.get().as_bytes()))
                .map(Tally::without_output),
            "message_delta" => Report::of(sent.usage),
            _ => Report::None,
        };
        let text_bytes = sent.delta.into_iter().chain(sent.content_block).map(|generated| generated.bytes()).sum();
        let (last, failed) = (sent.kind == "message_stop", sent.kind == "error");
        Event { report, text_bytes, only_usage: false, last, failed }
    }

    fn text_bytes(&self, answer: &[u8]) -> u64 {
        #[derive(Deserialize)]
        struct Answer {
            content: TextBytes,
        }
        serde_json::from_slice::<Answer>(answer).map_or(answer.len() as u64, |answer| answer.content.0)
    }
}

impl Dialect for AnthropicMessages {
    fn path(&self) -> &str {
        "/messages"
    }

    fn family(&self) -> Family {
        Family::Anthropic
    }

    fn cut(&self, why: &str) -> String {
        format!("event: error\ndata: {}\n\n", refusal::anthropic_error(why, "api_error"))
    }
}

/// What the model wrote of a block or a piece of one; the rest is bookkeeping.
#[derive(Deserialize)]
struct Generated {
    #[serde(default)]
    text: Option<TextBytes>,
    #[serde(default)]
    partial_json: Option<TextBytes>,
    #[serde(default)]
    thinking: Option<TextBytes>,
    #[serde(default)]
    name: Option<TextBytes>,
    #[serde(default)]
    input: Option<TextBytes>,
}

impl Generated {
    fn bytes(&self) -> u64 {
        let parts = [self.text, self.partial_json, self.thinking, self.name, self.input];
        parts.into_iter().flatten().fold(0, |sum, part| sum.saturating_add(part.0))
    }
}

fn prompt(fields: &Fields<'_>, model: &str) -> Result<u64, BadRequest> {
    let messages = fields.get("messages").ok_or_else(|| BadRequest::new("messages", "messages: Field required"))?;
    let messages: Vec<Prompt> = serde_json::from_str(messages.get()).map_err(|_| {
        BadRequest::new("messages", "messages: Input should be an array, valid Unicode and not too deeply nested")
    })?;
    if messages.is_empty() {
        return Err(BadRequest::new("messages", "messages: at least one message is required"));
    }
    let system: Option<Prompt> =
        fields.get("system").map(|system| serde_json::from_str(system.get())).transpose().map_err(|_| {
            BadRequest::new(
                "system",
                "system: Input should be a text or an array of blocks, valid Unicode and not too deeply nested",
            )
        })?;
    let sum = messages
        .iter()
        .chain(&system)
        .fold(0, |sum: u64, message| sum.saturating_add(message.tokens(model)).saturating_add(TOKENS_PER_MESSAGE));
    let tools: Vec<&RawValue> = match fields.get("tools") {
        None => Vec::new(),
        Some(tools) => serde_json::from_str(tools.get())
            .map_err(|_| BadRequest::new("tools", "tools: Input should be an array"))?,
    };
    let tools = if tools.is_empty() { 0 } else { 1 + tools.len() as u64 };
    Ok(sum.saturating_add(request::written(fields, &WRITTEN)).saturating_add(tools.saturating_mul(TOKENS_OF_TOOLS)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(body: &str) -> Result<Call, BadRequest> {
        super::super::call(&AnthropicMessages, body)
    }

    #[test]
    fn system_and_messages_count() {
        let asked = call(
            r#"{"model":"m","max_tokens":9,"system":[{"type":"text","text":"abc"}],"messages":[{"role":"user","content":"hello"}]}"#,
        )
        .unwrap();
        assert_eq!((asked.prompt, asked.cap, asked.choices), (4 + 3 + 8 + 4 + 5 + 8, Some(9), 1));
    }

    #[test]
    fn tools_count_with_the_prompt_that_comes_with_them() {
        let asked = call(r#"{"model":"m","max_tokens":9,"tools":[{"name":"x"}],"messages":[{"content":""}]}"#).unwrap();
        assert_eq!(asked.prompt, 8 + r#"[{"name":"x"}]"#.len() as u64 + 2 * TOKENS_OF_TOOLS);
    }

    #[test]
    fn a_wrong_field_is_named() {
        for (body, param) in [
            (r#"{"model":"m"}"#, "messages"),
            (r#"{"model":"m","messages":[]}"#, "messages"),
            (r#"{"model":"m","messages":[{}],"tools":{}}"#, "tools"),
            (r#"{"model":"m","messages":[{}],"max_tokens":-1}"#, "max_tokens"),
            (r#"{"model":"m","messages":[{}],"stream":1}"#, "stream"),
        ] {
            assert_eq!(call(body).unwrap_err().param, Some(param), "{body}");
        }
    }

    #[test]
    fn usage_comes_at_both_ends_of_a_stream() {
        let told = |text: &str| match AnthropicMessages.event(text.as_bytes()).report {
            Report::Told(tally) => tally,
            other => panic!("{other:?}"),
        };
        let start = told(
            r#"{"type":"message_start","message":{"content":[],"usage":{"input_tokens":3,"cache_creation_input_tokens":10,"cache_read_input_tokens":100,"output_tokens":1}}}"#,
        );
        assert_eq!((start.prompt(), start.usage()), (Some(113), None));
        let end =
            start.then(told(r#"{"type":"message_delta","delta":{"stop_reason":"x"},"usage":{"output_tokens":40}}"#));
        let usage = end.usage().unwrap();
        assert_eq!((usage.prompt, usage.completion, usage.total), (113, 40, 153));
        assert!(AnthropicMessages.event(br#"{"type":"message_stop"}"#).last);
        assert!(AnthropicMessages.event(br#"{"type":"error","error":{"type":"overloaded_error"}}"#).failed);
    }

    #[test]
    fn what_the_model_wrote_counts() {
        let bytes = |text: &str| AnthropicMessages.event(text.as_bytes()).text_bytes;
        assert_eq!(bytes(r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"abc"}}"#), 3);
        assert_eq!(
            bytes(r#"{"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"{\"a"}}"#),
            3
        );
        assert_eq!(
            bytes(
                r#"{"type":"content_block_start","content_block":{"type":"tool_use","id":"1","name":"ab","input":{}}}"#
            ),
            2
        );
        assert_eq!(bytes(r#"{"type":"ping"}"#), 0);
        assert_eq!(bytes("garbage"), 7);
    }
}
