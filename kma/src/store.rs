//! The key store: what may be done with key bits, and the durable record of what was.
//!
//! A [`Store`] is the one place that takes bits out of stock. Every operation checks, records and
//! applies; nothing that rests on it may leave the node before [`Store::commit`] has returned, which
//! makes all of it durable with one synchronisation per file (group commit). The caller holds its
//! messages and answers back until then, so "the mark moves past a range on disk before any byte of
//! it is used" holds by construction, and a crash loses at most the operations of one batch.

use std::collections::{BTreeMap, BTreeSet};

use qkd_keyfile::{
    AppId, Composition, KeySpan, KmaKeyId, KsaKeyId, NodeId, QkdKeyName, SegmentNumber, StreamId,
    metadata::{KeyType, SecurityLevel},
};
use qkd_secmem::{KeyBuf, Pool, PoolExhausted};

use crate::{
    record::{Binding, BurnReason, DiscardReason, Purpose, Record, Stage, StoredSegment},
    state::{Accounts, Segment, State, Stream},
    vault::{GetError, RowId, Vault, VaultError},
};

/// Segments whose bytes stay open in key memory, at most.
const MAX_OPEN_ROWS: usize = 64;

/// Keys, their ledger and the rules for their use.
pub struct Store {
    vault: Box<dyn Vault>,
    pool: Pool,
    state: State,
    /// Bytes of segments in use, in key memory: a row is read and decrypted once, not per key.
    open_rows: BTreeMap<RowId, KeyBuf>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("state", &self.state)
            .field("open_rows", &self.open_rows.len())
            .finish_non_exhaustive()
    }
}

/// Why bits could not be read. Nothing was used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// There is no such segment, or the span lies outside it.
    #[error("no such bits in stock")]
    NoSuchBits,
    /// Key memory is full.
    #[error("no key memory to read a segment into")]
    Memory(#[from] PoolExhausted),
    /// The row cannot be read back as it was stored.
    #[error("a stored segment cannot be read")]
    Get(#[from] GetError),
}

/// Fewer bits in stock than asked for. Nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{have_bytes} bytes in stock, {want_bytes} asked for")]
pub struct Short {
    /// What is there, above the floor.
    pub have_bytes: u64,
    /// What was asked for.
    pub want_bytes: u64,
}

/// Why bits that the matching KMA named may not be used. Nothing was burned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FollowError {
    /// No such segment, or the span lies outside it.
    #[error("the bits are not in stock")]
    NoSuchBits,
    /// This end owns the segment: the other may not name its bits.
    #[error("the bits belong to this end")]
    NotTheirs,
    /// Some of the bits were used or burned already.
    #[error("the bits were used before")]
    Used,
    /// The segment is not confirmed yet.
    #[error("the segment is not confirmed")]
    Unconfirmed,
}

/// A segment that this end is about to store.
#[derive(Debug)]
pub struct NewSegment<'a> {
    /// Its stream.
    pub stream: StreamId,
    /// Its number.
    pub number: SegmentNumber,
    /// Whether its bits may be used at once.
    pub stage: Stage,
    /// Encrypting: this end owns it.
    pub key_type: KeyType,
    /// All bits that went into it.
    pub total_bits: u32,
    /// Bytes at its head that are never taken.
    pub head_bytes: u32,
    /// The weakest level of its bits and its way here.
    pub level: SecurityLevel,
    /// Equal at both ends.
    pub kma_key_id: KmaKeyId,
    /// What it is made of.
    pub composition: Option<Composition>,
    /// The bytes to store.
    pub key: &'a [u8],
}

impl Store {
    /// Takes over what `vault` holds, and erases rows that its journal does not know.
    ///
    /// # Errors
    ///
    /// The vault cannot be read; nothing was changed.
    pub fn open(mut vault: Box<dyn Vault>, pool: Pool, boot: [u8; 16]) -> Result<Self, VaultError> {
        let mut state = State::default();
        let mut unreadable = 0_u64;
        vault.replay(&mut |bytes| match postcard::from_bytes(bytes) {
            Ok(record) => state.apply(&record),
            Err(_) => unreadable += 1,
        })?;
        state.inconsistencies += unreadable;
        state.freed.clear();
        let mut store = Self {
            vault,
            pool,
            state,
            open_rows: BTreeMap::new(),
        };
        store.settle_rows()?;
        store.discard_unfinished();
        store.record(Record::Boot { boot });
        store.commit()?;
        Ok(store)
    }

