//! What the records add up to.
//!
//! [`State::apply`] is the only code that changes durable state. It trusts its records (the journal
//! is checked when it is read, and the store checks before it records); a record that does not fit
//! is counted in [`State::inconsistencies`], which stays 0.

use std::collections::{BTreeMap, BTreeSet};

use qkd_keyfile::{
    AppId, KeySpan, KmaKeyId, KsaKeyId, ModulePairId, NodeId, QkdKeyId, SegmentNumber, StreamId,
    address::Generation,
    metadata::{KeyType, SecurityLevel},
};

use crate::{
    ranges::RangeSet,
    record::{Binding, BurnReason, DiscardReason, Purpose, Record, Stage, StoredSegment},
    vault::{RowId, SealTag},
};

/// The durable state of a KMA.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) streams: BTreeMap<StreamId, Stream>,
    pub(crate) peers: BTreeMap<NodeId, Peer>,
    /// Bindings received and not yet done with.
    pub(crate) received: BTreeMap<KsaKeyId, ReceivedBinding>,
    pub(crate) used: BTreeMap<(ModulePairId, Generation), UsedIds>,
    /// The next row that was never used.
    pub(crate) next_row: u64,
    /// How often the rows were lost while the journal stayed.
    pub(crate) emptied: u64,
    /// Rows of segments that ended, for the store to erase.
    pub(crate) freed: Vec<RowId>,
    /// Records that did not fit what came before them.
    pub(crate) inconsistencies: u64,
}

/// What is known about another KMA.
#[derive(Debug, Default)]
pub(crate) struct Peer {
    /// Its store's incarnation, once it has told.
    pub(crate) incarnation: Option<u64>,
    /// Bindings that it has not acknowledged, by sequence.
    pub(crate) outbox: BTreeMap<u64, Binding>,
    /// Bindings made for it so far.
    pub(crate) bindings_sent: u64,
    /// Bindings received from it so far.
    pub(crate) bindings_received: u64,
}

/// The segments that two KMAs share.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    /// The next number to give out, at the end that gives them out.
    pub(crate) next_segment: u64,
    /// Proposed by this end, not stored yet.
    pub(crate) proposed: BTreeSet<SegmentNumber>,
    /// Stored and not closed.
    pub(crate) segments: BTreeMap<SegmentNumber, Segment>,
    /// Confirmed segments that this end owns and has not taken to the end.
    pub(crate) open: BTreeSet<SegmentNumber>,
    /// Bytes left in `open`; kept so that no request counts a stock.
    pub(crate) open_bytes: u64,
    /// Bytes left in `segments`, kept likewise. The double entry counts afresh.
    pub(crate) held_bytes: u64,
    pub(crate) accounts: Accounts,
}

/// A stored segment.
#[derive(Debug)]
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
    /// The matching KMA knows that it is confirmed.
    pub(crate) peer_confirmed: bool,
}

/// Bits of a stream, double entry: `received` equals the sum of all the others and of the stock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Accounts {
    /// Bits that came in with confirmed or answered segments.
    pub received_bits: u64,
    /// Mask bits, spare bits, check bits: never usable.
    pub overhead_bits: u64,
    /// Used as one-time pad.
    pub pad_bits: u64,
    /// Bound to keys for applications.
    pub supplied_bits: u64,
    /// Burned.
    pub burned_bits: u64,
    /// Segments confirmed.
    pub confirmed_segments: u64,
    /// Segments whose two ends differed.
    pub mismatched_segments: u64,
    /// Segments discarded for another reason.
    pub discarded_segments: u64,
}

/// A binding of another KMA's.
#[derive(Debug)]
pub(crate) struct ReceivedBinding {
    pub(crate) binding: Binding,
    pub(crate) source: NodeId,
    pub(crate) delivered: BTreeSet<AppId>,
}

/// Vendor IDs that came in already: as numbers where they are numbers.
#[derive(Debug, Default)]
pub(crate) struct UsedIds {
    numbers: [RangeSet; 2],
    texts: BTreeSet<QkdKeyId>,
}

