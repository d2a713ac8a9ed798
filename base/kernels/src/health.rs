//! Health statistics of a stream of key bytes, in one pass: what the continuous tests of NIST
//! SP 800-90B (4.4.1 repetition count, 4.4.2 adaptive proportion) and a count of ones ask for.
//!
//! Bits are taken from the top of each byte on, as in the key file. A word `d` of the stream has a
//! one where a bit differs from the one before; so runs of equal bits are runs of zeros in `d`,
//! also over the borders of bytes, words, windows and calls. A run of 64 zeros always lies inside
//! two neighbouring words: it is there exactly if `d1 <= t(d0)`, where `t` masks the zeros at the
//! end of `d0`. Runs of equal bytes are found in the same way, by words whose bytes are zero where
//! a byte equals the one before. No step depends on a value.

use crate::wipe::{wipe, wipe_values};

/// Equal bits in a row that are a repetition: the cut-off of SP 800-90B, 4.4.1, for samples of one
/// bit with one bit of entropy, at a false alarm rate of 2^-64.
pub const REPETITION_BITS: u32 = 65;

/// Equal bytes in a row that are a repetition: the same cut-off for samples of eight bits.
pub const REPETITION_BYTES: u32 = 9;

/// Bits in a window of the adaptive proportion test for binary samples (SP 800-90B, 4.4.2).
pub const PROPORTION_WINDOW_BITS: u32 = 1024;

/// Bytes in a window of the same test for other samples. It holds four windows of bits.
pub const PROPORTION_WINDOW_BYTES: u32 = 512;

/// What [`Backend::health`](crate::Backend::health) found in the bytes of one call.
///
/// Nothing here is a verdict: cut-offs are the caller's business, but for the repetitions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HealthStats {
    /// How many bits were ones.
    pub ones: u64,
    /// A run of [`REPETITION_BITS`] equal bits or more reached into these bytes.
    pub bits_repeat: bool,
    /// A run of [`REPETITION_BYTES`] equal bytes or more reached into these bytes.
    pub bytes_repeat: bool,
    /// How often the first bit of a window was in it, in that of the windows touched by these
    /// bytes where it was most often. The last window may be incomplete.
    pub most_same_bits: u64,
    /// The same for windows of bytes.
    pub most_same_bytes: u64,
}

/// Where a stream of key bytes stands between two calls of
/// [`Backend::health`](crate::Backend::health).
///
/// It holds two bytes of the stream; they are wiped on drop and never printed.
pub struct HealthState {
    started: bool,
    pub(crate) last_byte: u8,
    /// How many bits in a row up to the end equal the one before them; 63 stands for more, too.
    pub(crate) equal_bits: u32,
    /// How many bytes in a row up to the end equal the one before them; 7 stands for more, too.
    pub(crate) equal_bytes: u32,
    /// How much of the present window of bytes is over; below [`WINDOW`].
    window_bytes: usize,
    first_byte: u8,
    same_bytes: u64,
    /// All ones if the first bit of the present window of bits is one, otherwise zero.
    first_bit: u64,
    same_bits: u64,
}

impl HealthState {
    /// The start of a stream.
    pub const fn new() -> Self {
        Self {
            started: false,
            last_byte: 0,
            equal_bits: 0,
            equal_bytes: 0,
            window_bytes: 0,
            first_byte: 0,
            same_bytes: 0,
            first_bit: 0,
            same_bits: 0,
        }
    }
}

impl Default for HealthState {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for HealthState {
    fn drop(&mut self) {
        wipe(core::slice::from_mut(&mut self.last_byte));
        wipe(core::slice::from_mut(&mut self.first_byte));
    }
}

impl core::fmt::Debug for HealthState {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "HealthState({} bytes into its window)",
            self.window_bytes
        )
    }
}

/// Inlined into the x86 backends as well, where the compiler turns it into wider instructions.
#[inline(always)]
pub(crate) fn health(state: &mut HealthState, data: &[u8]) -> HealthStats {
    health_by(state, data, |state, windows, stats| {
        let mut words = Words::new();
        for window in windows {
            state.whole_window(window, &mut words, stats);
        }
        words.wipe();
    })
}

/// [`health`], with another way to go over whole windows (at least one).
#[inline(always)]
pub(crate) fn health_by(
    state: &mut HealthState,
    data: &[u8],
    whole_windows: impl FnOnce(&mut HealthState, &[[u8; WINDOW]], &mut HealthStats),
) -> HealthStats {
    let mut stats = HealthStats::default();
    let Some(first) = data.first() else {
        return stats;
    };
    if !state.started {
        // Whatever came before differs from the first byte, in its first bit too.
        state.last_byte = !first;
        state.started = true;
    }
    let to_border = (WINDOW - state.window_bytes) % WINDOW;
    let (head, data) = data.split_at(to_border.min(data.len()));
    state.part_of_window(head, &mut stats);
    let (windows, tail) = data.as_chunks();
    if !windows.is_empty() {
        whole_windows(state, windows, &mut stats);
    }
    state.part_of_window(tail, &mut stats);
    stats
}

