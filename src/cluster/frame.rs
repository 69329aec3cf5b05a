//! Authenticated frames: what a datagram is, who sealed it, and when.
//!
//! Knows keys, headers and the reasons for which a datagram is thrown away. Must not know
//! sockets, what a payload means, or where time and randomness come from: both are
//! arguments. The invariant it keeps: nothing of a datagram is believed before its seal
//! was opened with a key of the ring, and no key ever appears in a log or an error.
//!
//! # Layout
//!
//! ```text
//! magic:3 version:1 key_id:4 cluster:8 sender:16 receiver:16 sent_at:8 echo:8 nonce:24
//! | sealed payload | tag:16
//! ```
//! Everything before the bar is authenticated with the payload. Integers are big-endian;
//! a receiver of zero is "whoever is there", an echo of zero is "heard nothing". The header is
//! the same in every version; its version is that of the payload.

use std::fmt;
use std::time::Duration;

use chacha20poly1305::aead::AeadInOut;
use chacha20poly1305::{KeyInit, Tag, XChaCha20Poly1305, XNonce};

use super::wire::{OLDEST_WIRE_VERSION, WIRE_VERSION};
use crate::ledger::{Contact, EPSILON, LimitId, ReplicaId, Timestamp};

/// The most bytes of a datagram: what overlays and tunnels carry without IP fragments,
/// which they lose.
pub const MAX_DATAGRAM: usize = 1_200;

/// The bytes of a frame besides its payload.
pub const OVERHEAD: usize = HEADER + TAG;

/// The most bytes of a payload.
pub const MAX_PAYLOAD: usize = MAX_DATAGRAM - OVERHEAD;

/// How far a frame's send time may be from our clock, either way: two clocks each
/// [`EPSILON`] off, and 10 s for a datagram held up on its way. What is older may be a
/// recording that somebody plays back.
pub const MAX_AGE: Duration = Duration::from_secs(2 * EPSILON.as_secs() + 10);

/// The most keys in a ring: a rotation needs two.
pub const MAX_KEYS: usize = 16;

/// What makes two seals of one payload differ. Must never be used twice with one key; 24
/// random bytes are enough for that.
pub type Nonce = [u8; 24];

/// The keys of a cluster: the first seals, all open.
#[derive(Clone)]
pub struct KeyRing {
    keys: Vec<(KeyId, XChaCha20Poly1305)>,
}

impl KeyRing {
    /// Returns the ring of a cluster without a key, fit for loopback alone.
    ///
    /// Frames are sealed with a key of zeros, known to everybody: that keeps one layout
    /// and finds broken frames, and stops nobody.
    pub fn unkeyed() -> Self {
        Self { keys: vec![(KeyId::NONE, XChaCha20Poly1305::new(&[0; 32].into()))] }
    }

    /// Returns the ring that a key file describes: one key a line, 64 hex digits. Empty
    /// lines and lines that start with `#` are skipped.
    ///
    /// To rotate: add the new key as the last line on every pod, then move it to the
    /// front on every pod, then remove the old one. Pods that run take each step with
    /// [`Cluster::rekey`](super::Cluster::rekey).
    ///
    /// # Errors
    /// Names the line and what is wrong with it, and never what stands there.
    pub fn parse(text: &str) -> Result<Self, KeyFileError> {
        let mut keys: Vec<([u8; 32], usize)> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let (line, number) = (line.trim(), index + 1);
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let key = parse_key(line).ok_or(KeyFileError::Line { line: number })?;
            if key == [0; 32] {
                return Err(KeyFileError::Zero { line: number });
            }
            if let Some((_, first)) = keys.iter().find(|(other, _)| *other == key) {
                return Err(KeyFileError::Repeated { line: number, first: *first });
            }
            if keys.len() == MAX_KEYS {
                return Err(KeyFileError::TooMany { line: number });
            }
            keys.push((key, number));
        }
        if keys.is_empty() {
            return Err(KeyFileError::Empty);
        }
        Ok(Self { keys: keys.iter().map(|(key, _)| keyed(key)).collect() })
    }

    /// Returns the ring of one key.
    ///
    /// # Panics
    /// If the key is all zeros, which is "no key": a mistake of the program. Keys from
    /// outside go through [`KeyRing::parse`].
    pub fn of(key: [u8; 32]) -> Self {
        assert!(key != [0; 32], "a key of zeros is no key");
        Self { keys: vec![keyed(&key)] }
    }

    /// Returns whether both seal and open the same frames.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let tags = |ring: &Self| ring.keys.iter().map(|(_, cipher)| tag(cipher)).collect::<Vec<_>>();
        tags(self) == tags(other)
    }

    /// Returns whether frames are sealed with a secret.
    pub fn is_keyed(&self) -> bool {
        self.keys.first().is_some_and(|(id, _)| *id != KeyId::NONE)
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|(id, _)| id)).finish()
    }
}

