//! Segments that change their owner: the giver's record is durable before the other end hears of it, and
//! the other end's before it takes a bit. So there is never more than one owner, and for a while none.

use qkd_keyfile::{NodeId, SegmentNumber, StreamId, metadata::KeyType};

use super::{FollowError, Store};
use crate::record::{Record, Stage};

/// Segments that are ceded at a time, at most: as many wait for the other end's acknowledgement.
const CESSIONS_MAX: usize = 1024;

/// Segments that are looked through for some to cede, at most.
const SCAN_MAX: usize = 4096;

impl Store {
    /// Segments that this end may cede, whole and untouched, latest first (the oldest are taken next):
    /// until they have `want_bytes`, and as long as `keep_bytes` stay here.
    pub(crate) fn plan_cession(
        &self,
        stream: &StreamId,
        want_bytes: u64,
        keep_bytes: u64,
    ) -> Vec<SegmentNumber> {
        let mut plan = Vec::new();
        let Some(entry) = self.state.streams.get(stream) else {
            return plan;
        };
        let mut spare_bytes = entry.open_bytes.saturating_sub(keep_bytes);
        let mut missing_bytes = want_bytes;
        if spare_bytes == 0 || missing_bytes == 0 {
            return plan;
        }
        for &number in entry.open.iter().rev().take(SCAN_MAX) {
            let segment = entry.segments.get(&number);
            let Some(segment) = segment.filter(|s| s.is_untouched() && s.bindings == 0) else {
                continue;
            };
            if missing_bytes == 0 || plan.len() >= CESSIONS_MAX {
                break;
            }
            let bytes = u64::from(segment.remaining_bytes());
            if let Some(rest) = spare_bytes.checked_sub(bytes) {
                spare_bytes = rest;
                missing_bytes = missing_bytes.saturating_sub(bytes);
                plan.push(number);
            }
        }
        plan
    }

    /// Gives a segment that was planned to the other end. From here on this end follows.
    pub(crate) fn cede(&mut self, to: &NodeId, stream: &StreamId, segment: SegmentNumber) {
        let sequence = self.state.peers.get(to).map_or(0, |p| p.cessions_sent);
        self.record(Record::Ceded {
            to: to.clone(),
            sequence,
            stream: stream.clone(),
            segment,
        });
    }

    /// Takes over a segment that the other end ceded, in sequence.
    ///
    /// # Errors
    ///
    /// [`FollowError`]: the segment is not the other end's to give, or not yet. Nothing was recorded.
    pub(crate) fn acquire(
        &mut self,
        from: &NodeId,
        stream: &StreamId,
        number: SegmentNumber,
    ) -> Result<(), FollowError> {
        let segment = self.segment(stream, number);
        let segment = segment.ok_or(FollowError::NoSuchBits)?;
        if segment.key_type != KeyType::Decrypting {
            return Err(FollowError::NotTheirs);
        }
        if !segment.is_untouched() {
            return Err(FollowError::Used);
        }
        if segment.stage != Stage::Confirmed {
            return Err(FollowError::Unconfirmed);
        }
        self.record(Record::Acquired {
            from: from.clone(),
            sequence: self.cessions_received(from),
            stream: stream.clone(),
            segment: number,
        });
        // What others may know is burned by whoever owns it.
        self.burn_suspected(stream, number);
        Ok(())
    }

    /// The other end has acquired everything up to `through`.
    pub(crate) fn cessions_acknowledged(&mut self, to: &NodeId, through: u64) {
        let news = self.state.peers.get(to).is_some_and(|peer| {
            let first = peer.ceded.first_key_value();
            first.is_some_and(|(&first, _)| first <= through) && through < peer.cessions_sent
        });
        if news {
            let to = to.clone();
            self.record(Record::CessionsAcknowledged { to, through });
        }
    }

    /// The sequence before which the other end certainly has acquired what was ceded to it, and that of
    /// the next cession. It acquires in sequence: if it used one, it has those before it.
    pub(crate) fn cessions_told(&self, to: &NodeId) -> (u64, u64) {
        let Some(peer) = self.state.peers.get(to) else {
            return (0, 0);
        };
        let untouched = |(stream, number): &(StreamId, SegmentNumber)| {
            let segment = self.segment(stream, *number);
            segment.is_some_and(crate::stream::Segment::is_untouched)
        };
        let used = peer.ceded.iter().rfind(|(_, at)| !untouched(at));
        let used = used.map(|(sequence, _)| sequence + 1);
        let first = peer.ceded.first_key_value().map(|(&first, _)| first);
        let next = peer.cessions_sent;
        (used.or(first).unwrap_or(next), next)
    }

    /// Segments acquired from a KMA so far.
    pub(crate) fn cessions_received(&self, from: &NodeId) -> u64 {
        let peer = self.state.peers.get(from);
        peer.map_or(0, |peer| peer.cessions_received)
    }
}
