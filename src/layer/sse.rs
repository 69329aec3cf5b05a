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
    /// An event that has not ended: no end of one is in it.
    pending: Vec<u8>,
    /// Whether the last event passed, if all that came since is nothing and it ended with a CR: an LF
    /// that comes now belongs to it.
    half: Option<bool>,
}

impl Events {
    /// Takes in bytes and returns those that complete events, without the events that
    /// `keep` refuses. `keep` is shown the data of each event; of one that is too long,
    /// all of it that came.
    ///
    /// However small the pieces are, an end is looked for once in each byte, and each is copied a few times at most.
    pub fn push(&mut self, bytes: Bytes, mut keep: impl FnMut(&[u8]) -> bool) -> Bytes {
        let (mut bytes, mut next) = (bytes, None);
        // Most pieces are whole events, all of which pass: they are not copied.
        let seen = self.pending.len();
        if seen > 0 {
            self.pending.extend_from_slice(&bytes);
            next = event_end(&self.pending, 0, seen);
            if next.is_none() && self.pending.len() <= MAX_EVENT {
                return Bytes::new();
            }
            bytes = Bytes::from(std::mem::take(&mut self.pending));
        }
        // What passes when something before it does not.
        let mut rest = None::<Vec<u8>>;
        let mut start = 0;
        if seen == 0 {
            if let (Some(passed), Some(first)) = (self.half, bytes.first()) {
                self.half = None;
                if *first == b'\n' {
                    start = 1;
                    rest = (!passed).then(Vec::new);
                }
            }
            next = event_end(&bytes, start, start);
        }
        while let Some(end) = next {
            let event = &bytes[start..end];
            let data = data(event);
            let passes = data.is_empty() || keep(&data);
            match &mut rest {
                Some(rest) if passes => rest.extend_from_slice(event),
                None if !passes => rest = Some(bytes[..start].to_vec()),
                _ => {}
            }
            self.half = (end == bytes.len() && bytes[end - 1] == b'\r').then_some(passes);
            start = end;
            next = event_end(&bytes, start, start);
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

/// Returns where the event that begins at `start` ends: after an empty line, which does not end before
/// `scanned`. Lines end in LF, CR or both, whichever comes.
fn event_end(bytes: &[u8], start: usize, scanned: usize) -> Option<usize> {
    let ends_empty_line = |&at: &usize| match bytes[at] {
        // After a CR it is the other half of the same end.
        b'\n' => at == start || bytes[at - 1] == b'\n',
        b'\r' => at == start || matches!(bytes[at - 1], b'\n' | b'\r'),
        _ => false,
    };
    let at = (scanned..bytes.len()).find(ends_empty_line)?;
    Some(if bytes[at..].starts_with(b"\r\n") { at + 2 } else { at + 1 })
}

/// Returns the data of an event: its `data` lines, joined.
fn data(event: &[u8]) -> Cow<'_, [u8]> {
    let mut lines = event
        // Between a CR and its LF there is a line that is none, and says nothing.
        .split(|byte| matches!(byte, b'\n' | b'\r'))
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
    use std::cell::Cell;

    use allocation_counter::measure;
    use proptest::prelude::*;

    use super::*;

    /// Returns what passes and the data seen when these pieces arrive, but for the end of the stream.
    fn pushed<'a>(
        events: &mut Events,
        pieces: impl IntoIterator<Item = &'a [u8]>,
        hide: &str,
    ) -> (String, Vec<String>) {
        let (mut passed, mut seen) = (Vec::new(), Vec::new());
        for piece in pieces {
            let bytes = events.push(Bytes::copy_from_slice(piece), |data| {
                seen.push(String::from_utf8_lossy(data).into_owned());
                data != hide.as_bytes()
            });
            passed.extend_from_slice(&bytes);
        }
        (String::from_utf8(passed).unwrap(), seen)
    }

    /// Returns what passes and the data seen of a whole stream that comes in these pieces.
    fn run<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, hide: &str) -> (String, Vec<String>) {
        let mut events = Events::default();
        let (mut passed, mut seen) = pushed(&mut events, pieces, hide);
        let rest = events.rest(|data| {
            seen.push(String::from_utf8_lossy(data).into_owned());
            true
        });
        passed.push_str(std::str::from_utf8(&rest).unwrap());
        (passed, seen)
    }

