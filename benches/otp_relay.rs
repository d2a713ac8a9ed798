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
use hmac::{Hmac, KeyInit, Mac};
use polyval::Polyval;
use polyval::universal_hash::UniversalHash;
use qkd_kernels::{Backend, TagKey, wipe};
use sha2::Sha256;
use zeroize::Zeroize;

/// 4 KiB is one bulk unit, 64 KiB one arena block, 1 MiB the largest batch of a link.
const SIZES_BYTES: [usize; 3] = [4 << 10, 64 << 10, 1 << 20];

/// As long as a relay message's header.
const HEADER: [u8; 40] = [0x48; 40];
const KEY: [u8; 16] = *b"a key for a tag ";

fn otp_relay(c: &mut Criterion) {
    let mut group = c.benchmark_group("otp_relay");
    let backend = Backend::detect();
    let key = backend.tag_key(&KEY);
    let polyval = Polyval::new(&KEY.into());
    let hmac = Hmac::<Sha256>::new_from_slice(&KEY).expect("a key of any length");
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

/// What one writes first: a loop, the usual MAC, the usual wiping.
fn naive(hmac: &Hmac<Sha256>, data: &mut [u8], pad: &mut [u8]) -> [u8; 32] {
    zip_xor(data, pad);
    let mut hmac = hmac.clone();
    hmac.update(&HEADER);
    hmac.update(data);
    pad.zeroize();
    hmac.finalize().into_bytes().into()
}

/// The right algorithm from a crate, and a fast wipe.
fn zip_polyval(polyval: &Polyval, data: &mut [u8], pad: &mut [u8]) -> [u8; 16] {
    zip_xor(data, pad);
    let mut hasher = polyval.clone();
    hasher.update_padded(&HEADER);
    hasher.update_padded(data);
    let bits = |bytes: &[u8]| (bytes.len() as u64 * 8).to_le_bytes();
    hasher.update_padded(&[bits(&HEADER), bits(data)].concat());
    wipe(pad);
    hasher.finalize().into()
}

/// The kernels one after another.
fn passes(backend: Backend, key: &TagKey, data: &mut [u8], pad: &mut [u8]) -> [u8; 16] {
    backend.xor_in_place(data, pad);
    let tag = key.tag(&HEADER, data);
    wipe(pad);
    tag
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

fn zip_xor(data: &mut [u8], pad: &[u8]) {
    for (d, p) in data.iter_mut().zip(pad) {
        *d ^= p;
    }
}

type Hop<'a> = &'a dyn Fn(&mut [u8], &mut [u8]) -> [u8; 16];

fn check(backend: Backend, key: &TagKey, polyval: &Polyval, size: usize) {
    let (data, pad) = (noise(size, 1), noise(size, 2));
    let run = |hop: Hop<'_>| {
        let (mut data, mut pad) = (data.clone(), pad.clone());
        let tag = hop(&mut data, &mut pad);
        (tag, data, pad)
    };
    let expected = run(&|data, pad| zip_polyval(polyval, data, pad));
    assert_eq!(run(&|data, pad| passes(backend, key, data, pad)), expected);
    assert_eq!(
        run(&|data, pad| key.encrypt_tag_and_wipe(&HEADER, data, pad)),
        expected
    );
    assert!(expected.2.iter().all(|&b| b == 0));
}

/// Repeatable noise; equal seeds give equal bytes.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let step = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..len).map(step).collect()
}

criterion_group!(benches, otp_relay);
criterion_main!(benches);
