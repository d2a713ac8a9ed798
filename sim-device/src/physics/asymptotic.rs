//! Decoy-state BB84 with endless keys: X. Ma, B. Qi, Y. Zhao, H.-K. Lo, "Practical decoy state for
//! quantum key distribution", Phys. Rev. A 72, 012326 (2005). "Ma" below.

use super::{binary_entropy, bisect, transmittance};

/// A system, as Ma describes it (Sec. II; GYS is Table I).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct System {
    /// Loss of the fibre, in dB per km.
    pub fibre_db_per_km: f64,
    /// Transmittance at the receiver, detectors included (`eta_Bob`).
    pub receiver: f64,
    /// Probability that a photon hits the wrong detector (`e_detector`).
    pub misalignment: f64,
    /// Detections per pulse without light (`Y0`).
    pub background: f64,
    /// Inefficiency of error correction, at least 1 (`f`).
    pub correction: f64,
    /// Part of the detections that sifting keeps (`q`).
    pub sifting: f64,
}

/// Error rate of a detection without light (`e0`).
const E0: f64 = 0.5;

impl System {
    /// Transmittance from source to detector over a fibre, with `more_db` on top: Ma Eq. (5).
    #[must_use]
    pub fn eta(&self, km: f64, more_db: f64) -> f64 {
        self.receiver * transmittance(self.fibre_db_per_km * km + more_db)
    }

    /// Detections per pulse of mean photon number `mu` (`Q_mu`): Ma Eq. (10).
    #[must_use]
    pub fn gain(&self, mu: f64, eta: f64) -> f64 {
        self.background - (-eta * mu).exp_m1()
    }

    /// Their error rate (`E_mu`): Ma Eq. (11).
    #[must_use]
    pub fn qber(&self, mu: f64, eta: f64) -> f64 {
        let wrong = E0 * self.background - self.misalignment * (-eta * mu).exp_m1();
        wrong / self.gain(mu, eta)
    }

    /// Secret bits per pulse with infinitely many decoys: Ma Eq. (1), with Eqs. (7) to (9) for a
    /// single photon. Negative where there is no key.
    #[must_use]
    pub fn rate_infinite_decoys(&self, mu: f64, eta: f64) -> f64 {
        // Yield and errors of single photons: Ma Eqs. (7), (9), with eta Y0 neglected as there.
        let y1 = self.background + eta;
        let e1 = (E0 * self.background + self.misalignment * eta) / y1;
        self.rate(mu, eta, y1 * mu * (-mu).exp(), e1)
    }

    /// Secret bits per pulse with vacuum and one weak decoy `nu < mu`: Ma Eqs. (1), (34), (37).
    /// Negative where there is no key.
    #[must_use]
    pub fn rate_vacuum_weak(&self, mu: f64, nu: f64, eta: f64) -> f64 {
        let (q_mu, q_nu) = (self.gain(mu, eta), self.gain(nu, eta));
        let y0 = self.background;
        // Lower bound of the single-photon yield: Ma Eq. (34).
        let y1 = mu / (mu * nu - nu * nu)
            * (q_nu * nu.exp()
                - q_mu * mu.exp() * nu * nu / (mu * mu)
                - (mu * mu - nu * nu) / (mu * mu) * y0);
        if y1 <= 0.0 {
            return -self.sifting * q_mu * self.correction * binary_entropy(self.qber(mu, eta));
        }
        // Upper bound of the single-photon error rate: Ma Eq. (37).
        let e1 = (self.qber(nu, eta) * q_nu * nu.exp() - E0 * y0) / (y1 * nu);
        self.rate(mu, eta, y1 * mu * (-mu).exp(), e1.clamp(0.0, 0.5))
    }

