//! The segments that two KMAs share, and the double entry of their bits.

use std::collections::{BTreeMap, BTreeSet};

use qkd_keyfile::{
    KeySpan, KmaKeyId, SegmentNumber,
    metadata::{KeyType, SecurityLevel},
};
use serde::{Deserialize, Serialize};

use crate::{
    ranges::RangeSet,
    record::{BurnReason, Purpose, SealedRow, Stage, StoredSegment},
    vault::{RowId, SealTag},
};

/// The segments that two KMAs share.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stream {
    /// The next number to give out, at the end that gives them out.
    pub(crate) next_segment: u64,
    /// Proposed by this end, not stored yet.
    pub(crate) proposed: BTreeSet<SegmentNumber>,
    /// Stored and not closed.
    pub(crate) segments: BTreeMap<SegmentNumber, Segment>,
    /// Those of [`Place::Open`], and so on: nobody searches all segments for the few that matter.
    pub(crate) open: BTreeSet<SegmentNumber>,
    pub(crate) answered: BTreeSet<SegmentNumber>,
    pub(crate) spent: BTreeSet<SegmentNumber>,
    pub(crate) finished: BTreeSet<SegmentNumber>,
    /// Others may know them: to be told to the other end for as long as they are here.
    pub(crate) suspected: BTreeSet<SegmentNumber>,
    /// Bytes left in `open`.
    pub(crate) open_bytes: u64,
    /// Bytes left in `segments`.
    pub(crate) held_bytes: u64,
    /// Bytes that this end took so far as their owner, for anything but to burn them.
    pub(crate) used_bytes: u64,
    pub(crate) accounts: Accounts,
}

/// A stored segment.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Segment {
    pub(crate) stage: Stage,
    pub(crate) key_type: KeyType,
    pub(crate) len_bytes: u32,
    pub(crate) level: SecurityLevel,
    pub(crate) kma_key_id: KmaKeyId,
    pub(crate) row: RowId,
    pub(crate) seal: SealTag,
    /// Owner: bytes below were taken. The other end: unused.
    pub(crate) mark_bytes: u32,
    /// The other end: bytes that were used or burned. Owner: unused.
    pub(crate) followed: RangeSet,
    /// Bindings into it that still need its bytes here.
    pub(crate) bindings: u32,
    /// Others may know it: its row is erased.
    pub(crate) is_suspected: bool,
    /// When it was stored, by the age clock.
    pub(crate) stored_at_seconds: u64,
    /// Where hashes that modules gave are sealed.
    pub(crate) hashes: Option<Box<SealedRow>>,
}

/// What is to be done about a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing for now.
    Waiting,
    /// This end answered; the other has yet to confirm.
    Answered,
    /// Ours, and bytes are left to take.
    Open,
    /// Ours, all taken, every binding known to the other end: the other end may close it.
    Spent,
    /// Theirs, every byte used or burned, every key fetched: to be closed.
    Finished,
}

/// What is in stock, and whether the books explain it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    /// Usable bytes in stock that this end owns; answered segments count for nothing yet.
    pub(crate) encrypting_bytes: u64,
    /// Those that the other end owns.
    pub(crate) decrypting_bytes: u64,
    /// Bits that the double entry does not explain; 0 unless something is badly wrong.
    pub(crate) imbalance_bits: i128,
}

/// Bits of a stream, double entry: `received` equals the sum of all the others and of the stock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounts {
    /// Bits that came in with confirmed or answered segments.
    pub received_bits: u64,
    /// Mask bits, spare bits, check bits: never usable.
    pub overhead_bits: u64,
    /// Used as one-time pad.
    pub pad_bits: u64,
    /// Bound to keys for applications.
    pub supplied_bits: u64,
    /// Reserved for the relay of units, and used for nothing else.
    pub reserved_bits: u64,
    /// Burned.
    pub burned_bits: u64,
    /// Segments confirmed.
    pub confirmed_segments: u64,
    /// Segments whose two ends differed.
    pub mismatched_segments: u64,
    /// Segments discarded for another reason.
    pub discarded_segments: u64,
    /// Segments that this end gave to the other. Their bits stay in stock at both ends.
    pub ceded_segments: u64,
    /// Segments that the other end gave to this one.
    pub acquired_segments: u64,
}

impl Segment {
    fn new(body: &StoredSegment, stored_at_seconds: u64) -> Self {
        let mut followed = RangeSet::default();
        followed.insert(0, u64::from(body.head_bytes));
        Self {
            stage: body.stage,
            key_type: body.key_type,
            len_bytes: body.len_bytes,
            level: body.level,
            kma_key_id: body.kma_key_id,
            row: body.row,
            seal: body.seal,
            mark_bytes: body.head_bytes.min(body.len_bytes),
            followed,
            bindings: 0,
            is_suspected: false,
            stored_at_seconds,
            hashes: None,
        }
    }

    /// The rows that end with it.
    pub(crate) fn rows(&self) -> impl Iterator<Item = RowId> {
        let hashes = self.hashes.as_ref().map(|hashes| hashes.row);
        std::iter::once(self.row).chain(hashes)
    }

