//! How many bytes of text a JSON value holds.
//!
//! Knows JSON strings. Must not know any API. The invariant it keeps: every string
//! counts with its UTF-8 bytes, and every token of a byte-level tokenizer is at least
//! one byte, so the sum bounds the tokens of the text.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// What a number or a word of JSON is written in, at most.
pub(super) const BOOL_BYTES: u64 = 5;
pub(super) const INTEGER_BYTES: u64 = 20;
pub(super) const FLOAT_BYTES: u64 = 24;

/// The UTF-8 bytes of every string inside a value, names of fields not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TextBytes(pub(super) u64);

impl<'de> Deserialize<'de> for TextBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Count;

        impl<'de> Visitor<'de> for Count {
            type Value = u64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any JSON value")
            }

            fn visit_str<E>(self, text: &str) -> Result<u64, E> {
                Ok(text.len() as u64)
            }

            // Numbers and words are written out for the model in templates of tools.
            fn visit_bool<E>(self, _: bool) -> Result<u64, E> {
                Ok(BOOL_BYTES)
            }

            fn visit_i64<E>(self, _: i64) -> Result<u64, E> {
                Ok(INTEGER_BYTES)
            }

            fn visit_u64<E>(self, _: u64) -> Result<u64, E> {
                Ok(INTEGER_BYTES)
            }

            fn visit_f64<E>(self, _: f64) -> Result<u64, E> {
                Ok(FLOAT_BYTES)
            }

            fn visit_unit<E>(self) -> Result<u64, E> {
                Ok(0)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<u64, A::Error> {
                let mut sum = 0u64;
                while let Some(TextBytes(bytes)) = items.next_element()? {
                    sum = sum.saturating_add(bytes);
                }
                Ok(sum)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<u64, A::Error> {
                let mut sum = 0u64;
                while let Some((_, TextBytes(bytes))) = fields.next_entry::<IgnoredAny, _>()? {
                    sum = sum.saturating_add(bytes);
                }
                Ok(sum)
            }
        }

        deserializer.deserialize_any(Count).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_string_counts_with_its_bytes_once_decoded() {
        let text = r#"[{"content":"h\u00e9","parts":[{"text":"abc"}]}, null]"#;
        assert_eq!(serde_json::from_str::<TextBytes>(text).unwrap(), TextBytes(3 + 3));
    }
}
