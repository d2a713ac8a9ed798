//! Health statistics of every backend against the textbook, one bit at a time.

use proptest::prelude::*;
use qkd_kernels::{
    Backend, HealthState, HealthStats, PROPORTION_WINDOW_BITS, PROPORTION_WINDOW_BYTES,
    REPETITION_BITS, REPETITION_BYTES,
};

/// SP 800-90B, 4.4.1 and 4.4.2, for samples of any kind.
struct Textbook<T> {
    window: u32,
    last: Option<T>,
    run: u32,
    first: Option<T>,
    seen: u32,
    same: u64,
}

impl<T: PartialEq + Copy> Textbook<T> {
    fn new(window: u32) -> Self {
        Self {
            window,
            last: None,
            run: 0,
            first: None,
            seen: 0,
            same: 0,
        }
    }

    /// The length of the run that the sample is in, and how often the window has had its first.
    fn sample(&mut self, sample: T) -> (u32, u64) {
        self.run = if self.last == Some(sample) {
            self.run + 1
        } else {
            1
        };
        self.last = Some(sample);
        if self.seen == 0 {
            (self.first, self.same) = (Some(sample), 0);
        }
        self.same += u64::from(self.first == Some(sample));
        self.seen = (self.seen + 1) % self.window;
        (self.run, self.same)
    }
}

struct Oracle {
    bits: Textbook<u8>,
    bytes: Textbook<u8>,
}

impl Oracle {
    fn new() -> Self {
        Self {
            bits: Textbook::new(PROPORTION_WINDOW_BITS),
            bytes: Textbook::new(PROPORTION_WINDOW_BYTES),
        }
    }

    fn health(&mut self, data: &[u8]) -> HealthStats {
        let mut stats = HealthStats::default();
        for &byte in data {
            let (run, same) = self.bytes.sample(byte);
            stats.bytes_repeat |= run >= REPETITION_BYTES;
            stats.most_same_bytes = stats.most_same_bytes.max(same);
            for at in 0..8 {
                let bit = byte << at >> 7;
                stats.ones += u64::from(bit);
                let (run, same) = self.bits.sample(bit);
                stats.bits_repeat |= run >= REPETITION_BITS;
                stats.most_same_bits = stats.most_same_bits.max(same);
            }
        }
        stats
    }
}

/// Repeatable noise; equal seeds give equal bytes.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let step = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..len).map(step).collect()
}

fn set_bits(bytes: &mut [u8], bits: std::ops::Range<usize>, value: bool) {
    for at in bits {
        let mask = 0x80 >> (at % 8);
        bytes[at / 8] = bytes[at / 8] & !mask | if value { mask } else { 0 };
    }
}

/// The stream in parts of the given lengths, then the rest, each call compared.
fn compare(stream: &[u8], parts: &[usize]) {
    for backend in Backend::all() {
        let (mut oracle, mut state) = (Oracle::new(), HealthState::new());
        let mut rest = stream;
        for part in parts.iter().copied().chain([usize::MAX]) {
            let (now, later) = rest.split_at(part.min(rest.len()));
            let context = (backend.name(), stream.len() - rest.len(), now.len());
            assert_eq!(
                backend.health(&mut state, now),
                oracle.health(now),
                "backend, start and length: {context:?}"
            );
            rest = later;
        }
    }
}

#[test]
fn every_length_and_alignment_counts_as_the_textbook_does() {
    for offset in [0, 1, 3, 31, 63] {
        for len in (0..=300).chain(505..=520).chain(1020..=1030) {
            compare(&noise(offset + len, 7)[offset..], &[]);
        }
    }
}

#[test]
fn runs_and_windows_go_on_over_calls() {
    let stream = noise(5000, 3);
    for part in [1, 7, 8, 32, 127, 128, 129, 511, 512, 513, 1000] {
        compare(&stream, &vec![part; 5000 / part]);
    }
    compare(&stream, &[0, 3, 0, 0, 509, 1024, 0]);
}

#[test]
fn a_run_of_equal_bits_is_found_wherever_it_lies_and_no_shorter_one() {
    for value in [false, true] {
        for start in (0_usize..80).chain(4020..4120) {
            for len in [63, 64, 65, 66, 200] {
                let mut stream = noise(1200, 5);
                // Whatever is beside the run ends it.
                let end = start + len;
                set_bits(&mut stream, start.saturating_sub(1)..end + 1, !value);
                set_bits(&mut stream, start..end, value);
                let stats = Backend::PORTABLE.health(&mut HealthState::new(), &stream);
                assert_eq!(stats.bits_repeat, len >= 65, "{len} bits at {start}");
                compare(&stream, &[]);
                compare(&stream, &[end / 8, 1]);
            }
        }
    }
}

#[test]
fn a_run_of_equal_bytes_is_found_wherever_it_lies_and_no_shorter_one() {
    for start in (0..20).chain(500..525) {
        for len in [7, 8, 9, 10, 30] {
            let mut stream = noise(1200, 5);
            // Not all bits are equal: only the bytes repeat.
            stream[start..start + len].fill(0xA6);
            stream[start + len] = 0x11;
            if start > 0 {
                stream[start - 1] = 0x11;
            }
            let stats = Backend::PORTABLE.health(&mut HealthState::new(), &stream);
            assert_eq!(stats.bytes_repeat, len >= 9, "{len} bytes at {start}");
            assert!(!stats.bits_repeat);
            compare(&stream, &[]);
            compare(&stream, &[start + 4, 3, 1]);
        }
    }
}

#[test]
fn streams_without_entropy_count_as_the_textbook_does() {
    for byte in [0x00, 0xFF, 0x55, 0x80, 0x01] {
        compare(&vec![byte; 3000], &[]);
        compare(&vec![byte; 3000], &[5, 600, 1]);
    }
    let counting: Vec<u8> = (0..=u8::MAX).cycle().take(3000).collect();
    compare(&counting, &[13]);
}

#[test]
fn a_run_that_ended_with_the_last_call_is_not_found_again() {
    let mut stream = [0_u8; 40];
    stream[20..].copy_from_slice(&noise(20, 1));
    stream[20] |= 0x80;
    for backend in Backend::all() {
        let mut state = HealthState::new();
        let first = backend.health(&mut state, &stream[..20]);
        assert!(first.bits_repeat && first.bytes_repeat);
        let second = backend.health(&mut state, &stream[20..]);
        assert!(!second.bits_repeat && !second.bytes_repeat);
    }
}

#[test]
fn a_state_never_prints_what_it_has_seen() {
    let mut state = HealthState::new();
    Backend::detect().health(&mut state, &[0xC7; 3]);
    assert_eq!(format!("{state:?}"), "HealthState(3 bytes into its window)");
}

proptest! {
    #[test]
    fn any_stream_in_any_parts_counts_as_the_textbook_does(
        seed in any::<u64>(),
        and in prop_oneof![Just(0xFF), any::<u8>()],
        len in 0_usize..3000,
        parts in prop::collection::vec(0_usize..900, 0..8),
        run in (0_usize..24_000, 0_usize..200, any::<bool>()),
    ) {
        let mut stream = noise(len, seed);
        stream.iter_mut().for_each(|byte| *byte &= and);
        let (start, bits, value) = run;
        let end = (start + bits).min(len * 8);
        set_bits(&mut stream, start.min(end)..end, value);
        compare(&stream, &parts);
    }
}
