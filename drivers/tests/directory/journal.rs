//! Crashes between the settlement of a file and the moment when it is gone for good.

use std::process::{Command, Stdio};

use super::*;

/// The file comes back as it was, as if its removal had not reached the disk: the same inode.
#[tokio::test]
async fn a_settled_file_that_a_crash_brings_back_is_not_delivered_again() {
    for delete in [true, false] {
        let folder = Folder::new();
        let config = DirectoryConfig {
            delete,
            ..folder.config()
        };
        folder.put("c74ebf47", &good_file());
        fs::hard_link(folder.path("c74ebf47"), folder.path(".disk")).unwrap();
        let mut source = folder.open(config.clone()).await;
        let (block, _) = key(&mut *source).await;
        source.settle(&block.metadata.qkd_key_id, Settlement::Stored);
        drop(source);
        assert!(!folder.path("c74ebf47").exists());
        fs::hard_link(folder.path(".disk"), folder.path("c74ebf47")).unwrap();
        let mut source = folder.open(config).await;
        assert_quiet(&mut *source, Duration::from_millis(60)).await;
        assert!(!folder.path("c74ebf47").exists());
        // Another file of that name is another key.
        folder.put("c74ebf47", &good_file());
        key(&mut *source).await;
    }
}

#[tokio::test]
async fn a_note_that_was_cut_off_holds_nothing_and_hides_nothing() {
    let folder = Folder::new();
    folder.put("00000001", &file(1, BITS, &KEY));
    folder.put("00000002", &file(2, BITS, &KEY));
    fs::hard_link(folder.path("00000002"), folder.path(".disk")).unwrap();
    let mut source = folder.open(folder.config()).await;
    let first = key(&mut *source).await.0.metadata.qkd_key_id;
    source.settle(&first, Settlement::Stored);
    drop(source);
    let note = fs::read(folder.path(".ingested")).unwrap();
    let mut notes = fs::File::options();
    let notes = notes.append(true).open(folder.path(".ingested"));
    notes.unwrap().write_all(&note[..note.len() / 2]).unwrap();
    let mut source = folder.open(folder.config()).await;
    let second = key(&mut *source).await.0.metadata.qkd_key_id;
    assert_eq!(second.as_str(), "00000002");
    source.settle(&second, Settlement::Stored);
    drop(source);
    // The line after the one that was cut off counts.
    fs::rename(folder.path(".disk"), folder.path("00000002")).unwrap();
    let mut source = folder.open(folder.config()).await;
    assert_quiet(&mut *source, Duration::from_millis(60)).await;
    assert_eq!(folder.names("."), [".ingested"]);
}

#[tokio::test]
async fn the_note_stays_short() {
    let folder = Folder::new();
    let slow = DirectoryConfig {
        rescan_interval_ms: 3_600_000,
        ..folder.config()
    };
    let mut source = folder.open(slow).await;
    source.grant(3000);
    for epoch in 1..=1500 {
        folder.put(&format!("{epoch:08x}"), &file(epoch, BITS, &KEY));
        let id = key(&mut *source).await.0.metadata.qkd_key_id;
        source.settle(&id, Settlement::Stored);
    }
    let note = fs::read_to_string(folder.path(".ingested")).unwrap();
    assert!(note.lines().count() <= 1024);
}

const FOLDER: &str = "QKD_TEST_CRASH_FOLDER";

/// Not a test of its own: the process that the next one kills. Tells what it was given and settled.
#[tokio::test]
async fn the_process_that_is_killed() {
    let Ok(folder) = std::env::var(FOLDER) else {
        return;
    };
    let config = DirectoryConfig {
        rescan_interval_ms: 10,
        ..DirectoryConfig::new(Path::new(&folder).join("keys"))
    };
    let mut source = DriverConfig::Directory(config).open().unwrap();
    source.grant(1 << 20);
    let open = |name: &str| {
        let mut file = fs::File::options();
        let file = file.append(true).create(true);
        file.open(Path::new(&folder).join(name)).unwrap()
    };
    let (mut delivered, mut settled) = (open("delivered"), open("settled"));
    loop {
        if let (Event::Key(block), _) = event(&mut *source).await {
            let id = block.metadata.qkd_key_id;
            delivered.write_all(format!("{id}\n").as_bytes()).unwrap();
            source.settle(&id, Settlement::Stored);
            settled.write_all(format!("{id}\n").as_bytes()).unwrap();
        }
    }
}

#[test]
fn whatever_the_moment_of_a_kill_no_settled_file_is_delivered_again() {
    let folder = tempfile::tempdir_in(tmpfs()).unwrap();
    let keys = Folder::at(&folder.path().join("keys"));
    let lines = |name: &str| -> Vec<String> {
        let text = fs::read_to_string(folder.path().join(name)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    };
    let kills = std::env::var("QKD_KILLS").map_or(12, |text| text.parse().unwrap());
    let mut made = 0;
    for kill in 0..kills {
        for _ in 0..200 {
            made += 1;
            keys.put(&format!("{made:08x}"), &file(made, BITS, &KEY));
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["journal::the_process_that_is_killed", "--exact"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let before = lines("settled").len();
        let patience = std::time::Instant::now() + Duration::from_secs(20);
        while lines("settled").len() < before + 5 + kill % 7 {
            assert!(
                std::time::Instant::now() < patience,
                "nothing is settled any more"
            );
            std::thread::sleep(Duration::from_micros(500));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let mut settled = lines("settled");
    let settlements = settled.len();
    settled.sort();
    settled.dedup();
    assert_eq!(settled.len(), settlements, "no file is settled twice");
    // Twice come only those that were not settled when the process died: one at each kill.
    let mut delivered = lines("delivered");
    let deliveries = delivered.len();
    delivered.sort();
    delivered.dedup();
    assert!(deliveries - delivered.len() <= kills);
}
