//! OpenAI's chat completions.
//!
//! Knows the request's caps and prompt fields, the usage object and the chunks of a
//! stream. Must not know limits. The invariant it keeps: prompt and cap are upper
//! bounds for text; what else a prompt may hold (images, audio, files) counts with the
//! bytes it is written in.

use axum::body::Bytes;
use quotum::Quota;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::fields::Fields;
use super::text::TextBytes;
use super::{BadRequest, Call, Dialect, Event, Usage};

/// What the chat template adds to each message: role, separators and a name.
const TOKENS_PER_MESSAGE: u64 = 8;

/// What the chat template adds once, to prime the answer.
const TOKENS_PER_PROMPT: u64 = 3;

/// The largest cap that is believed: far above every model's.
const MAX_CAP: u64 = i32::MAX as u64;

/// The most choices: OpenAI's own limit.
const MAX_CHOICES: u64 = 128;

/// `POST /v1/chat/completions`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenAiChat;

impl Dialect for OpenAiChat {
    fn path(&self) -> &'static str {
        "/chat/completions"
    }

    fn call(&self, body: Bytes) -> Result<Call, BadRequest> {
        let fields: Fields<'_> = serde_json::from_slice(&body).map_err(|error| not_json(&error))?;
        let model = model(&fields)?;
        let stream = flag(fields.get("stream"), "stream")?;
        let cap = [("max_tokens", "max_tokens"), ("max_completion_tokens", "max_completion_tokens")]
            .into_iter()
            .map(|(name, param)| count(fields.get(name), param, MAX_CAP))
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .max();
        let choices = count(fields.get("n"), "n", MAX_CHOICES)?.unwrap_or(1);
        let prompt = prompt(&fields)?;
        let (rewritten, hide_usage) = if stream { ask_for_usage(&fields)? } else { (None, false) };
        let body = rewritten.unwrap_or_else(|| body.clone());
        Ok(Call { model, stream, prompt, cap, choices, body, hide_usage })
    }

    fn usage(&self, answer: &[u8]) -> Option<Usage> {
        #[derive(Deserialize)]
        struct Answer<'a> {
            #[serde(borrow)]
            usage: Option<&'a RawValue>,
        }
        usage(serde_json::from_slice::<Answer<'_>>(answer).ok()?.usage?)
    }

    fn event(&self, data: &[u8]) -> Event {
        #[derive(Deserialize)]
        struct Chunk<'a> {
            #[serde(default, borrow)]
            choices: Option<Vec<&'a RawValue>>,
            #[serde(default, borrow)]
            usage: Option<&'a RawValue>,
        }
        let Ok(chunk) = serde_json::from_slice::<Chunk<'_>>(data) else {
            // Not understood, so it may be all text.
            let text_bytes = if data == b"[DONE]" { 0 } else { data.len() as u64 };
            return Event { text_bytes, ..Event::default() };
        };
        let usage = chunk.usage.and_then(usage);
        let choices = chunk.choices.unwrap_or_default();
        Event {
            usage,
            text_bytes: choices.iter().map(|choice| generated(choice)).sum(),
            only_usage: usage.is_some() && choices.is_empty(),
        }
    }

    fn text_bytes(&self, answer: &[u8]) -> u64 {
        #[derive(Deserialize)]
        struct Answer<'a> {
            #[serde(borrow)]
            choices: Vec<&'a RawValue>,
        }
        match serde_json::from_slice::<Answer<'_>>(answer) {
            Ok(answer) => answer.choices.iter().map(|choice| generated(choice)).sum(),
            Err(_) => answer.len() as u64,
        }
    }
}

/// Says what is not JSON without repeating it: it is prompt text.
fn not_json(error: &serde_json::Error) -> BadRequest {
    let (line, column) = (error.line(), error.column());
    let what = match error.classify() {
        serde_json::error::Category::Eof => "ends too early",
        serde_json::error::Category::Data => "is not one JSON object whose fields stand once each",
        _ => "is not valid JSON",
    };
    BadRequest::new(
        None,
        format!("We could not parse the JSON body of your request: it {what} (line {line}, column {column})."),
    )
}

fn model(fields: &Fields<'_>) -> Result<String, BadRequest> {
    let model = fields.get("model").ok_or_else(|| BadRequest::new("model", "you must provide a model parameter"))?;
    let model: String =
        serde_json::from_str(model.get()).map_err(|_| BadRequest::new("model", "'model' must be a string"))?;
    if model.is_empty() || model.len() > 256 {
        return Err(BadRequest::new("model", "'model' must be 1 to 256 bytes long"));
    }
    Ok(model)
}

fn flag(value: Option<&RawValue>, param: &'static str) -> Result<bool, BadRequest> {
    match value.map(RawValue::get) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(_) => Err(BadRequest::new(param, format!("'{param}' must be true or false"))),
    }
}

/// Returns a whole number of at least one.
fn count(value: Option<&RawValue>, param: &'static str, max: u64) -> Result<Option<u64>, BadRequest> {
    let Some(value) = value else { return Ok(None) };
    let number: Option<u64> = serde_json::from_str(value.get()).ok();
    match number {
        Some(number) if (1..=max).contains(&number) => Ok(Some(number)),
        _ => Err(BadRequest::new(param, format!("'{param}' must be a whole number between 1 and {max}"))),
    }
}

