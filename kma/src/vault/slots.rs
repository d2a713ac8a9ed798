//! Data keys: one slot of a file per row, wrapped under the epoch's key, overwritten and synced when
//! the row is erased.
//!
//! ```text
//! header  4096 bytes: magic | version | incarnation | epoch | key derivation | wrapped epoch key | crc
//! slot    128 bytes: mark | row | nonce, wrapped data key, tag | random bytes | crc
//! ```
//!
//! The epoch's key is random and wrapped under the key-encryption key. A new epoch is a new file with
//! all live data keys under a new key, which takes the place of the old one by rename; the old one is
//! overwritten, and then removed. A crash in between leaves one of the two whole, and what is left of
//! the other is destroyed when the store is opened.
//!
//! Numbers are little-endian, checksums CRC-32C. A slot lies inside one sector of 512 bytes, so a
//! power cut leaves it as it was or as it is to be. An erased slot holds random bytes under another
//! mark; one of zeros was never used.
//!
//! Opening writes the file anew, in place: slots in use as they are, all others with fresh random
//! bytes. So an erasure that a process before us believed in, and whose sync failed, reaches the
//! disk. (What the medium itself keeps of overwritten sectors is out of reach; that is why the
//! key-encryption key belongs elsewhere.)

use std::collections::{BTreeMap, BTreeSet, HashMap};

use qkd_keyfile::Incarnation;
use zeroize::Zeroizing;

use super::disk::{BlockFile, Disk, create_whole};
use super::kek::{Kdf, KekKind, KekSource};
use super::seal::{Cipher, Context, KEY_BYTES, NONCE_BYTES, TAG_BYTES, random};
use super::{RowId, VaultError};

/// After a final error ([`VaultError::is_final`]) it must not be used; the vault sees to that.
pub(super) struct Slots {
    file: Box<dyn BlockFile>,
    incarnation: Incarnation,
    /// Wraps the keys of epochs.
    kek: Cipher,
    kind: KekKind,
    epoch: Epoch,
    /// Slots with a data key on disk.
    used: HashMap<RowId, u32>,
    /// Slots with a data key that is not durable yet.
    staged: BTreeMap<RowId, (u32, Slot)>,
    free: BTreeSet<u32>,
    /// How many slots there are, all in `used`, `staged` or `free`.
    count: u32,
    /// Slots that did not verify when the file was opened.
    damaged: u32,
}

/// The key that wraps data keys now.
struct Epoch {
    number: u64,
    cipher: Cipher,
}

type Slot = [u8; SLOT_BYTES];

/// What became of a row's data key.
pub(super) enum DataKey {
    Found(Cipher),
    /// No slot: erased, or its slot was damaged.
    Gone,
    /// The slot does not verify.
    Damaged,
}

impl Slots {
    /// Opens the file, or makes it if `store_is_empty`.
    pub(super) fn open(
        disk: &dyn Disk,
        incarnation: Incarnation,
        source: &KekSource,
        store_is_empty: bool,
    ) -> Result<Self, VaultError> {
        recover(disk)?;
        if disk.open(NAME).map_err(io)?.is_none() {
            if !store_is_empty {
                return Err(VaultError::Missing { file: NAME });
            }
            let kind = source.fresh_kind()?;
            let kek = source.load(true, &kind)?;
            let (header, _) = fresh_epoch(incarnation, 0, &kind, &kek)?;
            create_whole(disk, NAME, &header)?;
        }
        let (mut slots, mut image) = Self::view(disk, incarnation, source)?;
        slots.settle(&mut image)?;
        Ok(slots)
    }

