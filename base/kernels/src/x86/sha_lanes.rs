//! SHA-256 of sixteen messages at once: each 32-bit lane of an AVX-512 register is one message.

use core::arch::x86_64::{
    __m256i, __m512i, _mm_set_epi64x, _mm256_storeu_si256, _mm512_add_epi32,
    _mm512_broadcast_i32x4, _mm512_castsi512_si256, _mm512_or_si512, _mm512_permutex2var_epi64,
    _mm512_ror_epi32, _mm512_set_epi64, _mm512_set1_epi32, _mm512_setzero_si512,
    _mm512_shuffle_epi8, _mm512_shuffle_i32x4, _mm512_srli_epi32, _mm512_ternarylogic_epi32,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::vpclmul::{load, load_part, store as store_vector};
use super::{K, sha_ni};
use crate::portable::{INITIAL_STATE, LastBlocks};

const LANES: usize = 16;

/// With fewer messages than this, idle lanes cost more than two streams of SHA-NI do.
const FEWEST_LANES: usize = 10;

#[target_feature(enable = "avx2,sha,avx512f,avx512bw,avx512vl")]
pub(crate) fn sha256_units(data: &[u8], unit_bytes: usize, out: &mut [[u8; 32]]) {
    let whole = out.len() - out.len() % LANES;
    let in_lanes = if out.len() - whole < FEWEST_LANES {
        whole
    } else {
        out.len()
    };
    let (data, rest) = data.split_at(in_lanes * unit_bytes);
    let (out, rest_out) = out.split_at_mut(in_lanes);
    let in_pairs_of_units = if unit_bytes == 32 { whole } else { 0 };
    let (short_data, data) = data.split_at(in_pairs_of_units * 32);
    let (short_out, out) = out.split_at_mut(in_pairs_of_units);
    let short_units = short_data.as_chunks::<{ 32 * LANES }>().0;
    for (units, digests) in short_units.iter().zip(short_out.as_chunks_mut().0) {
        digest_32(units, digests);
    }
    if !out.is_empty() {
        let end = End::new(unit_bytes);
        for (units, digests) in data.chunks(LANES * unit_bytes).zip(out.chunks_mut(LANES)) {
            digest(units, unit_bytes, &end, digests);
        }
    }
    if !rest_out.is_empty() {
        sha_ni::sha256_units(rest, unit_bytes, rest_out);
    }
}

/// Sixteen rounds. A macro, and unrolled by hand: the words stay in registers only if every index is
/// a constant and nothing is a call.
macro_rules! rounds {
    ($state:expr, $w:expr, $k:expr) => {
        rounds!($state, $w, $k, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    ($state:expr, $w:expr, $k:expr, $($t:literal)*) => {
        $( round::<$t>($state, $w[$t], $k[$t]); )*
    };
}

/// The next sixteen words of the schedule, in the same way.
macro_rules! schedule {
    ($w:expr) => { schedule!($w, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
    ($w:expr, $($t:literal)*) => { $( $w[$t] = next_word::<$t>(&$w); )* };
}

/// The padding of messages of one length, as words for all lanes.
struct End {
    blocks: [[u32; 16]; 2],
    len: usize,
    /// For messages of whole blocks: the schedule of the padding, constants added.
    schedule: Option<[u32; 64]>,
}

impl End {
    fn new(unit_bytes: usize) -> Self {
        let mut last = LastBlocks::new(unit_bytes);
        let padding = last.with_tail(&[]);
        let mut blocks = [[0; 16]; 2];
        for (words, bytes) in blocks.iter_mut().zip(padding) {
            for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
                *word = u32::from_be_bytes(*bytes);
            }
        }
        let whole_blocks = unit_bytes.is_multiple_of(64);
        Self {
            blocks,
            len: padding.len(),
            schedule: whole_blocks.then(|| super::schedule_of(&blocks[0])),
        }
    }
}

/// The digests of [`FEWEST_LANES`] to [`LANES`] messages.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
fn digest(units: &[u8], unit_bytes: usize, end: &End, out: &mut [[u8; 32]]) {
    let lanes: [&[u8]; LANES] = core::array::from_fn(|lane| {
        // An idle lane repeats the last message.
        let unit = lane.min(out.len() - 1);
        &units[unit * unit_bytes..][..unit_bytes]
    });
    let mut state = splat(&INITIAL_STATE);
    let tail_at = unit_bytes - unit_bytes % 64;
    for at in (0..tail_at).step_by(64) {
        let mut rows = zeros();
        for (row, lane) in rows.iter_mut().zip(lanes) {
            *row = load_part(&lane[at..at + 64]);
        }
        compress(&mut state, message_words(rows));
    }
    if let Some(schedule) = &end.schedule {
        compress_known(&mut state, schedule);
    }
    let padded = if end.schedule.is_some() { 0 } else { end.len };
    for (index, padding) in end.blocks[..padded].iter().enumerate() {
        let mut w = splat(padding);
        if index == 0 && tail_at < unit_bytes {
            let mut rows = zeros();
            for (row, lane) in rows.iter_mut().zip(lanes) {
                *row = load_part(&lane[tail_at..]);
            }
            for (w, words) in w.iter_mut().zip(message_words(rows)) {
                *w = _mm512_or_si512(*w, words);
            }
        }
        compress(&mut state, w);
    }
    let mut rows = zeros();
    rows[..8].copy_from_slice(&state);
    for (digest, row) in out.iter_mut().zip(transpose(rows)) {
        store(digest, _mm512_castsi512_si256(swap_bytes(row)));
    }
}

/// The digests of sixteen messages of 32 bytes: one block each, half of which is known.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
fn digest_32(units: &[u8; 32 * LANES], out: &mut [[u8; 32]; LANES]) {
    let mut w = zeros();
    w[..8].copy_from_slice(&words_of_pairs(units));
    // Known to the compiler: what the schedule does with them alone costs nothing.
    [w[8], w[15]] = [_mm512_set1_epi32(i32::MIN), _mm512_set1_epi32(256)];
    let mut state = splat(&INITIAL_STATE);
    let (first, later) = K
        .split_first_chunk::<16>()
        .unwrap_or_else(|| unreachable!());
    let (second, later) = later
        .split_first_chunk::<16>()
        .unwrap_or_else(|| unreachable!());
    rounds!(&mut state, w, first);
    schedule!(w);
    rounds!(&mut state, w, second);
    for k in later.as_chunks::<16>().0 {
        schedule!(w);
        rounds!(&mut state, w, k);
    }
    for (state, before) in state.iter_mut().zip(splat(&INITIAL_STATE)) {
        *state = _mm512_add_epi32(*state, before);
    }
    store_pairs(out, state);
}

/// The words of sixteen messages of 32 bytes, two of which are in a register when they come. The
/// lanes are in the order 0 2 4 6, 1 3 5 7, and eight more.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn words_of_pairs(units: &[u8; 32 * LANES]) -> [__m512i; 8] {
    let mut rows = [_mm512_setzero_si512(); 8];
    for (row, pair) in rows.iter_mut().zip(units.as_chunks().0) {
        *row = swap_bytes(load(pair));
    }
    let low = transpose_quads([rows[0], rows[1], rows[2], rows[3]]);
    let high = transpose_quads([rows[4], rows[5], rows[6], rows[7]]);
    let mut words = [_mm512_setzero_si512(); 8];
    for c in 0..4 {
        words[c] = _mm512_shuffle_i32x4::<0x88>(low[c], high[c]);
        words[4 + c] = _mm512_shuffle_i32x4::<0xDD>(low[c], high[c]);
    }
    words
}

/// The way back from the order of [`words_of_pairs`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn store_pairs(out: &mut [[u8; 32]; LANES], state: [__m512i; 8]) {
    let front = transpose_quads([state[0], state[1], state[2], state[3]]);
    let back = transpose_quads([state[4], state[5], state[6], state[7]]);
    let (first, second) = out.as_flattened_mut().split_at_mut(16 * LANES);
    let (first, second) = (first.as_chunks_mut().0, second.as_chunks_mut().0);
    let of_first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    let of_second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    for j in 0..4 {
        let pair = _mm512_permutex2var_epi64(front[j], of_first, back[j]);
        store_vector(&mut first[j], swap_bytes(pair));
        let pair = _mm512_permutex2var_epi64(front[j], of_second, back[j]);
        store_vector(&mut second[j], swap_bytes(pair));
    }
}

/// A block whose schedule is the same for all lanes and known.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn compress_known(state: &mut [__m512i; 8], schedule: &[u32; 64]) {
    let before = *state;
    for wk in schedule.as_chunks::<16>().0 {
        rounds!(state, zeros(), wk);
    }
    for (state, before) in state.iter_mut().zip(before) {
        *state = _mm512_add_epi32(*state, before);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn compress(state: &mut [__m512i; 8], mut w: [__m512i; 16]) {
    let before = *state;
    for (sixteen, k) in K.as_chunks::<16>().0.iter().enumerate() {
        if sixteen > 0 {
            schedule!(w);
        }
        rounds!(state, w, k);
    }
    for (state, before) in state.iter_mut().zip(before) {
        *state = _mm512_add_epi32(*state, before);
    }
}

/// One round. Instead of moving the working variables on, round `T` finds them `T` places back.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn round<const T: usize>(state: &mut [__m512i; 8], w: __m512i, k: u32) {
    let [a, b, c, d, e, f, g, h] = [0, 1, 2, 3, 4, 5, 6, 7].map(|n| (n + 16 - T) % 8);
    let s = state;
    let wk = _mm512_add_epi32(w, _mm512_set1_epi32(k.cast_signed()));
    let sigma1 = xor3(
        _mm512_ror_epi32::<6>(s[e]),
        _mm512_ror_epi32::<11>(s[e]),
        _mm512_ror_epi32::<25>(s[e]),
    );
    let choice = _mm512_ternarylogic_epi32::<0xCA>(s[e], s[f], s[g]);
    let t1 = add(add(add(s[h], wk), choice), sigma1);
    let sigma0 = xor3(
        _mm512_ror_epi32::<2>(s[a]),
        _mm512_ror_epi32::<13>(s[a]),
        _mm512_ror_epi32::<22>(s[a]),
    );
    let majority = _mm512_ternarylogic_epi32::<0xE8>(s[a], s[b], s[c]);
    s[d] = add(s[d], t1);
    s[h] = add(t1, add(sigma0, majority));
}

/// The word sixteen after `w[T]`, which it replaces.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn next_word<const T: usize>(w: &[__m512i; 16]) -> __m512i {
    let [w1, w9, w14] = [1, 9, 14].map(|n| w[(T + n) % 16]);
    let sigma0 = xor3(
        _mm512_ror_epi32::<7>(w1),
        _mm512_ror_epi32::<18>(w1),
        _mm512_srli_epi32::<3>(w1),
    );
    let sigma1 = xor3(
        _mm512_ror_epi32::<17>(w14),
        _mm512_ror_epi32::<19>(w14),
        _mm512_srli_epi32::<10>(w14),
    );
    add(add(w[T], sigma0), add(w9, sigma1))
}

/// From one register per message to one register per message word.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn message_words(mut rows: [__m512i; 16]) -> [__m512i; 16] {
    for row in &mut rows {
        *row = swap_bytes(*row);
    }
    transpose(rows)
}

