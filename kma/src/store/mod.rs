//! The key store: what may be done with key bits, and the durable record of what was.
//!
//! A [`Store`] is the one place that takes bits out of stock. Every operation checks, records and
//! applies; nothing that rests on it may leave the node before [`Store::commit`] has returned, which
//! makes all of it durable with one synchronisation per file (group commit). The caller holds its
//! messages and answers back until then, so "the mark moves past a range on disk before any byte of
//! it is used" holds by construction, and a crash loses at most the operations of one batch.

#[doc(hidden)]
mod bench;
mod cede;
mod compact;
mod follow;
mod ledger;
mod life;
#[cfg(test)]
mod life_test;
#[cfg(test)]
mod model;
mod numbering;
mod read;
mod survey;
mod take;
mod trace;

use std::collections::BTreeSet;

use qkd_keyfile::{
    AppId, Composition, KmaKeyId, KsaKeyId, NodeId, SegmentNumber, StreamId,
    metadata::{KeyType, RelayedKeyMetadata, SecurityLevel},
};
use qkd_secmem::{KeyBuf, Pool};

use crate::{
    fail_point::fail_point,
    record::{DiscardReason, Record, RelayedWay, Stage, StoredSegment},
    session::LastSessions,
    state::State,
    stream::{Accounts, Count, Segment, Stream},
    vault::{RowId, Vault, VaultError},
};

#[doc(hidden)]
pub use bench::Bench;
pub use compact::JOURNAL_LIMIT_BYTES;
pub use follow::FollowError;
pub use ledger::{LedgerError, read_ledger};
pub use life::Retention;
pub use read::ReadError;
pub use survey::{
    CheckReport, RAM_BYTES_PER_SEGMENT, StockFigures, StockOf, StoreFault, Survey, check,
};
pub use take::Short;
pub(crate) use take::{KeyOrder, KeyPlan};
pub use trace::{Event, KeyRef, Trace, trace};

use life::{AgeClock, Received};
use read::OpenRows;

/// Journal bytes that are staged before a commit is brought forward: one commit takes only so many.
const STAGED_MAX_BYTES: usize = crate::vault::MAX_COMMIT_BYTES / 4;

/// Keys, their ledger and the rules for their use.
pub struct Store {
    vault: Box<dyn Vault>,
    pool: Pool,
    memory_bytes: usize,
    state: State,
    open_rows: OpenRows,
    staged_bytes: usize,
    /// Why a commit that was brought forward failed.
    failed: Option<VaultError>,
    /// The journal is not compacted again before it is this long.
    compact_above_bytes: u64,
    retention: Retention,
    clock: AgeClock,
    received: Received,
    /// Records that become durable with the next one that must be.
    lazy: Vec<Vec<u8>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
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
    /// The bytes to store; wiped where they cannot be.
    pub key: KeyBuf,
    /// How it came here, if it was relayed.
    pub relayed: Option<&'a RelayedKeyMetadata>,
}

impl Store {
    /// Takes over what `vault` holds, and erases rows that its journal does not know.
    ///
    /// # Errors
    ///
    /// The vault cannot be read, or a newer version wrote its journal; nothing was changed.
    pub fn open(mut vault: Box<dyn Vault>, pool: Pool, boot: [u8; 16]) -> Result<Self, VaultError> {
        let mut state = ledger::fold(&mut *vault)?;
        state.freed.clear();
        let mut store = Self {
            vault,
            memory_bytes: pool.stats().capacity_bytes,
            pool,
            state,
            open_rows: OpenRows::default(),
            staged_bytes: 0,
            failed: None,
            compact_above_bytes: 0,
            retention: Retention::default(),
            clock: AgeClock::default(),
            received: Received::default(),
            lazy: Vec::new(),
        };
        if store.state.schema != ledger::SCHEMA {
            let version = ledger::SCHEMA;
            store.record(Record::Schema { version });
        }
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
            .flat_map(|stream| stream.segments.values().filter(|s| !s.is_suspected))
            .flat_map(Segment::rows)
            .chain(self.state.preserved.keys().copied())
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

    /// Stages a record and applies it; before it, the time and what has waited for it.
    fn record(&mut self, record: Record) {
        for bytes in std::mem::take(&mut self.lazy) {
            self.stage(&bytes);
        }
        if let Some(time) = self.clock.news() {
            self.stage(&ledger::encode(&time));
            self.state.apply(&time);
        }
        self.stage(&ledger::encode(&record));
        self.state.apply(&record);
        fail_point!(doing & record);
        for row in std::mem::take(&mut self.state.freed) {
            self.open_rows.close(row);
            self.vault.erase(row);
        }
    }

    fn stage(&mut self, bytes: &[u8]) {
        self.vault.append(bytes);
        self.staged_bytes += bytes.len();
    }

    /// Makes everything done since the last call durable.
    ///
    /// # Errors
    ///
    /// The store failed and stays failed: nothing that rests on this batch may leave the node, and
    /// the process should end; a restart continues from the last batch that was durable.
    pub fn commit(&mut self) -> Result<(), VaultError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        self.vault.commit()?;
        self.staged_bytes = 0;
        Ok(())
    }

