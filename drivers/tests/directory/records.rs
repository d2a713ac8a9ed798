//! Files of many keys that grow: appended, cut, written anew, renamed, and read by a bridge that
//! restarts.

use std::{ops::RangeInclusive, os::unix::fs::FileExt};

use qkd_drivers::directory::Format;
use qkd_handover::{hex_lines, r10, uuid_record::qkd_key_id};

use super::*;

fn record(number: u8) -> [u8; 48] {
    let mut record = [number; 48];
    record[..16].fill(0x40 + number);
    record
}

fn id(number: u8) -> String {
    qkd_key_id(&[0x40 + number; 16]).as_str().to_owned()
}

fn records(numbers: RangeInclusive<u8>) -> Vec<u8> {
    numbers.flat_map(record).collect()
}

fn uuid_records(folder: &Folder) -> DirectoryConfig {
    DirectoryConfig {
        format: Format::UuidRecords,
        file: Some("keys.bin".to_owned()),
        ..folder.config()
    }
}

fn append(folder: &Folder, name: &str, bytes: &[u8]) {
    let mut file = fs::File::options();
    let file = file.append(true).create(true).open(folder.path(name));
    file.unwrap().write_all(bytes).unwrap();
}

/// Takes these records, in this order, and settles them.
async fn take(source: &mut dyn KeySource, numbers: RangeInclusive<u8>) {
    for number in numbers {
        let (block, bytes) = key(source).await;
        assert_eq!(block.metadata.qkd_key_id.as_str(), id(number));
        assert_eq!((block.key_bits, bytes), (256, vec![number; 32]));
        source.settle(&block.metadata.qkd_key_id, Settlement::Stored);
    }
}

async fn nothing_more(source: &mut dyn KeySource) {
    assert_quiet(source, Duration::from_millis(80)).await;
}

async fn is_told_replaced(source: &mut dyn KeySource) {
    let Event::Alarm(Alarm { code, .. }) = event(source).await.0 else {
        panic!("an alarm was expected");
    };
    let file = "keys.bin".to_owned();
    assert_eq!(code, AlarmCode::FileReplaced { file });
}

#[tokio::test]
async fn five_records_and_five_more_come_once_each_over_restarts() {
    let folder = Folder::new();
    append(&folder, "keys.bin", &records(1..=5));
    let mut source = folder.open(uuid_records(&folder)).await;
    take(&mut *source, 1..=5).await;
    nothing_more(&mut *source).await;
    append(&folder, "keys.bin", &records(6..=8));
    take(&mut *source, 6..=8).await;
    drop(source);
    append(&folder, "keys.bin", &records(9..=10));
    let mut source = folder.open(uuid_records(&folder)).await;
    take(&mut *source, 9..=10).await;
    nothing_more(&mut *source).await;
    assert!(folder.path("keys.bin").exists(), "the writer's file stays");
}

#[tokio::test]
async fn a_partial_record_at_the_end_waits_for_its_rest() {
    let folder = Folder::new();
    let slow = DirectoryConfig {
        rescan_interval_ms: 3_600_000,
        ..uuid_records(&folder)
    };
    let mut source = folder.open(slow).await;
    let path = folder.path("keys.bin");
    let writer = std::thread::spawn(move || {
        // Held open all the while, as by its real writer: nothing is ever closed.
        let mut file = fs::File::create(path).unwrap();
        for byte in records(1..=3) {
            file.write_all(&[byte]).unwrap();
            std::thread::sleep(Duration::from_micros(200));
        }
        file
    });
    take(&mut *source, 1..=3).await;
    let mut file = writer.join().unwrap();
    file.write_all(&records(4..=4)[..47]).unwrap();
    nothing_more(&mut *source).await;
    file.write_all(&records(4..=4)[47..]).unwrap();
    take(&mut *source, 4..=4).await;
}