    /// Bytes that may still be taken (owner) or followed (the other end).
    pub(crate) fn remaining_bytes(&self) -> u32 {
        match self.key_type {
            KeyType::Encrypting => self.len_bytes - self.mark_bytes,
            KeyType::Decrypting => {
                let followed = u32::try_from(self.followed.len()).unwrap_or(u32::MAX);
                self.len_bytes.saturating_sub(followed)
            }
        }
    }

    /// Owner: whether any of it was taken. (The head counts as followed at both ends.)
    pub(crate) fn is_touched(&self) -> bool {
        u64::from(self.mark_bytes) > self.followed.end()
    }

    /// Whether nothing of it was ever taken or followed, at the end that owns it as at the other. (The
    /// mark of the other end stays at the head.)
    pub(crate) fn is_untouched(&self) -> bool {
        self.followed.end() == u64::from(self.mark_bytes)
    }

    /// The other end: whether any byte at or above `mark_bytes` was used.
    pub(crate) fn is_used_beyond(&self, mark_bytes: u32) -> bool {
        self.followed.end() > u64::from(mark_bytes)
    }

    fn place(&self) -> Place {
        let left = self.remaining_bytes() > 0;
        match (self.stage, self.key_type) {
            (Stage::Answered, _) => Place::Answered,
            (Stage::Confirmed, KeyType::Encrypting) if left => Place::Open,
            (Stage::Confirmed, _) if left || self.bindings > 0 => Place::Waiting,
            (Stage::Confirmed, KeyType::Encrypting) => Place::Spent,
            (Stage::Confirmed, KeyType::Decrypting) => Place::Finished,
        }
    }
}

impl Stream {
    /// The stock by the sums that are kept, and what the double entry does not explain: the cost is
    /// that of the few answered segments, not of all.
    pub(crate) fn count(&self) -> Count {
        let answered = self.answered.iter().filter_map(|n| self.segments.get(n));
        let answered_bytes: u64 = answered.map(|s| u64::from(s.remaining_bytes())).sum();
        let usable_bytes = self.held_bytes.saturating_sub(answered_bytes);
        Count {
            encrypting_bytes: self.open_bytes,
            decrypting_bytes: usable_bytes.saturating_sub(self.open_bytes),
            imbalance_bits: self.imbalance_bits(self.held_bytes),
        }
    }

    /// [`Stream::count`] by a look at every segment.
    pub(crate) fn count_afresh(&self) -> Count {
        let mut count = Count::default();
        let mut left_bytes = 0;
        for segment in self.segments.values() {
            let bytes = u64::from(segment.remaining_bytes());
            left_bytes += bytes;
            match (segment.stage, segment.key_type) {
                (Stage::Answered, _) => {}
                (Stage::Confirmed, KeyType::Encrypting) => count.encrypting_bytes += bytes,
                (Stage::Confirmed, KeyType::Decrypting) => count.decrypting_bytes += bytes,
            }
        }
        count.imbalance_bits = self.imbalance_bits(left_bytes);
        count
    }

    fn imbalance_bits(&self, left_bytes: u64) -> i128 {
        let a = &self.accounts;
        let out = [
            a.overhead_bits,
            a.pad_bits,
            a.supplied_bits,
            a.reserved_bits,
            a.burned_bits,
            left_bytes * 8,
        ];
        let out = out.iter().map(|&bits| i128::from(bits)).sum::<i128>();
        i128::from(a.received_bits) - out
    }

    pub(crate) fn store(
        &mut self,
        number: SegmentNumber,
        body: &StoredSegment,
        stored_at_seconds: u64,
    ) {
        self.proposed.remove(&number);
        let stored_bits = u64::from(body.len_bytes) * 8;
        let head_bits = u64::from(body.head_bytes.min(body.len_bytes)) * 8;
        self.accounts.received_bits += u64::from(body.total_bits).max(stored_bits);
        self.accounts.overhead_bits +=
            u64::from(body.total_bits).saturating_sub(stored_bits) + head_bits;
        if body.stage == Stage::Confirmed {
            self.accounts.confirmed_segments += 1;
        }
        let segment = Segment::new(body, stored_at_seconds);
        self.enlist(number, &segment);
        self.segments.insert(number, segment);
    }

    pub(crate) fn confirmed(&mut self, number: SegmentNumber) -> Option<()> {
        self.change(number, |segment| segment.stage = Stage::Confirmed)?;
        self.accounts.confirmed_segments += 1;
        Some(())
    }

    /// The owner took a span: it begins at the mark. `None` if it does not fit.
    pub(crate) fn taken(&mut self, span: KeySpan, purpose: Purpose) -> Option<()> {
        self.change(span.segment, |segment| {
            let fits = segment.key_type == KeyType::Encrypting
                && segment.stage == Stage::Confirmed
                && segment.mark_bytes == span.offset_bytes;
            let end = span.end_bytes().filter(|&end| end <= segment.len_bytes);
            segment.mark_bytes = end.filter(|_| fits)?;
            Some(())
        })??;
        self.account(u64::from(span.len_bytes), purpose);
        if !matches!(purpose, Purpose::Burn(_)) {
            self.used_bytes += u64::from(span.len_bytes);
        }
        Some(())
    }

