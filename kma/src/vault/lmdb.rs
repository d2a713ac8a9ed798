//! Rows in LMDB.
//!
//! LMDB commits a transaction atomically and keeps what is committed over a crash; it does not
//! notice a damaged page, and may follow one out of its map and end the process. The seal tags
//! outside of it turn damage into an error. Should the database be beyond reading, remove its
//! directory (`rows`): every row is then reported missing, one by one, to who asks for it.
//!
//! LMDB reports a full disk as a failure like any other, after which it is not to be trusted. So
//! space on the disk is reserved before a transaction begins, where the file system can do that.

#![expect(
    unsafe_code,
    reason = "heed opens a database through an unsafe function"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use heed::types::Bytes;
use heed::{
    CommitOrAbort, Database, Env, EnvFlags, EnvOpenOptions, MdbError, RoTxn, RwTxn, WithoutTls,
};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::disk::{Directory, make_directory, sync_directory};
use super::kek::KekSource;
use super::sealed::{Rows, SealedVault};
use super::{RowId, VaultError};

/// Limits of the row database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LmdbOptions {
    /// The longest that the database may become, at least 1 MiB. Address space is reserved for it;
    /// the file grows as it is needed, and does not shrink.
    pub max_bytes: usize,
}

impl Default for LmdbOptions {
    /// 16 GiB.
    fn default() -> Self {
        Self {
            max_bytes: 16 << 30,
        }
    }
}

/// Opens the store in `dir`, or makes it (the directory too, mode 0700).
///
/// # Errors
///
/// - [`VaultError::InUse`]: another process has it.
/// - [`VaultError::Kek`], [`VaultError::WrongKek`]: nothing was changed; come back with the key.
/// - [`VaultError::JournalDamaged`], [`VaultError::Header`], [`VaultError::Missing`],
///   [`VaultError::OtherStore`], [`VaultError::Database`]: the store is damaged. Nothing was
///   repaired.
/// - [`VaultError::NewerVersion`], [`VaultError::OtherKind`]: not a store for this backend.
/// - [`VaultError::Io`], [`VaultError::NotDurable`], [`VaultError::Generator`]: the system refused.
pub fn open_lmdb(
    dir: &Path,
    kek: &KekSource,
    options: LmdbOptions,
) -> Result<SealedVault, VaultError> {
    let directory = Directory::lock(dir)?;
    let rows_dir = directory.path().join(ROWS);
    SealedVault::open(Box::new(directory), kek, || {
        Ok(Box::new(LmdbRows::open(rows_dir, options)?))
    })
}

/// Opens the rows in `dir` to look at them; nothing is written. The store's lock must be held.
pub(super) fn view_rows(dir: &Path) -> Result<Box<dyn Rows>, VaultError> {
    let dir = dir.join(ROWS);
    if !dir.is_dir() {
        return Err(VaultError::Missing { file: ROWS });
    }
    Ok(Box::new(LmdbRows {
        env: open_env(&dir, None).map_err(refused)?,
        max_bytes: 0,
        reserved_bytes: 0,
    }))
}

struct LmdbRows {
    env: Env<WithoutTls>,
    max_bytes: usize,
    /// So much of the file has its place on the disk.
    reserved_bytes: usize,
}

impl LmdbRows {
    fn open(dir: PathBuf, options: LmdbOptions) -> Result<Self, VaultError> {
        let io = |source| VaultError::Io { file: ROWS, source };
        make_directory(&dir).map_err(io)?;
        let max_bytes = options.max_bytes.max(MIN_BYTES) / MIN_BYTES * MIN_BYTES;
        let env = open_env(&dir, Some(max_bytes)).map_err(refused)?;
        sync_directory(&dir).map_err(io)?;
        Ok(Self {
            env,
            max_bytes,
            reserved_bytes: 0,
        })
    }

    fn reading(
        &self,
        body: impl FnOnce(Table, &RoTxn) -> heed::Result<()>,
    ) -> Result<(), VaultError> {
        let txn = self.env.read_txn().map_err(refused)?;
        let done = self.env.open_databases_and_commit(txn, |opener, txn| {
            let table = opener.open_database::<Bytes, Bytes>(txn, None)?;
            let table = table.ok_or(heed::Error::Mdb(MdbError::NotFound))?;
            body(table, txn).map(CommitOrAbort::<(), ()>::Commit)
        });
        done.map(CommitOrAbort::unwrap_commit).map_err(refused)
    }

    /// One transaction, durable when this returns.
    fn writing(
        &self,
        body: impl FnOnce(Table, &mut RwTxn) -> heed::Result<()>,
    ) -> Result<(), VaultError> {
        let txn = self.env.write_txn().map_err(refused)?;
        let done = self.env.create_databases_and_commit(txn, |opener, txn| {
            let table = opener.create_database::<Bytes, Bytes>(txn, None)?;
            body(table, txn).map(CommitOrAbort::<(), ()>::Commit)
        });
        done.map(CommitOrAbort::unwrap_commit)
            .map_err(|error| self.classify(error))
    }

    fn classify(&self, error: heed::Error) -> VaultError {
        match error {
            heed::Error::Mdb(MdbError::MapFull) => VaultError::Full {
                max_bytes: self.max_bytes,
            },
            error => refused(error),
        }
    }

