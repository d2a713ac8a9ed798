//! What the benches time, apart from how they time it: `ratios` runs all of it, each criterion
//! bench its own part.

#![allow(dead_code, reason = "each bench uses its own part")]

pub(crate) mod health;
pub(crate) mod otp_relay;
pub(crate) mod pipeline;
pub(crate) mod sha256_units;

/// Repeatable noise; equal seeds give equal bytes.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let step = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..len).map(step).collect()
}
