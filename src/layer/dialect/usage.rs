//! What an answer says it used, in whichever shape it says so.
//!
//! Knows the usage objects of OpenAI (chat and responses), Anthropic, Bedrock and
//! Gemini: their names do not contradict one another. Must not know what is charged. The
//! invariant it keeps: a number that cannot be true makes the whole object a lie, and a
//! lie is never a little bit believed.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::fields::Fields;

/// The most tokens one answer may claim: 128 choices of a million, and over ten times the
/// largest context there is. More is a mistake, and would close a window for everybody.
const MAX_TOKENS: u64 = 1 << 28;

/// What an answer used, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, those of the cache among them.
    pub prompt: u64,
    /// How many of them were read from the cache; at most all.
    pub cached: u64,
    /// Tokens of the output, those of reasoning among them.
    pub completion: u64,
    /// All of them; at least their sum.
    pub total: u64,
}

/// What is known of an answer's use so far: streams tell it in parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    input: Option<u64>,
    /// What Anthropic and Bedrock count beside the input and not in it.
    cache_written: Option<u64>,
    cache_read: Option<u64>,
    /// What OpenAI and Gemini read from the cache and count in the input.
    cached: Option<u64>,
    output: Option<u64>,
    total: Option<u64>,
}

impl Tally {
    /// Returns the tally with what was told later: the last word on each number counts.
    pub fn then(self, later: Self) -> Self {
        Self {
            input: later.input.or(self.input),
            cache_written: later.cache_written.or(self.cache_written),
            cache_read: later.cache_read.or(self.cache_read),
            cached: later.cached.or(self.cached),
            output: later.output.or(self.output),
            total: later.total.or(self.total),
        }
    }

    /// Returns the tally without its output, where that is only the first token's.
    pub(super) fn without_output(self) -> Self {
        Self { output: None, total: None, ..self }
    }

    /// Returns the tally of an API whose answers have no output.
    pub(super) fn without_generation(self) -> Self {
        Self { output: Some(self.output.unwrap_or(0)), ..self }
    }

    /// Returns the prompt's tokens, those of the cache among them.
    pub fn prompt(self) -> Option<u64> {
        self.input.map(|input| input + self.cache_written.unwrap_or(0) + self.cache_read.unwrap_or(0))
    }

    /// Returns the use, if all of it is known; a part that is left out is what the total
    /// leaves for it, and all of it where nothing tells the parts apart.
    pub fn usage(self) -> Option<Usage> {
        let (prompt, completion) = match (self.prompt(), self.output, self.total) {
            (Some(prompt), Some(completion), _) => (prompt, completion),
            (Some(prompt), None, Some(total)) => (prompt, total.saturating_sub(prompt)),
            (None, Some(completion), Some(total)) => (total.saturating_sub(completion), completion),
            (None, None, Some(total)) => return Some(Usage { prompt: total, cached: 0, completion: total, total }),
            (_, _, None) => return None,
        };
        let sum = prompt + completion;
        let cached = self.cache_read.or(self.cached).unwrap_or(0).min(prompt);
        Some(Usage { prompt, cached, completion, total: self.total.unwrap_or(sum).max(sum) })
    }
}

/// What an answer or an event says about its use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Report {
    /// Nothing.
    #[default]
    None,
    /// Something that cannot be: negative, broken, absurd, or twice.
    Lie,
    /// What is known so far.
    Told(Tally),
}

impl Report {
    /// Reads a usage object.
    pub(super) fn of(usage: Option<&RawValue>) -> Self {
        let Some(usage) = usage.filter(|usage| usage.get() != "null") else { return Self::None };
        let Ok(fields) = serde_json::from_str::<Fields<'_>>(usage.get()) else { return Self::Lie };
        match tally(&fields) {
            Ok(tally) if tally == Tally::default() => Self::None,
            Ok(tally) => Self::Told(tally),
            Err(Lie) => Self::Lie,
        }
    }