#[tokio::test]
async fn what_was_not_settled_comes_again_after_a_restart_and_nothing_else() {
    let folder = Folder::new();
    append(&folder, "keys.bin", &records(1..=4));
    let mut source = folder.open(uuid_records(&folder)).await;
    let mut ids = Vec::new();
    for _ in 1..=4 {
        ids.push(key(&mut *source).await.0.metadata.qkd_key_id);
    }
    source.settle(&ids[0], Settlement::Stored);
    source.settle(&ids[1], Settlement::Dropped);
    drop(source);
    let mut source = folder.open(uuid_records(&folder)).await;
    take(&mut *source, 3..=4).await;
    nothing_more(&mut *source).await;
}

#[tokio::test]
async fn a_file_that_was_cut_and_written_anew_gives_its_new_records_only() {
    let folder = Folder::new();
    append(&folder, "keys.bin", &records(1..=5));
    let mut source = folder.open(uuid_records(&folder)).await;
    take(&mut *source, 1..=5).await;
    // The same inode, shorter, with an old record among the new ones.
    fs::write(folder.path("keys.bin"), records(5..=7)).unwrap();
    is_told_replaced(&mut *source).await;
    take(&mut *source, 6..=7).await;
    nothing_more(&mut *source).await;
}

#[tokio::test]
async fn a_file_that_was_written_anew_to_the_same_length_is_noticed_after_a_restart() {
    let folder = Folder::new();
    append(&folder, "keys.bin", &records(1..=3));
    let mut source = folder.open(uuid_records(&folder)).await;
    take(&mut *source, 1..=3).await;
    drop(source);
    fs::write(folder.path("keys.bin"), records(11..=13)).unwrap();
    let mut source = folder.open(uuid_records(&folder)).await;
    is_told_replaced(&mut *source).await;
    take(&mut *source, 11..=13).await;
}

#[tokio::test]
async fn a_rotated_file_is_read_to_its_end_before_the_next_and_then_goes() {
    for delete in [true, false] {
        let folder = Folder::new();
        let config = DirectoryConfig {
            delete,
            ..uuid_records(&folder)
        };
        append(&folder, "keys.bin", &records(1..=3));
        let mut source = folder.open(config.clone()).await;
        take(&mut *source, 1..=2).await;
        append(&folder, "keys.bin", &records(4..=5));
        fs::rename(folder.path("keys.bin"), folder.path("keys.bin.1")).unwrap();
        append(&folder, "keys.bin", &records(6..=7));
        take(&mut *source, 3..=7).await;
        let patience = std::time::Instant::now() + Duration::from_secs(20);
        while folder.path("keys.bin.1").exists() {
            assert!(std::time::Instant::now() < patience);
            nothing_more(&mut *source).await;
        }
        assert_eq!(folder.names("done").len(), usize::from(!delete));
        drop(source);
        append(&folder, "keys.bin", &records(8..=8));
        let mut source = folder.open(config).await;
        take(&mut *source, 8..=8).await;
    }
}

#[tokio::test]
async fn a_file_that_rotated_while_the_bridge_was_away_is_known_by_its_inode() {
    let folder = Folder::new();
    append(&folder, "keys.bin", &records(1..=3));
    let mut source = folder.open(uuid_records(&folder)).await;
    take(&mut *source, 1..=3).await;
    drop(source);
    append(&folder, "keys.bin", &records(4..=4));
    let rotated = folder.path("keys.bin-20261121");
    fs::rename(folder.path("keys.bin"), rotated).unwrap();
    append(&folder, "keys.bin", &records(5..=6));
    let mut source = folder.open(uuid_records(&folder)).await;
    take(&mut *source, 4..=6).await;
    nothing_more(&mut *source).await;
}

#[tokio::test]
async fn a_hole_in_a_file_is_a_record_to_come() {
    let folder = Folder::new();
    append(&folder, "keys.bin", &[&record(1)[..], &[0; 96]].concat());
    let mut source = folder.open(uuid_records(&folder)).await;
    take(&mut *source, 1..=1).await;
    nothing_more(&mut *source).await;
    let mut file = fs::File::options();
    let file = file.write(true).open(folder.path("keys.bin"));
    file.unwrap().write_all_at(&record(2), 48).unwrap();
    take(&mut *source, 2..=2).await;
}