/// Why a key file was refused. Whoever wrote the file can mend it; nothing was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// There is no key in the file.
    #[error("the key file holds no key; write one, for example with: openssl rand -hex 32")]
    Empty,
    /// A line is not a key.
    #[error("line {line} of the key file is not 64 hex digits; write one with: openssl rand -hex 32")]
    Line {
        /// The line, from 1.
        line: usize,
    },
    /// A key is all zeros.
    #[error("line {line} of the key file is a key of zeros, which is no key; write one with: openssl rand -hex 32")]
    Zero {
        /// The line, from 1.
        line: usize,
    },
    /// A key is there twice.
    #[error("line {line} of the key file repeats line {first}; remove one of them")]
    Repeated {
        /// The later line, from 1.
        line: usize,
        /// The earlier one.
        first: usize,
    },
    /// There are too many keys.
    #[error(
        "line {line} of the key file is one key more than the {MAX_KEYS} that are read; remove those that no pod seals with"
    )]
    TooMany {
        /// The line, from 1.
        line: usize,
    },
}

/// Seals and opens the frames of one replica.
#[derive(Clone, Debug)]
pub struct Frames {
    keys: KeyRing,
    cluster: u64,
    me: ReplicaId,
    newest: u8,
}

impl Frames {
    /// Returns the frames of the replica `me` of the cluster with this name.
    pub fn new(keys: KeyRing, cluster: &str, me: ReplicaId) -> Self {
        // The hash that names limits on the wire; any hash that every release shares would do.
        Self { keys, cluster: LimitId::of(cluster).bits(), me, newest: WIRE_VERSION }
    }

    /// Opens frames up to this wire version, as a release opens them whose newest it is.
    #[must_use]
    pub const fn up_to(mut self, newest: u8) -> Self {
        self.newest = newest;
        self
    }

    /// Seals and opens with these keys from now on.
    pub fn rekey(&mut self, keys: KeyRing) {
        self.keys = keys;
    }

    /// Returns a sealed frame with a payload of wire version `version`.
    ///
    /// `to` is `None` for whoever is there. A payload over [`MAX_PAYLOAD`] makes a frame
    /// that no replica opens: split it first.
    pub fn seal(
        &self,
        version: u8,
        to: Option<ReplicaId>,
        sent_at: Timestamp,
        echo: Option<Timestamp>,
        nonce: Nonce,
        payload: &[u8],
    ) -> Vec<u8> {
        let (key_id, cipher) = &self.keys.keys[0];
        let mut frame = Vec::with_capacity(payload.len() + OVERHEAD);
        frame.extend_from_slice(&MAGIC);
        frame.push(version);
        frame.extend_from_slice(&key_id.0);
        frame.extend_from_slice(&self.cluster.to_be_bytes());
        frame.extend_from_slice(&self.me.bits().to_be_bytes());
        frame.extend_from_slice(&to.map_or(0, ReplicaId::bits).to_be_bytes());
        frame.extend_from_slice(&sent_at.unix_ms().to_be_bytes());
        frame.extend_from_slice(&echo.map_or(0, Timestamp::unix_ms).to_be_bytes());
        frame.extend_from_slice(&nonce);
        frame.extend_from_slice(payload);
        let (header, body) = frame.split_at_mut(HEADER);
        let tag = cipher
            .encrypt_inout_detached(&XNonce::from(nonce), header, body.into())
            .expect("the cipher takes up to 2^38 bytes and a payload is at most 1,200");
        frame.extend_from_slice(&tag);
        frame
    }

