//! The shared-memory driver over its real socket and ring, with producers of every character.
#![allow(clippy::unwrap_used)]

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use common::{assert_quiet, device::block, event, key, producer::Connected, wakes_while_idle};
use qkd_drivers::{
    Alarm, AlarmCode, Band, CorruptReason, DetachReason, DriverConfig, Event, KeySource, Metric,
    ModuleState, OpenError, Settlement, Severity, SharedMemoryConfig, Value, next_event,
};
use qkd_handover::{
    block::BlockHeader,
    ring::{RingFault, WriteError},
    status::Status,
};
use tempfile::TempDir;

mod common;

const WRITE_POSITION: u64 = 0x080;
const DATA: u64 = 4096;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("tx-1.sock")
    }

    fn config(&self) -> SharedMemoryConfig {
        SharedMemoryConfig {
            capacity_bytes: 1 << 16,
            module: Some("tx-1".parse().unwrap()),
            matching_module: Some("rx-1".parse().unwrap()),
            ..SharedMemoryConfig::new(self.path())
        }
    }

    fn open(&self) -> Box<dyn KeySource> {
        DriverConfig::SharedMemory(self.config()).open().unwrap()
    }

    fn attached(&self) -> Event {
        Event::Attached {
            device: self.path().display().to_string(),
            session: None,
        }
    }

    /// Connects a producer while the driver takes it in.
    async fn connect(&self, source: &mut dyn KeySource) -> Connected {
        let path = self.path();
        let producer = tokio::task::spawn_blocking(move || Connected::new(&path).unwrap());
        assert_eq!(event(source).await.0, self.attached());
        producer.await.unwrap()
    }
}

async fn expect_blocks(source: &mut dyn KeySource, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let (got, bytes) = key(source).await;
        let (header, want) = block(number);
        assert_eq!(got.metadata.qkd_key_id.as_str(), number.to_string());
        assert_eq!((got.key_bits, bytes), (header.key_bits, want));
    }
}

fn settle(source: &mut dyn KeySource, number: u64, outcome: Settlement) {
    source.settle(&number.to_string().parse().unwrap(), outcome);
}

/// Has `source` read what there is, which is no key that it delivers.
async fn assert_leaves_no_key(source: &mut dyn KeySource) {
    let mut out = vec![0; source.max_block_bytes()];
    let next = next_event(source, &mut out);
    let none = tokio::time::timeout(Duration::from_millis(50), next).await;
    assert!(none.is_err(), "{none:?}");
    assert!(out.iter().all(|&byte| byte == 0), "key was left behind");
}

async fn expect_broken(source: &mut dyn KeySource) -> RingFault {
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

#[tokio::test]
async fn blocks_come_with_their_metadata_and_are_durable_once_they_are_settled() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(10);
    let mut producer = place.connect(&mut *source).await;
    assert_eq!(producer.greeting.last_durable, None);
    for number in 5..8 {
        producer.send(number).unwrap();
    }
    let (first, bytes) = key(&mut *source).await;
    assert_eq!(bytes, block(5).1);
    assert_eq!(first.metadata.qkd_key_id.as_str(), "5");
    assert_eq!(first.metadata.module.unwrap().as_str(), "tx-1");
    assert_eq!(first.metadata.matching_module.unwrap().as_str(), "rx-1");
    assert_eq!(first.metadata.generated_at.unwrap().0, 1005);
    expect_blocks(&mut *source, 6..8).await;
    // The last first: nothing is safe before the ones in front of it are.
    settle(&mut *source, 7, Settlement::Stored);
    assert_eq!(producer.producer.durable(), None);
    settle(&mut *source, 5, Settlement::Dropped);
    assert_eq!(producer.producer.durable(), Some(5));
    settle(&mut *source, 6, Settlement::Quarantined);
    assert_eq!(producer.producer.durable(), Some(7));
}