impl UsedIds {
    /// Which number an ID is, if any: decimal without leading zeros, or eight hexadecimal digits.
    fn number(id: &QkdKeyId) -> Option<(usize, u64)> {
        let text = id.as_str();
        let lower_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        if text.len() == 8 && text.chars().all(lower_hex) {
            return Some((0, u64::from_str_radix(text, 16).ok()?));
        }
        let number = text.parse::<u64>().ok()?;
        (number < u64::MAX && number.to_string() == text).then_some((1, number))
    }

    pub(crate) fn contains(&self, id: &QkdKeyId) -> bool {
        match Self::number(id) {
            Some((kind, n)) => self.numbers[kind].contains(n),
            None => self.texts.contains(id),
        }
    }

    fn insert(&mut self, id: &QkdKeyId) {
        match Self::number(id) {
            Some((kind, n)) => self.numbers[kind].insert(n, n + 1),
            None => {
                self.texts.insert(id.clone());
            }
        }
    }

    /// The greatest decimal number that came in.
    pub(crate) fn last_number(&self) -> Option<u64> {
        self.numbers[1].end().checked_sub(1)
    }
}

impl Segment {
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
}

impl Stream {
    /// Usable bytes in stock at this end, by key type; answered segments count for nothing yet.
    pub(crate) fn stock_bytes(&self, key_type: KeyType) -> u64 {
        self.segments
            .values()
            .filter(|s| s.stage == Stage::Confirmed && s.key_type == key_type)
            .map(|s| u64::from(s.remaining_bytes()))
            .sum()
    }

    /// All bytes that have neither been used nor burned, whatever their stage.
    fn count_held_bytes(&self) -> u64 {
        self.segments
            .values()
            .map(|s| u64::from(s.remaining_bytes()))
            .sum()
    }

    /// Bits that the double entry does not explain; 0 unless something is badly wrong.
    pub(crate) fn imbalance_bits(&self) -> i128 {
        let a = &self.accounts;
        let out = [
            a.overhead_bits,
            a.pad_bits,
            a.supplied_bits,
            a.burned_bits,
            self.count_held_bytes() * 8,
        ];
        i128::from(a.received_bits) - out.iter().map(|&bits| i128::from(bits)).sum::<i128>()
    }

    fn account(&mut self, bytes: u64, purpose: Purpose) {
        let bits = bytes * 8;
        match purpose {
            Purpose::Pad => self.accounts.pad_bits += bits,
            Purpose::Supply => self.accounts.supplied_bits += bits,
            Purpose::Burn(_) => self.accounts.burned_bits += bits,
        }
    }

    fn store(&mut self, number: SegmentNumber, body: &StoredSegment) {
        self.proposed.remove(&number);
        let stored_bits = u64::from(body.len_bytes) * 8;
        let head_bits = u64::from(body.head_bytes) * 8;
        self.accounts.received_bits += u64::from(body.total_bits);
        self.accounts.overhead_bits +=
            u64::from(body.total_bits).saturating_sub(stored_bits) + head_bits;
        self.held_bytes += u64::from(body.len_bytes.saturating_sub(body.head_bytes));
        let mut followed = RangeSet::default();
        followed.insert(0, u64::from(body.head_bytes));
        self.segments.insert(
            number,
            Segment {
                stage: body.stage,
                key_type: body.key_type,
                len_bytes: body.len_bytes,
                level: body.level,
                kma_key_id: body.kma_key_id,
                row: body.row,
                seal: body.seal,
                mark_bytes: body.head_bytes,
                followed,
                bindings: 0,
                peer_confirmed: false,
            },
        );
        if body.stage == Stage::Confirmed {
            self.confirmed(number);
        }
    }

    fn confirmed(&mut self, number: SegmentNumber) {
        let Some(segment) = self.segments.get_mut(&number) else {
            return;
        };
        segment.stage = Stage::Confirmed;
        self.accounts.confirmed_segments += 1;
        if segment.key_type == KeyType::Encrypting && segment.remaining_bytes() > 0 {
            self.open_bytes += u64::from(segment.remaining_bytes());
            self.open.insert(number);
        }
    }

    /// Burns what is left of a segment that ends, and names its row.
    fn end(&mut self, number: SegmentNumber, reason: BurnReason) -> Option<RowId> {
        let was_open = self.open.remove(&number);
        let segment = self.segments.remove(&number)?;
        let left = u64::from(segment.remaining_bytes());
        self.held_bytes -= left;
        if was_open {
            self.open_bytes -= left;
        }
        self.account(left, Purpose::Burn(reason));
        Some(segment.row)
    }
}

