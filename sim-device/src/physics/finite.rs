//! Decoy-state BB84 with blocks of finite size: C. C. W. Lim, M. Curty, N. Walenta, F. Xu, H. Zbinden,
//! "Concise security bounds for practical decoy-state quantum key distribution", Phys. Rev. A 89,
//! 022307 (2014). "Lim" below.
//!
//! Two choices where the paper leaves one or errs:
//!
//! - The error probability of a pulse is printed with the transmittance of the channel; with that of
//!   the whole system (`eta_sys`, as everywhere else) the paper's own figures come out, so that is
//!   what is used.
//! - Lower bounds of counts are clamped at 0: a count is not negative, so the bound holds and is
//!   tighter.

use super::{binary_entropy, transmittance};

/// A system, as Lim describes it (Sec. IV).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct System {
    /// Loss of the fibre, in dB per km.
    pub fibre_db_per_km: f64,
    /// Transmittance at the receiver, detectors included (`eta_Bob`).
    pub receiver: f64,
    /// Dark counts per pulse and detector (`p_dc`).
    pub dark: f64,
    /// Probability of an after-pulse (`p_ap`).
    pub afterpulse: f64,
    /// Errors of the optics (`e_mis`).
    pub misalignment: f64,
    /// Inefficiency of error correction, at least 1 (`f_EC`).
    pub correction: f64,
}

/// What the transmitter sends and the receiver measures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Protocol {
    /// Probability of the basis that gives the key, at either end (`q_x`).
    pub key_basis: f64,
    /// Probabilities of the signal and the first decoy (`p_mu1`, `p_mu2`); the rest is the second.
    pub probabilities: [f64; 2],
    /// Mean photon numbers, falling (`mu_1`, `mu_2`, `mu_3`), with `mu_1 > mu_2 + mu_3`.
    pub intensities: [f64; 3],
}

/// How much is collected, and how secure the key is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Block {
    /// Detections in the key basis (`n_X`).
    pub detections: f64,
    /// Secrecy (`eps_sec`).
    pub secrecy: Secrecy,
    /// Correctness (`eps_cor`).
    pub correctness: f64,
}

/// How secret a key is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Secrecy {
    /// `eps_sec`, however long the key is.
    OfKey(f64),
    /// `eps_sec / l` (`kappa`): what the paper fixes.
    PerBit(f64),
}

/// What a block gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Key {
    /// Pulses that it takes (`N`).
    pub pulses: f64,
    /// Detections of no photon in the key basis, at least (`s_X0`).
    pub vacuum: f64,
    /// Detections of one photon in the key basis, at least (`s_X1`).
    pub single: f64,
    /// The same in the other basis (`s_Z1`).
    pub single_other: f64,
    /// Errors among these, at most (`v_Z1`).
    pub errors_other: f64,
    /// Phase errors of single photons, at most (`phi_X`).
    pub phase_error: f64,
    /// Error rate in the key basis (`e_obs`).
    pub qber: f64,
    /// Bits that error correction tells (`lambda_EC`).
    pub told_bits: f64,
    /// Length of the secret key, in bits (`l`); 0 where there is none.
    pub secret_bits: u64,
}

impl Key {
    /// Secret bits per pulse.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 bits")]
    pub fn rate(&self) -> f64 {
        self.secret_bits as f64 / self.pulses
    }
}

/// Detections of the three intensities in one basis, and the errors among them.
struct Counts {
    detections: [f64; 3],
    errors: [f64; 3],
}

impl Protocol {
    fn all_probabilities(&self) -> [f64; 3] {
        let [p1, p2] = self.probabilities;
        [p1, p2, 1.0 - p1 - p2]
    }

    /// Whether the numbers are probabilities and the bounds hold for the intensities.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let [mu1, mu2, mu3] = self.intensities;
        let probable = |p: f64| 0.0 < p && p < 1.0;
        probable(self.key_basis)
            && self.all_probabilities().into_iter().all(probable)
            && mu3 >= 0.0
            && mu2 > mu3
            && mu1 > mu2 + mu3
    }
}

impl System {
    /// Transmittance from source to detector over a fibre, with `more_db` on top (`eta_sys`).
    #[must_use]
    pub fn eta(&self, km: f64, more_db: f64) -> f64 {
        self.receiver * transmittance(self.fibre_db_per_km * km + more_db)
    }

    /// Detections per pulse of an intensity: `R_k = D_k (1 + p_ap)`, with
    /// `D_k = 1 - (1 - 2 p_dc) exp(-eta_sys k)`; Lim, Sec. IV.
    #[must_use]
    pub fn detection(&self, intensity: f64, eta: f64) -> f64 {
        self.click(intensity, eta) * (1.0 + self.afterpulse)
    }