impl HealthState {
    /// Bytes that stay inside one window of bytes.
    #[inline(always)]
    fn part_of_window(&mut self, mut bytes: &[u8], stats: &mut HealthStats) {
        while let Some(first) = bytes.first() {
            let to_border = BIT_WINDOW - self.window_bytes % BIT_WINDOW;
            let (piece, rest) = bytes.split_at(to_border.min(bytes.len()));
            if to_border == BIT_WINDOW {
                self.same_bits = 0;
                self.first_bit = first_bit(u64::from(*first) << 56);
            }
            if self.window_bytes == 0 {
                self.same_bytes = 0;
                self.first_byte = *first;
            }
            let (words, last) = piece.as_chunks::<8>();
            for word in words {
                self.word(u64::from_be_bytes(*word), 64, stats);
            }
            if !last.is_empty() {
                let (mut word, mut bits) = (0, 0);
                for byte in last {
                    word = word << 8 | u64::from(*byte);
                    bits += 8;
                }
                self.word(word << (64 - bits), bits, stats);
            }
            self.window_bytes = (self.window_bytes + piece.len()) % WINDOW;
            stats.most_same_bits = stats.most_same_bits.max(self.same_bits);
            stats.most_same_bytes = stats.most_same_bytes.max(self.same_bytes);
            bytes = rest;
        }
    }

    /// The top `bits` of `word`, whole bytes; the others are zero.
    #[inline(always)]
    fn word(&mut self, word: u64, bits: u32, stats: &mut HealthStats) {
        let unused = (u64::MAX >> 1) >> (bits - 1);
        let before = u64::from(self.last_byte);
        let ones = word.count_ones();
        stats.ones += u64::from(ones);
        self.same_bits += u64::from(((word ^ !self.first_bit) & !unused).count_ones());
        let other = other_bytes(word ^ splat(self.first_byte)) | unused & TOP_BITS;
        self.same_bytes += u64::from(8 - other.count_ones());

        let changed_bits = differs(word, before, 1) | unused;
        let run = lowest(self.equal_bits);
        stats.bits_repeat |= changed_bits <= run;
        self.equal_bits = equal_bits(moved_on(!run, changed_bits, bits));

        let changed_bytes = other_bytes(differs(word, before, 8)) | unused & TOP_BITS;
        let run = lowest(self.equal_bytes * 8);
        stats.bytes_repeat |= changed_bytes <= run;
        self.equal_bytes = equal_bytes(moved_on(!run, changed_bytes, bits));

        self.last_byte = (word >> (64 - bits)).to_le_bytes()[0];
    }

    /// Where the stream is at a border: the same as [`HealthState::part_of_window`], in loops
    /// whose rounds are independent of each other.
    #[inline(always)]
    fn whole_window(&mut self, bytes: &[u8; WINDOW], words: &mut Words, stats: &mut HealthStats) {
        let Words {
            stream,
            bits,
            bytes: changed_bytes,
        } = words;
        stream[0] = u64::from(self.last_byte);
        for (word, bytes) in stream[1..].iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_be_bytes(*bytes);
        }
        bits[0] = !lowest(self.equal_bits);
        changed_bytes[0] = !lowest(self.equal_bytes * 8);
        for i in 0..WORDS {
            bits[i + 1] = differs(stream[i + 1], stream[i], 1);
            changed_bytes[i + 1] = other_bytes(differs(stream[i + 1], stream[i], 8));
        }
        let (mut bits_repeat, mut bytes_repeat) = (0, 0);
        for i in 0..WORDS {
            bits_repeat |= u64::from(bits[i + 1] <= zeros_at_end(bits[i]));
            bytes_repeat |= u64::from(changed_bytes[i + 1] <= zeros_at_end(changed_bytes[i]));
        }
        stats.bits_repeat |= bits_repeat != 0;
        stats.bytes_repeat |= bytes_repeat != 0;

        stats.add_ones(bytes, count_ones(bytes));

        // Counted in lanes of one byte each, which cannot overflow, and added up at the end.
        let mut same = [0_u8; 64];
        for row in bytes.as_chunks::<64>().0 {
            for (same, byte) in same.iter_mut().zip(row) {
                *same += u8::from(*byte == bytes[0]);
            }
        }
        let same = same.iter().map(|&same| u64::from(same)).sum();
        stats.most_same_bytes = stats.most_same_bytes.max(same);

