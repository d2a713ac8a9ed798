//! QKD-keys of one module pair that are not settled, and which of their bits are free.
//!
//! A QKD-key may go into several segments. Every bit of it is *free*, *under comparison* or gone
//! (stored or burned). All that is here belongs to this process: a QKD-key of which any bit was named
//! in a proposal is recorded as used, so a restart drops the rest of it, and no mask is used again.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use qkd_keyfile::{Mono, Piece, QkdKeyId};

use super::compose::{Gathered, LITTLE_BITS, LITTLE_PATIENCE, PIECES_MAX, gathered};
use crate::{
    io::Settlement, ranges::RangeSet, record::StopReason, used::UsedIds, wire::DropReason,
};

/// A QKD-key that the peer lacks, when it has so many that came in here later, is dropped, ...
const LATER_MAX: usize = 64;

/// ... but not sooner than this: of a fast module so many are a matter of milliseconds, by which the two
/// ends of a pair may well be apart.
const OVERTAKEN_AFTER: Duration = Duration::from_secs(1);

/// A QKD-key that the peer has not announced in this time, while connected, is dropped.
pub(super) const UNMATCHED_TTL: Duration = Duration::from_secs(120);

/// QKD-keys that the peer announced and this end lacks, at most; it announces the rest again.
const THEIRS_MAX: usize = 16_384;

/// QKD-keys that the peer has yet to hear are gone, at most; it asks again by announcing them.
const DROPPED_MAX: usize = 16_384;

/// QKD-keys whose fate the peer can be told again, if it was more than being dropped.
const SUSPECT_MAX: usize = 1024;

/// QKD-keys of one module pair that are not settled.
#[derive(Debug, Default)]
pub(super) struct Pair {
    pub(super) held: BTreeMap<QkdKeyId, Held>,
    pub(super) theirs: BTreeMap<QkdKeyId, u32>,
    /// At both ends, of one length, with free bits: by the order in which they came in.
    ready: BTreeMap<u64, QkdKeyId>,
    /// Free bits of them.
    ready_bits: u64,
    /// Since when they are gathered.
    gathering_since: Mono,
    /// At both ends, of two lengths.
    pub(super) unequal: BTreeSet<QkdKeyId>,
    /// Have free bits, and are to be announced now.
    pub(super) unsaid: BTreeSet<QkdKeyId>,
    /// The peer has announced all that it held when the connection began.
    pub(super) theirs_complete: bool,
    /// The peer knows all that is held here.
    pub(super) said_complete: bool,
    /// Gone, and the peer has yet to hear it.
    pub(super) dropped: BTreeMap<QkdKeyId, DropReason>,
    /// Gone, and not just dropped.
    suspect: BTreeMap<QkdKeyId, DropReason>,
    /// When all that waits was looked through last.
    pub(super) looked: Mono,
    pub(super) standing: Standing,
    arrivals: u64,
    /// The greatest arrivals of QKD-keys that the peer has too.
    latest: BTreeSet<u64>,
}

