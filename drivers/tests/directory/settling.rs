//! What becomes of a file when its key is settled.

use super::*;

#[tokio::test]
async fn a_settled_file_is_deleted_kept_or_set_aside() {
    for (delete, outcome, left_in) in [
        (true, Settlement::Stored, None),
        (true, Settlement::Dropped, None),
        (true, Settlement::Quarantined, Some("quarantine")),
        (false, Settlement::Stored, Some("done")),
        (false, Settlement::Dropped, Some("done")),
    ] {
        let folder = Folder::new();
        folder.put("c74ebf47", &good_file());
        let config = DirectoryConfig {
            delete,
            ..folder.config()
        };
        let mut source = folder.open(config).await;
        let (block, _) = key(&mut *source).await;
        assert!(folder.path("c74ebf47").exists());
        source.settle(&block.metadata.qkd_key_id, outcome);
        source.settle(&block.metadata.qkd_key_id, outcome);
        assert!(!folder.path("c74ebf47").exists());
        for side in ["quarantine", "done"] {
            let left = folder.names(side) == ["c74ebf47"];
            assert_eq!(left, left_in == Some(side), "{outcome:?} {side}");
        }
        assert_quiet(&mut *source, Duration::from_millis(40)).await;
    }
}

#[tokio::test]
async fn a_second_file_of_one_name_does_not_replace_the_first_in_quarantine() {
    let folder = Folder::new();
    let mut source = folder.open(folder.config()).await;
    for round in 0..2 {
        folder.put("c74ebf47", &good_file());
        let (block, _) = key(&mut *source).await;
        source.settle(&block.metadata.qkd_key_id, Settlement::Quarantined);
        assert_eq!(folder.names("quarantine").len(), round + 1);
    }
    assert_eq!(folder.names("quarantine"), ["c74ebf47", "c74ebf47.1"]);
}

#[tokio::test]
async fn a_file_that_replaced_an_outstanding_one_is_not_deleted_in_its_stead() {
    let folder = Folder::new();
    folder.put("c74ebf47", &good_file());
    let mut source = folder.open(folder.config()).await;
    let (first, _) = key(&mut *source).await;
    let other = [1, 2, 3, 4, 5];
    folder.put("c74ebf47", &file(EPOCH, BITS, &other));
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    source.settle(&first.metadata.qkd_key_id, Settlement::Stored);
    let (second, bytes) = key(&mut *source).await;
    assert_eq!(bytes, other);
    source.settle(&second.metadata.qkd_key_id, Settlement::Dropped);
    assert!(!folder.path("c74ebf47").exists());
}

#[tokio::test]
async fn what_was_not_settled_comes_again_after_a_restart() {
    let folder = Folder::new();
    for epoch in 1..=3 {
        folder.put(&format!("{epoch:08x}"), &file(epoch, BITS, &KEY));
    }
    let mut source = folder.open(folder.config()).await;
    for _ in 1..=3 {
        key(&mut *source).await;
    }
    source.settle(&"00000002".parse().unwrap(), Settlement::Stored);
    drop(source);
    let mut source = folder.open(folder.config()).await;
    assert_eq!(
        key(&mut *source).await.0.metadata.qkd_key_id.as_str(),
        "00000001"
    );
    assert_eq!(
        key(&mut *source).await.0.metadata.qkd_key_id.as_str(),
        "00000003"
    );
    assert_quiet(&mut *source, Duration::from_millis(40)).await;
}

#[tokio::test]
async fn a_block_that_was_given_up_is_told_and_deleted() {
    let folder = Folder::new();
    folder.put("0000be37", &file(0xbe37, 0, &[]));
    let mut source = folder.open(folder.config()).await;
    let id = "0000be37".parse().unwrap();
    assert_eq!(event(&mut *source).await.0, Event::Empty { id });
    assert!(!folder.path("0000be37").exists());
}
