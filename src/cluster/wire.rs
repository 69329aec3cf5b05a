//! The three messages as bytes: rows, rights requests and roster messages.
//!
//! Knows the layouts of wire versions 1 and 2. Must not know sockets, keys, clocks or the
//! ledger. The invariant it keeps: decoding is total. Whatever bytes arrive, it returns
//! messages or a [`WireError`], never panics, and allocates no more than a small multiple
//! of what arrived (up to 40 times, of rows of 8 bytes, the shortest that can be forged); and a
//! message that was decoded is one that [`Writer`] could have written.
//!
//! # Layout
//!
//! Messages follow one another without a count. Numbers are unsigned LEB128 unless a
//! width is given; signed ones are zigzag.
//!
//! ```text
//! message  = row | 2 request | 3 roster
//! row      = 1 replica:16 limit:8 quota window counts                      (version 1)
//!          | 16 + left out [replica:16] [limit:8] [quota] [window] counts  (version 2)
//! left out = 1 replica: the frame's sender | 2 limit, 4 quota, 8 window: as in the row before
//! counts   = version reserved refunded
//!            count (replica:16 amount)* spendable:zigzag demand typical
//! request  = limit:8 quota window seq need want kind:1 waiting_ms
//! roster   = from:16 revision floor watermark count member*
//! quota    = (unit | 16 x kind | 128 if its rights come at once):1 amount window_ms
//!            kind 0 fixed | 1 sliding parts:1 | 2 bucket burst | 3 day zone:22
//! member   = id:16 flags:1 [ip:4|16] port:2 length:1 node counts [gone] seen
//! flags    = 1 IPv6 | 2 exclusive | 4 gone is known
//! ```
//!
//! A row of a quota of 100,000 tokens a minute takes 55 bytes in version 1. In version 2 it
//! takes 39 if its replica sent the frame, and 26 behind another one of the same quota and
//! window. "The row before" is one of the same payload, whatever stands between them. What
//! can be left out is left out, so there is one form of every row in its place.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use crate::ledger::{
    Key, LimitId, Member, Message, Quota, QuotaError, ReplicaId, RequestKind, RightsRequest, RosterMessage, Row, Slot,
    Timestamp, Unit, WindowId, WindowKind, Zone,
};

/// The newest version that this release reads and writes.
pub const WIRE_VERSION: u8 = 2;

/// The oldest version that this release reads and writes, the one before its own: what
/// everybody reads, whichever of two neighbouring releases it is.
pub const OLDEST_WIRE_VERSION: u8 = 1;

/// The most members in one roster message, as docs/algorithm.md section 1 bounds |U|.
pub const MAX_MEMBERS: usize = 4_096;

/// Writes the messages of one payload, each after the ones before it.
#[derive(Clone, Copy, Debug)]
pub struct Writer {
    version: u8,
    sender: ReplicaId,
    before: Option<(Key, WindowId)>,
}

impl Writer {
    /// Returns the writer of an empty payload of a wire version from [`OLDEST_WIRE_VERSION`] to
    /// [`WIRE_VERSION`], in a frame that `sender` will seal.
    pub const fn new(version: u8, sender: ReplicaId) -> Self {
        Self { version, sender, before: None }
    }

    /// Appends a message.
    ///
    /// A row with more than [`Row::MAX_GIVEN`] gifts is written as several rows, each with a
    /// part of them: merging by maximum makes that the same statement.
    pub fn write(&mut self, message: &Message, out: &mut Vec<u8>) {
        match message {
            Message::Row(row) if row.given.is_empty() => self.write_row(row, &[], out),
            Message::Row(row) => row.given.chunks(Row::MAX_GIVEN).for_each(|part| self.write_row(row, part, out)),
            Message::Request(request) => put_request(request, out),
            Message::Roster(roster) => put_roster(roster, out),
        }
    }

