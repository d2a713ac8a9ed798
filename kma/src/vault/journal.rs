//! The journal: an append-only file of frames, one frame per commit.
//!
//! ```text
//! header  4096 bytes: magic | version | kind | incarnation | first frame's number | crc | zeros
//! frame   head mark | payload length u32 | number u64 | crc of these and the incarnation
//!         payload: (length u32 | record)*
//!         crc of (crc of the frame before | number | payload) | tail mark
//! ```
//!
//! Numbers are little-endian, checksums CRC-32C. A frame is written only after the one before it
//! was synced, so after a power cut at most the last frame is torn: a part of it is as the disk was
//! before, in whole sectors of 512 bytes, which past the end of what was written means zeros, or
//! nothing. Only such a frame is cut off. Anything else that does not verify is damage (etcd's
//! write-ahead log draws the same line), with one exception: in a last frame that holds 512 zero
//! bytes in a row, damage looks like a torn write.
//!
//! The file grows by whole chunks of zeros, so that most commits need not make a new length
//! durable.

use qkd_keyfile::Incarnation;

use super::disk::{BlockFile, Disk, create_whole};
use super::seal::random;
use super::{MAX_COMMIT_BYTES, MAX_RECORD_BYTES, VaultError};

/// Which backend a journal belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Rows are sealed on disk.
    Sealed = 1,
    /// Rows are in memory.
    Memory = 2,
}

/// After a final error ([`VaultError::is_final`]) it must not be used; the vaults see to that.
pub(super) struct Journal {
    disk: Box<dyn Disk>,
    file: Box<dyn BlockFile>,
    kind: Kind,
    incarnation: Incarnation,
    /// Where the next frame goes.
    end: u64,
    /// Length of the file: zeros from `end` on.
    len_bytes: u64,
    next_number: u64,
    /// Checksum of the last frame.
    chain: u32,
    /// Staged records, framed as they go into the payload.
    staged: Vec<u8>,
    /// Set when something longer than allowed was staged.
    too_long: Option<VaultError>,
    /// The file as it was opened, until it is replayed.
    image: Option<Vec<u8>>,
}

impl Journal {
    /// Opens or makes the journal, verifies all of it, and cuts off a torn last frame.
    pub(super) fn open(disk: Box<dyn Disk>, kind: Kind) -> Result<Self, VaultError> {
        disk.remove(NEW_NAME).map_err(io)?;
        let file = match disk.open(NAME).map_err(io)? {
            Some(file) => file,
            None => {
                let mut drawn = [0; 8];
                random(&mut drawn)?;
                let header = Header::new(kind, Incarnation(u64::from_le_bytes(drawn)), 0);
                create_whole(&*disk, NAME, &header.encode())?
            }
        };
        let len = usize::try_from(file.len_bytes().map_err(io)?).unwrap_or(usize::MAX);
        let mut image = vec![0; len];
        file.read_at(&mut image, 0).map_err(io)?;
        let header = Header::decode(&image, kind)?;
        let scan = Scan::run(&image, &header)?;
        image.truncate(scan.end);
        let mut journal = Self {
            disk,
            file,
            kind,
            incarnation: header.incarnation,
            end: scan.end as u64,
            len_bytes: len as u64,
            next_number: scan.next_number,
            chain: scan.chain,
            staged: Vec::new(),
            too_long: None,
            image: None,
        };
        journal.settle(&image, scan.last, scan.torn)?;
        journal.image = Some(image);
        Ok(journal)
    }

    /// Makes durable what was read. A process before us may have read its writes back from memory
    /// although a sync had failed; only writing them again brings them to the disk. That can
    /// concern the last frame only.
    fn settle(&mut self, image: &[u8], last: usize, torn: bool) -> Result<(), VaultError> {
        if torn {
            let at = self.end;
            tracing::warn!(
                "journal ends in a commit that a crash cut short; dropped from byte {at} on"
            );
            self.file.truncate(self.end).map_err(io)?;
            self.len_bytes = self.end;
        }
        let tail = &image[last..];
        self.file.write_at(tail, last as u64).map_err(io)?;
        self.file.sync().map_err(not_durable)?;
        self.disk.sync_dir().map_err(not_durable)
    }

    pub(super) const fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Whether there is no record at all.
    pub(super) const fn is_empty(&self) -> bool {
        self.end == HEADER_BYTES as u64
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.end
    }

    pub(super) fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    pub(super) fn replay(&mut self, each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
        let image = self.image.take().ok_or(VaultError::AlreadyReplayed)?;
        replay(&image, self.incarnation, each);
        Ok(())
    }

