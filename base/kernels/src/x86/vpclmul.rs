//! POLYVAL with VPCLMULQDQ, 32 blocks to a reduction, and the pass that encrypts on the way.

use core::arch::x86_64::{
    __m128i, __m512i, __mmask64, _mm_setzero_si128, _mm_xor_si128, _mm256_castsi256_si128,
    _mm256_extracti128_si256, _mm256_xor_si256, _mm512_castsi512_si256, _mm512_clmulepi64_epi128,
    _mm512_extracti64x4_epi64, _mm512_loadu_si512, _mm512_mask_storeu_epi8,
    _mm512_maskz_loadu_epi8, _mm512_setzero_si512, _mm512_shuffle_epi32, _mm512_storeu_si512,
    _mm512_xor_si512, _mm512_zextsi128_si512,
};

use super::clmul::{self, from_u128, to_u128};
use super::powers::{POWERS, Powers};
use crate::tag::lengths;

/// The blocks that share a reduction.
const GROUP_BYTES: usize = POWERS * 16;

/// Four blocks.
const VECTOR_BYTES: usize = 64;

#[target_feature(enable = "avx2,pclmulqdq,avx512f,avx512bw,avx512vl,vpclmulqdq")]
pub(crate) fn tag(powers: &Powers, aad: &[u8], text: &[u8]) -> u128 {
    let sum = absorb(powers, _mm_setzero_si128(), aad, None);
    to_u128(absorb(powers, sum, text, Some(lengths(aad, text))))
}

#[target_feature(enable = "avx2,pclmulqdq,avx512f,avx512bw,avx512vl,vpclmulqdq")]
pub(crate) fn encrypt(powers: &Powers, aad: &[u8], data: &mut [u8], pad: &[u8]) -> u128 {
    let mut sum = absorb(powers, _mm_setzero_si128(), aad, None);
    let lengths = lengths(aad, data);
    let (groups, rest) = data.as_chunks_mut::<GROUP_BYTES>();
    let (pad_groups, pad_rest) = pad.as_chunks::<GROUP_BYTES>();
    for (group, pad) in groups.iter_mut().zip(pad_groups) {
        let mut product = Product::new(sum);
        let vectors = group.as_chunks_mut().0.iter_mut().zip(pad.as_chunks().0);
        for ((data, pad), powers) in vectors.zip(powers.for_vectors(POWERS)) {
            let ciphertext = _mm512_xor_si512(load(data), load(pad));
            store(data, ciphertext);
            product.add(ciphertext, powers);
        }
        sum = product.reduce();
    }
    for (data, pad) in rest
        .chunks_mut(VECTOR_BYTES)
        .zip(pad_rest.chunks(VECTOR_BYTES))
    {
        store_part(data, _mm512_xor_si512(load_part(data), load_part(pad)));
    }
    to_u128(end(powers, sum, rest, Some(lengths)))
}

/// Takes `old` off and wipes it; where `NEW`, puts `new` on, which is as long, and wipes it too.
#[target_feature(enable = "avx2,pclmulqdq,avx512f,avx512bw,avx512vl,vpclmulqdq")]
pub(crate) fn encrypt_and_wipe<const NEW: bool>(
    powers: &Powers,
    aad: &[u8],
    data: &mut [u8],
    old: &mut [u8],
    new: &mut [u8],
) -> u128 {
    let mut sum = absorb(powers, _mm_setzero_si128(), aad, None);
    let lengths = lengths(aad, data);
    let zero = _mm512_setzero_si512();
    let (groups, rest) = data.as_chunks_mut::<GROUP_BYTES>();
    let (old_groups, old_rest) = old.as_chunks_mut::<GROUP_BYTES>();
    let (new_groups, new_rest) = new.as_chunks_mut::<GROUP_BYTES>();
    for (at, (group, old)) in groups.iter_mut().zip(old_groups).enumerate() {
        let mut product = Product::new(sum);
        let (vectors, old) = (group.as_chunks_mut().0, old.as_chunks_mut().0);
        let mut new = if NEW {
            Some(new_groups[at].as_chunks_mut().0)
        } else {
            None
        };
        for (i, powers) in powers.for_vectors(POWERS).iter().enumerate() {
            let mut ciphertext = _mm512_xor_si512(load(&vectors[i]), load(&old[i]));
            store(&mut old[i], zero);
            if let Some(new) = &mut new {
                ciphertext = _mm512_xor_si512(ciphertext, load(&new[i]));
                store(&mut new[i], zero);
            }
            store(&mut vectors[i], ciphertext);
            product.add(ciphertext, powers);
        }
        sum = product.reduce();
    }
    for (at, data) in rest.chunks_mut(VECTOR_BYTES).enumerate() {
        let here = at * VECTOR_BYTES..at * VECTOR_BYTES + data.len();
        let old = &mut old_rest[here.clone()];
        let mut ciphertext = _mm512_xor_si512(load_part(data), load_part(old));
        store_part(old, zero);
        if NEW {
            let new = &mut new_rest[here];
            ciphertext = _mm512_xor_si512(ciphertext, load_part(new));
            store_part(new, zero);
        }
        store_part(data, ciphertext);
    }
    crate::wipe::keep_stores(old);
    crate::wipe::keep_stores(new);
    to_u128(end(powers, sum, rest, Some(lengths)))
}