    /// Erases rows that the journal does not know, and voids segments whose rows ended with an
    /// earlier process. (A durable row that is missing shows when it is read.)
    fn settle_rows(&mut self) -> Result<(), VaultError> {
        let streams = self.state.streams.values();
        let known: BTreeSet<RowId> = streams
            .flat_map(|stream| stream.segments.values().map(|s| s.row))
            .collect();
        for row in self.vault.rows()? {
            self.state.next_row = self.state.next_row.max(row.0 + 1);
            if !known.contains(&row) {
                self.vault.erase(row);
            }
        }
        if self.vault.is_volatile() && !self.state.peers.is_empty() {
            self.record(Record::Emptied);
        }
        Ok(())
    }

    /// The incarnation that peers are told: another one whenever rows were lost.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.vault.incarnation().0.wrapping_add(self.state.emptied)
    }

    /// Discards what an earlier process proposed and never stored: its mask was used, so it is not
    /// proposed again in another form.
    fn discard_unfinished(&mut self) {
        let unfinished: Vec<(StreamId, SegmentNumber)> = self
            .state
            .streams
            .iter()
            .flat_map(|(id, stream)| stream.proposed.iter().map(|&n| (id.clone(), n)))
            .collect();
        for (stream, segment) in unfinished {
            self.record(Record::Discarded {
                stream,
                segment,
                reason: DiscardReason::Restart,
            });
        }
    }

    /// Stages a record and applies it.
    fn record(&mut self, record: Record) {
        match postcard::to_allocvec(&record) {
            Ok(bytes) => self.vault.append(&bytes),
            Err(error) => unreachable!("a record encodes into memory: {error}"),
        }
        self.state.apply(&record);
        for row in std::mem::take(&mut self.state.freed) {
            self.open_rows.remove(&row);
            self.vault.erase(row);
        }
    }

    /// Makes everything done since the last call durable.
    ///
    /// # Errors
    ///
    /// The store failed and stays failed: nothing that rests on this batch may leave the node, and
    /// the process should end; a restart continues from the last batch that was durable.
    pub fn commit(&mut self) -> Result<(), VaultError> {
        self.vault.commit()
    }

    // Agreement.

    /// Whether the QKD-key entered a composition or was dropped before.
    pub(crate) fn is_used(&self, name: &QkdKeyName) -> bool {
        self.state
            .used
            .get(&(name.module_pair.clone(), name.generation))
            .is_some_and(|used| used.contains(&name.id))
    }

    /// The greatest decimal QKD-key ID of a module pair that came in and is settled.
    #[must_use]
    pub fn last_qkd_key_number(&self, module_pair: &qkd_keyfile::ModulePairId) -> Option<u64> {
        self.state
            .used
            .get(&(module_pair.clone(), qkd_keyfile::Generation::default()))?
            .last_number()
    }

    /// Settles QKD-keys: they never come in again.
    pub(crate) fn use_qkd_keys(&mut self, names: impl IntoIterator<Item = QkdKeyName>) {
        let mut by_pair: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for name in names {
            by_pair
                .entry((name.module_pair, name.generation))
                .or_default()
                .push(name.id);
        }
        for ((module_pair, generation), ids) in by_pair {
            self.record(Record::QkdKeysUsed {
                module_pair,
                generation,
                ids,
            });
        }
    }

    /// Gives out a segment number; with it the composition and its masks are spent.
    pub(crate) fn propose(
        &mut self,
        stream: &StreamId,
        composition: Option<Composition>,
    ) -> SegmentNumber {
        let segment = SegmentNumber(self.state.stream_mut(stream).next_segment);
        self.record(Record::Proposed {
            stream: stream.clone(),
            segment,
            composition,
        });
        segment
    }

    /// Stores a segment.
    ///
    /// # Errors
    ///
    /// The row cannot be sealed or staged; nothing was recorded.
    pub(crate) fn store(&mut self, new: NewSegment<'_>) -> Result<(), VaultError> {
        let row = RowId(self.state.next_row);
        let seal = self.vault.put(row, new.key)?;
        let len_bytes = u32::try_from(new.key.len()).expect("a segment fits a block of key memory");
        self.record(Record::Stored {
            stream: new.stream,
            segment: new.number,
            body: StoredSegment {
                stage: new.stage,
                key_type: new.key_type,
                total_bits: new.total_bits,
                len_bytes,
                head_bytes: new.head_bytes,
                level: new.level,
                kma_key_id: new.kma_key_id,
                composition: new.composition,
                row,
                seal,
            },
        });
        Ok(())
    }

    /// An answered segment's commit or release has come; says whether there was one to confirm.
    pub(crate) fn confirm(&mut self, stream: &StreamId, segment: SegmentNumber) -> bool {
        let waits = self
            .segment(stream, segment)
            .is_some_and(|s| s.stage == Stage::Answered);
        if waits {
            self.record(Record::Confirmed {
                stream: stream.clone(),
                segment,
            });
        }
        waits
    }

    /// The matching KMA has confirmed a segment that this end confirmed first.
    pub(crate) fn peer_confirmed(&mut self, stream: &StreamId, segment: SegmentNumber) {
        if self
            .segment(stream, segment)
            .is_some_and(|s| !s.peer_confirmed)
        {
            self.record(Record::PeerConfirmed {
                stream: stream.clone(),
                segment,
            });
        }
    }

    /// Voids a segment that is not confirmed; says whether there was one.
    pub(crate) fn discard(
        &mut self,
        stream: &StreamId,
        segment: SegmentNumber,
        reason: DiscardReason,
    ) -> bool {
        let open = self.state.streams.get(stream).is_some_and(|s| {
            s.proposed.contains(&segment)
                || s.segments
                    .get(&segment)
                    .is_some_and(|s| s.stage == Stage::Answered)
        });
        if open {
            self.record(Record::Discarded {
                stream: stream.clone(),
                segment,
                reason,
            });
        }
        open
    }

    /// Records that two ends differ over a segment that this end never stored.
    pub(crate) fn note_mismatch(&mut self, stream: &StreamId, segment: SegmentNumber) {
        self.record(Record::Discarded {
            stream: stream.clone(),
            segment,
            reason: DiscardReason::Mismatch,
        });
    }

    /// Remembers the incarnation of a peer's store; says whether it replaced another one, which
    /// voids everything shared with that peer.
    pub(crate) fn peer_store(&mut self, peer: &NodeId, incarnation: u64) -> bool {
        let known = self.state.peers.get(peer).and_then(|p| p.incarnation);
        if known != Some(incarnation) {
            self.record(Record::PeerStore {
                peer: peer.clone(),
                incarnation,
            });
        }
        known.is_some_and(|known| known != incarnation)
    }

    // Pad and supply.

    /// Takes `want_bytes` of this end's bits as pad, leaving `floor_bytes` in stock. The spans are
    /// contiguous runs, oldest segment first.
    ///
    /// # Errors
    ///
    /// [`Short`]: nothing was taken.
    pub(crate) fn take_pad(
        &mut self,
        stream: &StreamId,
        want_bytes: u32,
        floor_bytes: u64,
    ) -> Result<Vec<KeySpan>, Short> {
        let want = u64::from(want_bytes);
        let have = self.available_bytes(stream).saturating_sub(floor_bytes);
        if have < want {
            return Err(Short {
                have_bytes: have,
                want_bytes: want,
            });
        }
        let mut spans = Vec::new();
        let mut left = want_bytes;
        while left > 0 {
            let Some(span) = self.take_up_to(stream, left, Purpose::Pad) else {
                unreachable!("the stock was counted above, by one thread");
            };
            left -= span.len_bytes;
            spans.push(span);
        }
        Ok(spans)
    }

    /// Takes from the oldest open segment, at most `want_bytes`.
    fn take_up_to(
        &mut self,
        stream: &StreamId,
        want_bytes: u32,
        purpose: Purpose,
    ) -> Option<KeySpan> {
        let entry = self.state.streams.get(stream)?;
        let &number = entry.open.first()?;
        let segment = entry.segments.get(&number)?;
        let span = KeySpan {
            segment: number,
            offset_bytes: segment.mark_bytes,
            len_bytes: want_bytes.min(segment.remaining_bytes()),
        };
        self.record(Record::Taken {
            stream: stream.clone(),
            span,
            purpose,
        });
        Some(span)
    }

    /// Takes one key of `len_bytes` for applications, from one segment of at least `level`, and
    /// binds it. What is left of segments too short for it is burned on the way.
    ///
    /// # Errors
    ///
    /// [`Short`]: nothing was taken.
    pub(crate) fn take_key(
        &mut self,
        stream: &StreamId,
        len_bytes: u32,
        floor_bytes: u64,
    ) -> Result<KeySpan, Short> {
        let short = |have_bytes| Short {
            have_bytes,
            want_bytes: u64::from(len_bytes),
        };
        let entry = self.state.streams.get(stream).ok_or(short(0))?;
        let fits = |s: &Segment| s.remaining_bytes() >= len_bytes;
        let roomy = entry
            .open
            .iter()
            .find(|&n| entry.segments.get(n).is_some_and(fits))
            .copied()
            .ok_or(short(self.available_bytes(stream)))?;
        let skipped: u64 = entry
            .open
            .range(..roomy)
            .filter_map(|n| entry.segments.get(n))
            .map(|s| u64::from(s.remaining_bytes()))
            .sum();
        let have = self.available_bytes(stream).saturating_sub(floor_bytes);
        if have < skipped + u64::from(len_bytes) {
            return Err(short(have));
        }
        while self.first_open(stream) != Some(roomy) {
            let burn = Purpose::Burn(BurnReason::Remainder);
            if self.take_up_to(stream, u32::MAX, burn).is_none() {
                return Err(short(have));
            }
        }
        self.take_up_to(stream, len_bytes, Purpose::Supply)
            .ok_or(short(have))
    }

    /// Whether `number` keys of `len_bytes` and at least `level` can be taken now.
    pub(crate) fn can_cut(
        &self,
        stream: &StreamId,
        len_bytes: u32,
        number: u32,
        floor_bytes: u64,
        level: SecurityLevel,
    ) -> bool {
        let Some(entry) = self.state.streams.get(stream) else {
            return false;
        };
        let (mut missing, mut consumed) = (u64::from(number), 0);
        for segment in entry.open.iter().filter_map(|n| entry.segments.get(n)) {
            if segment.level < level {
                return false;
            }
            let keys = u64::from(segment.remaining_bytes() / len_bytes.max(1));
            if keys >= missing {
                consumed += missing * u64::from(len_bytes);
                return entry.open_bytes.saturating_sub(floor_bytes) >= consumed;
            }
            missing -= keys;
            consumed += u64::from(segment.remaining_bytes());
        }
        false
    }

    fn first_open(&self, stream: &StreamId) -> Option<SegmentNumber> {
        self.state.streams.get(stream)?.open.first().copied()
    }

    /// Binds bits just taken to a key ID, for `destination`.
    pub(crate) fn bind(&mut self, destination: &NodeId, binding: Binding) {
        let sequence = self
            .state
            .peers
            .get(destination)
            .map_or(0, |p| p.bindings_sent);
        self.record(Record::Bound {
            destination: destination.clone(),
            sequence,
            binding,
        });
    }

    /// Whether the matching KMA may name these bits now. `spans` must not overlap one another.
    ///
    /// # Errors
    ///
    /// See [`FollowError`].
    pub(crate) fn check_follow(
        &self,
        stream: &StreamId,
        spans: &[KeySpan],
    ) -> Result<(), FollowError> {
        let mut sorted: Vec<&KeySpan> = spans.iter().collect();
        sorted.sort();
        let apart = sorted.windows(2).all(|pair| {
            pair[0].segment != pair[1].segment
                || pair[0]
                    .end_bytes()
                    .is_some_and(|end| end <= pair[1].offset_bytes)
        });
        if !apart {
            return Err(FollowError::Used);
        }
        for span in spans {
            let segment = self
                .segment(stream, span.segment)
                .ok_or(FollowError::NoSuchBits)?;
            if segment.key_type != KeyType::Decrypting {
                return Err(FollowError::NotTheirs);
            }
            let end = span
                .end_bytes()
                .filter(|&end| end <= segment.len_bytes && span.len_bytes > 0)
                .ok_or(FollowError::NoSuchBits)?;
            if segment
                .followed
                .overlap(u64::from(span.offset_bytes), u64::from(end))
                != 0
            {
                return Err(FollowError::Used);
            }
            if segment.stage != Stage::Confirmed {
                return Err(FollowError::Unconfirmed);
            }
        }
        Ok(())
    }

    /// Burns bits that the matching KMA used, once and for all.
    ///
    /// # Errors
    ///
    /// See [`FollowError`]; nothing was burned.
    pub(crate) fn follow(
        &mut self,
        stream: &StreamId,
        spans: &[KeySpan],
    ) -> Result<(), FollowError> {
        self.check_follow(stream, spans)?;
        for &span in spans {
            self.record(Record::Followed {
                stream: stream.clone(),
                span,
                purpose: Purpose::Pad,
            });
        }
        Ok(())
    }

    /// Burns what lies below the owner's mark and was never used; bytes that it has bound are
    /// above `mark_bytes` or known here already.
    pub(crate) fn burn_below(
        &mut self,
        stream: &StreamId,
        number: SegmentNumber,
        mark_bytes: u32,
        reason: BurnReason,
    ) {
        let Some(segment) = self.segment(stream, number) else {
            return;
        };
        let mark = u64::from(mark_bytes.min(segment.len_bytes));
        if segment.key_type != KeyType::Decrypting {
            return;
        }
        for (start, end) in segment.followed.missing(0, mark) {
            let (Ok(offset_bytes), Ok(len_bytes)) =
                (u32::try_from(start), u32::try_from(end - start))
            else {
                continue;
            };
            self.record(Record::Followed {
                stream: stream.clone(),
                span: KeySpan {
                    segment: number,
                    offset_bytes,
                    len_bytes,
                },
                purpose: Purpose::Burn(reason),
            });
        }
    }

    /// Takes in a binding, in sequence; says whether it was new.
    ///
    /// # Errors
    ///
    /// [`FollowError`]: the bits are not free to be bound. Nothing was recorded.
    pub(crate) fn receive_binding(
        &mut self,
        source: &NodeId,
        sequence: u64,
        binding: Binding,
    ) -> Result<(), FollowError> {
        match self.check_follow(&binding.stream, &[binding.span]) {
            Ok(()) | Err(FollowError::Unconfirmed) => {}
            Err(error) => return Err(error),
        }
        self.record(Record::BindingReceived {
            source: source.clone(),
            sequence,
            binding,
        });
        Ok(())
    }

    /// The destination has all bindings up to `through`.
    pub(crate) fn bindings_acknowledged(&mut self, destination: &NodeId, through: u64) {
        let news = self
            .state
            .peers
            .get(destination)
            .and_then(|p| p.outbox.first_key_value())
            .is_some_and(|(&first, _)| first <= through);
        if news {
            self.record(Record::BindingsAcknowledged {
                destination: destination.clone(),
                through,
            });
        }
    }

    /// A bound key is about to leave to an application.
    pub(crate) fn deliver(&mut self, key_id: KsaKeyId, application: &AppId) {
        self.record(Record::Delivered {
            key_id,
            application: application.clone(),
        });
    }

    /// Forgets a segment, erasing its row.
    pub(crate) fn close(&mut self, stream: &StreamId, segment: SegmentNumber) {
        self.record(Record::Closed {
            stream: stream.clone(),
            segment,
        });
    }

    /// Copies bits out of stock.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    ///
    /// # Panics
    ///
    /// If `out` is not as long as the span.
    pub(crate) fn read(
        &mut self,
        stream: &StreamId,
        span: KeySpan,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let (row, seal, len_bytes) = {
            let segment = self
                .segment(stream, span.segment)
                .ok_or(ReadError::NoSuchBits)?;
            (segment.row, segment.seal, segment.len_bytes)
        };
        let end = span
            .end_bytes()
            .filter(|&end| end <= len_bytes)
            .ok_or(ReadError::NoSuchBits)?;
        if !self.open_rows.contains_key(&row) {
            let mut bytes = self.pool.take(len_bytes as usize)?;
            self.vault.get(row, &seal, bytes.expose_mut())?;
            if self.open_rows.len() >= MAX_OPEN_ROWS {
                self.open_rows.pop_first();
            }
            self.open_rows.insert(row, bytes);
        }
        let bytes = self.open_rows[&row].expose();
        out.copy_from_slice(&bytes[span.offset_bytes as usize..end as usize]);
        Ok(())
    }

    /// Copies the bytes of several spans, one after the other.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub(crate) fn read_all(
        &mut self,
        stream: &StreamId,
        spans: &[KeySpan],
    ) -> Result<KeyBuf, ReadError> {
        let total: usize = spans.iter().map(|s| s.len_bytes as usize).sum();
        let mut out = self.pool.take(total)?;
        let mut at = 0;
        for &span in spans {
            let next = at + span.len_bytes as usize;
            self.read(stream, span, &mut out.expose_mut()[at..next])?;
            at = next;
        }
        Ok(out)
    }

    // What there is.

    pub(crate) fn segment(&self, stream: &StreamId, number: SegmentNumber) -> Option<&Segment> {
        self.state.segment(stream, number)
    }

    pub(crate) fn stream(&self, stream: &StreamId) -> Option<&Stream> {
        self.state.streams.get(stream)
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Bytes that this end may take from a stream.
    #[must_use]
    pub fn available_bytes(&self, stream: &StreamId) -> u64 {
        self.state.streams.get(stream).map_or(0, |s| s.open_bytes)
    }

    /// The double entry of every stream: its accounts, its stock in bytes (encrypting, decrypting)
    /// and the bits that do not add up (0).
    #[must_use]
    pub fn accounts(&self) -> Vec<StreamAccounts> {
        self.state
            .streams
            .iter()
            .map(|(id, stream)| StreamAccounts {
                stream: id.clone(),
                accounts: stream.accounts,
                encrypting_bytes: stream.stock_bytes(KeyType::Encrypting),
                decrypting_bytes: stream.stock_bytes(KeyType::Decrypting),
                imbalance_bits: stream.imbalance_bits(),
            })
            .collect()
    }

    /// Records in the journal that did not fit what came before them; 0 unless it was tampered with.
    #[must_use]
    pub fn inconsistencies(&self) -> u64 {
        self.state.inconsistencies
    }
}

