//! An upper bound of the tokens of a prompt, whatever its parts are.
//!
//! Knows how the APIs mark images, audio and references among the parts of a message.
//! Must not know which API is spoken: the marks do not contradict one another. The
//! invariant it keeps: text counts with its bytes, and what is not text with a bound
//! that is written down here; whatever is not known counts as text.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use super::text::{BOOL_BYTES, FLOAT_BYTES, INTEGER_BYTES};

/// The tokens of one image: Claude resizes to at most 4,784, OpenAI's models that count
/// patches come to 3,779 (1,536 patches x 2.46), those that count tiles to 1,445.
const IMAGE_TOKENS: u64 = 5_000;

/// The tokens of one image where OpenAI counts them dearer, gpt-4o-mini: 2,833 and 5,667
/// for each of at most eight tiles.
const DEAR_IMAGE_TOKENS: u64 = 2_833 + 8 * 5_667;

/// How many bytes of base64 one token of audio is written in, at least: mp3's lowest bit
/// rate is 8 kbit/s, in base64 1,333 bytes a second, of which the densest tokenizer
/// (Gemini's) makes 32 tokens; halved to be sure.
pub(super) const AUDIO_BYTES_PER_TOKEN: u64 = 20;

/// What counts for a part that only the upstream can see: a file by its id or address, an
/// item or a conversation it remembers. Not a bound, for there is none: what such a part
/// really was is charged when the answer reports it.
pub(super) const UNSEEN_TOKENS: u64 = 4_096;

/// What a prompt, or a part of it, holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Prompt {
    /// Bytes of text, and tokens of audio: both bound the tokens.
    text: u64,
    images: u64,
    unseen: u64,
}

impl Prompt {
    /// Returns an upper bound of the tokens it is for this model.
    pub(super) fn tokens(self, model: &str) -> u64 {
        let image = if model.contains("4o-mini") { DEAR_IMAGE_TOKENS } else { IMAGE_TOKENS };
        let images = self.images.saturating_mul(image);
        self.text.saturating_add(images).saturating_add(self.unseen.saturating_mul(UNSEEN_TOKENS))
    }

    fn plus(self, other: Self) -> Self {
        Self {
            text: self.text.saturating_add(other.text),
            images: self.images.saturating_add(other.images),
            unseen: self.unseen.saturating_add(other.unseen),
        }
    }

    const fn text(text: u64) -> Self {
        Self { text, images: 0, unseen: 0 }
    }
}

/// One object among the parts, read field by field: its `type` may come last.
#[derive(Default)]
struct Part<'a> {
    kind: Cow<'a, str>,
    /// What `kind` may declare not to be text.
    payload: Prompt,
    others: Prompt,
    refers: bool,
    has_url: bool,
}

impl Part<'_> {
    fn add(&mut self, name: &str, value: Prompt) {
        self.refers |= matches!(name, "file_id" | "file_url" | "fileUri");
        self.has_url |= name == "url";
        if PAYLOAD.contains(&name) {
            self.payload = self.payload.plus(value);
        } else {
            self.others = self.others.plus(value);
        }
    }

    fn prompt(self) -> Prompt {
        let payload = match &*self.kind {
            "image_url" | "input_image" | "image" | "computer_screenshot" => Prompt { images: 1, ..Prompt::default() },
            "input_audio" | "audio" => Prompt::text(self.payload.text.div_ceil(AUDIO_BYTES_PER_TOKEN)),
            // A bound of neither frames nor sound, wherever it lies.
            "video_url" | "video" | "item_reference" => Prompt { unseen: 1, ..self.payload },
            // The source of a document; inside an image it is overruled above.
            "url" if self.has_url => Prompt { unseen: 1, ..self.payload },
            _ if self.refers => Prompt { unseen: self.payload.unseen + 1, ..self.payload },
            _ => self.payload,
        };
        payload.plus(self.others)
    }
}

/// The fields that carry what the part's type names.
const PAYLOAD: [&str; 9] =
    ["image_url", "source", "url", "data", "input_audio", "audio", "file_id", "file_url", "video_url"];

/// The name of a field, borrowed where it holds no escapes.
#[derive(serde::Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Seen::deserialize(deserializer).map(|seen| seen.prompt)
    }
}

/// A value, read once and never again: what is read twice is read without the parser's
/// limit on depth.
#[derive(Default)]
struct Seen<'a> {
    prompt: Prompt,
    /// What it says, if it is a word that may be a `type`.
    word: Option<Cow<'a, str>>,
}

impl Seen<'_> {
    fn text(bytes: u64) -> Self {
        Self { prompt: Prompt::text(bytes), word: None }
    }
}

/// The longest word that is kept: longer than every type.
const MAX_WORD: usize = 64;