/// What outlasts the QKD-keys, as long as the process.
#[derive(Debug, Clone, Default)]
pub(super) struct Standing {
    /// QKD-keys that differed, less those made up for by agreed ones.
    pub(super) mismatches: u32,
    /// Agreed QKD-keys that make up for nothing yet.
    pub(super) agreed: u32,
    /// QKD-keys that one of the two pipelines refused.
    pub(super) quarantined: u64,
    /// Why it is stopped at the other end, if it is, as that said last.
    pub(super) peer_stopped: Option<StopReason>,
    /// When the other end was told last whether it is stopped; `None`: it is to be told now.
    pub(super) told: Option<Mono>,
    /// QKD-keys in a row whose IDs came in before.
    pub(super) again: u32,
    /// IDs that had come in when this process began.
    pub(super) before: UsedIds,
    /// This end's module numbers anew, and when the proposer was told last.
    pub(super) wants_generation: Option<Mono>,
    /// What this end's module says of itself.
    pub(super) session: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Held {
    pub(super) key_bits: u32,
    arrival: u64,
    pub(super) announced: Option<Announced>,
    /// Bits that are not free.
    taken: RangeSet,
    /// Pieces of it under comparison.
    open: u32,
    stored: bool,
    quarantined: bool,
    /// What of it counts in [`Pair::ready_bits`].
    ready_bits: u32,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Announced {
    pub(super) first: Mono,
    pub(super) last: Mono,
}

impl Held {
    pub(super) fn free_bits(&self) -> u32 {
        let taken = u32::try_from(self.taken.len()).unwrap_or(u32::MAX);
        self.key_bits.saturating_sub(taken)
    }

    /// What becomes of it, once nothing of it is free or under comparison.
    fn outcome(&self) -> Option<Settlement> {
        if self.open > 0 || self.free_bits() > 0 {
            return None;
        }
        Some(match (self.quarantined, self.stored) {
            (true, _) => Settlement::Quarantined,
            (_, true) => Settlement::Stored,
            _ => Settlement::Dropped,
        })
    }
}

fn bits_of(piece: &Piece) -> (u64, u64) {
    let start = u64::from(piece.offset_bits);
    (start, start + u64::from(piece.len_bits))
}

impl Pair {
    /// A connection is new: both ends announce everything.
    pub(super) fn connected(&mut self, now: Mono) {
        self.theirs.clear();
        self.unequal.clear();
        self.theirs_complete = false;
        self.said_complete = false;
        self.latest.clear();
        for id in self.held.keys().cloned().collect::<Vec<_>>() {
            if let Some(held) = self.held.get_mut(&id) {
                held.announced = None;
            }
            self.refresh(now, &id);
        }
        let free = self.held.iter().filter(|(_, held)| held.free_bits() > 0);
        self.unsaid = free.map(|(id, _)| id.clone()).collect();
    }

    /// A QKD-key came in.
    pub(super) fn hold(&mut self, now: Mono, id: QkdKeyId, key_bits: u32) {
        if self.held.contains_key(&id) {
            return;
        }
        let held = Held {
            key_bits,
            arrival: self.arrivals,
            announced: None,
            taken: RangeSet::default(),
            open: 0,
            stored: false,
            quarantined: false,
            ready_bits: 0,
        };
        self.arrivals += 1;
        self.held.insert(id.clone(), held);
        self.unsaid.insert(id.clone());
        self.refresh(now, &id);
    }

    /// The peer holds a QKD-key.
    pub(super) fn peer_holds(&mut self, now: Mono, id: QkdKeyId, key_bits: u32) {
        if self.theirs.contains_key(&id) || self.theirs.len() < THEIRS_MAX {
            self.theirs.insert(id.clone(), key_bits);
            self.refresh(now, &id);
        }
    }

    /// The peer holds it no more.
    pub(super) fn peer_lacks(&mut self, now: Mono, id: &QkdKeyId) {
        self.theirs.remove(id);
        self.unequal.remove(id);
        self.refresh(now, id);
    }

    /// Whether a QKD-key is ready, and its place in the queue, follow from what is known about it.
    fn refresh(&mut self, now: Mono, id: &QkdKeyId) {
        let Some(held) = self.held.get_mut(id) else {
            return;
        };
        let free = held.free_bits();
        let ready_bits = match self.theirs.get(id) {
            Some(&theirs) if theirs == held.key_bits => free,
            Some(_) if free > 0 => {
                self.unequal.insert(id.clone());
                0
            }
            _ => 0,
        };
        if ready_bits > 0 {
            if self.ready_bits < 8 && ready_bits != held.ready_bits {
                self.gathering_since = now;
            }
            self.ready.insert(held.arrival, id.clone());
            self.latest.insert(held.arrival);
            if self.latest.len() > LATER_MAX {
                self.latest.pop_first();
            }
        } else {
            self.ready.remove(&held.arrival);
        }
        self.ready_bits = self.ready_bits - u64::from(held.ready_bits) + u64::from(ready_bits);
        held.ready_bits = ready_bits;
        if free == 0 {
            self.unsaid.remove(id);
        }
    }

    /// Whether the peer, which has announced all it holds, has so many later ones that it will not
    /// have this one any more.
    pub(super) fn is_overtaken(&self, now: Mono, held: &Held) -> bool {
        let announced = held.announced.map(|announced| announced.first);
        if announced.is_none_or(|first| now.since(first) < OVERTAKEN_AFTER) {
            return false;
        }
        let earliest = self.latest.first().filter(|_| self.theirs_complete);
        self.latest.len() >= LATER_MAX && earliest.is_some_and(|&at| held.arrival < at)
    }

    /// Pieces for a segment, if there are enough, or they have waited long enough.
    pub(super) fn compose(
        &self,
        now: Mono,
        target_bits: u64,
        patience: Duration,
    ) -> Option<Gathered> {
        let waited = now.since(self.gathering_since);
        let late = if self.ready_bits < LITTLE_BITS {
            waited >= LITTLE_PATIENCE * patience
        } else {
            waited >= patience
        };
        if self.ready_bits < target_bits && self.ready.len() < PIECES_MAX && !late {
            return None;
        }
        let free = self.ready.values().filter_map(|id| {
            let held = self.held.get(id)?;
            Some((id, held))
        });
        let ranges = free.flat_map(|(id, held)| {
            let missing = held.taken.missing(0, u64::from(held.key_bits));
            missing.into_iter().map(move |range| (id, range))
        });
        gathered(ranges, target_bits)
    }

    /// Bits too few for a segment, of which nothing more came in for long.
    pub(super) fn stale(&self, now: Mono) -> Vec<QkdKeyId> {
        let stale = self.ready_bits < 8 && now.since(self.gathering_since) > UNMATCHED_TTL;
        let ready = self.ready.values().filter(|_| stale);
        ready.cloned().collect()
    }

    /// Free bits go under comparison: all of the pieces, or none and the QKD-keys that lack some.
    pub(super) fn take(&mut self, now: Mono, pieces: &[Piece]) -> Result<(), Vec<QkdKeyId>> {
        let mut lacking = BTreeSet::new();
        let mut taken = Vec::new();
        for piece in pieces {
            let (start, end) = bits_of(piece);
            let held = self.held.get_mut(&piece.qkd_key);
            let free = held.filter(|held| start < end && end <= u64::from(held.key_bits));
            if let Some(held) = free
                && held.taken.insert_new(start, end)
            {
                held.open += 1;
                taken.push(piece);
            } else {
                lacking.insert(piece.qkd_key.clone());
            }
        }
        if lacking.is_empty() {
            self.refresh_all(now, pieces);
            self.gathering_since = now;
            return Ok(());
        }
        taken.into_iter().for_each(|piece| self.give_back(piece));
        Err(lacking.into_iter().collect())
    }

    fn give_back(&mut self, piece: &Piece) {
        let (start, end) = bits_of(piece);
        if let Some(held) = self.held.get_mut(&piece.qkd_key) {
            held.taken.remove(start, end);
            held.open = held.open.saturating_sub(1);
        }
    }

    fn refresh_all(&mut self, now: Mono, pieces: &[Piece]) {
        for piece in pieces {
            self.refresh(now, &piece.qkd_key);
        }
    }

    /// A comparison came to nothing: its bits are free again, but for those to be [burned](Self::burn).
    pub(super) fn release(&mut self, now: Mono, pieces: &[Piece]) {
        for piece in pieces {
            self.give_back(piece);
            if self.held.contains_key(&piece.qkd_key) {
                self.unsaid.insert(piece.qkd_key.clone());
            }
        }
        self.refresh_all(now, pieces);
    }

    /// Bits that are never used again, whatever was done with them.
    pub(super) fn burn(&mut self, now: Mono, pieces: &[Piece]) {
        for piece in pieces {
            let (start, end) = bits_of(piece);
            if let Some(held) = self.held.get_mut(&piece.qkd_key) {
                held.taken.insert(start, end.min(u64::from(held.key_bits)));
            }
        }
        self.refresh_all(now, pieces);
    }

    /// A comparison is over.
    pub(super) fn conclude(&mut self, pieces: &[Piece], stored: bool) {
        for piece in pieces {
            if let Some(held) = self.held.get_mut(&piece.qkd_key) {
                held.open = held.open.saturating_sub(1);
                held.stored |= stored;
            }
        }
    }

    /// Nothing of a QKD-key is free any more; whether something was.
    pub(super) fn drop_rest(&mut self, now: Mono, id: &QkdKeyId, quarantine: bool) -> bool {
        let Some(held) = self.held.get_mut(id) else {
            return false;
        };
        let free = held.free_bits() > 0;
        held.quarantined |= quarantine;
        held.taken.insert(0, u64::from(held.key_bits));
        self.unequal.remove(id);
        self.refresh(now, id);
        free
    }

    /// Forgets QKD-keys of which nothing is left, and tells what became of them.
    pub(super) fn finish<'i>(
        &mut self,
        ids: impl IntoIterator<Item = &'i QkdKeyId>,
    ) -> Vec<(QkdKeyId, Settlement)> {
        let mut done = Vec::new();
        for id in ids {
            if let Some(outcome) = self.held.get(id).and_then(Held::outcome) {
                self.held.remove(id);
                self.theirs.remove(id);
                self.unsaid.remove(id);
                done.push((id.clone(), outcome));
            }
        }
        done
    }

    /// Gives up everything that is held.
    pub(super) fn clear(&mut self) -> Vec<(QkdKeyId, Settlement)> {
        let all = std::mem::take(&mut self.held).into_iter();
        let done = all.map(|(id, held)| {
            let outcome = match (held.quarantined, held.stored) {
                (true, _) => Settlement::Quarantined,
                (_, true) => Settlement::Stored,
                _ => Settlement::Dropped,
            };
            (id, outcome)
        });
        let done = done.collect();
        *self = Self {
            arrivals: self.arrivals,
            standing: std::mem::take(&mut self.standing),
            ..Self::default()
        };
        done
    }

    /// The peer has to hear that a QKD-key is gone.
    pub(super) fn tell_dropped(&mut self, id: QkdKeyId, reason: DropReason) {
        if reason != DropReason::Gone {
            if self.suspect.len() >= SUSPECT_MAX {
                self.suspect.pop_first();
            }
            self.suspect.insert(id.clone(), reason);
        }
        let reason = self.suspect.get(&id).copied().unwrap_or(reason);
        if self.dropped.len() < DROPPED_MAX {
            self.dropped.insert(id, reason);
        }
    }

    /// QKD-keys that wait, and their free bits.
    pub(super) fn waiting(&self) -> (usize, u64) {
        let bits = self.held.values().map(|held| u64::from(held.free_bits()));
        (self.held.len(), bits.sum())
    }
}