#[tokio::test]
async fn links_and_files_that_others_can_write_to_are_not_read() {
    let folder = Folder::new();
    let outside = Folder::new();
    outside.put("secret", &records(1..=2));
    symlink(outside.path("secret"), folder.path("keys.bin")).unwrap();
    folder.put("keys.bin.1", &records(3..=3));
    let loose = fs::Permissions::from_mode(0o622);
    fs::set_permissions(folder.path("keys.bin.1"), loose).unwrap();
    let mut source = folder.open(uuid_records(&folder)).await;
    let mut reasons = [corrupt(&mut *source).await.1, corrupt(&mut *source).await.1];
    reasons.sort_by_key(|reason| *reason == CorruptReason::NotRegular);
    let loose = CorruptReason::Mode { mode: 0o622 };
    assert_eq!(reasons, [loose, CorruptReason::NotRegular]);
    nothing_more(&mut *source).await;
    assert_eq!(folder.names("quarantine").len(), 2);
}

#[tokio::test]
async fn the_note_of_places_holds_ids_and_no_key() {
    let folder = Folder::new();
    append(&folder, "keys.bin", &records(1..=2));
    let mut source = folder.open(uuid_records(&folder)).await;
    take(&mut *source, 1..=2).await;
    drop(source);
    let note = fs::read_to_string(folder.path(".positions")).unwrap();
    assert!(note.ends_with(&format!(" 96 48 0 {}\n", id(2))), "{note}");
}

fn line(number: u8) -> Vec<u8> {
    let mut line = vec![0; 65];
    hex_lines::encode(&[number; 32], &mut line).unwrap();
    line
}

fn hex(folder: &Folder) -> DirectoryConfig {
    DirectoryConfig {
        format: Format::HexLines,
        file: Some("bob".to_owned()),
        block_keys: 4,
        ..folder.config()
    }
}

#[tokio::test]
async fn a_line_is_a_key_by_its_number_in_all_files() {
    let folder = Folder::new();
    append(&folder, "bob_1", &[line(4), line(5)].concat());
    append(&folder, "bob_0", &(0..4).flat_map(line).collect::<Vec<_>>());
    append(&folder, "carol_0", &line(9));
    let mut source = folder.open(hex(&folder)).await;
    for number in 0..6 {
        let (block, bytes) = key(&mut *source).await;
        let id = block.metadata.qkd_key_id;
        assert_eq!(id.as_str(), number.to_string());
        assert_eq!(bytes, [number; 32]);
        source.settle(&id, Settlement::Stored);
    }
    nothing_more(&mut *source).await;
    // The full file is gone, the one that grows is not.
    assert_eq!(folder.names("."), [".positions", "bob_1", "carol_0"]);
    append(&folder, "bob_1", &[b"zz\n".to_vec(), line(7)].concat());
    let (id, reason) = corrupt(&mut *source).await;
    assert_eq!(id.as_deref(), Some("6"));
    assert!(matches!(reason, CorruptReason::HexLine { line: 2, .. }));
    let last = key(&mut *source).await.0.metadata.qkd_key_id;
    assert_eq!(last.as_str(), "7");
}

#[tokio::test]
async fn lines_are_not_repeated_after_a_restart_in_the_middle_of_a_file() {
    let folder = Folder::new();
    append(&folder, "bob_3", &[line(1), line(2), line(3)].concat());
    let mut source = folder.open(hex(&folder)).await;
    for _ in 0..2 {
        let id = key(&mut *source).await.0.metadata.qkd_key_id;
        source.settle(&id, Settlement::Stored);
    }
    drop(source);
    let mut source = folder.open(hex(&folder)).await;
    let third = key(&mut *source).await.0.metadata.qkd_key_id;
    assert_eq!(third.as_str(), "14");
    nothing_more(&mut *source).await;
}

