//! Payloads: what kind of bytes a frame holds, and how bytes that do not fit one frame are
//! split and put together again.
//!
//! Knows kinds, fragments and the bounds of the buffer. Must not know what the bytes mean,
//! sockets or clocks. The invariant it keeps: the buffer never holds more than
//! [`MAX_PARTIALS`] unfinished messages, [`MAX_PARTIALS_PER_SENDER`] of one sender, none
//! older than [`MAX_PARTIAL_AGE`] once a younger one arrives; a message comes out at most
//! once for each time that all of its fragments came in.
//!
//! # Layout
//!
//! ```text
//! payload  = (empty: a heartbeat) | kind:1 bytes | 0 kind:1 id:4 index:1 count:1 bytes
//! kind     = 1 messages | 2 chitchat
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use super::frame::{MAX_PAYLOAD, Rejected};
use crate::ledger::{ReplicaId, Timestamp};

/// The most fragments of one message.
pub const MAX_FRAGMENTS: usize = 64;

/// The most bytes that can be sent at all: 69,632 at 1,200 a datagram, more than chitchat's
/// own bound of 65,507.
pub const MAX_SPLIT: usize = MAX_FRAGMENTS * FRAGMENT;

/// The most unfinished messages in the buffer; 8.9 MB if all were of the largest kind and
/// lacked one fragment, which takes 128 senders that hold the cluster key.
pub const MAX_PARTIALS: usize = 128;

/// The most unfinished messages of one sender: a roster message, chitchat's three at once,
/// and as many again overtaken by newer ones.
pub const MAX_PARTIALS_PER_SENDER: usize = 8;

/// How long an unfinished message is waited for: fragments leave back to back, so 5 s is
/// more than any network holds one of them back.
pub const MAX_PARTIAL_AGE: Duration = Duration::from_secs(5);

/// What the bytes of a payload are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Our messages, one after another ([`wire`](super::wire)).
    Messages = 1,
    /// One message of chitchat's, in its own encoding.
    Chitchat = 2,
}

impl Kind {
    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Messages),
            2 => Some(Self::Chitchat),
            _ => None,
        }
    }
}

/// Bytes that are longer than [`MAX_SPLIT`]. Nothing was sent; they travel by no path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes are more than the {MAX_SPLIT} that 64 fragments carry")]
pub struct TooLong(pub usize);

/// Returns the payloads that carry these bytes: one, or fragments numbered `id`.
///
/// # Errors
/// If more than [`MAX_FRAGMENTS`] would be needed.
pub fn split(kind: Kind, id: u32, bytes: &[u8]) -> Result<Vec<Vec<u8>>, TooLong> {
    if bytes.len() < MAX_PAYLOAD {
        let mut payload = Vec::with_capacity(1 + bytes.len());
        payload.push(kind as u8);
        payload.extend_from_slice(bytes);
        return Ok(vec![payload]);
    }
    if bytes.len() > MAX_SPLIT {
        return Err(TooLong(bytes.len()));
    }
    let count = bytes.len().div_ceil(FRAGMENT) as u8;
    let payloads = bytes.chunks(FRAGMENT).zip(0u8..).map(|(part, index)| {
        let mut payload = Vec::with_capacity(FRAGMENT_HEADER + part.len());
        payload.extend_from_slice(&[FRAGMENT_KIND, kind as u8]);
        payload.extend_from_slice(&id.to_be_bytes());
        payload.extend_from_slice(&[index, count]);
        payload.extend_from_slice(part);
        payload
    });
    Ok(payloads.collect())
}

/// Returns what a payload is of, whole or a fragment; `None` if it is empty or of no kind.
pub fn kind(payload: &[u8]) -> Option<Kind> {
    match payload {
        [FRAGMENT_KIND, kind, ..] | [kind, ..] => Kind::from_byte(*kind),
        [] => None,
    }
}

/// Puts payloads together again.
#[derive(Debug, Default)]
pub struct Assembler {
    partials: BTreeMap<(ReplicaId, u32), Partial>,
    /// Rises with every partial, so that the oldest is known without a clock that may step.
    arrivals: u64,
}

/// What a payload came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Assembled {
    /// A heartbeat: nobody had anything to say.
    Empty,
    /// A fragment; others are missing.
    Partial,
    /// All there.
    Whole(Kind, Vec<u8>),
}