fn prompt(fields: &Fields<'_>) -> Result<u64, BadRequest> {
    let messages = fields.get("messages").ok_or_else(|| BadRequest::new("messages", "'messages' is required"))?;
    let messages: Vec<TextBytes> = serde_json::from_str(messages.get())
        .map_err(|_| BadRequest::new("messages", "'messages' must be an array of messages, not too deeply nested"))?;
    if messages.is_empty() {
        return Err(BadRequest::new("messages", "'messages' must hold at least one message"));
    }
    let text = messages
        .iter()
        .fold(TOKENS_PER_PROMPT, |sum, message| sum.saturating_add(message.0).saturating_add(TOKENS_PER_MESSAGE));
    // These are written out for the model, punctuation and names included.
    let written = ["tools", "functions", "tool_choice", "function_call", "response_format", "prediction"];
    let written = written.iter().filter_map(|name| fields.get(name)).map(|value| value.get().len() as u64);
    Ok(written.fold(text, u64::saturating_add))
}

/// Returns the body that asks for usage, unless the caller's does.
fn ask_for_usage(fields: &Fields<'_>) -> Result<(Option<Bytes>, bool), BadRequest> {
    let Some(options) = fields.get("stream_options") else {
        return Ok((Some(fields.with("stream_options", r#"{"include_usage":true}"#)), true));
    };
    let options: Fields<'_> = serde_json::from_str(options.get())
        .map_err(|_| BadRequest::new("stream_options", "'stream_options' must be an object"))?;
    if flag(options.get("include_usage"), "stream_options")? {
        return Ok((None, false));
    }
    let options = options.with("include_usage", "true");
    let options = std::str::from_utf8(&options)
        .map_err(|_| BadRequest::new("stream_options", "'stream_options' must be an object"))?;
    Ok((Some(fields.with("stream_options", options)), true))
}

/// Returns the usage object, unless it says what cannot be.
fn usage(value: &RawValue) -> Option<Usage> {
    #[derive(Deserialize)]
    struct Object {
        prompt_tokens: Option<u64>,
        completion_tokens: Option<u64>,
        total_tokens: Option<u64>,
    }
    // Negative and broken numbers do not parse; an object without any says nothing.
    let Object { prompt_tokens, completion_tokens, total_tokens } = serde_json::from_str(value.get()).ok()?;
    prompt_tokens.or(completion_tokens).or(total_tokens)?;
    let (prompt, completion) = (prompt_tokens.unwrap_or(0), completion_tokens.unwrap_or(0));
    let sum = prompt.checked_add(completion)?;
    let total = total_tokens.unwrap_or(sum).max(sum);
    (total <= Quota::MAX_AMOUNT).then_some(Usage { prompt, completion, total })
}

/// Returns an upper bound of the tokens generated in one choice.
fn generated(choice: &RawValue) -> u64 {
    #[derive(Deserialize)]
    struct Choice {
        #[serde(default)]
        delta: Option<TextBytes>,
        #[serde(default)]
        message: Option<TextBytes>,
    }
    let Ok(choice) = serde_json::from_str::<Choice>(choice.get()) else { return 0 };
    choice.delta.or(choice.message).map_or(0, |text| text.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(body: &str) -> Result<Call, BadRequest> {
        OpenAiChat.call(Bytes::copy_from_slice(body.as_bytes()))
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
    fn caps_that_are_no_caps_are_refused_by_name() {
        for wrong in ["-1", "0", "1.5", "100.0", "99999999999", "\"5\"", "[]", "1e30"] {
            let body = format!(r#"{{"model":"m","messages":[{{}}],"max_tokens":{wrong}}}"#);
            let refusal = call(&body).unwrap_err();
            assert_eq!(refusal.param, Some("max_tokens"), "{wrong}");
        }
        for wrong in ["0", "129", "-1"] {
            let body = format!(r#"{{"model":"m","messages":[{{}}],"n":{wrong}}}"#);
            assert_eq!(call(&body).unwrap_err().param, Some("n"), "{wrong}");
        }
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
    fn usage_that_lies_is_not_believed() {
        let usage = |text: &str| OpenAiChat.usage(format!(r#"{{"usage":{text}}}"#).as_bytes());
        assert_eq!(
            usage(r#"{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}"#),
            Some(Usage { prompt: 3, completion: 4, total: 7 })
        );
        assert_eq!(usage(r#"{"prompt_tokens":3,"completion_tokens":4,"total_tokens":1}"#).unwrap().total, 7);
        for lie in
            ["null", "[]", r#"{"prompt_tokens":-3}"#, r#"{"total_tokens":99999999999999}"#, r#"{"total_tokens":1.5}"#]
        {
            assert_eq!(usage(lie), None, "{lie}");
        }
    }

    #[test]
    fn only_a_chunk_without_choices_is_nothing_but_usage() {
        let event = OpenAiChat.event(br#"{"choices":[],"usage":{"total_tokens":7}}"#);
        assert!(event.only_usage && event.usage.is_some());
        let event = OpenAiChat.event(br#"{"choices":[{"delta":{"content":"abc"}}],"usage":null}"#);
        assert_eq!((event.only_usage, event.usage, event.text_bytes), (false, None, 3));
        assert_eq!(OpenAiChat.event(b"[DONE]"), Event::default());
    }
}
