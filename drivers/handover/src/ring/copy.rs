//! Copies between words that two processes share and bytes that are private, and the wiping of such
//! words.
//!
//! Word by word, which is what an atomic access is, every copy costs a third of a core's rate. Where
//! the processor has them, 32 bytes go at a time, by volatile accesses: such an access is to memory that
//! something outside of this program may change, it happens once, and it moves neither before the
//! `Acquire` load nor behind the `Release` store around it.

use super::sync::{AtomicU64, Ordering};

/// Copies the words out, as far as `out` is long; it is at most as long as they are.
pub(super) fn copy_out(words: &[AtomicU64], out: &mut [u8]) {
    let done = wide_copy_out(words, out);
    copy_out_words(&words[done..], &mut out[8 * done..]);
}

/// Copies `bytes` into the words, which are as many as they need; what is left of the last becomes
/// zero.
pub(super) fn copy_in(words: &[AtomicU64], bytes: &[u8]) {
    let done = wide_copy_in(words, bytes);
    copy_in_words(&words[done..], &bytes[8 * done..]);
}

/// Makes all the words zero.
pub(super) fn wipe(words: &[AtomicU64]) {
    let done = wide_wipe(words);
    wipe_words(&words[done..]);
}

fn copy_out_words(words: &[AtomicU64], out: &mut [u8]) {
    // ORDERING: Relaxed; the caller loaded the write position with Acquire.
    let load = |word: &AtomicU64| word.load(Ordering::Relaxed).to_le_bytes();
    let (whole, rest) = out.as_chunks_mut();
    for (word, bytes) in words.iter().zip(&mut *whole) {
        *bytes = load(word);
    }
    if let Some(word) = words.get(whole.len()) {
        rest.copy_from_slice(&load(word)[..rest.len()]);
    }
}

fn copy_in_words(words: &[AtomicU64], bytes: &[u8]) {
    // ORDERING: Relaxed; the caller stores the write position with Release.
    let store = |word: &AtomicU64, value| word.store(u64::from_le_bytes(value), Ordering::Relaxed);
    let (whole, rest) = bytes.as_chunks();
    for (word, bytes) in words.iter().zip(whole) {
        store(word, *bytes);
    }
    if let Some(word) = words.get(whole.len()) {
        let mut value = [0; 8];
        value[..rest.len()].copy_from_slice(rest);
        store(word, value);
    }
}

fn wipe_words(words: &[AtomicU64]) {
    for word in words {
        // ORDERING: Relaxed; the caller stores the read position with Release.
        word.store(0, Ordering::Relaxed);
    }
}

#[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
use wide::{wide_copy_in, wide_copy_out, wide_wipe};

#[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
use narrow::{wide_copy_in, wide_copy_out, wide_wipe};

/// Where there is nothing wider than a word.
#[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
mod narrow {
    use super::AtomicU64;

    pub(super) fn wide_copy_out(_: &[AtomicU64], _: &mut [u8]) -> usize {
        0
    }

    pub(super) fn wide_copy_in(_: &[AtomicU64], _: &[u8]) -> usize {
        0
    }

    pub(super) fn wide_wipe(_: &[AtomicU64]) -> usize {
        0
    }
}

#[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
#[allow(unsafe_code)]
mod wide {
    use std::arch::x86_64::{
        __m256i, _mm256_loadu_si256, _mm256_setzero_si256, _mm256_storeu_si256,
    };

    use super::AtomicU64;

    /// Words that go at a time.
    const WORDS: usize = 4;

    /// Copies a first part of the words, up to a multiple of 32 bytes, and says how many words it has.
    pub(super) fn wide_copy_out(words: &[AtomicU64], out: &mut [u8]) -> usize {
        let count = words.len().min(out.len() / 8);
        let Some(lead) = lead(words, count) else {
            return 0;
        };
        super::copy_out_words(&words[..lead], &mut out[..8 * lead]);
        let (groups, _) = words[lead..count].as_chunks();
        let (lines, _) = out[8 * lead..].as_chunks_mut();
        // SAFETY: `lead` has found AVX2, and that the first group is aligned to 32 bytes.
        unsafe { groups_out(groups, lines) };
        lead + WORDS * groups.len()
    }

