//! The serial driver over pseudo-terminals, with a thread that plays the device.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::{path::PathBuf, time::Duration};

use common::{
    assert_quiet,
    device::{Device, Fault, block},
    event, key, wakes_while_idle,
};
use qkd_drivers::{
    Band, DetachReason, DriverConfig, Event, KeySource, Limits, Metric, ModuleState, OpenError,
    SerialConfig, Settlement, Value,
};
use qkd_handover::{block::BlockHeader, status::Status};
use tempfile::TempDir;

mod common;

fn clean() -> Fault {
    Box::new(|_| {})
}

/// A folder with the link that stands for `/dev/serial/by-id/...`.
struct Link(TempDir);

impl Link {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("usb-QKD_0001")
    }

    fn config(&self) -> SerialConfig {
        SerialConfig {
            answer_timeout_ms: 50,
            ..SerialConfig::new(self.path())
        }
    }

    fn open(&self) -> Box<dyn KeySource> {
        DriverConfig::Serial(self.config()).open().unwrap()
    }
}

fn attached(device: &str, session: u64) -> Event {
    Event::Attached {
        device: device.to_owned(),
        session: Some(session),
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

#[tokio::test]
async fn blocks_come_in_order_with_their_metadata_and_are_kept_until_they_are_settled() {
    let link = Link::new();
    let mut device = Device::new("tx-1", 7);
    device.offer(100..103);
    device.plug(&link.path(), clean());
    let config = SerialConfig {
        device: Some("tx-1".to_owned()),
        matching_module: Some("rx-1".parse().unwrap()),
        ..link.config()
    };
    let mut source = DriverConfig::Serial(config).open().unwrap();
    source.grant(10);
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 7));
    let (first, _) = key(&mut *source).await;
    let metadata = first.metadata;
    assert_eq!(metadata.qkd_key_id.as_str(), "100");
    assert_eq!(metadata.module.unwrap().as_str(), "tx-1");
    assert_eq!(metadata.matching_module.unwrap().as_str(), "rx-1");
    assert_eq!(metadata.generated_at.unwrap().0, 1100);
    expect_blocks(&mut *source, 101..103).await;

    // The last first: nothing is safe before the ones in front of it are.
    settle(&mut *source, 102, Settlement::Stored);
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    assert_eq!(device.sender().kept_blocks(), 3);
    settle(&mut *source, 100, Settlement::Dropped);
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    assert_eq!(device.sender().kept_blocks(), 2);
    settle(&mut *source, 101, Settlement::Quarantined);
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    assert_eq!(device.sender().kept_blocks(), 0);
}

#[tokio::test]
async fn the_device_sends_no_more_than_it_has_credit_for() {
    let link = Link::new();
    let mut device = Device::new("tx-1", 1);
    device.offer(0..20);
    device.plug(&link.path(), clean());
    let mut source = link.open();
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 1));
    assert_quiet(&mut *source, Duration::from_millis(100)).await;
    assert_eq!(device.sender().counters().sent, 0);
    source.grant(3);
    expect_blocks(&mut *source, 0..3).await;
    assert_quiet(&mut *source, Duration::from_millis(100)).await;
    assert_eq!(device.sender().counters().sent, 3);
    source.grant(17);
    expect_blocks(&mut *source, 3..20).await;
}

#[tokio::test]
async fn every_block_arrives_once_over_a_line_that_loses_and_damages_bytes() {
    for seed in 1..=4_u64 {
        let link = Link::new();
        let mut device = Device::new("tx-1", 1);
        device.offer(0..150);
        device.plug(&link.path(), noise(seed));
        let mut source = link.open();
        source.grant(8);
        let mut next = 0;
        let mut damaged = 0;
        while next < 150 {
            match event(&mut *source).await {
                (Event::Key(got), bytes) => {
                    let id = got.metadata.qkd_key_id;
                    assert_eq!(id.as_str(), next.to_string(), "seed {seed}");
                    assert_eq!(bytes, block(next).1, "seed {seed}");
                    source.settle(&id, Settlement::Stored);
                    source.grant(1);
                    next += 1;
                }
                (Event::Corrupt { .. }, _) => damaged += 1,
                (Event::Attached { .. }, _) => {}
                (other, _) => panic!("seed {seed}: {other:?}"),
            }
        }
        assert!(damaged > 0, "seed {seed} damaged nothing");
        let wait = device.wait_for(|sender| sender.kept_blocks() == 0);
        tokio::select! {
            () = wait => {}
            () = async { loop { event(&mut *source).await; } } => {}
        }
    }
}

