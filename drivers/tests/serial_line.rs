//! The serial driver over a pseudo-terminal: every byte damaged in every way, and no processor time where
//! there is nothing to do.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    os::unix::fs::symlink,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use common::{
    device::{Device, Fault, block},
    event, key,
};
use nix::{
    pty::openpty,
    sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
    time::{ClockId, clock_gettime},
    unistd::ttyname,
};
use qkd_drivers::{DriverConfig, Event, KeySource, SerialConfig, Settlement, next_event};

mod common;

/// Processor time that a second of waiting may take.
const IDLE: Duration = Duration::from_millis(30);

fn open(path: &std::path::Path) -> Box<dyn KeySource> {
    let config = SerialConfig {
        answer_timeout_ms: 50,
        ..SerialConfig::new(path)
    };
    DriverConfig::Serial(config).open().unwrap()
}

/// Flips, doubles or drops one byte of every third piece: each byte of a frame in turn, in each way.
fn each_byte(harmed: Arc<AtomicUsize>) -> Fault {
    let mut pieces = 0;
    Box::new(move |bytes| {
        if bytes.is_empty() {
            return;
        }
        pieces += 1;
        if pieces % 3 != 0 {
            return;
        }
        let turn = harmed.fetch_add(1, Ordering::Relaxed);
        let at = turn / 3 % bytes.len();
        match turn % 3 {
            0 => bytes[at] ^= 1 << (turn % 8),
            1 => bytes.insert(at, bytes[at]),
            _ => drop(bytes.remove(at)),
        }
    })
}

#[tokio::test]
async fn every_block_comes_once_though_each_byte_of_a_frame_is_flipped_doubled_or_dropped() {
    const BLOCKS: u64 = 500;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let harmed = Arc::new(AtomicUsize::new(0));
    let mut device = Device::with_patience("tx-1", 5, Duration::from_millis(20));
    device.offer(0..BLOCKS);
    device.plug(&path, each_byte(harmed.clone()));
    let mut source = open(&path);
    source.grant(8);
    let mut next = 0;
    while next < BLOCKS {
        let (event, bytes) = event(&mut *source).await;
        let Event::Key(got) = event else { continue };
        assert_eq!(got.metadata.qkd_key_id.as_str(), next.to_string());
        assert_eq!(bytes, block(next).1, "block {next} is altered");
        source.settle(&got.metadata.qkd_key_id, Settlement::Stored);
        source.grant(1);
        next += 1;
    }
    // A key frame has 48 bytes around its key.
    let harmed = harmed.load(Ordering::Relaxed);
    assert!(harmed >= 3 * 48, "{harmed} bytes were harmed");
}

/// A terminal that keeps so many bytes for who does not read, and drops the others without a word.
fn unread_beyond(kept: usize, is_read: Arc<AtomicBool>, dropped: Arc<AtomicUsize>) -> Fault {
    let mut passed = 0;
    Box::new(move |bytes| {
        passed += bytes.len();
        if passed > kept && !is_read.load(Ordering::Relaxed) {
            dropped.fetch_add(bytes.len(), Ordering::Relaxed);
            bytes.clear();
        }
    })
}

#[tokio::test]
async fn what_a_terminal_that_nobody_reads_has_dropped_comes_again() {
    const BLOCKS: u64 = 200;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let (is_read, dropped) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let mut device = Device::with_patience("tx-1", 5, Duration::from_millis(20));
    device.offer(0..BLOCKS);
    device.plug(&path, unread_beyond(5120, is_read.clone(), dropped.clone()));
    let mut source = open(&path);
    source.grant(u32::try_from(BLOCKS).unwrap());
    let mut next = 0;
    while next < BLOCKS {
        let (event, bytes) = event(&mut *source).await;
        let Event::Key(got) = event else { continue };
        assert_eq!(got.metadata.qkd_key_id.as_str(), next.to_string());
        assert_eq!(bytes, block(next).1);
        if next == 0 {
            // The node is busy with something else, and the device goes on.
            while dropped.load(Ordering::Relaxed) < 20_000 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            is_read.store(true, Ordering::Relaxed);
        }
        next += 1;
    }
}

fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}

/// Waits a second in which nothing but losing the port may happen, and says what that cost this thread,
/// on which the driver runs.
async fn cost_of_waiting(source: &mut dyn KeySource) -> Duration {
    let mut out = vec![0; source.max_block_bytes()];
    let before = thread_time();
    let _ = tokio::time::timeout(Duration::from_secs(1), async {
        loop {
            let event = next_event(source, &mut out).await.unwrap();
            assert!(matches!(event, Event::Detached { .. }), "{event:?}");
        }
    })
    .await;
    thread_time() - before
}

#[tokio::test]
async fn a_port_that_is_not_there_costs_no_processor_time() {
    let folder = tempfile::tempdir().unwrap();
    let mut source = open(&folder.path().join("port"));
    source.grant(10);
    let cost = cost_of_waiting(&mut *source).await;
    assert!(cost < IDLE, "{cost:?} of a second");
}

#[tokio::test]
async fn a_port_that_is_open_and_silent_costs_no_processor_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    // Nobody reads the other end: what the driver sends fills the line and stays.
    let pty = openpty(None, None).unwrap();
    let mut modes = tcgetattr(&pty.slave).unwrap();
    cfmakeraw(&mut modes);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &modes).unwrap();
    symlink(ttyname(&pty.slave).unwrap(), &path).unwrap();
    let mut source = open(&path);
    source.grant(10);
    let cost = cost_of_waiting(&mut *source).await;
    assert!(cost < IDLE, "{cost:?} of a second");
}

/// An unplugged port gives end of file on every read, at once and for ever, and its path may still be
/// there.
#[tokio::test]
async fn a_port_that_ends_for_ever_costs_no_processor_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let mut device = Device::new("tx-1", 5);
    device.offer(0..1);
    device.plug(&path, Box::new(|_| {}));
    let mut source = open(&path);
    source.grant(10);
    event(&mut *source).await;
    key(&mut *source).await;
    device.unplug();
    // The link goes with the plug; one to a terminal that nobody holds is back.
    let pty = openpty(None, None).unwrap();
    symlink(ttyname(&pty.slave).unwrap(), &path).unwrap();
    drop(pty);
    let cost = cost_of_waiting(&mut *source).await;
    assert!(cost < IDLE, "{cost:?} of a second");
}
