//! A relay node's step on a unit: XOR with pad, tag the ciphertext, wipe the pad.

use hmac::{Hmac, KeyInit, Mac};
use polyval::Polyval;
use polyval::universal_hash::UniversalHash;
use qkd_kernels::{Backend, TagKey, wipe};
use sha2::Sha256;
use zeroize::Zeroize;

use super::noise;

/// As long as a relay message's header.
pub const HEADER: [u8; 40] = [0x48; 40];
/// The key of all tags.
pub const KEY: [u8; 16] = *b"a key for a tag ";

/// The state of the usual MAC under [`KEY`].
///
/// # Panics
///
/// Never: any length is a key.
#[must_use]
pub fn hmac() -> Hmac<Sha256> {
    Hmac::new_from_slice(&KEY).expect("a key of any length")
}

/// The state of the crate's POLYVAL under [`KEY`].
#[must_use]
pub fn polyval() -> Polyval {
    Polyval::new(&KEY.into())
}

/// What one writes first: a loop, the usual MAC, the usual wiping.
pub fn naive(hmac: &Hmac<Sha256>, data: &mut [u8], pad: &mut [u8]) -> [u8; 32] {
    zip_xor(data, pad);
    let mut hmac = hmac.clone();
    hmac.update(&HEADER);
    hmac.update(data);
    pad.zeroize();
    hmac.finalize().into_bytes().into()
}

/// The right algorithm from a crate, and a fast wipe.
pub fn zip_polyval(polyval: &Polyval, data: &mut [u8], pad: &mut [u8]) -> [u8; 16] {
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
pub fn passes(backend: Backend, key: &TagKey, data: &mut [u8], pad: &mut [u8]) -> [u8; 16] {
    backend.xor_in_place(data, pad);
    let tag = key.tag(&HEADER, data);
    wipe(pad);
    tag
}

fn zip_xor(data: &mut [u8], pad: &[u8]) {
    for (d, p) in data.iter_mut().zip(pad) {
        *d ^= p;
    }
}

type Hop<'a> = &'a dyn Fn(&mut [u8], &mut [u8]) -> [u8; 16];

/// Refuses to time a wrong answer.
///
/// # Panics
///
/// If the answer is wrong.
pub fn check(backend: Backend, key: &TagKey, polyval: &Polyval, size: usize) {
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
