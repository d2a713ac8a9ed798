//! A disk for tests: it loses power, fails, and lies about what it kept, as a real one may.
//!
//! Until a file is synced, a power cut keeps any part of what was written to it, in sectors of 512
//! bytes; until the directory is synced, any part of what happened to names. A failed sync leaves
//! the writes visible and forgets that they are not on the disk, as Linux does. Equal seeds give
//! equal faults.
//!
//! ```
//! use qkd_kma::vault::{Vault, sim::{Fault, SimDisk}};
//!
//! let disk = SimDisk::new(7);
//! let mut vault = disk.open_sealed()?;
//! vault.append(b"kept");
//! vault.commit()?;
//! vault.append(b"lost");
//! disk.fail_at(disk.operations() + 1, Fault::PowerCut);
//! assert!(vault.commit().is_err());
//! drop(vault);
//!
//! disk.restart();
//! let mut records = Vec::new();
//! disk.open_sealed()?.replay(&mut |record| records.push(record.to_vec()))?;
//! assert_eq!(records[0], b"kept");
//! # Ok::<(), qkd_kma::vault::VaultError>(())
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use qkd_secmem::Pool;
use zeroize::Zeroizing;

use super::disk::{BlockFile, Disk};
use super::kek::KekSource;
use super::sealed::{Rows, SealedVault};
use super::{MemoryVault, RowId, VaultError};

/// What goes wrong with one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails; half of a write is done, and a sync loses what it should have kept.
    Io,
    /// There is no space; half of a write is done. A sync does not fail for that reason.
    NoSpace,
    /// The power goes in the middle of it. Everything fails until [`SimDisk::restart`].
    PowerCut,
}

/// One directory on a simulated disk. Clones are the same disk.
#[derive(Debug, Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

impl SimDisk {
    /// An empty disk.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            random: seed,
            ..State::default()
        })))
    }

    /// A vault of sealed rows on this disk, under a fixed key-encryption key.
    ///
    /// # Errors
    ///
    /// As [`super::open_lmdb`].
    pub fn open_sealed(&self) -> Result<SealedVault, VaultError> {
        self.open_sealed_under(&KekSource::Raw(Zeroizing::new([0x4B; 32])))
    }

    /// A vault of sealed rows on this disk, under a key-encryption key of the test's choice.
    ///
    /// # Errors
    ///
    /// As [`super::open_lmdb`].
    pub fn open_sealed_under(&self, kek: &KekSource) -> Result<SealedVault, VaultError> {
        let rows = Box::new(SimRows(self.clone()));
        SealedVault::open(Box::new(self.clone()), kek, || Ok(rows))
    }

    /// A vault of rows in memory, its journal on this disk.
    ///
    /// # Errors
    ///
    /// As [`super::open_memory`].
    pub fn open_memory(&self, pool: Pool) -> Result<MemoryVault, VaultError> {
        MemoryVault::open(Box::new(self.clone()), pool)
    }

    /// How many operations that change something there have been.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// Lets the operation of that number (the first is 1) go wrong.
    pub fn fail_at(&self, operation: u64, fault: Fault) {
        self.state().fault = Some((operation, fault));
    }

    /// Cuts the power, wherever the disk is.
    pub fn cut_power(&self) {
        self.state().cut_power();
    }

    /// Gives power back. What was not synced is lost, or not.
    pub fn restart(&self) {
        let mut state = self.state();
        if !state.dark {
            state.cut_power();
        }
        state.dark = false;
        state.fault = None;
    }

    /// The bytes of a file as they are read now.
    #[must_use]
    pub fn read(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.state();
        let inode = state.names.get(name)?;
        Some(state.inodes[*inode].seen.clone())
    }

    /// Names of all files.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.state().names.keys().cloned().collect()
    }

    /// Changes a byte of a file, behind everyone's back and durably.
    ///
    /// # Panics
    ///
    /// Where there is no such byte.
    pub fn damage(&self, name: &str, offset: usize, xor: u8) {
        let mut state = self.state();
        let inode = state.names[name];
        state.inodes[inode].seen[offset] ^= xor;
        state.inodes[inode].kept[offset] ^= xor;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct State {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    kept_names: BTreeMap<String, usize>,
    /// What happened to names since the directory was synced.
    name_changes: Vec<NameChange>,
    /// Transactions are atomic and durable, as LMDB's are.
    rows: BTreeMap<RowId, Vec<u8>>,
    operations: u64,
    fault: Option<(u64, Fault)>,
    dark: bool,
    random: u64,
}

#[derive(Debug, Default)]
struct Inode {
    /// What a reader sees.
    seen: Vec<u8>,
    /// What is on the disk.
    kept: Vec<u8>,
    /// Sectors that differ, or whose length does.
    unsynced: BTreeSet<usize>,
}

#[derive(Debug, Clone)]
enum NameChange {
    Create(String, usize),
    Rename(String, String),
    Link(String, String),
    Remove(String),
}

const SECTOR_BYTES: usize = 512;

impl State {
    /// Counts one operation: `Ok(None)` lets it happen, `Ok(Some)` lets it go wrong.
    fn step(&mut self) -> io::Result<Option<Fault>> {
        if self.dark {
            return Err(io::Error::other("no power"));
        }
        self.operations += 1;
        let due = self.fault.filter(|(at, _)| *at == self.operations);
        Ok(due.map(|(_, fault)| fault))
    }

    /// SplitMix64.
    fn coin(&mut self) -> bool {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) & 1 == 1
    }

    /// The system brings writes to the disk when it likes, not only when it is told to.
    fn write_back(&mut self, inode: usize) {
        let unsynced = self.inodes[inode].unsynced.clone();
        for sector in unsynced {
            if self.coin() {
                let inode = &mut self.inodes[inode];
                let end = ((sector + 1) * SECTOR_BYTES).min(inode.seen.len());
                inode.kept.resize(inode.kept.len().max(end), 0);
                inode.keep(sector);
            }
        }
    }

    fn cut_power(&mut self) {
        self.dark = true;
        for change in std::mem::take(&mut self.name_changes) {
            if self.coin() {
                change.apply(&mut self.kept_names);
            }
        }
        self.names = self.kept_names.clone();
        for index in 0..self.inodes.len() {
            let mut inode = std::mem::take(&mut self.inodes[index]);
            if self.coin() {
                inode.kept.resize(inode.seen.len(), 0);
            }
            for sector in std::mem::take(&mut inode.unsynced) {
                if self.coin() {
                    inode.keep(sector);
                }
            }
            inode.seen = inode.kept.clone();
            self.inodes[index] = inode;
        }
    }

    fn change_names(&mut self, change: NameChange) -> io::Result<()> {
        let fault = self.step()?;
        if matches!(fault, None | Some(Fault::PowerCut)) {
            change.apply(&mut self.names);
            self.name_changes.push(change);
        }
        if fault == Some(Fault::PowerCut) {
            self.cut_power();
        }
        fault.map_or(Ok(()), |fault| Err(fault.error()))
    }
}

