//! The vault on a real disk, rows in LMDB.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;

use qkd_kma::vault::{
    GetError, KekError, KekSource, LmdbOptions, RowId, SealTag, SealedVault, Vault, VaultError,
    open_lmdb,
};
use tempfile::TempDir;
use zeroize::Zeroizing;

const ROW_BYTES: usize = 64 << 10;

fn kek(byte: u8) -> KekSource {
    KekSource::Raw(Zeroizing::new([byte; 32]))
}

fn open(dir: &Path) -> Result<SealedVault, VaultError> {
    let max_bytes = 64 << 20;
    open_lmdb(dir, &kek(1), LmdbOptions { max_bytes })
}

fn key(row: u64) -> Vec<u8> {
    let byte = |at: usize| (at as u64).wrapping_mul(row + 1).to_le_bytes()[1];
    (0..ROW_BYTES).map(byte).collect()
}

fn read(vault: &mut dyn Vault, row: u64, tag: &SealTag) -> Result<Vec<u8>, GetError> {
    let mut out = vec![0xEE; ROW_BYTES];
    let answer = vault.get(RowId(row), tag, &mut out);
    if answer.is_err() {
        assert!(out.iter().all(|byte| [0, 0xEE].contains(byte)), "no key");
    }
    answer.map(|()| out)
}