/// Transposes a 16 by 16 matrix of words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    // After this, 128-bit lane `q` of `quads[g][c]` is column `4 * q + c` of rows `4 * g` to
    // `4 * g + 3`.
    let mut quads = [[_mm512_setzero_si512(); 4]; 4];
    for (quad, rows) in quads.iter_mut().zip(rows.as_chunks::<4>().0) {
        *quad = transpose_quads(*rows);
    }
    let mut columns = zeros();
    for c in 0..4 {
        let first = _mm512_shuffle_i32x4::<0x44>(quads[0][c], quads[1][c]);
        let second = _mm512_shuffle_i32x4::<0x44>(quads[2][c], quads[3][c]);
        let third = _mm512_shuffle_i32x4::<0xEE>(quads[0][c], quads[1][c]);
        let fourth = _mm512_shuffle_i32x4::<0xEE>(quads[2][c], quads[3][c]);
        columns[c] = _mm512_shuffle_i32x4::<0x88>(first, second);
        columns[4 + c] = _mm512_shuffle_i32x4::<0xDD>(first, second);
        columns[8 + c] = _mm512_shuffle_i32x4::<0x88>(third, fourth);
        columns[12 + c] = _mm512_shuffle_i32x4::<0xDD>(third, fourth);
    }
    columns
}

