//! Slow waves.

use std::f64::consts::TAU;

/// Three quantities that drift, each a sum of waves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drift {
    /// Phases, as parts of a turn.
    phases: [[f64; WAVES.len()]; 3],
}

/// Weight of each wave, and its period as a part of the longest. The periods have no common multiple
/// that anyone would wait for.
const WAVES: [(f64, f64); 4] = [
    (0.5, 1.0),
    (0.25, 0.381_97),
    (0.15, 0.145_9),
    (0.1, 0.055_73),
];

impl Drift {
    pub(super) fn new(random: [u8; 48]) -> Self {
        let (words, _) = random.as_chunks::<4>();
        let turn = |at: usize| f64::from(u32::from_le_bytes(words[at])) / 2_f64.powi(32);
        Self {
            phases: [0, 1, 2].map(|quantity| [0, 1, 2, 3].map(|wave| turn(4 * quantity + wave))),
        }
    }

    /// The three at a time, each from -1 to 1.
    pub(super) fn at(&self, at_s: f64, period_s: f64) -> [f64; 3] {
        self.phases.map(|phases| {
            let waves = WAVES.into_iter().zip(phases);
            waves
                .map(|((weight, part), phase)| {
                    weight * (TAU * (at_s / (part * period_s) + phase)).sin()
                })
                .sum()
        })
    }
}
