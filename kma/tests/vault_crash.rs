//! The vault on a disk that fails and loses power: whatever happens, and whenever, the journal
//! shows all that was acknowledged, every row it tells of reads as it was put, and every other row
//! can be erased for good.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use qkd_kma::vault::sim::{Fault, SimDisk};
use qkd_kma::vault::{GetError, RowId, SealTag, SealedVault, Vault, VaultError};

/// What a caller does.
#[derive(Debug, Clone)]
enum Op {
    Note(u16),
    Put(u16),
    /// Of the n-th row that is alive.
    Erase(u8),
    Commit,
    Compact,
}

/// What the caller's journal says.
#[derive(Debug, Clone, PartialEq)]
enum Record {
    Note(u16),
    Put(RowId, SealTag, u16),
    Erase(RowId),
}

impl Record {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Note(len) => {
                let mut bytes = vec![b'n'; usize::from(*len)];
                bytes.splice(0..0, len.to_le_bytes());
                bytes
            }
            Self::Put(row, tag, len) => {
                [&row.0.to_le_bytes()[..], &tag.0, &len.to_le_bytes(), b"p"].concat()
            }
            Self::Erase(row) => [&row.0.to_le_bytes()[..], b"e"].concat(),
        }
    }

    fn decode(bytes: &[u8]) -> Self {
        let row = |bytes: &[u8]| RowId(u64::from_le_bytes(bytes.try_into().unwrap()));
        let len = |bytes: &[u8]| u16::from_le_bytes(bytes.try_into().unwrap());
        match bytes.last() {
            Some(b'p') => Self::Put(
                row(&bytes[..8]),
                SealTag(bytes[8..24].try_into().unwrap()),
                len(&bytes[24..26]),
            ),
            Some(b'e') => Self::Erase(row(&bytes[..8])),
            _ => Self::Note(len(&bytes[..2])),
        }
    }
}

fn key(row: RowId, len: u16) -> Vec<u8> {
    let byte = |at: u64| (at + 1).wrapping_mul(row.0 * 2 + 0x9E37_79B9).to_le_bytes()[2];
    (0..u64::from(len)).map(byte).collect()
}

/// The rows that a journal tells of.
fn alive(journal: &[Record]) -> BTreeMap<RowId, (SealTag, u16)> {
    let mut rows = BTreeMap::new();
    for record in journal {
        match record {
            Record::Put(row, tag, len) => drop(rows.insert(*row, (*tag, *len))),
            Record::Erase(row) => drop(rows.remove(row)),
            Record::Note(_) => {}
        }
    }
    rows
}

/// A journal that tells the same in fewer records.
fn snapshot(journal: &[Record]) -> Vec<Record> {
    let puts = alive(journal).into_iter();
    let puts = puts.map(|(row, (tag, len))| Record::Put(row, tag, len));
    std::iter::once(Record::Note(3)).chain(puts).collect()
}

/// A caller and its disk.
struct World {
    disk: SimDisk,
    vault: SealedVault,
    /// Acknowledged.
    journal: Vec<Record>,
    staged: Vec<Record>,
    next_row: u64,
}

impl World {
    fn new(disk: SimDisk) -> Result<Self, VaultError> {
        let mut vault = disk.open_sealed()?;
        vault.replay(&mut |_| panic!("a new journal is empty"))?;
        Ok(Self {
            disk,
            vault,
            journal: Vec::new(),
            staged: Vec::new(),
            next_row: 0,
        })
    }

    fn now(&self) -> Vec<Record> {
        [&self.journal[..], &self.staged].concat()
    }

    fn stage(&mut self, record: Record) {
        self.vault.append(&record.encode());
        self.staged.push(record);
    }

    fn run(&mut self, op: &Op) -> Result<(), VaultError> {
        match op {
            Op::Note(len) => self.stage(Record::Note(*len)),
            Op::Put(len) => {
                let row = RowId(self.next_row);
                self.next_row += 1;
                let tag = self.vault.put(row, &key(row, *len))?;
                self.stage(Record::Put(row, tag, *len));
            }
            Op::Erase(n) => {
                let rows = alive(&self.now());
                if let Some(row) = rows.keys().nth(usize::from(*n) % rows.len().max(1)) {
                    self.vault.erase(*row);
                    self.stage(Record::Erase(*row));
                }
            }
            Op::Commit => {
                self.vault.commit()?;
                self.journal.append(&mut self.staged);
            }
            Op::Compact => {
                let snapshot = snapshot(&self.now());
                let mut records = snapshot.iter().map(Record::encode);
                self.vault.compact(&mut records)?;
                self.journal = snapshot;
                self.staged.clear();
            }
        }
        Ok(())
    }

