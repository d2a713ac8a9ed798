//! Health statistics of a stream.

use qkd_kernels::{
    Backend, HealthState, HealthStats, PROPORTION_WINDOW_BITS, PROPORTION_WINDOW_BYTES,
    REPETITION_BITS, REPETITION_BYTES,
};

/// The rival: SP 800-90B, 4.4.1 and 4.4.2, as it stands there, sample by sample.
#[derive(Debug, Default)]
pub struct Textbook {
    bits: Samples<PROPORTION_WINDOW_BITS>,
    bytes: Samples<PROPORTION_WINDOW_BYTES>,
}

#[derive(Debug, Default)]
struct Samples<const WINDOW: u32> {
    last: Option<u8>,
    run: u32,
    first: u8,
    seen: u32,
    same: u64,
}

impl<const WINDOW: u32> Samples<WINDOW> {
    #[inline]
    fn sample(&mut self, sample: u8) {
        if self.last == Some(sample) {
            self.run += 1;
        } else {
            self.last = Some(sample);
            self.run = 1;
        }
        if self.seen == 0 {
            self.first = sample;
            self.same = 0;
        }
        if sample == self.first {
            self.same += 1;
        }
        self.seen += 1;
        if self.seen == WINDOW {
            self.seen = 0;
        }
    }
}

impl Textbook {
    /// Statistics of the next bytes of the stream.
    pub fn health(&mut self, data: &[u8]) -> HealthStats {
        let mut stats = HealthStats::default();
        for &byte in data {
            self.bytes.sample(byte);
            stats.bytes_repeat |= self.bytes.run >= REPETITION_BYTES;
            stats.most_same_bytes = stats.most_same_bytes.max(self.bytes.same);
            for at in (0..8).rev() {
                let bit = byte >> at & 1;
                stats.ones += u64::from(bit);
                self.bits.sample(bit);
                stats.bits_repeat |= self.bits.run >= REPETITION_BITS;
                stats.most_same_bits = stats.most_same_bits.max(self.bits.same);
            }
        }
        stats
    }
}

/// Refuses to time a wrong answer: fair noise, then a stream that fails every test.
///
/// # Panics
///
/// If the answer is wrong.
pub fn check(backend: Backend, data: &[u8]) {
    let (mut state, mut textbook) = (HealthState::new(), Textbook::default());
    let mut stuck = data.to_vec();
    stuck[100..300].fill(0);
    for data in [data, &stuck] {
        let expected = textbook.health(data);
        assert_eq!(backend.health(&mut state, data), expected);
        assert_eq!(expected.bits_repeat, data == stuck);
    }
}
