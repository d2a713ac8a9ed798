//! The shared-memory driver over a real file in `/dev/shm`: the producer comes by the file's name, in this
//! process or another, may die, and may take the memory away.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use common::{
    assert_quiet,
    device::block,
    event, key,
    place::{DATA, Place, assert_leaves_no_key, expect_blocks, expect_broken, settle},
    producer::Connected,
    wakes_while_idle,
};
use qkd_drivers::{
    Alarm, AlarmCode, DetachReason, DriverConfig, Event, KeySource, OpenError, Settlement,
    Severity, SharedMemoryConfig,
};
use qkd_handover::ring::RingFault;

mod common;

const NOT_SEALED: Event = Event::Alarm(Alarm {
    code: AlarmCode::RingNotSealed,
    severity: Severity::Warning,
});

const CLOSED: Event = Event::Detached {
    reason: DetachReason::Closed,
};

const CUT_OFF: RingFault = RingFault::Memory {
    error: std::io::ErrorKind::UnexpectedEof,
};

async fn open(place: &Place) -> Box<dyn KeySource> {
    open_with(place.config()).await
}

async fn open_with(config: SharedMemoryConfig) -> Box<dyn KeySource> {
    let mut source = DriverConfig::SharedMemory(config).open().unwrap();
    assert_eq!(event(&mut *source).await.0, NOT_SEALED);
    source
}

/// What lies in the folder: the ring, and its FIFO.
fn left(place: &Place) -> usize {
    fs::read_dir(place.0.path()).unwrap().count()
}

