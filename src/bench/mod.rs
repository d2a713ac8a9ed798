//! What is measured: the cases of `cargo bench` and of `qkd-bridge bench`, apart from how the time is
//! taken. Criterion's benches time them one after another; [`groups`] times them in turns and knows
//! the goals.
//!
//! Every group holds ours and its rival, and the answers are checked before anything is timed.

pub mod groups;
pub mod health;
pub mod otp_relay;
pub mod pipeline;
pub mod sha256_units;
pub mod turns;

/// Repeatable noise; equal seeds give equal bytes.
#[must_use]
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let step = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..len).map(step).collect()
}
