//! What a store holds, and whether it is sound: read, and never changed.

use std::{collections::BTreeMap, collections::BTreeSet, mem::size_of};

use qkd_keyfile::{
    NodeId, SegmentNumber, StreamId,
    metadata::{KeyType, SecurityLevel},
};

use super::ledger::Folding;
use crate::{
    record::Stage,
    state::State,
    stream::Segment,
    vault::{GetError, JournalView, RowId, StoreView, VaultError},
};

/// Memory that one stored segment takes beside its bytes on disk, where rows are sealed: its entry in
/// the ledger's state and in the lists of rows and slots, with what the allocator and the trees add.
/// An estimate from the sizes of the structures; `benches/store.rs` prints what a process takes.
pub const RAM_BYTES_PER_SEGMENT: u64 = 430;

/// What a journal adds up to.
#[derive(Debug)]
pub struct Survey {
    state: State,
    /// Records since the last compaction.
    pub records: u64,
}

/// Key in stock of one stream, owner and level.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StockFigures {
    /// Segments that hold some of it.
    pub segments: u64,
    /// Bytes that can still be used.
    pub usable_bytes: u64,
    /// Bytes of segments that the other end has yet to confirm.
    pub unconfirmed_bytes: u64,
    /// Bytes of their rows on the disk.
    pub stored_bytes: u64,
    /// Age of the oldest, in seconds that the store has lived.
    pub oldest_seconds: u64,
}

/// Stream, whether this end owns the key, and its level.
pub type StockOf = (StreamId, KeyType, SecurityLevel);

impl Survey {
    /// Adds up a journal.
    ///
    /// # Errors
    ///
    /// [`VaultError::NewerVersion`], [`VaultError::Unreadable`].
    pub fn of(journal: &JournalView) -> Result<Self, VaultError> {
        let (mut folding, mut records) = (Folding::default(), 0);
        journal.each_record(&mut |bytes| {
            folding.take(bytes);
            records += 1;
        });
        let mut state = folding.finish()?;
        state.freed.clear();
        Ok(Self { state, records })
    }

    /// Key in stock.
    #[must_use]
    pub fn stock(&self) -> BTreeMap<StockOf, StockFigures> {
        let mut stock: BTreeMap<StockOf, StockFigures> = BTreeMap::new();
        for (id, _, segment) in self.segments() {
            let of = (id.clone(), segment.key_type, segment.level);
            let figures = stock.entry(of).or_default();
            let bytes = match segment.stage {
                Stage::Confirmed => &mut figures.usable_bytes,
                Stage::Answered => &mut figures.unconfirmed_bytes,
            };
            *bytes += u64::from(segment.remaining_bytes());
            figures.segments += 1;
            figures.stored_bytes += u64::from(segment.len_bytes);
            let age = self
                .state
                .age_seconds
                .saturating_sub(segment.stored_at_seconds);
            figures.oldest_seconds = figures.oldest_seconds.max(age);
        }
        stock
    }

    /// Segments that are kept although they are done with, and their bytes.
    #[must_use]
    pub fn preserved(&self) -> (usize, u64) {
        let rows = self.state.preserved.values();
        (rows.len(), rows.map(|row| u64::from(row.len_bytes)).sum())
    }

    /// Other nodes, and the bindings that each has yet to acknowledge and those that wait here.
    #[must_use]
    pub fn bindings(&self) -> BTreeMap<NodeId, (usize, usize)> {
        let peers = self.state.peers.iter();
        peers
            .map(|(node, peer)| (node.clone(), (peer.outbox.len(), peer.undelivered.len())))
            .collect()
    }

    /// Memory that a node needs for what is stored, in bytes: an estimate.
    #[must_use]
    pub fn ram_bytes(&self) -> u64 {
        let bindings: usize = self
            .bindings()
            .values()
            .map(|(out, waiting)| out + waiting)
            .sum();
        let binding_bytes = size_of::<crate::record::Binding>() + 200;
        self.segments().count() as u64 * RAM_BYTES_PER_SEGMENT + (bindings * binding_bytes) as u64
    }

    fn segments(&self) -> impl Iterator<Item = (&StreamId, SegmentNumber, &Segment)> {
        let streams = self.state.streams.iter();
        streams.flat_map(|(id, stream)| {
            let segments = stream.segments.iter();
            segments.map(move |(number, segment)| (id, *number, segment))
        })
    }
}

/// What a check found.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// Rows that were read, opened and compared with the ledger's seal tag.
    pub rows: u64,
    /// Their key bytes.
    pub bytes: u64,
    /// Records of the journal.
    pub records: u64,
    /// Records of archived journals.
    pub archived_records: u64,
    /// Rows that the ledger does not know: a crash leaves some, and opening the store erases them.
    pub stray_rows: u64,
    /// Bytes of a last commit that a crash cut short: opening the store drops them.
    pub torn_bytes: u64,
    /// What is wrong.
    pub faults: Vec<StoreFault>,
}

