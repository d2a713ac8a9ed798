//! The shared-memory driver and producers that are faulty, hostile or dead: no key is altered, doubled or
//! left behind, and the next producer finds a good ring.
#![allow(clippy::unwrap_used)]

use std::{
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use common::{
    assert_quiet,
    device::block,
    event,
    place::{DATA, Place, WRITE_POSITION, expect_blocks, expect_broken, settle},
    producer::{Connected, SESSION},
};
use qkd_drivers::{
    Alarm, AlarmCode, CorruptReason, DetachReason, DriverConfig, Event, ModuleState, Settlement,
    Severity, SharedMemoryConfig,
};
use qkd_handover::ring::RingFault;

mod common;

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
async fn a_session_that_changes_ends_the_ring() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(10);
    let mut producer = place.connect(&mut *source).await;
    producer.poke(0x0a0, &7_u64.to_le_bytes());
    producer.send(1).unwrap();
    let (got, want) = (7, SESSION.get());
    let fault = expect_broken(&mut *source).await;
    assert_eq!(fault, RingFault::Session { got, want });
}

/// A generation is in every record, so what an older ring holds is not taken for this one's.
#[tokio::test]
async fn a_record_of_an_older_ring_ends_the_ring() {
    let place = Place::new();
    let mut source = place.open();
    let mut producer = place.connect(&mut *source).await;
    producer.send(1).unwrap();
    let (got, want) = (
        producer.greeting.generation - 1,
        producer.greeting.generation,
    );
    producer.poke(DATA + 16, &got.to_le_bytes());
    source.grant(10);
    let fault = expect_broken(&mut *source).await;
    assert_eq!(fault, RingFault::Generation { got, want });
}

/// The producer overwrites records while they are read. Each comes as it was written, or ends the
/// ring: never a mixture.
#[tokio::test(flavor = "multi_thread")]
async fn a_producer_that_rewrites_records_while_they_are_read_passes_no_mixture() {
    let place = Place::new();
    let mut source = place.open();
    source.grant(1_000_000);
    let (mut delivered, mut broken) = (0, 0);
    let began = std::time::Instant::now();
    while broken < 3 {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "{delivered} {broken}"
        );
        let mut producer = loop {
            let path = place.path();
            let connecting = tokio::task::spawn_blocking(move || Connected::new(&path));
            while !matches!(event(&mut *source).await.0, Event::Attached { .. }) {}
            if let Ok(producer) = connecting.await.unwrap() {
                break producer;
            }
        };
        let next = delivered;
        let writing = tokio::task::spawn_blocking(move || {
            for number in next.. {
                while producer.send(number).is_err() {
                    if rustix::event::poll(
                        &mut [rustix::event::PollFd::new(
                            &producer.socket,
                            rustix::event::PollFlags::IN,
                        )],
                        Some(&rustix::event::Timespec {
                            tv_sec: 0,
                            tv_nsec: 0,
                        }),
                    ) != Ok(0)
                    {
                        return;
                    }
                }
                // Somewhere in the payload of a record that may be read just now.
                let word = 64 + number * 328 % 60_000 / 8 * 8;
                producer.poke(DATA + word, &[0x5a; 8]);
            }
        });
        loop {
            match event(&mut *source).await {
                (Event::Key(got), bytes) => {
                    let number: u64 = got.metadata.qkd_key_id.as_str().parse().unwrap();
                    assert_eq!(bytes, block(number).1, "block {number} is altered");
                    settle(&mut *source, number, Settlement::Stored);
                    delivered = number + 1;
                }
                (Event::Detached { .. }, _) => break,
                _ => broken += 1,
            }
        }
        writing.await.unwrap();
    }
    assert!(delivered > 0);
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