#[tokio::test]
async fn a_ring_without_credit_fills_and_is_read_again_when_there_is_some() {
    let place = Place::new();
    let mut source = place.open();
    let mut producer = place.connect(&mut *source).await;
    let mut sent = 0;
    while producer.send(sent).is_ok() {
        sent += 1;
    }
    assert!(matches!(producer.send(sent), Err(WriteError::Full { .. })));
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    source.grant(3);
    expect_blocks(&mut *source, 0..3).await;
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    producer.producer.beat(1, None, 2);
    source.grant(u32::MAX);
    let mut next = 3;
    let mut lost = 0;
    while next < sent || lost == 0 {
        match event(&mut *source).await {
            (Event::Key(_), bytes) => {
                assert_eq!(bytes, block(next).1);
                next += 1;
            }
            (Event::Gap { blocks }, _) => lost += blocks,
            (other, _) => panic!("{other:?}"),
        }
    }
    assert_eq!(lost, 2);
}

#[tokio::test]
async fn a_sleeping_driver_is_woken_by_every_burst() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(1_000_000);
    let mut producer = place.connect(&mut *source).await;
    let thread = std::thread::spawn(move || {
        for number in 0..3000 {
            while producer.send(number).is_err() {
                std::thread::yield_now();
            }
            if number % 100 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        producer
    });
    expect_blocks(&mut *source, 0..3000).await;
    drop(thread.join().unwrap());
}

#[tokio::test]
async fn a_producer_that_comes_again_is_told_what_is_durable_and_nothing_comes_twice() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(100);
    let mut producer = place.connect(&mut *source).await;
    for number in 0..4 {
        producer.send(number).unwrap();
    }
    expect_blocks(&mut *source, 0..4).await;
    settle(&mut *source, 0, Settlement::Stored);
    let generation = producer.greeting.generation;
    drop(producer);
    let reason = DetachReason::Closed;
    assert_eq!(event(&mut *source).await.0, Event::Detached { reason });
    settle(&mut *source, 1, Settlement::Stored);

    let mut producer = place.connect(&mut *source).await;
    assert_eq!(producer.greeting.generation, generation + 1);
    assert_eq!(producer.greeting.last_durable, Some(1));
    for number in 2..4 {
        producer.send(number).unwrap();
    }
    assert_leaves_no_key(&mut *source).await;
    for number in 4..6 {
        producer.send(number).unwrap();
    }
    expect_blocks(&mut *source, 4..6).await;
    for number in [5, 4, 3, 2] {
        settle(&mut *source, number, Settlement::Stored);
    }
    assert_eq!(producer.producer.durable(), Some(5));
}

#[tokio::test]
async fn a_block_that_is_durable_or_out_of_order_is_never_delivered() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(100);
    let mut producer = place.connect(&mut *source).await;
    for number in [3, 3, 2, 4] {
        producer.send(number).unwrap();
    }
    expect_blocks(&mut *source, 3..4).await;
    for number in [3, 2] {
        let reason = CorruptReason::Disordered { number, after: 3 };
        let id = number.to_string().parse().ok();
        assert_eq!(event(&mut *source).await.0, Event::Corrupt { id, reason });
    }
    expect_blocks(&mut *source, 4..5).await;
    settle(&mut *source, 3, Settlement::Stored);
    settle(&mut *source, 4, Settlement::Stored);
    drop(producer);
    event(&mut *source).await;
    let mut producer = place.connect(&mut *source).await;
    producer.send(4).unwrap();
    let (number, durable) = (4, 4);
    let reason = CorruptReason::Durable { number, durable };
    let id = "4".parse().ok();
    assert_eq!(event(&mut *source).await.0, Event::Corrupt { id, reason });
}

