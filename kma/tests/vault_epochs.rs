//! Epochs of the key-encryption key: what is live stays readable, what came before is destroyed.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use qkd_kma::vault::{
    GetError, KekError, KekKind, KekSource, RowId, SealTag, SealedVault, Vault, VaultError,
    sim::{Fault, SimDisk},
};
use zeroize::Zeroizing;

fn raw(byte: u8) -> KekSource {
    KekSource::Raw(Zeroizing::new([byte; 32]))
}

fn phrase(text: &str) -> KekSource {
    KekSource::PassPhrase(Zeroizing::new(text.as_bytes().to_vec()))
}

/// Rows 0 to 9, of which 3 and 4 were erased.
fn filled(disk: &SimDisk, kek: &KekSource) -> (SealedVault, Vec<SealTag>) {
    let mut vault = disk.open_sealed_under(kek).unwrap();
    let tags = (0..10_u8).map(|row| vault.put(RowId(row.into()), &[row; 40]).unwrap());
    let tags: Vec<SealTag> = tags.collect();
    vault.append(b"rows");
    vault.commit().unwrap();
    vault.erase(RowId(3));
    vault.erase(RowId(4));
    vault.commit().unwrap();
    (vault, tags)
}

fn check_rows(vault: &mut SealedVault, tags: &[SealTag]) {
    for (row, tag) in (0..10_u8).zip(tags) {
        let mut out = [0xEE; 40];
        let got = vault.get(RowId(row.into()), tag, &mut out);
        if row == 3 || row == 4 {
            assert!(matches!(
                got,
                Err(GetError::Missing { .. } | GetError::DataKeyGone { .. })
            ));
        } else {
            got.unwrap();
            assert_eq!(out, [row; 40]);
        }
    }
}

#[test]
fn a_new_epoch_wraps_live_data_keys_anew_and_destroys_the_old() {
    let disk = SimDisk::new(1);
    let (mut vault, tags) = filled(&disk, &raw(1));
    let before = disk.read("slots").unwrap();
    for epoch in 1..=3 {
        vault.rotate_epoch().unwrap();
        assert_eq!(vault.epoch(), (epoch, KekKind::Key));
        check_rows(&mut vault, &tags);
    }
    assert!(disk.read("slots.old").is_none() && disk.read("slots.new").is_none());
    let after = disk.read("slots").unwrap();
    let wrapped = |image: &[u8]| -> Vec<Vec<u8>> {
        let slots = image[4096..].chunks(128);
        slots.map(|slot| slot[12..72].to_vec()).collect()
    };
    let old = wrapped(&before);
    assert!(wrapped(&after).iter().all(|slot| !old.contains(slot)));
    // Rows go on being put and erased in the new epoch, and over a restart.
    let tag = vault.put(RowId(20), &[7; 9]).unwrap();
    vault.append(b"more");
    vault.commit().unwrap();
    drop(vault);
    let mut vault = disk.open_sealed_under(&raw(1)).unwrap();
    assert_eq!(vault.epoch().0, 3);
    check_rows(&mut vault, &tags);
    vault.get(RowId(20), &tag, &mut [0; 9]).unwrap();
}

#[test]
fn a_fault_anywhere_in_a_rotation_leaves_one_epoch_whole_and_nothing_of_the_other() {
    for fault in [Fault::PowerCut, Fault::Io, Fault::NoSpace] {
        let mut finished = false;
        for after in 1.. {
            let disk = SimDisk::new(after);
            let (mut vault, tags) = filled(&disk, &raw(1));
            disk.fail_at(disk.operations() + after, fault);
            let outcome = vault.rotate_epoch();
            if outcome.as_ref().is_err_and(|error| !error.is_final()) && fault != Fault::PowerCut {
                // The vault goes on, in one epoch or the other.
                check_rows(&mut vault, &tags);
                vault.put(RowId(30), b"goes on").unwrap();
                vault.commit().unwrap();
            }
            drop(vault);
            disk.restart();
            let mut vault = disk.open_sealed_under(&raw(1)).unwrap();
            check_rows(&mut vault, &tags);
            assert!(vault.epoch().0 <= 1, "{fault:?} at operation {after}");
            assert!(disk.read("slots.old").is_none() && disk.read("slots.new").is_none());
            if outcome.is_ok() && fault != Fault::NoSpace || after > 60 {
                assert!(after > 8, "a rotation has more operations");
                finished = true;
                break;
            }
        }
        assert!(finished);
    }
}

#[test]
fn a_store_under_a_pass_phrase_opens_with_it_alone() {
    let disk = SimDisk::new(2);
    let (mut vault, tags) = filled(&disk, &phrase("correct horse"));
    assert!(matches!(vault.epoch().1, KekKind::PassPhrase(kdf) if kdf.memory_kib == 64 << 10));
    check_rows(&mut vault, &tags);
    drop(vault);
    let refused = |kek: &KekSource| disk.open_sealed_under(kek).err().unwrap();
    assert!(matches!(
        refused(&phrase("correct hors")),
        VaultError::WrongKek
    ));
    assert!(matches!(
        refused(&raw(1)),
        VaultError::Kek(KekError::Kind { pass_phrase: true })
    ));
    assert!(matches!(
        refused(&phrase("")),
        VaultError::Kek(KekError::Empty)
    ));
    let mut vault = disk.open_sealed_under(&phrase("correct horse")).unwrap();
    check_rows(&mut vault, &tags);
}

#[test]
fn another_key_encryption_key_takes_over_and_the_old_one_opens_nothing() {
    let disk = SimDisk::new(3);
    let (mut vault, tags) = filled(&disk, &raw(1));
    vault.rekey(&phrase("new")).unwrap();
    check_rows(&mut vault, &tags);
    vault.rotate_epoch().unwrap();
    check_rows(&mut vault, &tags);
    drop(vault);
    let error = disk.open_sealed_under(&raw(1)).err().unwrap();
    assert_eq!(
        error.to_string(),
        "the store's key-encryption key is a pass-phrase, and a key is given"
    );
    let mut vault = disk.open_sealed_under(&phrase("new")).unwrap();
    check_rows(&mut vault, &tags);
    vault.rekey(&raw(2)).unwrap();
    drop(vault);
    let error = disk.open_sealed_under(&raw(1)).err().unwrap();
    assert!(matches!(error, VaultError::WrongKek));
    check_rows(&mut disk.open_sealed_under(&raw(2)).unwrap(), &tags);
}

#[test]
fn a_slot_file_of_a_newer_version_is_refused_with_the_way_out() {
    let disk = SimDisk::new(4);
    drop(filled(&disk, &raw(1)));
    disk.damage("slots", 8, 2 ^ 3);
    let error = disk.open_sealed_under(&raw(1)).err().unwrap();
    assert_eq!(
        error.to_string(),
        "a newer version of this program wrote the store's slots (format 3; this one knows formats \
         up to 2): run that version"
    );
}
