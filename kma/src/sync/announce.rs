//! Which QKD-keys the two ends of a module pair hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use qkd_keyfile::{Generation, ModulePairId, Mono, NodeId, QkdKeyId};

use super::{drop_key, name_of};
use crate::{RESEND_AFTER, io::Cx, wire::Message};

/// QKD-keys in one announcement.
const ANNOUNCE_MAX: usize = 1024;

/// A QKD-key that the peer still lacks after it has announced this many others of the module pair
/// since is dropped.
const LATER_MAX: u64 = 64;

/// A QKD-key that the peer has not announced in this time, while connected, is dropped.
const UNMATCHED_TTL: Duration = Duration::from_secs(120);

/// QKD-keys that the peer announced and this end lacks, at most; it announces the rest again.
const THEIRS_MAX: usize = 8192;

/// QKD-keys that the peer has yet to hear are gone, at most; it asks again by announcing them.
const DROPPED_MAX: usize = 8192;

/// How often all QKD-keys that wait are looked through.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// QKD-keys of one module pair that are not settled.
#[derive(Debug, Default)]
pub(super) struct Pair {
    held: BTreeMap<QkdKeyId, Held>,
    theirs: BTreeMap<QkdKeyId, u32>,
    /// Held, announced by the peer, in no segment.
    both: BTreeSet<QkdKeyId>,
    /// Held, in no segment, to be announced now.
    unsaid: BTreeSet<QkdKeyId>,
    /// QKD-keys that the peer announced since it had announced all it held.
    theirs_count: u64,
    theirs_complete: bool,
    /// The peer knows all that is held here.
    said_complete: bool,
    /// Dropped, and the peer has yet to hear it.
    dropped: BTreeSet<QkdKeyId>,
    looked: Mono,
}

#[derive(Debug)]
struct Held {
    key_bits: u32,
    announced: Option<Announced>,
    /// In a segment under comparison.
    composed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Announced {
    first: Mono,
    last: Mono,
    /// The peer's count at `first`.
    theirs_count: u64,
}

/// What the peer says of one module pair.
#[derive(Debug)]
pub(crate) struct Announcement<'a> {
    pub(crate) held: Vec<(QkdKeyId, u32)>,
    pub(crate) dropped: &'a [QkdKeyId],
    pub(crate) complete: bool,
}

impl Pair {
    /// A connection is new: both ends announce everything.
    pub(super) fn connected(&mut self) {
        self.theirs.clear();
        self.both.clear();
        self.theirs_complete = false;
        self.said_complete = false;
        for (id, held) in &mut self.held {
            held.announced = None;
            if !held.composed {
                self.unsaid.insert(id.clone());
            }
        }
    }

    pub(super) fn hold(&mut self, id: QkdKeyId, key_bits: u32) {
        if self.held.contains_key(&id) {
            return;
        }
        let held = Held {
            key_bits,
            announced: None,
            composed: false,
        };
        self.held.insert(id.clone(), held);
        self.unsaid.insert(id.clone());
        if self.theirs.contains_key(&id) {
            self.both.insert(id);
        }
    }

    /// Length of a QKD-key that is held and in no segment.
    pub(super) fn free_bits(&self, id: &QkdKeyId) -> Option<u32> {
        let held = self.held.get(id).filter(|held| !held.composed)?;
        Some(held.key_bits)
    }

    /// A QKD-key that both ends hold, and its length here and there.
    pub(super) fn next_match(&self) -> Option<(QkdKeyId, u32, u32)> {
        let id = self.both.first()?;
        Some((id.clone(), self.free_bits(id)?, *self.theirs.get(id)?))
    }

    /// A QKD-key is in a segment under comparison from now on, or is not any more.
    pub(super) fn compose(&mut self, id: &QkdKeyId, composed: bool) {
        let Some(held) = self.held.get_mut(id) else {
            return;
        };
        held.composed = composed;
        if composed {
            self.unsaid.remove(id);
            self.both.remove(id);
            self.theirs.remove(id);
        } else {
            self.unsaid.insert(id.clone());
        }
    }