/// Something that is wrong with a store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreFault {
    /// Key cannot be read back as it was stored. A node burns it when it comes to use it.
    #[error("segment {segment} of {stream}")]
    Segment {
        /// Its stream.
        stream: StreamId,
        /// Its number.
        segment: SegmentNumber,
        /// Why.
        #[source]
        source: GetError,
    },
    /// A preserved row cannot be read back.
    #[error("preserved row")]
    Preserved(#[source] GetError),
    /// Slots of data keys do not verify.
    #[error("{slots} slots of data keys are damaged")]
    Slots {
        /// How many.
        slots: u32,
    },
    /// The books of a stream do not add up.
    #[error("{bits} bits of {stream} are not accounted for")]
    Imbalance {
        /// The stream.
        stream: StreamId,
        /// How many.
        bits: i128,
    },
    /// Records do not fit those before them.
    #[error("{records} records do not fit what came before them")]
    Inconsistent {
        /// How many.
        records: u64,
    },
    /// The row database cannot be listed.
    #[error("row database")]
    Rows(#[source] VaultError),
    /// History cannot be read. No key is lost.
    #[error("archived journals")]
    Archive(#[source] VaultError),
}

/// Verifies a store: the journal and its archives, the slots, every row against the ledger's seal tag,
/// and the books. `progress` is told rows done and rows there are. Changes nothing.
///
/// A page of the row database may be damaged in a way that ends the process; who wants an answer then
/// runs this in a process of its own.
///
/// # Errors
///
/// The ledger cannot be read, so there is nothing to compare with.
pub fn check(
    view: &mut StoreView,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CheckReport, VaultError> {
    let survey = Survey::of(&view.journal)?;
    let mut report = CheckReport {
        records: survey.records,
        torn_bytes: view.journal.torn_bytes as u64,
        ..CheckReport::default()
    };
    let archived = view
        .journal
        .each_archived_record(&mut |_| report.archived_records += 1);
    report
        .faults
        .extend(archived.err().map(StoreFault::Archive));
    if let Some((_, damaged @ 1.., ..)) = view.slots() {
        report.faults.push(StoreFault::Slots { slots: damaged });
    }
    check_books(&survey, &mut report);
    check_rows(view, &survey, &mut report, progress);
    Ok(report)
}

fn check_books(survey: &Survey, report: &mut CheckReport) {
    for (stream, books) in &survey.state.streams {
        let bits = books.count_afresh().imbalance_bits;
        if bits != 0 {
            let stream = stream.clone();
            report.faults.push(StoreFault::Imbalance { stream, bits });
        }
    }
    if survey.state.inconsistencies > 0 {
        let records = survey.state.inconsistencies;
        report.faults.push(StoreFault::Inconsistent { records });
    }
}

fn check_rows(
    view: &mut StoreView,
    survey: &Survey,
    report: &mut CheckReport,
    progress: &mut dyn FnMut(u64, u64),
) {
    if !view.journal.is_sealed() {
        return;
    }
    let mut known = BTreeSet::new();
    let live = || {
        survey
            .segments()
            .filter(|(_, _, segment)| !segment.is_suspected)
    };
    let total = (live().count() + survey.state.preserved.len()) as u64;
    let mut done = |report: &mut CheckReport, bytes: u32| {
        report.rows += 1;
        report.bytes += u64::from(bytes);
        progress(report.rows, total);
    };
    for (stream, number, segment) in live() {
        let mut rows = vec![(segment.row, segment.seal, segment.len_bytes)];
        let hashes = segment.hashes.as_ref();
        rows.extend(hashes.map(|hashes| (hashes.row, hashes.seal, hashes.len_bytes)));
        for (row, seal, len_bytes) in rows {
            known.insert(row);
            if let Err(source) = view.check_row(row, &seal, len_bytes as usize) {
                report.faults.push(StoreFault::Segment {
                    stream: stream.clone(),
                    segment: number,
                    source,
                });
            }
        }
        done(report, segment.len_bytes);
    }
    for (row, preserved) in &survey.state.preserved {
        known.insert(*row);
        if let Err(error) = view.check_row(*row, &preserved.seal, preserved.len_bytes as usize) {
            report.faults.push(StoreFault::Preserved(error));
        }
        done(report, preserved.len_bytes);
    }
    match view.rows() {
        Ok(rows) => {
            let stray = |row: &&RowId| !known.contains(row);
            report.stray_rows = rows.iter().filter(stray).count() as u64;
        }
        Err(error) => report.faults.push(StoreFault::Rows(error)),
    }
}
