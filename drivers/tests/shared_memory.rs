//! The shared-memory driver over its real socket and ring.
#![allow(clippy::unwrap_used)]

use std::{num::NonZeroU64, time::Duration};

use common::{
    assert_quiet,
    device::block,
    event, key,
    place::{Place, assert_leaves_no_key, expect_blocks, settle},
    producer::Connected,
    wakes_while_idle,
};
use qkd_drivers::{
    Band, CorruptReason, DetachReason, DriverConfig, Event, Metric, OpenError, Settlement,
    SharedMemoryConfig, Value,
};
use qkd_handover::{block::BlockHeader, ring::WriteError, status::Status};

mod common;

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
async fn a_device_that_numbers_anew_is_another_session_and_loses_nothing() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(100);
    let mut producer = place.connect(&mut *source).await;
    for number in 0..90 {
        producer.send(number).unwrap();
    }
    expect_blocks(&mut *source, 0..90).await;
    (0..80).for_each(|number| settle(&mut *source, number, Settlement::Stored));
    assert_eq!(producer.producer.durable(), Some(79));
    drop(producer);
    event(&mut *source).await;

    // The same numbers, and other bits.
    let (path, anew) = (place.path(), NonZeroU64::new(0x52).unwrap());
    let connecting =
        tokio::task::spawn_blocking(move || Connected::in_session(&path, anew).unwrap());
    let Event::Attached { session, .. } = event(&mut *source).await.0 else {
        panic!("the device is attached");
    };
    assert_eq!(session, Some(0x52));
    let mut producer = connecting.await.unwrap();
    assert_eq!(producer.greeting.durable_in(anew), None);
    for number in 0..10 {
        producer.send(number).unwrap();
    }
    expect_blocks(&mut *source, 0..10).await;
    // What is settled of the session before is no block of this one.
    (80..90).for_each(|number| settle(&mut *source, number, Settlement::Stored));
    assert_eq!(producer.producer.durable(), None);
    (0..10).for_each(|number| settle(&mut *source, number, Settlement::Stored));
    assert_eq!(producer.producer.durable(), Some(9));
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
