//! The journal: what is damage, what is a torn tail, and what a compaction leaves.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use proptest::prelude::*;
use qkd_kma::vault::sim::SimDisk;
use qkd_kma::vault::{MAX_RECORD_BYTES, SealedVault, Vault, VaultError, read_journal};

const HEADER_BYTES: usize = 4096;
/// What a commit of one record adds to it.
const FRAME_BYTES: usize = 29;

/// A store with one commit per record.
fn store_of(records: &[Vec<u8>]) -> SimDisk {
    let disk = SimDisk::new(1);
    let mut vault = disk.open_sealed().unwrap();
    for record in records {
        vault.append(record);
        vault.commit().unwrap();
    }
    disk
}

fn notes(lens: &[usize]) -> Vec<Vec<u8>> {
    let note = |(n, len): (usize, &usize)| vec![u8::try_from(n + 1).unwrap(); *len];
    lens.iter().enumerate().map(note).collect()
}

fn replayed(vault: &mut SealedVault) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    let each = &mut |record: &[u8]| records.push(record.to_vec());
    vault.replay(each).unwrap();
    records
}

fn read(image: &[u8]) -> Result<Vec<Vec<u8>>, VaultError> {
    let mut records = Vec::new();
    read_journal(image, &mut |record| records.push(record.to_vec()))?;
    Ok(records)
}

#[test]
fn a_flipped_byte_anywhere_is_an_error() {
    let records = notes(&[1, 600, 0, 1100, 2]);
    let disk = store_of(&records);
    let frames: usize = records
        .iter()
        .map(|record| record.len() + FRAME_BYTES)
        .sum();
    for offset in HEADER_BYTES..HEADER_BYTES + frames {
        disk.damage("journal", offset, 0x20);
        let opened = disk.open_sealed();
        assert!(
            matches!(opened, Err(VaultError::JournalDamaged { offset: at }) if at <= offset as u64),
            "byte {offset}"
        );
        disk.damage("journal", offset, 0x20);
    }
    assert_eq!(replayed(&mut disk.open_sealed().unwrap()), records);
}

#[test]
fn a_lost_sector_is_damage_wherever_a_later_commit_exists() {
    let records = notes(&[1000; 4]);
    let disk = store_of(&records);
    let whole = disk.read("journal").unwrap();
    let last = HEADER_BYTES + 3 * (1000 + FRAME_BYTES);
    for sector in (HEADER_BYTES..last).step_by(512) {
        let lost = sector..(sector + 512).min(last);
        let swap = |at: usize| disk.damage("journal", at, whole[at]);
        lost.clone().for_each(swap);
        let opened = disk.open_sealed();
        assert!(matches!(opened, Err(VaultError::JournalDamaged { .. })));
        lost.for_each(swap);
    }
    assert_eq!(replayed(&mut disk.open_sealed().unwrap()), records);
}

#[test]
fn a_last_commit_that_lacks_sectors_is_cut_off() {
    let records = notes(&[700, 1800]);
    let disk = store_of(&records);
    let whole = disk.read("journal").unwrap();
    let start = HEADER_BYTES + 700 + FRAME_BYTES;
    let end = start + 1800 + FRAME_BYTES;
    let first = start.next_multiple_of(512);
    for at in std::iter::once(start).chain((first..end).step_by(512)) {
        let mut image = whole.clone();
        let until = (at + 1).next_multiple_of(512).min(end);
        image[at..until].fill(0);
        assert_eq!(read(&image).unwrap(), records[..1]);
        assert_eq!(read(&whole[..at]).unwrap(), records[..1]);
    }
    assert_eq!(read(&whole).unwrap(), records);
}

#[test]
fn a_record_that_is_too_long_is_never_left_out_in_silence() {
    let mut vault = SimDisk::new(1).open_sealed().unwrap();
    vault.append(&vec![1; MAX_RECORD_BYTES]);
    vault.commit().unwrap();
    vault.append(&vec![1; MAX_RECORD_BYTES + 1]);
    vault.append(b"and another");
    assert!(matches!(vault.commit(), Err(VaultError::TooLong { .. })));
    assert!(matches!(vault.commit(), Err(VaultError::Poisoned)));
}

#[test]
fn a_journal_of_a_newer_version_is_refused_by_number() {
    let disk = store_of(&[]);
    disk.damage("journal", 8, 1 ^ 9);
    let error = disk.open_sealed().unwrap_err();
    assert_eq!(
        error.to_string(),
        "a newer version of this program wrote the store's journal (format 9; this one knows formats up to 1): run that version"
    );
}

#[test]
fn the_incarnation_outlives_compaction_and_differs_between_stores() {
    let disk = SimDisk::new(1);
    let mut vault = disk.open_sealed().unwrap();
    let incarnation = vault.incarnation();
    vault.compact(&mut [b"all".to_vec()].into_iter()).unwrap();
    drop(vault);
    assert_eq!(disk.open_sealed().unwrap().incarnation(), incarnation);
    let other = SimDisk::new(1).open_sealed().unwrap();
    assert_ne!(other.incarnation(), incarnation);
}

#[test]
fn compaction_makes_the_journal_short_and_commits_follow_it() {
    let disk = store_of(&notes(&[1000; 100]));
    let mut vault = disk.open_sealed().unwrap();
    vault.append(b"staged");
    assert!(vault.journal_bytes() > 100_000);
    // More than one frame's worth.
    let mut snapshot = notes(&[MAX_RECORD_BYTES / 2; 5]);
    vault.compact(&mut snapshot.iter().cloned()).unwrap();
    assert!(vault.journal_bytes() < 3 << 20);
    vault.compact(&mut snapshot[..1].iter().cloned()).unwrap();
    assert!(vault.journal_bytes() < 1 << 20);
    vault.append(b"after");
    vault.commit().unwrap();
    disk.restart();
    snapshot.truncate(1);
    snapshot.push(b"after".to_vec());
    assert_eq!(replayed(&mut disk.open_sealed().unwrap()), snapshot);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever stands in the file: an error, or a beginning of what was written.
    #[test]
    fn any_file_gives_an_error_or_a_beginning(
        cut in 0_usize..12_000,
        offset in 0_usize..12_000,
        noise in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let records = notes(&[30, 900, 2, 2000, 77, 1500]);
        let mut image = store_of(&records).read("journal").unwrap();
        image.truncate(12_000);
        for (at, byte) in (offset..image.len()).zip(noise) {
            image[at] = byte;
        }
        image.truncate(cut);
        if let Ok(found) = read(&image) {
            prop_assert!(records.starts_with(&found));
        }
    }
}
