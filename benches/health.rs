//! `health`: repetition count, adaptive proportion and count of ones over incoming key.
//!
//! Question: can every bit be tested at line rate? `bytes` is the standard's text, sample by sample;
//! `one_pass` is what the pipeline calls; the backends show what other CPUs get.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qkd_bridge::bench::{health, noise};
use qkd_kernels::{Backend, HealthState};

/// 4 KiB is one driver block, 64 KiB one arena block.
const SIZES_BYTES: [usize; 2] = [4 << 10, 64 << 10];

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("health");
    for size in SIZES_BYTES {
        let data = noise(size, 1);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("bytes", size), |b| {
            let mut textbook = health::Textbook::default();
            b.iter(|| textbook.health(black_box(&data)));
        });
        let one_pass = [("one_pass", Backend::detect())];
        let backends = Backend::all().map(|backend| (backend.name(), backend));
        for (name, backend) in one_pass.into_iter().chain(backends) {
            health::check(backend, &data);
            group.bench_function(BenchmarkId::new(name, size), |b| {
                let mut state = HealthState::new();
                b.iter(|| backend.health(&mut state, black_box(&data)));
            });
        }
    }
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
