use std::collections::{BTreeMap, BTreeSet};

use qkd_keyfile::Incarnation;

use super::disk::Disk;
use super::frame::Kind;
use super::journal::{self, Journal};
use super::kek::{KekKind, KekSource};
use super::seal::{Context, NONCE_BYTES, TAG_BYTES, parts};
use super::slots::{self, DataKey, Slots};
use super::staged::Staged;
use super::{GetError, HistoryLimit, MAX_ROW_BYTES, RowId, SealTag, Vault, VaultError};
use crate::fail_point::fail_point;

/// A database of sealed rows. It never sees a key.
pub(super) trait Rows: Send {
    /// Every row, in order.
    fn ids(&mut self) -> Result<Vec<RowId>, VaultError>;

    /// Fails with [`VaultError::Full`] unless so many rows of so many bytes together fit.
    fn check_room(&self, rows: usize, len_bytes: usize) -> Result<(), VaultError>;

    /// Shows a row, if it is there.
    fn read(&self, row: RowId, with: &mut dyn FnMut(&[u8])) -> Result<(), VaultError>;

    /// One durable transaction: all or nothing, unless the error is final.
    fn apply(
        &mut self,
        puts: &BTreeMap<RowId, Vec<u8>>,
        deletes: &BTreeSet<RowId>,
    ) -> Result<(), VaultError>;
}

/// A [`Vault`] whose rows are sealed on disk.
pub struct SealedVault {
    journal: Journal,
    slots: Slots,
    rows: Box<dyn Rows>,
    /// Every row of which any trace exists, staged ones too.
    known: BTreeSet<RowId>,
    /// Sealed, not in the database yet.
    puts: Staged,
    /// To be erased when the journal is durable.
    erasures: BTreeSet<RowId>,
    /// Without a data key, to be deleted from the database, or overwritten. That only gives back
    /// space, so it waits for the next transaction.
    leftovers: BTreeSet<RowId>,
    poisoned: bool,
}

/// Deletions do not wait beyond this many rows.
const MAX_LEFTOVERS: usize = 256;

impl SealedVault {
    /// Opens or makes journal and slots; `open_rows` comes last, for both are to be valid first.
    pub(super) fn open(
        disk: Box<dyn Disk>,
        kek: &KekSource,
        open_rows: impl FnOnce() -> Result<Box<dyn Rows>, VaultError>,
    ) -> Result<Self, VaultError> {
        let has = |name| {
            let opened = disk.open(name);
            opened.map_err(|source| VaultError::Io { file: name, source })
        };
        slots::recover(&*disk)?;
        if has(slots::NAME)?.is_some() && has(journal::NAME)?.is_none() {
            return Err(VaultError::Missing {
                file: journal::NAME,
            });
        }
        let journal = Journal::open(disk, Kind::Sealed)?;
        let slots = Slots::open(
            journal.disk(),
            journal.incarnation(),
            kek,
            journal.is_empty(),
        )?;
        let mut rows = open_rows()?;
        let known = rows.ids()?.into_iter().chain(slots.rows()).collect();
        Ok(Self {
            journal,
            slots,
            rows,
            known,
            puts: Staged::default(),
            erasures: BTreeSet::new(),
            leftovers: BTreeSet::new(),
            poisoned: false,
        })
    }

    /// Begins a new epoch under another key-encryption key: every live data key is wrapped anew, and
    /// what the old one wrapped is destroyed.
    ///
    /// # Errors
    ///
    /// As [`Vault::rotate_epoch`].
    pub fn rekey(&mut self, new: &KekSource) -> Result<(), VaultError> {
        self.begin_epoch(Some(new))
    }

    /// Counts the epochs since the store was made, and what its key-encryption key is made of.
    #[must_use]
    pub const fn epoch(&self) -> (u64, KekKind) {
        self.slots.epoch()
    }

    fn begin_epoch(&mut self, new: Option<&KekSource>) -> Result<(), VaultError> {
        self.commit()?;
        let outcome = self.slots.rotate(self.journal.disk(), new);
        self.latch(outcome)
    }

    fn usable(&self) -> Result<(), VaultError> {
        if self.poisoned {
            return Err(VaultError::Poisoned);
        }
        Ok(())
    }

    /// Remembers a final failure.
    fn latch<T>(&mut self, outcome: Result<T, VaultError>) -> Result<T, VaultError> {
        self.poisoned |= outcome.as_ref().is_err_and(VaultError::is_final);
        outcome
    }

    /// Each step is skipped when a later call finds it done.
    fn commit_in_order(&mut self) -> Result<(), VaultError> {
        self.slots.commit()?;
        fail_point!("slots");
        if self.puts.size().0 > 0 || self.leftovers.len() > MAX_LEFTOVERS {
            self.rows.apply(self.puts.rows(), &self.leftovers)?;
            self.puts.clear();
            self.leftovers_are_gone();
        }
        fail_point!("rows");
        self.journal.commit()?;
        fail_point!("journal");
        self.slots.erase(&self.erasures)?;
        fail_point!("erased");
        self.leftovers.append(&mut self.erasures);
        Ok(())
    }