    /// Ma Eq. (1), from Gottesman, Lo, Lütkenhaus and Preskill, Quantum Inf. Comput. 4, 325 (2004).
    fn rate(&self, mu: f64, eta: f64, q1: f64, e1: f64) -> f64 {
        let corrected = self.gain(mu, eta) * self.correction * binary_entropy(self.qber(mu, eta));
        self.sifting * (q1 * (1.0 - binary_entropy(e1)) - corrected)
    }

    /// The mean photon number that gives most key where background is negligible: the zero of
    /// `(1 - mu) exp(-mu) - f h(e) / (1 - h(e))`, Ma Eq. (12).
    #[must_use]
    pub fn optimal_mu(&self) -> f64 {
        let entropy = binary_entropy(self.misalignment);
        let right = self.correction * entropy / (1.0 - entropy);
        bisect(0.0, 1.0, |mu| (1.0 - mu) * (-mu).exp() > right)
    }

    /// Longest fibre over which `rate`, of a transmittance, is positive, in km.
    #[must_use]
    pub fn reach_km(&self, rate: impl Fn(f64) -> f64) -> f64 {
        bisect(0.0, 1000.0, |km| rate(self.eta(km, 0.0)) > 0.0)
    }
}

#[cfg(test)]
mod tests {
    use crate::physics::preset::GYS;

    /// Within a part of 10,000.
    fn assert_near(found: f64, expected: f64) {
        assert!(
            (found / expected - 1.0).abs() < 1e-4,
            "{found:e}, {expected:e} expected"
        );
    }

    #[test]
    fn gys_has_the_published_optimum_and_reach() {
        // Ma: mu = 0.48, 142.05 km, 140.55 km.
        assert!((GYS.optimal_mu() - 0.4789).abs() < 1e-4);
        let infinite = GYS.reach_km(|eta| GYS.rate_infinite_decoys(0.48, eta));
        let weak = GYS.reach_km(|eta| GYS.rate_vacuum_weak(0.48, 0.05, eta));
        assert!((infinite - 142.02).abs() < 0.01, "{infinite}");
        assert!((weak - 140.62).abs() < 0.01, "{weak}");
        assert!((infinite / 142.05 - 1.0).abs() < 1e-3 && (weak / 140.55 - 1.0).abs() < 1e-3);
    }

    #[test]
    fn gys_gives_the_table_of_rates() {
        let table = [
            (0.0, 2.554_588e-3, 2.414_245e-3, 0.033_037),
            (20.0, 9.624_524e-4, 9.077_677e-4, 0.033_097),
            (50.0, 2.225_961e-4, 2.096_250e-4, 0.033_412),
            (100.0, 1.718_444e-5, 1.602_005e-5, 0.037_582),
            (120.0, 4.814_562e-6, 4.368_615e-6, 0.044_862),
            (140.0, 2.464_667e-7, 7.377_906e-8, 0.062_959),
        ];
        for (km, infinite, weak, qber) in table {
            let eta = GYS.eta(km, 0.0);
            assert_near(GYS.rate_infinite_decoys(0.48, eta), infinite);
            assert_near(GYS.rate_vacuum_weak(0.48, 0.05, eta), weak);
            assert_near(GYS.qber(0.48, eta), qber);
        }
    }

    #[test]
    fn decoys_that_are_few_never_give_more_than_decoys_without_end() {
        for km in 0..160 {
            let eta = GYS.eta(f64::from(km), 0.0);
            for nu in [0.01, 0.05, 0.1, 0.2] {
                let weak = GYS.rate_vacuum_weak(0.48, nu, eta);
                assert!(weak <= GYS.rate_infinite_decoys(0.48, eta), "{km} km, {nu}");
            }
        }
    }

    #[test]
    fn where_there_is_no_light_there_is_no_key() {
        assert!(GYS.rate_infinite_decoys(0.48, 0.0) < 0.0);
        assert!(GYS.rate_vacuum_weak(0.48, 0.05, 0.0) < 0.0);
        assert!((GYS.qber(0.48, 0.0) - 0.5).abs() < 1e-12);
    }
}