#[tokio::test]
async fn a_lost_block_is_asked_for_without_waiting_for_the_device() {
    let link = Link::new();
    let hour = Duration::from_secs(3600);
    let mut device = Device::with_patience("tx-1", 1, hour);
    device.offer(8..10);
    // The first key frame; all else is shorter.
    let mut lost = false;
    device.plug(
        &link.path(),
        Box::new(move |piece| {
            if !lost && piece.len() > 300 {
                lost = true;
                piece.clear();
            }
        }),
    );
    let config = SerialConfig {
        answer_timeout_ms: 3_600_000,
        ..link.config()
    };
    let mut source = DriverConfig::Serial(config).open().unwrap();
    source.grant(4);
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 1));
    expect_blocks(&mut *source, 8..10).await;
    assert!(device.sender().counters().resent > 0);
}

/// Of 100 pieces, some lose a byte, have a bit flipped, a byte doubled, or vanish.
fn noise(seed: u64) -> Fault {
    let mut state = seed;
    let mut random = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % below
    };
    Box::new(move |piece| {
        if piece.is_empty() {
            return;
        }
        let at = random(piece.len());
        match random(100) {
            0..4 => drop(piece.remove(at)),
            4..8 => piece[at] ^= 1 << random(8),
            8..12 => piece.insert(at, piece[at]),
            12..16 => piece.clear(),
            _ => {}
        }
    })
}

#[tokio::test]
async fn a_device_that_is_plugged_in_again_goes_on_where_it_was() {
    let link = Link::new();
    let mut device = Device::new("tx-1", 5);
    device.offer(0..6);
    device.plug(&link.path(), clean());
    let mut source = link.open();
    source.grant(3);
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 5));
    expect_blocks(&mut *source, 0..3).await;
    settle(&mut *source, 0, Settlement::Stored);
    device.unplug();
    let (detached, _) = event(&mut *source).await;
    assert!(matches!(detached, Event::Detached { .. }), "{detached:?}");
    // Settled while the cable is out: told when it is in again.
    settle(&mut *source, 1, Settlement::Stored);
    source.grant(3);
    device.plug(&link.path(), clean());
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 5));
    expect_blocks(&mut *source, 3..6).await;
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    assert_eq!(device.sender().kept_blocks(), 4);
    for number in 2..6 {
        settle(&mut *source, number, Settlement::Stored);
    }
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    assert_eq!(device.sender().kept_blocks(), 0);
}

#[tokio::test]
async fn an_unplugged_port_is_not_polled_in_a_loop() {
    let link = Link::new();
    let mut device = Device::new("tx-1", 5);
    device.plug(&link.path(), clean());
    let mut source = link.open();
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 5));
    let wakes = wakes_while_idle(&mut *source, Duration::from_millis(400)).await;
    assert!(wakes <= 8, "woken {wakes} times with nothing to do");
    device.unplug();
    assert!(matches!(
        event(&mut *source).await.0,
        Event::Detached { .. }
    ));
    // 100, 200, 400 ms: three attempts in a second.
    let wakes = wakes_while_idle(&mut *source, Duration::from_millis(1000)).await;
    assert!(
        (1..=6).contains(&wakes),
        "woken {wakes} times while unplugged"
    );
}

#[tokio::test]
async fn a_device_that_began_anew_is_another_session() {
    let link = Link::new();
    let mut device = Device::new("tx-1", 5);
    device.offer(0..2);
    device.plug(&link.path(), clean());
    let mut source = link.open();
    source.grant(10);
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 5));
    expect_blocks(&mut *source, 0..2).await;
    device.unplug();
    assert!(matches!(
        event(&mut *source).await.0,
        Event::Detached { .. }
    ));
    let mut device = Device::new("tx-1", 6);
    device.offer(0..1);
    device.plug(&link.path(), clean());
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 6));
    expect_blocks(&mut *source, 0..1).await;
    // Block 1 belonged to the session that is over; 0 is the new one's.
    settle(&mut *source, 1, Settlement::Stored);
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    assert_eq!(device.sender().kept_blocks(), 1);
    settle(&mut *source, 0, Settlement::Stored);
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    assert_eq!(device.sender().kept_blocks(), 0);
}