    /// What the journal may show after a crash in `op`.
    fn candidates(&self, op: &Op) -> Vec<Vec<Record>> {
        let mut candidates = vec![self.journal.clone()];
        match op {
            Op::Commit => candidates.push(self.now()),
            Op::Compact => candidates.extend([self.now(), snapshot(&self.now())]),
            Op::Note(_) | Op::Put(_) | Op::Erase(_) => {}
        }
        candidates
    }

    /// Opens the store as after a restart, and checks it against what it may hold.
    fn reopen(&mut self, candidates: &[Vec<Record>]) -> Result<(), VaultError> {
        let mut vault = self.disk.open_sealed()?;
        let mut journal = Vec::new();
        vault.replay(&mut |record| journal.push(Record::decode(record)))?;
        assert!(candidates.contains(&journal), "not among what may be there");
        let rows = alive(&journal);
        for (row, (tag, len)) in &rows {
            let mut out = vec![0; usize::from(*len)];
            vault.get(*row, tag, &mut out).unwrap();
            assert_eq!(out, key(*row, *len));
        }
        let orphans = vault.rows()?;
        for row in orphans.iter().filter(|row| !rows.contains_key(row)) {
            vault.erase(*row);
        }
        vault.commit()?;
        assert!(vault.rows()?.iter().eq(rows.keys()));
        // The numbers of orphans are used again.
        self.next_row = rows.keys().last().map_or(0, |row| row.0 + 1);
        self.vault = vault;
        self.journal = journal;
        self.staged.clear();
        Ok(())
    }

    /// No data key is on the disk but those of the rows that are alive.
    fn assert_forgotten(&self) {
        let slots = self.disk.read("slots").unwrap();
        let used = slots[4096..]
            .chunks(128)
            .filter(|slot| &slot[..4] == b"used");
        let found: std::collections::BTreeSet<RowId> = used
            .map(|slot| RowId(u64::from_le_bytes(slot[4..12].try_into().unwrap())))
            .collect();
        assert!(found.iter().eq(alive(&self.journal).keys()));
    }
}

/// What was said about one run.
#[derive(Debug, Default)]
struct Seen {
    crashes: u32,
    refused: u32,
}

/// Runs `ops` with one fault at operation `at` and, if the power went, another cut while the store
/// is opened again.
fn run(seed: u64, ops: &[Op], at: u64, fault: Fault, second: Option<u64>) -> Seen {
    let disk = SimDisk::new(seed);
    let mut seen = Seen::default();
    disk.fail_at(at, fault);
    let mut world = loop {
        match World::new(disk.clone()) {
            Ok(world) => break world,
            Err(_) => disk.restart(),
        }
    };
    for op in ops {
        let candidates = world.candidates(op);
        let Err(error) = world.run(op) else { continue };
        if fault != Fault::PowerCut && !error.is_final() {
            seen.refused += 1;
            world.run(op).unwrap();
            continue;
        }
        seen.crashes += 1;
        if fault != Fault::PowerCut {
            assert!(matches!(world.vault.commit(), Err(VaultError::Poisoned)));
            assert!(matches!(world.vault.rows(), Err(VaultError::Poisoned)));
            world.reopen(&candidates).unwrap();
        } else {
            disk.restart();
            if let Some(second) = second {
                disk.fail_at(disk.operations() + second, Fault::PowerCut);
            }
            if world.reopen(&candidates).is_err() {
                disk.restart();
                world.reopen(&candidates).unwrap();
            }
        }
        // What was read once stays.
        disk.restart();
        world.assert_forgotten();
        world.reopen(&[world.journal.clone()]).unwrap();
        world.assert_forgotten();
    }
    disk.restart();
    world.assert_forgotten();
    let last = [world.journal.clone(), world.now()];
    world.reopen(&last[..1]).unwrap();
    disk.restart();
    world.reopen(&last[..1]).unwrap();
    world.assert_forgotten();
    seen
}

fn scenario() -> Vec<Op> {
    use Op::{Commit, Compact, Erase, Note, Put};
    let mut ops = vec![Note(1), Commit, Put(40), Put(41), Commit];
    ops.extend([Note(700), Put(64), Note(1300), Commit, Erase(1), Commit]);
    ops.extend([
        Put(7),
        Erase(0),
        Erase(1),
        Note(2),
        Commit,
        Note(9),
        Compact,
    ]);
    ops.extend([
        Put(90),
        Erase(0),
        Compact,
        Note(600),
        Commit,
        Put(5),
        Commit,
    ]);
    ops
}

#[test]
fn a_fault_at_any_operation_loses_nothing_that_was_acknowledged() {
    let ops = scenario();
    let disk = SimDisk::new(0);
    let mut world = World::new(disk.clone()).unwrap();
    ops.iter().for_each(|op| world.run(op).unwrap());
    let count = disk.operations();
    let (mut crashes, mut refused) = (0, 0);
    for at in 1..=count {
        for seed in 0..4 {
            for fault in [Fault::PowerCut, Fault::Io, Fault::NoSpace] {
                let seen = run(seed, &ops, at, fault, None);
                crashes += seen.crashes;
                refused += seen.refused;
            }
        }
    }
    assert!(count > 50 && crashes > 200 && refused > 50);
}

