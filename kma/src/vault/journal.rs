//! The journal: an append-only file of frames ([`super::frame`]), one frame per commit.
//!
//! The file grows by whole chunks of zeros, so that most commits need not make a new length
//! durable. A journal that a compaction replaces is kept as an archive ([`super::archive`]).

use qkd_keyfile::Incarnation;

use super::archive::{self, HistoryLimit};
use super::disk::{BlockFile, Disk, create_whole};
use super::frame::{
    HEAD_BYTES, HEADER_BYTES, Header, Kind, Scan, each_frame_record, each_record, frame_bytes,
    push_frame, push_record,
};
use super::seal::random;
use super::{MAX_COMMIT_BYTES, MAX_RECORD_BYTES, VaultError};

/// After a final error ([`VaultError::is_final`]) it must not be used; the vaults see to that.
pub(super) struct Journal {
    disk: Box<dyn Disk>,
    file: Box<dyn BlockFile>,
    kind: Kind,
    incarnation: Incarnation,
    first_number: u64,
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
        let header = Header::decode(&image)?;
        header.check_kind(kind)?;
        let scan = Scan::run(&image, &header)?;
        image.truncate(scan.end);
        let mut journal = Self {
            disk,
            file,
            kind,
            incarnation: header.incarnation,
            first_number: header.first_number,
            end: scan.end as u64,
            len_bytes: len as u64,
            next_number: scan.next_number,
            chain: scan.chain,
            staged: Vec::new(),
            too_long: None,
            image: None,
        };
        // A compaction that did not come to its end left a second name of this very file.
        let unfinished = archive::name_of(journal.first_number);
        journal.disk.remove(&unfinished).map_err(io)?;
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
        each_record(&image, self.incarnation, each);
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

    /// Shows every committed record as it is on the disk, a frame at a time.
    pub(super) fn reread(&self, each: &mut dyn FnMut(&[u8])) -> Result<(), VaultError> {
        let mut at = HEADER_BYTES as u64;
        while at < self.end {
            let mut frame = vec![0; HEAD_BYTES];
            self.file.read_at(&mut frame, at).map_err(io)?;
            let damaged = VaultError::JournalDamaged { offset: at };
            let len = frame_bytes(&frame, self.incarnation).ok_or(damaged)?;
            frame.resize(len, 0);
            let (_, rest) = frame.split_at_mut(HEAD_BYTES);
            self.file
                .read_at(rest, at + HEAD_BYTES as u64)
                .map_err(io)?;
            each_frame_record(&frame, each);
            at += len as u64;
        }
        Ok(())
    }

    /// Drops history beyond the limit.
    pub(super) fn prune(&self, limit: HistoryLimit) -> Result<(), VaultError> {
        archive::prune(&*self.disk, limit)
    }

    /// Commits, then puts a journal of the snapshot's records in the place of this one, which becomes
    /// an archive.
    pub(super) fn compact(
        &mut self,
        snapshot: &mut dyn Iterator<Item = Vec<u8>>,
    ) -> Result<(), VaultError> {
        self.commit()?;
        let first_number = self.next_number;
        let written = self.write_snapshot(snapshot);
        let (file, end, next_number, chain) = match written {
            Ok(written) => written,
            Err(error) => {
                // Best effort: a leftover is removed when the store is opened.
                let _ = self.disk.remove(NEW_NAME);
                return Err(error);
            }
        };
        let kept = archive::name_of(self.first_number);
        let linked = self.disk.link(NAME, &kept);
        linked
            .and_then(|()| self.disk.sync_dir())
            .map_err(archive::io)?;
        // From here on, failure leaves it unknown which of the two a crash brings back.
        let renamed = self.disk.rename(NEW_NAME, NAME);
        renamed
            .and_then(|()| self.disk.sync_dir())
            .map_err(not_durable)?;
        self.file = file;
        self.first_number = first_number;
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

pub(super) const NAME: &str = "journal";
const NEW_NAME: &str = "journal.new";

/// The file grows by this much at a time.
const CHUNK_BYTES: u64 = 256 << 10;

fn io(source: std::io::Error) -> VaultError {
    VaultError::Io { file: NAME, source }
}

fn not_durable(source: std::io::Error) -> VaultError {
    VaultError::NotDurable { file: NAME, source }
}
