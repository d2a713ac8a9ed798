//! The directory driver over real folders.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use common::{assert_quiet, event, key, wakes_while_idle};
use qkd_drivers::{
    Alarm, AlarmCode, CorruptReason, DetachReason, DirectoryConfig, DriverConfig, Event, KeySource,
    OpenError, ReadError, Settlement, Severity, directory::Epochs, next_event,
};
use qkd_handover::type7::{Header, TAG, Type7Error, encode_words, words_bytes};
use tempfile::TempDir;

#[path = "../common/mod.rs"]
mod common;
mod delivery;
mod formats;
mod journal;
mod numbering;
mod real;
mod records;
mod refusal;
mod settling;

/// Vector A of the format: 40 bits DE AD BE EF A5.
const EPOCH: u32 = 0xc74e_bf47;
const BITS: u32 = 40;
const KEY: [u8; 5] = [0xde, 0xad, 0xbe, 0xef, 0xa5];

fn file(epoch: u32, key_bits: u32, key: &[u8]) -> Vec<u8> {
    let header = Header {
        tag: TAG,
        first_epoch: epoch,
        epochs: 1,
        key_bits,
    };
    let mut bytes = header.encode().to_vec();
    bytes.resize(16 + words_bytes(key_bits), 0);
    encode_words(key_bits, key, &mut bytes[16..]).unwrap();
    bytes
}

fn good_file() -> Vec<u8> {
    file(EPOCH, BITS, &KEY)
}

struct Folder(
    PathBuf,
    #[expect(dead_code, reason = "removes it")] Option<TempDir>,
);

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(tmpfs()).unwrap();
        Self(folder.path().to_owned(), Some(folder))
    }

    /// Made at `path`, and left there.
    fn at(path: &Path) -> Self {
        fs::create_dir(path).unwrap();
        Self(path.to_owned(), None)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Written elsewhere and moved in, so that it is whole as soon as it is there.
    fn put(&self, name: &str, bytes: &[u8]) {
        let temporary = self.path(&format!(".{name}"));
        fs::write(&temporary, bytes).unwrap();
        fs::rename(temporary, self.path(name)).unwrap();
    }

    fn config(&self) -> DirectoryConfig {
        DirectoryConfig {
            rescan_interval_ms: 20,
            partial_timeout_ms: 100,
            ..DirectoryConfig::new(&self.0)
        }
    }

    /// Opens with credit and takes the first event.
    async fn open(&self, config: DirectoryConfig) -> Box<dyn KeySource> {
        let mut source = DriverConfig::Directory(config).open().unwrap();
        source.grant(1000);
        assert_eq!(event(&mut *source).await.0, self.attached(None));
        source
    }

    fn attached(&self, session: Option<u64>) -> Event {
        Event::Attached {
            device: self.0.display().to_string(),
            session,
        }
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).into_iter().flatten();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// Where hand-over folders are to be: every settlement is a synchronisation.
fn tmpfs() -> PathBuf {
    let shm = PathBuf::from("/dev/shm");
    if shm.is_dir() {
        shm
    } else {
        std::env::temp_dir()
    }
}

async fn corrupt(source: &mut dyn KeySource) -> (Option<String>, CorruptReason) {
    match event(source).await.0 {
        Event::Corrupt { id, reason } => (id.map(String::from), reason),
        other => panic!("a corrupt block was expected, not {other:?}"),
    }
}

#[test]
fn the_documented_configuration_is_read_and_a_wrong_name_is_refused() {
    let text = r#"
        kind = "directory"
        path = "/run/qkd/keys"
        epochs = "local"
        delete = false
        max_block_bits = 65536
        rescan_interval_ms = 1000
        partial_timeout_ms = 2000
        numbering_tolerance_s = 60
        owner_uids = [1000]
        module = "tx-1"
    "#;
    let DriverConfig::Directory(config) = toml::from_str(text).unwrap() else {
        panic!("another driver");
    };
    assert_eq!(config.epochs, Epochs::Local);
    assert_eq!((config.delete, config.owner_uids), (false, vec![1000]));
    let short = toml::from_str("kind = \"directory\"\npath = \"/x\"").unwrap();
    assert_eq!(DriverConfig::Directory(DirectoryConfig::new("/x")), short);
    let wrong = "kind = \"directory\"\npath = \"/x\"\ndelet = true";
    assert!(
        toml::from_str::<DriverConfig>(wrong)
            .unwrap_err()
            .to_string()
            .contains("delet")
    );
}