        self.equal_bits = equal_bits(bits[WORDS]);
        self.equal_bytes = equal_bytes(changed_bytes[WORDS]);
        self.last_byte = bytes[WINDOW - 1];
    }
}

impl HealthStats {
    /// The ones of the four windows of bits in a window of bytes.
    #[inline(always)]
    pub(crate) fn add_ones(&mut self, bytes: &[u8; WINDOW], ones_of_windows: [u64; 4]) {
        let windows = bytes.as_chunks::<BIT_WINDOW>().0;
        for (window, ones) in windows.iter().zip(ones_of_windows) {
            let zeros = u64::from(PROPORTION_WINDOW_BITS) - ones;
            let one_first = first_bit(u64::from(window[0]) << 56);
            let same = ones & one_first | zeros & !one_first;
            self.ones += ones;
            self.most_same_bits = self.most_same_bits.max(same);
        }
    }
}

/// One window, as words of the stream and of the changes in it, after the word before it.
struct Words {
    stream: [u64; WORDS + 1],
    bits: [u64; WORDS + 1],
    bytes: [u64; WORDS + 1],
}

impl Words {
    #[inline(always)]
    fn new() -> Self {
        let zeros = [0; WORDS + 1];
        Self {
            stream: zeros,
            bits: zeros,
            bytes: zeros,
        }
    }

    #[inline(always)]
    fn wipe(&mut self) {
        for words in [&mut self.stream, &mut self.bits, &mut self.bytes] {
            wipe_values(words);
        }
    }
}

/// The ones of each window of bits.
///
/// Eight lanes count for themselves, with 16 bits for each window, so that they are added up once
/// for all four.
#[inline(always)]
fn count_ones(bytes: &[u8; WINDOW]) -> [u64; 4] {
    let mut lanes = [0; 8];
    for (number, window) in bytes.as_chunks::<BIT_WINDOW>().0.iter().enumerate() {
        for row in window.as_chunks::<8>().0.as_chunks::<8>().0 {
            for (lane, word) in lanes.iter_mut().zip(row) {
                let ones = u64::from_ne_bytes(*word).count_ones();
                *lane += u64::from(ones) << (16 * number);
            }
        }
    }
    of_windows(lanes.iter().sum())
}

/// Four sums of 16 bits each, the first at the low end.
#[inline(always)]
pub(crate) fn of_windows(sums: u64) -> [u64; 4] {
    [0, 16, 32, 48].map(|shift| sums >> shift & 0xFFFF)
}

/// A one for each bit of `word` that differs from the bit `by` places before it; `before` is the
/// word before.
#[inline(always)]
fn differs(word: u64, before: u64, by: u32) -> u64 {
    word ^ (word >> by | before << (64 - by))
}

/// The top bit of each byte that is not zero.
#[inline(always)]
fn other_bytes(word: u64) -> u64 {
    (((word & !TOP_BITS) + !TOP_BITS) | word) & TOP_BITS
}

/// A mask of the zeros below the lowest one.
#[inline(always)]
fn zeros_at_end(word: u64) -> u64 {
    !word & word.wrapping_sub(1)
}

/// [`HealthState::equal_bits`] after a word of changes.
#[inline(always)]
pub(crate) fn equal_bits(changed: u64) -> u32 {
    changed.trailing_zeros().min(REPETITION_BITS - 2)
}

/// [`HealthState::equal_bytes`] after a word of changes.
#[inline(always)]
pub(crate) fn equal_bytes(changed: u64) -> u32 {
    (changed.trailing_zeros() / 8).min(REPETITION_BYTES - 2)
}

/// A mask of the lowest `bits`, at most 64.
#[inline(always)]
pub(crate) fn lowest(bits: u32) -> u64 {
    u64::MAX.checked_shr(64 - bits).unwrap_or(0)
}

/// The last 64 bits of `before` and the top `bits` of `word`.
#[inline(always)]
fn moved_on(before: u64, word: u64, bits: u32) -> u64 {
    before.checked_shl(bits).unwrap_or(0) | word >> (64 - bits)
}

#[inline(always)]
fn splat(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

/// All ones if the top bit is one, otherwise zero.
#[inline(always)]
fn first_bit(word: u64) -> u64 {
    0_u64.wrapping_sub(word >> 63)
}

const TOP_BITS: u64 = 0x8080_8080_8080_8080;
/// Bytes in a window of bytes.
pub(crate) const WINDOW: usize = PROPORTION_WINDOW_BYTES as usize;
const WORDS: usize = WINDOW / 8;
/// Bytes in a window of bits.
pub(crate) const BIT_WINDOW: usize = PROPORTION_WINDOW_BITS as usize / 8;