    /// A QKD-key is settled.
    pub(super) fn forget(&mut self, id: &QkdKeyId) {
        self.held.remove(id);
        self.theirs.remove(id);
        self.both.remove(id);
        self.unsaid.remove(id);
    }

    /// Forgets a QKD-key, and tells the peer, unless it is in a segment under comparison or not
    /// held at all.
    pub(super) fn drop_uncomposed(&mut self, id: &QkdKeyId) -> bool {
        let free = self.free_bits(id).is_some();
        if free {
            self.forget(id);
            self.tell_dropped(id.clone());
        }
        free
    }

    /// The peer has to hear that a QKD-key is gone.
    pub(super) fn tell_dropped(&mut self, id: QkdKeyId) {
        if self.dropped.len() < DROPPED_MAX {
            self.dropped.insert(id);
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Cx<'_>, peer: &NodeId, name: &ModulePairId) {
        if cx.now.mono.since(self.looked) >= LOOK_EVERY {
            self.looked = cx.now.mono;
            self.look_through(cx, name);
        }
        while !self.unsaid.is_empty() || !self.dropped.is_empty() || !self.said_complete {
            self.announce(cx, peer, name);
        }
    }

    /// Drops QKD-keys that the peer will not have any more, and lets others be said again.
    fn look_through(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId) {
        let now = cx.now.mono;
        let mut gone = Vec::new();
        for (id, held) in self.held.iter().filter(|(_, held)| !held.composed) {
            let Some(announced) = held.announced else {
                continue;
            };
            let later = self.theirs_count - announced.theirs_count > LATER_MAX;
            let late = now.since(announced.first) > UNMATCHED_TTL;
            if !self.theirs.contains_key(id) && (later || late) {
                gone.push(id.clone());
            } else if now.since(announced.last) >= 2 * RESEND_AFTER {
                self.unsaid.insert(id.clone());
            }
        }
        for id in gone {
            tracing::info!(%module_pair, qkd_key = %id, "held at one end only; dropped");
            self.drop_uncomposed(&id);
            drop_key(cx, module_pair, id);
        }
    }

    fn announce(&mut self, cx: &mut Cx<'_>, peer: &NodeId, name: &ModulePairId) {
        let now = cx.now.mono;
        let mut list = Vec::new();
        while list.len() < ANNOUNCE_MAX
            && let Some(id) = self.unsaid.pop_first()
        {
            let Some(held) = self.held.get_mut(&id) else {
                continue;
            };
            let before = held.announced;
            held.announced = Some(Announced {
                first: before.map_or(now, |a| a.first),
                last: now,
                theirs_count: before.map_or(self.theirs_count, |a| a.theirs_count),
            });
            list.push((id, held.key_bits));
        }
        let mut dropped = Vec::new();
        while dropped.len() < ANNOUNCE_MAX
            && let Some(id) = self.dropped.pop_first()
        {
            dropped.push(id);
        }
        self.said_complete |= self.unsaid.is_empty();
        let message = Message::Announce {
            module_pair: name.clone(),
            generation: Generation::default(),
            held: list,
            dropped,
            complete: self.said_complete,
        };
        cx.send(peer, &message);
    }

    pub(super) fn announced(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        announcement: Announcement<'_>,
    ) {
        for (id, key_bits) in announcement.held {
            if cx.store.is_used(&name_of(module_pair, &id)) {
                // Settled here: the peer has to hear it, unless a segment of it is on its way there.
                if !self.held.contains_key(&id) {
                    self.tell_dropped(id);
                }
            } else if self.theirs.contains_key(&id) || self.theirs.len() < THEIRS_MAX {
                if self.free_bits(&id).is_some() {
                    self.both.insert(id.clone());
                }
                if self.theirs.insert(id, key_bits).is_none() && self.theirs_complete {
                    self.theirs_count += 1;
                }
            }
        }
        // What it held before this connection is not later than what is held here.
        self.theirs_complete |= announcement.complete;
        for id in announcement.dropped {
            self.theirs.remove(id);
            self.both.remove(id);
            if self.free_bits(id).is_some() {
                self.forget(id);
                drop_key(cx, module_pair, id.clone());
            }
        }
    }
}
