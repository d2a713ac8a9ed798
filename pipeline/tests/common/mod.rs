//! Descriptors and plans for the tests.
#![allow(dead_code, reason = "each test file uses a part of it")]

use qkd_keyfile::{
    Composition, Generation, QkdKeyId, QkdKeyName, address::Piece, metadata::QkdKeyMetadata,
};
use qkd_pipeline::{Descriptor, FormatOrder};
use qkd_secmem::{Locking, Pool, PoolConfig};

pub(crate) fn pool() -> Pool {
    Pool::new(PoolConfig {
        capacity_bytes: 4 << 20,
        locking: Locking::Unlocked,
    })
    .unwrap()
}

pub(crate) fn id(text: &str) -> QkdKeyId {
    text.parse().unwrap()
}

pub(crate) fn name(text: &str) -> QkdKeyName {
    QkdKeyName {
        module_pair: "pair-1".parse().unwrap(),
        generation: Generation(0),
        id: id(text),
    }
}

/// A QKD-key of whole bytes.
pub(crate) fn key(pool: &Pool, text: &str, bytes: &[u8]) -> Descriptor {
    let key_bits = u32::try_from(bytes.len() * 8).unwrap();
    Descriptor {
        name: name(text),
        key_bits,
        block: pool.copy_of(bytes).unwrap(),
        metadata: QkdKeyMetadata::new(id(text)),
    }
}

/// Bytes that differ from place to place.
pub(crate) fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[1]
    };
    (0..len).map(|_| next()).collect()
}

pub(crate) fn order(pieces: &[(&str, u32, u32)], mask_bytes: u32, unit_bytes: u32) -> FormatOrder {
    let pieces = pieces
        .iter()
        .map(|&(text, offset_bits, len_bits)| Piece {
            qkd_key: id(text),
            offset_bits,
            len_bits,
        })
        .collect();
    FormatOrder {
        composition: Composition {
            module_pair: "pair-1".parse().unwrap(),
            generation: Generation(0),
            pieces,
        },
        mask_bytes,
        unit_bytes,
    }
}
