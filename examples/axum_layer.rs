//! The limiter as middleware of somebody else's axum service.
//!
//! `cargo run --example axum_layer` asks a made-up model twice: the first answer is charged
//! with what it says it used, the second request is larger than the limit and never reaches
//! the model.

use std::error::Error;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, header};
use axum::routing::post;
use quotum::layer::{LimitLayer, OpenAiChat};
use quotum::{Limiter, Quota};
use tower::ServiceExt;

/// Whatever answers: here a model that says one word, elsewhere your own service.
async fn chat() -> ([(header::HeaderName, &'static str); 1], &'static str) {
    let answer = r#"{"object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}}"#;
    ([(header::CONTENT_TYPE, "application/json")], answer)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    for line in run().await? {
        println!("{line}");
    }
    Ok(())
}

/// Asks twice and returns what was answered.
///
/// # Errors
/// If the limiter cannot be built or an answer cannot be read.
pub(crate) async fn run() -> Result<Vec<String>, Box<dyn Error>> {
    let limiter = Limiter::builder().deployment("gpt-4o", [Quota::tokens(1_000).per_minute()]).build()?;
    let handle = limiter.handle("gpt-4o")?;
    let limit = LimitLayer::new(OpenAiChat, handle);
    let router: Router = Router::new().route("/v1/chat/completions", post(chat).layer(limit));

    let mut lines = Vec::new();
    for max_tokens in [500, 995] {
        let question = format!(
            r#"{{"model": "gpt-4o", "max_tokens": {max_tokens}, "messages": [{{"role": "user", "content": "Hi"}}]}}"#
        );
        let request = Request::post("/v1/chat/completions").body(Body::from(question))?;
        let response = router.clone().oneshot(request).await?;
        let status = response.status();
        // The permit is in the body: read to its end, it is settled.
        to_bytes(response.into_body(), 1 << 20).await?;
        let used = limiter.handle("gpt-4o")?.standings()[0].used;
        lines.push(format!("max_tokens {max_tokens}: {status}, {used} of 1000 tokens used"));
    }
    Ok(lines)
}