#[tokio::test]
async fn a_hostile_length_ends_the_ring_and_the_next_one_is_good() {
    let place = Place::new();
    let mut source = place.open();
    let producer = {
        let mut producer = place.connect(&mut *source).await;
        producer.send(1).unwrap();
        producer.poke(DATA, &u32::MAX.to_le_bytes());
        producer
    };
    source.grant(10);
    let fault = expect_broken(&mut *source).await;
    assert!(matches!(
        fault,
        RingFault::Length {
            seq: 0,
            len: u32::MAX
        }
    ));
    let generation = producer.greeting.generation;
    let mut producer = place.connect(&mut *source).await;
    assert_eq!(producer.greeting.generation, generation + 1);
    producer.send(1).unwrap();
    expect_blocks(&mut *source, 1..2).await;
}

#[tokio::test]
async fn a_write_position_that_goes_back_or_jumps_ends_the_ring() {
    for position in [0_u64, 1 << 20, u64::MAX] {
        let place = Place::new();
        let mut source = place.open();
        source.grant(10);
        let mut producer = place.connect(&mut *source).await;
        producer.send(1).unwrap();
        expect_blocks(&mut *source, 1..2).await;
        assert_quiet(&mut *source, Duration::from_millis(10)).await;
        producer.poke(WRITE_POSITION, &position.to_le_bytes());
        producer.wake_if(true);
        let fault = expect_broken(&mut *source).await;
        assert!(
            matches!(fault, RingFault::WritePosition { write_pos, .. } if write_pos == position)
        );
    }
}

#[tokio::test]
async fn the_memory_cannot_be_made_smaller() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(10);
    let mut producer = place.connect(&mut *source).await;
    let error = producer.memory.set_len(0).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    producer.send(1).unwrap();
    expect_blocks(&mut *source, 1..2).await;
}

#[tokio::test]
async fn an_eventfd_that_was_made_blocking_does_not_block_the_driver() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(10);
    let mut producer = place.connect(&mut *source).await;
    rustix::io::ioctl_fionbio(&producer.wakeup, false).unwrap();
    assert_quiet(&mut *source, Duration::from_millis(10)).await;
    producer.wake_if(true);
    let mut counter = [0; 8];
    rustix::io::read(&producer.wakeup, &mut counter).unwrap();
    assert_quiet(&mut *source, Duration::from_millis(10)).await;
    producer.send(1).unwrap();
    expect_blocks(&mut *source, 1..2).await;
}

#[tokio::test]
async fn a_producer_that_speaks_on_the_socket_is_let_go() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(1);
    let producer = place.connect(&mut *source).await;
    rustix::io::write(&producer.socket, b"hello").unwrap();
    let reason = DetachReason::Closed;
    assert_eq!(event(&mut *source).await.0, Event::Detached { reason });
}

#[tokio::test]
async fn a_producer_whose_heart_stops_is_let_go() {
    let place = Place::new();
    let config = SharedMemoryConfig {
        heartbeat_timeout_ms: 80,
        ..place.config()
    };
    let mut source = DriverConfig::SharedMemory(config).open().unwrap();
    let mut producer = place.connect(&mut *source).await;
    for beat in 1..8 {
        producer.producer.beat(beat, Some(ModuleState::Running), 0);
        let quiet = tokio::time::sleep(Duration::from_millis(20));
        tokio::select! {
            () = quiet => {}
            (state, _) = event(&mut *source) => {
                assert_eq!(state, Event::State(ModuleState::Running));
            }
        }
    }
    let reason = DetachReason::Silent;
    assert_eq!(event(&mut *source).await.0, Event::Detached { reason });
}

