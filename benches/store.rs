//! Does the cost of a key depend on how many are in stock?
//!
//! A *key* is 256 bits for an application. What is stored, sealed and listed is a *segment*, and keys are
//! cut from it: so 10^3, 10^6 and 10^7 keys lie in segments of 4 KiB (relayed units, 128 keys each), and
//! 2 * 10^6 keys in a million segments of 64 bytes, two keys each, which is more segments than keys ever
//! make elsewhere. Memory goes by the segment, not by the key.
//!
//! Taking, following and confirming, over LMDB. The smallest stock is the rival of the largest. The store
//! lies in memory (`/dev/shm`) where that is, so that the time is the program's and not the disk's; every
//! 64 operations are one commit, which is part of the time, as is the end of segments that are used up.
//! What a measurement takes is put back between, so that the stock stays as large as it is called.
//! `confirm` is per segment.
//!
//! Before each size the bench prints the memory that the process took for the stock, per segment and per
//! key, beside the estimate of `RAM_BYTES_PER_SEGMENT`; while it fills the stock, how far it is.
#![allow(missing_docs, reason = "a bench")]
#![allow(clippy::unwrap_used, reason = "a bench that cannot go on ends")]

use std::{
    path::Path,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qkd_kma::{
    store::{Bench, RAM_BYTES_PER_SEGMENT},
    vault::{KekSource, LmdbOptions, open_lmdb},
};
use qkd_secmem::{Locking, Pool, PoolConfig};
use zeroize::Zeroizing;

/// Keys in stock, and the length of the segments that they lie in.
const STOCKS: [(u64, u32); 5] = [
    (1_000, 4096),
    (1_000_000, 4096),
    (10_000_000, 4096),
    (1_000, 64),
    (2_000_000, 64),
];
const KEY_BYTES: u32 = 32;
const COMMIT_EVERY: u64 = 64;
const SAY_EVERY: Duration = Duration::from_secs(2);

fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::TempDir::new_in(memory).unwrap()
    } else {
        tempfile::TempDir::new().unwrap()
    }
}

/// Private memory of this process, in bytes.
fn private_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|kib| kib.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}

/// Operations for which a stock is made ready at a time.
const AT_ONCE: u64 = 4096;

/// Time of `count` operations with their commits; what `ready` does for them is left out.
fn timed(
    bench: &mut Bench,
    count: u64,
    ready: impl Fn(&mut Bench, u64),
    mut operation: impl FnMut(&mut Bench),
) -> Duration {
    let mut time = Duration::ZERO;
    let mut left = count;
    while left > 0 {
        let now = left.min(AT_ONCE);
        ready(bench, now);
        let start = Instant::now();
        for at in 1..=now {
            operation(bench);
            if at % COMMIT_EVERY == 0 {
                bench.commit().unwrap();
            }
        }
        bench.commit().unwrap();
        time += start.elapsed();
        left -= now;
    }
    time
}

/// Segments that wait for their confirmation; those of the last time go.
fn answered(bench: &mut Bench, count: u64) {
    bench.forget_confirmed_beyond_stock();
    for _ in 0..count {
        bench.answer().unwrap();
    }
    bench.commit().unwrap();
}

/// As much key at either end as will be used.
fn refill(bench: &mut Bench, segment_bytes: u32, count: u64) {
    let per_segment = u64::from(segment_bytes / KEY_BYTES);
    for _ in 0..2 * count.div_ceil(per_segment) {
        bench.answer().unwrap();
        bench.confirm();
    }
    bench.commit().unwrap();
}

fn store(c: &mut Criterion) {
    for (keys, segment_bytes) in STOCKS {
        let test_run = std::env::args().any(|arg| arg == "--test");
        if test_run && keys > 1_000_000 {
            continue;
        }
        let dir = folder();
        let kek = KekSource::Raw(Zeroizing::new([1; 32]));
        let options = LmdbOptions { max_bytes: 4 << 30 };
        let pool = Pool::new(PoolConfig {
            capacity_bytes: 4 << 20,
            locking: Locking::Unlocked,
        });
        let segments = (keys * u64::from(KEY_BYTES))
            .div_ceil(u64::from(segment_bytes))
            .max(8);
        let before = private_bytes();
        let vault = Box::new(open_lmdb(&dir.path().join("store"), &kek, options).unwrap());
        let (began, mut said) = (Instant::now(), Instant::now());
        let mut progress = |stored: u64| {
            if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                let seconds = began.elapsed().as_secs();
                eprintln!("  {stored} of {segments} segments stored after {seconds} s");
            }
        };
        let made = Bench::new(vault, pool.unwrap(), segments, segment_bytes, &mut progress);
        let mut bench = made.unwrap();
        let grown = private_bytes().saturating_sub(before);
        println!(
            "{keys} keys in {segments} segments of {segment_bytes} bytes: {grown} bytes of memory, {} per segment, {:.1} per \
             key; documented {RAM_BYTES_PER_SEGMENT} per segment",
            grown / segments,
            grown as f64 / keys as f64
        );
        let refill = |bench: &mut Bench, count| refill(bench, segment_bytes, count);
        let stock = format!("{keys} in {segment_bytes} B");
        let mut group = c.benchmark_group("store");
        group.throughput(Throughput::Elements(1));
        group.sample_size(10);
        group.measurement_time(Duration::from_secs(1));
        group.warm_up_time(Duration::from_millis(300));
        group.bench_function(BenchmarkId::new("confirm", &stock), |b| {
            b.iter_custom(|count| timed(&mut bench, count, answered, Bench::confirm));
        });
        bench.forget_confirmed_beyond_stock();
        bench.commit().unwrap();
        group.bench_function(BenchmarkId::new("take", &stock), |b| {
            b.iter_custom(|count| timed(&mut bench, count, refill, |bench| bench.take(KEY_BYTES)));
        });
        group.bench_function(BenchmarkId::new("read and take", &stock), |b| {
            b.iter_custom(|count| {
                timed(&mut bench, count, refill, |bench| {
                    bench.read(KEY_BYTES);
                    bench.take(KEY_BYTES);
                })
            });
        });
        group.bench_function(BenchmarkId::new("follow", &stock), |b| {
            b.iter_custom(|count| {
                timed(&mut bench, count, refill, |bench| bench.follow(KEY_BYTES))
            });
        });
        group.finish();
    }
}

criterion_group!(benches, store);
criterion_main!(benches);