    fn write_row(&mut self, row: &Row, given: &[(ReplicaId, u64)], out: &mut Vec<u8>) {
        if self.version < SHORT_ROWS {
            out.push(TAG_ROW);
            put_replica(row.replica, out);
            put_key(row.key, out);
            put_time(row.window.start(), out);
        } else {
            let left_out = left_out(self.sender, self.before, row.replica, row.key, row.window);
            out.push(TAG_SHORT_ROW | left_out);
            if left_out & OF_SENDER == 0 {
                put_replica(row.replica, out);
            }
            if left_out & SAME_LIMIT == 0 {
                put_limit(row.key.limit, out);
            }
            if left_out & SAME_QUOTA == 0 {
                put_quota(row.key.quota, out);
            }
            if left_out & SAME_WINDOW == 0 {
                put_time(row.window.start(), out);
            }
            self.before = Some((row.key, row.window));
        }
        put_counts(row, given, out);
    }
}

/// Appends messages as they stand in a payload of their own; see [`Writer`].
pub fn encode<'a>(version: u8, sender: ReplicaId, messages: impl IntoIterator<Item = &'a Message>, out: &mut Vec<u8>) {
    let mut writer = Writer::new(version, sender);
    messages.into_iter().for_each(|message| writer.write(message, out));
}

/// Returns the messages in a payload of wire version `version` in a frame of `sender`.
///
/// # Errors
/// The first thing that is wrong. Nothing of a payload is used if a part of it is wrong:
/// whoever sealed it wrote all of it.
pub fn decode(version: u8, sender: ReplicaId, payload: &[u8]) -> Result<Vec<Message>, WireError> {
    if !(OLDEST_WIRE_VERSION..=WIRE_VERSION).contains(&version) {
        return Err(WireError::Version(version));
    }
    let mut reader = Reader(payload);
    let (mut messages, mut before) = (Vec::new(), None);
    while !reader.0.is_empty() {
        messages.push(match reader.byte()? {
            TAG_ROW if version < SHORT_ROWS => Message::Row(reader.row()?),
            TAG_REQUEST => Message::Request(reader.request()?),
            TAG_ROSTER => Message::Roster(Arc::new(reader.roster()?)),
            tag if version >= SHORT_ROWS && tag & !LEFT_OUT == TAG_SHORT_ROW => {
                let row = reader.short_row(tag, sender, before)?;
                before = Some((row.key, row.window));
                Message::Row(row)
            }
            tag => return Err(WireError::Tag(tag)),
        });
    }
    Ok(messages)
}

/// Why bytes are no messages. Whoever sealed them is at fault, or is a newer release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The payload is of a version that this release does not read.
    #[error("wire version {0} is not read by this release")]
    Version(u8),
    /// The payload ends inside a message.
    #[error("the payload ends inside a message")]
    Truncated,
    /// A number has more than 64 bits or is written longer than it needs to be.
    #[error("a number has more than 64 bits or is not in its shortest form")]
    Number,
    /// No message has this tag.
    #[error("{0} is the tag of no message")]
    Tag(u8),
    /// A row leaves out what no row before it says, or says what it must leave out.
    #[error("{0:#04x} is not the tag that this row has in its place")]
    LeftOut(u8),
    /// No unit, or no kind of window, has this number.
    #[error("{0:#04x} names no unit and kind of window")]
    QuotaKind(u8),
    /// The quota cannot be.
    #[error("a quota cannot be: {0}")]
    Quota(QuotaError),
    /// No kind of request has this number.
    #[error("{0} is no kind of rights request")]
    RequestKind(u8),
    /// A list is longer than it may be, or than the payload can hold.
    #[error("a list of {0} is too long")]
    Count(u64),
    /// A flag is set that this version does not have.
    #[error("{0:#04x} has a flag that this version does not have")]
    Flags(u8),
    /// A node's name is too long or not UTF-8.
    #[error("a node's name is over 128 bytes or not UTF-8")]
    Name,
}

const TAG_ROW: u8 = 1;
const TAG_REQUEST: u8 = 2;
const TAG_ROSTER: u8 = 3;
/// In the low half of the tag is what the row leaves out.
const TAG_SHORT_ROW: u8 = 16;

/// The first version in which rows leave out what the receiver knows.
const SHORT_ROWS: u8 = 2;

