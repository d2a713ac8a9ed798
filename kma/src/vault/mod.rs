//! The physical layer under the key store: sealed rows of key, and the journal of what happened.
//!
//! A [`Vault`] keeps two things. *Rows* are key bytes under a number; they are put once, read, and
//! erased. *Journal records* are opaque to it and hold no key. It knows nothing of links, segments,
//! marks or owners: what a row means, and which rows ought to exist, only the journal's writer
//! knows.
//!
//! | backend | rows | journal |
//! |---|---|---|
//! | [`lmdb`] | in LMDB, each sealed under its own data key; the data keys, wrapped, in a slot file | on disk |
//! | [`memory`] | in locked memory, gone with the process | on disk |
//! | [`sim`] | as `lmdb`, on a disk that a test can break | simulated |
//!
//! # Invariants
//!
//! - What a [`Vault::commit`] made durable is there after any crash; of what was staged and not
//!   committed, the journal shows all or nothing.
//! - A row is durable before the journal that mentions it; a row is erased only after the journal
//!   that gives it up is durable. A crash in between leaves rows that the journal does not know.
//! - A row that was erased cannot be read from the database file, not even from a copy that was
//!   made before, once its slot is overwritten: its data key existed nowhere else.
//! - Damage on disk is an error that names the place (or the end of the process, where LMDB follows
//!   a broken page). It never is a wrong key, a missing key or a shorter journal.
//! - After a failed sync nothing is known about the disk, so everything fails until it is reopened.

mod archive;
pub mod disk;
mod frame;
mod journal;
mod kek;
pub mod lmdb;
pub mod memory;
mod seal;
mod sealed;
pub mod sim;
mod slots;
mod staged;
mod view;

use std::io;
use std::path::PathBuf;

use qkd_keyfile::Incarnation;
use qkd_secmem::{KeyBuf, PoolExhausted};
use serde::{Deserialize, Serialize};

pub use archive::HistoryLimit;
pub use frame::read_journal;
pub use kek::{Kdf, KekError, KekKind, KekSource};
pub use lmdb::{LmdbOptions, open_lmdb};
pub use memory::{MemoryVault, open_memory};
pub use sealed::SealedVault;
pub use view::{JournalView, StoreView};

/// Number of a row, chosen by the caller. It is free again when the erasure is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RowId(pub u64);

impl std::fmt::Display for RowId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Proof that a row is the one that was put. Says nothing about its bytes to whom lacks the data
/// key; the journal keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SealTag(pub [u8; 16]);

/// The longest row.
pub const MAX_ROW_BYTES: usize = qkd_secmem::MAX_BLOCK_BYTES;

/// The longest journal record.
pub const MAX_RECORD_BYTES: usize = 1 << 20;

/// The most journal bytes that one commit takes.
pub const MAX_COMMIT_BYTES: usize = 64 << 20;

/// Durable home of sealed rows and of the journal. One writer.
///
/// Changes are staged, and become durable together in [`Vault::commit`].
pub trait Vault: Send {
    /// Drawn at random when the store was made; kept over compaction.
    fn incarnation(&self) -> Incarnation;

    /// Whether rows end with the process while the journal stays.
    fn is_volatile(&self) -> bool {
        false
    }