impl Assembler {
    /// Takes a payload of a wire version.
    ///
    /// # Errors
    /// If it is of no kind, or a fragment that does not fit those of its number: one of another
    /// version neither.
    pub fn accept(
        &mut self,
        from: ReplicaId,
        version: u8,
        payload: &[u8],
        now: Timestamp,
    ) -> Result<Assembled, Rejected> {
        match payload {
            [] => Ok(Assembled::Empty),
            [FRAGMENT_KIND, fragment @ ..] => self.accept_fragment(from, version, fragment, now),
            [kind, bytes @ ..] => {
                let kind = Kind::from_byte(*kind).ok_or(Rejected::Payload)?;
                Ok(Assembled::Whole(kind, bytes.to_vec()))
            }
        }
    }

    fn accept_fragment(
        &mut self,
        from: ReplicaId,
        version: u8,
        fragment: &[u8],
        now: Timestamp,
    ) -> Result<Assembled, Rejected> {
        let Some(([kind, id @ .., index, count], part)) = fragment.split_first_chunk::<7>() else {
            return Err(Rejected::Fragment);
        };
        let kind = Kind::from_byte(*kind).ok_or(Rejected::Fragment)?;
        let (id, index, count) = (u32::from_be_bytes(*id), usize::from(*index), usize::from(*count));
        if !(2..=MAX_FRAGMENTS).contains(&count) || index >= count {
            return Err(Rejected::Fragment);
        }
        // All but the last are full, so that the parts put together have one possible length.
        if part.is_empty() || part.len() > FRAGMENT || (index + 1 < count && part.len() < FRAGMENT) {
            return Err(Rejected::Fragment);
        }
        if !self.partials.contains_key(&(from, id)) {
            self.make_room(from, now);
            self.arrivals += 1;
            let (arrival, parts) = (self.arrivals, vec![None; count]);
            let partial = Partial { kind, version, arrival, since: now, missing: count, parts };
            self.partials.insert((from, id), partial);
        }
        let Some(partial) = self.partials.get_mut(&(from, id)) else {
            return Err(Rejected::Fragment);
        };
        if (partial.kind, partial.version, partial.parts.len()) != (kind, version, count) {
            return Err(Rejected::Fragment);
        }
        if partial.parts[index].is_none() {
            partial.parts[index] = Some(part.into());
            partial.missing -= 1;
        }
        if partial.missing > 0 {
            return Ok(Assembled::Partial);
        }
        let parts = self.partials.remove(&(from, id)).map_or_else(Vec::new, |partial| partial.parts);
        Ok(Assembled::Whole(kind, parts.into_iter().flatten().flatten().collect()))
    }

    /// Drops what is too old, then the oldest, until one more fits both bounds.
    fn make_room(&mut self, from: ReplicaId, now: Timestamp) {
        self.partials.retain(|_, partial| now.since(partial.since) <= MAX_PARTIAL_AGE);
        let of_sender = self.partials.range((from, 0)..=(from, u32::MAX));
        if of_sender.clone().count() >= MAX_PARTIALS_PER_SENDER {
            let oldest = of_sender.min_by_key(|(_, partial)| partial.arrival).map(|(key, _)| *key);
            oldest.and_then(|key| self.partials.remove(&key));
        }
        if self.partials.len() >= MAX_PARTIALS {
            let oldest = self.partials.iter().min_by_key(|(_, partial)| partial.arrival).map(|(key, _)| *key);
            oldest.and_then(|key| self.partials.remove(&key));
        }
    }
}

/// A message that lacks fragments.
#[derive(Debug)]
struct Partial {
    kind: Kind,
    version: u8,
    arrival: u64,
    since: Timestamp,
    missing: usize,
    parts: Vec<Option<Box<[u8]>>>,
}

const FRAGMENT_KIND: u8 = 0;
const FRAGMENT_HEADER: usize = 1 + 1 + 4 + 1 + 1;

/// The bytes of a full fragment.
const FRAGMENT: usize = MAX_PAYLOAD - FRAGMENT_HEADER;

#[cfg(test)]
#[path = "fragment_tests.rs"]
mod tests;
