//! Rows in locked memory only; the journal, which holds no key, on disk.
//!
//! After a restart the journal tells of rows that are gone: the caller counts them as burned.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use qkd_keyfile::Incarnation;
use qkd_secmem::{KeyBuf, Pool};

use super::disk::{Directory, Disk};
use super::frame::Kind;
use super::journal::Journal;
use super::seal::{TAG_BYTES, random};
use super::{GetError, HistoryLimit, MAX_ROW_BYTES, RowId, SealTag, Vault, VaultError};

/// A [`Vault`] whose rows are never written anywhere.
pub struct MemoryVault {
    journal: Journal,
    pool: Pool,
    /// The tag is a random number: it tells rows apart, and there is no medium to mistrust.
    rows: BTreeMap<RowId, (SealTag, KeyBuf)>,
    /// To be wiped when the journal is durable.
    erasures: BTreeSet<RowId>,
    poisoned: bool,
}

/// Opens the journal in `dir`, or makes it (the directory too, mode 0700). Rows live in `pool`.
///
/// # Errors
///
/// As [`super::open_lmdb`], but for what concerns the key-encryption key and the database.
pub fn open_memory(dir: &Path, pool: Pool) -> Result<MemoryVault, VaultError> {
    MemoryVault::open(Box::new(Directory::lock(dir)?), pool)
}

impl MemoryVault {
    pub(super) fn open(disk: Box<dyn Disk>, pool: Pool) -> Result<Self, VaultError> {
        Ok(Self {
            journal: Journal::open(disk, Kind::Memory)?,
            pool,
            rows: BTreeMap::new(),
            erasures: BTreeSet::new(),
            poisoned: false,
        })
    }

    fn usable(&self) -> Result<(), VaultError> {
        if self.poisoned {
            return Err(VaultError::Poisoned);
        }
        Ok(())
    }

    fn latch<T>(&mut self, outcome: Result<T, VaultError>) -> Result<T, VaultError> {
        self.poisoned |= outcome.as_ref().is_err_and(VaultError::is_final);
        outcome
    }

    fn check_put(&self, row: RowId, len_bytes: usize) -> Result<(), VaultError> {
        self.usable()?;
        if len_bytes == 0 || len_bytes > MAX_ROW_BYTES {
            return Err(VaultError::RowLength { len_bytes });
        }
        if self.rows.contains_key(&row) {
            return Err(VaultError::RowExists { row });
        }
        Ok(())
    }

    fn keep(&mut self, row: RowId, key: KeyBuf) -> Result<SealTag, VaultError> {
        let mut tag = SealTag([0; TAG_BYTES]);
        random(&mut tag.0)?;
        self.rows.insert(row, (tag, key));
        Ok(tag)
    }

    fn wipe_erased(&mut self) {
        for row in std::mem::take(&mut self.erasures) {
            self.rows.remove(&row);
        }
    }
}

impl Vault for MemoryVault {
    fn is_volatile(&self) -> bool {
        true
    }

    fn incarnation(&self) -> Incarnation {
        self.journal.incarnation()
    }

    fn replay(&mut self, each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
        self.journal.replay(each)
    }

    fn rows(&mut self) -> Result<Vec<RowId>, VaultError> {
        self.usable()?;
        let rows = self.rows.keys().filter(|row| !self.erasures.contains(row));
        Ok(rows.copied().collect())
    }

    fn append(&mut self, record: &[u8]) {
        self.journal.append(record);
    }

    fn put(&mut self, row: RowId, key: &[u8]) -> Result<SealTag, VaultError> {
        self.check_put(row, key.len())?;
        let key = self.pool.copy_of(key)?;
        self.keep(row, key)
    }

    fn put_buf(&mut self, row: RowId, key: KeyBuf) -> Result<SealTag, VaultError> {
        self.check_put(row, key.len_bytes())?;
        self.keep(row, key)
    }

    fn row_in_memory(&self, row: RowId, tag: &SealTag) -> Option<&[u8]> {
        let (known, key) = self.rows.get(&row)?;
        let is_it = !self.poisoned && known == tag && !self.erasures.contains(&row);
        is_it.then(|| key.expose())
    }

    fn get(&mut self, row: RowId, tag: &SealTag, out: &mut [u8]) -> Result<(), GetError> {
        self.usable()
            .map_err(|source| GetError::Vault { row, source })?;
        let found = self.rows.get(&row);
        let Some((known, key)) = found.filter(|_| !self.erasures.contains(&row)) else {
            return Err(GetError::Missing { row });
        };
        if key.len_bytes() != out.len() {
            return Err(GetError::Length {
                row,
                have_bytes: key.len_bytes(),
                asked_bytes: out.len(),
            });
        }
        if known != tag {
            return Err(GetError::OtherRow { row });
        }
        out.copy_from_slice(key.expose());
        Ok(())
    }

    fn erase(&mut self, row: RowId) {
        if self.rows.contains_key(&row) {
            self.erasures.insert(row);
        }
    }

    fn commit(&mut self) -> Result<(), VaultError> {
        self.usable()?;
        let outcome = self.journal.commit();
        self.latch(outcome)?;
        self.wipe_erased();
        Ok(())
    }

    fn compact(&mut self, snapshot: &mut dyn Iterator<Item = Vec<u8>>) -> Result<(), VaultError> {
        self.commit()?;
        let outcome = self.journal.compact(snapshot);
        self.latch(outcome)
    }

    fn reread(&self, each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
        self.journal.reread(each)
    }

    fn prune_history(&mut self, limit: HistoryLimit) -> Result<(), VaultError> {
        self.journal.prune(limit)
    }

    fn journal_bytes(&self) -> u64 {
        self.journal.bytes()
    }
}

impl std::fmt::Debug for MemoryVault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryVault")
            .field("rows", &self.rows.len())
            .field("journal_bytes", &self.journal.bytes())
            .field("poisoned", &self.poisoned)
            .finish_non_exhaustive()
    }
}
