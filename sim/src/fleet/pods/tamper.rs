//! Planted bugs between whole pods: a frame is opened, falsified and sealed again.
//!
//! Knows the fleet's key. Must not know how a bug is noticed. The invariant it keeps: without
//! a canary no frame is touched, and what cannot be opened or does not fit any more passes as
//! it is.

use quotum::Timestamp;
use quotum::cluster::KeyRing;
use quotum::cluster::fragment::Kind;
use quotum::cluster::frame::{Frames, MAX_PAYLOAD};
use quotum::cluster::wire::{self, WIRE_VERSION};

use super::net::Sent;
use crate::canary::Canary;
use crate::fleet::events::misspeak;
use crate::fleet::world::World;
use crate::fleet::{CLUSTER, KEY};

impl World {
    /// What a pod with the planted bug would have sent in place of this.
    pub(super) fn tampered(&mut self, sent: Sent) -> Sent {
        let Some(bytes) = self.falsified(&sent) else { return sent };
        Sent { bytes, ..sent }
    }

    fn falsified(&mut self, sent: &Sent) -> Option<Vec<u8>> {
        let canary = self.options.canary?;
        let (from, to) = (*self.by_addr.get(&sent.from)?, *self.by_addr.get(&sent.to)?);
        let (sender, receiver) = (self.replicas[from].id, self.replicas[to].id);
        let now = Timestamp::from_unix_ms(self.replicas[to].local_ms(self.at, self.plan.phase));
        let frames = |me| Frames::new(KeyRing::of(KEY), CLUSTER, me);
        let mut bytes = sent.bytes.clone();
        let opened = frames(receiver).open(&mut bytes, now).ok()?;
        let (contact, addressee, version) = (opened.contact, opened.to, opened.version);
        // What the pod with the bug writes, and what it says that it writes.
        let is_ours = self.replicas[from].wire == WIRE_VERSION;
        let (written, said_to_be) = match canary {
            Canary::NewestToAll if is_ours => (WIRE_VERSION, WIRE_VERSION),
            Canary::VersionNotSaid if is_ours => (WIRE_VERSION, version),
            _ => (version, version),
        };
        let (kind, said) = opened.payload.split_first()?;
        let mut payload = vec![*kind];
        if canary == Canary::PayloadDamaged {
            payload.extend_from_slice(said);
            *payload.last_mut()? ^= u8::from(self.replicas[from].slot == 0);
        } else {
            if *kind != Kind::Messages as u8 {
                return None;
            }
            let mut messages = wire::decode(version, sender, said).ok()?;
            messages.iter_mut().for_each(|message| misspeak(canary, sender, message));
            let heard = self.incoming(to, contact.from, messages);
            wire::encode(written, sender, &heard, &mut payload);
        }
        let mut nonce = [0; 24];
        nonce.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&self.network_rng.next().to_le_bytes()));
        let fits = payload.len() <= MAX_PAYLOAD;
        fits.then(|| frames(sender).seal(said_to_be, addressee, contact.sent_at, contact.echo, nonce, &payload))
    }
}
