//! The machine's clock and generator: the only place that reads them.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use qkd_keyfile::{Clock, Entropy, Mono, Now, UnixTime};

/// The machine's clocks.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock(Instant);

impl SystemClock {
    /// Counts monotonic time from now.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// The instant that a monotonic time of this clock is.
    #[must_use]
    pub fn instant(&self, at: Mono) -> Instant {
        self.0 + at.0
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Now {
        Now {
            mono: Mono(self.0.elapsed()),
            unix: unix_now(),
        }
    }
}

/// The machine's time of day.
#[must_use]
pub fn unix_now() -> UnixTime {
    let unix = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    UnixTime(i64::try_from(unix.as_nanos()).unwrap_or(i64::MAX))
}

/// The operating system's generator; for long outputs, a generator that it seeds.
///
/// To fill units from the kernel's took longer than to encrypt them. Beyond 256 bytes they
/// come from the cryptographic library's CTR_DRBG (AES-256; NIST SP
/// 800-90A), which is seeded, and seeded again, from the kernel's. Both are computational: level
/// `any`.
#[derive(Debug, Clone, Copy)]
pub struct SystemEntropy;

/// Identities, nonces and single keys come straight from the kernel.
const DIRECT_MAX_BYTES: usize = 256;

impl Entropy for SystemEntropy {
    fn fill(&mut self, out: &mut [u8]) {
        let error = if out.len() <= DIRECT_MAX_BYTES {
            getrandom::fill(out).err().map(|error| error.to_string())
        } else {
            let filled = aws_lc_rs::rand::fill(out);
            filled.err().map(|error| error.to_string())
        };
        if let Some(error) = error {
            // Weak bytes would become keys; there is nothing to go on with.
            tracing::error!(%error, "the system's random generator failed");
            std::process::abort();
        }
    }
}

/// 16 random bytes.
#[must_use]
pub fn random_16() -> [u8; 16] {
    let mut bytes = [0; 16];
    SystemEntropy.fill(&mut bytes);
    bytes
}