impl State {
    /// Folds one record in.
    pub(crate) fn apply(&mut self, record: &Record) {
        match record {
            Record::Boot { .. } => {}
            Record::Emptied => self.emptied(),
            Record::PeerStore { peer, incarnation } => self.peer_store(peer, *incarnation),
            Record::QkdKeysUsed {
                module_pair,
                generation,
                ids,
            } => {
                let used = self
                    .used
                    .entry((module_pair.clone(), *generation))
                    .or_default();
                ids.iter().for_each(|id| used.insert(id));
            }
            Record::Proposed {
                stream, segment, ..
            } => {
                let stream = self.stream_mut(stream);
                stream.next_segment = stream.next_segment.max(segment.0 + 1);
                stream.proposed.insert(*segment);
            }
            Record::Stored {
                stream,
                segment,
                body,
            } => {
                self.next_row = self.next_row.max(body.row.0 + 1);
                let stream = self.stream_mut(stream);
                stream.next_segment = stream.next_segment.max(segment.0 + 1);
                stream.store(*segment, body);
            }
            Record::Confirmed { stream, segment } => self.stream_mut(stream).confirmed(*segment),
            Record::PeerConfirmed { stream, segment } => {
                if let Some(segment) = self.segment_mut(stream, *segment) {
                    segment.peer_confirmed = true;
                }
            }
            Record::Discarded {
                stream,
                segment,
                reason,
            } => self.discarded(stream, *segment, *reason),
            Record::Taken {
                stream,
                span,
                purpose,
            } => self.taken(stream, *span, *purpose),
            Record::Followed {
                stream,
                span,
                purpose,
            } => self.followed(stream, *span, *purpose),
            Record::Bound {
                destination,
                sequence,
                binding,
            } => {
                self.bind(&binding.stream, binding.span.segment, 1);
                let peer = self.peers.entry(destination.clone()).or_default();
                peer.bindings_sent = sequence + 1;
                peer.outbox.insert(*sequence, binding.clone());
            }
            Record::BindingsAcknowledged {
                destination,
                through,
            } => self.bindings_acknowledged(destination, *through),
            Record::BindingReceived {
                source,
                sequence,
                binding,
            } => self.binding_received(source, *sequence, binding),
            Record::Delivered {
                key_id,
                application,
            } => self.delivered(key_id, application),
            Record::Closed { stream, segment } => {
                let row = self.stream_mut(stream).end(*segment, BurnReason::Closed);
                self.freed.extend(row);
            }
        }
    }

    pub(crate) fn stream_mut(&mut self, id: &StreamId) -> &mut Stream {
        if !self.streams.contains_key(id) {
            self.streams.insert(id.clone(), Stream::default());
        }
        self.streams.get_mut(id).expect("was just inserted")
    }

    pub(crate) fn segment(&self, stream: &StreamId, number: SegmentNumber) -> Option<&Segment> {
        self.streams.get(stream)?.segments.get(&number)
    }

    fn segment_mut(&mut self, stream: &StreamId, number: SegmentNumber) -> Option<&mut Segment> {
        let segment = self.streams.get_mut(stream)?.segments.get_mut(&number);
        if segment.is_none() {
            self.inconsistencies += 1;
        }
        segment
    }

    fn bind(&mut self, stream: &StreamId, segment: SegmentNumber, by: i32) {
        if let Some(segment) = self.segment_mut(stream, segment) {
            segment.bindings = segment.bindings.saturating_add_signed(by);
        }
    }

    /// A peer whose store was made anew shares nothing with us any more.
    fn peer_store(&mut self, name: &NodeId, incarnation: u64) {
        let known = self.peers.get(name).and_then(|peer| peer.incarnation);
        if known.is_some_and(|known| known != incarnation) {
            self.void(name);
        }
        self.peers.entry(name.clone()).or_default().incarnation = Some(incarnation);
    }

    /// Nothing is shared with anyone any more; peers will see a store they do not know.
    fn emptied(&mut self) {
        self.emptied += 1;
        for name in self.peers.keys().cloned().collect::<Vec<_>>() {
            let incarnation = self.peers.get(&name).and_then(|peer| peer.incarnation);
            self.void(&name);
            self.peers.entry(name).or_default().incarnation = incarnation;
        }
    }

