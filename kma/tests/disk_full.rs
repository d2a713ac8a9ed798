//! A disk that is really full: a small file system in memory, in a mount namespace of its own.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use qkd_kma::vault::{
    KekSource, LmdbOptions, RowId, SealTag, SealedVault, Vault, VaultError, open_lmdb,
};
use zeroize::Zeroizing;

const DIR: &str = "QKD_TEST_FULL_DISK";
const TEST: &str = "a_full_disk_is_told_and_loses_nothing";
const ROW_BYTES: usize = 60_000;

#[test]
fn a_full_disk_is_told_and_loses_nothing() {
    if let Some(dir) = std::env::var_os(DIR) {
        return fill(Path::new(&dir));
    }
    let dir = tempfile::TempDir::new().unwrap();
    let me = std::env::current_exe().unwrap();
    let script = format!(
        "mount -t tmpfs -o size=6m none {dir} && exec {me} {TEST} --exact --nocapture",
        dir = dir.path().display(),
        me = me.display()
    );
    // As root, or in a user namespace of one's own.
    for unshare in [&["-m"][..], &["-Urm"]] {
        let probe = format!("mount -t tmpfs -o size=64k none {}", dir.path().display());
        let mut possible = Command::new("unshare");
        possible.args(unshare).args(["sh", "-c", &probe]);
        if !possible
            .output()
            .is_ok_and(|output| output.status.success())
        {
            continue;
        }
        let mut command = Command::new("unshare");
        command.args(unshare).args(["sh", "-c", &script]);
        let output = command.env(DIR, dir.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{text}");
        return;
    }
    println!("skipped: no file system may be mounted here, not even in a namespace");
}

fn open(dir: &Path) -> Result<SealedVault, VaultError> {
    let kek = KekSource::Raw(Zeroizing::new([1; 32]));
    let max_bytes = 64 << 20;
    open_lmdb(&dir.join("store"), &kek, LmdbOptions { max_bytes })
}

fn key(row: u64) -> Vec<u8> {
    let byte = |at: u64| (at + 7).wrapping_mul(row + 0x9E37).to_le_bytes()[1];
    (0..ROW_BYTES as u64).map(byte).collect()
}

fn check(vault: &mut SealedVault, tags: &[SealTag]) {
    for (row, tag) in (0..).zip(tags) {
        let mut out = vec![0; ROW_BYTES];
        vault.get(RowId(row), tag, &mut out).unwrap();
        assert_eq!(out, key(row));
    }
}

/// Takes all the room that is left.
fn fill_up(dir: &Path) {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("filler"))
        .unwrap();
    for size in [1 << 16, 4096] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
}

fn replayed(vault: &mut SealedVault) -> Vec<SealTag> {
    let mut tags = Vec::new();
    let each = &mut |tag: &[u8]| tags.push(SealTag(tag.try_into().unwrap()));
    vault.replay(each).unwrap();
    tags
}

/// Runs in the small file system.
fn fill(dir: &Path) {
    // What an operator removes when he makes room.
    fs::write(dir.join("ballast"), vec![1; 1 << 20]).unwrap();
    let mut vault = open(dir).unwrap();
    let mut acknowledged = Vec::new();
    let told = loop {
        let row = acknowledged.len() as u64;
        let put = vault.put(RowId(row), &key(row));
        let tag = put.unwrap();
        vault.append(&tag.0);
        match vault.commit() {
            Ok(()) => acknowledged.push(tag),
            Err(error) => {
                acknowledged.push(tag);
                break error;
            }
        }
        assert!(row < 200, "6 MiB hold no more");
    };
    assert!(told.is_disk_full(), "{told:?}");
    assert!(!told.is_final(), "{told:?}");
    let durable = acknowledged[..acknowledged.len() - 1].to_vec();
    assert!(durable.len() > 20);
    check(&mut vault, &acknowledged);

    // Nothing else goes, and nothing is broken by trying.
    fill_up(dir);
    for _ in 0..3 {
        assert!(vault.commit().unwrap_err().is_disk_full());
    }
    assert!(vault.rotate_epoch().unwrap_err().is_disk_full());
    let snapshot = durable.iter().map(|tag| tag.0.to_vec());
    let compacted = vault.compact(&mut snapshot.clone());
    assert!(!compacted.unwrap_err().is_final());
    check(&mut vault, &acknowledged);

    // Room: what was staged becomes durable as if nothing had been.
    fs::remove_file(dir.join("filler")).unwrap();
    fs::remove_file(dir.join("ballast")).unwrap();
    vault.erase(RowId(0));
    vault.commit().unwrap();
    drop(vault);
    let mut vault = open(dir).unwrap();
    let tags = replayed(&mut vault);
    assert_eq!(tags, acknowledged);
    for (row, tag) in (1..).zip(&durable[1..]) {
        let mut out = vec![0; ROW_BYTES];
        vault.get(RowId(row), tag, &mut out).unwrap();
    }
    drop(vault);

    // A full disk at the start: it opens, or says why not, and damages nothing either way.
    fill_up(dir);
    match open(dir) {
        Ok(mut vault) => assert_eq!(replayed(&mut vault), tags),
        Err(error) => assert!(error.is_disk_full() || !error.is_final(), "{error:?}"),
    }
    fs::remove_file(dir.join("filler")).unwrap();
    let mut vault = open(dir).unwrap();
    assert_eq!(replayed(&mut vault), tags);
    vault.erase(RowId(1));
    vault.append(&tags[0].0);
    vault.commit().unwrap();
    vault.rotate_epoch().unwrap();
    let mut out = vec![0; ROW_BYTES];
    vault.get(RowId(2), &tags[2], &mut out).unwrap();
    assert_eq!(out, key(2));
}