/// `sum` goes on over `bytes`, padded with zeros to whole blocks, and over the block of lengths.
#[inline]
#[target_feature(enable = "avx2,pclmulqdq,avx512f,avx512bw,avx512vl,vpclmulqdq")]
fn absorb(powers: &Powers, mut sum: __m128i, bytes: &[u8], lengths: Option<u128>) -> __m128i {
    let (groups, rest) = bytes.as_chunks::<GROUP_BYTES>();
    for group in groups {
        let mut product = Product::new(sum);
        for (bytes, powers) in group.as_chunks().0.iter().zip(powers.for_vectors(POWERS)) {
            product.add(load(bytes), powers);
        }
        sum = product.reduce();
    }
    end(powers, sum, rest, lengths)
}

/// [`absorb`] for less than a group: one reduction for the bytes and the lengths.
#[inline]
#[target_feature(enable = "avx2,pclmulqdq,avx512f,avx512bw,avx512vl,vpclmulqdq")]
fn end(powers: &Powers, sum: __m128i, rest: &[u8], lengths: Option<u128>) -> __m128i {
    let blocks = rest.len().div_ceil(16) + usize::from(lengths.is_some());
    if blocks == 0 {
        return sum;
    }
    let mut product = Product::new(sum);
    for (bytes, powers) in rest.chunks(VECTOR_BYTES).zip(powers.for_vectors(blocks)) {
        product.add(load_part(bytes), powers);
    }
    if let Some(lengths) = lengths {
        let vector = _mm512_zextsi128_si512(from_u128(lengths));
        product.add(vector, &powers.for_vectors(1)[0]);
    }
    product.reduce()
}

/// [`clmul::Product`] in four lanes.
struct Product {
    /// What the first vector takes in before it is multiplied: the sum so far.
    carry: __m512i,
    low: __m512i,
    both: __m512i,
    high: __m512i,
}

impl Product {
    #[inline]
    #[target_feature(enable = "avx2,pclmulqdq,avx512f,avx512bw,avx512vl,vpclmulqdq")]
    fn new(sum: __m128i) -> Self {
        let zero = _mm512_setzero_si512();
        Self {
            carry: _mm512_zextsi128_si512(sum),
            low: zero,
            both: zero,
            high: zero,
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,pclmulqdq,avx512f,avx512bw,avx512vl,vpclmulqdq")]
    fn add(&mut self, vector: __m512i, powers: &[[u8; 16]; 4]) {
        let a = _mm512_xor_si512(vector, self.carry);
        self.carry = _mm512_setzero_si512();
        let b = load_powers(powers);
        self.low = _mm512_xor_si512(self.low, _mm512_clmulepi64_epi128::<0x00>(a, b));
        let (a_both, b_both) = (add_halves(a), add_halves(b));
        let both = _mm512_clmulepi64_epi128::<0x00>(a_both, b_both);
        self.both = _mm512_xor_si512(self.both, both);
        self.high = _mm512_xor_si512(self.high, _mm512_clmulepi64_epi128::<0x11>(a, b));
    }

    #[inline]
    #[target_feature(enable = "avx2,pclmulqdq,avx512f,avx512bw,avx512vl,vpclmulqdq")]
    fn reduce(self) -> __m128i {
        let low = add_lanes(self.low);
        let both = add_lanes(self.both);
        let high = add_lanes(self.high);
        clmul::Product { low, both, high }.reduce()
    }
}

#[inline]
#[target_feature(enable = "avx2,pclmulqdq,avx512f,avx512bw,avx512vl,vpclmulqdq")]
fn add_lanes(value: __m512i) -> __m128i {
    let upper = _mm512_extracti64x4_epi64::<1>(value);
    let half = _mm256_xor_si256(_mm512_castsi512_si256(value), upper);
    _mm_xor_si128(
        _mm256_castsi256_si128(half),
        _mm256_extracti128_si256::<1>(half),
    )
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add_halves(value: __m512i) -> __m512i {
    _mm512_xor_si512(value, _mm512_shuffle_epi32::<0x4E>(value))
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load(bytes: &[u8; VECTOR_BYTES]) -> __m512i {
    // SAFETY:
    // - The reference makes 64 bytes valid for reads; the load asks for no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_powers(powers: &[[u8; 16]; 4]) -> __m512i {
    // SAFETY:
    // - The reference makes 64 bytes valid for reads; the load asks for no alignment.
    unsafe { _mm512_loadu_si512(powers.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store(bytes: &mut [u8; VECTOR_BYTES], value: __m512i) {
    // SAFETY:
    // - The reference makes 64 bytes valid for writes; the store asks for no alignment.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), value) }
}

/// The bytes, at most 64, then zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn load_part(bytes: &[u8]) -> __m512i {
    // SAFETY:
    // - The mask has a bit for each byte of the slice and no other; the instruction reads nothing
    //   else.
    unsafe { _mm512_maskz_loadu_epi8(mask(bytes.len()), bytes.as_ptr().cast()) }
}

/// As many of the first bytes of `value` as fit, at most 64.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn store_part(bytes: &mut [u8], value: __m512i) {
    // SAFETY:
    // - The mask has a bit for each byte of the slice and no other; the instruction writes nothing
    //   else.
    unsafe { _mm512_mask_storeu_epi8(bytes.as_mut_ptr().cast(), mask(bytes.len()), value) }
}

#[inline]
fn mask(len_bytes: usize) -> __mmask64 {
    match len_bytes {
        0 => 0,
        1..VECTOR_BYTES => u64::MAX >> (VECTOR_BYTES - len_bytes),
        _ => u64::MAX,
    }
}