/// The ledger in a journal file, or in a copy of one, without opening the store: what a checker reads
/// at both ends of a stream.
///
/// # Errors
///
/// The file is not a journal, is damaged, or was written by a newer version.
pub fn read_ledger(journal: &[u8]) -> Result<Vec<Record>, LedgerError> {
    let mut records = Vec::new();
    let mut unreadable = 0;
    crate::vault::read_journal(journal, &mut |bytes| match postcard::from_bytes(bytes) {
        Ok(record) => records.push(record),
        Err(_) => unreadable += 1,
    })?;
    match unreadable {
        0 => Ok(records),
        count => Err(LedgerError::Unreadable { count }),
    }
}

/// Why a ledger cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The file itself cannot.
    #[error(transparent)]
    Journal(#[from] VaultError),
    /// Some records are of a version that is not known here.
    #[error("{count} records cannot be read")]
    Unreadable {
        /// How many.
        count: u64,
    },
}

/// The books of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamAccounts {
    /// The stream.
    pub stream: StreamId,
    /// Its double entry.
    pub accounts: Accounts,
    /// Usable bytes that this end owns.
    pub encrypting_bytes: u64,
    /// Usable bytes that the other end owns.
    pub decrypting_bytes: u64,
    /// What the double entry does not explain.
    pub imbalance_bits: i128,
}