    /// The records of a journal file that nobody opens: a copy, or one of a running process.
    pub(super) fn read(image: &[u8], each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
        let header = Header::decode(image, Kind::Sealed).or_else(|error| match error {
            VaultError::OtherKind { .. } => Header::decode(image, Kind::Memory),
            error => Err(error),
        })?;
        let scan = Scan::run(image, &header)?;
        replay(&image[..scan.end], header.incarnation, each);
        Ok(())
    }

    pub(super) fn append(&mut self, record: &[u8]) {
        let staged = self.staged.len() + 4 + record.len();
        for (len_bytes, max_bytes) in [(record.len(), MAX_RECORD_BYTES), (staged, MAX_COMMIT_BYTES)]
        {
            if len_bytes > max_bytes {
                self.too_long = Some(VaultError::TooLong {
                    len_bytes,
                    max_bytes,
                });
                return;
            }
        }
        push_record(&mut self.staged, record);
    }

    /// Writes all staged records as one frame, and syncs once.
    pub(super) fn commit(&mut self) -> Result<(), VaultError> {
        if let Some(error) = self.too_long.take() {
            return Err(error);
        }
        if self.staged.is_empty() {
            return Ok(());
        }
        let mut frame = Vec::new();
        let chain = push_frame(
            &mut frame,
            self.incarnation,
            self.next_number,
            self.chain,
            &self.staged,
        );
        let end = self.end + frame.len() as u64;
        if end > self.len_bytes {
            let chunks = end.div_ceil(CHUNK_BYTES) * CHUNK_BYTES;
            let zeros = usize::try_from(chunks - end).unwrap_or(0);
            frame.resize(frame.len() + zeros, 0);
        }
        if let Err(error) = self.file.write_at(&frame, self.end) {
            self.undo_write()?;
            return Err(io(error));
        }
        self.file.sync().map_err(not_durable)?;
        self.len_bytes = self.len_bytes.max(self.end + frame.len() as u64);
        self.end = end;
        self.chain = chain;
        self.next_number += 1;
        self.staged.clear();
        Ok(())
    }

    /// Removes what a failed write has left, durably, for a torn frame over other bytes than zeros
    /// would look like damage.
    fn undo_write(&mut self) -> Result<(), VaultError> {
        let undone = self.file.truncate(self.end);
        self.len_bytes = self.end;
        undone.and_then(|()| self.file.sync()).map_err(not_durable)
    }

    /// Commits, then puts a journal of the snapshot's records in the place of this one.
    pub(super) fn compact(
        &mut self,
        snapshot: &mut dyn Iterator<Item = Vec<u8>>,
    ) -> Result<(), VaultError> {
        self.commit()?;
        let written = self.write_snapshot(snapshot);
        let (file, end, next_number, chain) = match written {
            Ok(written) => written,
            Err(error) => {
                // Best effort: a leftover is removed when the store is opened.
                let _ = self.disk.remove(NEW_NAME);
                return Err(error);
            }
        };
        // From here on, failure leaves it unknown which of the two a crash brings back.
        let renamed = self.disk.rename(NEW_NAME, NAME);
        renamed
            .and_then(|()| self.disk.sync_dir())
            .map_err(not_durable)?;
        self.file = file;
        self.end = end;
        self.len_bytes = end;
        self.next_number = next_number;
        self.chain = chain;
        Ok(())
    }

    /// The new file, durable under its passing name: file, end, next number, chain.
    fn write_snapshot(
        &self,
        snapshot: &mut dyn Iterator<Item = Vec<u8>>,
    ) -> Result<(Box<dyn BlockFile>, u64, u64, u32), VaultError> {
        let header = Header::new(self.kind, self.incarnation, self.next_number);
        let mut file = self.disk.create(NEW_NAME).map_err(io)?;
        file.write_at(&header.encode(), 0).map_err(io)?;
        let (mut end, mut number, mut chain) =
            (HEADER_BYTES as u64, self.next_number, header.crc());
        let mut records = snapshot.peekable();
        while records.peek().is_some() {
            let mut payload = Vec::new();
            while payload.len() < MAX_RECORD_BYTES
                && let Some(record) = records.next()
            {
                if record.len() > MAX_RECORD_BYTES {
                    return Err(VaultError::TooLong {
                        len_bytes: record.len(),
                        max_bytes: MAX_RECORD_BYTES,
                    });
                }
                push_record(&mut payload, &record);
            }
            let mut frame = Vec::new();
            chain = push_frame(&mut frame, self.incarnation, number, chain, &payload);
            file.write_at(&frame, end).map_err(io)?;
            end += frame.len() as u64;
            number += 1;
        }
        file.sync().map_err(io)?;
        Ok((file, end, number, chain))
    }
}

