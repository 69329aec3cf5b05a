//! Server-sent events, cut out of a stream of bytes.
//!
//! Knows where an event ends and what its data is. Must not know what it means. The
//! invariants it keeps: bytes that are passed on are passed on unchanged and in order,
//! and no more than one event is held back, up to a bound.

use std::borrow::Cow;

use bytes::Bytes;

/// The longest event that is looked into; longer ones pass unread.
const MAX_EVENT: usize = 1 << 20;

/// Cuts a stream into events.
#[derive(Debug, Default)]
pub struct Events {
    pending: Vec<u8>,
    /// How much of `pending` holds no end of an event.
    scanned: usize,
}

impl Events {
    /// Takes in bytes and returns those that complete events, without the events that
    /// `keep` refuses. `keep` is shown the data of each event; of one that is too long,
    /// all of it that came.
    pub fn push(&mut self, bytes: Bytes, mut keep: impl FnMut(&[u8]) -> bool) -> Bytes {
        // Most pieces are whole events, all of which pass: they are not copied.
        let mut bytes = match self.pending.is_empty() {
            true => bytes,
            false => {
                self.pending.extend_from_slice(&bytes);
                Bytes::from(std::mem::take(&mut self.pending))
            }
        };
        // What passes when something before it does not.
        let mut rest = None::<Vec<u8>>;
        let (mut start, mut scanned) = (0, self.scanned);
        while let Some(end) = event_end(&bytes, start, scanned) {
            let event = &bytes[start..end];
            let data = data(event);
            let passes = data.is_empty() || keep(&data);
            match &mut rest {
                Some(rest) if passes => rest.extend_from_slice(event),
                None if !passes => rest = Some(bytes[..start].to_vec()),
                _ => {}
            }
            (start, scanned) = (end, end);
        }
        if bytes.len() - start > MAX_EVENT {
            // It passes whatever it is: the rest of it will.
            keep(&bytes[start..]);
            if let Some(rest) = &mut rest {
                rest.extend_from_slice(&bytes[start..]);
            }
            start = bytes.len();
        }
        self.pending = bytes[start..].to_vec();
        self.scanned = self.pending.len().saturating_sub(3);
        bytes.truncate(start);
        rest.map_or(bytes, Bytes::from)
    }

    /// Returns what is held back: an event that nothing ended but the stream itself, which
    /// `keep` is shown, too.
    pub fn rest(&mut self, mut keep: impl FnMut(&[u8]) -> bool) -> Bytes {
        let rest = std::mem::take(&mut self.pending);
        let data = data(&rest);
        if data.is_empty() || keep(&data) { Bytes::from(rest) } else { Bytes::new() }
    }
}

/// Returns where the event that begins at `start` ends: after an empty line, of which there is none
/// before `scanned`.
fn event_end(bytes: &[u8], start: usize, scanned: usize) -> Option<usize> {
    let ends = |&at: &usize| {
        let line = &bytes[start..at];
        bytes[at] == b'\n' && (line.is_empty() || line.ends_with(b"\n") || line.ends_with(b"\n\r"))
    };
    (scanned.max(start)..bytes.len()).find(ends).map(|at| at + 1)
}

/// Returns the data of an event: its `data` lines, joined.
fn data(event: &[u8]) -> Cow<'_, [u8]> {
    let mut lines = event
        .split(|byte| *byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .filter_map(|line| line.strip_prefix(b"data:"))
        .map(|line| line.strip_prefix(b" ").unwrap_or(line));
    let first = lines.next().unwrap_or_default();
    let Some(second) = lines.next() else { return Cow::Borrowed(first) };
    let mut joined = first.to_vec();
    for line in std::iter::once(second).chain(lines) {
        joined.push(b'\n');
        joined.extend_from_slice(line);
    }
    Cow::Owned(joined)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns what passes and the data seen when `text` arrives in pieces of `size`.
    fn run(text: &str, size: usize, hide: &str) -> (String, Vec<String>) {
        let (mut events, mut passed, mut seen) = (Events::default(), Vec::new(), Vec::new());
        for piece in text.as_bytes().chunks(size) {
            let bytes = events.push(Bytes::copy_from_slice(piece), |data| {
                seen.push(String::from_utf8_lossy(data).into_owned());
                data != hide.as_bytes()
            });
            passed.extend_from_slice(&bytes);
        }
        passed.extend_from_slice(&events.rest(|data| {
            seen.push(String::from_utf8_lossy(data).into_owned());
            true
        }));
        (String::from_utf8(passed).unwrap(), seen)
    }

    #[test]
    fn events_pass_unchanged_however_they_arrive() {
        let text = ": comment\n\nevent: a\ndata: one\n\ndata:two\r\n\r\ndata: th\ndata: ree\n\n\n\ndata: cut";
        for size in 1..text.len() {
            let (passed, seen) = run(text, size, "nothing");
            assert_eq!(passed, text, "{size}");
            assert_eq!(seen, ["one", "two", "th\nree", "cut"], "{size}");
        }
    }

    #[test]
    fn a_refused_event_is_taken_out_whole() {
        for size in 1..20 {
            let (passed, _) = run("data: a\n\ndata: b\n\ndata: c\n\n", size, "b");
            assert_eq!(passed, "data: a\n\ndata: c\n\n", "{size}");
        }
    }

    #[test]
    fn an_endless_event_passes_and_counts() {
        let mut events = Events::default();
        let mut seen = 0;
        let bytes = events.push(vec![b'x'; MAX_EVENT + 1].into(), |data| {
            seen += data.len();
            false
        });
        assert_eq!((bytes.len(), seen), (MAX_EVENT + 1, MAX_EVENT + 1));
    }
}