#[tokio::test]
async fn blocks_come_over_many_rounds_and_are_durable_once_they_are_settled() {
    let place = Place::in_file();
    let mut source = open(&place).await;
    source.grant(10_000);
    let mut producer = place.connect(&mut *source).await;
    let thread = std::thread::spawn(move || {
        for number in 0..3000 {
            while producer.send(number).is_err() {
                std::thread::yield_now();
            }
            if number % 100 == 0 {
                // Long enough that the driver sleeps, and has to be woken.
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        producer
    });
    expect_blocks(&mut *source, 0..3000).await;
    let producer = thread.join().unwrap();
    assert_eq!(producer.producer.durable(), None);
    for number in 0..3000 {
        settle(&mut *source, number, Settlement::Stored);
    }
    assert_eq!(producer.producer.durable(), Some(2999));
}

#[tokio::test]
async fn what_was_read_is_wiped_from_the_file() {
    let place = Place::in_file();
    let mut source = open(&place).await;
    source.grant(10);
    let mut producer = place.connect(&mut *source).await;
    producer.send(1).unwrap();
    producer.send(2).unwrap();
    expect_blocks(&mut *source, 1..3).await;
    assert_quiet(&mut *source, Duration::from_millis(10)).await;
    let bytes = fs::read(place.path()).unwrap();
    assert!(
        bytes[usize::try_from(DATA).unwrap()..]
            .iter()
            .all(|&b| b == 0)
    );
}

#[tokio::test]
async fn an_idle_driver_sleeps_with_a_producer_and_without() {
    let place = Place::in_file();
    let mut source = open(&place).await;
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
async fn what_is_settled_between_two_producers_stands_in_the_header_of_the_next_ring() {
    let place = Place::in_file();
    let mut source = open(&place).await;
    source.grant(100);
    let mut producer = place.connect(&mut *source).await;
    for number in 0..4 {
        producer.send(number).unwrap();
    }
    expect_blocks(&mut *source, 0..4).await;
    settle(&mut *source, 0, Settlement::Stored);
    let generation = producer.greeting.generation;
    drop(producer);
    assert_eq!(event(&mut *source).await.0, CLOSED);
    // Before the next ring is made, and after.
    settle(&mut *source, 1, Settlement::Stored);
    assert_quiet(&mut *source, Duration::from_millis(20)).await;
    settle(&mut *source, 2, Settlement::Stored);

    let mut producer = place.connect(&mut *source).await;
    assert_eq!(producer.greeting.generation, generation + 1);
    assert_eq!(producer.greeting.last_durable, Some(2));
    producer.send(3).unwrap();
    assert_leaves_no_key(&mut *source).await;
    producer.send(4).unwrap();
    expect_blocks(&mut *source, 4..5).await;
}

#[tokio::test]
async fn a_producer_that_cuts_the_file_off_loses_its_ring_and_the_next_one_is_good() {
    // Nothing left, half a header, and a whole header without its data.
    for len in [0, 0x100, DATA] {
        let place = Place::in_file();
        let mut source = open(&place).await;
        source.grant(100);
        let mut producer = place.connect(&mut *source).await;
        producer.send(0).unwrap();
        expect_blocks(&mut *source, 0..1).await;
        // Records that wait, and a driver that does not look for credit.
        producer.send(1).unwrap();
        producer.memory.set_len(len).unwrap();
        assert_eq!(expect_broken(&mut *source).await, CUT_OFF, "{len}");
        drop(producer);
        let mut producer = place.connect(&mut *source).await;
        for number in 1..3 {
            producer.send(number).unwrap();
        }
        expect_blocks(&mut *source, 1..3).await;
    }
}

#[tokio::test]
async fn a_file_that_is_cut_off_is_noticed_though_there_is_nothing_to_read_and_no_credit() {
    let place = Place::in_file();
    let mut source = open(&place).await;
    let producer = place.connect(&mut *source).await;
    assert_quiet(&mut *source, Duration::from_millis(10)).await;
    producer.memory.set_len(0).unwrap();
    assert_eq!(expect_broken(&mut *source).await, CUT_OFF);
}

/// Cuts the file off at any moment of a busy ring.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_ring_that_is_cut_off_again_and_again_alters_and_doubles_no_key() {
    let place = Place::in_file();
    let mut source = open_with(SharedMemoryConfig {
        heartbeat_timeout_ms: 0,
        ..place.config()
    })
    .await;
    source.grant(1_000_000);
    let mut next = 0;
    for round in 0..4_u64 {
        let mut producer = place.connect(&mut *source).await;
        // Another process's mapping, in truth: this one must not touch it after the cut.
        let memory = producer.memory.try_clone().unwrap();
        let first = next;
        let writing = tokio::task::spawn_blocking(move || {
            for number in first..first + 100 + 37 * round {
                while producer.send(number).is_err() {}
            }
            memory.set_len(DATA * (round % 3)).unwrap();
            // The connection stays: what tells is the memory.
            producer
        });
        let broken = loop {
            match event(&mut *source).await {
                (Event::Key(got), bytes) => {
                    assert_eq!(got.metadata.qkd_key_id.as_str(), next.to_string());
                    assert_eq!(bytes, block(next).1, "block {next} is altered");
                    settle(&mut *source, next, Settlement::Stored);
                    next += 1;
                }
                (Event::Corrupt { .. }, _) => {}
                (Event::Detached { reason }, _) => break reason,
                (other, _) => panic!("{other:?}"),
            }
        };
        assert_eq!(broken, DetachReason::BrokeRules);
        drop(writing.await.unwrap());
    }
}

#[tokio::test]
async fn two_drivers_do_not_share_a_path() {
    let place = Place::in_file();
    let source = open(&place).await;
    let second = DriverConfig::SharedMemory(place.config()).open();
    let error = second.err().unwrap();
    assert!(matches!(error, OpenError::RingFile { .. }));
    let text = error.to_string();
    assert!(text.contains("another program has its ring"), "{text}");
    assert_eq!(left(&place), 2, "the first one's are untouched");
    drop(source);
    assert_eq!(left(&place), 0);
}

#[tokio::test]
async fn a_ring_that_a_killed_bridge_left_is_replaced_and_its_producer_comes_to_the_next() {
    let place = Place::in_file();
    let path = place.path();
    let mut bridge = child("a_bridge_process", BRIDGE_VARIABLE, &path);
    let first = tokio::task::spawn_blocking(move || Connected::in_file(&path).unwrap());
    let mut first = first.await.unwrap();
    first.send(1).unwrap();
    bridge.0.kill().unwrap();
    bridge.0.wait().unwrap();
    assert_eq!(left(&place), 2, "ring and FIFO are left behind");
    let told = rustix::io::write(&first.wakeup, &[1]);
    assert_eq!(
        told,
        Err(rustix::io::Errno::PIPE),
        "the producer hears of it"
    );
    drop(first);
    assert!(Connected::try_file(&place.path()).is_err());

    let mut source = open(&place).await;
    assert_eq!(left(&place), 2, "a ring and its FIFO, and no other");
    source.grant(10);
    let mut second = place.connect(&mut *source).await;
    second.send(1).unwrap();
    expect_blocks(&mut *source, 1..2).await;
}

#[tokio::test]
async fn a_ring_has_one_producer_at_a_time_and_is_used_once() {
    let place = Place::in_file();
    let mut source = open(&place).await;
    source.grant(10);
    let first = place.connect(&mut *source).await;
    assert!(Connected::try_file(&place.path()).is_err());
    drop(first);
    // Not polled meanwhile: the ring is still the old one.
    assert!(Connected::try_file(&place.path()).is_err());
    // That attempt had the FIFO open for a moment.
    assert_eq!(event(&mut *source).await.0, CLOSED);
    let mut second = place.connect(&mut *source).await;
    second.send(1).unwrap();
    expect_blocks(&mut *source, 1..2).await;
}

#[tokio::test]
async fn owner_and_mode_let_in_whom_the_configuration_names() {
    let place = Place::in_file();
    let source = open(&place).await;
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&place.path()), 0o600);
    drop(source);
    let gid = nix::unistd::getegid().as_raw();
    let _source = open_with(SharedMemoryConfig {
        peer_gid: Some(gid),
        ..place.config()
    })
    .await;
    let ring = fs::metadata(place.path()).unwrap();
    assert_eq!((ring.mode() & 0o777, ring.gid()), (0o660, gid));
    let fifo = fs::read_dir(place.0.path()).unwrap();
    let fifo = fifo
        .map(|entry| entry.unwrap().path())
        .find(|path| *path != place.path());
    assert_eq!(mode(&fifo.unwrap()), 0o620);
}