    /// Returns the data of every event of a stream, by the standard and not by what is tested.
    fn read(text: &str) -> Vec<String> {
        let plain = text.replace("\r\n", "\n").replace('\r', "\n");
        let (mut seen, mut data) = (Vec::new(), Vec::new());
        for line in plain.split('\n').chain([""]) {
            if let Some(value) = line.strip_prefix("data:") {
                data.push(value.strip_prefix(' ').unwrap_or(value));
            }
            if line.is_empty() {
                seen.extend(Some(std::mem::take(&mut data).join("\n")).filter(|data| !data.is_empty()));
            }
        }
        seen
    }

    #[test]
    fn events_pass_unchanged_however_they_arrive() {
        let text = ": comment\n\nevent: a\ndata: one\n\ndata:two\r\n\r\ndata: th\ndata: ree\n\n\n\ndata: cut";
        for size in 1..text.len() {
            let (passed, seen) = run(text.as_bytes().chunks(size), "nothing");
            assert_eq!(passed, text, "{size}");
            assert_eq!(seen, ["one", "two", "th\nree", "cut"], "{size}");
        }
    }

    #[test]
    fn a_refused_event_is_taken_out_whole() {
        for (end, size) in ["\n", "\r", "\r\n"].into_iter().flat_map(|end| (1..20).map(move |size| (end, size))) {
            let text = "data: a\n\ndata: b\n\ndata: c\n\n".replace('\n', end);
            let (passed, _) = run(text.as_bytes().chunks(size), "b");
            assert_eq!(passed, "data: a\n\ndata: c\n\n".replace('\n', end), "{size}");
        }
    }

    #[test]
    fn an_event_whose_lines_end_in_bare_carriage_returns_is_not_held_back() {
        let mut events = Events::default();
        let (passed, seen) = pushed(&mut events, [&b"data: a\r\rdata:"[..], b" b\r", b"\r"], "");
        assert_eq!((passed.as_str(), seen), ("data: a\r\rdata: b\r\r", vec!["a".into(), "b".into()]));
        // What follows is a new event, unless it is the other half of a line's end.
        let (passed, seen) = pushed(&mut events, [&b"\ndata: c\n\r"[..], b"\n"], "");
        assert_eq!((passed.as_str(), seen), ("\ndata: c\n\r\n", vec!["c".into()]));
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_events_and_every_byte(
            parts in prop::collection::vec(
                prop::sample::select(vec!["\n", "\r", "\r\n", "data: a", "data:", "data", " ", "b", "data: hide", ":c", "id: 7"]),
                0..60,
            ),
            cuts in prop::collection::vec(0..200_usize, 0..12),
        ) {
            let text = parts.concat();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces = || cuts.windows(2).map(|cut| &text.as_bytes()[cut[0]..cut[1]]);
            let (passed, seen) = run(pieces(), "nothing");
            prop_assert_eq!(&passed, &text);
            prop_assert_eq!(seen, read(&text));
            let whole = run([text.as_bytes()], "hide");
            prop_assert_eq!(run(pieces(), "hide"), whole.clone());
            prop_assert_eq!(run(text.as_bytes().chunks(1), "hide"), whole);
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

    /// Returns how many allocations it takes to read a stream in these pieces, and of how many bytes.
    fn allocated(text: &str, size: usize) -> (u64, u64) {
        let source = Bytes::copy_from_slice(text.as_bytes());
        let pieces: Vec<_> =
            (0..text.len()).step_by(size).map(|at| source.slice(at..text.len().min(at + size))).collect();
        let (mut events, came) = (Events::default(), Cell::new(0));
        let allocations = measure(|| {
            for piece in pieces {
                came.set(came.get() + events.push(piece, |_| true).len());
            }
        });
        assert_eq!(came.get(), text.len());
        (allocations.count_total, allocations.bytes_total)
    }

    #[test]
    fn a_long_event_in_small_pieces_is_not_copied_with_every_piece() {
        let length: u64 = 64 << 10;
        let text = format!("data: {}\n\n", "x".repeat(64 << 10));
        for size in [1, 7, 1_024] {
            let (_, bytes) = allocated(&text, size);
            // A buffer that doubles: all of them are twice the last, which is twice its contents at most.
            assert!(bytes < 5 * length, "{bytes} bytes in pieces of {size}");
        }
    }

    #[test]
    fn whole_events_are_passed_on_without_an_allocation() {
        let delta = "event: delta\ndata: {\"text\":\"hello\"}\n\n";
        assert_eq!(allocated(&delta.repeat(100), delta.len()), (0, 0));
        assert_eq!(allocated(&delta.repeat(100), 4 * delta.len()), (0, 0));
    }
}
