//! SHA-256 with the SHA extensions, two messages at a time.
//!
//! One message is bound by the latency of `sha256rnds2`; the second runs in its shadow.

use core::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_blend_epi16, _mm_loadu_si128, _mm_set_epi64x,
    _mm_setzero_si128, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32,
    _mm_shuffle_epi8, _mm_shuffle_epi32, _mm_storeu_si128,
};

use super::{K, schedule_of};
use crate::portable::{self, INITIAL_STATE, LastBlocks};

#[target_feature(enable = "avx2,sha")]
pub(crate) fn sha256_units(data: &[u8], unit_bytes: usize, out: &mut [[u8; 32]]) {
    let (pairs, single) = out.as_chunks_mut::<2>();
    let (paired, rest) = data.split_at(2 * pairs.len() * unit_bytes);
    if !pairs.is_empty() {
        let mut last = [LastBlocks::new(unit_bytes), LastBlocks::new(unit_bytes)];
        let known = unit_bytes.is_multiple_of(64).then(|| {
            let mut words = [0; 16];
            for (word, bytes) in words
                .iter_mut()
                .zip(last[0].with_tail(&[])[0].as_chunks().0)
            {
                *word = u32::from_be_bytes(*bytes);
            }
            schedule_of(&words)
        });
        for (units, digests) in paired.chunks(2 * unit_bytes).zip(pairs) {
            let units = units.split_at(unit_bytes).into();
            *digests = digest(units, &mut last, known.as_ref());
        }
    }
    // With nothing to run in its shadow, one message is as fast in `sha2`.
    portable::sha256_units(rest, unit_bytes, single);
}

/// The digests of two messages of one length; `known` is the schedule of their padding, where that
/// is a block of its own.
#[inline]
#[target_feature(enable = "avx2,sha")]
fn digest(
    units: [&[u8]; 2],
    last: &mut [LastBlocks; 2],
    known: Option<&[u32; 64]>,
) -> [[u8; 32]; 2] {
    let mut state = [State::initial(); 2];
    let [(blocks_a, tail_a), (blocks_b, tail_b)] = units.map(<[u8]>::as_chunks);
    for (a, b) in blocks_a.iter().zip(blocks_b) {
        compress(&mut state, [a, b]);
    }
    if let Some(schedule) = known {
        compress_known(&mut state, schedule);
    } else {
        let [a, b] = last;
        for (a, b) in a.with_tail(tail_a).iter().zip(b.with_tail(tail_b)) {
            compress(&mut state, [a, b]);
        }
    }
    let [a, b] = state;
    [a.to_digest(), b.to_digest()]
}

/// The working variables in the order that the instructions want.
#[derive(Clone, Copy)]
struct State {
    abef: __m128i,
    cdgh: __m128i,
}

impl State {
    #[inline]
    #[target_feature(enable = "avx2,sha")]
    fn initial() -> Self {
        let [a, b, c, d, e, f, g, h] = INITIAL_STATE.map(u64::from);
        let pack = |w3: u64, w2: u64, w1: u64, w0: u64| {
            _mm_set_epi64x((w3 << 32 | w2).cast_signed(), (w1 << 32 | w0).cast_signed())
        };
        Self {
            abef: pack(a, b, e, f),
            cdgh: pack(c, d, g, h),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,sha")]
    fn four_rounds(&mut self, wk: __m128i) {
        self.cdgh = _mm_sha256rnds2_epu32(self.cdgh, self.abef, wk);
        self.abef = _mm_sha256rnds2_epu32(self.abef, self.cdgh, _mm_shuffle_epi32::<0x0E>(wk));
    }

    /// Big-endian, as FIPS 180-4 has the digest.
    #[inline]
    #[target_feature(enable = "avx2,sha")]
    fn to_digest(self) -> [u8; 32] {
        let mut digest = [0; 32];
        let feba = _mm_shuffle_epi32::<0x1B>(self.abef);
        let dchg = _mm_shuffle_epi32::<0xB1>(self.cdgh);
        let dcba = _mm_blend_epi16::<0xF0>(feba, dchg);
        let hgfe = _mm_alignr_epi8::<8>(dchg, feba);
        for (half, words) in digest.as_chunks_mut().0.iter_mut().zip([dcba, hgfe]) {
            store(half, swap_bytes(words));
        }
        digest
    }
}

#[inline]
#[target_feature(enable = "avx2,sha")]
fn compress(state: &mut [State; 2], blocks: [&[u8; 64]; 2]) {
    let before = *state;
    let mut w = [[_mm_setzero_si128(); 4]; 2];
    for (w, block) in w.iter_mut().zip(blocks) {
        for (w, bytes) in w.iter_mut().zip(block.as_chunks().0) {
            *w = swap_bytes(load(bytes));
        }
    }
    for (sixteen, k) in K.as_chunks::<4>().0.as_chunks::<4>().0.iter().enumerate() {
        for step in 0..4 {
            let k = load_words(&k[step]);
            for (state, w) in state.iter_mut().zip(&mut w) {
                if sixteen > 0 {
                    w[step] = next_words(w, step);
                }
                state.four_rounds(_mm_add_epi32(w[step], k));
            }
        }
    }
    for (state, before) in state.iter_mut().zip(before) {
        state.abef = _mm_add_epi32(state.abef, before.abef);
        state.cdgh = _mm_add_epi32(state.cdgh, before.cdgh);
    }
}

/// A block whose schedule is known: no word has to be made.
#[inline]
#[target_feature(enable = "avx2,sha")]
fn compress_known(state: &mut [State; 2], schedule: &[u32; 64]) {
    let before = *state;
    for wk in schedule.as_chunks().0 {
        let wk = load_words(wk);
        for state in state.iter_mut() {
            state.four_rounds(wk);
        }
    }
    for (state, before) in state.iter_mut().zip(before) {
        state.abef = _mm_add_epi32(state.abef, before.abef);
        state.cdgh = _mm_add_epi32(state.cdgh, before.cdgh);
    }
}

/// The message schedule's next four words; the sixteen before them are in `w`, oldest at `step`.
#[inline]
#[target_feature(enable = "avx2,sha")]
fn next_words(w: &[__m128i; 4], step: usize) -> __m128i {
    let [w0, w1, w2, w3] = [0, 1, 2, 3].map(|n| w[(step + n) % 4]);
    let partial = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8::<4>(w3, w2));
    _mm_sha256msg2_epu32(partial, w3)
}

#[inline]
#[target_feature(enable = "avx2")]
fn swap_bytes(words: __m128i) -> __m128i {
    let order = _mm_set_epi64x(0x0C0D_0E0F_0809_0A0B, 0x0405_0607_0001_0203);
    _mm_shuffle_epi8(words, order)
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(bytes: &[u8; 16]) -> __m128i {
    // SAFETY:
    // - The reference makes 16 bytes valid for reads; the load asks for no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_words(words: &[u32; 4]) -> __m128i {
    // SAFETY:
    // - The reference makes 16 bytes valid for reads; the load asks for no alignment.
    unsafe { _mm_loadu_si128(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(bytes: &mut [u8; 16], value: __m128i) {
    // SAFETY:
    // - The reference makes 16 bytes valid for writes; the store asks for no alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), value) }
}
