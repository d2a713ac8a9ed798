//! A port at 12 Mbaud and a ring at 1 Gb/s, for a minute each, while every other core is busy: nothing is
//! lost, nothing is sent again, and what is behind stays small.
//!
//! ```sh
//! cargo test --release -p qkd-drivers --test paced -- --ignored --nocapture --test-threads 1
//! ```
//!
//! `QKD_SECONDS` sets another time. Not part of `cargo test`: it wants the machine for itself.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "times and counts of a minute fit"
)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{device::Device, event, key, producer::Connected};
use qkd_drivers::{DriverConfig, KeySource, SerialConfig, Settlement, SharedMemoryConfig};
use qkd_handover::{block::BlockHeader, ring::WriteError};

mod common;

/// How much may wait before the driver counts as left behind.
const BEHIND: Duration = Duration::from_millis(500);

fn time() -> Duration {
    let seconds = std::env::var("QKD_SECONDS").map_or(60, |text| text.parse().unwrap());
    Duration::from_secs(seconds)
}

/// Keeps all cores but one busy, until it is dropped.
struct Busy(Arc<AtomicBool>);

impl Busy {
    fn start() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let cores = thread::available_parallelism().unwrap().get();
        for _ in 1..cores {
            let over = over.clone();
            thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    std::hint::black_box((0..10_000_u64).sum::<u64>());
                }
            });
        }
        Self(over)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn header(number: u64, key: &[u8]) -> BlockHeader {
    BlockHeader {
        number,
        generated_at: None,
        key_bits: u32::try_from(8 * key.len()).unwrap(),
        qber_ppm: None,
    }
}

/// Blocks of one length, each with its number in front.
fn numbered(number: u64, key: &mut [u8]) {
    key[..8].copy_from_slice(&number.to_le_bytes());
}

/// Takes blocks from the source until as many have come; says how far behind it was at most.
async fn take(source: &mut dyn KeySource, blocks: u64, made: &AtomicU64) -> u64 {
    let mut behind = 0;
    for number in 0..blocks {
        let (block, bytes) = key(source).await;
        assert_eq!(bytes[..8], number.to_le_bytes(), "a block is missing");
        source.grant(1);
        source.settle(&block.metadata.qkd_key_id, Settlement::Stored);
        behind = behind.max(made.load(Ordering::Relaxed) - number);
    }
    behind
}

/// 8N1: ten line bits for a byte.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a minute and the whole machine; the command is above"]
async fn a_port_at_12_mbaud_has_no_gap_while_the_other_cores_are_busy() {
    const LINE_BYTES_PER_S: f64 = 12_000_000.0 / 10.0;
    const KEY_BYTES: usize = 4096;
    // Header, check sequence, COBS and delimiters.
    const FRAME_BYTES: f64 = KEY_BYTES as f64 + 48.0 + 18.0;
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("port");
    let mut device = Device::with_patience("tx-1", 1, Duration::from_secs(5));
    device.plug(&link, Box::new(|_| {}));
    let mut config = SerialConfig::new(&link);
    config.baud = 12_000_000;
    let mut source = DriverConfig::Serial(config).open().unwrap();
    source.grant(4096);
    event(&mut *source).await;
    let _busy = Busy::start();
    let made = Arc::new(AtomicU64::new(0));
    let blocks = (time().as_secs_f64() * LINE_BYTES_PER_S / FRAME_BYTES) as u64;
    let (sender, counted) = (device.sender.clone(), made.clone());
    let began = Instant::now();
    let pacing = thread::spawn(move || {
        let mut key = vec![0x5a; KEY_BYTES];
        for number in 0..blocks {
            let due = Duration::from_secs_f64(number as f64 * FRAME_BYTES / LINE_BYTES_PER_S);
            thread::sleep(due.saturating_sub(began.elapsed()));
            numbered(number, &mut key);
            let offered = sender.lock().unwrap().offer(header(number, &key), &key);
            offered.unwrap();
            counted.store(number + 1, Ordering::Relaxed);
        }
    });
    let behind = take(&mut *source, blocks, &made).await;
    pacing.join().unwrap();
    let took = began.elapsed();
    let counters = device.sender().counters();
    let behind_s = behind as f64 * FRAME_BYTES / LINE_BYTES_PER_S;
    println!(
        "12 Mbaud: {blocks} blocks of {KEY_BYTES} bytes in {took:?}, behind {behind_s:.3} s at most, {counters:?}"
    );
    assert_eq!((counters.resent, counters.timeouts), (0, 0));
    assert!(behind_s < BEHIND.as_secs_f64(), "{behind_s} s behind");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a minute and the whole machine; the command is above"]
async fn a_ring_at_1_gigabit_per_second_has_no_gap_while_the_other_cores_are_busy() {
    const BYTES_PER_S: f64 = 1e9 / 8.0;
    const KEY_BYTES: usize = 16 << 10;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("ring.sock");
    let driver = DriverConfig::SharedMemory(SharedMemoryConfig {
        // Some 130 ms: longer than a scheduler keeps a task waiting.
        capacity_bytes: 16 << 20,
        ..SharedMemoryConfig::new(&socket)
    });
    let mut source = driver.open().unwrap();
    source.grant(65_536);
    let connecting = tokio::task::spawn_blocking(move || Connected::new(&socket).unwrap());
    event(&mut *source).await;
    let mut connected = connecting.await.unwrap();
    let _busy = Busy::start();
    let made = Arc::new(AtomicU64::new(0));
    let blocks = (time().as_secs_f64() * BYTES_PER_S / KEY_BYTES as f64) as u64;
    let counted = made.clone();
    let began = Instant::now();
    let pacing = thread::spawn(move || {
        let mut key = vec![0x5a; KEY_BYTES];
        for number in 0..blocks {
            let due = Duration::from_secs_f64(number as f64 * KEY_BYTES as f64 / BYTES_PER_S);
            let early = due.saturating_sub(began.elapsed());
            // A sleep takes 50 us and more; one block is due every 131 us.
            if early > Duration::from_millis(1) {
                thread::sleep(early);
            }
            numbered(number, &mut key);
            let now_ns = began.elapsed().as_nanos() as u64;
            connected.producer.beat(now_ns, None, 0);
            match connected.producer.write_block(&header(number, &key), &key) {
                Ok(sleeps) => connected.wake_if(sleeps),
                // A module cannot wait: this block would be lost.
                Err(WriteError::Full { .. }) => panic!("no room for block {number}"),
                Err(error) => panic!("{error}"),
            }
            counted.store(number + 1, Ordering::Relaxed);
        }
        // The ring is read to its end while this side of it is there.
        connected
    });
    let behind = take(&mut *source, blocks, &made).await;
    let took = began.elapsed();
    drop(pacing.join().unwrap());
    let behind_s = behind as f64 * KEY_BYTES as f64 / BYTES_PER_S;
    println!(
        "1 Gb/s: {blocks} blocks of {KEY_BYTES} bytes in {took:?}, behind {behind_s:.3} s at most"
    );
    assert!(behind_s < BEHIND.as_secs_f64(), "{behind_s} s behind");
}