    /// As [`wide_copy_out`], into the words.
    pub(super) fn wide_copy_in(words: &[AtomicU64], bytes: &[u8]) -> usize {
        let count = words.len().min(bytes.len() / 8);
        let Some(lead) = lead(words, count) else {
            return 0;
        };
        super::copy_in_words(&words[..lead], &bytes[..8 * lead]);
        let (groups, _) = words[lead..count].as_chunks();
        let (lines, _) = bytes[8 * lead..].as_chunks();
        // SAFETY: `lead` has found AVX2, and that the first group is aligned to 32 bytes.
        unsafe { groups_in(groups, lines) };
        lead + WORDS * groups.len()
    }

    /// As [`wide_copy_out`], without a source.
    pub(super) fn wide_wipe(words: &[AtomicU64]) -> usize {
        let Some(lead) = lead(words, words.len()) else {
            return 0;
        };
        super::wipe_words(&words[..lead]);
        let (groups, _) = words[lead..].as_chunks();
        // SAFETY: `lead` has found AVX2, and that the first group is aligned to 32 bytes.
        unsafe { groups_wiped(groups) };
        lead + WORDS * groups.len()
    }

    /// Words before the first that is aligned to 32 bytes; `None` where it is not worth it, or the
    /// processor has no AVX2.
    fn lead(words: &[AtomicU64], count: usize) -> Option<usize> {
        let lead = words.as_ptr().align_offset(size_of::<__m256i>());
        (count >= lead.checked_add(2 * WORDS)? && is_x86_feature_detected!("avx2")).then_some(lead)
    }

    /// # Safety
    ///
    /// The processor has AVX2, and the first group is aligned to 32 bytes.
    #[target_feature(enable = "avx2")]
    unsafe fn groups_out(groups: &[[AtomicU64; WORDS]], lines: &mut [[u8; 8 * WORDS]]) {
        for (group, line) in groups.iter().zip(lines) {
            // SAFETY: the group is 32 bytes that are mapped and aligned, as all after the first are; a
            // volatile load may read what another process is writing.
            let value = unsafe { group.as_ptr().cast::<__m256i>().read_volatile() };
            // SAFETY: the line is 32 bytes of this process alone.
            unsafe { _mm256_storeu_si256(line.as_mut_ptr().cast(), value) };
        }
    }

    /// # Safety
    ///
    /// As [`groups_out`].
    #[target_feature(enable = "avx2")]
    unsafe fn groups_in(groups: &[[AtomicU64; WORDS]], lines: &[[u8; 8 * WORDS]]) {
        for (group, line) in groups.iter().zip(lines) {
            // SAFETY: the line is 32 bytes of this process alone.
            let value = unsafe { _mm256_loadu_si256(line.as_ptr().cast()) };
            // SAFETY: the group is 32 bytes that are mapped and aligned; a shared reference to atomics
            // lets what is behind it change, and a volatile store may meet another process's access.
            unsafe {
                group
                    .as_ptr()
                    .cast_mut()
                    .cast::<__m256i>()
                    .write_volatile(value)
            };
        }
    }

    /// # Safety
    ///
    /// As [`groups_out`].
    #[target_feature(enable = "avx2")]
    unsafe fn groups_wiped(groups: &[[AtomicU64; WORDS]]) {
        let zeros = _mm256_setzero_si256();
        for group in groups {
            // SAFETY: as in `groups_in`.
            unsafe {
                group
                    .as_ptr()
                    .cast_mut()
                    .cast::<__m256i>()
                    .write_volatile(zeros)
            };
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Every length and place, so that each way of beginning and ending a run is met.
    #[test]
    fn what_is_copied_in_comes_out_and_nothing_else_is_touched() {
        const ALL: usize = 64;
        let pattern: Vec<u8> = (1..=255).cycle().take(8 * ALL).collect();
        for start in 0..9 {
            for len_bytes in 0..8 * 40_usize {
                let words: Vec<AtomicU64> = (0..ALL).map(|_| AtomicU64::new(u64::MAX)).collect();
                let count = len_bytes.div_ceil(8);
                let run = &words[start..start + count];
                copy_in(run, &pattern[..len_bytes]);
                let mut out = vec![0; len_bytes];
                copy_out(run, &mut out);
                assert_eq!(out, pattern[..len_bytes]);
                let value = |word: &AtomicU64| word.load(Ordering::Relaxed);
                if let Some(last) = run.last().filter(|_| len_bytes % 8 > 0) {
                    let rest = &value(last).to_le_bytes()[len_bytes % 8..];
                    assert!(rest.iter().all(|&byte| byte == 0));
                }
                wipe(run);
                assert!(run.iter().all(|word| value(word) == 0));
                let others = words[..start].iter().chain(&words[start + count..]);
                assert!(others.map(value).all(|value| value == u64::MAX));
            }
        }
    }
}