const OF_SENDER: u8 = 1;
const SAME_LIMIT: u8 = 2;
const SAME_QUOTA: u8 = 4;
const SAME_WINDOW: u8 = 8;
const LEFT_OUT: u8 = OF_SENDER | SAME_LIMIT | SAME_QUOTA | SAME_WINDOW;

const FLAG_IPV6: u8 = 1;
const FLAG_EXCLUSIVE: u8 = 2;
const FLAG_GONE: u8 = 4;

const KIND_FIXED: u8 = 0;
const KIND_SLIDING: u8 = 1;
const KIND_BUCKET: u8 = 2;
const KIND_DAY: u8 = 3;
/// The quota's rights come at once, however long its window.
const FLAG_AT_ONCE: u8 = 0x80;

/// The fewest bytes of a member: id, flags, IPv4 address and port, an empty name, and two
/// numbers of one byte. Bounds what a forged count can make us allocate.
const MIN_MEMBER: usize = 16 + 1 + 4 + 2 + 1 + 2;

/// The fewest bytes of a gift: a replica and a number of one byte.
const MIN_GIVEN: usize = 16 + 1;

/// Returns what a row leaves out in version 2: what the frame's header or the row before says.
fn left_out(sender: ReplicaId, before: Option<(Key, WindowId)>, replica: ReplicaId, key: Key, window: WindowId) -> u8 {
    let mut left_out = if replica == sender { OF_SENDER } else { 0 };
    if let Some((known, then)) = before {
        for (same, flag) in [
            (known.limit == key.limit, SAME_LIMIT),
            (known.quota == key.quota, SAME_QUOTA),
            (then == window, SAME_WINDOW),
        ] {
            left_out |= if same { flag } else { 0 };
        }
    }
    left_out
}

fn put_counts(row: &Row, given: &[(ReplicaId, u64)], out: &mut Vec<u8>) {
    put_number(row.version, out);
    put_number(row.reserved, out);
    put_number(row.refunded, out);
    put_number(given.len() as u64, out);
    for (replica, amount) in given {
        put_replica(*replica, out);
        put_number(*amount, out);
    }
    put_number(zigzag(row.spendable), out);
    put_number(row.demand, out);
    put_number(row.typical, out);
}

fn put_request(request: &RightsRequest, out: &mut Vec<u8>) {
    out.push(TAG_REQUEST);
    put_key(request.key, out);
    put_time(request.window.start(), out);
    put_number(request.seq, out);
    put_number(request.need, out);
    put_number(request.want, out);
    out.push(request.kind as u8);
    put_number(u64::from(request.waiting_ms), out);
}

fn put_roster(roster: &RosterMessage, out: &mut Vec<u8>) {
    out.push(TAG_ROSTER);
    put_replica(roster.from, out);
    put_number(roster.revision, out);
    put_time(roster.floor, out);
    put_time(roster.watermark, out);
    put_number(roster.members.len() as u64, out);
    roster.members.iter().for_each(|member| put_member(member, out));
}

fn put_member(member: &Member, out: &mut Vec<u8>) {
    put_replica(member.id, out);
    let mut flags = 0;
    if member.slot.addr.is_ipv6() {
        flags |= FLAG_IPV6;
    }
    if member.slot.exclusive {
        flags |= FLAG_EXCLUSIVE;
    }
    if member.gone.is_some() {
        flags |= FLAG_GONE;
    }
    out.push(flags);
    match member.slot.addr.ip() {
        IpAddr::V4(ip) => out.extend_from_slice(&ip.octets()),
        IpAddr::V6(ip) => out.extend_from_slice(&ip.octets()),
    }
    out.extend_from_slice(&member.slot.addr.port().to_le_bytes());
    let node = truncated(&member.slot.node);
    out.push(node.len() as u8);
    out.extend_from_slice(node.as_bytes());
    put_time(member.counts, out);
    if let Some(gone) = member.gone {
        put_time(gone, out);
    }
    put_number(member.seen, out);
}

fn put_key(key: Key, out: &mut Vec<u8>) {
    put_limit(key.limit, out);
    put_quota(key.quota, out);
}

fn put_limit(limit: LimitId, out: &mut Vec<u8>) {
    out.extend_from_slice(&limit.bits().to_le_bytes());
}