impl<'de: 'a, 'a> Deserialize<'de> for Seen<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Count;

        impl<'de> Visitor<'de> for Count {
            type Value = Seen<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any JSON value")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Seen<'de>, E> {
                Ok(Seen { word: Some(Cow::Borrowed(text)), ..Seen::text(text.len() as u64) })
            }

            fn visit_str<E>(self, text: &str) -> Result<Seen<'de>, E> {
                let word = (text.len() <= MAX_WORD).then(|| Cow::Owned(text.to_owned()));
                Ok(Seen { word, ..Seen::text(text.len() as u64) })
            }

            // Numbers and words are written out for the model in templates of tools.
            fn visit_bool<E>(self, _: bool) -> Result<Seen<'de>, E> {
                Ok(Seen::text(BOOL_BYTES))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Seen<'de>, E> {
                Ok(Seen::text(INTEGER_BYTES))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Seen<'de>, E> {
                Ok(Seen::text(INTEGER_BYTES))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Seen<'de>, E> {
                Ok(Seen::text(FLOAT_BYTES))
            }

            fn visit_unit<E>(self) -> Result<Seen<'de>, E> {
                Ok(Seen::default())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Seen<'de>, A::Error> {
                let mut prompt = Prompt::default();
                while let Some(item) = items.next_element()? {
                    prompt = prompt.plus(item);
                }
                Ok(Seen { prompt, word: None })
            }

            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Seen<'de>, A::Error> {
                let mut part = Part::default();
                while let Some(Name(name)) = fields.next_key::<Name<'de>>()? {
                    let value: Seen<'de> = fields.next_value()?;
                    part.add(&name, value.prompt);
                    if name == "type" {
                        // In a tool's own arguments it may be anything.
                        part.kind = value.word.unwrap_or_default();
                    }
                }
                Ok(Seen { prompt: part.prompt(), word: None })
            }
        }

        deserializer.deserialize_any(Count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> u64 {
        serde_json::from_str::<Prompt>(text).unwrap().tokens("gpt-4o")
    }

    #[test]
    fn text_counts_with_its_bytes_once_decoded() {
        assert_eq!(tokens(r#"[{"content":"h\u00e9","parts":[{"text":"abc"}]}, null]"#), 3 + 3);
    }

    #[test]
    fn an_image_counts_as_one_however_large_it_is_written() {
        let data = "A".repeat(100_000);
        for (kind, image) in [
            ("image_url", format!(r#"{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{data}"}}}}"#)),
            ("input_image", format!(r#"{{"image_url":"data:{data}","type":"input_image"}}"#)),
            ("image", format!(r#"{{"type":"image","source":{{"type":"base64","media_type":"x","data":"{data}"}}}}"#)),
            ("image", r#"{"type":"image","source":{"type":"url","url":"https://h/i.png"}}"#.to_owned()),
            ("input_image", r#"{"type":"input_image","file_id":"file-1"}"#.to_owned()),
        ] {
            assert_eq!(tokens(&image), IMAGE_TOKENS + kind.len() as u64, "{kind}");
        }
        let image = r#"{"type":"image_url","image_url":{"url":"https://h/i.png"}}"#;
        let dear = serde_json::from_str::<Prompt>(image).unwrap().tokens("gpt-4o-mini-2024-07-18");
        assert_eq!(dear, 48_169 + 9);
    }

    #[test]
    fn text_beside_an_image_still_counts() {
        assert_eq!(tokens(r#"{"type":"image","source":{},"text":"abcde"}"#), IMAGE_TOKENS + 5 + 5);
    }

    #[test]
    fn audio_counts_with_its_length() {
        let audio =
            format!(r#"{{"type":"input_audio","input_audio":{{"data":"{}","format":"wav"}}}}"#, "A".repeat(1_997));
        assert_eq!(tokens(&audio), 100 + 11);
    }

    #[test]
    fn what_only_the_upstream_can_see_counts_with_the_default() {
        for part in [
            r#"{"type":"file","file":{"file_id":""}}"#,
            r#"{"type":"document","source":{"type":"url","url":""}}"#,
            r#"{"type":"item_reference","id":""}"#,
            r#"{"type":"video_url","video_url":{"url":""}}"#,
        ] {
            assert!((UNSEEN_TOKENS..UNSEEN_TOKENS + 20).contains(&tokens(part)), "{part}: {}", tokens(part));
        }
        // A document that is here counts with its bytes.
        assert!(tokens(r#"{"type":"file","file":{"file_data":"0123456789"}}"#) < 20);
    }

    #[test]
    fn a_type_that_is_no_word_is_text() {
        assert_eq!(tokens(r#"{"type":{"deep":["abc"]},"x":"y"}"#), 4);
        let deep = format!("{}{}", r#"{"type":"#.repeat(100_000), "}".repeat(100_000));
        assert!(serde_json::from_str::<Prompt>(&deep).is_err());
    }
}
