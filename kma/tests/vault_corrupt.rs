//! A damaged page of the row database ends as an error or as the end of the process, never as a
//! wrong key. (Each try is a process of its own, for LMDB may follow a broken page anywhere.)
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use qkd_kma::vault::{KekSource, LmdbOptions, RowId, SealTag, SealedVault, Vault, open_lmdb};
use tempfile::TempDir;
use zeroize::Zeroizing;

const DIR: &str = "QKD_TEST_DAMAGED_VAULT";
const ROWS: u64 = 200;
const ROW_BYTES: usize = 3000;
const PAGE_BYTES: usize = 4096;

/// What a process says of the store that it reads.
const ALL_READ: i32 = 20;
const SOME_REFUSED: i32 = 21;
const WRONG_KEY: i32 = 22;

#[test]
fn a_damaged_page_never_gives_a_wrong_key() {
    if let Some(dir) = std::env::var_os(DIR) {
        std::process::exit(read_all(Path::new(&dir)));
    }
    let dir = TempDir::new().unwrap();
    write(dir.path());
    let data = dir.path().join("rows/data.mdb");
    let whole = fs::read(&data).unwrap();
    assert_eq!(outcome(dir.path()), Some(ALL_READ));
    let (mut read, mut refused, mut died) = (0, 0, 0);
    for (page, at) in damages(whole.len() / PAGE_BYTES) {
        let mut bytes = whole.clone();
        let offset = page * PAGE_BYTES + at;
        bytes[offset] ^= 0x5A;
        fs::write(&data, bytes).unwrap();
        match outcome(dir.path()) {
            Some(ALL_READ) => read += 1,
            Some(SOME_REFUSED) => refused += 1,
            Some(code) => panic!("exit {code} after damage at byte {offset}"),
            None => died += 1,
        }
    }
    assert!(refused > 0, "{read} read, {refused} refused, {died} died");
}

/// Headers and directories of the first pages (meta pages, branches, leaves), and some bytes
/// elsewhere.
fn damages(pages: usize) -> impl Iterator<Item = (usize, usize)> {
    let heads = (0..6).flat_map(|page| [8, 10, 12, 14, 16, 18, 24, 40, 64].map(|at| (page, at)));
    heads.chain(
        (0..pages)
            .step_by(9)
            .map(|page| (page, page * 37 % PAGE_BYTES)),
    )
}

/// How a process that reads the store ends: its exit code, or `None` where a signal ended it.
fn outcome(dir: &Path) -> Option<i32> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["a_damaged_page_never_gives_a_wrong_key", "--exact"])
        .env(DIR, dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    panic!("reading goes on for ever");
}

fn open(dir: &Path) -> Option<SealedVault> {
    let kek = KekSource::Raw(Zeroizing::new([1; 32]));
    let max_bytes = 16 << 20;
    open_lmdb(dir, &kek, LmdbOptions { max_bytes }).ok()
}

fn key(row: u64) -> Vec<u8> {
    let byte = |at: u64| (at + 7).wrapping_mul(row + 0x9E37).to_le_bytes()[1];
    (0..ROW_BYTES as u64).map(byte).collect()
}

fn write(dir: &Path) {
    let mut vault = open(dir).unwrap();
    for row in 0..ROWS {
        // Some rows share a leaf, some have pages of their own.
        let key = &key(row)[..if row % 2 == 0 { 100 } else { ROW_BYTES }];
        let tag = vault.put(RowId(row), key).unwrap();
        vault.append(&tag.0);
    }
    vault.commit().unwrap();
}

fn read_all(dir: &Path) -> i32 {
    let Some(mut vault) = open(dir) else {
        return SOME_REFUSED;
    };
    let mut tags = Vec::new();
    let each = &mut |tag: &[u8]| tags.push(SealTag(tag.try_into().unwrap()));
    vault.replay(each).unwrap();
    let mut answer = ALL_READ;
    for (row, tag) in (0..).zip(&tags) {
        let mut out = vec![0; if row % 2 == 0 { 100 } else { ROW_BYTES }];
        match vault.get(RowId(row), tag, &mut out) {
            Ok(()) if out == key(row)[..out.len()] => {}
            Ok(()) => return WRONG_KEY,
            Err(_) => answer = SOME_REFUSED,
        }
    }
    answer
}