#[tokio::test]
async fn what_a_producer_says_becomes_events() {
    let place = Place::new();
    let config = SharedMemoryConfig {
        max_block_bits: 800,
        ..place.config()
    };
    let mut source = DriverConfig::SharedMemory(config).open().unwrap();
    source.grant(2);
    let mut producer = place.connect(&mut *source).await;
    let header = BlockHeader {
        number: 1,
        generated_at: None,
        key_bits: 8,
        qber_ppm: Some(90_000),
    };
    let mut write = |header: BlockHeader, key: &[u8]| {
        producer.producer.write_block(&header, key).unwrap();
    };
    write(header, &[0xa5]);
    write(
        BlockHeader {
            number: 2,
            key_bits: 0,
            ..header
        },
        &[],
    );
    write(
        BlockHeader {
            number: 3,
            key_bits: 808,
            ..header
        },
        &[1; 101],
    );
    producer
        .producer
        .write_status(&Status {
            qber_ppm: Some(20_000),
            ..Status::default()
        })
        .unwrap();
    let sleeps = producer.producer.write_end().unwrap();
    producer.wake_if(sleeps);

    let (block, bytes) = key(&mut *source).await;
    assert_eq!((block.qber_ppm, &bytes[..]), (Some(90_000), &[0xa5][..]));
    let metric = |ppm, band| {
        let value = Value::QberPpm(ppm);
        Event::Metric(Metric { value, band })
    };
    let warning = metric(90_000, Band::OperationOutOfRange);
    assert_eq!(event(&mut *source).await.0, warning);
    let id = "2".parse().unwrap();
    assert_eq!(event(&mut *source).await.0, Event::Empty { id });
    let (key_bits, max_bits) = (808, 800);
    let reason = CorruptReason::TooManyBits { key_bits, max_bits };
    let id = "3".parse().ok();
    assert_eq!(event(&mut *source).await.0, Event::Corrupt { id, reason });
    assert_eq!(event(&mut *source).await.0, metric(20_000, Band::Ok));
    assert_quiet(&mut *source, Duration::from_millis(30)).await;
    settle(&mut *source, 1, Settlement::Stored);
    assert_eq!(producer.producer.durable(), Some(3));
}

#[tokio::test]
async fn an_idle_driver_sleeps() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(10);
    let wakes = wakes_while_idle(&mut *source, Duration::from_millis(300)).await;
    assert!(wakes <= 1, "woken {wakes} times with no producer");
    let mut producer = place.connect(&mut *source).await;
    producer.send(1).unwrap();
    expect_blocks(&mut *source, 1..2).await;
    let wakes = wakes_while_idle(&mut *source, Duration::from_millis(300)).await;
    assert!(wakes <= 3, "woken {wakes} times with nothing to read");
}

#[tokio::test]
async fn only_one_driver_listens_and_it_leaves_nothing_behind() {
    let place = Place::new();
    let first = place.open();
    let error = DriverConfig::SharedMemory(place.config())
        .open()
        .err()
        .unwrap();
    assert!(matches!(error, OpenError::Socket { .. }));
    assert!(
        error
            .to_string()
            .contains("tx-1.sock: another program listens there; to mend it: sudo fuser"),
        "{error}"
    );
    drop(first);
    assert!(!place.path().exists());

    // The file of a bridge that was killed.
    drop(std::os::unix::net::UnixListener::bind(place.path()).unwrap());
    assert!(place.path().exists());
    let mut source = place.open();
    source.grant(1);
    let mut producer = place.connect(&mut *source).await;
    producer.send(1).unwrap();
    expect_blocks(&mut *source, 1..2).await;
}

#[tokio::test]
async fn what_cannot_be_opened_is_named_with_what_to_do() {
    let place = Place::new();
    let crooked = SharedMemoryConfig {
        capacity_bytes: 5000,
        ..place.config()
    };
    let error = DriverConfig::SharedMemory(crooked).open().err().unwrap();
    assert!(matches!(error, OpenError::Ring { .. }));
    assert!(error.to_string().contains("check `capacity_bytes`"));
    std::fs::write(place.path(), "a file of somebody").unwrap();
    let error = DriverConfig::SharedMemory(place.config())
        .open()
        .err()
        .unwrap();
    assert!(matches!(error, OpenError::Socket { .. }));
    assert!(error.to_string().contains("a file that is no socket"));
    assert_eq!(std::fs::read(place.path()).unwrap(), b"a file of somebody");
}

