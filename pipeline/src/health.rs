//! Health tests on the QKD-keys of every module pair, as they come in.
//!
//! The continuous tests of NIST SP 800-90B, repetition count (4.4.1) and adaptive proportion
//! (4.4.2), on bits with one bit of entropy and on bytes with eight, and a count of ones. They find
//! a source that is stuck, biased or cut off. They say nothing about an eavesdropper.
//!
//! Runs and windows go on from one QKD-key of a pair to the next, so keys of 32 bytes are tested as
//! well as long ones. After a failure they begin anew: the next QKD-key is judged on its own. The
//! samples are the whole bytes of a QKD-key; up to seven bits after them are not looked at.
//!
//! The verdict is public, for it is reported; the time to reach it does not depend on key.

use std::collections::HashMap;

use qkd_kernels::{Backend, HealthState};
use qkd_keyfile::ModulePairId;

use crate::waiting::RefuseReason;

/// The cut-off of the adaptive proportion test for bits, window 1024, one bit of entropy per bit,
/// false alarm rate 2^-64 (SP 800-90B, 4.4.2; exact sums, see the test below).
const MOST_SAME_BITS: u64 = 657;

/// The same for bytes, window 512, eight bits of entropy per byte.
const MOST_SAME_BYTES: u64 = 26;

/// The tests of all module pairs of a stage.
#[derive(Debug)]
pub(crate) struct HealthTests {
    backend: Backend,
    /// One for each module pair that ever delivered; which there are is configuration.
    pairs: HashMap<ModulePairId, HealthTest>,
}

impl HealthTests {
    pub(crate) fn new(backend: Backend) -> Self {
        Self {
            backend,
            pairs: HashMap::new(),
        }
    }

    /// Judges the next QKD-key of a module pair by its whole bytes.
    ///
    /// # Errors
    ///
    /// As [`HealthTest::judge`].
    pub(crate) fn judge(&mut self, pair: &ModulePairId, key: &[u8]) -> Result<(), RefuseReason> {
        if !self.pairs.contains_key(pair) {
            self.pairs
                .insert(pair.clone(), HealthTest::new(self.backend));
        }
        let Some(test) = self.pairs.get_mut(pair) else {
            unreachable!("it has just been put there");
        };
        test.judge(key)
    }
}

/// The tests of one source of random bits.
#[derive(Debug)]
pub struct HealthTest {
    backend: Backend,
    state: HealthState,
}

impl HealthTest {
    /// Begins anew.
    #[must_use]
    pub fn new(backend: Backend) -> Self {
        Self {
            backend,
            state: HealthState::new(),
        }
    }

    /// Judges the source's next bytes; after a failure the tests begin anew.
    ///
    /// # Errors
    ///
    /// The first test that failed: [`RefuseReason::Repetition`], [`RefuseReason::Proportion`] or
    /// [`RefuseReason::Bias`].
    pub fn judge(&mut self, bytes: &[u8]) -> Result<(), RefuseReason> {
        let stats = self.backend.health(&mut self.state, bytes);
        let verdict = if stats.bits_repeat || stats.bytes_repeat {
            Err(RefuseReason::Repetition)
        } else if stats.most_same_bits >= MOST_SAME_BITS || stats.most_same_bytes >= MOST_SAME_BYTES
        {
            Err(RefuseReason::Proportion)
        } else if is_biased(stats.ones, bytes.len() as u64 * 8) {
            Err(RefuseReason::Bias)
        } else {
            Ok(())
        };
        if verdict.is_err() {
            self.state = HealthState::new();
        }
        verdict
    }
}

/// Whether so many or so few ones come from fair bits with a probability of 2^-64 at most.
///
/// Hoeffding: the probability that the ones of n fair bits are d/2 or more away from n/2 is at most
/// 2 exp(-d^2 / 2n), which is 2^-64 at d^2 = 130 n ln 2 = 90.1 n. So a key of 4 KiB may have 5 %
/// more ones than zeros and one of 1 MiB 0.3 %; up to 91 bits, anything is possible.
fn is_biased(ones: u64, bits: u64) -> bool {
    let difference = (2 * ones).abs_diff(bits);
    u128::from(difference) * u128::from(difference) > 91 * u128::from(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The probability that at least `least` of `n` samples equal a value of probability `p`.
    fn tail(n: u32, p: f64, least: u64) -> f64 {
        let (mut term, mut sum) = (((1.0 - p).ln() * f64::from(n)).exp(), 0.0);
        for k in 0..n {
            if u64::from(k) >= least {
                sum += term;
            }
            term *= f64::from(n - k) / f64::from(k + 1) * p / (1.0 - p);
        }
        sum + term
    }

    #[test]
    fn cut_offs_are_the_lowest_with_a_false_alarm_rate_of_two_to_the_minus_64() {
        let rate = 2.0_f64.powi(-64);
        for (n, p, cut_off) in [
            (1024, 0.5, MOST_SAME_BITS),
            (512, 1.0 / 256.0, MOST_SAME_BYTES),
        ] {
            assert!(tail(n, p, cut_off) <= rate);
            assert!(tail(n, p, cut_off - 1) > rate);
        }
    }

    #[test]
    fn the_bound_on_ones_is_hoeffdings() {
        for bits in [92, 4096, 32 << 10, 8 << 20, 1 << 40] {
            let (mut fair, mut biased) = (0_u64, bits / 2);
            while biased - fair > 1 {
                let middle = fair.midpoint(biased);
                if is_biased(bits / 2 + middle, bits) {
                    biased = middle;
                } else {
                    fair = middle;
                }
            }
            let d = 2.0 * biased as f64;
            let log2 = 1.0 - d * d / (2.0 * bits as f64) / std::f64::consts::LN_2;
            assert!(log2 <= -64.0, "{bits} bits: 2^{log2}");
            assert!(is_biased(bits / 2 - biased, bits) && !is_biased(bits / 2 - fair, bits));
        }
        assert!(!is_biased(0, 91) && is_biased(0, 92));
        assert!(is_biased(u64::MAX / 2, u64::MAX / 2));
    }
}
