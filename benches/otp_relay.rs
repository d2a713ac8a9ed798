//! `otp_relay`: what a relay node does to each unit: XOR with pad, tag the ciphertext, wipe the pad.
//!
//! Question: what does a hop cost beyond the memory traffic, and what does doing it in one pass
//! win? From the second round on the pad is zeros, for the first has wiped it; no step's time
//! depends on a byte's value. Masks are left out everywhere: 16 bytes a unit.

use std::hint::black_box;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use qkd_bridge::bench::{
    noise,
    otp_relay::{HEADER, KEY, check, hmac, naive, passes, polyval, zip_polyval},
};
use qkd_kernels::Backend;

/// 4 KiB is one bulk unit, 64 KiB one arena block, 1 MiB the largest batch of a link.
const SIZES_BYTES: [usize; 3] = [4 << 10, 64 << 10, 1 << 20];

fn otp_relay(c: &mut Criterion) {
    let mut group = c.benchmark_group("otp_relay");
    let backend = Backend::detect();
    let key = backend.tag_key(&KEY);
    let (polyval, hmac) = (polyval(), hmac());
    for size in SIZES_BYTES {
        check(backend, &key, &polyval, size);
        group.throughput(Throughput::Bytes(size as u64));
        case(&mut group, "naive", size, |data, pad| {
            naive(&hmac, data, pad)
        });
        case(&mut group, "zip_polyval", size, |data, pad| {
            zip_polyval(&polyval, data, pad)
        });
        aes_gcm(&mut group, size);
        case(&mut group, "passes", size, |data, pad| {
            passes(backend, &key, data, pad)
        });
        case(&mut group, "fused", size, |data, pad| {
            key.encrypt_tag_and_wipe(&HEADER, data, pad)
        });
    }
    group.finish();
}

fn case<T>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    size: usize,
    hop: impl Fn(&mut [u8], &mut [u8]) -> T,
) {
    let (mut data, mut pad) = (noise(size, 1), noise(size, 2));
    group.bench_function(BenchmarkId::new(name, size), |b| {
        b.iter(|| hop(black_box(&mut data), black_box(&mut pad)));
    });
}

/// For scale: the computational alternative, with no pad to read or wipe.
fn aes_gcm(group: &mut BenchmarkGroup<'_, WallTime>, size: usize) {
    let unbound = UnboundKey::new(&AES_256_GCM, &[7; 32]).expect("32 bytes are a key");
    let key = LessSafeKey::new(unbound);
    case(group, "aes_gcm", size, |data, _| {
        let nonce = Nonce::assume_unique_for_key([1; 12]);
        let tag = key.seal_in_place_separate_tag(nonce, Aad::from(HEADER), data);
        tag.expect("the data is short enough")
    });
}

criterion_group!(benches, otp_relay);
criterion_main!(benches);
