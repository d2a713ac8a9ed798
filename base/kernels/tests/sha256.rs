//! SHA-256 of every backend against NIST's vectors and the `sha2` crate.

use proptest::prelude::*;
use qkd_kernels::Backend;
use sha2::{Digest, Sha256};

/// Repeatable noise; equal seeds give equal bytes.
fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let step = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..len).map(step).collect()
}

fn check(backend: Backend, data: &[u8], unit_bytes: usize) {
    let units = data.len() / unit_bytes;
    let mut digests = vec![[0; 32]; units];
    backend.sha256_units(data, unit_bytes, &mut digests);
    for (index, (unit, digest)) in data.chunks(unit_bytes).zip(&digests).enumerate() {
        let expected: [u8; 32] = Sha256::digest(unit).into();
        assert_eq!(
            *digest,
            expected,
            "{}: unit {index} of {units}, {unit_bytes} bytes",
            backend.name()
        );
    }
}

/// FIPS 180-4 examples as published by NIST: one block, two blocks, a million letters.
#[test]
fn published_vectors_hold_in_every_lane() {
    let million = vec![b'a'; 1_000_000];
    let cases: [(&[u8], &str); 3] = [
        (
            b"abc",
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        ),
        (
            b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
        (
            &million,
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
        ),
    ];
    for backend in Backend::all() {
        for (message, expected) in cases {
            let mut digests = [[0; 32]; 19];
            backend.sha256_units(&message.repeat(19), message.len(), &mut digests);
            for digest in digests {
                let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
                assert_eq!(hex, expected, "{}", backend.name());
            }
        }
    }
}

#[test]
fn every_unit_length_and_alignment_agrees_with_sha2() {
    let data = bytes(300 * 18 + 64, 1);
    for backend in Backend::all() {
        for offset in [0, 1, 3, 8, 17, 31, 32, 63] {
            for unit_bytes in 1..=300 {
                // 18 units: sixteen lanes and a pair.
                check(backend, &data[offset..][..unit_bytes * 18], unit_bytes);
            }
        }
    }
}

#[test]
fn every_number_of_units_agrees_with_sha2() {
    let data = bytes(100 * 40, 1);
    for backend in Backend::all() {
        for units in 0..=40 {
            for unit_bytes in [32, 64, 100] {
                check(backend, &data[..unit_bytes * units], unit_bytes);
            }
        }
    }
}

#[test]
#[should_panic(expected = "data is whole units")]
fn shorter_last_unit_is_refused() {
    Backend::detect().sha256_units(&[0; 63], 32, &mut [[0; 32]; 2]);
}

#[test]
#[should_panic(expected = "a unit has bytes")]
fn empty_units_are_refused() {
    Backend::detect().sha256_units(&[], 0, &mut []);
}

proptest! {
    #[test]
    fn any_data_agrees_with_sha2(
        unit_bytes in 1_usize..5000,
        data in prop::collection::vec(any::<u8>(), 5000..40_000),
    ) {
        let whole = data.len() - data.len() % unit_bytes;
        for backend in Backend::all() {
            check(backend, &data[..whole], unit_bytes);
        }
    }
}
