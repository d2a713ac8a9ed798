//! Rows that wait for the next transaction.

use std::collections::BTreeMap;

use super::RowId;

/// Sealed rows that are not in the database yet. Their number and their bytes are known without a
/// look at each: a batch may have thousands, and every one asks whether there is room.
#[derive(Debug, Default)]
pub(super) struct Staged {
    rows: BTreeMap<RowId, Vec<u8>>,
    len_bytes: usize,
    /// Rows that were looked at so far.
    #[cfg(test)]
    pub(super) looked_at: std::cell::Cell<usize>,
}

impl Staged {
    pub(super) fn insert(&mut self, row: RowId, sealed: Vec<u8>) {
        self.look(1);
        self.len_bytes += sealed.len();
        let before = self.rows.insert(row, sealed);
        self.len_bytes -= before.map_or(0, |before| before.len());
    }

    pub(super) fn remove(&mut self, row: RowId) {
        self.look(1);
        self.len_bytes -= self.rows.remove(&row).map_or(0, |sealed| sealed.len());
    }

    pub(super) fn get(&self, row: RowId) -> Option<&[u8]> {
        self.look(1);
        self.rows.get(&row).map(Vec::as_slice)
    }

    /// How many they are, and their bytes.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.rows.len(), self.len_bytes)
    }

    /// All of them, to be put into the database.
    pub(super) fn rows(&self) -> &BTreeMap<RowId, Vec<u8>> {
        self.look(self.rows.len());
        &self.rows
    }

    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.len_bytes = 0;
    }

    #[cfg(test)]
    fn look(&self, rows: usize) {
        self.looked_at.set(self.looked_at.get() + rows);
    }

    #[cfg(not(test))]
    #[allow(
        clippy::unused_self,
        clippy::missing_const_for_fn,
        reason = "counts in tests"
    )]
    fn look(&self, _rows: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::{Vault, sim::SimDisk};

    #[test]
    fn the_bytes_of_what_waits_are_those_of_its_rows_whatever_came_and_went() {
        let mut staged = Staged::default();
        for at in 0..100_u64 {
            let len = usize::try_from(at * 7 % 31).unwrap();
            staged.insert(RowId(at % 40), vec![0; len]);
            staged.remove(RowId(at * 3 % 50));
            let sum = staged.rows().values().map(Vec::len).sum();
            assert_eq!(staged.size(), (staged.rows().len(), sum));
        }
    }

    #[test]
    fn a_row_more_in_a_batch_costs_no_look_at_the_rows_before_it() {
        let mut vault = SimDisk::new(1).open_sealed().unwrap();
        for at in 0..3000 {
            vault.put(RowId(at), &[5; 64]).unwrap();
        }
        vault.commit().unwrap();
        let looked_at = vault.rows_looked_at();
        assert!(looked_at <= 3 * 3000, "{looked_at} looks at 3000 rows");
    }
}
