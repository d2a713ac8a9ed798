//! A damaged page of the row database ends as an error or as the end of the process, never as a
//! wrong key. (Each try is a process of its own, for LMDB may follow a broken page anywhere.)
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
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
    let earlier = before_the_last_commit();
    let mut outcomes: BTreeMap<&str, [u32; 3]> = BTreeMap::new();
    for damage in damages(whole.len() / PAGE_BYTES) {
        let mut bytes = whole.clone();
        if !damage.inflict(&mut bytes, &earlier) {
            continue;
        }
        fs::write(&data, bytes).unwrap();
        let seen = outcomes.entry(damage.kind()).or_default();
        match outcome(dir.path()) {
            Some(ALL_READ) => seen[0] += 1,
            Some(SOME_REFUSED) => seen[1] += 1,
            Some(code) => panic!("exit {code} after {damage:?}"),
            None => seen[2] += 1,
        }
    }
    println!("read, refused, died: {outcomes:?}");
    for (kind, [_, refused, died]) in outcomes {
        assert!(refused + died > 0, "{kind} did no harm");
    }
}

/// What happens to a file.
#[derive(Debug)]
enum Damage {
    /// A byte of a page differs.
    Byte(usize, usize),
    /// A page is zeros.
    Zeros(usize),
    /// A page's second half is as it was before the last commit.
    Torn(usize),
    /// A page stands in the place of another one.
    Misplaced(usize, usize),
    /// The file ends early.
    Cut(usize),
}

impl Damage {
    const fn kind(&self) -> &'static str {
        match self {
            Self::Byte(..) => "a byte",
            Self::Zeros(_) => "zeros",
            Self::Torn(_) => "torn",
            Self::Misplaced(..) => "misplaced",
            Self::Cut(_) => "cut",
        }
    }

    /// Says whether anything changed.
    fn inflict(&self, bytes: &mut Vec<u8>, earlier: &[u8]) -> bool {
        let before = bytes.clone();
        let at = |page: usize| page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
        match *self {
            Self::Byte(page, offset) => bytes[page * PAGE_BYTES + offset] ^= 0x5A,
            Self::Zeros(page) => bytes[at(page)].fill(0),
            Self::Torn(page) => {
                let half = page * PAGE_BYTES + PAGE_BYTES / 2..(page + 1) * PAGE_BYTES;
                let old = earlier.get(half.clone());
                let zeros = vec![0; PAGE_BYTES / 2];
                bytes[half].copy_from_slice(old.unwrap_or(&zeros));
            }
            Self::Misplaced(page, by) => bytes.copy_within(at(by), page * PAGE_BYTES),
            Self::Cut(page) => bytes.truncate(page * PAGE_BYTES + 512),
        }
        *bytes != before
    }
}

/// Headers and directories of the first pages (meta pages, branches, leaves), and places all over the
/// file.
fn damages(pages: usize) -> impl Iterator<Item = Damage> {
    let heads = (0..6)
        .flat_map(|page| [8, 10, 12, 14, 16, 18, 24, 40, 64].map(|at| Damage::Byte(page, at)));
    let all_over = |step: usize| (0..pages).step_by(step);
    heads
        .chain(all_over(9).map(|page| Damage::Byte(page, page * 37 % PAGE_BYTES)))
        .chain((0..6).map(Damage::Zeros))
        .chain(all_over(17).map(Damage::Zeros))
        .chain((0..6).map(Damage::Torn))
        .chain(all_over(13).map(Damage::Torn))
        .chain(all_over(19).map(move |page| Damage::Misplaced(page, (page + 7) % pages)))
        .chain(all_over(31).map(Damage::Cut))
}

/// The same file as it was before its last transaction.
fn before_the_last_commit() -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    write_rows(dir.path(), ROWS / 2);
    fs::read(dir.path().join("rows/data.mdb")).unwrap()
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
    write_rows(dir, ROWS);
}

/// In two transactions.
fn write_rows(dir: &Path, rows: u64) {
    let mut vault = open(dir).unwrap();
    for row in 0..rows {
        if row == ROWS / 2 {
            vault.commit().unwrap();
        }
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
