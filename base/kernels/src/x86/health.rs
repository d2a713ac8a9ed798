//! Health statistics: with AVX2 the plain loops, compiled for wider registers; with AVX-512 eight
//! words of the stream in a register.

use core::arch::x86_64::{
    __m512i, _mm_cvtsi128_si64, _mm_set_epi64x, _mm512_add_epi64, _mm512_alignr_epi64,
    _mm512_andnot_si512, _mm512_broadcast_i32x4, _mm512_castsi512_si128, _mm512_cmpeq_epi8_mask,
    _mm512_cmple_epu64_mask, _mm512_min_epu8, _mm512_popcnt_epi64, _mm512_reduce_add_epi64,
    _mm512_set_epi64, _mm512_set1_epi8, _mm512_set1_epi64, _mm512_setzero_si512,
    _mm512_shrdi_epi64, _mm512_shuffle_epi8, _mm512_slli_epi64, _mm512_xor_si512,
};

use super::vpclmul::load;
use crate::health::{
    self, BIT_WINDOW, HealthState, HealthStats, WINDOW, equal_bits, equal_bytes, lowest, of_windows,
};

#[target_feature(enable = "avx2,bmi1,popcnt")]
pub(crate) fn avx2(state: &mut HealthState, data: &[u8]) -> HealthStats {
    health::health(state, data)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vpopcntdq,bmi1,popcnt")]
pub(crate) fn avx512(state: &mut HealthState, data: &[u8]) -> HealthStats {
    health::health_by(state, data, |state, windows, stats| {
        whole_windows(state, windows, stats);
    })
}

/// As `HealthState::whole_window`, in registers alone: nothing of the stream is written anywhere.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vpopcntdq,bmi1,popcnt")]
fn whole_windows(state: &mut HealthState, windows: &[[u8; WINDOW]], stats: &mut HealthStats) {
    // What came before, in the last lane: words of the stream, of its changes by bits, by bytes.
    let mut before = [
        last_lane(u64::from(state.last_byte)),
        last_lane(!lowest(state.equal_bits)),
        last_lane(!lowest(state.equal_bytes * 8)),
    ];
    let (mut bits_repeat, mut bytes_repeat) = (0, 0);
    for window in windows {
        let first = _mm512_set1_epi8(window[0].cast_signed());
        let mut ones = _mm512_setzero_si512();
        let mut same_bytes = 0;
        let bit_windows = window.as_chunks::<BIT_WINDOW>().0;
        macro_rules! bit_windows { ($($number:literal)*) => { $(
            let mut here = _mm512_setzero_si512();
            for row in bit_windows[$number].as_chunks::<64>().0 {
                let words = big_endian(load(row));
                let (word_before, bits, bytes);
                [word_before, bits, bytes] = before;
                let previous = _mm512_alignr_epi64::<7>(words, word_before);
                // A one where a bit, or in the lowest bit where a byte, differs from the one before.
                let changed_bits =
                    _mm512_xor_si512(words, _mm512_shrdi_epi64::<1>(words, previous));
                let changed_bytes = _mm512_min_epu8(
                    _mm512_xor_si512(words, _mm512_shrdi_epi64::<8>(words, previous)),
                    _mm512_set1_epi8(1),
                );
                bits_repeat |= is_run(changed_bits, bits);
                bytes_repeat |= is_run(changed_bytes, bytes);
                same_bytes += _mm512_cmpeq_epi8_mask(words, first).count_ones();
                here = _mm512_add_epi64(here, _mm512_popcnt_epi64(words));
                before = [words, changed_bits, changed_bytes];
            }
            ones = _mm512_add_epi64(ones, _mm512_slli_epi64::<{ 16 * $number }>(here));
        )* } }
        bit_windows!(0 1 2 3);
        let sums = _mm512_reduce_add_epi64(ones).cast_unsigned();
        stats.add_ones(window, of_windows(sums));
        stats.most_same_bytes = stats.most_same_bytes.max(u64::from(same_bytes));
        state.last_byte = window[WINDOW - 1];
    }
    stats.bits_repeat |= bits_repeat != 0;
    stats.bytes_repeat |= bytes_repeat != 0;
    let [_, bits, bytes] = before;
    state.equal_bits = equal_bits(of_last_lane(bits));
    state.equal_bytes = equal_bytes(of_last_lane(bytes));
}

/// A bit for each word of changes that ends a run of 64 zeros or more; `before` holds the word
/// before the first.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn is_run(changed: __m512i, before: __m512i) -> u8 {
    let previous = _mm512_alignr_epi64::<7>(changed, before);
    let below = _mm512_add_epi64(previous, _mm512_set1_epi64(-1));
    _mm512_cmple_epu64_mask(changed, _mm512_andnot_si512(previous, below))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn last_lane(word: u64) -> __m512i {
    _mm512_set_epi64(word.cast_signed(), 0, 0, 0, 0, 0, 0, 0)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn of_last_lane(words: __m512i) -> u64 {
    let last = _mm512_alignr_epi64::<7>(words, words);
    _mm_cvtsi128_si64(_mm512_castsi512_si128(last)).cast_unsigned()
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn big_endian(words: __m512i) -> __m512i {
    let order = _mm_set_epi64x(0x0809_0A0B_0C0D_0E0F, 0x0001_0203_0405_0607);
    _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(order))
}
