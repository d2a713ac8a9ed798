//! How bits are spread, at a glance: finds a stuck bit, not a bad generator.

use serde::Serialize;

/// How bits are spread.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Randomness {
    pub(super) ones: u64,
    /// One half in the long run.
    pub(super) ones_ratio: f64,
    /// Deviation of the ones, in standard deviations; beyond 4 is worth a question.
    pub(super) ones_sigma: f64,
    /// Part of neighbouring bits that differ; one half in the long run.
    pub(super) changes_ratio: f64,
    /// Its deviation, in standard deviations.
    pub(super) changes_sigma: f64,
    /// Most equal bits in a row; about the logarithm of their number to base 2.
    pub(super) longest_run_bits: u64,
}

/// Counts over keys, each by itself: nothing of a key stays.
#[derive(Debug, Default)]
pub(super) struct Tally {
    bits: u64,
    pairs: u64,
    ones: u64,
    changes: u64,
    longest_run_bits: u64,
}

impl Tally {
    /// Counts the first `bits` bits.
    pub(super) fn add(&mut self, key: &[u8], bits: u32) {
        if bits == 0 {
            return;
        }
        let bit = |at: u32| key[(at / 8) as usize] >> (7 - at % 8) & 1;
        let mut before = bit(0);
        let mut run = 0_u64;
        for at in 0..bits {
            let now = bit(at);
            self.ones += u64::from(now);
            self.changes += u64::from(now != before);
            run = if now == before { run + 1 } else { 1 };
            self.longest_run_bits = self.longest_run_bits.max(run);
            before = now;
        }
        self.bits += u64::from(bits);
        self.pairs += u64::from(bits - 1);
    }

    /// `None` where there were too few bits to say anything.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 bits")]
    pub(super) fn randomness(&self) -> Option<Randomness> {
        if self.pairs == 0 {
            return None;
        }
        let sigma = |count: u64, of: f64| (2.0 * count as f64 - of) / of.sqrt();
        let (bits, pairs) = (self.bits as f64, self.pairs as f64);
        Some(Randomness {
            ones: self.ones,
            ones_ratio: self.ones as f64 / bits,
            ones_sigma: sigma(self.ones, bits),
            changes_ratio: self.changes as f64 / pairs,
            changes_sigma: sigma(self.changes, pairs),
            longest_run_bits: self.longest_run_bits,
        })
    }
}

impl Randomness {
    /// Of the first `bits` bits of one key.
    pub(super) fn of(key: &[u8], bits: u32) -> Option<Self> {
        let mut tally = Tally::default();
        tally.add(key, bits);
        tally.randomness()
    }

    /// Its lines, each a name and a text.
    pub(super) fn lines(&self) -> [(&'static str, String); 3] {
        let spread = |ratio: f64, sigma: f64| format!("{:.2} % ({sigma:+.1} sigma)", ratio * 100.0);
        [
            ("ones", spread(self.ones_ratio, self.ones_sigma)),
            ("changes", spread(self.changes_ratio, self.changes_sigma)),
            ("longest run", format!("{} bits", self.longest_run_bits)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_counted_to_the_last_one_and_not_further() {
        // 1111 0000 1|000 0000: nine bits.
        let random = Randomness::of(&[0xf0, 0x80], 9).unwrap();
        assert_eq!((random.ones, random.longest_run_bits), (5, 4));
        assert!((random.changes_ratio - 2.0 / 8.0).abs() < 1e-9);
        assert!((random.ones_sigma - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!(Randomness::of(&[0x80], 1), None);
    }

    #[test]
    fn stuck_bits_are_far_from_the_middle() {
        assert!(Randomness::of(&[0xff; 128], 1024).unwrap().ones_sigma > 30.0);
        let alternating = Randomness::of(&[0x55; 128], 1024).unwrap();
        assert!(alternating.ones_sigma.abs() < 0.1 && alternating.changes_sigma > 30.0);
    }

    #[test]
    fn a_run_does_not_go_on_into_the_next_key() {
        let mut tally = Tally::default();
        tally.add(&[0x0f], 8);
        tally.add(&[0xf0], 8);
        let all = tally.randomness().unwrap();
        assert_eq!((all.longest_run_bits, all.ones), (4, 8));
        assert!((all.changes_ratio - 2.0 / 14.0).abs() < 1e-9);
    }
}