#[tokio::test]
async fn what_a_killed_process_had_written_is_delivered_and_no_more() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(100);
    let mut child = producer_process(&place.path()).spawn().unwrap();
    assert_eq!(event(&mut *source).await.0, place.attached());
    expect_blocks(&mut *source, 0..1).await;
    // It writes nine more and waits for its end.
    tokio::time::sleep(Duration::from_millis(100)).await;
    child.kill().unwrap();
    child.wait().unwrap();
    expect_blocks(&mut *source, 1..10).await;
    let reason = DetachReason::Closed;
    assert_eq!(event(&mut *source).await.0, Event::Detached { reason });
    // The next process goes on.
    settle(&mut *source, 0, Settlement::Stored);
    let mut child = producer_process(&place.path()).spawn().unwrap();
    assert_eq!(event(&mut *source).await.0, place.attached());
    expect_blocks(&mut *source, 10..11).await;
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn a_stranger_is_turned_away() {
    if !nix::unistd::geteuid().is_root() {
        return; // only root can act for two users
    }
    let place = Place::new();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(place.0.path(), open).unwrap();
    let config = SharedMemoryConfig {
        peer_uids: vec![12345],
        ..place.config()
    };
    let mut source = DriverConfig::SharedMemory(config).open().unwrap();
    source.grant(10);
    for uid in [12346, 12345] {
        let Ok(mut child) = producer_process(&place.path()).uid(uid).spawn() else {
            return; // this test's program is not for everybody
        };
        let expected = match uid {
            12345 => place.attached(),
            _ => Event::Alarm(Alarm {
                code: AlarmCode::StrangerConnected { uid },
                severity: Severity::Security,
            }),
        };
        assert_eq!(event(&mut *source).await.0, expected);
        let _ = child.kill();
        child.wait().unwrap();
    }
}

#[test]
fn the_documented_configuration_is_read() {
    let text = r#"
        kind = "shared-memory"
        socket = "/run/qkd/tx-1.sock"
        capacity_bytes = 65536
        max_block_bits = 8192
        peer_uids = [1000]
        heartbeat_timeout_ms = 0
        device_id = 7
        module = "tx-1"
        limits = { qber_absolute_ppm = 100000 }
    "#;
    let DriverConfig::SharedMemory(config) = toml::from_str(text).unwrap() else {
        panic!("another driver");
    };
    assert_eq!(
        (config.capacity_bytes, config.max_block_bits),
        (65_536, 8192)
    );
    assert_eq!((config.peer_uids, config.device_id), (vec![1000], 7));
    assert_eq!(config.limits.qber_absolute_ppm, 100_000);
    let short = toml::from_str("kind = \"shared-memory\"\nsocket = \"/x\"").unwrap();
    assert_eq!(
        DriverConfig::SharedMemory(SharedMemoryConfig::new("/x")),
        short
    );
    let wrong = "kind = \"shared-memory\"\nsocket = \"/x\"\ncapacity = 1";
    assert!(toml::from_str::<DriverConfig>(wrong).is_err());
}

const SOCKET_VARIABLE: &str = "RING_PRODUCER_SOCKET";

/// This program once more, as a producer.
fn producer_process(socket: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "a_producer_process", "--nocapture"])
        .env(SOCKET_VARIABLE, socket)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Only in a child of another test: sends ten blocks beyond what is durable, and waits to be killed.
#[test]
fn a_producer_process() {
    let Some(socket) = std::env::var_os(SOCKET_VARIABLE) else {
        return;
    };
    let mut producer = Connected::new(Path::new(&socket)).unwrap();
    let first = producer
        .greeting
        .last_durable
        .map_or(0, |number| number + 1);
    for number in first..first + 10 {
        producer.send(number).unwrap();
    }
    std::thread::sleep(Duration::from_secs(60));
}
