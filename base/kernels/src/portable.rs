//! The plain implementations, and the oracle for the others in tests.

use sha2::block_api::compress256;

use crate::wipe;

/// Inlined into the x86 backends as well, where the compiler turns it into wider instructions.
#[inline(always)]
pub(crate) fn xor_in_place(data: &mut [u8], pad: &[u8]) {
    for (d, p) in data.iter_mut().zip(pad) {
        *d ^= p;
    }
}

/// See [`xor_in_place`].
#[inline(always)]
pub(crate) fn xor(out: &mut [u8], a: &[u8], b: &[u8]) {
    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
        *o = a ^ b;
    }
}

/// See [`xor_in_place`].
#[inline(always)]
pub(crate) fn xor3(out: &mut [u8], a: &[u8], b: &[u8], c: &[u8]) {
    for (((o, a), b), c) in out.iter_mut().zip(a).zip(b).zip(c) {
        *o = a ^ b ^ c;
    }
}

pub(crate) fn sha256_units(data: &[u8], unit_bytes: usize, out: &mut [[u8; 32]]) {
    if out.is_empty() {
        return;
    }
    let mut last = LastBlocks::new(unit_bytes);
    for (unit, digest) in data.chunks_exact(unit_bytes).zip(out) {
        let mut state = INITIAL_STATE;
        let (blocks, tail) = unit.as_chunks();
        compress256(&mut state, blocks);
        compress256(&mut state, last.with_tail(tail));
        for (bytes, word) in digest.as_chunks_mut().0.iter_mut().zip(state) {
            *bytes = word.to_be_bytes();
        }
    }
}

/// The padded end of a message (FIPS 180-4, 5.1.1), for messages of one length. Wiped on drop.
pub(crate) struct LastBlocks {
    blocks: [[u8; 64]; 2],
    len: usize,
}

impl LastBlocks {
    pub(crate) fn new(message_bytes: usize) -> Self {
        let tail = message_bytes % 64;
        let len = if tail < 56 { 1 } else { 2 };
        let mut blocks = [[0; 64]; 2];
        let bytes = blocks.as_flattened_mut();
        bytes[tail] = 0x80;
        let bits = (message_bytes as u64).wrapping_mul(8);
        bytes[len * 64 - 8..len * 64].copy_from_slice(&bits.to_be_bytes());
        Self { blocks, len }
    }

    /// The one or two blocks that end a message whose last, incomplete block is `tail`.
    pub(crate) fn with_tail(&mut self, tail: &[u8]) -> &[[u8; 64]] {
        self.blocks[0][..tail.len()].copy_from_slice(tail);
        &self.blocks[..self.len]
    }
}

impl Drop for LastBlocks {
    fn drop(&mut self) {
        wipe(self.blocks.as_flattened_mut());
    }
}

/// FIPS 180-4, 5.3.3.
pub(crate) const INITIAL_STATE: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
