//! OpenAI's embeddings.
//!
//! Knows that there is a prompt and no output. Must not know limits. The invariant it
//! keeps: nothing is reserved for an output that cannot come.

use bytes::Bytes;

use super::openai_completions::Texts;
use super::plain::Saving;
use super::{BadRequest, Call, Dialect, Estimate, Event, ReadUsage, Report, Tally, request};
use crate::layer::tokenizer::Tokenizer;

/// `POST /v1/embeddings`.
#[derive(Clone, Copy, Debug)]
pub struct OpenAiEmbeddings;

impl Estimate for OpenAiEmbeddings {
    fn call(&self, body: Bytes) -> Result<Call, BadRequest> {
        let fields = request::fields(&body)?;
        let model = request::model(&fields)?;
        let input = fields.get("input").ok_or_else(|| BadRequest::new("input", "'input' is required"))?;
        let prompt = Texts::of(input.get(), "input")?.tokens;
        Ok(Call { model, prompt, cap: Some(0), choices: 1, body: body.clone(), hide_usage: false })
    }

    fn prompt(&self, call: &Call, tokenizer: Tokenizer) -> u64 {
        let Ok(fields) = request::fields(&call.body) else { return call.prompt };
        let mut saving = Saving::new(tokenizer);
        saving.texts(fields.get("input"));
        saving.of(call.prompt)
    }
}

impl ReadUsage for OpenAiEmbeddings {
    fn report(&self, answer: &[u8]) -> Report {
        Report::in_answer(answer).map(Tally::without_generation)
    }

    fn event(&self, _: &[u8]) -> Event {
        Event::default()
    }

    fn text_bytes(&self, _: &[u8]) -> u64 {
        0
    }
}

impl Dialect for OpenAiEmbeddings {
    fn path(&self) -> &str {
        "/embeddings"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_prompt_is_reserved() {
        let call = super::super::call(&OpenAiEmbeddings, r#"{"model":"m","input":["ab","c"]}"#).unwrap();
        assert_eq!((call.prompt, call.cap), (3 + 4, Some(0)));
        for wrong in [r#"{"model":"m"}"#, r#"{"model":"m","input":[]}"#, r#"{"model":"m","input":5}"#] {
            assert_eq!(super::super::call(&OpenAiEmbeddings, wrong).unwrap_err().param, Some("input"));
        }
    }

    #[test]
    fn a_prompt_alone_is_all_the_usage_there_is() {
        for usage in [r#"{"prompt_tokens":5,"total_tokens":5}"#, r#"{"prompt_tokens":5}"#, r#"{"total_tokens":5}"#] {
            let Report::Told(tally) = OpenAiEmbeddings.report(format!(r#"{{"usage":{usage}}}"#).as_bytes()) else {
                panic!("{usage}")
            };
            let usage = tally.usage().unwrap();
            assert_eq!((usage.prompt, usage.completion, usage.total), (5, 0, 5));
        }
    }
}
