//! Bytes as text, since chitchat's values are strings: base64 with the alphabet of URLs,
//! without padding (RFC 4648, section 5).
//!
//! Knows nothing else, and must not. The invariant it keeps: what was encoded is decoded to
//! the same bytes, and no other text is.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

pub(crate) const fn encoded_len(bytes: usize) -> usize {
    (bytes * 8).div_ceil(6)
}

pub(crate) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(encoded_len(bytes.len()));
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0u32, |group, byte| (group << 8) | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for at in 0..=chunk.len() {
            text.push(char::from(ALPHABET[(group >> (18 - 6 * at)) as usize & 63]));
        }
    }
    text
}

pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    for chunk in text.as_bytes().chunks(4) {
        let mut group = 0;
        for at in 0..4 {
            group = (group << 6) | chunk.get(at).map_or(Some(0), |digit| value(*digit))?;
        }
        let whole = chunk.len() * 6 / 8;
        if chunk.len() == 1 || group & (0x00ff_ffff >> (8 * whole)) != 0 {
            return None;
        }
        bytes.extend_from_slice(&group.to_be_bytes()[1..=whole]);
    }
    Some(bytes)
}

fn value(digit: u8) -> Option<u32> {
    ALPHABET.iter().position(|other| *other == digit).map(|value| value as u32)
}
