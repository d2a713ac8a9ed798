//! A process that writes a vault is killed, again and again: what it acknowledged is there.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use qkd_kma::vault::{KekSource, LmdbOptions, RowId, SealTag, SealedVault, Vault, open_lmdb};
use zeroize::Zeroizing;

const DIR: &str = "QKD_TEST_KILLED_VAULT";
const KILLS: u64 = 30;
/// Commit n puts row n and erases row n - 4.
const ALIVE: u64 = 4;
const ROW_BYTES: usize = 9000;

#[test]
fn every_acknowledged_commit_survives_kill_9() {
    if let Some(dir) = std::env::var_os(DIR) {
        write_until_killed(Path::new(&dir));
    }
    let dir = tempfile::TempDir::new().unwrap();
    let mut acknowledged = 0;
    for kill in 0..KILLS {
        let mut child = spawn(dir.path());
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let enough = acknowledged + 1 + kill % 13;
        let number = |line: String| line.strip_prefix("ack ").and_then(|n| n.parse().ok());
        while acknowledged < enough {
            let line = lines.next().expect("the child goes on until killed");
            acknowledged = number(line.unwrap()).unwrap_or(acknowledged);
        }
        std::thread::sleep(Duration::from_micros(kill * 7919 % 4000));
        child.kill().unwrap();
        for line in lines {
            acknowledged = number(line.unwrap()).unwrap_or(acknowledged);
        }
        child.wait().unwrap();
        let (_, last) = open(dir.path());
        assert!(last >= acknowledged && last <= acknowledged + 1);
    }
    assert!(acknowledged > KILLS);
}

/// This test again, in a process of its own.
fn spawn(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "every_acknowledged_commit_survives_kill_9",
            "--exact",
            "--nocapture",
        ])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn write_until_killed(dir: &Path) -> ! {
    let (mut vault, mut last) = open(dir);
    let mut records = Vec::new();
    loop {
        last += 1;
        let tag = vault.put(RowId(last), &key(last)).unwrap();
        let record = [&last.to_le_bytes()[..], &tag.0].concat();
        vault.append(&record);
        records.push(record);
        vault.erase(RowId(last.saturating_sub(ALIVE)));
        vault.commit().unwrap();
        println!("ack {last}");
        if last.is_multiple_of(10) && records.len() >= 4 {
            let alive = records.split_off(records.len() - 4);
            vault.compact(&mut alive.iter().cloned()).unwrap();
            records = alive;
        }
    }
}

/// Opens the store, checks every row that its journal tells of, and erases all others. Returns the
/// number of the last commit.
fn open(dir: &Path) -> (SealedVault, u64) {
    let kek = KekSource::Raw(Zeroizing::new([1; 32]));
    let max_bytes = 16 << 20;
    let mut vault = open_lmdb(dir, &kek, LmdbOptions { max_bytes }).unwrap();
    let mut records = Vec::new();
    let each = &mut |record: &[u8]| {
        let number = u64::from_le_bytes(record[..8].try_into().unwrap());
        records.push((number, SealTag(record[8..].try_into().unwrap())));
    };
    vault.replay(each).unwrap();
    assert!(records.windows(2).all(|two| two[1].0 == two[0].0 + 1));
    let last = records.last().map_or(0, |record| record.0);
    let first_alive = (last + 1).saturating_sub(ALIVE);
    for (number, tag) in records.iter().filter(|record| record.0 >= first_alive) {
        let mut out = vec![0; ROW_BYTES];
        vault.get(RowId(*number), tag, &mut out).unwrap();
        assert_eq!(out, key(*number));
    }
    for row in vault.rows().unwrap() {
        if row.0 < first_alive || row.0 > last {
            vault.erase(row);
        }
    }
    vault.commit().unwrap();
    (vault, last)
}

fn key(number: u64) -> Vec<u8> {
    let byte = |at: u64| (at + 7).wrapping_mul(number + 0x9E37).to_le_bytes()[1];
    (0..ROW_BYTES as u64).map(byte).collect()
}