fn put_quota(quota: Quota, out: &mut Vec<u8>) {
    let kind = match quota.kind() {
        WindowKind::Fixed => KIND_FIXED,
        WindowKind::Sliding { .. } => KIND_SLIDING,
        WindowKind::Bucket { .. } => KIND_BUCKET,
        WindowKind::Day { .. } => KIND_DAY,
    };
    out.push(quota.unit() as u8 | (kind << 4) | if quota.is_at_once() { FLAG_AT_ONCE } else { 0 });
    put_number(quota.amount(), out);
    put_number(quota.window().ms().get(), out);
    match quota.kind() {
        WindowKind::Fixed => {}
        WindowKind::Sliding { parts } => out.push(parts),
        WindowKind::Bucket { burst } => put_number(burst.get(), out),
        WindowKind::Day { zone } => out.extend_from_slice(&zone.to_bytes()),
    }
}

fn put_replica(id: ReplicaId, out: &mut Vec<u8>) {
    out.extend_from_slice(&id.bits().to_be_bytes());
}

fn put_time(at: Timestamp, out: &mut Vec<u8>) {
    put_number(at.unix_ms(), out);
}

fn put_number(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push((number as u8) | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// A name is cut at a character where it is too long, rather than making the whole roster
/// unsendable: it is an attribute, not identity. `ClusterConfig` refuses such a name.
fn truncated(node: &str) -> &str {
    let mut end = node.len().min(Slot::MAX_NODE);
    while !node.is_char_boundary(end) {
        end -= 1;
    }
    &node[..end]
}

const fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)) as u64
}

