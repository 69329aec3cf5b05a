//! What holds for every dialect.

use proptest::prelude::*;

use super::*;

pub(super) fn call(dialect: &dyn Dialect, body: &str) -> Result<Call, BadRequest> {
    dialect.call(Bytes::copy_from_slice(body.as_bytes()))
}

fn all() -> [Box<dyn Dialect>; 7] {
    [
        Box::new(OpenAiChat),
        Box::new(OpenAiCompletions),
        Box::new(OpenAiEmbeddings),
        Box::new(OpenAiResponses),
        Box::new(AnthropicMessages),
        Box::new(Other::new("/new", "application/json")),
        Box::new(Other::new("/new", "multipart/form-data; boundary=b")),
    ]
}

/// A body that every dialect for JSON takes.
const BODY: &str =
    r#"{"model":"m","messages":[{"role":"user","content":"a secret"}],"prompt":"p","input":["i"],"max_tokens":5}"#;

#[test]
fn a_truncated_body_is_refused_at_every_byte_and_not_repeated() {
    for dialect in all() {
        for end in 0..BODY.len() {
            let refusal = call(&*dialect, &BODY[..end]).unwrap_err();
            assert!(!refusal.message.contains("secret"), "{}: {}", dialect.path(), refusal.message);
        }
    }
}

#[test]
fn a_field_that_stands_twice_is_refused() {
    let twice = format!(r#"{},"max_tokens":6}}"#, &BODY[..BODY.len() - 1]);
    for dialect in all() {
        assert!(call(&*dialect, &twice).is_err(), "{}", dialect.path());
    }
}

#[test]
fn half_a_pair_of_surrogates_is_refused_by_its_name() {
    // What is left of an emoji where a text was cut between its halves.
    let half = r#"{"model":"m","messages":[{"role":"user","content":"\ud83d"}],"prompt":"\ud83d","input":"\ud83d","max_tokens":5}"#;
    for dialect in all() {
        if dialect.is_known() {
            let refusal = call(&*dialect, half).unwrap_err();
            assert!(refusal.message.contains("Unicode"), "{}: {}", dialect.path(), refusal.message);
        }
    }
}

#[test]
fn nesting_without_end_is_refused() {
    for (open, close) in [("[", "]"), (r#"{"type":"#, "}"), (r#"{"content":"#, "}")] {
        let deep = format!("[{}0{}]", open.repeat(50_000), close.repeat(50_000));
        for dialect in all() {
            let body = format!(r#"{{"model":"m","messages":{deep},"prompt":{deep},"input":{deep},"system":{deep}}}"#);
            assert!(call(&*dialect, &body).is_err(), "{}", dialect.path());
            // In an answer it is garbage like any other.
            dialect.event(body.as_bytes());
            dialect.text_bytes(body.as_bytes());
            dialect.report(format!(r#"{{"usage":{deep}}}"#).as_bytes());
        }
    }
}

/// Pieces of requests, answers and events, in any order.
fn pieces() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "null",
        "true",
        "-1",
        "0",
        "1e99",
        "18446744073709551615",
        "\"model\"",
        "\"m\"",
        "\"type\"",
        "\"usage\"",
        "\"total_tokens\"",
        "\"input_tokens\"",
        "\"choices\"",
        "\"messages\"",
        "\"message_start\"",
        "\"message\"",
        "\"response.completed\"",
        "\"response\"",
        "\"delta\"",
        "\"text\"",
        "\\u00",
        "--b\r\n",
        "\r\n\r\n",
        "Content-Disposition: form-data; name=\"model\"",
        "\u{1F600}",
    ]);
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn nothing_that_is_read_panics(text in pieces()) {
        for dialect in all() {
            let _ = call(&*dialect, &text);
            dialect.event(text.as_bytes());
            dialect.text_bytes(text.as_bytes());
            if let Report::Told(tally) = dialect.report(text.as_bytes()) {
                tally.then(tally).usage();
            }
        }
    }

    #[test]
    fn usage_is_what_was_said_or_a_lie(input in -9i64..1 << 29, output in -9i64..1 << 29, cached in -9i64..1 << 29) {
        let answer = format!(r#"{{"usage":{{"input_tokens":{input},"output_tokens":{output},"cache_read_input_tokens":{cached}}}}}"#);
        let possible = |number: i64| (0..=1 << 28).contains(&number);
        match AnthropicMessages.report(answer.as_bytes()) {
            Report::Told(tally) => {
                let usage = tally.usage().unwrap();
                prop_assert!([input, output, cached].into_iter().all(possible));
                prop_assert_eq!(usage.total as i64, input + output + cached);
            }
            other => {
                prop_assert_eq!(other, Report::Lie);
                prop_assert!(![input, output, cached].into_iter().all(possible));
            }
        }
    }
}

#[test]
fn an_upstream_is_asked_for_the_model_by_its_own_name() {
    let json = call(&OpenAiChat, r#"{"model":"m", "messages":[{"role":"user","content":"x"}],"n": 1}"#).unwrap();
    assert_eq!(json.body_for(None), json.body);
    let expected = r#"{"messages":[{"role":"user","content":"x"}],"n":1,"model":"a\"b"}"#;
    assert_eq!(json.body_for(Some("a\"b")), expected.as_bytes());
    let form = |model: &str| {
        format!(
            "--b\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nmodel\r\n--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n--b--\r\n"
        )
    };
    let call = call(&Other::new("/audio/transcriptions", "multipart/form-data; boundary=b"), &form("m")).unwrap();
    assert_eq!(call.model, "m");
    assert_eq!(call.body_for(Some("whisper-1")), form("whisper-1").as_bytes());
}
