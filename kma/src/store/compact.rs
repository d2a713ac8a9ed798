//! Compaction: the journal grows with every use of a bit; what it adds up to does not.

use super::{Store, ledger};
use crate::{record::Record, vault::VaultError};

/// The journal is compacted beyond this length, unless configured otherwise.
pub const JOURNAL_LIMIT_BYTES: u64 = 256 << 20;

/// Bytes of the state in one record.
const PART_BYTES: usize = 256 << 10;

impl Store {
    /// Replaces a journal longer than `limit_bytes` by what it adds up to, and says whether it did.
    /// Commits what is staged. After a compaction that brought little, the journal may grow to twice
    /// the length before the next.
    ///
    /// # Errors
    ///
    /// As [`Vault::compact`](crate::vault::Vault::compact). If the error is not final, the journal is
    /// what it was, and grows by a quarter before it is tried again.
    pub fn compact_if_large(&mut self, limit_bytes: u64) -> Result<bool, VaultError> {
        let length = self.vault.journal_bytes();
        if length <= limit_bytes.max(self.compact_above_bytes) {
            return Ok(false);
        }
        self.compact_above_bytes = length + length / 4;
        let state = match postcard::to_allocvec(&self.state) {
            Ok(bytes) => bytes,
            Err(error) => unreachable!("the state encodes into memory: {error}"),
        };
        let parts = state.chunks(PART_BYTES);
        let last = u32::try_from(parts.len() - 1).unwrap_or(u32::MAX);
        let mut records = (0..=last).rev().zip(parts).map(|(more, part)| {
            let part = part.to_vec();
            ledger::encode(&Record::Snapshot { more, part })
        });
        self.vault.compact(&mut records)?;
        self.staged_bytes = 0;
        self.compact_above_bytes = self.vault.journal_bytes().saturating_mul(2);
        Ok(true)
    }
}
