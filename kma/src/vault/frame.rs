//! What a journal looks like on disk, whole, torn or damaged.
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

use qkd_keyfile::Incarnation;

use super::VaultError;
use super::journal::NAME;

/// Which backend a journal belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Rows are sealed on disk.
    Sealed = 1,
    /// Rows are in memory.
    Memory = 2,
}

/// What a journal starts with.
pub(super) struct Header {
    pub(super) kind: u32,
    pub(super) incarnation: Incarnation,
    pub(super) first_number: u64,
}

const MAGIC: &[u8; 8] = b"QKDjrnl\n";
const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: usize = 4096;
const HEADER_FIELDS: usize = 32;

impl Header {
    pub(super) const fn new(kind: Kind, incarnation: Incarnation, first_number: u64) -> Self {
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

    pub(super) fn crc(&self) -> u32 {
        crc32c::crc32c(&self.fields())
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut block = self.fields().to_vec();
        block.extend(self.crc().to_le_bytes());
        block.resize(HEADER_BYTES, 0);
        block
    }

    /// Of a journal of any kind.
    pub(super) fn decode(image: &[u8]) -> Result<Self, VaultError> {
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
        Ok(header)
    }

    pub(super) const fn check_kind(&self, wanted: Kind) -> Result<(), VaultError> {
        if self.kind != wanted as u32 {
            return Err(VaultError::OtherKind {
                found: self.kind,
                wanted: wanted as u32,
            });
        }
        Ok(())
    }
}

/// The first and the last byte of a frame are not zero, so neither is any sector that holds a whole
/// end of it.
const HEAD_MARK: &[u8; 4] = b"\xA5QKF";
const TAIL_MARK: u8 = 0x5A;
pub(super) const HEAD_BYTES: usize = 20;
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

/// Appends a frame to `out` and returns its checksum.
pub(super) fn push_frame(
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

/// Appends a record to a frame's payload.
pub(super) fn push_record(payload: &mut Vec<u8>, record: &[u8]) {
    let len = u32::try_from(record.len()).unwrap_or_else(|_| unreachable!("1 MiB at most"));
    payload.extend(len.to_le_bytes());
    payload.extend(record);
}

/// Shows every record of a journal that was scanned and ends where the scan did.
pub(super) fn each_record(image: &[u8], incarnation: Incarnation, each: &mut dyn FnMut(&[u8])) {
    let mut at = HEADER_BYTES;
    while let Some(head) = FrameHead::decode(&image[at..], incarnation) {
        each_frame_record(&image[at..at + head.frame_bytes()], each);
        at += head.frame_bytes();
    }
}

/// Length of the frame that begins with these bytes, if one does.
pub(super) fn frame_bytes(head: &[u8], incarnation: Incarnation) -> Option<usize> {
    FrameHead::decode(head, incarnation).map(|head| head.frame_bytes())
}

/// Shows every record of one whole frame.
pub(super) fn each_frame_record(frame: &[u8], each: &mut dyn FnMut(&[u8])) {
    let mut payload = &frame[HEAD_BYTES..frame.len() - FOOT_BYTES];
    while let Some((record, rest)) = split_record(payload) {
        each(record);
        payload = rest;
    }
}

/// Reads the records of a journal file, or of a copy of one, without opening the store: for
/// checkers. A torn last commit is left out.
///
/// # Errors
///
/// [`VaultError::Header`], [`VaultError::NewerVersion`] or [`VaultError::JournalDamaged`]. Nothing
/// was shown.
pub fn read_journal(image: &[u8], each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
    let header = Header::decode(image)?;
    let scan = Scan::run(image, &header)?;
    each_record(&image[..scan.end], header.incarnation, each);
    Ok(())
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
pub(super) struct Scan {
    /// One past the last good frame.
    pub(super) end: usize,
    /// Start of the last good frame (of the header, if there is none).
    pub(super) last: usize,
    pub(super) next_number: u64,
    pub(super) chain: u32,
    /// Whether a torn frame follows.
    pub(super) torn: bool,
}

impl Scan {
    pub(super) fn run(image: &[u8], header: &Header) -> Result<Self, VaultError> {
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
