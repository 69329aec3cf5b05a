//! What the APIs' requests have in common.
//!
//! Knows how a model, a flag, a cap and the wish for usage are written. Must not know
//! prompts or answers. The invariant it keeps: of several caps the largest counts, as
//! which one an upstream obeys is unknowable; and what is no cap is refused by its name.

use bytes::Bytes;
use serde_json::value::RawValue;

use super::BadRequest;
use super::fields::{Fields, not_fields};

/// The largest cap that is believed: far above every model's.
const MAX_CAP: u64 = i32::MAX as u64;

/// The most choices: OpenAI's own limit.
const MAX_CHOICES: u64 = 128;

/// The fields of a request that cap its output, whichever API it is for.
const CAPS: [&str; 3] = ["max_tokens", "max_completion_tokens", "max_output_tokens"];

/// How much output a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Output {
    /// The largest cap of one choice, if the request names one.
    pub(super) cap: Option<u64>,
    pub(super) choices: u64,
}

/// Reads the body of a request.
pub(super) fn fields(body: &Bytes) -> Result<Fields<'_>, BadRequest> {
    serde_json::from_slice(body).map_err(|error| not_json(&error))
}

/// Says what is not JSON without repeating it: it is prompt text.
fn not_json(error: &serde_json::Error) -> BadRequest {
    let (line, column) = (error.line(), error.column());
    let what = match error.classify() {
        serde_json::error::Category::Eof => "ends too early".to_owned(),
        serde_json::error::Category::Data => not_fields(error),
        _ => "is not valid JSON".to_owned(),
    };
    BadRequest::new(
        None,
        format!("We could not parse the JSON body of your request: it {what} (line {line}, column {column})."),
    )
}

pub(super) fn model(fields: &Fields<'_>) -> Result<String, BadRequest> {
    let model = fields.get("model").ok_or_else(|| BadRequest::new("model", "you must provide a model parameter"))?;
    let model: String =
        serde_json::from_str(model.get()).map_err(|_| BadRequest::new("model", "'model' must be a string"))?;
    if model.is_empty() || model.len() > 256 {
        return Err(BadRequest::new("model", "'model' must be 1 to 256 bytes long"));
    }
    Ok(model)
}

pub(super) fn flag(value: Option<&RawValue>, param: &'static str) -> Result<bool, BadRequest> {
    match value.map(RawValue::get) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(_) => Err(BadRequest::new(param, format!("'{param}' must be true or false"))),
    }
}

/// Returns how much output is asked for. `least` is the smallest cap that makes sense:
/// some APIs take a cap of zero to have a prompt scored or cached.
pub(super) fn output(fields: &Fields<'_>, least: u64) -> Result<Output, BadRequest> {
    let (mut cap, mut choices) = (None, None);
    for name in CAPS {
        cap = cap.max(count(fields.get(name), name, (least, MAX_CAP))?);
    }
    for name in ["n", "best_of"] {
        choices = choices.max(count(fields.get(name), name, (1, MAX_CHOICES))?);
    }
    if let Some(config) = fields.get("generationConfig") {
        let wrong = |_| BadRequest::new("generationConfig", "'generationConfig' must be an object");
        let config: Fields<'_> = serde_json::from_str(config.get()).map_err(wrong)?;
        let named = "generationConfig.maxOutputTokens";
        cap = cap.max(count(config.get("maxOutputTokens"), named, (least, MAX_CAP))?);
        let named = "generationConfig.candidateCount";
        choices = choices.max(count(config.get("candidateCount"), named, (1, MAX_CHOICES))?);
    }
    Ok(Output { cap, choices: choices.unwrap_or(1) })
}

/// Returns a whole number between two bounds.
fn count(value: Option<&RawValue>, param: &'static str, (least, most): (u64, u64)) -> Result<Option<u64>, BadRequest> {
    let Some(value) = value else { return Ok(None) };
    let number: Option<u64> = serde_json::from_str(value.get()).ok();
    match number {
        Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
        _ => Err(BadRequest::new(param, format!("'{param}' must be a whole number between {least} and {most}"))),
    }
}

