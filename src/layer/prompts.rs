//! What bounds a request's prompt, for each tokenizer that a deployment counts with.
//!
//! Knows where counting may take place. Must not know how text is counted or who asks. The
//! invariant it keeps: no runtime thread counts for longer than a short prompt takes, and
//! the processor is never taken by prompts alone.

use std::sync::{Arc, LazyLock};

use tokio::sync::Semaphore;

use super::dialect::{Call, Dialect};
use super::tokenizer::Tokenizer;

/// The longest body that is counted where it was read: 30 us of English, 5 ms of the worst
/// text there is (docs/decisions/0010). A longer one is counted aside.
const AT_ONCE: usize = 1 << 10;

/// How many prompts are counted aside at once: half of the processors, so that long prompts
/// delay one another and nobody else.
static COUNTERS: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(std::thread::available_parallelism().map_or(1, |all| all.get().div_ceil(2))));

/// The bounds of one prompt.
#[derive(Clone, Copy, Debug)]
pub struct Prompts {
    bytes: u64,
    o200k: Option<u64>,
    cl100k: Option<u64>,
}

impl Prompts {
    /// Returns the bound by bytes alone.
    pub fn new(call: &Call) -> Self {
        Self { bytes: call.prompt, o200k: None, cl100k: None }
    }

    /// Returns the bounds by these tokenizers. Whoever stops waiting has changed nothing.
    pub async fn count(dialect: &Arc<dyn Dialect>, call: &Call, wanted: impl IntoIterator<Item = Tokenizer>) -> Self {
        let (mut o200k, mut cl100k) = (false, false);
        for tokenizer in wanted {
            o200k |= tokenizer == Tokenizer::O200k;
            cl100k |= tokenizer == Tokenizer::Cl100k;
        }
        let mut prompts = Self::new(call);
        if o200k {
            prompts.o200k = count(dialect, call, Tokenizer::O200k).await;
        }
        if cl100k {
            prompts.cl100k = count(dialect, call, Tokenizer::Cl100k).await;
        }
        prompts
    }

    /// Returns the bound by a tokenizer; by bytes if it was not counted.
    pub fn by(&self, tokenizer: Tokenizer) -> u64 {
        let counted = match tokenizer {
            Tokenizer::Bytes => None,
            Tokenizer::O200k => self.o200k,
            Tokenizer::Cl100k => self.cl100k,
        };
        counted.unwrap_or(self.bytes)
    }
}

async fn count(dialect: &Arc<dyn Dialect>, call: &Call, tokenizer: Tokenizer) -> Option<u64> {
    if call.body.len() <= AT_ONCE && tokenizer.is_loaded() {
        return Some(dialect.prompt(call, tokenizer));
    }
    let (dialect, call) = (dialect.clone(), call.clone());
    let permit = COUNTERS.acquire().await.ok()?;
    let counted = tokio::task::spawn_blocking(move || {
        let _until_counted = permit;
        dialect.prompt(&call, tokenizer)
    });
    counted.await.ok()
}
