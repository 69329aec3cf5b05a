//! OpenAI's responses.
//!
//! Knows the request's input and the events of a stream. Must not know limits. The
//! invariant it keeps: text counts where it is generated and not again where it is
//! repeated; what the upstream remembers counts with the default of `prompt.rs`.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::fields::Fields;
use super::plain::Saving;
use super::prompt::{Prompt, UNSEEN_TOKENS};
use super::text::TextBytes;
use super::{BadRequest, Call, Dialect, Estimate, Event, ReadUsage, Report, request};
use crate::layer::tokenizer::Tokenizer;

/// What the template adds to each item: role, separators and a name.
const TOKENS_PER_ITEM: u64 = 8;

/// What is written out for the model, punctuation and names included.
const WRITTEN: [&str; 4] = ["instructions", "tools", "tool_choice", "text"];

/// What brings in a prompt that stands at the upstream.
const REMEMBERED: [&str; 3] = ["previous_response_id", "conversation", "prompt"];

/// `POST /v1/responses`.
#[derive(Clone, Copy, Debug)]
pub struct OpenAiResponses;

impl Estimate for OpenAiResponses {
    fn call(&self, body: Bytes) -> Result<Call, BadRequest> {
        let fields = request::fields(&body)?;
        let model = request::model(&fields)?;
        request::flag(fields.get("stream"), "stream")?;
        let output = request::output(&fields, 1)?;
        let prompt = prompt(&fields, &model)?;
        Ok(Call { model, prompt, cap: output.cap, choices: output.choices, body: body.clone(), hide_usage: false })
    }

    fn prompt(&self, call: &Call, tokenizer: Tokenizer) -> u64 {
        let Ok(fields) = request::fields(&call.body) else { return call.prompt };
        let mut saving = Saving::new(tokenizer);
        saving.texts(fields.get("instructions"));
        saving.texts(fields.get("input"));
        saving.messages(fields.get("input"));
        saving.of(call.prompt)
    }
}

impl ReadUsage for OpenAiResponses {
    fn event(&self, event: &[u8]) -> Event {
        #[derive(Deserialize)]
        struct Sent<'a> {
            #[serde(rename = "type")]
            kind: String,
            #[serde(default)]
            delta: Option<TextBytes>,
            #[serde(default, borrow)]
            response: Option<&'a RawValue>,
        }
        if event == b"[DONE]" {
            return Event { last: true, ..Event::default() };
        }
        let Ok(sent) = serde_json::from_slice::<Sent<'_>>(event) else { return Event::unread(event) };
        let last = matches!(&*sent.kind, "response.completed" | "response.incomplete" | "response.failed");
        let report = sent
            .response
            .filter(|_| last)
            .map_or(Report::None, |response| Report::in_answer(response.get().as_bytes()));
        let failed = sent.kind == "error" || (sent.kind == "response.failed" && report == Report::None);
        Event { report, text_bytes: sent.delta.map_or(0, |text| text.0), only_usage: false, last, failed }
    }

    fn text_bytes(&self, answer: &[u8]) -> u64 {
        #[derive(Deserialize)]
        struct Answer {
            output: TextBytes,
        }
        serde_json::from_slice::<Answer>(answer).map_or(answer.len() as u64, |answer| answer.output.0)
    }
}

impl Dialect for OpenAiResponses {
    fn path(&self) -> &str {
        "/responses"
    }

    fn cut(&self, why: &str) -> String {
        let event = serde_json::json!({"type": "error", "code": "upstream_cut", "message": why, "param": null});
        format!("event: error\ndata: {event}\n\n")
    }
}

fn prompt(fields: &Fields<'_>, model: &str) -> Result<u64, BadRequest> {
    let remembered = REMEMBERED.iter().filter(|name| fields.get(name).is_some()).count() as u64;
    let input = match fields.get("input") {
        None if remembered == 0 => return Err(BadRequest::new("input", "'input' is required")),
        None => 0,
        Some(input) => input_tokens(input, model)?,
    };
    let written = request::written(fields, &WRITTEN).saturating_add(TOKENS_PER_ITEM);
    Ok(input.saturating_add(written).saturating_add(remembered.saturating_mul(UNSEEN_TOKENS)))
}

/// Returns an upper bound of the tokens of a text or of items.
fn input_tokens(input: &RawValue, model: &str) -> Result<u64, BadRequest> {
    if let Ok(text) = serde_json::from_str::<String>(input.get()) {
        return Ok(text.len() as u64 + TOKENS_PER_ITEM);
    }
    let message = "'input' must be a text or an array of items, valid Unicode and not too deeply nested";
    let items: Vec<Prompt> = serde_json::from_str(input.get()).map_err(|_| BadRequest::new("input", message))?;
    let sum = |sum: u64, item: &Prompt| sum.saturating_add(item.tokens(model)).saturating_add(TOKENS_PER_ITEM);
    Ok(items.iter().fold(0, sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(body: &str) -> Result<Call, BadRequest> {
        super::super::call(&OpenAiResponses, body)
    }

    #[test]
    fn text_and_items_are_read() {
        let asked = call(r#"{"model":"m","input":"hello","max_output_tokens":50}"#).unwrap();
        assert_eq!((asked.prompt, asked.cap), (5 + 8 + 8, Some(50)));
        let items = r#"{"model":"m","input":[{"role":"user","content":[{"type":"input_text","text":"hello"}]}]}"#;
        assert_eq!(call(items).unwrap().prompt, 4 + 10 + 5 + 8 + 8);
        for wrong in [r#"{"model":"m"}"#, r#"{"model":"m","input":5}"#] {
            assert_eq!(call(wrong).unwrap_err().param, Some("input"));
        }
    }

    #[test]
    fn what_the_upstream_remembers_counts_with_the_default() {
        let asked = call(r#"{"model":"m","input":"","previous_response_id":"resp_1"}"#).unwrap();
        assert_eq!(asked.prompt, UNSEEN_TOKENS + 16);
    }

    #[test]
    fn an_upstream_that_gives_up_is_heard() {
        for text in [r#"{"type":"error","message":"x"}"#, r#"{"type":"response.failed","response":{"usage":null}}"#] {
            assert!(OpenAiResponses.event(text.as_bytes()).failed, "{text}");
        }
    }

    #[test]
    fn text_counts_once_and_the_end_reports() {
        let event = |text: &str| OpenAiResponses.event(text.as_bytes());
        assert_eq!(event(r#"{"type":"response.output_text.delta","delta":"abc"}"#).text_bytes, 3);
        assert_eq!(event(r#"{"type":"response.output_text.done","text":"abc"}"#), Event::default());
        let created = event(r#"{"type":"response.created","response":{"usage":null}}"#);
        assert_eq!(created, Event::default());
        for kind in ["completed", "incomplete", "failed"] {
            let end = event(&format!(
                r#"{{"type":"response.{kind}","response":{{"output":[{{"text":"abc"}}],"usage":{{"input_tokens":3,"output_tokens":4}}}}}}"#
            ));
            assert!(end.last && !end.failed && end.report.is_told() && end.text_bytes == 0, "{kind}: {end:?}");
        }
    }
}
