//! A JSON object whose values are left as they were written.
//!
//! Knows JSON. Must not know any API. The invariant it keeps: every byte of a value can
//! be passed on unchanged, and no name stands twice, because which of two values an
//! upstream would believe is unknowable.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The fields in the order of the text.
#[derive(Debug)]
pub(super) struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Fields<'a> {
    /// Returns the value of a field, unless it is absent or `null`.
    pub(super) fn get(&self, name: &str) -> Option<&'a RawValue> {
        let (_, value) = self.0.iter().find(|(field, _)| field == name)?;
        (value.get() != "null").then_some(*value)
    }

    /// Returns the object with one field set, every other byte of the values as it was.
    pub(super) fn with(&self, name: &str, value: &str) -> Bytes {
        // Names grow by what is escaped in them; most have nothing that is.
        let long = |name: &str, value: &str| name.len() + value.len() + r#""":,"#.len();
        let others = || self.0.iter().filter(|(field, _)| field != name);
        let length: usize = others().map(|(field, other)| long(field, other.get())).sum();
        let mut text = Vec::with_capacity(1 + length + long(name, value));
        let mut put = |before: u8, name: &str, value: &str| {
            text.push(before);
            // Writing to memory does not fail.
            let _ = serde_json::to_writer(&mut text, name);
            text.push(b':');
            text.extend_from_slice(value.as_bytes());
        };
        let mut before = b'{';
        for (field, other) in others() {
            put(before, field, other.get());
            before = b',';
        }
        put(before, name, value);
        text.push(b'}');
        Bytes::from(text)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        /// A name, borrowed where it holds no escapes.
        #[derive(Deserialize)]
        struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

        impl<'de> Visitor<'de> for Object {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields: Vec<(Cow<'de, str>, &'de RawValue)> = Vec::new();
                while let Some((Name(name), value)) = map.next_entry::<Name<'de>, &'de RawValue>()? {
                    if fields.iter().any(|(field, _)| *field == name) {
                        return Err(A::Error::custom(TWICE));
                    }
                    if fields.len() == MAX_FIELDS {
                        return Err(A::Error::custom(TOO_MANY));
                    }
                    fields.push((name, value));
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(Object)
    }
}

/// The most fields of one object: far above every API's, and few enough to compare.
pub(super) const MAX_FIELDS: usize = 256;

const TWICE: &str = "a field stands twice";
const TOO_MANY: &str = "too many fields";

/// Returns what an error that is not the text's own says of an object, without a word of it.
pub(super) fn not_fields(error: &serde_json::Error) -> String {
    let said = error.to_string();
    // What stood there follows another beginning.
    if said.starts_with(TWICE) {
        "has a field twice".to_owned()
    } else if said.starts_with(TOO_MANY) {
        format!("is an object of more than {MAX_FIELDS} fields")
    } else {
        "is not an object".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_set_and_the_others_stay_as_they_were_written() {
        let fields: Fields<'_> = serde_json::from_str(r#"{"a": 1.50, "b" : {"c":  [1e2]}, "a\u0062": null}"#).unwrap();
        assert_eq!(&fields.with("d", "true")[..], br#"{"a":1.50,"b":{"c":  [1e2]},"ab":null,"d":true}"#);
        assert_eq!(&fields.with("b", "0")[..], br#"{"a":1.50,"ab":null,"b":0}"#);
        assert!(fields.get("ab").is_none());
    }

    #[test]
    fn a_name_that_stands_twice_is_refused() {
        assert!(serde_json::from_str::<Fields<'_>>(r#"{"max_tokens":1,"max\u005ftokens":2}"#).is_err());
    }
}