    /// Opens a frame in place.
    ///
    /// # Errors
    /// Why it is to be thrown away. The reason is to be counted and never answered.
    pub fn open<'a>(&self, datagram: &'a mut [u8], now: Timestamp) -> Result<Opened<'a>, Rejected> {
        if datagram.len() > MAX_DATAGRAM {
            return Err(Rejected::TooLong);
        }
        if !datagram.starts_with(&MAGIC) {
            return Err(Rejected::Foreign);
        }
        let Some((header, sealed)) = datagram.split_first_chunk_mut::<HEADER>() else {
            return Err(Rejected::Truncated);
        };
        let fields = Fields::read(header);
        if !(OLDEST_WIRE_VERSION..=self.newest).contains(&fields.version) {
            return Err(Rejected::Version);
        }
        let Some(length) = sealed.len().checked_sub(TAG) else {
            return Err(Rejected::Truncated);
        };
        let (payload, tag) = sealed.split_at_mut(length);
        self.unseal(&fields, header, payload, tag)?;
        self.check(&fields, now)?;
        let contact = Contact { from: fields.sender, sent_at: fields.sent_at, echo: fields.echo };
        Ok(Opened { contact, to: fields.receiver, version: fields.version, payload })
    }

    fn unseal(&self, fields: &Fields, header: &[u8], payload: &mut [u8], tag: &[u8]) -> Result<(), Rejected> {
        let tag = Tag::try_from(tag).map_err(|_| Rejected::Truncated)?;
        let mut known = false;
        // Two keys can share an id, once in 2^32 pairs. A failed attempt leaves the payload as
        // it was: the tag is looked at first.
        for (_, cipher) in self.keys.keys.iter().filter(|(id, _)| *id == fields.key_id) {
            known = true;
            let nonce = XNonce::from(fields.nonce);
            if cipher.decrypt_inout_detached(&nonce, header, (&mut *payload).into(), &tag).is_ok() {
                return Ok(());
            }
        }
        Err(match known {
            true => Rejected::Seal,
            false if fields.key_id == KeyId::NONE => Rejected::Unsealed,
            false => Rejected::Key,
        })
    }

    fn check(&self, fields: &Fields, now: Timestamp) -> Result<(), Rejected> {
        if fields.cluster != self.cluster {
            return Err(Rejected::Cluster);
        }
        if fields.sender == self.me {
            return Err(Rejected::Own);
        }
        if fields.receiver.is_some_and(|receiver| receiver != self.me) {
            return Err(Rejected::Receiver);
        }
        if now.since(fields.sent_at) > MAX_AGE {
            return Err(Rejected::Old);
        }
        if fields.sent_at.since(now) > MAX_AGE {
            return Err(Rejected::Early);
        }
        Ok(())
    }
}

/// A frame whose seal was good.
#[derive(Debug, PartialEq, Eq)]
pub struct Opened<'a> {
    /// Who sent it, and when.
    pub contact: Contact,
    /// Whom it was for; `None` for whoever was there.
    pub to: Option<ReplicaId>,
    /// The wire version of the payload.
    pub version: u8,
    /// What was sealed; empty in a heartbeat.
    pub payload: &'a [u8],
}

/// Why a datagram was thrown away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Rejected {
    /// It is not one of our frames.
    #[error("not a frame of quotum")]
    Foreign,
    /// It is shorter than a frame can be.
    #[error("cut short")]
    Truncated,
    /// It is longer than a frame may be.
    #[error("longer than 1,200 bytes")]
    TooLong,
    /// It is of a wire version that this release does not read.
    #[error("of a wire version that this release does not read")]
    Version,
    /// It is sealed without a key, and this cluster has one.
    #[error("sealed without a key, and this cluster has one")]
    Unsealed,
    /// It is sealed with a key that is not in our ring.
    #[error("sealed with a key that is not in the key file here")]
    Key,
    /// Its seal is broken.
    #[error("its seal is broken")]
    Seal,
    /// It belongs to another cluster with the same key.
    #[error("of another cluster")]
    Cluster,
    /// It is one of ours, come back.
    #[error("sent by this replica")]
    Own,
    /// It is for another replica, mostly an earlier one at our address.
    #[error("for another replica")]
    Receiver,
    /// It was sent too long ago, or a clock is off.
    #[error("sent more than 14 s ago; or a clock is off")]
    Old,
    /// It was sent too far in the future: a clock is off.
    #[error("sent more than 14 s ahead of the clock here: a clock is off")]
    Early,
    /// Its payload could not be read: a newer release, or a bug.
    #[error("its payload cannot be read")]
    Payload,
    /// It is a fragment that does not fit the others.
    #[error("a fragment that does not fit the others")]
    Fragment,
}