#[tokio::test]
async fn what_was_not_settled_comes_again_after_a_restart() {
    let link = Link::new();
    let mut device = Device::new("tx-1", 5);
    device.offer(0..4);
    device.plug(&link.path(), clean());
    let mut source = link.open();
    source.grant(10);
    event(&mut *source).await;
    expect_blocks(&mut *source, 0..4).await;
    for number in [0, 1] {
        settle(&mut *source, number, Settlement::Stored);
    }
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    drop(source);
    let mut source = link.open();
    source.grant(10);
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 5));
    expect_blocks(&mut *source, 2..4).await;
}

#[tokio::test]
async fn another_device_than_the_configured_one_is_refused() {
    let link = Link::new();
    let mut device = Device::new("tx\n2", 5);
    device.offer(0..4);
    device.plug(&link.path(), clean());
    let config = SerialConfig {
        device: Some("tx-1".to_owned()),
        ..link.config()
    };
    let mut source = DriverConfig::Serial(config).open().unwrap();
    source.grant(10);
    let (expected, found) = ("tx-1".to_owned(), "tx\\n2".to_owned());
    let reason = DetachReason::OtherDevice { expected, found };
    assert_eq!(event(&mut *source).await.0, Event::Detached { reason });
    device.unplug();
    let mut device = Device::new("tx-1", 5);
    device.offer(0..1);
    device.plug(&link.path(), clean());
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 5));
    expect_blocks(&mut *source, 0..1).await;
}

#[tokio::test]
async fn another_device_after_an_unplugging_is_told_of_once() {
    let link = Link::new();
    let config = SerialConfig {
        device: Some("tx-1".to_owned()),
        ..link.config()
    };
    let mut source = DriverConfig::Serial(config).open().unwrap();
    assert!(matches!(
        event(&mut *source).await.0,
        Event::Detached { .. }
    ));
    let mut device = Device::new("tx-2", 5);
    device.plug(&link.path(), clean());
    let (expected, found) = ("tx-1".to_owned(), "tx-2".to_owned());
    let reason = DetachReason::OtherDevice { expected, found };
    assert_eq!(event(&mut *source).await.0, Event::Detached { reason });
    assert_quiet(&mut *source, Duration::from_millis(700)).await;
}

#[tokio::test]
async fn another_device_with_the_same_session_number_is_not_taken_for_the_first() {
    let link = Link::new();
    let mut first = Device::new("tx-1", 1);
    first.offer(0..3);
    first.plug(&link.path(), clean());
    let mut source = link.open();
    source.grant(10);
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 1));
    expect_blocks(&mut *source, 0..3).await;
    first.unplug();
    event(&mut *source).await;
    let mut second = Device::new("tx-2", 1);
    second.offer(50..53);
    second.plug(&link.path(), clean());
    assert_eq!(event(&mut *source).await.0, attached("tx-2", 1));
    expect_blocks(&mut *source, 50..53).await;
}

#[tokio::test]
async fn a_device_that_is_not_there_yet_is_waited_for() {
    let link = Link::new();
    let mut source = link.open();
    source.grant(1);
    let reason = DetachReason::CannotOpen {
        error: std::io::ErrorKind::NotFound,
    };
    assert_eq!(event(&mut *source).await.0, Event::Detached { reason });
    let mut device = Device::new("tx-1", 5);
    device.offer(0..1);
    device.plug(&link.path(), clean());
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 5));
    expect_blocks(&mut *source, 0..1).await;
}

