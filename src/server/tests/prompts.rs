//! What bounds a prompt: bytes, or tokens where the model is known.

use super::*;

/// A prompt of so many words of 14 bytes, each of them one token.
fn words(model: &str, count: usize) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": " international".repeat(count)}], "max_tokens": 10})
}

#[cfg(feature = "tokenizer")]
#[tokio::test]
async fn a_prompt_of_a_known_model_is_bounded_by_its_tokens() {
    // Short, and longer than what is counted at once.
    for count in [100, 600] {
        for (deployment, status) in [
            ("tokenizer: o200k", StatusCode::OK),
            ("tokenizer: cl100k", StatusCode::OK),
            ("upstream_model: gpt-4o-mini", StatusCode::OK),
            ("tokenizer: bytes, upstream_model: gpt-4o-mini", StatusCode::TOO_MANY_REQUESTS),
            ("upstream_model: llama-3", StatusCode::TOO_MANY_REQUESTS),
        ] {
            let bench = Bench::with(Extra { deployment, ..Extra::default() }).await;
            let answer = bench.chat(words("m", count), &[("x-stub-fault", "no-usage")]).await;
            assert_eq!(answer.status, status, "{deployment}: {}", answer.text);
            if status == StatusCode::OK {
                let bound = bench.tokens() - 10;
                assert!((count as u64..count as u64 * 11 / 10 + 20).contains(&bound), "{deployment}: {bound}");
            }
        }
    }
}

#[cfg(feature = "tokenizer")]
#[tokio::test]
async fn every_deployment_of_a_model_bounds_by_its_own() {
    // The first is too small by bytes, the second is not by tokens.
    let more = "  - { id: b, model: m, upstream: 'STUB/v1', upstream_model: gpt-4o, order: 2, limits: [{ unit: tokens, \
                amount: 1000, window: 60s }] }\n";
    let bench = Bench::with(Extra { more, ..Extra::default() }).await;
    assert_eq!(bench.chat(words("m", 300), &[]).await.status, StatusCode::OK);
    assert_eq!(bench.tokens(), 0);
}

#[tokio::test]
async fn a_model_that_is_named_like_anything_on_azure_is_bounded_by_bytes() {
    let text = |upstream: &str| {
        format!(
            "deployments: [{{ model: gpt-4o, upstream: '{upstream}', limits: [{{ unit: tokens, amount: 9, window: 60s }}] }}]"
        )
    };
    for (upstream, expected) in [
        ("https://api.openai.com/v1", Tokenizer::O200k),
        ("https://x.openai.azure.com/openai/deployments/gpt-4o?api-version=1", Tokenizer::Bytes),
        ("https://gateway.example/openai/deployments/gpt-4o?api-version=1", Tokenizer::Bytes),
    ] {
        let config = parse(&text(upstream), "test.yaml", &|_| None, &Flags::default()).unwrap();
        assert_eq!(config.deployments[0].tokenizer, expected, "{upstream}");
    }
}

#[test]
fn a_tokenizer_that_is_none_is_refused_by_its_name() {
    let text = "deployments: [{ model: m, upstream: 'https://h.example/v1', tokenizer: claude, limits: [{ unit: tokens, \
                amount: 9, window: 60s }] }]";
    let told = format!("{:?}", parse(text, "test.yaml", &|_| None, &Flags::default()).unwrap_err());
    assert!(told.contains("auto, o200k, cl100k, bytes"), "{told}");
}
