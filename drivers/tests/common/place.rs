//! A place where producers connect, and what is expected of the driver there.

use std::{path::PathBuf, time::Duration};

use qkd_drivers::{
    CorruptReason, DetachReason, DriverConfig, Event, KeySource, Settlement, SharedMemoryConfig,
    next_event,
};
use qkd_handover::ring::RingFault;
use tempfile::TempDir;

use super::{
    device::block,
    event, key,
    producer::{Connected, SESSION},
};

pub(crate) const WRITE_POSITION: u64 = 0x080;
pub(crate) const DATA: u64 = 4096;

pub(crate) struct Place(pub(crate) TempDir, Way);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Socket,
    File,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap(), Way::Socket)
    }

    /// A place for a ring in a file.
    pub(crate) fn in_file() -> Self {
        Self(tempfile::tempdir_in("/dev/shm").unwrap(), Way::File)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join(match self.1 {
            Way::Socket => "tx-1.sock",
            Way::File => "tx-1.ring",
        })
    }

    pub(crate) fn config(&self) -> SharedMemoryConfig {
        SharedMemoryConfig {
            capacity_bytes: 1 << 16,
            module: Some("tx-1".parse().unwrap()),
            matching_module: Some("rx-1".parse().unwrap()),
            ..match self.1 {
                Way::Socket => SharedMemoryConfig::new(self.path()),
                Way::File => SharedMemoryConfig::in_file(self.path()),
            }
        }
    }

    pub(crate) fn open(&self) -> Box<dyn KeySource> {
        DriverConfig::SharedMemory(self.config()).open().unwrap()
    }

    pub(crate) fn attached(&self) -> Event {
        Event::Attached {
            device: self.path().display().to_string(),
            session: Some(SESSION.get()),
        }
    }

    /// Connects a producer while the driver takes it in.
    pub(crate) async fn connect(&self, source: &mut dyn KeySource) -> Connected {
        let (path, way) = (self.path(), self.1);
        let producer = tokio::task::spawn_blocking(move || match way {
            Way::Socket => Connected::new(&path).unwrap(),
            Way::File => Connected::in_file(&path).unwrap(),
        });
        assert_eq!(event(source).await.0, self.attached());
        producer.await.unwrap()
    }
}

pub(crate) async fn expect_blocks(source: &mut dyn KeySource, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let (got, bytes) = key(source).await;
        let (header, want) = block(number);
        assert_eq!(got.metadata.qkd_key_id.as_str(), number.to_string());
        assert_eq!((got.key_bits, bytes), (header.key_bits, want));
    }
}

pub(crate) fn settle(source: &mut dyn KeySource, number: u64, outcome: Settlement) {
    source.settle(&number.to_string().parse().unwrap(), outcome);
}

/// Has `source` read what there is, which is no key that it delivers.
pub(crate) async fn assert_leaves_no_key(source: &mut dyn KeySource) {
    let mut out = vec![0; source.max_block_bytes()];
    let next = next_event(source, &mut out);
    let none = tokio::time::timeout(Duration::from_millis(50), next).await;
    assert!(none.is_err(), "{none:?}");
    assert!(out.iter().all(|&byte| byte == 0), "key was left behind");
}

pub(crate) async fn expect_broken(source: &mut dyn KeySource) -> RingFault {
    let (corrupt, _) = event(source).await;
    let Event::Corrupt {
        id: None,
        reason: CorruptReason::Ring(fault),
    } = corrupt
    else {
        panic!("a corrupt ring was expected, not {corrupt:?}");
    };
    let reason = DetachReason::BrokeRules;
    assert_eq!(event(source).await.0, Event::Detached { reason });
    fault
}
