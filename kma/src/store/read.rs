//! Bytes of segments in use, in key memory: a sealed row is read and decrypted once, not per key.

use std::collections::BTreeMap;

use qkd_keyfile::{KeySpan, StreamId};
use qkd_secmem::{KeyBuf, Pool, PoolExhausted};

use super::Store;
use crate::vault::{GetError, RowId, SealTag, Vault};

/// Segments whose bytes stay open in key memory, at most.
const MAX_OPEN_ROWS: usize = 64;

/// Why bits could not be read. Nothing was used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// There is no such segment, or the span lies outside it.
    #[error("no such bits in stock")]
    NoSuchBits,
    /// Key memory is full.
    #[error("no key memory to read a segment into")]
    Memory(#[from] PoolExhausted),
    /// The row cannot be read back as it was stored.
    #[error("a stored segment cannot be read")]
    Get(#[from] GetError),
}

impl Store {
    /// Copies bits out of stock.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    ///
    /// # Panics
    ///
    /// If `out` is not as long as the span.
    pub(crate) fn read(
        &mut self,
        stream: &StreamId,
        span: KeySpan,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let (row, seal, len_bytes) = {
            let segment = self
                .segment(stream, span.segment)
                .ok_or(ReadError::NoSuchBits)?;
            (segment.row, segment.seal, segment.len_bytes)
        };
        let end = span
            .end_bytes()
            .filter(|&end| end <= len_bytes)
            .ok_or(ReadError::NoSuchBits)?;
        let range = span.offset_bytes as usize..end as usize;
        if let Some(bytes) = self.vault.row_in_memory(row, &seal) {
            let bytes = bytes.get(range).ok_or(ReadError::NoSuchBits)?;
            out.copy_from_slice(bytes);
            return Ok(());
        }
        let bytes =
            self.open_rows
                .open(&mut *self.vault, &self.pool, row, &seal, len_bytes as usize)?;
        out.copy_from_slice(&bytes[range]);
        Ok(())
    }

    /// Copies the bytes of several spans, one after the other.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub(crate) fn read_all(
        &mut self,
        stream: &StreamId,
        spans: &[KeySpan],
    ) -> Result<KeyBuf, ReadError> {
        let total: usize = spans.iter().map(|s| s.len_bytes as usize).sum();
        let mut out = self.open_rows.take(&self.pool, total)?;
        let mut at = 0;
        for &span in spans {
            let next = at + span.len_bytes as usize;
            self.read(stream, span, &mut out.expose_mut()[at..next])?;
            at = next;
        }
        Ok(out)
    }
}

/// The rows read last.
#[derive(Default)]
pub(super) struct OpenRows {
    rows: BTreeMap<RowId, (u64, KeyBuf)>,
    /// Counts uses.
    used: u64,
}

impl OpenRows {
    fn open(
        &mut self,
        vault: &mut dyn Vault,
        pool: &Pool,
        row: RowId,
        seal: &SealTag,
        len_bytes: usize,
    ) -> Result<&[u8], ReadError> {
        self.used += 1;
        if !self.rows.contains_key(&row) {
            if self.rows.len() >= MAX_OPEN_ROWS {
                self.close_oldest();
            }
            let mut bytes = self.take(pool, len_bytes)?;
            vault.get(row, seal, bytes.expose_mut())?;
            self.rows.insert(row, (self.used, bytes));
        }
        let Some((used, bytes)) = self.rows.get_mut(&row) else {
            unreachable!("was just inserted");
        };
        *used = self.used;
        Ok(bytes.expose())
    }

    /// Key memory; open rows make room for it, for they can be read again.
    fn take(&mut self, pool: &Pool, len_bytes: usize) -> Result<KeyBuf, PoolExhausted> {
        loop {
            match pool.take(len_bytes) {
                Err(_) if self.close_oldest() => {}
                outcome => return outcome,
            }
        }
    }

    pub(super) fn close(&mut self, row: RowId) {
        self.rows.remove(&row);
    }

    fn close_oldest(&mut self) -> bool {
        let oldest = self.rows.iter().min_by_key(|(_, (used, _))| *used);
        match oldest.map(|(&row, _)| row) {
            Some(row) => self.rows.remove(&row).is_some(),
            None => false,
        }
    }
}
