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
    /// The tool that is called instead of an answer in words.
    tool: Option<String>,
    /// How many texts are to be embedded.
    inputs: usize,
    base64: bool,
}

/// What a tool is called with: one text, which the tokens are spent on.
const ARGUMENTS: [&str; 2] = ["{\"text\":\"", "\"}"];

/// The name of a called tool's call.
const CALL: &str = "call_stub";

/// 0.5 and -0.5 as little-endian 32-bit floats in base64, which SDKs ask for by themselves.
const EMBEDDED_BASE64: &str = "AAAAPwAAAL8=";

impl Exchange {
    pub(super) fn of(shape: Shape, request: &Value, body: &[u8], headers: &HeaderMap, bytes_per_token: u64) -> Self {
        let prompt_fields = ["messages", "prompt", "input", "system", "instructions"];
        let tools =
            request["tools"].as_array().map_or(0, |tools| tools.iter().map(|tool| tool.to_string().len()).sum());
        let bytes = prompt_fields.iter().map(|field| text_bytes(&request[*field])).sum::<u64>() + tools as u64;
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
            tool: called(request).filter(|_| !matches!(shape, Shape::Completion | Shape::Embedding)),
            inputs: request["input"].as_array().map_or(1, |inputs| inputs.len().max(1)),
            base64: request["encoding_format"] == "base64",
        }
    }
}

