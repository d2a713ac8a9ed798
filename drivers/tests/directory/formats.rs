//! Files of one block in other formats than qcrypto's, and qcrypto's in guardian's order.

use qkd_drivers::directory::Format;
use qkd_keyfile::{
    KeyFile, KeyMetadata, UnixTime,
    metadata::{KsaKeyMetadata, QkdKeyMetadata},
};

use super::*;

#[tokio::test]
async fn guardians_order_is_the_words_as_they_stand_without_the_last() {
    let folder = Folder::new();
    folder.put("c74ebf47", &good_file());
    let mut source = folder
        .open(DirectoryConfig {
            format: Format::Type7Guardian,
            ..folder.config()
        })
        .await;
    let (block, bytes) = key(&mut *source).await;
    assert_eq!(block.key_bits, 32);
    assert_eq!(bytes, [0xef, 0xbe, 0xad, 0xde]);
    assert_eq!(block.metadata.key_bits, Some(32));
    assert!(block.metadata.generated_at.is_some());
    // A file of one word has nothing that guardian takes.
    folder.put("c74ebf48", &file(EPOCH + 1, 32, &KEY[..4]));
    let id = "c74ebf48".parse().unwrap();
    assert_eq!(event(&mut *source).await.0, Event::Empty { id });
}

fn cor(folder: &Folder) -> DirectoryConfig {
    DirectoryConfig {
        format: Format::Cor,
        file_bytes: 64,
        ..folder.config()
    }
}

#[tokio::test]
async fn a_raw_file_is_whole_at_the_configured_length() {
    let folder = Folder::new();
    let mut source = folder
        .open(DirectoryConfig {
            partial_timeout_ms: 20_000,
            ..cor(&folder)
        })
        .await;
    assert_eq!(source.max_block_bytes(), 64);
    fs::write(folder.path("250131_2359_00000002.cor"), [2; 63]).unwrap();
    folder.put("250131_2358_00000009.cor", &[1; 64]);
    let (block, bytes) = key(&mut *source).await;
    assert_eq!((block.key_bits, bytes), (512, vec![1; 64]));
    let id = block.metadata.qkd_key_id;
    assert_eq!(id.as_str(), "250131_2358_00000009");
    source.settle(&id, Settlement::Stored);
    assert!(!folder.path("250131_2358_00000009.cor").exists());
    let mut growing = fs::File::options();
    let growing = growing.append(true);
    let growing = growing.open(folder.path("250131_2359_00000002.cor"));
    growing.unwrap().write_all(&[2]).unwrap();
    assert_eq!(key(&mut *source).await.1, [2; 64]);
}

#[tokio::test]
async fn raw_files_of_another_length_or_name_are_set_aside() {
    let folder = Folder::new();
    folder.put("250131_2359_00000001.cor", &[1; 65]);
    folder.put("250131_2359_00000002.cor", &[1; 10]);
    folder.put("key.cor", &[1; 64]);
    let mut source = folder.open(cor(&folder)).await;
    let mut reasons = Vec::new();
    for _ in 0..3 {
        reasons.push(corrupt(&mut *source).await);
    }
    reasons.sort_by_key(|(id, _)| id.clone());
    let name = "key.cor".to_owned();
    let too_long = CorruptReason::TooLong {
        have_bytes: 65,
        need_bytes: 64,
    };
    let incomplete = CorruptReason::Incomplete {
        have_bytes: 10,
        need_bytes: 64,
    };
    assert_eq!(
        reasons,
        [
            (None, CorruptReason::Name { name }),
            (Some("250131_2359_00000001".to_owned()), too_long),
            (Some("250131_2359_00000002".to_owned()), incomplete),
        ]
    );
    assert_eq!(folder.names("quarantine").len(), 3);
}

/// A key file of our own.
fn key_file(metadata: KeyMetadata, key_bits: u32, key: &[u8]) -> Vec<u8> {
    let file = KeyFile {
        metadata,
        key_bits,
        key,
    };
    [&file.encode_head().unwrap(), key].concat()
}

fn qkd(id: &str) -> QkdKeyMetadata {
    QkdKeyMetadata::new(id.parse().unwrap())
}

fn key_files(folder: &Folder) -> DirectoryConfig {
    DirectoryConfig {
        format: Format::KeyFile,
        ..folder.config()
    }
}

#[tokio::test]
async fn a_key_file_gives_its_own_id_and_metadata_whatever_it_is_called() {
    let folder = Folder::new();
    let metadata = QkdKeyMetadata {
        key_bits: Some(BITS),
        module: Some("their-tx".parse().unwrap()),
        generated_at: Some(UnixTime(5)),
        ..qkd("any/id:7")
    };
    let bytes = key_file(KeyMetadata::Qkd(metadata.clone()), BITS, &KEY);
    let config = DirectoryConfig {
        module: Some("ours".parse().unwrap()),
        matching_module: Some("rx-1".parse().unwrap()),
        partial_timeout_ms: 20_000,
        ..key_files(&folder)
    };
    let mut source = folder.open(config).await;
    let mut growing = fs::File::create(folder.path("a.qkdkey")).unwrap();
    for byte in &bytes {
        growing.write_all(&[*byte]).unwrap();
    }
    drop(growing);
    let (block, key) = key(&mut *source).await;
    assert_eq!(key, KEY);
    assert_eq!(
        block.metadata,
        QkdKeyMetadata {
            matching_module: Some("rx-1".parse().unwrap()),
            ..metadata
        }
    );
    source.settle(&block.metadata.qkd_key_id, Settlement::Stored);
    assert_eq!(folder.names("."), [".ingested"]);
}

#[tokio::test]
async fn key_files_of_other_keys_and_damaged_ones_are_set_aside() {
    let folder = Folder::new();
    let ksa = "6e8bc430-9c3a-11d9-9669-0800200c9a66".parse().unwrap();
    let ksa = KeyMetadata::Ksa(KsaKeyMetadata::new(ksa));
    folder.put("a.qkdkey", &key_file(ksa, BITS, &KEY));
    let mut damaged = key_file(KeyMetadata::Qkd(qkd("x")), BITS, &KEY);
    damaged[17] ^= 1;
    folder.put("b.qkdkey", &damaged);
    let lying = KeyMetadata::Qkd(QkdKeyMetadata {
        key_bits: Some(BITS + 1),
        ..qkd("y")
    });
    folder.put("c.qkdkey", &key_file(lying, BITS, &KEY));
    let mut source = folder.open(key_files(&folder)).await;
    assert_eq!(corrupt(&mut *source).await.1, CorruptReason::NotAQkdKey);
    let reason = corrupt(&mut *source).await.1;
    assert!(matches!(reason, CorruptReason::KeyFile(_)));
    assert_eq!(corrupt(&mut *source).await.1, CorruptReason::NotAQkdKey);
    let names = ["a.qkdkey", "b.qkdkey", "c.qkdkey"];
    assert_eq!(folder.names("quarantine"), names);
}

#[tokio::test]
async fn two_key_files_of_one_id_are_not_outstanding_together() {
    let folder = Folder::new();
    let bytes = key_file(KeyMetadata::Qkd(qkd("same")), BITS, &KEY);
    folder.put("a.qkdkey", &bytes);
    folder.put("b.qkdkey", &bytes);
    let mut source = folder.open(key_files(&folder)).await;
    let (block, _) = key(&mut *source).await;
    assert_quiet(&mut *source, Duration::from_millis(80)).await;
    source.settle(&block.metadata.qkd_key_id, Settlement::Stored);
    assert_eq!(key(&mut *source).await.0, block);
}
