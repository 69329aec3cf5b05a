//! What happened in a run: a rolling hash always, the lines only when somebody reads them.
//!
//! Knows order and time. Must not know what an event means. The invariant it keeps: every
//! event enters the hash, in order, so two runs with one hash did the same things at the
//! same virtual times.

use crate::Micros;
use crate::rng::mix;

/// The trace of one run.
#[derive(Debug)]
pub(crate) struct Trace {
    hash: u64,
    events: u64,
    lines: Option<Vec<Line>>,
}

/// One line of a full trace.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) at: Micros,
    /// Which replica, by its number in the run; `None` is the world around them.
    pub(crate) replica: Option<usize>,
    pub(crate) text: String,
}

impl Trace {
    pub(crate) fn new(full: bool) -> Self {
        Self { hash: 0x9075_u64, events: 0, lines: full.then(Vec::new) }
    }

    /// Adds numbers to the hash.
    pub(crate) fn note(&mut self, numbers: &[u64]) {
        self.events += 1;
        for number in numbers {
            self.hash = mix(self.hash ^ number).wrapping_add(self.events);
        }
    }

    /// Adds bytes to the hash.
    pub(crate) fn note_bytes(&mut self, bytes: &[u8]) {
        let mut chunks = bytes.chunks_exact(8);
        for chunk in &mut chunks {
            let word = u64::from_le_bytes(chunk.try_into().expect("a chunk of eight is eight"));
            self.hash = (self.hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        for byte in chunks.remainder() {
            self.hash = (self.hash.rotate_left(5) ^ u64::from(*byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }

    /// Adds a line if anybody reads them.
    pub(crate) fn line(&mut self, at: Micros, replica: Option<usize>, text: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.lines {
            lines.push(Line { at, replica, text: text() });
        }
    }

    pub(crate) fn hash(&self) -> u64 {
        mix(self.hash ^ self.events)
    }

    pub(crate) fn into_lines(self) -> Vec<Line> {
        self.lines.unwrap_or_default()
    }
}