fn records(vault: &mut dyn Vault) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    let each = &mut |record: &[u8]| records.push(record.to_vec());
    vault.replay(each).unwrap();
    records
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn flip(path: &Path, offset: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[offset] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

/// A closed store of one row.
fn store_of_one() -> (TempDir, SealTag) {
    let dir = TempDir::new().unwrap();
    let mut vault = open(dir.path()).unwrap();
    vault.append(b"row 1");
    let tag = vault.put(RowId(1), &key(1)).unwrap();
    vault.commit().unwrap();
    (dir, tag)
}

#[test]
fn committed_rows_and_records_are_there_after_reopening() {
    let (dir, tag) = store_of_one();
    let mut vault = open(dir.path()).unwrap();
    assert_eq!(records(&mut vault), [b"row 1"]);
    assert_eq!(vault.rows().unwrap(), [RowId(1)]);
    assert_eq!(read(&mut vault, 1, &tag).unwrap(), key(1));
    assert!(matches!(
        vault.replay(&mut |_| ()),
        Err(VaultError::AlreadyReplayed)
    ));
}

#[test]
fn staged_rows_can_be_read_and_are_gone_after_reopening() {
    let (dir, _) = store_of_one();
    let mut vault = open(dir.path()).unwrap();
    vault.append(b"row 2");
    let tag = vault.put(RowId(2), &key(2)).unwrap();
    assert_eq!(read(&mut vault, 2, &tag).unwrap(), key(2));
    drop(vault);

    let mut vault = open(dir.path()).unwrap();
    assert_eq!(records(&mut vault), [b"row 1"]);
    assert_eq!(vault.rows().unwrap(), [RowId(1)]);
    assert!(matches!(
        read(&mut vault, 2, &tag),
        Err(GetError::Missing { .. })
    ));
}

#[test]
fn an_erased_row_cannot_be_read_from_an_older_copy_of_the_database() {
    let (dir, tag) = store_of_one();
    let copy = TempDir::new().unwrap();
    copy_tree(dir.path(), copy.path());

    let mut vault = open(dir.path()).unwrap();
    vault.erase(RowId(1));
    assert!(matches!(
        read(&mut vault, 1, &tag),
        Err(GetError::Missing { .. })
    ));
    vault.commit().unwrap();
    assert_eq!(vault.rows().unwrap(), []);
    drop(vault);

    // The copy with its own slots can be read, so it is the slots that decide.
    let both = TempDir::new().unwrap();
    copy_tree(copy.path(), both.path());
    let mut vault = open(both.path()).unwrap();
    assert_eq!(read(&mut vault, 1, &tag).unwrap(), key(1));
    drop(vault);

    fs::copy(dir.path().join("slots"), copy.path().join("slots")).unwrap();
    let mut vault = open(copy.path()).unwrap();
    assert!(matches!(
        read(&mut vault, 1, &tag),
        Err(GetError::DataKeyGone { .. })
    ));
}

#[test]
fn a_row_number_is_free_when_the_erasure_is_committed() {
    let (dir, old_tag) = store_of_one();
    let mut vault = open(dir.path()).unwrap();
    let taken = |answer| matches!(answer, Err(VaultError::RowExists { row: RowId(1) }));
    assert!(taken(vault.put(RowId(1), &key(1))));
    vault.erase(RowId(1));
    assert!(taken(vault.put(RowId(1), &key(1))));
    vault.commit().unwrap();
    let tag = vault.put(RowId(1), &key(2)).unwrap();
    vault.commit().unwrap();
    drop(vault);

    let mut vault = open(dir.path()).unwrap();
    assert_eq!(read(&mut vault, 1, &tag).unwrap(), key(2));
    let other = read(&mut vault, 1, &old_tag);
    assert!(matches!(other, Err(GetError::OtherRow { .. })));
}

#[test]
fn a_wrong_tag_or_length_delivers_nothing() {
    let (dir, tag) = store_of_one();
    let mut vault = open(dir.path()).unwrap();
    let other = SealTag(tag.0.map(|byte| byte ^ 1));
    assert!(matches!(
        read(&mut vault, 1, &other),
        Err(GetError::OtherRow { .. })
    ));
    let mut short = [0; 32];
    assert!(matches!(
        vault.get(RowId(1), &tag, &mut short),
        Err(GetError::Length {
            have_bytes: ROW_BYTES,
            asked_bytes: 32,
            ..
        })
    ));
    assert!(matches!(
        vault.put(RowId(2), &[]),
        Err(VaultError::RowLength { len_bytes: 0 })
    ));
}

#[test]
fn the_wrong_key_encryption_key_is_refused_and_the_right_one_still_opens() {
    let (dir, tag) = store_of_one();
    let options = LmdbOptions::default();
    let refused = open_lmdb(dir.path(), &kek(2), options);
    assert!(matches!(refused, Err(VaultError::WrongKek)));
    let mut vault = open(dir.path()).unwrap();
    assert_eq!(read(&mut vault, 1, &tag).unwrap(), key(1));
}

#[test]
fn a_flipped_byte_in_a_row_is_an_error() {
    let (dir, tag) = store_of_one();
    let data = dir.path().join("rows/data.mdb");
    let bytes = fs::read(&data).unwrap();
    // The tag that the database holds ends the row's ciphertext.
    let end = bytes.windows(16).rposition(|part| part == tag.0).unwrap();
    for offset in [end - ROW_BYTES - 5, end - ROW_BYTES, end - 1, end + 15] {
        flip(&data, offset);
        let mut vault = open(dir.path()).unwrap();
        assert!(matches!(
            read(&mut vault, 1, &tag),
            Err(GetError::Damaged { .. } | GetError::OtherRow { .. })
        ));
        drop(vault);
        flip(&data, offset);
    }
    let mut vault = open(dir.path()).unwrap();
    assert_eq!(read(&mut vault, 1, &tag).unwrap(), key(1));
}

#[test]
fn a_flipped_byte_in_the_slots_is_an_error() {
    for offset in (4096..4096 + 128).step_by(7) {
        let (dir, tag) = store_of_one();
        flip(&dir.path().join("slots"), offset);
        let mut vault = open(dir.path()).unwrap();
        assert!(matches!(
            read(&mut vault, 1, &tag),
            Err(GetError::DataKeyGone { .. })
        ));
        assert_eq!(vault.rows().unwrap(), [RowId(1)], "the caller can erase it");
    }
    for offset in 0..50 {
        let (dir, _) = store_of_one();
        flip(&dir.path().join("slots"), offset);
        assert!(open(dir.path()).is_err(), "byte {offset}");
    }
}

#[test]
fn a_flipped_byte_in_the_journal_is_an_error() {
    let (dir, _) = store_of_one();
    let mut vault = open(dir.path()).unwrap();
    vault.append(b"last");
    vault.commit().unwrap();
    drop(vault);
    let journal = dir.path().join("journal");
    let frames = 4096..4096 + (25 + 4 + 5) + (25 + 4 + 4);
    for offset in (0..36).chain(frames) {
        flip(&journal, offset);
        assert!(
            matches!(
                open(dir.path()),
                Err(VaultError::JournalDamaged { .. }
                    | VaultError::Header { .. }
                    | VaultError::NewerVersion { .. }
                    | VaultError::OtherKind { .. })
            ),
            "byte {offset}"
        );
        flip(&journal, offset);
    }
    assert_eq!(records(&mut open(dir.path()).unwrap()).len(), 2);
}

#[test]
fn a_missing_or_foreign_file_is_an_error() {
    let (dir, _) = store_of_one();
    let (other, _) = store_of_one();
    for file in ["journal", "slots"] {
        let path = dir.path().join(file);
        let kept = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(matches!(
            open(dir.path()),
            Err(VaultError::Missing { file: missing }) if missing == file
        ));
        fs::copy(other.path().join(file), &path).unwrap();
        assert!(matches!(
            open(dir.path()),
            Err(VaultError::OtherStore { .. })
        ));
        fs::write(&path, kept).unwrap();
    }
    open(dir.path()).unwrap();
}

#[test]
fn a_lost_database_makes_every_row_missing() {
    let (dir, tag) = store_of_one();
    fs::remove_dir_all(dir.path().join("rows")).unwrap();
    let mut vault = open(dir.path()).unwrap();
    assert!(matches!(
        read(&mut vault, 1, &tag),
        Err(GetError::Missing { .. })
    ));
    assert_eq!(vault.rows().unwrap(), [RowId(1)], "its slot is left");
    vault.erase(RowId(1));
    vault.commit().unwrap();
    assert_eq!(vault.rows().unwrap(), []);
}

#[test]
fn a_second_opener_is_refused_by_name_of_the_directory() {
    let (dir, _) = store_of_one();
    let vault = open(dir.path()).unwrap();
    let error = open(dir.path()).unwrap_err();
    assert!(matches!(error, VaultError::InUse { .. }));
    assert!(error.to_string().contains(dir.path().to_str().unwrap()));
    drop(vault);
    open(dir.path()).unwrap();
}

#[test]
fn a_store_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let parent = TempDir::new().unwrap();
    let dir = parent.path().join("deep/store");
    drop(open(&dir).unwrap());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join("rows")), 0o700);
    for file in ["journal", "slots", "rows/data.mdb"] {
        assert_eq!(mode(&dir.join(file)), 0o600, "{file}");
    }
}