/// Every record of a journal that was scanned, in order.
fn replay(image: &[u8], incarnation: Incarnation, each: &mut dyn FnMut(&[u8])) {
    let mut at = HEADER_BYTES;
    while let Some(head) = FrameHead::decode(&image[at..], incarnation) {
        let mut payload = &image[at + HEAD_BYTES..][..head.len_bytes];
        while let Some((record, rest)) = split_record(payload) {
            each(record);
            payload = rest;
        }
        at += head.frame_bytes();
    }
}

pub(super) const NAME: &str = "journal";
const NEW_NAME: &str = "journal.new";

fn io(source: std::io::Error) -> VaultError {
    VaultError::Io { file: NAME, source }
}

fn not_durable(source: std::io::Error) -> VaultError {
    VaultError::NotDurable { file: NAME, source }
}

/// What a journal starts with.
struct Header {
    kind: u32,
    incarnation: Incarnation,
    first_number: u64,
}

const MAGIC: &[u8; 8] = b"QKDjrnl\n";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
const HEADER_FIELDS: usize = 32;
/// The file grows by this much at a time.
const CHUNK_BYTES: u64 = 256 << 10;

impl Header {
    const fn new(kind: Kind, incarnation: Incarnation, first_number: u64) -> Self {
        Self {
            kind: kind as u32,
            incarnation,
            first_number,
        }
    }

    fn fields(&self) -> [u8; HEADER_FIELDS] {
        let mut fields = [0; HEADER_FIELDS];
        fields[..8].copy_from_slice(MAGIC);
        fields[8..12].copy_from_slice(&VERSION.to_le_bytes());
        fields[12..16].copy_from_slice(&self.kind.to_le_bytes());
        fields[16..24].copy_from_slice(&self.incarnation.0.to_le_bytes());
        fields[24..].copy_from_slice(&self.first_number.to_le_bytes());
        fields
    }

    fn crc(&self) -> u32 {
        crc32c::crc32c(&self.fields())
    }

    fn encode(&self) -> Vec<u8> {
        let mut block = self.fields().to_vec();
        block.extend(self.crc().to_le_bytes());
        block.resize(HEADER_BYTES, 0);
        block
    }

    fn decode(image: &[u8], wanted: Kind) -> Result<Self, VaultError> {
        let damaged = VaultError::Header { file: NAME };
        if image.len() < HEADER_BYTES || &image[..8] != MAGIC {
            return Err(damaged);
        }
        let found = u32_at(image, 8);
        if found > VERSION {
            return Err(VaultError::NewerVersion {
                file: NAME,
                found,
                known: VERSION,
            });
        }
        let header = Self {
            kind: u32_at(image, 12),
            incarnation: Incarnation(u64_at(image, 16)),
            first_number: u64_at(image, 24),
        };
        if header.fields() != image[..HEADER_FIELDS] || u32_at(image, HEADER_FIELDS) != header.crc()
        {
            return Err(damaged);
        }
        if header.kind != wanted as u32 {
            return Err(VaultError::OtherKind {
                found: header.kind,
                wanted: wanted as u32,
            });
        }
        Ok(header)
    }
}

/// The first and the last byte of a frame are not zero, so neither is any sector that holds a whole
/// end of it.
const HEAD_MARK: &[u8; 4] = b"\xA5QKF";
const TAIL_MARK: u8 = 0x5A;
const HEAD_BYTES: usize = 20;
const FOOT_BYTES: usize = 5;
const SECTOR_BYTES: usize = 512;

/// The head of a frame, verified.
struct FrameHead {
    /// Of the payload.
    len_bytes: usize,
    number: u64,
}

impl FrameHead {
    const fn frame_bytes(&self) -> usize {
        HEAD_BYTES + self.len_bytes + FOOT_BYTES
    }

    fn decode(bytes: &[u8], incarnation: Incarnation) -> Option<Self> {
        let head = bytes.get(..HEAD_BYTES)?;
        let crc = crc32c::crc32c_append(incarnation_salt(incarnation), &head[..16]);
        (head[..4] == *HEAD_MARK && u32_at(head, 16) == crc).then(|| Self {
            len_bytes: u32_at(head, 4) as usize,
            number: u64_at(head, 8),
        })
    }

    /// The checksum of the whole frame at the start of `bytes`, if it verifies.
    fn verify(&self, bytes: &[u8], chain: u32) -> Option<u32> {
        let frame = bytes.get(..self.frame_bytes())?;
        let (payload, foot) = frame[HEAD_BYTES..].split_at(self.len_bytes);
        let crc = chain_crc(chain, self.number, payload);
        (u32_at(foot, 0) == crc && foot[4] == TAIL_MARK).then_some(crc)
    }
}