#[tokio::test]
async fn what_a_device_says_becomes_events() {
    let link = Link::new();
    let mut device = Device::new("tx-1", 5);
    let (header, bytes) = block(1);
    let noisy = BlockHeader {
        qber_ppm: Some(90_000),
        ..header
    };
    device.sender().offer(noisy, &bytes).unwrap();
    let empty = BlockHeader {
        number: 2,
        key_bits: 0,
        ..header
    };
    device.sender().offer(empty, &[]).unwrap();
    device.sender().set_status(Status {
        state: Some(ModuleState::Running),
        qber_ppm: Some(120_000),
        ..Status::default()
    });
    device.plug(&link.path(), clean());
    let config = SerialConfig {
        limits: Limits {
            qber_warning_ppm: 85_000,
            ..Limits::default()
        },
        ..link.config()
    };
    let mut source = DriverConfig::Serial(config).open().unwrap();
    assert_eq!(event(&mut *source).await.0, attached("tx-1", 5));
    // A status that came before the answer to the hello is sent once; the one after it counts.
    let metric = |ppm, band| {
        let value = Value::QberPpm(ppm);
        Event::Metric(Metric { value, band })
    };
    assert_eq!(
        event(&mut *source).await.0,
        Event::State(ModuleState::Running)
    );
    let (absolute, warning) = (Band::AbsoluteOutOfRange, Band::OperationOutOfRange);
    assert_eq!(event(&mut *source).await.0, metric(120_000, absolute));
    source.grant(2);
    assert_eq!(key(&mut *source).await.0.qber_ppm, Some(90_000));
    assert_eq!(event(&mut *source).await.0, metric(90_000, warning));
    let id = "2".parse().unwrap();
    assert_eq!(event(&mut *source).await.0, Event::Empty { id });
    settle(&mut *source, 1, Settlement::Stored);
    assert_quiet(&mut *source, Duration::from_millis(50)).await;
    assert_eq!(device.sender().kept_blocks(), 0);
}

#[tokio::test]
async fn the_longest_block_of_a_frame_fits() {
    let link = Link::new();
    let mut device = Device::new("tx-1", 5);
    let mut source_bytes = vec![0x5a; 65_512];
    source_bytes[7] = 0;
    let header = BlockHeader {
        key_bits: 65_512 * 8,
        ..block(1).0
    };
    device.sender().offer(header, &source_bytes).unwrap();
    device.plug(&link.path(), clean());
    let mut source = link.open();
    source.grant(1);
    event(&mut *source).await;
    assert_eq!(source.max_block_bytes(), source_bytes.len());
    assert!(key(&mut *source).await.1 == source_bytes);
}

#[tokio::test]
async fn a_port_that_is_in_use_or_no_port_is_named_with_what_to_do() {
    let link = Link::new();
    let mut device = Device::new("tx-1", 5);
    device.plug(&link.path(), clean());
    let _first = link.open();
    let error = DriverConfig::Serial(link.config()).open().err().unwrap();
    assert!(matches!(error, OpenError::Port { .. }));
    let said = error.to_string();
    assert!(
        said.contains("usb-QKD_0001 as a serial port: this program uses it already"),
        "{said}"
    );

    let file = tempfile::NamedTempFile::new().unwrap();
    let error = DriverConfig::Serial(SerialConfig::new(file.path()))
        .open()
        .err()
        .unwrap();
    assert!(matches!(error, OpenError::Port { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("it is no serial port; to mend it: ls -l /dev/serial")
    );
}

#[test]
fn the_documented_configuration_is_read() {
    let text = r#"
        kind = "serial"
        path = "/dev/serial/by-id/x"
        baud = 921600
        rts_cts = false
        device = "tx-1"
        matching_module = "rx-1"
        answer_timeout_ms = 250
        limits = { qber_warning_ppm = 50000 }
    "#;
    let expected = SerialConfig {
        path: "/dev/serial/by-id/x".into(),
        baud: 921_600,
        rts_cts: false,
        device: Some("tx-1".to_owned()),
        matching_module: Some("rx-1".parse().unwrap()),
        answer_timeout_ms: 250,
        limits: Limits {
            qber_warning_ppm: 50_000,
            qber_absolute_ppm: 110_000,
        },
    };
    assert_eq!(toml::from_str(text), Ok(DriverConfig::Serial(expected)));
    let wrong = "kind = \"serial\"\npath = \"/x\"\nlimits = { qber = 1 }";
    assert!(toml::from_str::<DriverConfig>(wrong).is_err());
}