    /// Reads the file, and changes nothing.
    pub(super) fn view(
        disk: &dyn Disk,
        incarnation: Incarnation,
        source: &KekSource,
    ) -> Result<(Self, Vec<u8>), VaultError> {
        let file = disk.open(NAME).map_err(io)?;
        let file = file.ok_or(VaultError::Missing { file: NAME })?;
        let len = usize::try_from(file.len_bytes().map_err(io)?).unwrap_or(usize::MAX);
        let mut image = vec![0; len];
        file.read_at(&mut image, 0).map_err(io)?;
        let header = Header::decode(&image, incarnation)?;
        let kek = source.load(false, &header.kind)?;
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        let context = Context::epoch_key(incarnation, header.epoch);
        if !kek.open(&context, &header.wrapped, &mut *key) {
            return Err(VaultError::WrongKek);
        }
        let mut slots = Self {
            file,
            incarnation,
            kek,
            kind: header.kind,
            epoch: Epoch {
                number: header.epoch,
                cipher: Cipher::new(&key)?,
            },
            used: HashMap::new(),
            staged: BTreeMap::new(),
            free: BTreeSet::new(),
            count: 0,
            damaged: 0,
        };
        for slot in image[HEADER_BYTES..].as_chunks::<SLOT_BYTES>().0 {
            match read_slot(slot) {
                SlotState::Used(row) => drop(slots.used.insert(row, slots.count)),
                state => {
                    slots.damaged += u32::from(matches!(state, SlotState::Damaged));
                    slots.free.insert(slots.count);
                }
            }
            slots.count += 1;
        }
        Ok((slots, image))
    }

    /// Writes the file anew: slots in use as they are, all others with fresh random bytes.
    fn settle(&mut self, image: &mut [u8]) -> Result<(), VaultError> {
        if self.damaged > 0 {
            let slots = self.damaged;
            tracing::error!(slots, "damaged data keys; their rows are lost");
        }
        for index in &self.free {
            let at = HEADER_BYTES + *index as usize * SLOT_BYTES;
            image[at..at + SLOT_BYTES].copy_from_slice(&erased_slot()?);
        }
        let whole = HEADER_BYTES + self.count as usize * SLOT_BYTES;
        self.file.write_at(&image[..whole], 0).map_err(io)?;
        self.file.sync().map_err(not_durable)
    }

    /// Begins a new epoch, under the key-encryption key of `new_source` if there is one: every live
    /// data key is wrapped anew, and the old file destroyed. Nothing may be staged.
    ///
    /// # Errors
    ///
    /// Not final: the old epoch goes on ([`NAME`]), or the new one has begun and the old one will be
    /// destroyed when the store is opened next ([`OLD_NAME`]).
    pub(super) fn rotate(
        &mut self,
        disk: &dyn Disk,
        new_source: Option<&KekSource>,
    ) -> Result<(), VaultError> {
        debug_assert!(self.staged.is_empty(), "commit comes first");
        let kek = match new_source {
            Some(source) => {
                let kind = source.fresh_kind()?;
                Some((source.load(true, &kind)?, kind))
            }
            None => None,
        };
        let (kek_now, kind) = kek
            .as_ref()
            .map_or((&self.kek, self.kind), |(k, n)| (k, *n));
        let number = self.epoch.number + 1;
        let (mut image, cipher) = fresh_epoch(self.incarnation, number, &kind, kek_now)?;
        self.rewrap(&cipher, &mut image)?;
        let file = write_new(disk, &image).inspect_err(|_| {
            // Best effort: a leftover is removed when the store is opened.
            let _ = disk.remove(NEW_NAME);
        })?;
        // Two renames with a sync between: at any moment one name or the other is a whole file.
        // Failure leaves it unknown which one a crash brings back.
        let moved = disk.rename(NAME, OLD_NAME).and_then(|()| disk.sync_dir());
        let moved = moved.and_then(|()| disk.rename(NEW_NAME, NAME));
        moved.and_then(|()| disk.sync_dir()).map_err(not_durable)?;
        self.file = file;
        self.epoch = Epoch { number, cipher };
        if let Some((kek, kind)) = kek {
            (self.kek, self.kind) = (kek, kind);
        }
        destroy_old(disk)
    }

