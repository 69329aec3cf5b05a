//! Every API under /v1 that has no dialect of its own: passed on byte for byte.
//!
//! Knows where a body names its model, and the caps and usage objects of all APIs. Must
//! not know what the request is for. The invariant it keeps: not a byte of the request or
//! the answer is changed. What is reserved is an estimate, not a bound: the bytes of the
//! body, and what is reserved for an output without a cap if the body names none. Where
//! the answer carries a usage object of any shape it is charged, else the estimate stays.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::prompt::{AUDIO_BYTES_PER_TOKEN, Prompt};
use super::{BadRequest, Call, Dialect, Estimate, Event, ReadUsage, Report, request};
use crate::layer::refusal::Family;

/// How much of a form is searched for the name of its model: forms put it beside the
/// file, and a file must not be searched for what looks like it.
const MAX_FORM_FIELD: usize = 256;

/// The most parts of a form that are looked at, and the most of each one's head: a body
/// must not be searched over and over.
const MAX_PARTS: usize = 64;
const MAX_HEAD: usize = 4 << 10;

/// The longest boundary (RFC 2046, 5.1.1).
const MAX_BOUNDARY: usize = 70;

/// A path that has no dialect of its own.
#[derive(Clone, Debug)]
pub struct Other {
    path: String,
    /// What separates the parts of a form, if the body is one.
    boundary: Option<String>,
}

impl Other {
    /// Returns the dialect of this path below the base, for a body of this type.
    pub fn new(path: &str, content_type: &str) -> Self {
        let boundary = content_type
            .split_once(';')
            .filter(|(media_type, _)| media_type.trim().eq_ignore_ascii_case("multipart/form-data"));
        let boundary = boundary.and_then(|(_, parameters)| {
            let parameter = parameters.split(';').find_map(|parameter| parameter.trim().strip_prefix("boundary="))?;
            Some(parameter.trim_matches('"').to_owned()).filter(|boundary| (1..=MAX_BOUNDARY).contains(&boundary.len()))
        });
        Self { path: path.to_owned(), boundary }
    }
}

impl Estimate for Other {
    fn call(&self, body: Bytes) -> Result<Call, BadRequest> {
        if let Some(boundary) = &self.boundary {
            let model = form_field(&body, boundary, "model");
            let model = model.ok_or_else(|| BadRequest::new("model", "you must provide a model parameter"))?;
            // Forms carry audio and images: text would be sent as JSON.
            let prompt = (body.len() as u64).div_ceil(AUDIO_BYTES_PER_TOKEN);
            return Ok(Call { model, prompt, cap: None, choices: 1, body: body.clone(), hide_usage: false });
        }
        if body.is_empty() {
            return Err(BadRequest::new("model", "you must provide a model parameter"));
        }
        let fields = request::fields(&body)?;
        let model = request::model(&fields)?;
        let output = request::output(&fields, 0)?;
        let prompt: Prompt = serde_json::from_slice(&body)
            .map_err(|_| BadRequest::new(None, "The body of your request is too deeply nested."))?;
        let prompt = prompt.tokens(&model);
        Ok(Call { model, prompt, cap: output.cap, choices: output.choices, body: body.clone(), hide_usage: false })
    }
}

impl ReadUsage for Other {
    fn report(&self, answer: &[u8]) -> Report {
        #[derive(Deserialize)]
        struct Answer<'a> {
            #[serde(default, borrow)]
            usage: Option<&'a RawValue>,
            #[serde(default, borrow, rename = "usageMetadata")]
            usage_metadata: Option<&'a RawValue>,
        }
        serde_json::from_slice::<Answer<'_>>(answer)
            .map_or(Report::None, |answer| Report::of(answer.usage.or(answer.usage_metadata)))
    }

    fn event(&self, event: &[u8]) -> Event {
        if event == b"[DONE]" {
            return Event { last: true, ..Event::default() };
        }
        // Which part of it is text is not known.
        Event { report: self.report(event), ..Event::unread(event) }
    }

    fn text_bytes(&self, answer: &[u8]) -> u64 {
        answer.len() as u64
    }
}

impl Dialect for Other {
    fn path(&self) -> &str {
        &self.path
    }