    fn click(&self, intensity: f64, eta: f64) -> f64 {
        1.0 - (1.0 - 2.0 * self.dark) * (-eta * intensity).exp()
    }

    /// Errors per pulse: `e_k = p_dc + e_mis (1 - exp(-eta_sys k)) + p_ap D_k / 2`; Lim, Sec. IV, with
    /// `eta_sys` (see the module).
    fn error(&self, intensity: f64, eta: f64) -> f64 {
        self.dark
            + self.misalignment * (1.0 - (-eta * intensity).exp())
            + self.afterpulse * self.click(intensity, eta) / 2.0
    }

    /// Detections per pulse in the key basis at both ends.
    #[must_use]
    pub fn sifted(&self, protocol: &Protocol, eta: f64) -> f64 {
        let parts = protocol
            .all_probabilities()
            .into_iter()
            .zip(protocol.intensities);
        let all: f64 = parts.map(|(p, k)| p * self.detection(k, eta)).sum();
        protocol.key_basis * protocol.key_basis * all
    }

    fn counts(&self, protocol: &Protocol, eta: f64, chosen: f64) -> Counts {
        let [p1, p2, p3] = protocol.all_probabilities();
        let [k1, k2, k3] = protocol.intensities;
        let of = |p: f64, per_pulse: f64| chosen * p * per_pulse;
        Counts {
            detections: [(p1, k1), (p2, k2), (p3, k3)].map(|(p, k)| of(p, self.detection(k, eta))),
            errors: [(p1, k1), (p2, k2), (p3, k3)].map(|(p, k)| of(p, self.error(k, eta))),
        }
    }

    /// The key of one block: Lim Eq. (1), with `e^{-k}` weights of Eq. (2) and the bounds (2) to (5).
    ///
    /// The arguments are taken as they are; see [`Protocol::is_valid`].
    #[must_use]
    pub fn key(&self, protocol: &Protocol, block: &Block, eta: f64) -> Key {
        let kappa = match block.secrecy {
            Secrecy::OfKey(secrecy) => return self.key_with(protocol, block, secrecy, eta),
            Secrecy::PerBit(kappa) => kappa,
        };
        // The length depends on the logarithm of what depends on it: this settles at once.
        let mut key = self.key_with(protocol, block, kappa * block.detections, eta);
        for _ in 0..3 {
            #[expect(clippy::cast_precision_loss, reason = "far below 2^53 bits")]
            let bits = key.secret_bits.max(1) as f64;
            key = self.key_with(protocol, block, kappa * bits, eta);
        }
        key
    }

    fn key_with(&self, protocol: &Protocol, block: &Block, secrecy: f64, eta: f64) -> Key {
        let q = protocol.key_basis;
        let n_x = block.detections;
        let pulses = n_x / self.sifted(protocol, eta);
        let x = self.counts(protocol, eta, pulses * q * q);
        let z = self.counts(protocol, eta, pulses * (1.0 - q) * (1.0 - q));
        let bounds = Bounds::new(protocol, secrecy);

        let vacuum = bounds.vacuum(&x.detections);
        let single = bounds.single(&x.detections);
        let single_other = bounds.single(&z.detections);
        let errors_other = bounds.single_errors(&z.errors);
        let ratio = errors_other / single_other;
        // Lim Eq. (5).
        let phase_error = (ratio + gamma(secrecy, ratio, single_other, single)).min(0.5);
        let qber = x.errors.iter().sum::<f64>() / n_x;
        let told_bits = n_x * self.correction * binary_entropy(qber);
        let secret = vacuum + single * (1.0 - binary_entropy(phase_error))
            - told_bits
            - 6.0 * (21.0 / secrecy).log2()
            - (2.0 / block.correctness).log2();
        Key {
            pulses,
            vacuum,
            single,
            single_other,
            errors_other,
            phase_error,
            qber,
            told_bits,
            secret_bits: whole(secret),
        }
    }

    /// The protocol that gives most key per pulse, and that key; `mu_3` is taken as given.
    ///
    /// A compass search from several starts: steps along one parameter at a time, halved when none
    /// helps. Deterministic.
    #[must_use]
    pub fn best(&self, block: &Block, mu3: f64, eta: f64) -> (Protocol, Key) {
        let protocol = |x: &[f64; 5]| Protocol {
            key_basis: x[0],
            probabilities: [x[1], x[2]],
            intensities: [x[3], x[4], mu3],
        };
        let rate = |x: &[f64; 5]| {
            let protocol = protocol(x);
            if protocol.is_valid() {
                let key = self.key(&protocol, block, eta);
                // Where there is no key, less error and more single photons lead to some.
                if key.secret_bits > 0 {
                    return key.rate();
                }
                return -key.phase_error;
            }
            f64::NEG_INFINITY
        };
        let mut best = (f64::NEG_INFINITY, STARTS[0]);
        for start in STARTS {
            let mut x = start;
            let (mut here, mut step) = (rate(&x), 0.1);
            while step > 1e-5 {
                let before = here;
                for i in 0..x.len() {
                    for sign in [1.0, -1.0] {
                        let mut there = x;
                        there[i] += sign * step;
                        let value = rate(&there);
                        if value > here {
                            (x, here) = (there, value);
                        }
                    }
                }
                if here <= before {
                    step /= 2.0;
                }
            }
            if here > best.0 {
                best = (here, x);
            }
        }
        let protocol = protocol(&best.1);
        (protocol, self.key(&protocol, block, eta))
    }
}