/// Returns the bytes of fields that are written out for the model, punctuation and names
/// included.
pub(super) fn written(fields: &Fields<'_>, names: &[&str]) -> u64 {
    let written = names.iter().filter_map(|name| fields.get(name)).map(|value| value.get().len() as u64);
    written.fold(0, u64::saturating_add)
}

/// Returns the body that asks for usage, unless the caller's does.
pub(super) fn ask_for_usage(fields: &Fields<'_>) -> Result<Option<Bytes>, BadRequest> {
    let Some(options) = fields.get("stream_options") else {
        return Ok(Some(fields.with("stream_options", r#"{"include_usage":true}"#)));
    };
    let wrong = || BadRequest::new("stream_options", "'stream_options' must be an object");
    let options: Fields<'_> = serde_json::from_str(options.get()).map_err(|_| wrong())?;
    if flag(options.get("include_usage"), "stream_options")? {
        return Ok(None);
    }
    let options = options.with("include_usage", "true");
    let options = std::str::from_utf8(&options).map_err(|_| wrong())?;
    Ok(Some(fields.with("stream_options", options)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(text: &str) -> Result<Output, BadRequest> {
        output(&fields(&Bytes::copy_from_slice(text.as_bytes())).unwrap(), 1)
    }

    #[test]
    fn the_largest_of_all_caps_counts() {
        let text = r#"{"max_tokens":5,"max_completion_tokens":7,"max_output_tokens":6,"generationConfig":{"maxOutputTokens":9}}"#;
        assert_eq!(asked(text), Ok(Output { cap: Some(9), choices: 1 }));
        assert_eq!(asked(r#"{"max_tokens":5,"max_completion_tokens":null}"#).unwrap().cap, Some(5));
        assert_eq!(asked("{}"), Ok(Output { cap: None, choices: 1 }));
    }

    #[test]
    fn what_is_no_request_is_told_what_it_is() {
        let many = |count: usize| {
            let fields: Vec<String> = (0..count).map(|i| format!(r#""f{i}":{i}"#)).collect();
            format!("{{{}}}", fields.join(","))
        };
        let told = |text: &str| match fields(&Bytes::copy_from_slice(text.as_bytes())) {
            Ok(_) => String::new(),
            Err(bad) => bad.message,
        };
        assert_eq!(told(&many(256)), "");
        for (text, what) in [
            (many(257), "it is an object of more than 256 fields (line 1, column "),
            (r#"{"a":1,"a":2}"#.into(), "it has a field twice (line 1, column "),
            ("[1]".into(), "it is not an object (line 1, column "),
            (r#""too many fields""#.into(), "it is not an object (line 1, column "),
            ("{} {}".into(), "it is not valid JSON (line 1, column 4)"),
            (r#"{"a":"#.into(), "it ends too early (line 1, column 5)"),
        ] {
            assert!(told(&text).contains(what), "{what}: {}", told(&text));
        }
    }

    #[test]
    fn the_most_choices_count() {
        assert_eq!(asked(r#"{"n":2,"best_of":5}"#).unwrap().choices, 5);
        assert_eq!(asked(r#"{"n":6,"generationConfig":{"candidateCount":3}}"#).unwrap().choices, 6);
    }

    #[test]
    fn what_is_no_cap_is_refused_by_its_name() {
        for name in ["max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of"] {
            for wrong in ["-1", "0", "1.5", "100.0", "99999999999", "\"5\"", "[]", "1e30", "true"] {
                let refusal = asked(&format!(r#"{{"{name}":{wrong}}}"#)).unwrap_err();
                assert_eq!(refusal.param, Some(name), "{wrong}");
            }
        }
        for wrong in ["[]", "5", r#"{"maxOutputTokens":-1}"#, r#"{"maxOutputTokens":1,"maxOutputTokens":2}"#] {
            assert!(asked(&format!(r#"{{"generationConfig":{wrong}}}"#)).is_err(), "{wrong}");
        }
    }
}