impl Inode {
    fn write(&mut self, bytes: &[u8], offset: usize) {
        let end = offset + bytes.len();
        let start = offset.min(self.seen.len());
        if self.seen.len() < end {
            self.seen.resize(end, 0);
        }
        self.seen[offset..end].copy_from_slice(bytes);
        self.unsynced
            .extend(start / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES));
    }

    fn truncate(&mut self, len: usize) {
        let start = len.min(self.seen.len());
        let end = len.max(self.seen.len());
        self.seen.resize(len, 0);
        self.unsynced
            .extend(start / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES));
    }

    /// Brings one sector to the disk, as far as the kept length reaches.
    fn keep(&mut self, sector: usize) {
        let start = (sector * SECTOR_BYTES).min(self.kept.len());
        let end = (start + SECTOR_BYTES).min(self.kept.len());
        let seen = self.seen.get(start..).unwrap_or_default();
        let len = seen.len().min(end - start);
        self.kept[start..start + len].copy_from_slice(&seen[..len]);
        self.kept[start + len..end].fill(0);
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Create(name, inode) => drop(names.insert(name.clone(), *inode)),
            Self::Remove(name) => drop(names.remove(name)),
            Self::Link(name, second) => {
                if let Some(inode) = names.get(name).copied() {
                    names.insert(second.clone(), inode);
                }
            }
            Self::Rename(from, to) => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
        }
    }
}

impl Fault {
    fn error(self) -> io::Error {
        match self {
            Self::Io | Self::PowerCut => failed(),
            Self::NoSpace => io::ErrorKind::StorageFull.into(),
        }
    }
}

fn failed() -> io::Error {
    io::Error::other("simulated failure")
}

