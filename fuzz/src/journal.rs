//! The journal of the key store, and the ledger that it holds.
//!
//! - A journal that was written and not damaged shows every record that was committed, in order.
//! - Of a journal with damage (flipped bytes, sectors that are zero, a missing end), the reader shows
//!   a prefix of the commits, whole, or an error: never a record that was not written, and nothing
//!   before an error. Commits before the first damage are all there; one flipped byte costs the last
//!   commit at most (and mostly is an error).
//! - Any bytes are a journal or an error; any records are a ledger or an error.

use std::sync::OnceLock;

use qkd_kma::{
    store::read_ledger,
    vault::{Vault, read_journal, sim::SimDisk},
};
use qkd_secmem::{Locking, Pool, PoolConfig};

use super::input::Input;

/// See the module.
pub fn run(input: &[u8]) {
    let _ = read(input);
    let _ = read_ledger(input);
    let mut input = Input::new(input);
    let written = Written::by(&mut input);
    let whole = written.records(written.commits.len());
    assert_eq!(read(&written.image), Some(whole.clone()));
    let _ = read_ledger(&written.image);

    let (image, first_damage, one_flip) = damage(&written, &mut input);
    let Some(shown) = read(&image) else {
        assert!(first_damage < written.end() && read_ledger(&image).is_err());
        return;
    };
    assert!(whole.starts_with(&shown), "a record that was never written");
    let commits = written.commits.len();
    let prefix = (0..=commits).find(|&commits| written.records(commits).len() == shown.len());
    assert!(prefix.is_some(), "a part of a commit");
    let untouched = written
        .commits
        .iter()
        .filter(|(_, end)| *end <= first_damage)
        .count();
    let least = if one_flip {
        commits.saturating_sub(1)
    } else {
        untouched
    };
    assert!(
        shown.len() >= written.records(least).len(),
        "more is gone than was damaged"
    );
}

/// A journal with changes, the first byte that differs, and whether it is the only one.
fn damage(written: &Written, input: &mut Input<'_>) -> (Vec<u8>, usize, bool) {
    let (mut image, end) = (written.image.clone(), written.end());
    let mut cut = false;
    while !input.is_empty() && !cut {
        let (kind, at) = (input.byte() % 4, usize::from(input.u16()) % end);
        match kind {
            0 | 1 => image[at] ^= input.byte(),
            2 => image[at / 512 * 512..][..512].fill(0),
            _ => {
                image.truncate(at);
                cut = true;
            }
        }
    }
    let differs = |at: &usize| image.get(*at) != Some(&written.image[*at]);
    let mut damaged = (0..end).filter(differs);
    let first = damaged.next().unwrap_or(end);
    let one = first < end && !cut && damaged.next().is_none();
    (image, first, one)
}

/// The records, or none if there was an error, before which nothing may be shown.
fn read(image: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut records = Vec::new();
    let result = read_journal(image, &mut |record| records.push(record.to_vec()));
    assert!(result.is_ok() || records.is_empty());
    result.is_ok().then_some(records)
}

/// A journal, and what was committed to it.
struct Written {
    /// Records of each commit, and where it ends in the file.
    commits: Vec<(Vec<Vec<u8>>, usize)>,
    image: Vec<u8>,
}

impl Written {
    fn by(input: &mut Input<'_>) -> Self {
        static POOL: OnceLock<Pool> = OnceLock::new();
        let pool = POOL.get_or_init(|| {
            let config = PoolConfig {
                capacity_bytes: 1 << 20,
                locking: Locking::Unlocked,
            };
            Pool::new(config).unwrap()
        });
        let disk = SimDisk::new(1);
        let mut vault = disk.open_memory(pool.clone()).unwrap();
        let end = |vault: &dyn Vault| usize::try_from(vault.journal_bytes()).unwrap();
        // What a new vault wrote by itself.
        let first = read(&disk.read("journal").unwrap()).unwrap();
        let mut commits = vec![(first, end(&vault))];
        for _ in 0..input.byte() % 4 {
            let records: Vec<_> = (0..=input.byte() % 3)
                .map(|_| input.short().to_vec())
                .collect();
            records.iter().for_each(|record| vault.append(record));
            vault.commit().unwrap();
            commits.push((records, end(&vault)));
        }
        let image = disk.read("journal").unwrap();
        Self { commits, image }
    }

    /// All records of the first commits.
    fn records(&self, commits: usize) -> Vec<Vec<u8>> {
        let commits = self.commits[..commits].iter();
        commits.flat_map(|(records, _)| records.clone()).collect()
    }

    fn end(&self) -> usize {
        self.commits.last().map_or(0, |(_, end)| *end)
    }
}