#[test]
fn a_file_is_refused_unless_its_producer_is_trusted() {
    let read = |settings: &str| {
        let text = format!("kind = \"shared-memory\"\n{settings}");
        toml::from_str::<DriverConfig>(&text).map_err(|error| error.message().to_owned())
    };
    let file = "file = \"/dev/shm/tx-1.ring\"";
    for (settings, expected) in [
        (file.to_owned(), "set `trusted = true`"),
        (format!("{file}\ntrusted = false"), "set `trusted = true`"),
        (
            format!("{file}\ntrusted = true\npeer_uids = [1]"),
            "`peer_gid`",
        ),
        (format!("{file}\nsocket = \"/x\"\ntrusted = true"), "one of"),
        ("trusted = true".to_owned(), "one of"),
        ("socket = \"/x\"\ntrusted = true".to_owned(), "is sealed"),
        ("socket = \"/x\"\npeer_gid = 1".to_owned(), "`peer_uids`"),
    ] {
        let refused = read(&settings).unwrap_err();
        assert!(refused.contains(expected), "{settings}: {refused}");
    }
    let config = SharedMemoryConfig::in_file("/dev/shm/tx-1.ring");
    assert_eq!(
        read(&format!("{file}\ntrusted = true")),
        Ok(DriverConfig::SharedMemory(config))
    );
}