    fn leftovers_are_gone(&mut self) {
        for row in std::mem::take(&mut self.leftovers) {
            self.known.remove(&row);
        }
    }

    #[cfg(test)]
    pub(super) fn rows_looked_at(&self) -> usize {
        self.puts.looked_at.get()
    }

    /// Sees to room for one more row, of `len_bytes`.
    fn make_room(&mut self, len_bytes: usize) -> Result<(), VaultError> {
        let (rows, staged_bytes) = self.puts.size();
        let (rows, len_bytes) = (rows + 1, staged_bytes + len_bytes);
        match self.rows.check_room(rows, len_bytes) {
            Err(VaultError::Full { .. }) if !self.leftovers.is_empty() => {
                let deleted = self.rows.apply(&BTreeMap::new(), &self.leftovers);
                self.latch(deleted)?;
                self.leftovers_are_gone();
                self.rows.check_room(rows, len_bytes)
            }
            answer => answer,
        }
    }

    fn unseal(
        &self,
        row: RowId,
        tag: &SealTag,
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<(), GetError> {
        let store = self.journal.incarnation();
        unseal(store, &self.slots, (row, tag), sealed, out)
    }
}

/// Opens a sealed row into `out`.
pub(super) fn unseal(
    store: Incarnation,
    slots: &Slots,
    (row, tag): (RowId, &SealTag),
    sealed: &[u8],
    out: &mut [u8],
) -> Result<(), GetError> {
    let Some((_, cipher, stored_tag)) = parts(sealed) else {
        return Err(GetError::Damaged { row });
    };
    if cipher.len() != out.len() {
        return Err(GetError::Length {
            row,
            have_bytes: cipher.len(),
            asked_bytes: out.len(),
        });
    }
    if stored_tag != tag.0 {
        return Err(GetError::OtherRow { row });
    }
    let key = slots.data_key(row);
    let key = match key.map_err(|source| GetError::Vault { row, source })? {
        DataKey::Found(key) => key,
        DataKey::Gone => return Err(GetError::DataKeyGone { row }),
        DataKey::Damaged => return Err(GetError::Damaged { row }),
    };
    if !key.open(&Context::row(store, row), sealed, out) {
        return Err(GetError::Damaged { row });
    }
    Ok(())
}

impl Vault for SealedVault {
    fn incarnation(&self) -> Incarnation {
        self.journal.incarnation()
    }

    fn replay(&mut self, each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
        self.journal.replay(each)
    }

    fn rows(&mut self) -> Result<Vec<RowId>, VaultError> {
        self.usable()?;
        let known = self.known.iter().filter(|row| {
            self.puts.get(**row).is_none()
                && !self.erasures.contains(row)
                && !self.leftovers.contains(row)
        });
        Ok(known.copied().collect())
    }

    fn append(&mut self, record: &[u8]) {
        self.journal.append(record);
    }

    fn put(&mut self, row: RowId, key: &[u8]) -> Result<SealTag, VaultError> {
        self.usable()?;
        if key.is_empty() || key.len() > MAX_ROW_BYTES {
            return Err(VaultError::RowLength {
                len_bytes: key.len(),
            });
        }
        if self.known.contains(&row) && !self.leftovers.contains(&row) {
            return Err(VaultError::RowExists { row });
        }
        let mut sealed = vec![0; NONCE_BYTES + key.len() + TAG_BYTES];
        self.make_room(sealed.len())?;
        let cipher = self.slots.stage(row)?;
        self.known.insert(row);
        self.leftovers.remove(&row);
        let context = Context::row(self.journal.incarnation(), row);
        let tag = cipher.seal(&context, key, &mut sealed);
        match tag {
            Ok(_) => self.puts.insert(row, sealed),
            Err(_) => self.erase(row),
        }
        tag
    }

    fn get(&mut self, row: RowId, tag: &SealTag, out: &mut [u8]) -> Result<(), GetError> {
        let failed = |source| GetError::Vault { row, source };
        self.usable().map_err(failed)?;
        if self.erasures.contains(&row) || self.leftovers.contains(&row) {
            return Err(GetError::Missing { row });
        }
        if let Some(sealed) = self.puts.get(row) {
            return self.unseal(row, tag, sealed, out);
        }
        let mut outcome = Err(GetError::Missing { row });
        self.rows
            .read(row, &mut |sealed| {
                outcome = self.unseal(row, tag, sealed, out);
            })
            .map_err(failed)?;
        outcome
    }

    fn erase(&mut self, row: RowId) {
        if self.known.contains(&row) && !self.leftovers.contains(&row) {
            self.puts.remove(row);
            self.erasures.insert(row);
        }
    }

    fn commit(&mut self) -> Result<(), VaultError> {
        self.usable()?;
        let outcome = self.commit_in_order();
        self.latch(outcome)
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

    fn rotate_epoch(&mut self) -> Result<(), VaultError> {
        self.begin_epoch(None)
    }
}

impl std::fmt::Debug for SealedVault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealedVault")
            .field("rows", &self.known.len())
            .field("journal_bytes", &self.journal.bytes())
            .field("poisoned", &self.poisoned)
            .finish_non_exhaustive()
    }
}
