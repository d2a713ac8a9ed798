//! Detectors that are blind for a while after each detection.

use serde::Deserialize;

/// Dead time of a receiver.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeadTime {
    /// Time for which a pixel sees nothing after a detection, in nanoseconds.
    pub dead_ns: f64,
    /// Pixels or detectors that share the light evenly.
    #[serde(default = "one")]
    pub pixels: u32,
}

fn one() -> u32 {
    1
}

impl DeadTime {
    /// A receiver that is never blind.
    pub const NONE: Self = Self {
        dead_ns: 0.0,
        pixels: 1,
    };

    /// Part of the time in which a detection is possible, where so many a second would be seen
    /// without dead time: `1 / (1 + rate / pixels * dead time)`, the non-paralysable model (G. F.
    /// Knoll, "Radiation Detection and Measurement", ch. 4).
    #[must_use]
    pub fn live(&self, rate_per_s: f64) -> f64 {
        1.0 / (1.0 + rate_per_s / f64::from(self.pixels.max(1)) * self.dead_ns * 1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detections_never_exceed_one_per_pixel_and_dead_time() {
        let receiver = DeadTime {
            dead_ns: 40.0,
            pixels: 8,
        };
        assert!((receiver.live(0.0) - 1.0).abs() < 1e-15);
        // At the rate of one detection per dead time and pixel, half of the time is left.
        assert!((receiver.live(200e6) - 0.5).abs() < 1e-12);
        assert!(1e12 * receiver.live(1e12) < 200e6);
        assert!((DeadTime::NONE.live(1e12) - 1.0).abs() < 1e-15);
    }
}