    /// Reads the usage object in the `usage` field of an object.
    pub(super) fn in_answer(answer: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Answer<'a> {
            #[serde(borrow)]
            usage: Option<&'a RawValue>,
        }
        serde_json::from_slice::<Answer<'_>>(answer).map_or(Self::None, |answer| Self::of(answer.usage))
    }

    /// Returns the report with its tally changed.
    pub(super) fn map(self, change: impl FnOnce(Tally) -> Tally) -> Self {
        match self {
            Self::Told(tally) => Self::Told(change(tally)),
            Self::None | Self::Lie => self,
        }
    }

    /// Returns whether something was told.
    #[cfg(test)]
    pub(super) fn is_told(self) -> bool {
        matches!(self, Self::Told(_))
    }
}

impl From<Usage> for Report {
    fn from(usage: Usage) -> Self {
        let Usage { prompt, cached, completion, total } = usage;
        Self::Told(Tally {
            input: Some(prompt),
            cached: Some(cached),
            output: Some(completion),
            total: Some(total),
            ..Tally::default()
        })
    }
}

struct Lie;

fn tally(fields: &Fields<'_>) -> Result<Tally, Lie> {
    let number = |name: &str| match fields.get(name) {
        None => Ok(None),
        Some(value) => match serde_json::from_str::<u64>(value.get()) {
            Ok(number) if number <= MAX_TOKENS => Ok(Some(number)),
            _ => Err(Lie),
        },
    };
    // Inside of the input; what is not understood there forgives nothing.
    let cached = ["prompt_tokens_details", "input_tokens_details"].iter().find_map(|details| {
        let details: Fields<'_> = serde_json::from_str(fields.get(details)?.get()).ok()?;
        serde_json::from_str::<u64>(details.get("cached_tokens")?.get()).ok()
    });
    let sum = |names: &[&str]| {
        names.iter().try_fold(None, |sum: Option<u64>, name| {
            let number = number(name)?;
            Ok(sum.map_or(number, |sum| Some(sum + number.unwrap_or(0))))
        })
    };
    // Their cache stands inside the input; whoever repeats it beside means no more.
    let inclusive = number("prompt_tokens")?;
    let exclusive = number("input_tokens")?.or(number("inputTokens")?);
    let gemini = sum(&["promptTokenCount", "toolUsePromptTokenCount"])?;
    let beside = |names: &[&str]| if inclusive.is_none() { sum(names) } else { Ok(None) };
    Ok(Tally {
        input: inclusive.or(exclusive).or(gemini),
        cache_written: beside(&["cache_creation_input_tokens", "cacheWriteInputTokens"])?,
        cache_read: beside(&["cache_read_input_tokens", "cacheReadInputTokens"])?,
        cached: cached.or(number("cachedContentTokenCount")?),
        output: number("completion_tokens")?
            .or(number("output_tokens")?)
            .or(number("outputTokens")?)
            .or(sum(&["candidatesTokenCount", "thoughtsTokenCount"])?),
        total: number("total_tokens")?.or(number("totalTokens")?).or(number("totalTokenCount")?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(text: &str) -> Option<Usage> {
        match Report::in_answer(format!(r#"{{"usage":{text}}}"#).as_bytes()) {
            Report::Told(tally) => tally.usage(),
            Report::None | Report::Lie => None,
        }
    }

    fn of(prompt: u64, completion: u64, total: u64) -> Option<Usage> {
        Some(Usage { prompt, cached: 0, completion, total })
    }

    fn cached(usage: Option<Usage>, cached: u64) -> Option<Usage> {
        usage.map(|usage| Usage { cached, ..usage })
    }

    #[test]
    fn every_shape_is_read() {
        for (shape, text, expected) in [
            ("chat", r#"{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}"#, of(3, 4, 7)),
            ("responses", r#"{"input_tokens":3,"output_tokens":4,"total_tokens":7}"#, of(3, 4, 7)),
            (
                "anthropic",
                r#"{"input_tokens":3,"cache_creation_input_tokens":10,"cache_read_input_tokens":100,"output_tokens":4}"#,
                cached(of(113, 4, 117), 100),
            ),
            (
                "bedrock",
                r#"{"inputTokens":3,"outputTokens":4,"totalTokens":117,"cacheReadInputTokens":100,"cacheWriteInputTokens":10}"#,
                cached(of(113, 4, 117), 100),
            ),
            (
                "gemini",
                r#"{"promptTokenCount":3,"candidatesTokenCount":4,"thoughtsTokenCount":5,"totalTokenCount":12}"#,
                of(3, 9, 12),
            ),
            (
                "chat, cached",
                r#"{"prompt_tokens":30,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":20}}"#,
                cached(of(30, 4, 34), 20),
            ),
            (
                "responses, cached",
                r#"{"input_tokens":30,"output_tokens":4,"input_tokens_details":{"cached_tokens":99}}"#,
                cached(of(30, 4, 34), 30),
            ),
            (
                "a lie about the cache forgives nothing",
                r#"{"prompt_tokens":30,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":-20}}"#,
                of(30, 4, 34),
            ),
            // LiteLLM repeats the cache beside a prompt that includes it.
            ("repeated", r#"{"prompt_tokens":30,"completion_tokens":4,"cache_read_input_tokens":20}"#, of(30, 4, 34)),
            ("no cache", r#"{"input_tokens":3,"cache_read_input_tokens":null,"output_tokens":4}"#, of(3, 4, 7)),
        ] {
            assert_eq!(usage(text), expected, "{shape}");
        }
    }

    #[test]
    fn a_part_that_is_left_out_is_never_guessed_low() {
        assert_eq!(usage(r#"{"prompt_tokens":3,"total_tokens":7}"#), of(3, 4, 7));
        assert_eq!(usage(r#"{"completion_tokens":3,"total_tokens":7}"#), of(4, 3, 7));
        assert_eq!(usage(r#"{"total_tokens":7}"#), of(7, 7, 7));
        assert_eq!(usage(r#"{"prompt_tokens":7}"#), None);
        assert_eq!(usage(r#"{"prompt_tokens":3,"completion_tokens":4,"total_tokens":1}"#), of(3, 4, 7));
    }

    #[test]
    fn a_lie_is_told_from_silence() {
        let report = |text: &str| Report::in_answer(format!(r#"{{"usage":{text}}}"#).as_bytes());
        for lie in [
            "[]",
            "5",
            r#"{"prompt_tokens":-3,"total_tokens":1}"#,
            r#"{"total_tokens":99999999999999}"#,
            r#"{"total_tokens":1.5}"#,
            r#"{"total_tokens":"7"}"#,
            r#"{"input_tokens":3,"output_tokens":4,"cache_read_input_tokens":-1}"#,
            r#"{"total_tokens":1,"total_tokens":2}"#,
        ] {
            assert_eq!(report(lie), Report::Lie, "{lie}");
        }
        for silence in ["null", "{}", r#"{"type":"duration","seconds":3.5}"#] {
            assert_eq!(report(silence), Report::None, "{silence}");
        }
        assert_eq!(Report::in_answer(b"<html>"), Report::None);
    }

    #[test]
    fn the_last_word_on_each_number_counts() {
        let tally = |text: &str| match Report::in_answer(format!(r#"{{"usage":{text}}}"#).as_bytes()) {
            Report::Told(tally) => tally,
            other => panic!("{other:?}"),
        };
        let start = tally(r#"{"input_tokens":3,"cache_read_input_tokens":100,"output_tokens":1}"#).without_output();
        assert_eq!((start.usage(), start.prompt()), (None, Some(103)));
        let end = start.then(tally(r#"{"output_tokens":40}"#));
        assert_eq!(end.usage(), cached(of(103, 40, 143), 100));
    }
}
