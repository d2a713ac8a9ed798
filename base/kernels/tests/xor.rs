//! XOR of every backend against the definition.

use proptest::prelude::*;
use qkd_kernels::Backend;

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

#[test]
fn every_backend_length_and_alignment_gives_the_same_bytes() {
    for backend in Backend::all() {
        for offset in [0, 1, 7, 16, 31, 33, 48, 63] {
            // From 512 on, the start is brought to a cache line first.
            for len in (0..=300).chain(508..=520).chain(570..=580) {
                let (a, b, c) = (bytes(700, 1), bytes(700, 99), bytes(700, 200));
                let (a, b, c) = (&a[offset..][..len], &b[1..][..len], &c[2..][..len]);
                let two: Vec<_> = a.iter().zip(b).map(|(a, b)| a ^ b).collect();
                let three: Vec<_> = two.iter().zip(c).map(|(t, c)| t ^ c).collect();
                let mut out = vec![0xEE; offset + len + 1];

                backend.xor(&mut out[offset..][..len], a, b);
                assert_eq!(out[offset..][..len], two, "{}", backend.name());
                backend.xor3(&mut out[offset..][..len], a, b, c);
                assert_eq!(out[offset..][..len], three, "{}", backend.name());
                out[offset..][..len].copy_from_slice(a);
                backend.xor_in_place(&mut out[offset..][..len], b);
                assert_eq!(out[offset..][..len], two, "{}", backend.name());
                assert!(
                    out[..offset]
                        .iter()
                        .chain(&out[offset + len..])
                        .all(|&b| b == 0xEE)
                );
            }
        }
    }
}

#[test]
fn used_pad_is_wiped() {
    for backend in Backend::all() {
        for len in [0, 1, 33, 4096, 20_000] {
            let (mut data, mut pad) = (bytes(len, 1), bytes(len, 99));
            let expected: Vec<_> = data.iter().zip(&pad).map(|(d, p)| d ^ p).collect();
            backend.xor_and_wipe(&mut data, &mut pad);
            assert_eq!(data, expected);
            assert!(pad.iter().all(|&b| b == 0));
        }
    }
}

#[test]
#[should_panic(expected = "a one-time pad is as long as the data")]
fn short_pad_is_refused() {
    Backend::detect().xor_in_place(&mut [0; 32], &[0; 31]);
}

#[test]
#[should_panic(expected = "a one-time pad is as long as the data")]
fn short_pad_is_not_wiped_into_use() {
    Backend::detect().xor_and_wipe(&mut [0; 32], &mut [0; 31]);
}

#[test]
fn detected_backend_is_among_all_and_names_differ() {
    let names: Vec<_> = Backend::all().map(Backend::name).collect();
    assert!(names.contains(&Backend::detect().name()));
    assert_eq!(names[0], "portable");
    let mut unique = names.clone();
    unique.dedup();
    assert_eq!(names, unique);
}

proptest! {
    #[test]
    fn pad_taken_off_twice_gives_the_data_back(
        data in prop::collection::vec(any::<u8>(), 0..3000),
        seed in any::<u64>(),
    ) {
        for backend in Backend::all() {
            let pad = bytes(data.len(), seed);
            let mut there_and_back = data.clone();
            backend.xor_in_place(&mut there_and_back, &pad);
            backend.xor_in_place(&mut there_and_back, &pad);
            prop_assert_eq!(&there_and_back, &data);
        }
    }
}
