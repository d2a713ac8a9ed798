//! Tags of every backend against RFC 8452 and the `polyval` crate.

use polyval::Polyval;
use polyval::universal_hash::UniversalHash;
use proptest::prelude::*;
use qkd_kernels::{Backend, TagKey};

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

fn unhex<const N: usize>(hex: &str) -> [u8; N] {
    core::array::from_fn(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex"))
}

fn oracle(h: &[u8; 16], aad: &[u8], text: &[u8]) -> [u8; 16] {
    let mut hasher = Polyval::new(h.into());
    hasher.update_padded(aad);
    hasher.update_padded(text);
    let bits = |bytes: &[u8]| (bytes.len() as u64 * 8).to_le_bytes();
    hasher.update_padded(&[bits(aad), bits(text)].concat());
    hasher.finalize().into()
}

/// Encryption in one pass, with and without wiping, and the two steps of the receiver.
fn check(backend: Backend, h: &[u8; 16], aad: &[u8], text: &[u8], pad: &[u8]) {
    let key: TagKey = backend.tag_key(h);
    assert_eq!(
        key.tag(aad, text),
        oracle(h, aad, text),
        "{}: tag",
        backend.name()
    );

    let ciphertext: Vec<_> = text.iter().zip(pad).map(|(t, p)| t ^ p).collect();
    let expected = oracle(h, aad, &ciphertext);
    let mut data = text.to_vec();
    let tag = key.encrypt_and_tag(aad, &mut data, pad);
    assert_eq!(
        (tag, &data),
        (expected, &ciphertext),
        "{}: encrypt",
        backend.name()
    );

    let mut data = text.to_vec();
    let mut used = pad.to_vec();
    let tag = key.encrypt_tag_and_wipe(aad, &mut data, &mut used);
    assert_eq!(
        (tag, &data),
        (expected, &ciphertext),
        "{}: wipe",
        backend.name()
    );
    assert!(
        used.iter().all(|&b| b == 0),
        "{}: pad left over",
        backend.name()
    );

    assert_eq!(key.tag(aad, &data), tag);

    // A relay takes the first pad off and puts another on.
    let (mut old, mut new) = (pad.to_vec(), bytes(pad.len(), 5));
    let again: Vec<_> = text.iter().zip(&new).map(|(t, n)| t ^ n).collect();
    let mut relayed = data.clone();
    let tag = key.reencrypt_tag_and_wipe(aad, &mut relayed, &mut old, &mut new);
    assert_eq!(
        (tag, relayed),
        (oracle(h, aad, &again), again),
        "{}: re-encrypt",
        backend.name()
    );
    assert!(old.iter().chain(&new).all(|&b| b == 0));

    backend.xor_in_place(&mut data, pad);
    assert_eq!(data, text);
}

/// RFC 8452, appendix C.1: the POLYVAL inputs and results of some of its
/// AES-128-GCM-SIV examples.
#[test]
fn published_vectors_hold() {
    let h = unhex("d9b360279694941ac5dbc6987ada7377");
    let long = "02000000000000000000000000000000\
                03000000000000000000000000000000\
                04000000000000000000000000000000\
                05000000000000000000000000000000";
    let cases: [(&str, &str, &str); 6] = [
        ("", "", "00000000000000000000000000000000"),
        ("", "0100000000000000", "eb93b7740962c5e49d2a90a7dc5cec74"),
        (
            "",
            "010000000000000000000000",
            "48eb6c6c5a2dbe4a1dde508fee06361b",
        ),
        ("01", "0200000000000000", "b26781e7e2c1376f96bec195f3709b2a"),
        ("01", long, "ffcd05d5770f34ad9267f0a59994b15a"),
        (
            "010000000000000000000000",
            "02000000",
            "f6ce9d3dcd68a2fd603c7ecc18fb9918",
        ),
    ];
    for backend in Backend::all() {
        for (aad, text, expected) in cases {
            let aad: Vec<u8> = unhex_all(aad);
            let text: Vec<u8> = unhex_all(text);
            assert_eq!(
                backend.tag(&h, &aad, &text),
                unhex(expected),
                "{}",
                backend.name()
            );
        }
    }
}

fn unhex_all(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2)
        .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex"))
        .collect()
}

#[test]
fn every_length_and_alignment_agrees_with_polyval() {
    let (text, pad) = (bytes(1700, 3), bytes(1700, 77));
    let h = unhex("25629347589242761d31f826ba4b757b");
    for backend in Backend::all() {
        for len in (0..=300).chain(480..=530).chain(1000..=1100) {
            for offset in [0, 1, 8, 15, 16, 33, 63] {
                let aad = &text[5..5 + (len + offset) % 41];
                let (text, pad) = (&text[offset..][..len], &pad[64 - offset..][..len]);
                check(backend, &h, aad, text, pad);
            }
        }
    }
}

#[test]
fn every_length_of_associated_data_agrees_with_polyval() {
    let (aad, text) = (bytes(700, 9), bytes(50, 3));
    let h = unhex("25629347589242761d31f826ba4b757b");
    for backend in Backend::all() {
        for len in 0..=700 {
            assert_eq!(
                backend.tag(&h, &aad[..len], &text),
                oracle(&h, &aad[..len], &text)
            );
        }
    }
}

#[test]
fn key_is_not_printed() {
    for backend in Backend::all() {
        let key = backend.tag_key(&[0xAB; 16]);
        assert_eq!(format!("{key:?}"), format!("TagKey({})", backend.name()));
    }
}

#[test]
#[should_panic(expected = "a one-time pad is as long as the data")]
fn short_pad_is_refused() {
    Backend::detect()
        .tag_key(&[1; 16])
        .encrypt_and_tag(b"", &mut [0; 32], &[0; 31]);
}

#[test]
#[should_panic(expected = "a one-time pad is as long as the data")]
fn short_new_pad_is_refused() {
    Backend::detect().tag_key(&[1; 16]).reencrypt_tag_and_wipe(
        b"",
        &mut [0; 32],
        &mut [0; 32],
        &mut [0; 31],
    );
}

#[test]
#[should_panic(expected = "a one-time pad is as long as the data")]
fn long_pad_is_refused() {
    Backend::detect()
        .tag_key(&[1; 16])
        .encrypt_tag_and_wipe(b"", &mut [0; 32], &mut [0; 33]);
}

proptest! {
    #[test]
    fn any_key_and_data_agree_with_polyval(
        h in any::<[u8; 16]>(),
        aad in prop::collection::vec(any::<u8>(), 0..100),
        text in prop::collection::vec(any::<u8>(), 0..10_000),
        seed in any::<u64>(),
    ) {
        for backend in Backend::all() {
            check(backend, &h, &aad, &text, &bytes(text.len(), seed));
        }
    }
}
