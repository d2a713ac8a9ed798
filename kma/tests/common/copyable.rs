//! A vault whose every byte can be copied and put back: what a backup of a node's disk does.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use qkd_keyfile::Incarnation;
use qkd_kma::vault::{GetError, HistoryLimit, RowId, SealTag, Vault, VaultError};

#[derive(Clone, Default)]
struct Contents {
    journal: Vec<Vec<u8>>,
    rows: BTreeMap<RowId, Vec<u8>>,
}

/// A disk; clones are the same disk.
#[derive(Clone, Default)]
pub struct CopyableDisk(Arc<Mutex<Contents>>);

/// What a disk held once.
pub struct Backup(Contents);

impl CopyableDisk {
    pub fn backup(&self) -> Backup {
        Backup(self.0.lock().unwrap().clone())
    }

    pub fn restore(&self, backup: &Backup) {
        *self.0.lock().unwrap() = backup.0.clone();
    }

    pub fn open(&self) -> CopyableVault {
        CopyableVault {
            disk: self.clone(),
            staged: self.0.lock().unwrap().clone(),
        }
    }
}

pub struct CopyableVault {
    disk: CopyableDisk,
    staged: Contents,
}

impl Vault for CopyableVault {
    fn incarnation(&self) -> Incarnation {
        Incarnation(0xc0b1)
    }

    fn replay(&mut self, each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
        self.staged.journal.iter().for_each(|record| each(record));
        Ok(())
    }

    fn rows(&mut self) -> Result<Vec<RowId>, VaultError> {
        Ok(self.staged.rows.keys().copied().collect())
    }

    fn append(&mut self, record: &[u8]) {
        self.staged.journal.push(record.to_vec());
    }

    fn put(&mut self, row: RowId, key: &[u8]) -> Result<SealTag, VaultError> {
        self.staged.rows.insert(row, key.to_vec());
        Ok(SealTag([0; 16]))
    }

    fn get(&mut self, row: RowId, _: &SealTag, out: &mut [u8]) -> Result<(), GetError> {
        let key = self.staged.rows.get(&row);
        out.copy_from_slice(key.ok_or(GetError::Missing { row })?);
        Ok(())
    }

    fn erase(&mut self, row: RowId) {
        self.staged.rows.remove(&row);
    }

    fn commit(&mut self) -> Result<(), VaultError> {
        *self.disk.0.lock().unwrap() = self.staged.clone();
        Ok(())
    }

    fn compact(&mut self, snapshot: &mut dyn Iterator<Item = Vec<u8>>) -> Result<(), VaultError> {
        self.staged.journal = snapshot.collect();
        self.commit()
    }

    fn reread(&self, each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
        self.staged.journal.iter().for_each(|record| each(record));
        Ok(())
    }

    fn prune_history(&mut self, _: HistoryLimit) -> Result<(), VaultError> {
        Ok(())
    }

    fn journal_bytes(&self) -> u64 {
        self.staged
            .journal
            .iter()
            .map(|record| record.len() as u64)
            .sum()
    }
}
