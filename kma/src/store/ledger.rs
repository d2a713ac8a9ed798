//! The journal's records, written and read.

use super::Store;
use crate::{
    record::Record,
    state::State,
    vault::{Vault, VaultError},
};

/// Version of the records. A journal with a record that this version cannot read is not opened: to
/// pass over a use of bits would be to use them again.
pub(super) const SCHEMA: u32 = 3;

const RECORDS: &str = "journal's records";

pub(super) fn encode(record: &Record) -> Vec<u8> {
    match postcard::to_allocvec(record) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("a record encodes into memory: {error}"),
    }
}

/// What all records of a vault add up to.
pub(super) fn fold(vault: &mut dyn Vault) -> Result<State, VaultError> {
    let mut folding = Folding::default();
    vault.replay(&mut |bytes| {
        folding.take(bytes);
    })?;
    folding.finish()
}

/// Records on their way to a [`State`].
#[derive(Debug, Default)]
pub(super) struct Folding {
    state: State,
    snapshot: Vec<u8>,
    incomplete: bool,
    /// Version of the first record that is newer than this program.
    newer: Option<u32>,
    /// Records that are none.
    unreadable: u64,
}

impl Folding {
    /// Takes the next record; gives it back, read, if it could be.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Option<Record> {
        let Ok(record) = postcard::from_bytes(bytes) else {
            self.unreadable += 1;
            return None;
        };
        match &record {
            Record::Schema { version } if *version > SCHEMA => {
                self.newer.get_or_insert(*version);
            }
            Record::Snapshot { more, part } => {
                self.snapshot.extend(part);
                self.incomplete = *more != 0;
                if !self.incomplete {
                    match postcard::from_bytes(&std::mem::take(&mut self.snapshot)) {
                        Ok(whole) => self.state = whole,
                        Err(_) => self.unreadable += 1,
                    }
                }
            }
            record => self.state.apply(record),
        }
        Some(record)
    }

    pub(super) fn finish(self) -> Result<State, VaultError> {
        if let Some(found) = self.newer {
            return Err(VaultError::NewerVersion {
                file: RECORDS,
                found,
                known: SCHEMA,
            });
        }
        // What this version wrote, it reads.
        if self.unreadable > 0 || self.incomplete {
            return Err(VaultError::Unreadable {
                records: self.unreadable.max(1),
            });
        }
        Ok(self.state)
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

impl Store {
    /// Records in the journal that did not fit what came before them; 0 unless it was tampered with.
    #[must_use]
    pub fn inconsistencies(&self) -> u64 {
        self.state.inconsistencies
    }
}