/// Returns the tool a model would call: the one that is asked for, else the first, and none
/// once the last word is a tool's result.
fn called(request: &Value) -> Option<String> {
    let choice = &request["tool_choice"];
    let mut kinds = [choice, &choice["type"]].into_iter();
    if kinds.any(|kind| kind == "none") {
        return None;
    }
    let said = request["messages"].as_array().or(request["input"].as_array());
    let last = said.and_then(|said| said.last()).unwrap_or(&Value::Null);
    let is_result = last["role"] == "tool"
        || last["type"] == "function_call_output"
        || last["content"].as_array().is_some_and(|parts| parts.iter().any(|part| part["type"] == "tool_result"));
    if is_result {
        return None;
    }
    let first = &request["tools"][0];
    let named = [&choice["function"], choice, &first["function"], first];
    named.into_iter().find_map(|tool| tool["name"].as_str()).map(str::to_owned)
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
        let mut answer = match self.exchange.shape {
            Shape::Chat => json!({
                "id": "chatcmpl-stub", "object": "chat.completion", "created": 0, "model": model,
                "choices": [{"index": 0, "message": self.message(), "finish_reason": self.reason()}],
                "usage": usage,
            }),
            Shape::Completion => json!({
                "id": "cmpl-stub", "object": "text_completion", "created": 0, "model": model,
                "choices": [{"index": 0, "text": self.text(), "logprobs": null, "finish_reason": "stop"}],
                "usage": usage,
            }),
            Shape::Embedding => {
                let embedding = if self.exchange.base64 { json!(EMBEDDED_BASE64) } else { json!([0.5, -0.5]) };
                let embedded = |index| json!({"object": "embedding", "index": index, "embedding": embedding});
                let embedded: Vec<Value> = (0..self.exchange.inputs).map(embedded).collect();
                json!({"object": "list", "model": model, "data": embedded, "usage": usage})
            }
            Shape::Responses => self.response(true),
            Shape::Messages => json!({
                "id": "msg_stub", "type": "message", "role": "assistant", "model": model,
                "content": [self.block(true)], "stop_reason": self.reason(), "stop_sequence": null, "usage": usage,
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
                "prompt_tokens_details": {"cached_tokens": cached},
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

    /// Returns all that is written: a text, or the arguments a tool is called with.
    fn text(&self) -> String {
        let text = words(self.exchange.completion_tokens);
        if self.exchange.tool.is_some() { format!("{}{text}{}", ARGUMENTS[0], ARGUMENTS[1]) } else { text }
    }

    /// Returns why the answer ends, in the word of its API.
    fn reason(&self) -> &'static str {
        match (self.exchange.shape == Shape::Messages, self.exchange.tool.is_some()) {
            (true, true) => "tool_use",
            (true, false) => "end_turn",
            (false, true) => "tool_calls",
            (false, false) => "stop",
        }
    }

    /// Returns the message of a chat.
    fn message(&self) -> Value {
        match &self.exchange.tool {
            None => json!({"role": "assistant", "content": self.text()}),
            Some(tool) => json!({"role": "assistant", "content": null, "tool_calls": [
                {"id": CALL, "type": "function", "function": {"name": tool, "arguments": self.text()}}]}),
        }
    }

    /// Returns the one block of an Anthropic message, or how it begins.
    fn block(&self, whole: bool) -> Value {
        let text = if whole { words(self.exchange.completion_tokens) } else { String::new() };
        match &self.exchange.tool {
            None => json!({"type": "text", "text": text}),
            Some(tool) => {
                let input = if whole { json!({"text": text}) } else { json!({}) };
                json!({"type": "tool_use", "id": CALL, "name": tool, "input": input})
            }
        }
    }

    /// Returns the one item of a response, or how it begins.
    fn item(&self, whole: bool) -> Value {
        let status = if whole { "completed" } else { "in_progress" };
        let text = if whole { self.text() } else { String::new() };
        match &self.exchange.tool {
            None => json!({"id": "msg_stub", "type": "message", "role": "assistant", "status": status,
                           "content": if whole { vec![part(&text)] } else { Vec::new() }}),
            Some(tool) => json!({"id": "fc_stub", "type": "function_call", "call_id": CALL, "name": tool,
                                 "status": status, "arguments": text}),
        }
    }

    fn response(&self, whole: bool) -> Value {
        let output = if whole { vec![self.item(true)] } else { Vec::new() };
        let usage = if whole && self.with_usage { self.usage() } else { Value::Null };
        let status = if whole { "completed" } else { "in_progress" };
        json!({"id": "resp_stub", "object": "response", "created_at": 0, "status": status, "error": null,
               "model": self.exchange.model, "output": output, "usage": usage, "parallel_tool_calls": true,
               "tool_choice": "auto", "tools": []})
    }

    /// Returns events about a response's one item, each with the fields it says more of.
    fn events(&self, events: &[(&str, Value)]) -> String {
        let mut text = String::new();
        for (kind, fields) in events {
            let mut event = json!({"type": kind, "sequence_number": 0, "output_index": 0});
            let about_text = kind.contains("text") || kind.contains("part") || kind.contains("arguments");
            if about_text {
                event["item_id"] = self.item(false)["id"].take();
            }
            if kind.contains("text") || kind.contains("part") {
                event["content_index"] = json!(0);
            }
            if let (Some(event), Value::Object(fields)) = (event.as_object_mut(), fields) {
                event.extend(fields.clone());
            }
            text.push_str(&named(&event));
        }
        text
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
                let block = json!({"type": "content_block_start", "index": 0, "content_block": self.block(false)});
                let arguments = self.exchange.tool.as_ref().map(|_| self.text_event(ARGUMENTS[0]));
                format!("{}{}{}", named(&start), named(&block), arguments.unwrap_or_default())
            }
            Shape::Responses => {
                let item = ("response.output_item.added", json!({"item": self.item(false)}));
                let content = match self.exchange.tool {
                    None => self.events(&[item, ("response.content_part.added", json!({"part": part("")}))]),
                    Some(_) => format!("{}{}", self.events(&[item]), self.text_event(ARGUMENTS[0])),
                };
                let created =
                    json!({"type": "response.created", "sequence_number": 0, "response": self.response(false)});
                format!("{}{content}", named(&created))
            }
            Shape::Chat => {
                let delta = match &self.exchange.tool {
                    None => json!({"role": "assistant", "content": ""}),
                    Some(tool) => json!({"role": "assistant", "content": null, "tool_calls": [{"index": 0, "id": CALL,
                        "type": "function", "function": {"name": tool, "arguments": ARGUMENTS[0]}}]}),
                };
                self.chunk(json!([{"index": 0, "delta": delta, "finish_reason": null}]), None)
            }
            Shape::Completion => self.chunk(json!([{"index": 0, "text": "", "finish_reason": null}]), None),
            Shape::Embedding => String::new(),
        }
    }

    fn text_event(&self, text: &str) -> String {
        let called = self.exchange.tool.is_some();
        match self.exchange.shape {
            Shape::Messages => {
                let delta = match called {
                    true => json!({"type": "input_json_delta", "partial_json": text}),
                    false => json!({"type": "text_delta", "text": text}),
                };
                named(&json!({"type": "content_block_delta", "index": 0, "delta": delta}))
            }
            Shape::Responses => {
                let kind = if called { "response.function_call_arguments.delta" } else { "response.output_text.delta" };
                self.events(&[(kind, json!({"delta": text}))])
            }
            Shape::Completion => self.chunk(json!([{"index": 0, "text": text, "finish_reason": null}]), None),
            Shape::Chat | Shape::Embedding => {
                let delta = match called {
                    true => json!({"tool_calls": [{"index": 0, "function": {"arguments": text}}]}),
                    false => json!({"content": text}),
                };
                self.chunk(json!([{"index": 0, "delta": delta, "finish_reason": null}]), None)
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
        let arguments = self.exchange.tool.as_ref().map(|_| self.text_event(ARGUMENTS[1])).unwrap_or_default();
        let end = match self.exchange.shape {
            Shape::Messages => {
                let usage = self.usage();
                let delta = json!({"type": "message_delta",
                    "delta": {"stop_reason": self.reason(), "stop_sequence": null},
                    "usage": if self.with_usage { usage } else { Value::Null }});
                let stop = json!({"type": "content_block_stop", "index": 0});
                format!("{}{}{}", named(&stop), named(&delta), named(&json!({"type": "message_stop"})))
            }
            Shape::Responses => {
                let (text, item) = (self.text(), ("response.output_item.done", json!({"item": self.item(true)})));
                let done = match &self.exchange.tool {
                    Some(tool) => {
                        let whole = json!({"arguments": text, "name": tool});
                        self.events(&[("response.function_call_arguments.done", whole), item])
                    }
                    None => self.events(&[
                        ("response.output_text.done", json!({"text": text})),
                        ("response.content_part.done", json!({"part": part(&text)})),
                        item,
                    ]),
                };
                let completed =
                    json!({"type": "response.completed", "sequence_number": 0, "response": self.response(true)});
                format!("{done}{}", named(&completed))
            }
            Shape::Chat | Shape::Completion | Shape::Embedding => {
                let choice = if self.exchange.shape == Shape::Chat {
                    json!({"index": 0, "delta": {}, "finish_reason": self.reason()})
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
        };
        format!("{arguments}{end}")
    }
}

/// Returns the one part of a response's message.
fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": []})
}

/// Returns an event that carries its type as its name, too.
fn named(event: &Value) -> String {
    format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or_default())
}

/// Returns a text of this many tokens.
fn words(tokens: u64) -> String {
    "word ".repeat(usize::try_from(tokens).unwrap_or(0))
}