    /// Ends all that is shared with a peer. Segment numbers go on: none is given out twice.
    fn void(&mut self, name: &NodeId) {
        self.peers.remove(name);
        self.received.retain(|_, r| r.source != *name);
        for (id, stream) in &mut self.streams {
            // One of the two ends is this node's, so a stream that has the peer at one end is ours
            // with it.
            if id.peer_of(name).is_none() {
                continue;
            }
            stream.proposed.clear();
            for number in stream.segments.keys().copied().collect::<Vec<_>>() {
                let row = stream.end(number, BurnReason::PeerStoreReplaced);
                self.freed.extend(row);
            }
        }
    }

    fn discarded(&mut self, id: &StreamId, number: SegmentNumber, reason: DiscardReason) {
        let stream = self.stream_mut(id);
        stream.proposed.remove(&number);
        match reason {
            DiscardReason::Mismatch => stream.accounts.mismatched_segments += 1,
            _ => stream.accounts.discarded_segments += 1,
        }
        let row = stream.end(number, BurnReason::Closed);
        self.freed.extend(row);
    }

    fn taken(&mut self, id: &StreamId, span: KeySpan, purpose: Purpose) {
        let stream = self.stream_mut(id);
        let fits = |s: &&mut Segment| {
            s.key_type == KeyType::Encrypting
                && s.stage == Stage::Confirmed
                && s.mark_bytes == span.offset_bytes
                && span.end_bytes().is_some_and(|end| end <= s.len_bytes)
        };
        let Some(segment) = stream.segments.get_mut(&span.segment).filter(fits) else {
            self.inconsistencies += 1;
            return;
        };
        segment.mark_bytes += span.len_bytes;
        if segment.mark_bytes == segment.len_bytes {
            stream.open.remove(&span.segment);
        }
        stream.open_bytes -= u64::from(span.len_bytes);
        stream.held_bytes -= u64::from(span.len_bytes);
        stream.account(u64::from(span.len_bytes), purpose);
    }

    fn followed(&mut self, id: &StreamId, span: KeySpan, purpose: Purpose) {
        let Some(end) = span.end_bytes() else {
            self.inconsistencies += 1;
            return;
        };
        let stream = self.stream_mut(id);
        let fits = |s: &&mut Segment| s.key_type == KeyType::Decrypting && end <= s.len_bytes;
        let inserted = stream
            .segments
            .get_mut(&span.segment)
            .filter(fits)
            .is_some_and(|s| {
                s.followed
                    .insert_new(u64::from(span.offset_bytes), u64::from(end))
            });
        if inserted {
            stream.held_bytes -= u64::from(span.len_bytes);
            stream.account(u64::from(span.len_bytes), purpose);
        } else {
            self.inconsistencies += 1;
        }
    }

    fn bindings_acknowledged(&mut self, destination: &NodeId, through: u64) {
        let Some(peer) = self.peers.get_mut(destination) else {
            return;
        };
        let kept = peer.outbox.split_off(&(through + 1));
        let done = std::mem::replace(&mut peer.outbox, kept);
        for binding in done.into_values() {
            self.bind(&binding.stream, binding.span.segment, -1);
        }
    }

    fn binding_received(&mut self, source: &NodeId, sequence: u64, binding: &Binding) {
        self.peers
            .entry(source.clone())
            .or_default()
            .bindings_received = sequence + 1;
        self.followed(&binding.stream, binding.span, Purpose::Supply);
        self.bind(&binding.stream, binding.span.segment, 1);
        self.received.insert(
            binding.key_id,
            ReceivedBinding {
                binding: binding.clone(),
                source: source.clone(),
                delivered: BTreeSet::new(),
            },
        );
    }

    fn delivered(&mut self, key_id: &KsaKeyId, application: &AppId) {
        let Some(received) = self.received.get_mut(key_id) else {
            self.inconsistencies += 1;
            return;
        };
        received.delivered.insert(application.clone());
        if received.delivered.len() == received.binding.applications.len() {
            let binding = self.received.remove(key_id).map(|r| r.binding);
            if let Some(binding) = binding {
                self.bind(&binding.stream, binding.span.segment, -1);
            }
        }
    }
}