fn r10_record(id: u32, state: r10::State, key: &[u8]) -> Vec<u8> {
    let header = r10::Header {
        id,
        state,
        disclosed_bits: 3,
        error_rate: 0.03125,
        incoming_bytes: 2,
        outgoing_bytes: 0,
        key_bytes: key.len(),
    };
    let mut record = r10::encode_header(&header, "in", "").unwrap();
    let at = record.len();
    record.resize(at + key.len(), 0);
    r10::encode_key(key, &mut record[at..]).unwrap();
    record
}

fn r10_config(folder: &Folder) -> DirectoryConfig {
    DirectoryConfig {
        format: Format::R10,
        file: Some("pipeline".to_owned()),
        ..folder.config()
    }
}

#[tokio::test]
async fn only_final_r10_keys_are_delivered_with_their_error_rate_and_bit_order() {
    use r10::State::{Amplified, Authenticated, Sifted};
    let folder = Folder::new();
    append(&folder, "pipeline", &r10_record(1, Amplified, &[0xa5, 1]));
    append(&folder, "pipeline", &r10_record(2, Sifted, &[7; 40]));
    append(&folder, "pipeline", &r10_record(3, Authenticated, &[9; 40]));
    let stored = fs::read(folder.path("pipeline")).unwrap();
    assert_eq!(stored[47..49], [0xa5, 0x80], "lowest bit first");
    let mut source = folder.open(r10_config(&folder)).await;
    let (block, bytes) = key(&mut *source).await;
    assert_eq!(block.metadata.qkd_key_id.as_str(), "1");
    assert_eq!((block.qber_ppm, bytes), (Some(31_250), vec![0xa5, 1]));
    let (id, reason) = corrupt(&mut *source).await;
    assert_eq!(id.as_deref(), Some("2"));
    assert_eq!(reason, CorruptReason::R10State { state: Sifted });
    assert_eq!(key(&mut *source).await.1, [9; 40]);
}

#[tokio::test]
async fn an_r10_record_of_2_to_the_63_bytes_ends_its_file_and_takes_no_memory() {
    let folder = Folder::new();
    let mut huge = r10_record(2, r10::State::Amplified, &[]);
    let at = huge.len() - 8;
    huge[at..].copy_from_slice(&(1_u64 << 63).to_be_bytes());
    append(
        &folder,
        "pipeline.1",
        &[r10_record(1, r10::State::Amplified, &[1; 32]), huge].concat(),
    );
    let next = r10_record(3, r10::State::Amplified, &[3; 32]);
    append(&folder, "pipeline", &next);
    let mut source = folder.open(r10_config(&folder)).await;
    assert_eq!(key(&mut *source).await.1, [1; 32]);
    let (_, reason) = corrupt(&mut *source).await;
    assert!(matches!(
        reason,
        CorruptReason::R10(r10::R10Error::TooLong { have_bytes, .. }) if have_bytes == 1 << 63
    ));
    assert_eq!(folder.names("quarantine"), ["pipeline.1"]);
    assert_eq!(key(&mut *source).await.1, [3; 32]);
}

#[tokio::test]
async fn an_idle_reader_of_records_sleeps() {
    let folder = Folder::new();
    append(&folder, "keys.bin", &record(1)[..40]);
    let config = DirectoryConfig {
        rescan_interval_ms: 50,
        ..uuid_records(&folder)
    };
    let mut source = folder.open(config).await;
    let wakes = wakes_while_idle(&mut *source, Duration::from_millis(500)).await;
    assert!((3..=12).contains(&wakes), "woken {wakes} times in 10 scans");
}

#[tokio::test]
async fn records_without_the_name_of_a_file_are_refused_at_start() {
    let folder = Folder::new();
    for file in [None, Some(""), Some(".hidden"), Some("../keys")] {
        let config = DirectoryConfig {
            file: file.map(str::to_owned),
            ..uuid_records(&folder)
        };
        let error = DriverConfig::Directory(config).open().err().unwrap();
        assert!(error.to_string().contains("give `file`"), "{error}");
    }
}