/// `q_x`, `p_mu1`, `p_mu2`, `mu_1`, `mu_2`: from small blocks to large ones.
const STARTS: [[f64; 5]; 3] = [
    [0.5, 0.05, 0.48, 0.5, 0.1],
    [0.8, 0.25, 0.5, 0.42, 0.2],
    [0.93, 0.75, 0.16, 0.45, 0.18],
];

/// Lim Eqs. (2) to (4), for one protocol.
struct Bounds<'a> {
    protocol: &'a Protocol,
    /// `ln(21 / eps_sec)`.
    confidence: f64,
    tau0: f64,
    tau1: f64,
}

impl<'a> Bounds<'a> {
    fn new(protocol: &'a Protocol, secrecy: f64) -> Self {
        let parts = || {
            protocol
                .all_probabilities()
                .into_iter()
                .zip(protocol.intensities)
        };
        Self {
            protocol,
            confidence: (21.0 / secrecy).ln(),
            // `tau_n = sum p_k e^-k k^n / n!`, the probability of n photons.
            tau0: parts().map(|(p, k)| p * (-k).exp()).sum(),
            tau1: parts().map(|(p, k)| p * (-k).exp() * k).sum(),
        }
    }

    /// `n^±_k = e^k / p_k (n_k ± sqrt(n/2 ln(21/eps_sec)))`, Lim below Eq. (2), by Hoeffding; the
    /// lower ones are not below 0.
    fn spread(&self, counts: &[f64; 3]) -> [(f64, f64); 3] {
        let all: f64 = counts.iter().sum();
        let delta = (all / 2.0 * self.confidence).sqrt();
        let p = self.protocol.all_probabilities();
        let k = self.protocol.intensities;
        [0, 1, 2].map(|i| {
            let weight = k[i].exp() / p[i];
            let low = (weight * (counts[i] - delta)).max(0.0);
            (low, weight * (counts[i] + delta))
        })
    }

    /// Lim Eq. (2).
    fn vacuum(&self, counts: &[f64; 3]) -> f64 {
        let [_, mu2, mu3] = self.protocol.intensities;
        let [_, (_, high2), (low3, _)] = self.spread(counts);
        (self.tau0 * (mu2 * low3 - mu3 * high2) / (mu2 - mu3)).max(0.0)
    }

    /// Lim Eq. (3).
    fn single(&self, counts: &[f64; 3]) -> f64 {
        let [mu1, mu2, mu3] = self.protocol.intensities;
        let [(_, high1), (low2, _), (_, high3)] = self.spread(counts);
        let squares = mu2 * mu2 - mu3 * mu3;
        let many = squares / (mu1 * mu1) * (high1 - self.vacuum(counts) / self.tau0);
        let single = self.tau1 * mu1 * (low2 - high3 - many) / (mu1 * (mu2 - mu3) - squares);
        single.max(0.0)
    }

    /// Lim Eq. (4).
    fn single_errors(&self, errors: &[f64; 3]) -> f64 {
        let [_, mu2, mu3] = self.protocol.intensities;
        let [_, (_, high2), (low3, _)] = self.spread(errors);
        self.tau1 * (high2 - low3) / (mu2 - mu3)
    }
}

/// Lim below Eq. (5): how far the error rate of one sample may lie from that of another.
fn gamma(a: f64, b: f64, c: f64, d: f64) -> f64 {
    if !(b > 0.0 && b < 1.0 && c > 0.0 && d > 0.0) {
        return 0.5;
    }
    let spread = (c + d) * (1.0 - b) * b / (c * d * std::f64::consts::LN_2);
    let odds = (c + d) / (c * d * (1.0 - b) * b) * (21.0 * 21.0) / (a * a);
    (spread * odds.log2()).sqrt()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped before"
)]
fn whole(bits: f64) -> u64 {
    bits.floor().clamp(0.0, 9e15) as u64
}

#[cfg(test)]
#[path = "finite_tests.rs"]
mod tests;