#[tokio::test]
async fn where_a_ring_cannot_be_is_named_with_what_to_do() {
    let refused = |config: SharedMemoryConfig| {
        let error = DriverConfig::SharedMemory(config).open().err().unwrap();
        error.to_string()
    };
    // No system has it on a tmpfs.
    let disk = SharedMemoryConfig::in_file("/proc/tx-1.ring");
    assert!(refused(disk).contains("/dev/shm"));

    let place = Place::in_file();
    fs::write(place.path(), "a file of somebody").unwrap();
    assert!(refused(place.config()).contains("no ring"));
    assert_eq!(fs::read(place.path()).unwrap(), b"a file of somebody");
    fs::remove_file(place.path()).unwrap();

    let crooked = SharedMemoryConfig {
        capacity_bytes: 5000,
        ..place.config()
    };
    assert!(refused(crooked).contains("`capacity_bytes`"));
    fs::set_permissions(place.0.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(refused(place.config()).contains("chmod o-w"));
    assert_eq!(left(&place), 0);
}

#[tokio::test]
async fn what_a_killed_process_had_written_is_delivered_and_the_next_goes_on() {
    let place = Place::in_file();
    let mut source = open(&place).await;
    source.grant(100);
    let mut child = producer_process(&place.path(), None);
    assert_eq!(event(&mut *source).await.0, place.attached());
    expect_blocks(&mut *source, 0..1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    expect_blocks(&mut *source, 1..10).await;
    assert_eq!(event(&mut *source).await.0, CLOSED);
    settle(&mut *source, 0, Settlement::Stored);
    let _child = producer_process(&place.path(), None);
    assert_eq!(event(&mut *source).await.0, place.attached());
    expect_blocks(&mut *source, 10..11).await;
}

#[tokio::test]
async fn a_process_that_cuts_the_file_off_and_dies_of_it_does_not_take_the_driver_along() {
    let place = Place::in_file();
    let mut source = open(&place).await;
    source.grant(100);
    let mut child = producer_process(&place.path(), Some(CUT_VARIABLE));
    assert_eq!(event(&mut *source).await.0, place.attached());
    let (mut came, mut broken) = (0, 0);
    loop {
        match event(&mut *source).await {
            (Event::Key(_), bytes) => {
                assert_eq!(bytes, block(came).1);
                came += 1;
            }
            (Event::Corrupt { .. }, _) => broken += 1,
            (Event::Detached { reason }, _) => {
                assert_eq!(reason, DetachReason::BrokeRules);
                break;
            }
            (other, _) => panic!("{other:?}"),
        }
    }
    assert_eq!(broken, 1);
    assert!(
        !child.0.wait().unwrap().success(),
        "its own mapping is gone"
    );
    let _child = producer_process(&place.path(), None);
    while !matches!(event(&mut *source).await.0, Event::Attached { .. }) {}
    // Nothing was durable: it begins again, and what came is not doubled.
    let (got, bytes) = key(&mut *source).await;
    assert_eq!(got.metadata.qkd_key_id.as_str(), came.to_string());
    assert_eq!(bytes, block(came).1);
}

/// Only in a child of another test: a driver that waits to be killed.
#[tokio::test]
async fn a_bridge_process() {
    let Some(path) = std::env::var_os(BRIDGE_VARIABLE) else {
        return;
    };
    let mut source = open_with(SharedMemoryConfig::in_file(path)).await;
    loop {
        event(&mut *source).await;
    }
}

/// Only in a child of another test: sends ten blocks beyond what is durable and waits to be killed, or
/// cuts the file off and goes on writing.
#[test]
fn a_producer_process() {
    let cut = std::env::var_os(CUT_VARIABLE);
    let Some(path) = std::env::var_os(PATH_VARIABLE).or_else(|| cut.clone()) else {
        return;
    };
    let mut producer = Connected::in_file(Path::new(&path)).unwrap();
    let last = producer.greeting.last_durable;
    let first = last.map_or(0, |number| number + 1);
    if cut.is_some() {
        for number in first..first + 5 {
            producer.send(number).unwrap();
        }
        while producer.producer.is_drained() == Ok(false) {
            std::thread::yield_now();
        }
        producer.memory.set_len(0).unwrap();
        producer.send(first + 5).unwrap();
        return;
    }
    for number in first..first + 10 {
        producer.send(number).unwrap();
    }
    std::thread::sleep(Duration::from_secs(60));
}

const PATH_VARIABLE: &str = "RING_FILE_PRODUCER_PATH";
const CUT_VARIABLE: &str = "RING_FILE_PRODUCER_CUTS";
const BRIDGE_VARIABLE: &str = "RING_FILE_BRIDGE_PATH";

struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn producer_process(path: &Path, cut: Option<&str>) -> Running {
    child("a_producer_process", cut.unwrap_or(PATH_VARIABLE), path)
}

/// This program once more, with nothing but one of its tests.
fn child(test: &str, variable: &str, path: &Path) -> Running {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]);
    command.env(variable, path);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Running(command.spawn().unwrap())
}