    /// Sees to disk space for `puts`, as if no page of the file were free.
    fn reserve(&mut self, puts: &BTreeMap<RowId, Vec<u8>>) -> Result<(), VaultError> {
        let (page_bytes, used) = self.pages();
        let put_bytes: usize = puts.values().map(Vec::len).sum();
        let wanted = wanted_pages(puts.len(), put_bytes, page_bytes);
        let last = self.env.info().last_page_number;
        let end = ((last + 1 + wanted) * page_bytes).min(self.max_bytes);
        if end <= self.reserved_bytes {
            return Ok(());
        }
        let file = self.env.try_clone_inner_file().map_err(refused)?;
        let ahead = end.next_multiple_of(RESERVED_AT_ONCE).min(self.max_bytes);
        let reserved = reserve_bytes(&file, ahead).or_else(|_| reserve_bytes(&file, end));
        match reserved {
            Ok(bytes) => self.reserved_bytes = bytes,
            Err(Errno::ENOSPC | Errno::EDQUOT) => {
                let free = (last + 1).saturating_sub(used);
                if !puts.is_empty() && free < 2 * wanted {
                    return Err(VaultError::Io {
                        file: ROWS,
                        source: io::ErrorKind::StorageFull.into(),
                    });
                }
            }
            // Not every file system can.
            Err(_) => {}
        }
        Ok(())
    }

    /// Size of a page, and how many hold rows.
    fn pages(&self) -> (usize, usize) {
        let stat = self.env.unnamed_database_stat();
        let used = stat.branch_pages + stat.leaf_pages + stat.overflow_pages;
        ((stat.page_size as usize).max(1), used)
    }

    fn store(
        &self,
        puts: &BTreeMap<RowId, Vec<u8>>,
        deletes: &BTreeSet<RowId>,
    ) -> Result<(), VaultError> {
        self.writing(|table, txn| {
            for row in deletes {
                table.delete(txn, &key_of(*row))?;
            }
            for (row, sealed) in puts {
                table.put(txn, &key_of(*row), sealed)?;
            }
            Ok(())
        })
    }
}

type Table<'t> = Database<'t, Bytes, Bytes>;

/// Written to have something to commit. Shorter than a row's key.
const TOUCH_KEY: &[u8] = b"touch";

const MIN_BYTES: usize = 1 << 20;

const RESERVED_AT_ONCE: usize = 4 << 20;

const ROWS: &str = "rows";

/// Big-endian, so that rows lie in the order in which they were put.
const fn key_of(row: RowId) -> [u8; 8] {
    row.0.to_be_bytes()
}

/// Pages that rows may need: the last page of each is full in part only, the first has a header,
/// and the tree above them grows.
fn wanted_pages(rows: usize, len_bytes: usize, page_bytes: usize) -> usize {
    len_bytes.div_ceil(page_bytes) + 2 * rows + 16
}

/// Changes neither the bytes of the file nor its length.
fn reserve_bytes(file: &File, bytes: usize) -> Result<usize, Errno> {
    let len = i64::try_from(bytes).unwrap_or(i64::MAX);
    fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, len)?;
    Ok(bytes)
}

const fn refused(error: heed::Error) -> VaultError {
    VaultError::Database(error)
}

impl Rows for LmdbRows {
    fn ids(&mut self) -> Result<Vec<RowId>, VaultError> {
        let mut ids = Vec::new();
        self.reading(|table, txn| {
            for entry in table.iter(txn)? {
                let (key, _) = entry?;
                if let Ok(key) = key.try_into() {
                    ids.push(RowId(u64::from_be_bytes(key)));
                }
            }
            Ok(())
        })?;
        Ok(ids)
    }

    /// A part is kept free, for deleting needs pages too.
    fn check_room(&self, rows: usize, len_bytes: usize) -> Result<(), VaultError> {
        let (page_bytes, used) = self.pages();
        let pages = self.max_bytes / page_bytes;
        if used + wanted_pages(rows, len_bytes, page_bytes) > pages - pages / 8 {
            return Err(VaultError::Full {
                max_bytes: self.max_bytes,
            });
        }
        Ok(())
    }

    fn read(&self, row: RowId, with: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
        self.reading(|table, txn| {
            if let Some(sealed) = table.get(txn, &key_of(row))? {
                with(sealed);
            }
            Ok(())
        })
    }

    fn apply(
        &mut self,
        puts: &BTreeMap<RowId, Vec<u8>>,
        deletes: &BTreeSet<RowId>,
    ) -> Result<(), VaultError> {
        self.reserve(puts)?;
        match self.store(puts, deletes) {
            // LMDB reuses pages two transactions after they became free.
            Err(VaultError::Full { .. }) => {
                self.store(&BTreeMap::new(), deletes)?;
                self.writing(|table, txn| table.put(txn, TOUCH_KEY, &[]))?;
                self.store(puts, &BTreeSet::new())
            }
            answer => answer,
        }
    }
}

/// Opens the environment in `dir`, to be written up to a length, or to be read only.
fn open_env(dir: &Path, map_bytes: Option<usize>) -> heed::Result<Env<WithoutTls>> {
    let mut options = EnvOpenOptions::new().read_txn_without_tls();
    options.max_readers(8);
    match map_bytes {
        Some(bytes) => drop(options.map_size(bytes)),
        // SAFETY: without LMDB's own locks nobody else may have the file open. The store's lock,
        // which every writer holds, is held by this process.
        None => drop(unsafe { options.flags(EnvFlags::READ_ONLY | EnvFlags::NO_LOCK) }),
    }
    // SAFETY:
    // - Nobody else changes the file while it is mapped: the store's directory is ours (mode 0700)
    //   and locked by `Directory::lock` for as long as the vault lives, and heed keeps one
    //   environment per path in this process.
    // - No flag that weakens locking or syncing is set where something is written.
    // - A transaction lives inside one call of `reading` or `writing`; none is left open.
    // - The store is documented as local: LMDB's map is not for remote file systems.
    unsafe { options.open(dir) }
}