#[test]
fn a_full_database_refuses_a_row_and_takes_it_when_others_are_erased() {
    let dir = TempDir::new().unwrap();
    let max_bytes = 4 << 20;
    let mut vault = open_lmdb(dir.path(), &kek(1), LmdbOptions { max_bytes }).unwrap();
    let mut next = 0;
    let mut tags = Vec::new();
    for _ in 0..4 {
        let full = loop {
            match vault.put(RowId(next), &key(next)) {
                Ok(tag) => tags.push((next, tag)),
                Err(error) => break error,
            }
            next += 1;
            if next % 5 == 0 {
                vault.commit().unwrap();
            }
        };
        assert!(matches!(
            full,
            VaultError::Full {
                max_bytes: 4_194_304
            }
        ));
        vault.commit().unwrap();
        for (row, tag) in tags.drain(..) {
            assert_eq!(read(&mut vault, row, &tag).unwrap(), key(row));
            vault.erase(RowId(row));
        }
        vault.commit().unwrap();
    }
    assert!(
        next > 4 * 40,
        "{next} rows of 64 KiB in four rounds of 4 MiB"
    );
}

#[test]
fn a_key_file_is_made_once_and_must_be_private() {
    use std::os::unix::fs::PermissionsExt;
    let parent = TempDir::new().unwrap();
    let (dir, path) = (parent.path().join("store"), parent.path().join("kek"));
    let source = |create| KekSource::File {
        path: path.clone(),
        create,
    };
    let open = |create| open_lmdb(&dir, &source(create), LmdbOptions::default());
    let absent = open(false);
    assert!(matches!(absent, Err(VaultError::Kek(KekError::Io { .. }))));
    drop(open(true).unwrap());
    let made = fs::read(&path).unwrap();
    assert_eq!(made.len(), 32);
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o400);
    drop(open(true).unwrap());
    assert_eq!(fs::read(&path).unwrap(), made);

    for mode in [0o640, 0o404, 0o700] {
        fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        let shown = open(false);
        assert!(matches!(shown, Err(VaultError::Kek(KekError::Mode { .. }))));
    }
    // A store without its key gets no new one, which could open nothing.
    fs::remove_file(&path).unwrap();
    let lost = open(true);
    assert!(matches!(lost, Err(VaultError::Kek(KekError::Io { .. }))));
    assert!(!path.exists());
}

#[test]
fn a_credential_is_a_private_file_of_32_bytes_in_its_directory() {
    use std::os::unix::fs::PermissionsExt;
    let parent = TempDir::new().unwrap();
    let directory = parent.path().join("credentials");
    fs::create_dir(&directory).unwrap();
    let open = |name: &str| {
        let (directory, name) = (directory.clone(), name.to_owned());
        let source = KekSource::Credential { directory, name };
        let dir = parent.path().join("store");
        open_lmdb(&dir, &source, LmdbOptions::default()).map(drop)
    };
    let write = |name: &str, len: usize, mode: u32| {
        let path = directory.join(name);
        fs::write(&path, vec![7; len]).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    };
    write("kek", 32, 0o440);
    write("open", 32, 0o444);
    write("short", 31, 0o400);
    open("kek").unwrap();
    let refused = |name| match open(name) {
        Err(VaultError::Kek(error)) => error,
        other => panic!("{name}: {other:?}"),
    };
    assert!(matches!(
        refused("open"),
        KekError::Mode { mode: 0o444, .. }
    ));
    assert!(matches!(refused("short"), KekError::Length { .. }));
    assert!(matches!(refused("../kek"), KekError::Name { .. }));
    assert!(matches!(refused(""), KekError::Name { .. }));
    assert!(matches!(refused("absent"), KekError::Io { .. }));
}

#[test]
fn nothing_prints_a_key_encryption_key() {
    assert_eq!(format!("{:?}", kek(9)), "Raw(32 bytes)");
}