#[test]
fn a_power_cut_while_recovering_from_one_loses_nothing_either() {
    let ops = scenario();
    for at in (1..80).step_by(3) {
        for second in 1..14 {
            run(at * 100 + second, &ops, at, Fault::PowerCut, Some(second));
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0_u16..1600).prop_map(Op::Note),
        3 => (1_u16..300).prop_map(Op::Put),
        2 => any::<u8>().prop_map(Op::Erase),
        4 => Just(Op::Commit),
        1 => Just(Op::Compact),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_survives_any_fault(
        seed in any::<u64>(),
        ops in prop::collection::vec(op(), 1..40),
        at in 1_u64..200,
        fault in prop_oneof![4 => Just(Fault::PowerCut), 1 => Just(Fault::Io), 1 => Just(Fault::NoSpace)],
        second in prop::option::of(1_u64..12),
    ) {
        run(seed, &ops, at, fault, second);
    }
}

#[test]
fn a_power_cut_between_rows_and_journal_leaves_rows_that_the_caller_erases() {
    // Operations of a commit with a row: slot, its sync, the rows, the frame, its sync.
    for operation in 4..=5 {
        let disk = SimDisk::new(operation);
        let mut world = World::new(disk.clone()).unwrap();
        world.run(&Op::Put(64)).unwrap();
        let tag = alive(&world.staged)[&RowId(0)].0;
        disk.fail_at(disk.operations() + operation, Fault::PowerCut);
        world.vault.commit().unwrap_err();
        disk.restart();

        let mut vault = disk.open_sealed().unwrap();
        let mut records = 0;
        vault.replay(&mut |_| records += 1).unwrap();
        assert_eq!(vault.rows().unwrap(), [RowId(0)]);
        if records == 0 {
            vault.erase(RowId(0));
            vault.commit().unwrap();
            assert_eq!(vault.rows().unwrap(), []);
            let gone = vault.get(RowId(0), &tag, &mut [0; 64]);
            assert!(matches!(gone, Err(GetError::Missing { .. })));
        }
    }
}

#[test]
fn a_commit_that_found_no_space_is_retried() {
    let disk = SimDisk::new(1);
    let mut world = World::new(disk.clone()).unwrap();
    world.run(&Op::Put(64)).unwrap();
    // The slot, then the rows (the slot is done), then the frame (the rows are done, too).
    for operation in [1, 3, 2] {
        disk.fail_at(disk.operations() + operation, Fault::NoSpace);
        let error = world.vault.commit().unwrap_err();
        assert!(matches!(error, VaultError::Io { .. }), "{error:?}");
    }
    world.run(&Op::Commit).unwrap();
    disk.restart();
    world.reopen(&[world.journal.clone()]).unwrap();
    assert_eq!(world.journal.len(), 1);
}

#[test]
fn a_power_cut_in_a_retried_commit_is_no_damage() {
    for seed in 0..40 {
        let disk = SimDisk::new(seed);
        let mut world = World::new(disk.clone()).unwrap();
        world.run(&Op::Note(1500)).unwrap();
        disk.fail_at(disk.operations() + 1, Fault::NoSpace);
        world.vault.commit().unwrap_err();
        world.run(&Op::Note(1500)).unwrap();
        disk.fail_at(disk.operations() + 2, Fault::PowerCut);
        world.vault.commit().unwrap_err();
        disk.restart();
        world.reopen(&world.candidates(&Op::Commit)).unwrap();
    }
}

#[test]
fn after_a_failed_sync_everything_fails_until_reopened() {
    let disk = SimDisk::new(1);
    let mut world = World::new(disk.clone()).unwrap();
    world.run(&Op::Put(64)).unwrap();
    world.run(&Op::Commit).unwrap();
    let tag = alive(&world.journal)[&RowId(0)].0;
    world.run(&Op::Note(5)).unwrap();
    disk.fail_at(disk.operations() + 2, Fault::Io);
    let error = world.vault.commit().unwrap_err();
    assert!(
        error.is_final()
            && matches!(
                error,
                VaultError::NotDurable {
                    file: "journal",
                    ..
                }
            )
    );
    let vault = &mut world.vault;
    assert!(matches!(vault.commit(), Err(VaultError::Poisoned)));
    assert!(matches!(vault.rows(), Err(VaultError::Poisoned)));
    assert!(matches!(
        vault.put(RowId(9), &[1]),
        Err(VaultError::Poisoned)
    ));
    let nothing = &mut std::iter::empty();
    assert!(matches!(vault.compact(nothing), Err(VaultError::Poisoned)));
    assert!(matches!(
        vault.get(RowId(0), &tag, &mut [0; 64]),
        Err(GetError::Vault {
            source: VaultError::Poisoned,
            ..
        })
    ));
}
