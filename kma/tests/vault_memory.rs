//! The vault whose rows are in locked memory only.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::path::Path;

use qkd_kma::vault::sim::{Fault, SimDisk};
use qkd_kma::vault::{
    GetError, KekSource, LmdbOptions, RowId, SealTag, Vault, VaultError, open_lmdb, open_memory,
};
use qkd_secmem::{Locking, Pool, PoolConfig};
use tempfile::TempDir;
use zeroize::Zeroizing;

fn pool() -> Pool {
    Pool::new(PoolConfig {
        capacity_bytes: 256 << 10,
        locking: Locking::Unlocked,
    })
    .unwrap()
}

#[test]
fn rows_are_gone_after_reopening_and_the_journal_is_not() {
    let dir = TempDir::new().unwrap();
    let mut vault = open_memory(dir.path(), pool()).unwrap();
    vault.append(b"row 1");
    let tag = vault.put(RowId(1), &[7; 32]).unwrap();
    vault.commit().unwrap();
    let mut out = [0; 32];
    vault.get(RowId(1), &tag, &mut out).unwrap();
    assert_eq!(out, [7; 32]);
    drop(vault);

    let mut vault = open_memory(dir.path(), pool()).unwrap();
    let mut records = Vec::new();
    vault
        .replay(&mut |record| records.push(record.to_vec()))
        .unwrap();
    assert_eq!(records, [b"row 1"]);
    assert_eq!(vault.rows().unwrap(), []);
    assert!(matches!(
        vault.get(RowId(1), &tag, &mut out),
        Err(GetError::Missing { .. })
    ));
}

#[test]
fn no_key_reaches_the_disk() {
    let dir = TempDir::new().unwrap();
    let mut vault = open_memory(dir.path(), pool()).unwrap();
    let key = [0xC3; 4096];
    vault.append(b"row 1");
    vault.put(RowId(1), &key).unwrap();
    vault.commit().unwrap();
    let files = fs::read_dir(dir.path()).unwrap();
    let names: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(names.len(), 2, "lock and journal");
    for name in names {
        let bytes = fs::read(name).unwrap();
        assert!(!bytes.windows(8).any(|part| part == &key[..8]));
    }
}

#[test]
fn an_erased_row_is_wiped_when_the_journal_is_durable_and_not_before() {
    let disk = SimDisk::new(1);
    let pool = pool();
    let mut vault = disk.open_memory(pool.clone()).unwrap();
    let tag = vault.put(RowId(1), &[7; 32]).unwrap();
    vault.append(b"row 1");
    vault.commit().unwrap();
    let in_use = pool.stats().in_use_bytes;
    assert!(in_use > 0);

    vault.erase(RowId(1));
    vault.append(b"row 1 is gone");
    disk.fail_at(disk.operations() + 1, Fault::NoSpace);
    assert!(matches!(vault.commit(), Err(VaultError::Io { .. })));
    assert_eq!(pool.stats().in_use_bytes, in_use);
    assert!(matches!(
        vault.get(RowId(1), &tag, &mut [0; 32]),
        Err(GetError::Missing { .. })
    ));
    vault.commit().unwrap();
    assert_eq!(pool.stats().in_use_bytes, 0);
}

#[test]
fn a_full_pool_refuses_a_row_and_stages_nothing() {
    let disk = SimDisk::new(1);
    let mut vault = disk.open_memory(pool()).unwrap();
    vault.put(RowId(1), &vec![1; 256 << 10]).unwrap();
    let full = vault.put(RowId(2), &[1; 32]);
    assert!(matches!(full, Err(VaultError::PoolExhausted(_))));
    vault.commit().unwrap();
    assert_eq!(vault.rows().unwrap(), [RowId(1)]);
    let long = vault.put(RowId(3), &vec![1; (256 << 10) + 1]);
    assert!(matches!(long, Err(VaultError::RowLength { .. })));
}

#[test]
fn a_wrong_tag_or_length_delivers_nothing() {
    let disk = SimDisk::new(1);
    let mut vault = disk.open_memory(pool()).unwrap();
    let tag = vault.put(RowId(1), &[7; 32]).unwrap();
    let mut out = [0; 32];
    let other = SealTag(tag.0.map(|byte| !byte));
    let refused = vault.get(RowId(1), &other, &mut out);
    assert!(matches!(refused, Err(GetError::OtherRow { .. })));
    let refused = vault.get(RowId(1), &tag, &mut out[..31]);
    assert!(matches!(
        refused,
        Err(GetError::Length { have_bytes: 32, .. })
    ));
    assert_eq!(out, [0; 32]);
    let again = vault.put(RowId(1), &[8; 32]);
    assert!(matches!(again, Err(VaultError::RowExists { .. })));
}

#[test]
fn a_store_of_one_kind_is_not_opened_as_the_other() {
    let (one, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let lmdb = |dir: &Path| {
        let kek = KekSource::Raw(Zeroizing::new([1; 32]));
        open_lmdb(dir, &kek, LmdbOptions::default()).map(drop)
    };
    open_memory(one.path(), pool()).unwrap();
    let refused = lmdb(one.path());
    assert!(matches!(
        refused,
        Err(VaultError::OtherKind {
            found: 2,
            wanted: 1
        })
    ));
    lmdb(other.path()).unwrap();
    let refused = open_memory(other.path(), pool());
    assert!(matches!(
        refused,
        Err(VaultError::OtherKind {
            found: 1,
            wanted: 2
        })
    ));
}

#[test]
fn compaction_keeps_rows_and_failure_latches() {
    let disk = SimDisk::new(1);
    let mut vault = disk.open_memory(pool()).unwrap();
    let tag = vault.put(RowId(1), &[7; 32]).unwrap();
    vault.compact(&mut [b"row 1".to_vec()].into_iter()).unwrap();
    let mut out = [0; 32];
    vault.get(RowId(1), &tag, &mut out).unwrap();
    assert_eq!(out, [7; 32]);
    vault.append(b"more");
    disk.fail_at(disk.operations() + 2, Fault::Io);
    assert!(vault.commit().unwrap_err().is_final());
    assert!(matches!(vault.commit(), Err(VaultError::Poisoned)));
    assert!(matches!(
        vault.get(RowId(1), &tag, &mut out),
        Err(GetError::Vault { .. })
    ));
}
