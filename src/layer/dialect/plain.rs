//! How much less the plain text of a prompt is by a tokenizer than by its bytes.
//!
//! Knows where a request's texts stand that reach the model as they are written: contents, roles
//! and names of messages, texts of their parts, prompts. Must not know what else counts. The invariant it
//! keeps: it saves only what `prompt.rs` and its callers count with all of its bytes, so what is left
//! is still a bound; whatever it does not understand saves nothing.
//!
//! Tools, schemas, arguments and answers of tools are written out anew for the model, in a
//! form that no provider declares, so they keep their bytes; so do images, audio and files
//! their own bounds.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::layer::tokenizer::{MAX_COUNTED, Tokenizer};

/// What is saved so far, and how much may still be counted.
#[derive(Debug)]
pub(super) struct Saving {
    tokenizer: Tokenizer,
    left: usize,
    saved: u64,
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A message or an item, whose content is a text or parts.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(default, borrow)]
    role: Option<Cow<'a, str>>,
    #[serde(default, borrow)]
    name: Option<Cow<'a, str>>,
    #[serde(default, borrow)]
    content: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Part<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(default, borrow)]
    text: Option<Cow<'a, str>>,
}

/// Who speaks in words of their own; a tool's answer is written out anew.
const SPEAKERS: [&str; 4] = ["system", "developer", "user", "assistant"];

/// What a part of plain text is called.
const TEXTS: [&str; 3] = ["text", "input_text", "output_text"];

