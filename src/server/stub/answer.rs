//! What the stub answers, in the shape of each API.
//!
//! Knows the providers' request and response objects. Must not know time or sockets.
//! The invariant it keeps: the whole answer and its pieces say the same, and the
//! completion tokens of the pieces add up to those of the usage object.

use axum::body::Bytes;
use axum::http::HeaderMap;
use serde_json::{Value, json};

use super::number;

/// How many pieces the text of a streamed answer comes in, at most.
const TEXT_PIECES: u64 = 8;

/// Which API is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Completion,
    Embedding,
    Responses,
    Messages,
}

impl Shape {
    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completion => "/v1/completions",
            Self::Embedding => "/v1/embeddings",
            Self::Responses => "/v1/responses",
            Self::Messages => "/v1/messages",
        }
    }
}

/// One request, as far as it decides the answer.
#[derive(Clone, Debug)]
pub(super) struct Exchange {
    shape: Shape,
    model: String,
    pub(super) stream: bool,
    include_usage: bool,
    pub(super) prompt_tokens: u64,
    /// How many of them were read from the cache.
    cached_tokens: u64,
    pub(super) completion_tokens: u64,
}

impl Exchange {
    pub(super) fn of(shape: Shape, request: &Value, body: &[u8], headers: &HeaderMap, bytes_per_token: u64) -> Self {
        let prompt_fields = ["messages", "prompt", "input", "system", "instructions"];
        let bytes: u64 = prompt_fields.iter().map(|field| text_bytes(&request[*field])).sum();
        let prompt_tokens =
            number(headers, "x-stub-prompt-tokens").unwrap_or_else(|| bytes.div_ceil(bytes_per_token.max(1)).max(1));
        let caps = ["max_tokens", "max_completion_tokens", "max_output_tokens"];
        let cap = caps.iter().filter_map(|cap| request[*cap].as_u64()).max();
        let wanted = number(headers, "x-stub-completion-tokens").unwrap_or_else(|| 1 + hash(body) % 200);
        let completion_tokens = if shape == Shape::Embedding { 0 } else { wanted.min(cap.unwrap_or(u64::MAX)) };
        Self {
            shape,
            model: request["model"].as_str().unwrap_or("stub").to_owned(),
            stream: shape != Shape::Embedding && request["stream"].as_bool().unwrap_or(false),
            include_usage: request["stream_options"]["include_usage"].as_bool().unwrap_or(false),
            prompt_tokens,
            cached_tokens: number(headers, "x-stub-cached-tokens").unwrap_or(0).min(prompt_tokens),
            completion_tokens,
        }
    }
}

/// Returns the bytes of every text the model would read; names and roles are not read.
fn text_bytes(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(fields) => {
            let read = fields.iter().filter(|(name, _)| matches!(name.as_str(), "content" | "text" | "arguments"));
            read.map(|(_, value)| text_bytes(value)).sum()
        }
        _ => 0,
    }
}

/// FNV-1a: the answer's length must depend on the request and on nothing else.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// A piece of a streamed answer.
pub(super) struct Piece {
    pub(super) bytes: Bytes,
    /// The completion tokens it carries.
    pub(super) tokens: u64,
    /// Whether it is the answer's last.
    pub(super) last: bool,
}

pub(super) struct Answer {
    exchange: Exchange,
    with_usage: bool,
    usage: Told,
    garbage: bool,
    gives_up: bool,
}

/// What a usage object tells.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    Truth,
    Nothing,
    Negative,
    Absurd,
}

impl Answer {
    pub(super) fn new(exchange: &Exchange, fault: &str) -> Self {
        Self {
            exchange: exchange.clone(),
            with_usage: fault != "no-usage",
            usage: match fault {
                "zero-usage" => Told::Nothing,
                "negative-usage" => Told::Negative,
                "absurd-usage" => Told::Absurd,
                _ => Told::Truth,
            },
            garbage: fault == "garbage",
            gives_up: fault == "error-event",
        }
    }

