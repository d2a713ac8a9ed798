//! What the benches of whole nodes share: networks of processes, a producer for rings, a client.

#![allow(dead_code, reason = "every bench uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

pub(crate) mod client;
pub(crate) mod latency;
pub(crate) mod net;
pub(crate) mod ring;

use std::{path::PathBuf, time::Duration};

use criterion::{BenchmarkGroup, SamplingMode, measurement::WallTime};

/// Whether this run only has to show that the benches run: sizes are small then, and nothing is
/// written.
pub(crate) fn is_trial() -> bool {
    std::env::args().any(|arg| arg == "--test")
}

/// One iteration per sample, ten samples: an iteration is a fixed amount of work of some tenths of
/// a second, with everything that it needs made beforehand.
pub(crate) fn fixed_amounts(group: &mut BenchmarkGroup<'_, WallTime>) {
    group
        .sampling_mode(SamplingMode::Flat)
        .sample_size(10)
        .warm_up_time(Duration::from_millis(1))
        .measurement_time(Duration::from_millis(10));
}

/// Prints what a byte of key has cost all nodes together. Rates of two runs compare on an idle machine
/// alone, this on any.
pub(crate) fn tell_cpu(time: Duration, key_bytes: usize) {
    if !is_trial() {
        let ns = time.as_nanos() as f64 / key_bytes as f64;
        println!("processor time of all nodes: {ns:.2} ns for a byte of key");
    }
}

/// Where criterion writes.
pub(crate) fn output_folder() -> PathBuf {
    let var = |name| std::env::var_os(name).map(PathBuf::from);
    var("CRITERION_HOME").unwrap_or_else(|| {
        let target = var("CARGO_TARGET_DIR").unwrap_or_else(|| PathBuf::from("target"));
        target.join("criterion")
    })
}

/// Repeatable noise that health tests and duplicate detection take for key.
pub(crate) fn noise(len_bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = vec![0; len_bytes];
    for chunk in bytes.chunks_mut(8) {
        // SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        chunk.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes()[..chunk.len()]);
    }
    bytes
}