/// Transposes the 4 by 4 matrix of words in each of the four 128-bit lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn transpose_quads(rows: [__m512i; 4]) -> [__m512i; 4] {
    let low01 = _mm512_unpacklo_epi32(rows[0], rows[1]);
    let high01 = _mm512_unpackhi_epi32(rows[0], rows[1]);
    let low23 = _mm512_unpacklo_epi32(rows[2], rows[3]);
    let high23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    [
        _mm512_unpacklo_epi64(low01, low23),
        _mm512_unpackhi_epi64(low01, low23),
        _mm512_unpacklo_epi64(high01, high23),
        _mm512_unpackhi_epi64(high01, high23),
    ]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn swap_bytes(words: __m512i) -> __m512i {
    let order = _mm_set_epi64x(0x0C0D_0E0F_0809_0A0B, 0x0405_0607_0001_0203);
    _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(order))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn splat<const N: usize>(words: &[u32; N]) -> [__m512i; N] {
    let mut lanes = [_mm512_setzero_si512(); N];
    for (lane, word) in lanes.iter_mut().zip(words) {
        *lane = _mm512_set1_epi32(word.cast_signed());
    }
    lanes
}

#[inline]
#[target_feature(enable = "avx512f")]
fn zeros() -> [__m512i; 16] {
    [_mm512_setzero_si512(); 16]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add(a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(a, b)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn xor3(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0x96>(a, b, c)
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(digest: &mut [u8; 32], value: __m256i) {
    // SAFETY:
    // - The reference makes 32 bytes valid for writes; the store asks for no alignment.
    unsafe { _mm256_storeu_si256(digest.as_mut_ptr().cast(), value) }
}
