//! `xor`: one-time-pad XOR in place, every backend beside a plain copy.
//!
//! Question: is XOR bound by memory, or does the loop cost anything? A copy reads one stream where
//! XOR reads two, so a backend near `memcpy` has nothing left to win.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qkd_bridge::bench::noise;
use qkd_kernels::Backend;

/// 32 B is one AES-256 key, 1 KiB lies in the first-level cache, 64 KiB in the second, 1 MiB is
/// the largest that two operands may have there.
const SIZES_BYTES: [usize; 4] = [32, 1 << 10, 64 << 10, 1 << 20];

fn xor(c: &mut Criterion) {
    let mut group = c.benchmark_group("xor");
    for size in SIZES_BYTES {
        group.throughput(Throughput::Bytes(size as u64));
        let pad = noise(size, 1);
        let mut data = noise(size, 2);
        group.bench_function(BenchmarkId::new("memcpy", size), |b| {
            b.iter(|| black_box(&mut data[..]).copy_from_slice(black_box(&pad)));
        });
        for backend in Backend::all() {
            let mut data = noise(size, 2);
            check(backend, &data, &pad);
            group.bench_function(BenchmarkId::new(backend.name(), size), |b| {
                b.iter(|| backend.xor_in_place(black_box(&mut data), black_box(&pad)));
            });
        }
    }
    group.finish();
}

fn check(backend: Backend, data: &[u8], pad: &[u8]) {
    let mut out = data.to_vec();
    backend.xor_in_place(&mut out, pad);
    assert!(out.iter().zip(data).zip(pad).all(|((o, d), p)| *o == d ^ p));
}

criterion_group!(benches, xor);
criterion_main!(benches);