    pub(super) fn content_type(&self) -> &'static str {
        if self.exchange.stream { "text/event-stream" } else { "application/json" }
    }

    /// Returns the answer in one piece.
    pub(super) fn whole(&self) -> String {
        let (model, usage) = (&self.exchange.model, self.usage());
        let text = words(self.exchange.completion_tokens);
        let mut answer = match self.exchange.shape {
            Shape::Chat => json!({
                "id": "chatcmpl-stub", "object": "chat.completion", "created": 0, "model": model,
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": usage,
            }),
            Shape::Completion => json!({
                "id": "cmpl-stub", "object": "text_completion", "created": 0, "model": model,
                "choices": [{"index": 0, "text": text, "logprobs": null, "finish_reason": "stop"}],
                "usage": usage,
            }),
            Shape::Embedding => json!({
                "object": "list", "model": model,
                "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}],
                "usage": usage,
            }),
            Shape::Responses => self.response("completed", Some(&text)),
            Shape::Messages => json!({
                "id": "msg_stub", "type": "message", "role": "assistant", "model": model,
                "content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "stop_sequence": null,
                "usage": usage,
            }),
        };
        if !self.with_usage
            && let Some(fields) = answer.as_object_mut()
        {
            fields.remove("usage");
        }
        answer.to_string()
    }

    /// Returns the answer in pieces: server-sent events, or halves of the whole where
    /// no stream was asked for.
    pub(super) fn pieces(&self) -> Vec<Piece> {
        if !self.exchange.stream {
            let whole = Bytes::from(self.whole());
            let (a, b) = (whole.slice(..whole.len() / 2), whole.slice(whole.len() / 2..));
            let tokens = self.exchange.completion_tokens;
            return vec![Piece { bytes: a, tokens: 0, last: false }, Piece { bytes: b, tokens, last: true }];
        }
        if self.garbage {
            return vec![Piece { bytes: "data: {no JSON here\n\ndata: [DONE]\n\n".into(), tokens: 0, last: true }];
        }
        let tokens = self.exchange.completion_tokens;
        let count = tokens.clamp(1, TEXT_PIECES);
        let mut events: Vec<(String, u64)> = vec![(self.opening(), 0)];
        for i in 0..count {
            let share = tokens * (i + 1) / count - tokens * i / count;
            events.push((self.text_event(&words(share)), share));
        }
        events.push((if self.gives_up { self.error_event() } else { self.closing() }, 0));
        let last = events.len() - 1;
        let pieces = events.into_iter().enumerate();
        pieces.map(|(i, (text, tokens))| Piece { bytes: text.into(), tokens, last: i == last }).collect()
    }

    fn usage(&self) -> Value {
        let (prompt, cached, completion) = match self.usage {
            Told::Truth => (self.exchange.prompt_tokens, self.exchange.cached_tokens, self.exchange.completion_tokens),
            Told::Nothing | Told::Negative => (0, 0, 0),
            Told::Absurd => (1 << 50, 0, 1 << 50),
        };
        let (prompt, cached, completion) = (prompt as i64, cached as i64, completion as i64);
        let (prompt, completion) = if self.usage == Told::Negative { (-5, -5) } else { (prompt, completion) };
        match self.exchange.shape {
            Shape::Chat | Shape::Completion => json!({
                "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            }),
            Shape::Embedding => json!({"prompt_tokens": prompt, "total_tokens": prompt}),
            Shape::Responses => json!({
                "input_tokens": prompt, "output_tokens": completion, "total_tokens": prompt + completion,
                "input_tokens_details": {"cached_tokens": cached}, "output_tokens_details": {"reasoning_tokens": 0},
            }),
            Shape::Messages => json!({
                "input_tokens": prompt - cached, "output_tokens": completion,
                "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached,
            }),
        }
    }

    fn response(&self, status: &str, text: Option<&str>) -> Value {
        let output: Vec<Value> = text
            .map(|text| {
                json!({"id": "msg_stub", "type": "message", "role": "assistant", "status": status,
                       "content": [{"type": "output_text", "text": text, "annotations": []}]})
            })
            .into_iter()
            .collect();
        let usage = if text.is_some() && self.with_usage { self.usage() } else { Value::Null };
        json!({"id": "resp_stub", "object": "response", "created_at": 0, "status": status,
               "model": self.exchange.model, "output": output, "usage": usage})
    }

    fn chunk(&self, choices: Value, usage: Option<Value>) -> String {
        let object = if self.exchange.shape == Shape::Chat { "chat.completion.chunk" } else { "text_completion" };
        let mut chunk = json!({"id": "chatcmpl-stub", "object": object, "created": 0,
                               "model": self.exchange.model, "choices": choices});
        if self.exchange.include_usage {
            chunk["usage"] = usage.unwrap_or(Value::Null);
        }
        format!("data: {chunk}\n\n")
    }

    fn opening(&self) -> String {
        match self.exchange.shape {
            Shape::Messages => {
                let mut usage = self.usage();
                usage["output_tokens"] = json!(1);
                let message = json!({"id": "msg_stub", "type": "message", "role": "assistant", "content": [],
                    "model": self.exchange.model, "stop_reason": null, "stop_sequence": null, "usage": usage});
                let start = json!({"type": "message_start", "message": message});
                let block = json!({"type": "content_block_start", "index": 0,
                    "content_block": {"type": "text", "text": ""}});
                format!("{}{}", named(&start), named(&block))
            }
            Shape::Responses => named(
                &json!({"type": "response.created", "sequence_number": 0, "response": self.response("in_progress", None)}),
            ),
            Shape::Chat => {
                let delta = json!({"role": "assistant", "content": ""});
                self.chunk(json!([{"index": 0, "delta": delta, "finish_reason": null}]), None)
            }
            Shape::Completion => self.chunk(json!([{"index": 0, "text": "", "finish_reason": null}]), None),
            Shape::Embedding => String::new(),
        }
    }

    fn text_event(&self, text: &str) -> String {
        match self.exchange.shape {
            Shape::Messages => named(&json!({"type": "content_block_delta", "index": 0,
                "delta": {"type": "text_delta", "text": text}})),
            Shape::Responses => named(&json!({"type": "response.output_text.delta", "sequence_number": 1,
                "item_id": "msg_stub", "output_index": 0, "content_index": 0, "delta": text})),
            Shape::Completion => self.chunk(json!([{"index": 0, "text": text, "finish_reason": null}]), None),
            Shape::Chat | Shape::Embedding => {
                self.chunk(json!([{"index": 0, "delta": {"content": text}, "finish_reason": null}]), None)
            }
        }
    }

    fn error_event(&self) -> String {
        match self.exchange.shape {
            Shape::Messages => {
                named(&json!({"type": "error", "error": {"type": "overloaded_error", "message": "stub"}}))
            }
            Shape::Responses => named(&json!({"type": "error", "code": "stub", "message": "stub", "param": null})),
            _ => format!("data: {}\n\n", json!({"error": {"message": "stub", "type": "stub"}})),
        }
    }

    fn closing(&self) -> String {
        match self.exchange.shape {
            Shape::Messages => {
                let usage = self.usage();
                let delta = json!({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": null},
                    "usage": if self.with_usage { usage } else { Value::Null }});
                let stop = json!({"type": "content_block_stop", "index": 0});
                format!("{}{}{}", named(&stop), named(&delta), named(&json!({"type": "message_stop"})))
            }
            Shape::Responses => {
                let text = words(self.exchange.completion_tokens);
                named(&json!({"type": "response.completed", "sequence_number": 2,
                    "response": self.response("completed", Some(&text))}))
            }
            Shape::Chat | Shape::Completion | Shape::Embedding => {
                let choice = if self.exchange.shape == Shape::Chat {
                    json!({"index": 0, "delta": {}, "finish_reason": "stop"})
                } else {
                    json!({"index": 0, "text": "", "finish_reason": "stop"})
                };
                let mut text = self.chunk(json!([choice]), None);
                if self.exchange.include_usage && self.with_usage {
                    text.push_str(&self.chunk(json!([]), Some(self.usage())));
                }
                text.push_str("data: [DONE]\n\n");
                text
            }
        }
    }
}

/// Returns an event that carries its type as its name, too.
fn named(event: &Value) -> String {
    format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or_default())
}

/// Returns a text of this many tokens.
fn words(tokens: u64) -> String {
    "word ".repeat(usize::try_from(tokens).unwrap_or(0))
}
