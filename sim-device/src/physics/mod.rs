//! Secret key rates of decoy-state BB84, from which the simulated modules take rate and error rate.
//!
//! - [`asymptotic`]: endless keys, infinitely many decoys or vacuum and one weak decoy.
//! - [`finite`]: blocks of finite size, two decoys, composable security.
//! - [`detector`]: what dead time leaves of a count rate.
//! - [`preset`]: systems of the literature, marked *paper-locked* or *fitted*.
//! - [`link`](mod@link): one of these over a fibre of some length, in bits per second.
//!
//! Rates are per emitted pulse unless a name says otherwise; losses are positive decibels. Nothing
//! here is random and nothing is measured: it is arithmetic on `f64`.

pub mod asymptotic;
pub mod detector;
pub mod finite;
pub mod link;
pub mod preset;

/// Binary entropy in bits: `-x log2 x - (1-x) log2 (1-x)`; 0 at and beyond both ends.
#[must_use]
pub fn binary_entropy(x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return 0.0;
    }
    -x * x.log2() - (1.0 - x) * (1.0 - x).log2()
}

/// Part of the light that passes a loss.
#[must_use]
pub fn transmittance(loss_db: f64) -> f64 {
    10_f64.powf(-loss_db / 10.0)
}

/// Probability above which an error rate gives no secret key with one-way post-processing: 11.0 %.
/// Shor and Preskill, Phys. Rev. Lett. 85, 441 (2000): the zero of `1 - 2 h(e)`.
pub const QBER_LIMIT: f64 = 0.110_027_864;

/// The argument in `low..high` at which `is_below` stops to hold, by bisection.
pub(crate) fn bisect(low: f64, high: f64, is_below: impl Fn(f64) -> bool) -> f64 {
    let (mut low, mut high) = (low, high);
    for _ in 0..100 {
        let middle = f64::midpoint(low, high);
        if is_below(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_has_its_known_values() {
        assert!((binary_entropy(0.5) - 1.0).abs() < 1e-15);
        assert!((binary_entropy(0.11) - 0.499_915_958).abs() < 1e-9);
        assert_eq!((binary_entropy(0.0), binary_entropy(1.0)), (0.0, 0.0));
        assert!((1.0 - 2.0 * binary_entropy(QBER_LIMIT)).abs() < 1e-8);
    }
}