    /// Brings a commit forward when a batch grows past what one commit takes. Durable too early is
    /// never wrong; a failure is told by the next [`Store::commit`].
    pub(crate) fn relieve(&mut self) {
        if self.staged_bytes > STAGED_MAX_BYTES && self.failed.is_none() {
            self.failed = self.commit().err();
        }
    }

    // Agreement.

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
        let described = self.describe(&new, RowId(row.0 + 1))?;
        let len_bytes = new.key.len_bytes();
        let len_bytes = u32::try_from(len_bytes).expect("a segment fits a block of key memory");
        let seal = match self.vault.put_buf(row, new.key) {
            Ok(seal) => seal,
            Err(error) => {
                if let Some(Record::Described { hashes, .. }) = described {
                    hashes
                        .iter()
                        .for_each(|hashes| self.vault.erase(hashes.row));
                }
                return Err(error);
            }
        };
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
        if let Some(described) = described {
            self.record(described);
        }
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
            self.burn_suspected(stream, segment);
        }
        waits
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

    /// The link sessions with a peer that this ledger has.
    pub(crate) fn last_sessions(&self, peer: &NodeId) -> LastSessions {
        let peer = self.state.peers.get(peer);
        peer.map_or_else(LastSessions::default, |peer| peer.sessions)
    }

    /// A link session begins.
    pub(crate) fn begin_session(&mut self, peer: &NodeId, session: u64) {
        if self.last_sessions(peer).begun != Some(session) {
            self.record(Record::SessionBegun {
                peer: peer.clone(),
                session,
            });
        }
    }

    /// The peer's ledger has a session that began here.
    pub(crate) fn agree_session(&mut self, peer: &NodeId, session: u64) {
        if self.last_sessions(peer).begun == Some(session) {
            self.record(Record::SessionAgreed {
                peer: peer.clone(),
                session,
            });
        }
    }

    /// The destination has all bindings up to `through`.
    pub(crate) fn bindings_acknowledged(&mut self, destination: &NodeId, through: u64) {
        let news = self.state.peers.get(destination).is_some_and(|peer| {
            let first = peer.outbox.first_key_value();
            first.is_some_and(|(&first, _)| first <= through) && through < peer.bindings_sent
        });
        if news {
            self.record(Record::BindingsAcknowledged {
                destination: destination.clone(),
                through,
            });
        }
    }

    /// A bound key is about to leave to an application.
    pub(crate) fn deliver(&mut self, source: &NodeId, key_id: KsaKeyId, application: &AppId) {
        self.record(Record::Delivered {
            source: source.clone(),
            key_id,
            application: application.clone(),
        });
    }

    /// How a unit came that waits here for its release.
    pub(crate) fn way(&self, stream: &StreamId, segment: SegmentNumber) -> Option<&RelayedWay> {
        self.state.ways.get(stream)?.get(&segment)
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

    /// Key memory that there is.
    pub(crate) const fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Whether a stream may hold no more than `capacity_bytes`, and does.
    pub(crate) fn is_full(&self, stream: &StreamId, capacity_bytes: u64) -> bool {
        let entry = self.state.streams.get(stream);
        entry.is_some_and(|entry| entry.held_bytes >= capacity_bytes)
    }

    /// Bytes that this end may take from a stream.
    #[must_use]
    pub fn available_bytes(&self, stream: &StreamId) -> u64 {
        self.state.streams.get(stream).map_or(0, |s| s.open_bytes)
    }

    /// The double entry of every stream: its accounts, its stock in bytes (encrypting, decrypting)
    /// and the bits that do not add up (0). By sums that are kept, however much is in stock; see
    /// [`Store::audit`].
    #[must_use]
    pub fn accounts(&self) -> Vec<StreamAccounts> {
        self.accounts_by(Stream::count)
    }

    /// [`Store::accounts`] by a look at every segment.
    #[must_use]
    pub fn audit(&self) -> Vec<StreamAccounts> {
        self.accounts_by(Stream::count_afresh)
    }

    /// Holds the kept sums against a recount. One that differs is counted as an inconsistency.
    pub(crate) fn audit_kept(&mut self) {
        let (kept, counted) = (self.accounts(), self.audit());
        for (kept, counted) in kept.iter().zip(&counted).filter(|(k, c)| k != c) {
            tracing::error!(
                ?kept,
                ?counted,
                "sums of a stream are not those of its segments"
            );
            self.state.inconsistencies += 1;
        }
    }

    fn accounts_by(&self, count: impl Fn(&Stream) -> Count) -> Vec<StreamAccounts> {
        self.state
            .streams
            .iter()
            .map(|(id, stream)| {
                let count = count(stream);
                StreamAccounts {
                    stream: id.clone(),
                    accounts: stream.accounts,
                    encrypting_bytes: count.encrypting_bytes,
                    decrypting_bytes: count.decrypting_bytes,
                    imbalance_bits: count.imbalance_bits,
                }
            })
            .collect()
    }
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
