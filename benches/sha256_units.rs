//! `sha256_units`: SHA-256 of many units of one length, what the pipeline spends its time on.
//!
//! Question: how much faster than one `sha2` call per unit is hashing many units at once? `batch`
//! is what the pipeline calls; the backends show what other CPUs get. One core; the units are in
//! the second-level cache, as the pipeline's blocks are.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qkd_bridge::bench::{
    noise,
    sha256_units::{check, one_by_one},
};
use qkd_kernels::Backend;

/// 32 B is one AES-256 key, 256 B a short key unit, 4 KiB one bulk unit, 64 KiB one arena block.
const UNIT_BYTES: [usize; 4] = [32, 256, 4 << 10, 64 << 10];

/// The pipeline's chunk, and never fewer units than there are lanes.
const CHUNK_BYTES: usize = 128 << 10;
const FEWEST_UNITS: usize = 16;

fn sha256_units(c: &mut Criterion) {
    let mut group = c.benchmark_group("sha256_units");
    for unit_bytes in UNIT_BYTES {
        let units = (CHUNK_BYTES / unit_bytes).max(FEWEST_UNITS);
        let data = noise(units * unit_bytes, 1);
        let mut digests = vec![[0; 32]; units];
        group.throughput(Throughput::Bytes(data.len() as u64));
        group.bench_function(BenchmarkId::new("sha2", unit_bytes), |b| {
            b.iter(|| one_by_one(black_box(&data), unit_bytes, black_box(&mut digests)));
        });
        let batch = [("batch", Backend::detect())];
        let backends = Backend::all().map(|backend| (backend.name(), backend));
        for (name, backend) in batch.into_iter().chain(backends) {
            check(backend, &data, unit_bytes);
            group.bench_function(BenchmarkId::new(name, unit_bytes), |b| {
                b.iter(|| {
                    backend.sha256_units(black_box(&data), unit_bytes, black_box(&mut digests));
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, sha256_units);
criterion_main!(benches);
