//! How many tokens OpenAI's models make of a text, at most.
//!
//! Knows which models count with which of OpenAI's published encodings, and what is added to
//! a count to be sure. Must not know requests. The invariant it keeps: the bound is never more
//! than the text's bytes, and what it costs is linear in them, whatever the text is.
//!
//! Only what OpenAI publishes can be counted. Anthropic publishes no tokenizer of Claude 3 and
//! later, but an endpoint that counts (platform.claude.com, "Token counting"); a template of a
//! model served elsewhere adds what nobody declares. There bytes are the bound: every token of
//! a byte-level tokenizer is at least one.

use std::sync::atomic::{AtomicBool, Ordering};

/// What a prompt's text is counted with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tokenizer {
    /// Bytes, which bound the tokens of every byte-level tokenizer.
    #[default]
    Bytes,
    /// `o200k_base`: gpt-4o, gpt-4.1, gpt-5, o1, o3 and o4-mini.
    O200k,
    /// `cl100k_base`: gpt-4, gpt-3.5 and the embedding models.
    Cl100k,
}

/// Which model counts with what: tiktoken's own table (`tiktoken/model.py` of 0.14). A name
/// stands for itself and what follows it after a hyphen or, in a fine-tune's name, a colon.
const MODELS: [(&str, Tokenizer); 16] = [
    ("gpt-5", Tokenizer::O200k),
    ("gpt-4.5", Tokenizer::O200k),
    ("gpt-4.1", Tokenizer::O200k),
    ("gpt-4o", Tokenizer::O200k),
    ("chatgpt-4o", Tokenizer::O200k),
    ("o1", Tokenizer::O200k),
    ("o3", Tokenizer::O200k),
    ("o4-mini", Tokenizer::O200k),
    ("gpt-4", Tokenizer::Cl100k),
    ("gpt-3.5-turbo", Tokenizer::Cl100k),
    ("gpt-35-turbo", Tokenizer::Cl100k),
    ("text-embedding-ada-002", Tokenizer::Cl100k),
    ("text-embedding-3-small", Tokenizer::Cl100k),
    ("text-embedding-3-large", Tokenizer::Cl100k),
    ("davinci-002", Tokenizer::Cl100k),
    ("babbage-002", Tokenizer::Cl100k),
];

/// One in so many tokens is added to a count. OpenAI calls its own recipe for messages an
/// estimate: a text may be joined to its neighbours, or its line ends changed, before it is
/// counted, and either moves a few tokens.
const ALLOWANCE: usize = 16;

/// How much text is counted in one piece: what is longer than a word costs n log n, so the
/// pieces make it linear.
const PIECE: usize = 4 << 10;

/// How much text of one request is counted: what lies beyond counts with its bytes. Of ASCII
/// 256 KiB, 60,000 tokens and more, in at most 40 ms of a core; see [`cost`] for the rest.
pub(super) const MAX_COUNTED: usize = 256 << 10;

/// How many bytes of ASCII one byte of other text stands for. Characters of all scripts mixed
/// overflow the memory of the crate's regular expression: 4,500 us/kB where no ASCII takes more
/// than 152 (docs/decisions/0010). So 51 KiB of the worst text are counted, in 240 ms.
const OTHER_TEXT: usize = 5;

impl Tokenizer {
    /// Whether texts can be counted: the cargo feature `tokenizer`. Without it bytes are the
    /// bound of every tokenizer.
    pub const IS_BUILT_IN: bool = cfg!(feature = "tokenizer");

    /// Returns the tokenizer of a model by its name at OpenAI, [`Tokenizer::Bytes`] where the
    /// name is not one of theirs.
    pub fn of_model(name: &str) -> Self {
        let base = name.strip_prefix("ft:").unwrap_or(name);
        let found = MODELS.iter().find(|(model, _)| {
            // From gpt-5 on also the versions after a dot.
            base.strip_prefix(model).is_some_and(|rest| {
                rest.is_empty() || rest.starts_with(['-', ':']) || *model == "gpt-5" && rest.starts_with('.')
            })
        });
        found.map_or(Self::Bytes, |(_, tokenizer)| *tokenizer)
    }

    /// Reads the encoding's table, which the first count would do otherwise: 83 ms and 24 MB for
    /// `o200k_base`, 36 ms and 13 MB for `cl100k_base`, once a process (docs/decisions/0010).
    pub fn load(self) {
        self.count("");
    }

    /// Returns whether a count would read no table.
    pub(super) fn is_loaded(self) -> bool {
        self.loaded().is_none_or(|loaded| loaded.load(Ordering::Relaxed))
    }

    fn loaded(self) -> Option<&'static AtomicBool> {
        static O200K: AtomicBool = AtomicBool::new(!Tokenizer::IS_BUILT_IN);
        static CL100K: AtomicBool = AtomicBool::new(!Tokenizer::IS_BUILT_IN);
        match self {
            Self::Bytes => None,
            Self::O200k => Some(&O200K),
            Self::Cl100k => Some(&CL100K),
        }
    }

    /// Returns an upper bound of the tokens of a text. Of `left`, the bytes that may still be
    /// counted, it takes what it counts.
    pub(super) fn bound(self, text: &str, left: &mut usize) -> u64 {
        let (mut rest, mut tokens, mut uncounted) = (text, 0, 0);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(end_of_piece(rest));
            match left.checked_sub(cost(piece)) {
                Some(fewer) => (*left, tokens) = (fewer, tokens + self.count(piece)),
                None => uncounted += piece.len(),
            }
            rest = after;
        }
        (tokens + tokens.div_ceil(ALLOWANCE) + uncounted).min(text.len()) as u64
    }

    #[cfg(feature = "tokenizer")]
    fn count(self, text: &str) -> usize {
        let name = match self {
            Self::Bytes => return text.len(),
            Self::O200k => "o200k_base",
            Self::Cl100k => "cl100k_base",
        };
        let Some(encoding) = tiktoken::get_encoding(name) else { return text.len() };
        self.loaded().inspect(|loaded| loaded.store(true, Ordering::Relaxed));
        // What looks like a special token counts as the text it is: that is more.
        encoding.count(text)
    }

    #[cfg(not(feature = "tokenizer"))]
    fn count(self, text: &str) -> usize {
        text.len()
    }
}

/// Returns how much of what may be counted a piece takes.
fn cost(piece: &str) -> usize {
    let other = piece.bytes().filter(|byte| !byte.is_ascii()).count();
    piece.len() + other * (OTHER_TEXT - 1)
}

/// Returns where the first piece of a text ends: before a word where there is one, as the
/// encodings part words before the space that leads them.
fn end_of_piece(text: &str) -> usize {
    if text.len() <= PIECE {
        return text.len();
    }
    let end = (0..=PIECE).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(text.len());
    text[..end].rfind(' ').filter(|space| *space > end / 2).unwrap_or(end)
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
