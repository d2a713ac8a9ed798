//! `pipeline`: QKD-keys of 128 KiB become hashed segments.
//!
//! Question: what does the whole stage cost beyond the hash, and what does it win over the obvious
//! program? `naive` queues bytes and hashes unit by unit, and does nothing else; `batch` is the hash
//! alone, of key that is there already; `stage` is all that the bridge does with a key between
//! driver and store. One thread.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qkd_bridge::bench::pipeline::{Bridge, Device, Naive, PAYLOAD_BYTES, check};
use qkd_kernels::Backend;

/// 32 B is one AES-256 key, 256 B a short key unit, 4 KiB one bulk unit.
const UNIT_BYTES: [usize; 3] = [32, 256, 4 << 10];

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("pipeline");
    let backend = Backend::detect();
    let mut device = Device::new();
    for unit_bytes in UNIT_BYTES {
        check(backend, unit_bytes);
        group.throughput(Throughput::Bytes(PAYLOAD_BYTES as u64));
        group.bench_function(BenchmarkId::new("naive", unit_bytes), |b| {
            let mut naive = Naive::default();
            b.iter(|| naive.segment(black_box(device.next_key()), unit_bytes));
        });
        group.bench_function(BenchmarkId::new("batch", unit_bytes), |b| {
            let data = qkd_bridge::bench::noise(PAYLOAD_BYTES, 1);
            let mut digests = vec![[0; 32]; PAYLOAD_BYTES / unit_bytes];
            b.iter(|| {
                backend.sha256_units(black_box(&data), unit_bytes, black_box(&mut digests));
            });
        });
        group.bench_function(BenchmarkId::new("stage", unit_bytes), |b| {
            let mut bridge = Bridge::new(backend, unit_bytes);
            b.iter(|| bridge.segment(black_box(device.next_key())));
        });
    }
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
