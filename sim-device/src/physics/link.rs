//! A system over a fibre: what it delivers, in bits per second.

use super::{asymptotic, detector::DeadTime, finite};

/// How the secret part of what is detected is worked out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Model {
    /// Endless keys.
    Asymptotic {
        /// The system.
        system: asymptotic::System,
        /// Mean photon number of the signal.
        mu: f64,
        /// That of the weak decoy; infinitely many decoys without it.
        nu: Option<f64>,
    },
    /// Blocks of finite size, with the protocol that is best over the fibre as it should be.
    Finite {
        /// The system.
        system: finite::System,
        /// A block, and how secure its key is to be.
        block: finite::Block,
        /// Mean photon number of the second decoy.
        mu3: f64,
    },
}

/// A transmitter, a receiver and what lies between.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct System {
    /// The model.
    pub model: Model,
    /// Pulses per second.
    pub clock_hz: f64,
    /// Dead time of the receiver.
    pub dead_time: DeadTime,
}

/// A system whose protocol was chosen for one loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    system: System,
    loss_db: f64,
    protocol: Option<finite::Protocol>,
}

/// What differs from a link as it should be.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Disturbance {
    /// Loss on top, in dB.
    pub loss_db: f64,
    /// Wrong detections on top, as a part of those of light.
    pub error: f64,
    /// Part of the pulses that someone measures and sends again in a basis of their own.
    pub intercepted: f64,
}

/// What a link delivers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// Detections per second in matching bases, after dead time.
    pub sifted_bits_per_s: f64,
    /// Secret key per second; 0 where there is none.
    pub secret_bits_per_s: f64,
    /// Secret key per pulse, before dead time.
    pub secret_per_pulse: f64,
    /// Error rate of the sifted key.
    pub qber: f64,
    /// Interference visibility of the optics: `1 - 2 e_opt`.
    pub visibility: f64,
    /// Part of the time in which the receiver can detect.
    pub live: f64,
}

/// Errors that measuring and sending again in a random basis makes: one in four (C. H. Bennett et al.,
/// J. Cryptology 5, 3 (1992)).
const INTERCEPT_ERROR: f64 = 0.25;

impl System {
    /// Loss of so many km, in dB.
    #[must_use]
    pub const fn loss_db(&self, km: f64) -> f64 {
        km * match &self.model {
            Model::Asymptotic { system, .. } => system.fibre_db_per_km,
            Model::Finite { system, .. } => system.fibre_db_per_km,
        }
    }

    /// The system over a loss, with the protocol that is best there.
    #[must_use]
    pub fn over(&self, loss_db: f64) -> Link {
        let protocol = match &self.model {
            Model::Asymptotic { .. } => None,
            Model::Finite { system, block, mu3 } => {
                let eta = system.eta(0.0, loss_db);
                Some(system.best(block, *mu3, eta).0)
            }
        };
        Link {
            system: *self,
            loss_db,
            protocol,
        }
    }
}

impl Link {
    /// What it delivers, disturbed as said.
    #[must_use]
    pub fn rates(&self, disturbed: &Disturbance) -> Rates {
        let loss_db = self.loss_db + disturbed.loss_db;
        let error = |optics: f64| {
            let honest = (optics + disturbed.error).clamp(0.0, 0.5);
            // An error of the optics on top of one that was made before undoes it.
            let made = INTERCEPT_ERROR * disturbed.intercepted.clamp(0.0, 1.0);
            honest + made - 2.0 * honest * made
        };
        let (detected, sifted, secret, qber, misalignment) = match self.system.model {
            Model::Asymptotic { mut system, mu, nu } => {
                system.misalignment = error(system.misalignment);
                let eta = system.eta(0.0, loss_db);
                let gain = system.gain(mu, eta);
                let secret = match nu {
                    None => system.rate_infinite_decoys(mu, eta),
                    Some(nu) => system.rate_vacuum_weak(mu, nu, eta),
                };
                let qber = system.qber(mu, eta);
                (
                    gain,
                    gain * system.sifting,
                    secret,
                    qber,
                    system.misalignment,
                )
            }
            Model::Finite {
                mut system,
                block,
                mu3,
            } => {
                system.misalignment = error(system.misalignment);
                let eta = system.eta(0.0, loss_db);
                let protocol = match self.protocol {
                    Some(protocol) => protocol,
                    None => system.best(&block, mu3, eta).0,
                };
                let sifted = system.sifted(&protocol, eta);
                let key = system.key(&protocol, &block, eta);
                let detected = sifted / (protocol.key_basis * protocol.key_basis);
                (detected, sifted, key.rate(), key.qber, system.misalignment)
            }
        };
        let clock = self.system.clock_hz;
        let live = self.system.dead_time.live(detected * clock);
        let secret_per_pulse = secret.max(0.0);
        Rates {
            sifted_bits_per_s: sifted * clock * live,
            secret_bits_per_s: secret_per_pulse * clock * live,
            secret_per_pulse,
            qber,
            visibility: 1.0 - 2.0 * misalignment,
            live,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::physics::preset::Preset;

    fn link(name: &str, km: f64) -> Link {
        let system = Preset::named(name).unwrap().system;
        system.over(system.loss_db(km))
    }

    #[test]
    fn more_loss_and_more_errors_give_less_key() {
        for preset in Preset::ALL {
            let loss_db = 8.0;
            let link = preset.system.over(loss_db);
            let mut before = link.rates(&Disturbance::default());
            assert!(before.secret_bits_per_s > 0.0, "{}", preset.name);
            for step in 1..12 {
                let step = f64::from(step);
                let now = link.rates(&Disturbance {
                    loss_db: 0.2 * step,
                    error: 0.002 * step,
                    intercepted: 0.0,
                });
                assert!(now.secret_bits_per_s <= before.secret_bits_per_s);
                assert!(now.qber > before.qber && now.visibility < before.visibility);
                before = now;
            }
        }
    }

    #[test]
    fn someone_who_measures_every_pulse_makes_a_quarter_of_the_bits_wrong_and_ends_the_key() {
        let link = link("gys", 10.0);
        let all = link.rates(&Disturbance {
            intercepted: 1.0,
            ..Disturbance::default()
        });
        assert!((all.qber - 0.25 - 0.033 / 2.0).abs() < 1e-3, "{}", all.qber);
        assert!(all.secret_bits_per_s.abs() < f64::EPSILON);
        let some = link.rates(&Disturbance {
            intercepted: 0.1,
            ..Disturbance::default()
        });
        assert!((some.qber - 0.033 - 0.025).abs() < 2e-3);
    }

    #[test]
    fn dead_time_bounds_what_is_detected() {
        let mut system = Preset::named("gys").unwrap().system;
        system.clock_hz = 1e12;
        system.dead_time = DeadTime {
            dead_ns: 100.0,
            pixels: 2,
        };
        let rates = system.over(0.0).rates(&Disturbance::default());
        // Two pixels, 10 million detections a second each, half of them sifted.
        assert!(rates.sifted_bits_per_s <= 1e7 && rates.sifted_bits_per_s > 0.99e7);
        assert!(rates.live < 0.01);
    }
}