    /// Appends all slots to `image`, live data keys wrapped by `cipher`. One that does not open stays
    /// as it is: it opens under no key.
    fn rewrap(&self, cipher: &Cipher, image: &mut Vec<u8>) -> Result<(), VaultError> {
        image.resize(HEADER_BYTES + self.count as usize * SLOT_BYTES, 0);
        let (_, slots) = image.split_at_mut(HEADER_BYTES);
        let slots = slots.as_chunks_mut::<SLOT_BYTES>().0;
        for index in &self.free {
            slots[*index as usize] = erased_slot()?;
        }
        for (row, index) in &self.used {
            let slot = &mut slots[*index as usize];
            self.file.read_at(slot, offset(*index)).map_err(io)?;
            if let Some(key) = self.unwrap(*row, slot) {
                *slot = wrapped_slot(self.incarnation, *row, &key, cipher)?;
            }
        }
        Ok(())
    }

    fn unwrap(&self, row: RowId, slot: &Slot) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        let context = Context::data_key(self.incarnation, row);
        let opened = self
            .epoch
            .cipher
            .open(&context, &slot[12..WRAPPED_END], &mut *key);
        opened.then_some(key)
    }

    /// Which epoch it is, and what the key-encryption key is made of.
    pub(super) const fn epoch(&self) -> (u64, KekKind) {
        (self.epoch.number, self.kind)
    }

    /// Slots there are, and those that did not verify when the file was opened.
    pub(super) const fn counts(&self) -> (u32, u32) {
        (self.count, self.damaged)
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = RowId> {
        self.used.keys().copied()
    }

    /// A fresh data key for `row`, staged.
    pub(super) fn stage(&mut self, row: RowId) -> Result<Cipher, VaultError> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        random(&mut *key)?;
        let slot = wrapped_slot(self.incarnation, row, &key, &self.epoch.cipher)?;
        let cipher = Cipher::new(&key)?;
        let index = self.free.pop_first().unwrap_or_else(|| {
            self.count += 1;
            self.count - 1
        });
        self.staged.insert(row, (index, slot));
        Ok(cipher)
    }

    /// The data key of a row, staged or not.
    pub(super) fn data_key(&self, row: RowId) -> Result<DataKey, VaultError> {
        let slot = match (self.staged.get(&row), self.used.get(&row)) {
            (Some((_, slot)), _) => *slot,
            (None, Some(index)) => {
                let mut slot = [0; SLOT_BYTES];
                self.file.read_at(&mut slot, offset(*index)).map_err(io)?;
                slot
            }
            (None, None) => return Ok(DataKey::Gone),
        };
        match self.unwrap(row, &slot) {
            Some(key) => Ok(DataKey::Found(Cipher::new(&key)?)),
            None => Ok(DataKey::Damaged),
        }
    }

    /// Makes the staged data keys durable.
    pub(super) fn commit(&mut self) -> Result<(), VaultError> {
        if self.staged.is_empty() {
            return Ok(());
        }
        for (index, slot) in self.staged.values() {
            self.file.write_at(slot, offset(*index)).map_err(io)?;
        }
        self.file.sync().map_err(not_durable)?;
        let staged = std::mem::take(&mut self.staged);
        self.used
            .extend(staged.into_iter().map(|(row, (index, _))| (row, index)));
        Ok(())
    }

    /// Overwrites the data keys of `rows`, durably. A staged one may have reached the file.
    pub(super) fn erase(&mut self, rows: &BTreeSet<RowId>) -> Result<(), VaultError> {
        let indices: Vec<u32> = rows.iter().filter_map(|row| self.index(*row)).collect();
        if indices.is_empty() {
            return Ok(());
        }
        for index in &indices {
            let noise = erased_slot()?;
            self.file.write_at(&noise, offset(*index)).map_err(io)?;
        }
        self.file.sync().map_err(not_durable)?;
        for row in rows {
            self.used.remove(row);
            self.staged.remove(row);
        }
        self.free.extend(indices);
        Ok(())
    }

    fn index(&self, row: RowId) -> Option<u32> {
        let staged = self.staged.get(&row).map(|(index, _)| *index);
        staged.or_else(|| self.used.get(&row).copied())
    }
}