fn push_frame(
    out: &mut Vec<u8>,
    incarnation: Incarnation,
    number: u64,
    chain: u32,
    payload: &[u8],
) -> u32 {
    let start = out.len();
    let len = u32::try_from(payload.len()).unwrap_or_else(|_| unreachable!("64 MiB at most"));
    out.reserve(HEAD_BYTES + payload.len() + FOOT_BYTES);
    out.extend(HEAD_MARK);
    out.extend(len.to_le_bytes());
    out.extend(number.to_le_bytes());
    let crc = crc32c::crc32c_append(incarnation_salt(incarnation), &out[start..]);
    out.extend(crc.to_le_bytes());
    out.extend(payload);
    let crc = chain_crc(chain, number, payload);
    out.extend(crc.to_le_bytes());
    out.push(TAIL_MARK);
    crc
}

fn push_record(payload: &mut Vec<u8>, record: &[u8]) {
    let len = u32::try_from(record.len()).unwrap_or_else(|_| unreachable!("1 MiB at most"));
    payload.extend(len.to_le_bytes());
    payload.extend(record);
}

fn split_record(payload: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = payload.split_at_checked(4)?;
    rest.split_at_checked(u32_at(len, 0) as usize)
}

fn incarnation_salt(incarnation: Incarnation) -> u32 {
    crc32c::crc32c(&incarnation.0.to_le_bytes())
}

fn chain_crc(chain: u32, number: u64, payload: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&chain.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &number.to_le_bytes());
    crc32c::crc32c_append(crc, payload)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}

/// What a journal file turned out to hold.
struct Scan {
    /// One past the last good frame.
    end: usize,
    /// Start of the last good frame (of the header, if there is none).
    last: usize,
    next_number: u64,
    chain: u32,
    /// Whether a torn frame follows.
    torn: bool,
}

impl Scan {
    fn run(image: &[u8], header: &Header) -> Result<Self, VaultError> {
        let mut scan = Self {
            end: HEADER_BYTES,
            last: 0,
            next_number: header.first_number,
            chain: header.crc(),
            torn: false,
        };
        while let Some(head) = FrameHead::decode(&image[scan.end..], header.incarnation)
            && head.number == scan.next_number
            && let Some(chain) = head.verify(&image[scan.end..], scan.chain)
        {
            scan.last = scan.end;
            scan.end += head.frame_bytes();
            scan.next_number += 1;
            scan.chain = chain;
        }
        let rest = &image[scan.end..];
        scan.torn = !is_zero(rest);
        if scan.torn && !scan.is_torn(image, header.incarnation) {
            return Err(VaultError::JournalDamaged {
                offset: scan.end as u64,
            });
        }
        Ok(scan)
    }

    /// Whether a power cut in the middle of one write explains what stands at `end`.
    fn is_torn(&self, image: &[u8], incarnation: Incarnation) -> bool {
        let later = (self.end + 1..image.len())
            .filter(|&at| image[at] == HEAD_MARK[0])
            .any(|at| FrameHead::decode(&image[at..], incarnation).is_some());
        if later {
            return false;
        }
        match FrameHead::decode(&image[self.end..], incarnation) {
            Some(head) if head.number != self.next_number => false,
            Some(head) => has_lost_sector(image, self.end, head.frame_bytes()),
            // The head's own sectors. If it reaches into a second one, that one is judged as a
            // whole, for how far the frame reached is not known.
            None => {
                let first = SECTOR_BYTES - self.end % SECTOR_BYTES;
                let reach = if first < HEAD_BYTES {
                    (first + SECTOR_BYTES).min(image.len() - self.end)
                } else {
                    HEAD_BYTES
                };
                image.len() < self.end + HEAD_BYTES || has_lost_sector(image, self.end, reach)
            }
        }
    }
}

/// Whether a sector's share of `image[start..start + len]` is all zero, or beyond the file.
fn has_lost_sector(image: &[u8], start: usize, len: usize) -> bool {
    let Some(frame) = image.get(start..start + len) else {
        return true;
    };
    let first = (SECTOR_BYTES - start % SECTOR_BYTES).min(frame.len());
    let (first, others) = frame.split_at(first);
    is_zero(first) || others.chunks(SECTOR_BYTES).any(is_zero)
}

fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; SECTOR_BYTES] = [0; SECTOR_BYTES];
    let mut chunks = bytes.chunks(SECTOR_BYTES);
    chunks.all(|chunk| *chunk == ZEROS[..chunk.len()])
}
