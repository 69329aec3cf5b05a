//! What a bound by tokens keeps to.

use proptest::prelude::*;

use super::*;

fn bound(tokenizer: Tokenizer, text: &str) -> u64 {
    tokenizer.bound(text, &mut { MAX_COUNTED })
}

#[test]
fn a_model_is_known_by_its_name() {
    for (name, expected) in [
        ("gpt-4o", Tokenizer::O200k),
        ("gpt-4o-mini-2024-07-18", Tokenizer::O200k),
        ("gpt-4.1-nano", Tokenizer::O200k),
        ("gpt-5", Tokenizer::O200k),
        ("gpt-5.2-codex", Tokenizer::O200k),
        ("o1", Tokenizer::O200k),
        ("o3-mini", Tokenizer::O200k),
        ("o4-mini", Tokenizer::O200k),
        ("ft:gpt-4.1-2025-04-14:org::x", Tokenizer::O200k),
        ("gpt-4", Tokenizer::Cl100k),
        ("gpt-4-turbo", Tokenizer::Cl100k),
        ("gpt-3.5-turbo-0125", Tokenizer::Cl100k),
        ("ft:gpt-3.5-turbo:org::x", Tokenizer::Cl100k),
        ("text-embedding-3-large", Tokenizer::Cl100k),
        // Names like theirs, and those of others.
        ("gpt-4.9", Tokenizer::Bytes),
        ("gpt-50", Tokenizer::Bytes),
        ("gpt-6", Tokenizer::Bytes),
        ("o10", Tokenizer::Bytes),
        ("gpt-oss-120b", Tokenizer::Bytes),
        ("my-gpt-4o", Tokenizer::Bytes),
        ("claude-sonnet-4-5", Tokenizer::Bytes),
        ("llama-3", Tokenizer::Bytes),
        ("", Tokenizer::Bytes),
    ] {
        assert_eq!(Tokenizer::of_model(name), expected, "{name}");
    }
}

/// The figures of OpenAI's cookbook, "How to count tokens with tiktoken".
#[cfg(feature = "tokenizer")]
#[test]
fn counts_are_those_of_the_cookbook() {
    for (text, tokens) in [("antidisestablishmentarianism", 6), ("2 + 2 = 4", 7), ("お誕生日おめでとう", 9)] {
        assert_eq!(Tokenizer::Cl100k.count(text), tokens, "{text}");
    }
    assert_eq!(Tokenizer::Cl100k.count("tiktoken is great!"), 6);
}

#[cfg(feature = "tokenizer")]
#[test]
fn what_looks_like_a_special_token_counts_as_more_than_it() {
    for text in ["<|endoftext|>", "<|im_start|>", "<|endofprompt|>"] {
        assert!(Tokenizer::O200k.count(text) > 1 && Tokenizer::Cl100k.count(text) > 1, "{text}");
    }
}

#[cfg(feature = "tokenizer")]
#[test]
fn prose_counts_with_a_quarter_of_its_bytes() {
    let prose = include_str!("../../docs/algorithm.md");
    assert!(bound(Tokenizer::O200k, prose) * 3 < prose.len() as u64);
}

#[test]
fn what_is_too_long_to_count_counts_with_its_bytes() {
    let word = " word";
    let text = word.repeat(1_000);
    let mut left = text.len() / 2;
    let half = Tokenizer::O200k.bound(&text, &mut left);
    assert!(half > text.len() as u64 / 2 && half <= text.len() as u64, "{half}");
    assert!(left < PIECE, "{left}");
    assert_eq!(Tokenizer::O200k.bound(&text, &mut 0), text.len() as u64);
}

#[test]
fn other_text_than_ascii_takes_more_of_what_may_be_counted() {
    for (word, times) in [("word", 1), ("слов", OTHER_TEXT)] {
        let (text, mut left) = (word.repeat(PIECE / word.len()), MAX_COUNTED);
        Tokenizer::O200k.bound(&text, &mut left);
        assert_eq!(MAX_COUNTED - left, PIECE * times, "{word}");
    }
}

/// Texts that encodings part badly: runs of one letter, of spaces and line ends, marks that
/// combine, letters of all scripts.
fn texts() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        any::<String>(),
        "[a-zA-Z0-9 ]{0,80}",
        r"[ \t\r\n]{0,40}",
        "[\u{300}-\u{36f}\u{4e00}-\u{4eff}\u{600}-\u{6ff}\u{1f600}-\u{1f64f}]{0,40}",
        (any::<char>(), 1usize..6_000).prop_map(|(one, times)| String::from_iter(std::iter::repeat_n(one, times))),
        Just("<|endoftext|>".to_owned()),
    ];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_bound_lies_between_the_count_and_the_bytes(text in texts()) {
        for tokenizer in [Tokenizer::O200k, Tokenizer::Cl100k, Tokenizer::Bytes] {
            let bound = bound(tokenizer, &text);
            prop_assert!(bound <= text.len() as u64);
            // The whole text in one piece, as the upstream counts it.
            prop_assert!(bound >= tokenizer.count(&text) as u64, "{bound} < {}", tokenizer.count(&text));
        }
    }

    #[test]
    fn pieces_lose_nothing(text in texts()) {
        let (mut rest, mut pieces) = (&*text, Vec::new());
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(end_of_piece(rest));
            prop_assert!(!piece.is_empty() && piece.len() <= PIECE);
            pieces.push(piece);
            rest = after;
        }
        prop_assert_eq!(pieces.concat(), text);
    }
}
