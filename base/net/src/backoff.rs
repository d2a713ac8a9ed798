//! How long to wait before trying again.

use std::time::Duration;

/// Waits that double, each shortened at random by up to half, so that nodes that lost the same peer
/// do not return to it all at once.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
    random: u64,
}

impl Backoff {
    /// Waits from `first` to `longest`; different seeds wait differently.
    #[must_use]
    pub fn new(first: Duration, longest: Duration, seed: u64) -> Self {
        Self {
            first,
            longest,
            next: first,
            random: seed,
        }
    }

    /// Starts over: it worked.
    pub fn reset(&mut self) {
        self.next = self.first;
    }

    /// The wait before the next try.
    pub fn wait(&mut self) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(self.longest);
        // Knuth's linear congruential generator; its high bits are good enough to spread dials.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let shortened_per_mille = u32::try_from((self.random >> 32) % 501).unwrap_or(0);
        wait - wait / 1000 * shortened_per_mille
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(100);

    #[test]
    fn waits_double_up_to_the_longest_and_start_over() {
        let mut backoff = Backoff::new(FIRST, FIRST * 50, 7);
        for expected_ms in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            let wait = backoff.wait();
            let longest = Duration::from_millis(expected_ms);
            assert!(
                wait >= longest / 2 && wait <= longest,
                "{wait:?} of {longest:?}"
            );
        }
        backoff.reset();
        assert!(backoff.wait() <= FIRST);
    }

    #[test]
    fn two_seeds_wait_differently() {
        let waits = |seed| {
            let mut backoff = Backoff::new(FIRST, FIRST * 50, seed);
            [backoff.wait(), backoff.wait(), backoff.wait()]
        };
        assert_ne!(waits(1), waits(2));
    }
}