impl Disk for SimDisk {
    fn open(&self, name: &str) -> io::Result<Option<Box<dyn BlockFile>>> {
        let state = self.state();
        if state.dark {
            return Err(failed());
        }
        let inode = state.names.get(name).copied();
        Ok(inode.map(|inode| -> Box<dyn BlockFile> {
            Box::new(SimFile {
                disk: self.clone(),
                inode,
            })
        }))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn BlockFile>> {
        let mut state = self.state();
        let inode = state.inodes.len();
        state.inodes.push(Inode::default());
        state.change_names(NameChange::Create(name.into(), inode))?;
        Ok(Box::new(SimFile {
            disk: self.clone(),
            inode,
        }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.state()
            .change_names(NameChange::Rename(from.into(), to.into()))
    }

    fn link(&self, name: &str, second: &str) -> io::Result<()> {
        self.state()
            .change_names(NameChange::Link(name.into(), second.into()))
    }

    fn list(&self) -> io::Result<Vec<(String, u64, Duration)>> {
        let state = self.state();
        let file = |(name, inode): (&String, &usize)| {
            let len = state.inodes[*inode].seen.len() as u64;
            (name.clone(), len, Duration::ZERO)
        };
        Ok(state.names.iter().map(file).collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.state().change_names(NameChange::Remove(name.into()))
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.state();
        match state.step()? {
            None => {
                state.kept_names = state.names.clone();
                state.name_changes.clear();
                Ok(())
            }
            Some(Fault::PowerCut) => {
                state.cut_power();
                Err(failed())
            }
            Some(fault) => Err(fault.error()),
        }
    }
}

struct SimFile {
    disk: SimDisk,
    inode: usize,
}

impl SimFile {
    /// Changes what is seen: `whole`, or what a failure does of it.
    fn change(
        &self,
        whole: impl FnOnce(&mut Inode),
        failing: impl FnOnce(&mut Inode),
    ) -> io::Result<()> {
        let mut state = self.disk.state();
        let fault = state.step()?;
        state.write_back(self.inode);
        let inode = &mut state.inodes[self.inode];
        match fault {
            None | Some(Fault::PowerCut) => whole(inode),
            Some(Fault::Io | Fault::NoSpace) => failing(inode),
        }
        if fault == Some(Fault::PowerCut) {
            state.cut_power();
        }
        fault.map_or(Ok(()), |fault| Err(fault.error()))
    }
}

impl BlockFile for SimFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.disk.state();
        if state.dark {
            return Err(failed());
        }
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let seen = &state.inodes[self.inode].seen;
        let found = seen.get(start..start + out.len());
        out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let half = &bytes[..bytes.len() / 2];
        let whole = |inode: &mut Inode| inode.write(bytes, offset);
        self.change(whole, |inode| inode.write(half, offset))
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.disk.state();
        let fault = state.step()?;
        if fault == Some(Fault::PowerCut) {
            state.cut_power();
            return Err(failed());
        }
        let inode = &mut state.inodes[self.inode];
        if fault == Some(Fault::Io) {
            inode.unsynced.clear();
            return Err(failed());
        }
        inode.kept.resize(inode.seen.len(), 0);
        for sector in std::mem::take(&mut inode.unsynced) {
            inode.keep(sector);
        }
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.disk.state().inodes[self.inode].seen.len() as u64)
    }

    fn truncate(&mut self, len_bytes: u64) -> io::Result<()> {
        let len = usize::try_from(len_bytes).map_err(io::Error::other)?;
        self.change(|inode| inode.truncate(len), |_| ())
    }
}

/// Rows beside the files of a [`SimDisk`], in transactions that are one operation each.
struct SimRows(SimDisk);

impl Rows for SimRows {
    fn ids(&mut self) -> Result<Vec<RowId>, VaultError> {
        Ok(self.0.state().rows.keys().copied().collect())
    }

    fn check_room(&self, _rows: usize, _len_bytes: usize) -> Result<(), VaultError> {
        Ok(())
    }

    fn read(&self, row: RowId, with: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
        let sealed = self.0.state().rows.get(&row).cloned();
        if let Some(sealed) = sealed {
            with(&sealed);
        }
        Ok(())
    }

    fn apply(
        &mut self,
        puts: &BTreeMap<RowId, Vec<u8>>,
        deletes: &BTreeSet<RowId>,
    ) -> Result<(), VaultError> {
        let io = |source| VaultError::Io {
            file: "rows",
            source,
        };
        let mut state = self.0.state();
        let fault = state.step().map_err(io)?;
        let happens = match fault {
            None => true,
            Some(Fault::PowerCut) => state.coin(),
            Some(Fault::Io | Fault::NoSpace) => false,
        };
        if happens {
            for row in deletes {
                state.rows.remove(row);
            }
            let puts = puts.iter().map(|(row, sealed)| (*row, sealed.clone()));
            state.rows.extend(puts);
        }
        if fault == Some(Fault::PowerCut) {
            state.cut_power();
        }
        fault.map_or(Ok(()), |fault| Err(io(fault.error())))
    }
}