pub(super) const NAME: &str = "slots";
const NEW_NAME: &str = "slots.new";
const OLD_NAME: &str = "slots.old";

const MAGIC: &[u8; 8] = b"QKDslot\n";
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 4096;
/// A nonce, a key and a tag.
const WRAPPED_KEY_BYTES: usize = NONCE_BYTES + KEY_BYTES + TAG_BYTES;
const WRAPPED_KEY_AT: usize = 60;
const HEADER_CRC_AT: usize = WRAPPED_KEY_AT + WRAPPED_KEY_BYTES;

const SLOT_BYTES: usize = 128;
const WRAPPED_END: usize = 12 + WRAPPED_KEY_BYTES;
const CRC_AT: usize = SLOT_BYTES - 4;
const USED_MARK: &[u8; 4] = b"used";
const ERASED_MARK: &[u8; 4] = b"gone";

fn io(source: std::io::Error) -> VaultError {
    VaultError::Io { file: NAME, source }
}

fn not_durable(source: std::io::Error) -> VaultError {
    VaultError::NotDurable { file: NAME, source }
}

/// Finishes what a crash in [`Slots::rotate`] has left.
pub(super) fn recover(disk: &dyn Disk) -> Result<(), VaultError> {
    if disk.open(OLD_NAME).map_err(io)?.is_some() {
        if disk.open(NAME).map_err(io)?.is_none() {
            disk.rename(OLD_NAME, NAME).map_err(io)?;
            disk.sync_dir().map_err(not_durable)?;
        } else {
            destroy_old(disk)?;
        }
    }
    disk.remove(NEW_NAME).map_err(io)
}

fn write_new(disk: &dyn Disk, image: &[u8]) -> Result<Box<dyn BlockFile>, VaultError> {
    let mut file = disk.create(NEW_NAME).map_err(io)?;
    file.write_at(image, 0).map_err(io)?;
    file.sync().map_err(io)?;
    Ok(file)
}

/// Overwrites the file of an epoch that ended, and removes it.
fn destroy_old(disk: &dyn Disk) -> Result<(), VaultError> {
    let io = |source| VaultError::Io {
        file: OLD_NAME,
        source,
    };
    let Some(mut file) = disk.open(OLD_NAME).map_err(io)? else {
        return Ok(());
    };
    let len = usize::try_from(file.len_bytes().map_err(io)?).unwrap_or(usize::MAX);
    let mut noise = vec![0; len];
    random(&mut noise)?;
    file.write_at(&noise, 0).map_err(io)?;
    file.sync().map_err(io)?;
    disk.remove(OLD_NAME).map_err(io)?;
    disk.sync_dir().map_err(io)
}

/// What the file begins with.
struct Header {
    epoch: u64,
    kind: KekKind,
    wrapped: [u8; WRAPPED_KEY_BYTES],
}