impl Saving {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, left: MAX_COUNTED, saved: 0 }
    }

    /// Returns a bound of a prompt that all these texts are part of.
    pub(super) fn of(&self, prompt: u64) -> u64 {
        prompt.saturating_sub(self.saved)
    }

    fn text(&mut self, text: &str) {
        let bytes = text.len() as u64;
        self.saved += bytes.saturating_sub(self.tokenizer.bound(text, &mut self.left));
    }

    /// Counts a text or several; tokens already are what they count.
    pub(super) fn texts(&mut self, value: Option<&RawValue>) {
        let Some(value) = value else { return };
        if let Ok(Text(text)) = serde_json::from_str(value.get()) {
            self.text(&text);
        } else if let Ok(texts) = serde_json::from_str::<Vec<Text<'_>>>(value.get()) {
            texts.iter().for_each(|Text(text)| self.text(text));
        }
    }

    /// Counts the contents of messages.
    pub(super) fn messages(&mut self, value: Option<&RawValue>) {
        let messages: Vec<&RawValue> =
            value.and_then(|value| serde_json::from_str(value.get()).ok()).unwrap_or_default();
        for message in messages {
            let Ok(Message { role: Some(role), name, content: Some(content) }) = serde_json::from_str(message.get())
            else {
                continue;
            };
            if !SPEAKERS.contains(&&*role) {
                continue;
            }
            self.text(&role);
            self.text(name.as_deref().unwrap_or_default());
            if let Ok(Text(text)) = serde_json::from_str(content.get()) {
                self.text(&text);
                continue;
            }
            let parts: Vec<&RawValue> = serde_json::from_str(content.get()).unwrap_or_default();
            for part in parts {
                match serde_json::from_str(part.get()) {
                    Ok(Part { kind, text: Some(text) }) if TEXTS.contains(&&*kind) => self.text(&text),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(all(test, feature = "tokenizer"))]
mod tests {
    use super::super::{AnthropicMessages, Call, Dialect, OpenAiChat, OpenAiCompletions, OpenAiEmbeddings};
    use super::super::{OpenAiResponses, Other};
    use super::*;

    const PROSE: &str = "It is a truth universally acknowledged, that a single man in possession of a good fortune, \
                         must be in want of a wife.";

    fn bounds(dialect: &dyn Dialect, body: &str) -> (Call, u64) {
        let call = super::super::call(dialect, body).unwrap();
        let bound = dialect.prompt(&call, Tokenizer::Cl100k);
        assert_eq!(dialect.prompt(&call, Tokenizer::Bytes), call.prompt, "{body}");
        (call, bound)
    }

    /// Returns how much less a body is by tokens than by bytes.
    fn saved(dialect: &dyn Dialect, body: &str) -> u64 {
        let (call, bound) = bounds(dialect, body);
        call.prompt - bound
    }

    #[test]
    fn the_conversation_of_the_cookbook_is_bounded() {
        // OpenAI's API counted 129 tokens in it ("How to count tokens with tiktoken", section 6).
        let body = r#"{"model":"gpt-4","messages":[
            {"role":"system","content":"You are a helpful, pattern-following assistant that translates corporate jargon into plain English."},
            {"role":"system","name":"example_user","content":"New synergies will help drive top-line growth."},
            {"role":"system","name":"example_assistant","content":"Things working well together will increase revenue."},
            {"role":"system","name":"example_user","content":"Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage."},
            {"role":"system","name":"example_assistant","content":"Let's talk later when we're less busy about how to do better."},
            {"role":"user","content":"This late pivot means we don't have time to boil the ocean for the client deliverable."}]}"#;
        let (call, bound) = bounds(&OpenAiChat, body);
        assert!((129..200).contains(&bound) && call.prompt > 580, "{bound} of {}", call.prompt);
    }

    #[test]
    fn texts_save_wherever_an_api_takes_them() {
        let text = serde_json::to_string(PROSE).unwrap();
        let one = saved(&OpenAiCompletions, &format!(r#"{{"model":"m","prompt":{text}}}"#));
        assert!(one > PROSE.len() as u64 / 2, "{one}");
        for (dialect, body, times) in [
            (&OpenAiCompletions as &dyn Dialect, format!(r#"{{"model":"m","prompt":[{text},{text}]}}"#), 2),
            (&OpenAiEmbeddings, format!(r#"{{"model":"m","input":{text}}}"#), 1),
            (&OpenAiChat, format!(r#"{{"model":"m","messages":[{{"role":"user","content":{text}}}]}}"#), 1),
            (
                &OpenAiChat,
                format!(
                    r#"{{"model":"m","messages":[{{"role":"system","content":{text}}},
                    {{"role":"user","content":[{{"type":"text","text":{text}}},{{"text":{text},"type":"text"}}]}}]}}"#
                ),
                3,
            ),
            (&OpenAiResponses, format!(r#"{{"model":"m","instructions":{text},"input":{text}}}"#), 2),
            (
                &OpenAiResponses,
                format!(
                    r#"{{"model":"m","input":[{{"type":"message","role":"user","content":[{{"type":"input_text","text":{text}}}]}}]}}"#
                ),
                1,
            ),
        ] {
            // Roles are words, too.
            let saved = saved(dialect, &body);
            assert!((one * times..one * times + 20).contains(&saved), "{saved} of {one} x {times}: {body}");
        }
    }

    #[test]
    fn what_is_written_out_anew_or_is_no_text_keeps_its_bound() {
        let text = serde_json::to_string(PROSE).unwrap();
        let message = |message: String| format!(r#"{{"model":"m","messages":[{message}]}}"#);
        for body in [
            message(format!(r#"{{"role":"tool","tool_call_id":"1","content":{text}}}"#)),
            message(format!(r#"{{"role":"function","name":"f","content":{text}}}"#)),
            message(format!(r#"{{"content":{text}}}"#)),
            message(format!(r#"{{"role":"user","content":[{{"type":"input_audio","text":{text}}}]}}"#)),
            message(format!(r#"{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":{text}}}}}]}}"#)),
            message(format!(r#"{{"role":"user","content":[{{"type":"file","file":{{"file_data":{text}}}}}]}}"#)),
            message(format!(r#"{{"role":"user","content":{{"type":"text","text":{text}}}}}"#)),
            message(format!(r#"{{"role":"user","content":{text},"content":{text}}}"#)),
            message(format!(
                r#"{{"role":"assistant","tool_calls":[{{"type":"function","function":{{"name":"f","arguments":{text}}}}}]}}"#
            )),
            format!(
                r#"{{"model":"m","messages":[{{}}],"tools":[{{"content":{text}}}],"response_format":{{"text":{text}}}}}"#
            ),
        ] {
            assert!(saved(&OpenAiChat, &body) < 5, "{body}");
        }
        for body in [
            format!(r#"{{"model":"m","input":[{{"type":"function_call_output","call_id":"1","output":{text}}}]}}"#),
            format!(
                r#"{{"model":"m","input":[{{"type":"reasoning","summary":[{{"type":"summary_text","text":{text}}}]}}]}}"#
            ),
        ] {
            assert_eq!(saved(&OpenAiResponses, &body), 0, "{body}");
        }
        for body in [r#"{"model":"m","prompt":[1,2,3]}"#, r#"{"model":"m","prompt":[[1,2],[3]]}"#, r#"{"model":"m"}"#] {
            assert_eq!(saved(&OpenAiCompletions, body), 0, "{body}");
        }
    }

    #[test]
    fn other_apis_are_bounded_by_bytes() {
        let body = format!(r#"{{"model":"m","max_tokens":1,"messages":[{{"role":"user","content":"{PROSE}"}}]}}"#);
        assert_eq!(saved(&AnthropicMessages, &body), 0);
        assert_eq!(saved(&Other::new("/new", "application/json"), &body), 0);
    }
}
