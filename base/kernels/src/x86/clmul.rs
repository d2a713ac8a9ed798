//! POLYVAL with PCLMULQDQ, eight blocks to a reduction.
//!
//! `dot(a, b)` of RFC 8452 is the carry-less product, halved 128 times modulo
//! x^128 + x^127 + x^126 + x^121 + 1. A sum of products is reduced once.

use core::arch::x86_64::{
    __m128i, _mm_clmulepi64_si128, _mm_loadu_si128, _mm_set_epi64x, _mm_setzero_si128,
    _mm_shuffle_epi32, _mm_slli_si128, _mm_srli_si128, _mm_storeu_si128, _mm_xor_si128,
};

use super::powers::Powers;
use crate::{portable, tag::lengths, wipe};

/// Blocks to a reduction.
const BLOCKS: usize = 8;

#[target_feature(enable = "avx2,pclmulqdq")]
pub(crate) fn fill_powers(powers: &mut Powers, h: &[u8; 16]) {
    powers.fill(h, |a, b| {
        let mut power = [0; 16];
        store(&mut power, dot(load(a), load(b)));
        power
    });
}

#[target_feature(enable = "avx2,pclmulqdq")]
pub(crate) fn tag(powers: &Powers, aad: &[u8], text: &[u8]) -> u128 {
    let sum = absorb(powers, 0, aad);
    let sum = absorb(powers, sum, text);
    absorb(powers, sum, &lengths(aad, text).to_le_bytes())
}

#[target_feature(enable = "avx2,pclmulqdq")]
fn absorb(powers: &Powers, sum: u128, bytes: &[u8]) -> u128 {
    let (blocks, tail) = bytes.as_chunks();
    let (groups, rest) = blocks.as_chunks::<BLOCKS>();
    let mut sum = from_u128(sum);
    for group in groups {
        sum = fold(powers, sum, group);
    }
    if !rest.is_empty() {
        sum = fold(powers, sum, rest);
    }
    if !tail.is_empty() {
        let mut block = [0; 16];
        block[..tail.len()].copy_from_slice(tail);
        sum = fold(powers, sum, &[block]);
        wipe(&mut block);
    }
    to_u128(sum)
}

#[target_feature(enable = "avx2,pclmulqdq")]
pub(crate) fn encrypt(powers: &Powers, aad: &[u8], data: &mut [u8], pad: &[u8]) -> u128 {
    let mut sum = absorb(powers, 0, aad);
    let lengths = lengths(aad, data);
    for (data, pad) in data.chunks_mut(STEP_BYTES).zip(pad.chunks(STEP_BYTES)) {
        portable::xor_in_place(data, pad);
        sum = absorb(powers, sum, data);
    }
    absorb(powers, sum, &lengths.to_le_bytes())
}

#[target_feature(enable = "avx2,pclmulqdq")]
pub(crate) fn encrypt_and_wipe(
    powers: &Powers,
    aad: &[u8],
    data: &mut [u8],
    pad: &mut [u8],
) -> u128 {
    let mut sum = absorb(powers, 0, aad);
    let lengths = lengths(aad, data);
    for (data, pad) in data.chunks_mut(STEP_BYTES).zip(pad.chunks_mut(STEP_BYTES)) {
        portable::xor_in_place(data, pad);
        wipe(pad);
        sum = absorb(powers, sum, data);
    }
    absorb(powers, sum, &lengths.to_le_bytes())
}

/// One pass in steps that stay in the first-level cache; whole blocks, so that only the last step
/// is padded.
const STEP_BYTES: usize = 4 << 10;

/// `sum` goes on over at least 1 and at most `POWERS` blocks.
#[inline]
#[target_feature(enable = "avx2,pclmulqdq")]
fn fold(powers: &Powers, sum: __m128i, blocks: &[[u8; 16]]) -> __m128i {
    let mut product = Product::zero();
    let mut carry = sum;
    for (block, power) in blocks.iter().zip(powers.for_blocks(blocks.len())) {
        product.add(_mm_xor_si128(load(block), carry), load(power));
        carry = _mm_setzero_si128();
    }
    product.reduce()
}

#[inline]
#[target_feature(enable = "avx2,pclmulqdq")]
fn dot(a: __m128i, b: __m128i) -> __m128i {
    let mut product = Product::zero();
    product.add(a, b);
    product.reduce()
}

/// A 256-bit sum of carry-less products, not reduced yet.
///
/// Karatsuba's way, for the multiplier is what limits the speed: three products of halves instead
/// of four.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub(crate) low: __m128i,
    /// The products of the sums of the halves; with the other two, the middle part.
    pub(crate) both: __m128i,
    pub(crate) high: __m128i,
}

impl Product {
    #[inline]
    #[target_feature(enable = "avx2,pclmulqdq")]
    fn zero() -> Self {
        let zero = _mm_setzero_si128();
        Self {
            low: zero,
            both: zero,
            high: zero,
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,pclmulqdq")]
    fn add(&mut self, a: __m128i, b: __m128i) {
        self.low = _mm_xor_si128(self.low, _mm_clmulepi64_si128::<0x00>(a, b));
        let (a_both, b_both) = (add_halves(a), add_halves(b));
        let both = _mm_clmulepi64_si128::<0x00>(a_both, b_both);
        self.both = _mm_xor_si128(self.both, both);
        self.high = _mm_xor_si128(self.high, _mm_clmulepi64_si128::<0x11>(a, b));
    }

    /// Montgomery reduction, 64 bits at a time.
    #[inline]
    #[target_feature(enable = "avx2,pclmulqdq")]
    pub(crate) fn reduce(self) -> __m128i {
        // x^127 + x^126 + x^121, as the high half sees it.
        let polynomial = _mm_set_epi64x(0xC200_0000_0000_0000_u64.cast_signed(), 1);
        let middle = _mm_xor_si128(self.both, _mm_xor_si128(self.low, self.high));
        let low = _mm_xor_si128(self.low, _mm_slli_si128::<8>(middle));
        let high = _mm_xor_si128(self.high, _mm_srli_si128::<8>(middle));
        let mut rest = low;
        for _ in 0..2 {
            let swapped = _mm_shuffle_epi32::<0x4E>(rest);
            rest = _mm_xor_si128(swapped, _mm_clmulepi64_si128::<0x10>(rest, polynomial));
        }
        _mm_xor_si128(high, rest)
    }
}

/// Both halves hold the sum of the two.
#[inline]
#[target_feature(enable = "avx2,pclmulqdq")]
fn add_halves(value: __m128i) -> __m128i {
    _mm_xor_si128(value, _mm_shuffle_epi32::<0x4E>(value))
}

#[inline]
#[target_feature(enable = "avx2,pclmulqdq")]
fn load(block: &[u8; 16]) -> __m128i {
    // SAFETY:
    // - The reference makes 16 bytes valid for reads; the load asks for no alignment.
    unsafe { _mm_loadu_si128(block.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,pclmulqdq")]
fn store(block: &mut [u8; 16], value: __m128i) {
    // SAFETY:
    // - The reference makes 16 bytes valid for writes; the store asks for no alignment.
    unsafe { _mm_storeu_si128(block.as_mut_ptr().cast(), value) }
}

#[inline]
#[target_feature(enable = "avx2,pclmulqdq")]
pub(crate) fn from_u128(value: u128) -> __m128i {
    load(&value.to_le_bytes())
}

#[inline]
#[target_feature(enable = "avx2,pclmulqdq")]
pub(crate) fn to_u128(value: __m128i) -> u128 {
    let mut bytes = [0; 16];
    store(&mut bytes, value);
    u128::from_le_bytes(bytes)
}
