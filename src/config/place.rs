//! Which field a place in a config file belongs to.
//!
//! Knows where every name and every value of a text begins. Must not know what any of them
//! means. The invariant it keeps: it shows names and nothing else, and what is no plain name,
//! such as a secret in the wrong place, ends the path before it.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, Location, NonFiniteFloatPolicy, Spanned};

/// Returns the path of the field whose value begins at a place, or whose name does:
/// `deployments[1].limits[0].window`; of no exact match the last that begins before. `None` if
/// the text is no YAML, or the place is in no field.
pub(super) fn field_at(text: &str, at: Location, is_name: bool) -> Option<String> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
    };
    let root: Node = serde_saphyr::from_str_with_options(text, options).ok()?;
    let mut search = Search { at: (at.line(), at.column()), is_name, found: None };
    search.look(&root, "");
    search.found
}

struct Search {
    at: (u64, u64),
    is_name: bool,
    found: Option<String>,
}

impl Search {
    /// Looks in the order of the text, so that the last that begins in time is the nearest.
    fn look(&mut self, node: &Node, path: &str) {
        match node {
            Node::Scalar => {}
            Node::List(list) => {
                for (i, element) in list.iter().enumerate() {
                    self.enter(element, element.referenced, format!("{path}[{i}]"));
                }
            }
            Node::Map(map) => {
                for (name, value) in map {
                    let at = if self.is_name { name.referenced } else { value.referenced };
                    let is_plain = !name.value.is_empty()
                        && name.value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
                    let dot = if path.is_empty() { "" } else { "." };
                    match is_plain {
                        true => self.enter(value, at, format!("{path}{dot}{}", name.value)),
                        false => self.begin(at, path),
                    }
                }
            }
        }
    }

    fn enter(&mut self, node: &Spanned<Node>, at: Location, path: String) {
        self.begin(at, &path);
        self.look(&node.value, &path);
    }

    fn begin(&mut self, at: Location, path: &str) {
        if (at.line(), at.column()) <= self.at {
            self.found = Some(path.to_owned()).filter(|path| !path.is_empty());
        }
    }
}

/// Names and places.
enum Node {
    Scalar,
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_bool<E: Error>(self, _: bool) -> Result<Node, E> {
                Ok(Node::Scalar)
            }

            fn visit_i64<E: Error>(self, _: i64) -> Result<Node, E> {
                Ok(Node::Scalar)
            }

            fn visit_u64<E: Error>(self, _: u64) -> Result<Node, E> {
                Ok(Node::Scalar)
            }

            fn visit_i128<E: Error>(self, _: i128) -> Result<Node, E> {
                Ok(Node::Scalar)
            }

            fn visit_u128<E: Error>(self, _: u128) -> Result<Node, E> {
                Ok(Node::Scalar)
            }

            fn visit_f64<E: Error>(self, _: f64) -> Result<Node, E> {
                Ok(Node::Scalar)
            }

            fn visit_str<E: Error>(self, _: &str) -> Result<Node, E> {
                Ok(Node::Scalar)
            }

            fn visit_bytes<E: Error>(self, _: &[u8]) -> Result<Node, E> {
                Ok(Node::Scalar)
            }

            fn visit_none<E: Error>(self) -> Result<Node, E> {
                Ok(Node::Scalar)
            }

            fn visit_unit<E: Error>(self) -> Result<Node, E> {
                Ok(Node::Scalar)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = list.next_element()? {
                    elements.push(element);
                }
                Ok(Node::List(elements))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Node::Map(entries))
            }
        }

        deserializer.deserialize_any(Any)
    }
}