impl Rejected {
    /// Every reason.
    pub const ALL: [Self; 14] = [
        Self::Foreign,
        Self::Truncated,
        Self::TooLong,
        Self::Version,
        Self::Unsealed,
        Self::Key,
        Self::Seal,
        Self::Cluster,
        Self::Own,
        Self::Receiver,
        Self::Old,
        Self::Early,
        Self::Payload,
        Self::Fragment,
    ];

    /// Returns what keeps a replica of the same fleet apart, if it is that: whoever configured
    /// the two can mend it.
    pub(crate) const fn apart(self) -> Option<&'static str> {
        Some(match self {
            Self::Version => "they are of a release that this one does not understand",
            Self::Unsealed => "they are sealed without a key",
            Self::Key => "they are sealed with a key that is not in the key file here",
            Self::Seal => "their seal is broken",
            Self::Cluster => "they are of another cluster name",
            _ => return None,
        })
    }

    /// Returns the reason's name in `quotum_frames_rejected_total{reason}`.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Foreign => "foreign",
            Self::Truncated => "truncated",
            Self::TooLong => "too_long",
            Self::Version => "version",
            Self::Unsealed => "unsealed",
            Self::Key => "key",
            Self::Seal => "seal",
            Self::Cluster => "cluster",
            Self::Own => "own",
            Self::Receiver => "receiver",
            Self::Old => "old",
            Self::Early => "early",
            Self::Payload => "payload",
            Self::Fragment => "fragment",
        }
    }
}

/// Returns the tag of nothing under a nonce of zeros: a keyed hash, which tells nothing of the
/// key. Random nonces never meet that one: it is one of 2^192.
fn tag(cipher: &XChaCha20Poly1305) -> [u8; 16] {
    let tag = cipher
        .encrypt_inout_detached(&XNonce::from([0; 24]), b"quotum key id", (&mut [][..]).into())
        .expect("the cipher takes an empty text");
    tag.into()
}

/// Which key sealed a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
struct KeyId([u8; 4]);

impl KeyId {
    const NONE: Self = Self([0; 4]);

    fn of(cipher: &XChaCha20Poly1305) -> Self {
        let tag = tag(cipher);
        match [tag[0], tag[1], tag[2], tag[3]] {
            [0, 0, 0, 0] => Self([0, 0, 0, 1]), // Zero means "no key".
            bytes => Self(bytes),
        }
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key-{:08x}", u32::from_be_bytes(self.0))
    }
}

/// The header, taken apart; not yet believed.
struct Fields {
    version: u8,
    key_id: KeyId,
    cluster: u64,
    sender: ReplicaId,
    receiver: Option<ReplicaId>,
    sent_at: Timestamp,
    echo: Option<Timestamp>,
    nonce: Nonce,
}

impl Fields {
    fn read(header: &[u8; HEADER]) -> Self {
        let mut rest = &header[..];
        let [_, _, _, version] = take(&mut rest);
        let key_id = KeyId(take(&mut rest));
        let cluster = u64::from_be_bytes(take(&mut rest));
        let sender = ReplicaId::from_bits(u128::from_be_bytes(take(&mut rest)));
        let receiver = u128::from_be_bytes(take(&mut rest));
        let sent_at = Timestamp::from_unix_ms(u64::from_be_bytes(take(&mut rest)));
        let echo = u64::from_be_bytes(take(&mut rest));
        Self {
            version,
            key_id,
            cluster,
            sender,
            receiver: (receiver != 0).then(|| ReplicaId::from_bits(receiver)),
            sent_at,
            echo: (echo != 0).then(|| Timestamp::from_unix_ms(echo)),
            nonce: take(&mut rest),
        }
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (taken, left) = rest.split_first_chunk::<N>().expect("a header has room for its fields");
    *rest = left;
    *taken
}

fn keyed(key: &[u8; 32]) -> (KeyId, XChaCha20Poly1305) {
    let cipher = XChaCha20Poly1305::new(&(*key).into());
    (KeyId::of(&cipher), cipher)
}

fn parse_key(line: &str) -> Option<[u8; 32]> {
    let digits = line.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut key = [0; 32];
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = (high * 16 + low) as u8;
    }
    Some(key)
}

const MAGIC: [u8; 3] = *b"qtm";
const TAG: usize = 16;
const HEADER: usize = 3 + 1 + 4 + 8 + 16 + 16 + 8 + 8 + 24;

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