    /// Every journal record since the last compaction, in order. Called once, first.
    ///
    /// # Errors
    ///
    /// [`VaultError::AlreadyReplayed`] the second time. (Damage is found when the store is opened.)
    fn replay(&mut self, each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError>;

    /// The committed rows of which any trace exists, whole or not, in order. After the replay, the
    /// caller erases those that its journal does not know.
    ///
    /// # Errors
    ///
    /// [`VaultError::Poisoned`].
    fn rows(&mut self) -> Result<Vec<RowId>, VaultError>;

    /// Stages a journal record of at most [`MAX_RECORD_BYTES`]. A longer one makes every later
    /// commit fail: the journal would not tell what happened.
    fn append(&mut self, record: &[u8]);

    /// Stages a row of 1 to [`MAX_ROW_BYTES`] bytes.
    ///
    /// # Errors
    ///
    /// Nothing was staged:
    /// - [`VaultError::Full`], [`VaultError::PoolExhausted`]: there is no room; erase rows, commit,
    ///   and try again.
    /// - [`VaultError::RowLength`], [`VaultError::RowExists`]: the caller's mistake.
    /// - [`VaultError::Generator`]: no random bytes for a data key.
    /// - [`VaultError::Poisoned`].
    fn put(&mut self, row: RowId, key: &[u8]) -> Result<SealTag, VaultError>;

    /// [`Vault::put`] of bytes that are in key memory already, which a vault may keep as they are. They
    /// are gone either way.
    ///
    /// # Errors
    ///
    /// As [`Vault::put`].
    fn put_buf(&mut self, row: RowId, key: KeyBuf) -> Result<SealTag, VaultError> {
        self.put(row, key.expose())
    }

    /// A row that lies open in key memory, so that it need not be copied to be read. `None` where
    /// rows do not, and for what [`Vault::get`] would refuse.
    fn row_in_memory(&self, _row: RowId, _tag: &SealTag) -> Option<&[u8]> {
        None
    }

    /// Copies a row, staged or committed, into `out`, whose length is the row's. What does not
    /// verify against `tag` is not delivered.
    ///
    /// # Errors
    ///
    /// See [`GetError`]. `out` holds no key then: it was not touched, or wiped.
    fn get(&mut self, row: RowId, tag: &SealTag, out: &mut [u8]) -> Result<(), GetError>;

    /// Stages the end of a row, which cannot be read from now on. The bytes go after the journal is
    /// durable. Does nothing for a row that does not exist.
    fn erase(&mut self, row: RowId);

    /// Makes everything staged durable, in this order: rows and slots, then the journal, then
    /// erasures. Nothing that rests on staged state may leave the node before it returns.
    ///
    /// # Errors
    ///
    /// - [`VaultError::is_final`]: nobody knows what is durable. Everything fails until the store
    ///   is reopened and replayed.
    /// - Otherwise (no space, for one): the journal shows nothing of this commit. All of it stays
    ///   staged; make room and call again.
    fn commit(&mut self) -> Result<(), VaultError>;

    /// Shows every committed record since the last compaction again, in order.
    ///
    /// # Errors
    ///
    /// [`VaultError::Io`], or [`VaultError::JournalDamaged`] where the disk changed what was written.
    fn reread(&self, each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError>;

    /// Drops the oldest of the journals that compactions replaced, beyond the limit.
    ///
    /// # Errors
    ///
    /// [`VaultError::Io`]: some are still there.
    fn prune_history(&mut self, limit: HistoryLimit) -> Result<(), VaultError>;

    /// Commits, then replaces the journal by `snapshot`, atomically. The old one is kept as history.
    ///
    /// # Errors
    ///
    /// As [`Vault::commit`]. If the error is not final, the journal is what it was.
    fn compact(&mut self, snapshot: &mut dyn Iterator<Item = Vec<u8>>) -> Result<(), VaultError>;

    /// Length of the journal. It grows until it is compacted.
    fn journal_bytes(&self) -> u64;

    /// Commits, then wraps every live data key anew under the key of a new epoch, and destroys the
    /// old one. Does nothing where rows are not sealed.
    ///
    /// # Errors
    ///
    /// As [`Vault::commit`]. If the error is not final, the old epoch goes on, or what is left of it
    /// is destroyed when the store is opened next.
    fn rotate_epoch(&mut self) -> Result<(), VaultError> {
        self.commit()
    }
}

/// Why a store did not open, take or keep something. Holds no key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VaultError {
    /// Another process, or another vault of this one, has the directory.
    #[error("store {} is in use by another process", dir.display())]
    InUse {
        /// The store.
        dir: PathBuf,
    },
    /// A file operation failed, with a known outcome: it did not happen.
    #[error("cannot read or write the store's {file}")]
    Io {
        /// Which part of the store.
        file: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file could not be made durable. Final: see [`VaultError::is_final`].
    #[error("cannot make the store's {file} durable; reopen the store")]
    NotDurable {
        /// Which part of the store.
        file: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An earlier failure left it unknown what is durable. Reopen the store.
    #[error("store failed before and has to be reopened")]
    Poisoned,
    /// The file is not one of ours, or its header is damaged.
    #[error("the store's {file} has no valid header")]
    Header {
        /// Which part of the store.
        file: &'static str,
    },
    /// The file was written by a newer version of this program.
    #[error(
        "a newer version of this program wrote the store's {file} (format {found}; this one knows formats up to {known}): run that version"
    )]
    NewerVersion {
        /// Which part of the store.
        file: &'static str,
        /// Its version.
        found: u32,
        /// The newest version that is understood.
        known: u32,
    },
    /// The file was written by an older version of this program, which nothing converts.
    #[error(
        "an older version of this program wrote the store's {file} (format {found}; this one reads {known}): begin with an empty store, and peers void what they shared"
    )]
    OlderVersion {
        /// Which part of the store.
        file: &'static str,
        /// Its version.
        found: u32,
        /// The version that is understood.
        known: u32,
    },
    /// The store was made by the other backend (`memory` or `lmdb`).
    #[error("the directory holds a store of kind {found}, not {wanted}")]
    OtherKind {
        /// What the journal says.
        found: u32,
        /// What was asked for: 1 is sealed rows on disk, 2 is rows in memory.
        wanted: u32,
    },
    /// Files of two stores are mixed in the directory.
    #[error("the store's {file} belongs to another store")]
    OtherStore {
        /// The file that differs from the journal.
        file: &'static str,
    },
    /// A file is gone that the others presume.
    #[error("the store's {file} is missing")]
    Missing {
        /// The file.
        file: &'static str,
    },
    /// The journal is damaged in a place that no power cut explains. Nothing was cut off.
    #[error("journal is damaged at byte {offset}")]
    JournalDamaged {
        /// Where in the file.
        offset: u64,
    },
    /// The journal is whole, and its records are not of a version that this program knows, nor of one
    /// that says which it is.
    #[error(
        "{records} records of the journal cannot be read: another version of this program wrote them"
    )]
    Unreadable {
        /// How many.
        records: u64,
    },
    /// There is no usable key-encryption key.
    #[error(transparent)]
    Kek(#[from] KekError),
    /// The key-encryption key is not the one that the data keys are wrapped under.
    #[error("the key-encryption key is not the one of this store")]
    WrongKek,
    /// The row database failed.
    #[error("row database failed")]
    Database(#[source] heed::Error),
    /// The row database has reached its limit.
    #[error("row database is full at {max_bytes} bytes")]
    Full {
        /// The limit.
        max_bytes: usize,
    },
    /// There is no locked memory left for a row.
    #[error(transparent)]
    PoolExhausted(#[from] PoolExhausted),
    /// No vault takes a row that long (or an empty one).
    #[error("row of {len_bytes} bytes; rows have 1 to {MAX_ROW_BYTES}")]
    RowLength {
        /// Its length.
        len_bytes: usize,
    },
    /// A row of that number exists, or its erasure is not committed.
    #[error("row {row} exists already")]
    RowExists {
        /// The row.
        row: RowId,
    },
    /// A journal record, or all of them in one commit, is longer than allowed. Final.
    #[error("{len_bytes} journal bytes at once; the limit is {max_bytes}")]
    TooLong {
        /// The length.
        len_bytes: usize,
        /// [`MAX_RECORD_BYTES`] or [`MAX_COMMIT_BYTES`].
        max_bytes: usize,
    },
    /// The journal is replayed once.
    #[error("journal was replayed already")]
    AlreadyReplayed,
    /// The cryptographic library gave no random bytes, or did not seal.
    #[error("the cryptographic library failed")]
    Generator,
}

impl VaultError {
    /// Whether the disk is full. Nothing that was acknowledged is lost: make room, and go on or start
    /// again.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        let full = |source: &io::Error| {
            matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        };
        matches!(self, Self::Io { source, .. } | Self::NotDurable { source, .. } if full(source))
    }

    /// Whether the vault is of no use any more, for nobody knows what is durable: drop it, open the
    /// store again and replay.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        match self {
            Self::NotDurable { .. }
            | Self::Poisoned
            | Self::TooLong { .. }
            | Self::JournalDamaged { .. }
            | Self::Database(_) => true,
            Self::InUse { .. }
            | Self::Io { .. }
            | Self::Header { .. }
            | Self::NewerVersion { .. }
            | Self::OlderVersion { .. }
            | Self::OtherKind { .. }
            | Self::OtherStore { .. }
            | Self::Missing { .. }
            | Self::Unreadable { .. }
            | Self::Kek(_)
            | Self::WrongKek
            | Self::Full { .. }
            | Self::PoolExhausted(_)
            | Self::RowLength { .. }
            | Self::RowExists { .. }
            | Self::AlreadyReplayed
            | Self::Generator => false,
        }
    }
}

/// Why [`Vault::get`] delivered no key. Only the first two may pass with time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GetError {
    /// The row could not be read this time.
    #[error("row {row} cannot be read")]
    Vault {
        /// The row.
        row: RowId,
        /// Why.
        #[source]
        source: VaultError,
    },
    /// `out` has another length than the row.
    #[error("row {row} has {have_bytes} bytes, not {asked_bytes}")]
    Length {
        /// The row.
        row: RowId,
        /// Its length.
        have_bytes: usize,
        /// The length of `out`.
        asked_bytes: usize,
    },
    /// There is no such row: erased, or lost.
    #[error("row {row} does not exist")]
    Missing {
        /// The row.
        row: RowId,
    },
    /// The row is there and its data key is not: erased, or its slot is damaged.
    #[error("the data key of row {row} is gone")]
    DataKeyGone {
        /// The row.
        row: RowId,
    },
    /// The row is whole, as far as can be seen, and not the one of that tag: an old copy of the
    /// database.
    #[error("row {row} is not the one that was put")]
    OtherRow {
        /// The row.
        row: RowId,
    },
    /// The row or its data key does not verify.
    #[error("row {row} is damaged")]
    Damaged {
        /// The row.
        row: RowId,
    },
}