    fn family(&self) -> Family {
        if self.path == "/messages" || self.path.starts_with("/messages/") { Family::Anthropic } else { Family::OpenAi }
    }

    fn is_known(&self) -> bool {
        false
    }
}

/// Returns the text of a field of a form (RFC 7578).
fn form_field(body: &[u8], boundary: &str, name: &str) -> Option<String> {
    let value = form_field_at(body, boundary, name)?;
    std::str::from_utf8(&body[value]).ok().map(str::to_owned)
}

/// Returns a form with another model.
pub(super) fn with_model(body: &[u8], model: &str) -> Option<Bytes> {
    // A form begins with its boundary: what comes before the first is for nobody (RFC 2046, 5.1.1).
    let boundary = std::str::from_utf8(&body[2.min(body.len())..find(body, b"\r\n")?]).ok()?;
    let value = form_field_at(body, boundary, "model")?;
    Some([&body[..value.start], model.as_bytes(), &body[value.end..]].concat().into())
}

/// Returns where in a form the text of a field stands.
fn form_field_at(body: &[u8], boundary: &str, name: &str) -> Option<std::ops::Range<usize>> {
    let delimiter = format!("--{boundary}\r\n");
    let wanted = format!("name=\"{name}\"");
    let mut rest = body;
    for _ in 0..MAX_PARTS {
        rest = &rest[find(rest, delimiter.as_bytes())? + delimiter.len()..];
        let head_end = find(&rest[..rest.len().min(MAX_HEAD)], b"\r\n\r\n")?;
        let head = std::str::from_utf8(&rest[..head_end]).unwrap_or_default();
        let mut parameters = head.lines().filter(|line| line.to_ascii_lowercase().starts_with("content-disposition:"));
        if parameters.any(|line| line.split(';').any(|parameter| parameter.trim() == wanted)) {
            let text = &rest[head_end + 4..];
            let text = &text[..text.len().min(MAX_FORM_FIELD + 2)];
            let length = find(text, b"\r\n")?;
            let start = body.len() - rest.len() + head_end + 4;
            return (length > 0).then_some(start..start + length);
        }
    }
    None
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let first = *wanted.first()?;
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|byte| *byte == first) {
        if bytes[from + at..].starts_with(wanted) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = "application/json";

    #[test]
    fn nothing_is_changed_and_all_of_it_counts() {
        let text = r#"{ "model":"m", "new":{"field":"abc"}, "stream": true, "max_output_tokens":7, "n":2 }"#;
        let call = super::super::call(&Other::new("/new", JSON), text).unwrap();
        assert_eq!(&call.body[..], text.as_bytes());
        assert_eq!((call.cap, call.choices, call.hide_usage), (Some(7), 2, false));
        assert_eq!(call.prompt, 1 + 3 + 5 + 20 + 20);
    }

    #[test]
    fn a_form_names_its_model_too() {
        let form = "--xyz\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\nContent-Type: audio/mpeg\r\n\r\n\u{0}name=\"model\"\r\n--xyz\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nwhisper-1\r\n--xyz--\r\n";
        let other = Other::new("/audio/transcriptions", "multipart/form-data; boundary=xyz");
        let call = super::super::call(&other, form).unwrap();
        assert_eq!(call.model, "whisper-1");
        assert_eq!(call.prompt, (form.len() as u64).div_ceil(20));
        for wrong in
            ["", "--xyz\r\n", "--xyz\r\n\r\n\r\nx", "--xyz\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nx"]
        {
            assert_eq!(super::super::call(&other, wrong).unwrap_err().param, Some("model"), "{wrong}");
        }
    }

    #[test]
    fn usage_of_any_shape_is_read() {
        let other = Other::new("/images/generations", JSON);
        assert!(other.report(br#"{"usage":{"input_tokens":5,"output_tokens":4}}"#).is_told());
        assert!(other.report(br#"{"usageMetadata":{"totalTokenCount":4}}"#).is_told());
        assert_eq!(other.report(br#"{"data":[]}"#), Report::None);
        assert_eq!(other.report(br#"{"usage":{"total_tokens":-4}}"#), Report::Lie);
    }
}