impl Header {
    fn decode(image: &[u8], incarnation: Incarnation) -> Result<Self, VaultError> {
        let damaged = || VaultError::Header { file: NAME };
        if image.len() < HEADER_BYTES || &image[..8] != MAGIC {
            return Err(damaged());
        }
        let number = |at: usize| image[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
        let found = number(8);
        if found > VERSION {
            return Err(VaultError::NewerVersion {
                file: NAME,
                found,
                known: VERSION,
            });
        }
        if found != VERSION || number(HEADER_CRC_AT) != crc32c::crc32c(&image[..HEADER_CRC_AT]) {
            return Err(damaged());
        }
        if image[12..20] != incarnation.0.to_le_bytes() {
            return Err(VaultError::OtherStore { file: NAME });
        }
        let mut salt = [0; 16];
        salt.copy_from_slice(&image[44..60]);
        let kdf = Kdf {
            memory_kib: number(32),
            passes: number(36),
            lanes: number(40),
            salt,
        };
        let kind = match number(28) {
            KIND_KEY => KekKind::Key,
            KIND_PASS_PHRASE if kdf.is_sane() => KekKind::PassPhrase(kdf),
            _ => return Err(damaged()),
        };
        let mut wrapped = [0; WRAPPED_KEY_BYTES];
        wrapped.copy_from_slice(&image[WRAPPED_KEY_AT..HEADER_CRC_AT]);
        Ok(Self {
            epoch: image[20..28].try_into().map_or(0, u64::from_le_bytes),
            kind,
            wrapped,
        })
    }
}

const KIND_KEY: u32 = 1;
const KIND_PASS_PHRASE: u32 = 2;

/// The header of a new epoch, and its key.
fn fresh_epoch(
    incarnation: Incarnation,
    number: u64,
    kind: &KekKind,
    kek: &Cipher,
) -> Result<(Vec<u8>, Cipher), VaultError> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    random(&mut *key)?;
    let mut header = vec![0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..20].copy_from_slice(&incarnation.0.to_le_bytes());
    header[20..28].copy_from_slice(&number.to_le_bytes());
    match kind {
        KekKind::Key => header[28..32].copy_from_slice(&KIND_KEY.to_le_bytes()),
        KekKind::PassPhrase(kdf) => {
            header[28..32].copy_from_slice(&KIND_PASS_PHRASE.to_le_bytes());
            header[32..36].copy_from_slice(&kdf.memory_kib.to_le_bytes());
            header[36..40].copy_from_slice(&kdf.passes.to_le_bytes());
            header[40..44].copy_from_slice(&kdf.lanes.to_le_bytes());
            header[44..60].copy_from_slice(&kdf.salt);
        }
    }
    let wrapped = &mut header[WRAPPED_KEY_AT..HEADER_CRC_AT];
    kek.seal(&Context::epoch_key(incarnation, number), &*key, wrapped)?;
    let crc = crc32c::crc32c(&header[..HEADER_CRC_AT]);
    header[HEADER_CRC_AT..][..4].copy_from_slice(&crc.to_le_bytes());
    Ok((header, Cipher::new(&key)?))
}

fn wrapped_slot(
    incarnation: Incarnation,
    row: RowId,
    key: &[u8; KEY_BYTES],
    cipher: &Cipher,
) -> Result<Slot, VaultError> {
    let mut slot = [0; SLOT_BYTES];
    slot[..4].copy_from_slice(USED_MARK);
    slot[4..12].copy_from_slice(&row.0.to_le_bytes());
    let context = Context::data_key(incarnation, row);
    cipher.seal(&context, key, &mut slot[12..WRAPPED_END])?;
    random(&mut slot[WRAPPED_END..CRC_AT])?;
    set_crc(&mut slot);
    Ok(slot)
}

enum SlotState {
    Used(RowId),
    Free,
    Damaged,
}

fn read_slot(slot: &Slot) -> SlotState {
    if *slot == [0; SLOT_BYTES] {
        return SlotState::Free;
    }
    let (body, crc) = slot.split_at(CRC_AT);
    if crc != crc32c::crc32c(body).to_le_bytes() {
        return SlotState::Damaged;
    }
    let row = body[4..12].try_into().map_or(0, u64::from_le_bytes);
    match &body[..4] {
        mark if mark == USED_MARK => SlotState::Used(RowId(row)),
        mark if mark == ERASED_MARK => SlotState::Free,
        _ => SlotState::Damaged,
    }
}

fn erased_slot() -> Result<Slot, VaultError> {
    let mut slot = [0; SLOT_BYTES];
    slot[..4].copy_from_slice(ERASED_MARK);
    random(&mut slot[4..CRC_AT])?;
    set_crc(&mut slot);
    Ok(slot)
}

fn set_crc(slot: &mut Slot) {
    let crc = crc32c::crc32c(&slot[..CRC_AT]);
    slot[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
}

/// Where a slot is in the file.
const fn offset(index: u32) -> u64 {
    HEADER_BYTES as u64 + index as u64 * SLOT_BYTES as u64
}
