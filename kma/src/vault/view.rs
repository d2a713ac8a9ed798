//! A store that is looked at and not changed: for checkers, figures and tracing.
//!
//! Nothing is repaired, settled or cut off, not even what opening it would.

use std::fs;
use std::path::{Path, PathBuf};

use qkd_keyfile::Incarnation;
use zeroize::Zeroizing;

use super::disk::Directory;
use super::frame::{Header, Kind, Scan, each_record};
use super::kek::{KekKind, KekSource};
use super::sealed::{Rows, unseal};
use super::slots::{self, Slots};
use super::{GetError, RowId, SealTag, VaultError, archive, journal, lmdb};

/// The journal of a store, read without a lock: beside a node that runs, it is as of some commit.
#[derive(Debug)]
pub struct JournalView {
    dir: PathBuf,
    image: Vec<u8>,
    end: usize,
    incarnation: Incarnation,
    kind: u32,
    /// Names the archive that this journal will be.
    unfinished: String,
    /// Bytes of a last commit that a crash cut short; opening the store drops them.
    pub torn_bytes: usize,
}

impl JournalView {
    /// Reads and verifies the journal of the store in `dir`.
    ///
    /// # Errors
    ///
    /// [`VaultError::Missing`]: there is no store. [`VaultError::Header`],
    /// [`VaultError::NewerVersion`], [`VaultError::JournalDamaged`], [`VaultError::Io`].
    pub fn read(dir: &Path) -> Result<Self, VaultError> {
        let image = read_file(dir, journal::NAME)?.ok_or(VaultError::Missing {
            file: journal::NAME,
        })?;
        let header = Header::decode(&image)?;
        let scan = Scan::run(&image, &header)?;
        let torn_bytes = if scan.torn { image.len() - scan.end } else { 0 };
        Ok(Self {
            dir: dir.into(),
            end: scan.end,
            image,
            incarnation: header.incarnation,
            kind: header.kind,
            unfinished: archive::name_of(header.first_number),
            torn_bytes,
        })
    }

    /// The store's incarnation.
    #[must_use]
    pub const fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Whether rows are sealed on disk, and not in memory only.
    #[must_use]
    pub const fn is_sealed(&self) -> bool {
        self.kind == Kind::Sealed as u32
    }

    /// Bytes in use.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        self.end
    }

    /// Every record since the last compaction, in order.
    pub fn each_record(&self, each: &mut dyn FnMut(&[u8])) {
        each_record(&self.image[..self.end], self.incarnation, each);
    }

    /// The journals that compactions replaced, oldest first: whole records, as they were written.
    ///
    /// # Errors
    ///
    /// One of them cannot be read or is damaged.
    pub fn each_archived_record(&self, each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
        for file in self.archives()? {
            // One that a running node has dropped meanwhile is gone by its policy.
            let Some(image) = read_file(&self.dir, &file.name)? else {
                continue;
            };
            super::read_journal(&image, each)?;
        }
        Ok(())
    }

    /// Length of those, in bytes, and how many they are.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn archived_bytes(&self) -> Result<(u64, usize), VaultError> {
        let files = self.archives()?;
        Ok((files.iter().map(|f| f.len_bytes).sum(), files.len()))
    }

    /// A compaction that did not come to its end leaves a second name of the journal itself.
    fn archives(&self) -> Result<Vec<archive::Archive>, VaultError> {
        let mut files = archive::list(&Directory::unlocked(&self.dir))?;
        files.retain(|file| file.name != self.unfinished);
        Ok(files)
    }

    /// Bytes that the files of data keys and rows take on the disk.
    #[must_use]
    pub fn file_bytes(&self) -> (u64, u64) {
        use std::os::unix::fs::MetadataExt;
        let blocks = |name: &str| {
            let about = fs::metadata(self.dir.join(name));
            about.map_or(0, |about| about.blocks() * 512)
        };
        (blocks(slots::NAME), blocks("rows/data.mdb"))
    }
}

/// A whole store, locked against nodes, with its rows where they are on disk.
pub struct StoreView {
    /// Its journal.
    pub journal: JournalView,
    sealed: Option<(Slots, Box<dyn Rows>)>,
    _lock: Directory,
}

impl StoreView {
    /// Locks the store in `dir` and reads it. `kek` is asked for only where rows are on disk.
    ///
    /// # Errors
    ///
    /// As [`super::open_lmdb`]; [`VaultError::InUse`] while a node runs.
    pub fn open<E: From<VaultError>>(
        dir: &Path,
        kek: impl FnOnce() -> Result<KekSource, E>,
    ) -> Result<Self, E> {
        if !dir.join(journal::NAME).exists() {
            let file = journal::NAME;
            return Err(VaultError::Missing { file }.into());
        }
        let lock = Directory::lock(dir)?;
        let journal = JournalView::read(dir)?;
        let sealed = if journal.is_sealed() {
            let (slots, _) = Slots::view(&lock, journal.incarnation, &kek()?)?;
            Some((slots, lmdb::view_rows(dir)?))
        } else {
            None
        };
        Ok(Self {
            journal,
            sealed,
            _lock: lock,
        })
    }

    /// Whether a row is whole and is the one of that tag. A store in memory has none that could not
    /// be.
    ///
    /// # Errors
    ///
    /// See [`GetError`].
    pub fn check_row(&self, row: RowId, tag: &SealTag, len_bytes: usize) -> Result<(), GetError> {
        let Some((slots, rows)) = &self.sealed else {
            return Ok(());
        };
        let mut out = Zeroizing::new(vec![0; len_bytes]);
        let mut outcome = Err(GetError::Missing { row });
        rows.read(row, &mut |sealed| {
            outcome = unseal(
                self.journal.incarnation,
                slots,
                (row, tag),
                sealed,
                &mut out,
            );
        })
        .map_err(|source| GetError::Vault { row, source })?;
        outcome
    }

    /// Every row of which any trace exists.
    ///
    /// # Errors
    ///
    /// The database cannot be read.
    pub fn rows(&mut self) -> Result<Vec<RowId>, VaultError> {
        let Some((slots, rows)) = &mut self.sealed else {
            return Ok(Vec::new());
        };
        let mut ids: Vec<RowId> = slots.rows().chain(rows.ids()?).collect();
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// Slots of data keys, those of them that do not verify, the epoch, and what the key-encryption
    /// key is made of.
    #[must_use]
    pub fn slots(&self) -> Option<(u32, u32, u64, KekKind)> {
        let (slots, _) = self.sealed.as_ref()?;
        let ((count, damaged), (epoch, kind)) = (slots.counts(), slots.epoch());
        Some((count, damaged, epoch, kind))
    }
}

impl std::fmt::Debug for StoreView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreView")
            .field("journal_bytes", &self.journal.end)
            .finish_non_exhaustive()
    }
}

fn read_file(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, VaultError> {
    match fs::read(dir.join(name)) {
        Ok(image) => Ok(Some(image)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(VaultError::Io {
            file: journal::NAME,
            source,
        }),
    }
}
