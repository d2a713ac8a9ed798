//! Data keys: one slot of a file per row, wrapped under the key-encryption key, overwritten and
//! synced when the row is erased.
//!
//! ```text
//! header  4096 bytes: magic | version | incarnation | sealed proof of the key-encryption key | crc
//! slot    128 bytes: mark | row | nonce, wrapped data key, tag | random bytes | crc
//! ```
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
use super::kek::KekSource;
use super::seal::{Cipher, Context, KEY_BYTES, NONCE_BYTES, TAG_BYTES, random};
use super::{RowId, VaultError};

/// After a final error ([`VaultError::is_final`]) it must not be used; the vault sees to that.
pub(super) struct Slots {
    file: Box<dyn BlockFile>,
    incarnation: Incarnation,
    kek: Cipher,
    /// Slots with a data key on disk.
    used: HashMap<RowId, u32>,
    /// Slots with a data key that is not durable yet.
    staged: BTreeMap<RowId, (u32, Slot)>,
    free: BTreeSet<u32>,
    /// How many slots there are, all in `used`, `staged` or `free`.
    count: u32,
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
        disk.remove(NEW_NAME).map_err(io)?;
        let (file, kek) = match disk.open(NAME).map_err(io)? {
            Some(file) => (file, source.load(false)?),
            None if store_is_empty => {
                let kek = source.load(true)?;
                let header = encode_header(incarnation, &kek)?;
                (create_whole(disk, NAME, &header)?, kek)
            }
            None => return Err(VaultError::Missing { file: NAME }),
        };
        let len = usize::try_from(file.len_bytes().map_err(io)?).unwrap_or(usize::MAX);
        let mut image = vec![0; len];
        file.read_at(&mut image, 0).map_err(io)?;
        check_header(&image, incarnation, &kek)?;
        let mut slots = Self {
            file,
            incarnation,
            kek,
            used: HashMap::new(),
            staged: BTreeMap::new(),
            free: BTreeSet::new(),
            count: 0,
        };
        slots.settle(&mut image)?;
        Ok(slots)
    }

    /// Takes in what the file holds, and writes it anew.
    fn settle(&mut self, image: &mut [u8]) -> Result<(), VaultError> {
        let mut damaged = 0_u64;
        for slot in image[HEADER_BYTES..].as_chunks_mut::<SLOT_BYTES>().0 {
            match read_slot(slot) {
                SlotState::Used(row) => {
                    self.used.insert(row, self.count);
                }
                state => {
                    damaged += u64::from(matches!(state, SlotState::Damaged));
                    *slot = erased_slot()?;
                    self.free.insert(self.count);
                }
            }
            self.count += 1;
        }
        if damaged > 0 {
            tracing::error!(slots = damaged, "damaged data keys; their rows are lost");
        }
        let whole = HEADER_BYTES + self.count as usize * SLOT_BYTES;
        self.file.write_at(&image[..whole], 0).map_err(io)?;
        self.file.sync().map_err(not_durable)
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = RowId> {
        self.used.keys().copied()
    }

    /// A fresh data key for `row`, staged.
    pub(super) fn stage(&mut self, row: RowId) -> Result<Cipher, VaultError> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        random(&mut *key)?;
        let mut slot = [0; SLOT_BYTES];
        slot[..4].copy_from_slice(USED_MARK);
        slot[4..12].copy_from_slice(&row.0.to_le_bytes());
        let context = Context::data_key(self.incarnation, row);
        self.kek.seal(&context, &*key, &mut slot[12..WRAPPED_END])?;
        random(&mut slot[WRAPPED_END..CRC_AT])?;
        set_crc(&mut slot);
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
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        let context = Context::data_key(self.incarnation, row);
        if !self.kek.open(&context, &slot[12..WRAPPED_END], &mut *key) {
            return Ok(DataKey::Damaged);
        }
        Ok(DataKey::Found(Cipher::new(&key)?))
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

const MAGIC: &[u8; 8] = b"QKDslot\n";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
/// A nonce and a tag: the proof seals nothing.
const PROOF_BYTES: usize = NONCE_BYTES + TAG_BYTES;
const HEADER_CRC_AT: usize = 20 + PROOF_BYTES;

const SLOT_BYTES: usize = 128;
const WRAPPED_END: usize = 12 + NONCE_BYTES + KEY_BYTES + TAG_BYTES;
const CRC_AT: usize = SLOT_BYTES - 4;
const USED_MARK: &[u8; 4] = b"used";
const ERASED_MARK: &[u8; 4] = b"gone";

fn io(source: std::io::Error) -> VaultError {
    VaultError::Io { file: NAME, source }
}

fn not_durable(source: std::io::Error) -> VaultError {
    VaultError::NotDurable { file: NAME, source }
}

fn encode_header(incarnation: Incarnation, kek: &Cipher) -> Result<Vec<u8>, VaultError> {
    let mut header = vec![0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..20].copy_from_slice(&incarnation.0.to_le_bytes());
    let proof = &mut header[20..HEADER_CRC_AT];
    kek.seal(&Context::proof(incarnation), &[], proof)?;
    let crc = crc32c::crc32c(&header[..HEADER_CRC_AT]);
    header[HEADER_CRC_AT..][..4].copy_from_slice(&crc.to_le_bytes());
    Ok(header)
}

fn check_header(image: &[u8], incarnation: Incarnation, kek: &Cipher) -> Result<(), VaultError> {
    let damaged = VaultError::Header { file: NAME };
    if image.len() < HEADER_BYTES || &image[..8] != MAGIC {
        return Err(damaged);
    }
    let number = |at: usize| image[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
    if number(8) > VERSION {
        return Err(VaultError::NewerVersion {
            file: NAME,
            found: number(8),
            known: VERSION,
        });
    }
    if number(8) != VERSION || number(HEADER_CRC_AT) != crc32c::crc32c(&image[..HEADER_CRC_AT]) {
        return Err(damaged);
    }
    if image[12..20] != incarnation.0.to_le_bytes() {
        return Err(VaultError::OtherStore { file: NAME });
    }
    let proof = &image[20..HEADER_CRC_AT];
    if !kek.open(&Context::proof(incarnation), proof, &mut []) {
        return Err(VaultError::WrongKek);
    }
    Ok(())
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
