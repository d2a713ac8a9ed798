//! Kernels: every backend gives the same bytes as the plain one, for any lengths, alignment and cuts.
//!
//! - XOR of two and three operands, and what wipes its pad, agree with the definition.
//! - The tag, the two passes that encrypt and the one that re-encrypts agree with each other and with
//!   `PORTABLE`, which is the crate `polyval`; used pads are zero.
//! - Digests of units agree with the crate `sha2`.
//! - Health statistics of a stream cut anywhere agree with `PORTABLE`; ones and repetitions agree with
//!   counting bit by bit.

use qkd_kernels::{Backend, HealthState, HealthStats, REPETITION_BITS, REPETITION_BYTES};
use sha2::{Digest, Sha256};

use super::input::Input;

/// See the module.
pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let kind = input.byte();
    match kind % 3 {
        0 => pads(&mut input),
        1 => units(&mut input),
        _ => health(&mut input),
    }
}

/// Two pads are made of the first, so that short inputs reach long operands.
fn pads(input: &mut Input<'_>) {
    let mut h = [0; 16];
    for byte in &mut h {
        *byte = input.byte();
    }
    let offset = usize::from(input.byte()) % 64;
    let repeat = usize::from(input.byte()) % 8 + 1;
    let aad = input.short();
    let text = input.long().repeat(repeat);
    let pad: Vec<u8> = text.iter().map(|byte| byte.rotate_left(3) ^ 0x5a).collect();
    let next: Vec<u8> = text.iter().map(|byte| byte.wrapping_mul(151)).collect();

    let sealed: Vec<u8> = text.iter().zip(&pad).map(|(t, p)| t ^ p).collect();
    let carried: Vec<u8> = text.iter().zip(&next).map(|(t, n)| t ^ n).collect();
    let plain = Backend::PORTABLE.tag_key(&h);
    let tags = [&sealed, &carried].map(|data| plain.tag(aad, data));

    for backend in Backend::all() {
        let at = |bytes: &[u8]| [&vec![0xee; offset], bytes].concat();
        let (mut data, mut old, mut new) = (at(&text), at(&pad), at(&next));
        let (data, old, new) = (&mut data[offset..], &mut old[offset..], &mut new[offset..]);
        let key = backend.tag_key(&h);
        assert_eq!(key.encrypt_and_tag(aad, data, old), tags[0]);
        assert_eq!((&*data, key.tag(aad, data)), (&sealed[..], tags[0]));
        let again = key.reencrypt_tag_and_wipe(aad, data, old, new);
        assert_eq!((&*data, again), (&carried[..], tags[1]));
        assert!(old.iter().chain(&*new).all(|&byte| byte == 0));

        new.copy_from_slice(&next);
        backend.xor_and_wipe(data, new);
        assert_eq!(data, text);
        old.copy_from_slice(&pad);
        assert_eq!(key.encrypt_tag_and_wipe(aad, data, old), tags[0]);
        assert!(old.iter().chain(&*new).all(|&byte| byte == 0));
        backend.xor(new, data, &pad);
        assert_eq!(new, text);
        backend.xor3(new, data, &pad, &next);
        assert_eq!(new, carried);
    }
}

fn units(input: &mut Input<'_>) {
    let unit_bytes = usize::from(input.u16()) % 700 + 1;
    let count = usize::from(input.byte()) % 40;
    let offset = usize::from(input.byte()) % 64;
    let seed = input.long();
    let mut data = vec![0; offset + unit_bytes * count];
    for (at, byte) in data.iter_mut().enumerate() {
        // Units differ, also where the input is short.
        *byte = seed.get(at % seed.len().max(1)).copied().unwrap_or(0) ^ (at / 97).to_le_bytes()[0];
    }
    let data = &data[offset..];
    let mut digests = vec![[0; 32]; count];
    for backend in Backend::all() {
        backend.sha256_units(data, unit_bytes, &mut digests);
        for (unit, digest) in data.chunks_exact(unit_bytes).zip(&digests) {
            assert_eq!(Sha256::digest(unit)[..], digest[..], "{}", backend.name());
        }
    }
}

fn health(input: &mut Input<'_>) {
    let cuts = [(); 4].map(|()| usize::from(input.u16()) % 1200);
    let repeat = usize::from(input.byte()) % 16 + 1;
    let stream = input.long().repeat(repeat);
    let mut pieces = Vec::new();
    let mut rest = &stream[..];
    for cut in cuts {
        let (piece, after) = rest.split_at(cut.min(rest.len()));
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    let of_pieces = |backend: Backend| -> Vec<HealthStats> {
        let mut state = HealthState::new();
        let each = pieces.iter().map(|piece| backend.health(&mut state, piece));
        each.collect()
    };
    let expected = of_pieces(Backend::PORTABLE);
    let mut runs = Runs::default();
    for (piece, stats) in pieces.iter().zip(&expected) {
        assert_eq!(
            runs.after(piece),
            (stats.ones, stats.bits_repeat, stats.bytes_repeat)
        );
    }
    for backend in Backend::all() {
        assert_eq!(of_pieces(backend), expected, "{}", backend.name());
    }
}

/// The last bit and byte, and how often they have come in a row.
#[derive(Default)]
struct Runs {
    bits: (Option<u8>, u32),
    bytes: (Option<u8>, u32),
}

impl Runs {
    fn after(&mut self, piece: &[u8]) -> (u64, bool, bool) {
        let count = |run: &mut (Option<u8>, u32), sample| {
            let same = run.0 == Some(sample);
            *run = (Some(sample), if same { run.1 + 1 } else { 1 });
            run.1
        };
        let (mut ones, mut bits_repeat, mut bytes_repeat) = (0, false, false);
        for &byte in piece {
            bytes_repeat |= count(&mut self.bytes, byte) >= REPETITION_BYTES;
            for bit in (0..8).rev().map(|at| byte >> at & 1) {
                ones += u64::from(bit);
                bits_repeat |= count(&mut self.bits, bit) >= REPETITION_BITS;
            }
        }
        (ones, bits_repeat, bytes_repeat)
    }
}