const fn unzigzag(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

/// What is left to read. Every method takes from the front or fails.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn row(&mut self) -> Result<Row, WireError> {
        let replica = self.replica()?;
        let key = self.key()?;
        let window = self.window()?;
        self.counts(replica, key, window)
    }

    fn short_row(&mut self, tag: u8, sender: ReplicaId, before: Option<(Key, WindowId)>) -> Result<Row, WireError> {
        let says = |flag| tag & flag == 0;
        let known = || before.ok_or(WireError::LeftOut(tag));
        let replica = if says(OF_SENDER) { self.replica()? } else { sender };
        let limit = if says(SAME_LIMIT) { self.limit()? } else { known()?.0.limit };
        let quota = if says(SAME_QUOTA) { self.quota()? } else { known()?.0.quota };
        let window = if says(SAME_WINDOW) { self.window()? } else { known()?.1 };
        let key = Key { limit, quota };
        if left_out(sender, before, replica, key, window) != tag & LEFT_OUT {
            return Err(WireError::LeftOut(tag));
        }
        self.counts(replica, key, window)
    }

    fn counts(&mut self, replica: ReplicaId, key: Key, window: WindowId) -> Result<Row, WireError> {
        let version = self.number()?;
        let reserved = self.number()?;
        let refunded = self.number()?;
        let count = self.count(Row::MAX_GIVEN, MIN_GIVEN)?;
        let mut given = Vec::with_capacity(count);
        for _ in 0..count {
            given.push((self.replica()?, self.number()?));
        }
        let spendable = unzigzag(self.number()?);
        let demand = self.number()?;
        let typical = self.number()?;
        Ok(Row { replica, key, window, version, reserved, refunded, given, spendable, demand, typical })
    }

    fn request(&mut self) -> Result<RightsRequest, WireError> {
        let key = self.key()?;
        let window = self.window()?;
        let seq = self.number()?;
        let need = self.number()?;
        let want = self.number()?;
        let kind = match self.byte()? {
            0 => RequestKind::Debt,
            1 => RequestKind::Parked,
            2 => RequestKind::Prefetch,
            kind => return Err(WireError::RequestKind(kind)),
        };
        let waiting_ms = u32::try_from(self.number()?).map_err(|_| WireError::Number)?;
        Ok(RightsRequest { key, window, seq, need, want, kind, waiting_ms })
    }

    fn roster(&mut self) -> Result<RosterMessage, WireError> {
        let from = self.replica()?;
        let revision = self.number()?;
        let floor = self.timestamp()?;
        let watermark = self.timestamp()?;
        let count = self.count(MAX_MEMBERS, MIN_MEMBER)?;
        let mut members = Vec::with_capacity(count);
        for _ in 0..count {
            members.push(self.member()?);
        }
        Ok(RosterMessage { from, revision, floor, watermark, members })
    }

    fn member(&mut self) -> Result<Member, WireError> {
        let id = self.replica()?;
        let flags = self.byte()?;
        if flags & !(FLAG_IPV6 | FLAG_EXCLUSIVE | FLAG_GONE) != 0 {
            return Err(WireError::Flags(flags));
        }
        let ip = if flags & FLAG_IPV6 == 0 {
            IpAddr::V4(Ipv4Addr::from(self.array::<4>()?))
        } else {
            IpAddr::V6(Ipv6Addr::from(self.array::<16>()?))
        };
        let port = u16::from_le_bytes(self.array()?);
        let length = usize::from(self.byte()?);
        if length > Slot::MAX_NODE {
            return Err(WireError::Name);
        }
        let node = std::str::from_utf8(self.bytes(length)?).map_err(|_| WireError::Name)?;
        let exclusive = flags & FLAG_EXCLUSIVE != 0;
        let slot = Slot { node: node.into(), addr: SocketAddr::new(ip, port), exclusive };
        let counts = self.timestamp()?;
        let gone = if flags & FLAG_GONE == 0 { None } else { Some(self.timestamp()?) };
        let seen = self.number()?;
        Ok(Member { id, slot, counts, gone, seen })
    }

    fn key(&mut self) -> Result<Key, WireError> {
        Ok(Key { limit: self.limit()?, quota: self.quota()? })
    }

    fn limit(&mut self) -> Result<LimitId, WireError> {
        Ok(LimitId::from_bits(u64::from_le_bytes(self.array()?)))
    }

    fn quota(&mut self) -> Result<Quota, WireError> {
        let kinds = self.byte()?;
        let unit = Unit::ALL.get(usize::from(kinds & 0x0f)).copied();
        let unknown = WireError::QuotaKind(kinds);
        let Some(unit) = unit else { return Err(unknown) };
        let amount = self.number()?;
        let window = Duration::from_millis(self.number()?);
        let kind = match (kinds >> 4) & 0x07 {
            KIND_FIXED => WindowKind::Fixed,
            KIND_SLIDING => WindowKind::Sliding { parts: self.byte()? },
            KIND_BUCKET => WindowKind::Bucket { burst: NonZeroU64::new(self.number()?).ok_or(unknown)? },
            KIND_DAY => WindowKind::Day { zone: Zone::from_bytes(&self.array()?).ok_or(unknown)? },
            _ => return Err(unknown),
        };
        let quota = Quota::new(unit, amount, window).and_then(|quota| quota.of_kind(kind)).map_err(WireError::Quota)?;
        Ok(if kinds & FLAG_AT_ONCE == 0 { quota } else { quota.at_once() })
    }

    fn window(&mut self) -> Result<WindowId, WireError> {
        self.timestamp().map(WindowId::starting)
    }

    fn timestamp(&mut self) -> Result<Timestamp, WireError> {
        self.number().map(Timestamp::from_unix_ms)
    }

    fn replica(&mut self) -> Result<ReplicaId, WireError> {
        self.array().map(|bytes| ReplicaId::from_bits(u128::from_be_bytes(bytes)))
    }

    /// Reads the length of a list, each entry of which takes at least `entry` bytes.
    fn count(&mut self, most: usize, entry: usize) -> Result<usize, WireError> {
        let count = self.number()?;
        if count > most as u64 || count > (self.0.len() / entry) as u64 {
            return Err(WireError::Count(count));
        }
        Ok(count as usize)
    }

    fn number(&mut self) -> Result<u64, WireError> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit of the 64.
            if shift == 63 && bits > 1 {
                return Err(WireError::Number);
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                // A last byte of zero says nothing: there is one form of every number.
                return if byte == 0 && shift > 0 { Err(WireError::Number) } else { Ok(number) };
            }
        }
        Err(WireError::Number)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(WireError::Truncated)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(WireError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
