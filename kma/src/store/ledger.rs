//! The journal's records, written and read.

use super::Store;
use crate::{
    record::Record,
    state::State,
    vault::{Vault, VaultError},
};

/// Version of the records. A journal with a record that this version cannot read is not opened: to
/// pass over a use of bits would be to use them again.
const VERSION: u32 = 1;

pub(super) fn encode(record: &Record) -> Vec<u8> {
    match postcard::to_allocvec(record) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("a record encodes into memory: {error}"),
    }
}

/// What all records of a vault add up to.
pub(super) fn fold(vault: &mut dyn Vault) -> Result<State, VaultError> {
    let mut state = State::default();
    let mut snapshot = Vec::new();
    let mut complete = true;
    let mut unreadable = false;
    vault.replay(&mut |bytes| match postcard::from_bytes(bytes) {
        Ok(Record::Snapshot { more, part }) => {
            snapshot.extend(part);
            complete = more == 0;
            if complete {
                let bytes = std::mem::take(&mut snapshot);
                match postcard::from_bytes(&bytes) {
                    Ok(whole) => state = whole,
                    Err(_) => unreadable = true,
                }
            }
        }
        Ok(record) => state.apply(&record),
        Err(_) => unreadable = true,
    })?;
    if unreadable || !complete {
        return Err(VaultError::NewerVersion {
            file: "journal's records",
            found: VERSION + 1,
            known: VERSION,
        });
    }
    Ok(state)
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
