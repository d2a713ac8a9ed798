//! When files are delivered, and in which order.

use super::*;

#[tokio::test]
async fn a_file_becomes_a_key_block_with_its_metadata() {
    let folder = Folder::new();
    folder.put("c74ebf47", &good_file());
    let mut source = folder
        .open(DirectoryConfig {
            module: Some("tx-1".parse().unwrap()),
            matching_module: Some("rx-1".parse().unwrap()),
            ..folder.config()
        })
        .await;
    let (block, bytes) = key(&mut *source).await;
    assert_eq!((block.key_bits, &bytes[..]), (BITS, &KEY[..]));
    let metadata = block.metadata;
    assert_eq!(metadata.qkd_key_id.as_str(), "c74ebf47");
    assert_eq!(metadata.key_bits, Some(BITS));
    assert_eq!(metadata.module.unwrap().as_str(), "tx-1");
    assert_eq!(metadata.matching_module.unwrap().as_str(), "rx-1");
    // 2026-11-20T19:35:21Z
    assert_eq!(
        metadata.generated_at.unwrap().0 / 1_000_000_000,
        1_795_203_321
    );
    assert_eq!(metadata.hash, None);
}

#[tokio::test]
async fn no_key_without_credit_and_none_twice() {
    let folder = Folder::new();
    let mut source = DriverConfig::Directory(folder.config()).open().unwrap();
    assert_eq!(event(&mut *source).await.0, folder.attached(None));
    for epoch in 1..=3 {
        folder.put(&format!("{epoch:08x}"), &file(epoch, BITS, &KEY));
    }
    assert_quiet(&mut *source, Duration::from_millis(60)).await;
    source.grant(2);
    assert_eq!(
        key(&mut *source).await.0.metadata.qkd_key_id.as_str(),
        "00000001"
    );
    assert_eq!(
        key(&mut *source).await.0.metadata.qkd_key_id.as_str(),
        "00000002"
    );
    assert_quiet(&mut *source, Duration::from_millis(60)).await;
    source.grant(9);
    assert_eq!(
        key(&mut *source).await.0.metadata.qkd_key_id.as_str(),
        "00000003"
    );
    assert_quiet(&mut *source, Duration::from_millis(60)).await;
}

#[tokio::test]
async fn a_short_buffer_consumes_nothing() {
    let folder = Folder::new();
    folder.put("c74ebf47", &good_file());
    let mut source = folder.open(folder.config()).await;
    let error = next_event(&mut *source, &mut [0; 8]).await.unwrap_err();
    assert!(matches!(
        error,
        ReadError::BufferTooSmall {
            have_bytes: 8,
            need_bytes: 65_536
        }
    ));
    assert_eq!(key(&mut *source).await.1, KEY);
}

#[tokio::test]
async fn a_file_written_byte_by_byte_is_delivered_whole() {
    let folder = Folder::new();
    let mut source = folder
        .open(DirectoryConfig {
            rescan_interval_ms: 10,
            partial_timeout_ms: 20_000,
            ..folder.config()
        })
        .await;
    let path = folder.path("c74ebf47");
    let writer = std::thread::spawn(move || {
        let mut file = fs::File::create(path).unwrap();
        for byte in good_file() {
            file.write_all(&[byte]).unwrap();
            std::thread::sleep(Duration::from_millis(8));
        }
    });
    assert_eq!(key(&mut *source).await.1, KEY);
    writer.join().unwrap();
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
}

#[tokio::test]
async fn files_are_delivered_in_the_order_of_their_epochs() {
    let folder = Folder::new();
    let epochs = [9, 2, 0x100, 3, 0x10, 1];
    for epoch in epochs {
        folder.put(&format!("{epoch:08x}"), &file(epoch, BITS, &KEY));
    }
    let mut source = folder.open(folder.config()).await;
    for id in [
        "00000001", "00000002", "00000003", "00000009", "00000010", "00000100",
    ] {
        assert_eq!(key(&mut *source).await.0.metadata.qkd_key_id.as_str(), id);
    }
}

#[tokio::test]
async fn a_file_is_noticed_at_once_however_it_comes() {
    let folder = Folder::new();
    let slow = DirectoryConfig {
        rescan_interval_ms: 3_600_000,
        ..folder.config()
    };
    let mut source = folder.open(slow).await;
    assert_quiet(&mut *source, Duration::from_millis(20)).await;
    folder.put("00000001", &file(1, BITS, &KEY));
    assert_eq!(key(&mut *source).await.1, KEY);
    fs::write(folder.path("00000002"), file(2, BITS, &KEY)).unwrap();
    assert_eq!(key(&mut *source).await.1, KEY);
}

#[tokio::test]
async fn a_file_without_notification_is_found_by_the_scan() {
    let folder = Folder::new();
    let mut source = folder.open(folder.config()).await;
    // A link makes a name without closing or moving anything.
    fs::write(folder.path(".hidden"), good_file()).unwrap();
    fs::hard_link(folder.path(".hidden"), folder.path("c74ebf47")).unwrap();
    assert_eq!(key(&mut *source).await.1, KEY);
}

#[tokio::test]
async fn an_idle_driver_sleeps() {
    let folder = Folder::new();
    folder.put("c74ebf47", &good_file()[..20]);
    let config = DirectoryConfig {
        rescan_interval_ms: 50,
        partial_timeout_ms: 60_000,
        ..folder.config()
    };
    let mut source = folder.open(config).await;
    let wakes = wakes_while_idle(&mut *source, Duration::from_millis(500)).await;
    assert!((3..=12).contains(&wakes), "woken {wakes} times in 10 scans");
}

#[tokio::test]
async fn a_folder_that_goes_away_and_comes_back_is_attached_again() {
    let parent = Folder::new();
    let path = parent.path("keys");
    fs::create_dir(&path).unwrap();
    let config = DirectoryConfig {
        path: path.clone(),
        ..parent.config()
    };
    let mut source = DriverConfig::Directory(config).open().unwrap();
    source.grant(1);
    let attached = event(&mut *source).await.0;
    fs::rename(&path, parent.path("elsewhere")).unwrap();
    let reason = DetachReason::FolderGone;
    assert_eq!(event(&mut *source).await.0, Event::Detached { reason });
    fs::create_dir(&path).unwrap();
    fs::write(path.join("c74ebf47"), good_file()).unwrap();
    assert_eq!(event(&mut *source).await.0, attached);
    assert_eq!(key(&mut *source).await.1, KEY);
}

#[tokio::test]
async fn more_files_than_are_kept_in_mind_all_come_in_order() {
    let folder = Folder::new();
    let count = 5000;
    for epoch in (0..count).rev() {
        fs::write(
            folder.path(&format!("{epoch:08x}")),
            file(epoch, BITS, &KEY),
        )
        .unwrap();
    }
    let slow = DirectoryConfig {
        rescan_interval_ms: 3_600_000,
        ..folder.config()
    };
    let mut source = folder.open(slow).await;
    source.grant(count);
    for epoch in 0..count {
        let (block, _) = key(&mut *source).await;
        let id = block.metadata.qkd_key_id;
        assert_eq!(id.as_str(), format!("{epoch:08x}"));
        source.settle(&id, Settlement::Stored);
    }
    assert_eq!(folder.names("."), [".ingested"]);
}
