//! Local epochs, which repeat.

use super::*;

#[tokio::test]
async fn local_epochs_that_begin_anew_are_another_session() {
    let folder = Folder::new();
    let config = DirectoryConfig {
        epochs: Epochs::Local,
        ..folder.config()
    };
    let now_s = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    // Two starts of the device, 50,000 s apart, each with the epochs 2 and 20.
    let put = |name: &str, epoch: u32, began_s: u64| {
        folder.put(name, &file(epoch, BITS, &KEY));
        let at = UNIX_EPOCH + Duration::from_secs(began_s + u64::from(epoch) * 537 / 1000);
        let opened = fs::File::options().append(true).open(folder.path(name));
        opened.unwrap().set_modified(at).unwrap();
    };
    let (first_s, second_s) = (now_s - 60_000, now_s - 10_000);
    put("00000002", 2, second_s);
    put("00000014", 20, first_s);
    let mut source = folder.open(config.clone()).await;
    assert_eq!(event(&mut *source).await.0, folder.attached(Some(first_s)));
    let (old, _) = key(&mut *source).await;
    assert_eq!(old.metadata.qkd_key_id.as_str(), "00000014");
    assert_eq!(old.metadata.generated_at, None);
    assert_eq!(event(&mut *source).await.0, folder.attached(Some(second_s)));
    let (new, _) = key(&mut *source).await;
    assert_eq!(new.metadata.qkd_key_id.as_str(), "00000002");
    source.settle(&new.metadata.qkd_key_id, Settlement::Stored);
    // A straggler of the numbering that has ended.
    put("00000002", 2, first_s);
    assert_eq!(corrupt(&mut *source).await.1, CorruptReason::EndedNumbering);
    source.settle(&old.metadata.qkd_key_id, Settlement::Stored);
    drop(source);
    // The session outlives the driver.
    put("00000014", 20, second_s + 30);
    let mut source = DriverConfig::Directory(config).open().unwrap();
    source.grant(1);
    assert_eq!(event(&mut *source).await.0, folder.attached(Some(second_s)));
    assert_eq!(
        key(&mut *source).await.0.metadata.qkd_key_id.as_str(),
        "00000014"
    );
}
