//! Time and randomness, as values that come in from outside.
//!
//! Only the program reads the machine's clock and generator; protocol logic gets them through these
//! types, so that a test can run years in a second and repeat a run from its seed.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// Monotonic time since some start that means nothing by itself. Time-outs are counted in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mono(pub Duration);

impl Mono {
    /// The time `later` after this one; stops at the end of time.
    #[must_use]
    pub fn after(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later))
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// Nanoseconds since 1970-01-01 UTC. Informative only: no decision rests on it (clocks jump).
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct UnixTime(pub i64);

impl fmt::Display for UnixTime {
    /// Seconds with nine decimals.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, ns) = (if self.0 < 0 { "-" } else { "" }, self.0.unsigned_abs());
        write!(f, "{sign}{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
    }
}

/// Both clocks, read together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Now {
    /// For time-outs.
    pub mono: Mono,
    /// For time stamps.
    pub unix: UnixTime,
}

/// A source of time.
pub trait Clock: Send {
    /// The time now.
    fn now(&self) -> Now;
}

/// A source of random bytes.
pub trait Entropy: Send {
    /// Fills `out`.
    ///
    /// A generator that cannot deliver ends the process rather than return weak bytes: every
    /// caller uses them as key, mask or identity.
    fn fill(&mut self, out: &mut [u8]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_steps_back_gives_no_negative_duration() {
        let early = Mono(Duration::from_secs(1));
        assert_eq!(early.since(Mono(Duration::from_secs(2))), Duration::ZERO);
    }

    #[test]
    fn unix_time_prints_nanoseconds() {
        assert_eq!(UnixTime(1_500_000_000).to_string(), "1.500000000");
        assert_eq!(UnixTime(-1).to_string(), "-0.000000001");
        assert_eq!(UnixTime(i64::MIN).to_string(), "-9223372036.854775808");
    }
}