    /// The end that does not own a span saw it used. `None` if it does not fit.
    pub(crate) fn followed(&mut self, span: KeySpan, purpose: Purpose) -> Option<()> {
        self.change(span.segment, |segment| {
            let end = span.end_bytes().filter(|&end| end <= segment.len_bytes)?;
            let (start, end) = (u64::from(span.offset_bytes), u64::from(end));
            (segment.key_type == KeyType::Decrypting && segment.followed.insert_new(start, end))
                .then_some(())
        })??;
        self.account(u64::from(span.len_bytes), purpose);
        Some(())
    }

    /// The owner gives a segment that it never touched to the other end. `None` if it does not fit.
    pub(crate) fn cede(&mut self, number: SegmentNumber) -> Option<()> {
        self.pass(number, KeyType::Encrypting)?;
        self.accounts.ceded_segments += 1;
        Some(())
    }

    /// The other end gave a segment to this one. `None` if it does not fit.
    pub(crate) fn acquire(&mut self, number: SegmentNumber) -> Option<()> {
        self.pass(number, KeyType::Decrypting)?;
        self.accounts.acquired_segments += 1;
        Some(())
    }

    fn pass(&mut self, number: SegmentNumber, from: KeyType) -> Option<()> {
        self.change(number, |segment| {
            let fits = segment.key_type == from
                && segment.stage == Stage::Confirmed
                && segment.is_untouched();
            if fits {
                segment.key_type = from.opposite();
            }
            fits.then_some(())
        })?
    }

    /// One binding more, or one fewer, needs the segment's bytes.
    pub(crate) fn bind(&mut self, number: SegmentNumber, by: i32) -> Option<()> {
        self.change(number, |segment| {
            segment.bindings = segment.bindings.checked_add_signed(by)?;
            Some(())
        })?
    }

    /// Others may know a segment: gives back the rows that end with that.
    pub(crate) fn suspect(&mut self, number: SegmentNumber) -> Option<Vec<RowId>> {
        let rows = self.change(number, |segment| {
            segment.is_suspected = true;
            segment.rows().collect()
        })?;
        self.suspected.insert(number);
        Some(rows)
    }

    /// Remembers where the hashes of a segment's QKD-keys are.
    pub(crate) fn describe(&mut self, number: SegmentNumber, hashes: SealedRow) -> Option<()> {
        self.segments.get_mut(&number)?.hashes = Some(Box::new(hashes));
        Some(())
    }

    /// Burns what is left of a segment that ends.
    pub(crate) fn end(&mut self, number: SegmentNumber, reason: BurnReason) -> Option<Segment> {
        let segment = self.segments.remove(&number)?;
        self.strike(number, &segment);
        self.suspected.remove(&number);
        let left = u64::from(segment.remaining_bytes());
        self.account(left, Purpose::Burn(reason));
        Some(segment)
    }

    /// The only way to change a segment: lists and sums follow.
    fn change<R>(
        &mut self,
        number: SegmentNumber,
        change: impl FnOnce(&mut Segment) -> R,
    ) -> Option<R> {
        let segment = self.segments.get_mut(&number)?;
        let (was, had) = (segment.place(), u64::from(segment.remaining_bytes()));
        let result = change(segment);
        let (is, has) = (segment.place(), u64::from(segment.remaining_bytes()));
        self.held_bytes = self.held_bytes - had + has;
        if was == Place::Open {
            self.open_bytes -= had;
        }
        if is == Place::Open {
            self.open_bytes += has;
        }
        if was != is {
            self.list(was).map(|list| list.remove(&number));
            self.list(is).map(|list| list.insert(number));
        }
        Some(result)
    }

    fn enlist(&mut self, number: SegmentNumber, segment: &Segment) {
        let (place, bytes) = (segment.place(), u64::from(segment.remaining_bytes()));
        self.held_bytes += bytes;
        if place == Place::Open {
            self.open_bytes += bytes;
        }
        self.list(place).map(|list| list.insert(number));
    }

    fn strike(&mut self, number: SegmentNumber, segment: &Segment) {
        let (place, bytes) = (segment.place(), u64::from(segment.remaining_bytes()));
        self.held_bytes -= bytes;
        if place == Place::Open {
            self.open_bytes -= bytes;
        }
        self.list(place).map(|list| list.remove(&number));
    }

    fn list(&mut self, place: Place) -> Option<&mut BTreeSet<SegmentNumber>> {
        match place {
            Place::Waiting => None,
            Place::Answered => Some(&mut self.answered),
            Place::Open => Some(&mut self.open),
            Place::Spent => Some(&mut self.spent),
            Place::Finished => Some(&mut self.finished),
        }
    }

    fn account(&mut self, bytes: u64, purpose: Purpose) {
        let bits = bytes * 8;
        match purpose {
            Purpose::Pad => self.accounts.pad_bits += bits,
            Purpose::Supply => self.accounts.supplied_bits += bits,
            Purpose::Relay(_) => self.accounts.reserved_bits += bits,
            Purpose::Burn(_) => self.accounts.burned_bits += bits,
        }
    }
}
