//! How a module pair fares over time: its optics drift, and things happen to it.
//!
//! All of it follows from the configuration and the seed, so that both halves, in two processes, tell
//! the same story, and a run can be repeated. Time is simulated: seconds since the pair was switched
//! on, which stand still while the bridge makes the module wait.

mod config;
mod drift;
mod timeline;

use qkd_handover::status::ModuleState;

pub(crate) use config::parts_per_million;
pub use config::{DriftConfig, EventConfig, LinkConfig};
pub(crate) use timeline::{Moment, Timeline};

use self::drift::Drift;
use crate::{
    config::PairConfig,
    pair::PairError,
    physics::{
        QBER_LIMIT,
        link::{Disturbance, Link},
    },
};

/// What holds at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Conditions {
    pub(crate) state: ModuleState,
    pub(crate) qber_ppm: Option<u32>,
    /// Secret key, in bits per second; `None` without optics.
    pub(crate) rate: Option<f64>,
    pub(crate) visibility_ppm: Option<u32>,
    pub(crate) temperature_milli_celsius: i32,
    /// What the module's clock is ahead by, in seconds.
    pub(crate) clock_s: f64,
}

impl Conditions {
    /// Whether blocks are made.
    pub(crate) fn is_running(&self) -> bool {
        self.state == ModuleState::Running
    }
}

/// Everything that happens to a pair.
#[derive(Debug, Clone)]
pub(crate) struct Weather {
    link: Option<Link>,
    drift: Drift,
    drift_config: DriftConfig,
    events: Vec<EventConfig>,
    qber_ppm: u32,
}

/// Temperature of a module that nothing disturbs, in thousandths of a degree.
const TEMPERATURE_MC: f64 = 21_500.0;

/// How much warmer someone who stands at the module makes it: so that a restart shows.
const RESTART_MC: f64 = 1_500.0;

impl Weather {
    /// # Errors
    ///
    /// The link gives no key, so that there never would be a block.
    pub(crate) fn new(config: &PairConfig, random: [u8; 48]) -> Result<Self, PairError> {
        let link = config.link.as_ref().map(LinkConfig::link);
        if let Some(link) = &link {
            let rates = link.rates(&Disturbance::default());
            if rates.secret_bits_per_s <= 0.0 {
                return Err(PairError::NoKey);
            }
        }
        let mut events = config.events.clone();
        events.sort_by(|a, b| a.at_s().total_cmp(&b.at_s()));
        let drift = config.link.as_ref().map(|link| link.drift);
        Ok(Self {
            link,
            drift: Drift::new(random),
            drift_config: drift.unwrap_or_default(),
            events,
            qber_ppm: config.qber_ppm,
        })
    }

    pub(crate) fn events(&self) -> &[EventConfig] {
        &self.events
    }

    /// When the last of what is happening at `at_s` ends, if anything is.
    pub(crate) fn calm_after(&self, at_s: f64) -> Option<f64> {
        let now = self.events.iter().filter(|event| event.is_on(at_s));
        now.map(EventConfig::end_s).reduce(f64::min)
    }

    /// What holds at a moment.
    pub(crate) fn at(&self, at_s: f64) -> Conditions {
        let DriftConfig {
            loss_db,
            error_ppm,
            temperature_c,
            period_s,
        } = self.drift_config;
        let [cold, strain, tilt] = self.drift.at(at_s, period_s);
        let mut disturbed = Disturbance {
            // A fibre never gets better than it was when the system was set up.
            loss_db: loss_db * (1.0 + strain) / 2.0,
            error: f64::from(error_ppm) / 1e6 * (1.0 + tilt) / 2.0,
            intercepted: 0.0,
        };
        let mut conditions = Conditions {
            state: ModuleState::Running,
            qber_ppm: Some(self.qber_ppm),
            rate: None,
            visibility_ppm: None,
            temperature_milli_celsius: 0,
            clock_s: 0.0,
        };
        let mut temperature = TEMPERATURE_MC - 1000.0 * temperature_c * cold;
        let mut unnoticed = true;
        for event in &self.events {
            match *event {
                EventConfig::ClockStep {
                    at_s: since_s,
                    by_s,
                } if since_s <= at_s => {
                    conditions.clock_s += by_s;
                }
                _ if !event.is_on(at_s) => {}
                EventConfig::FibreCut { .. } => conditions.state = ModuleState::Fault,
                EventConfig::Restart { .. } => {
                    conditions.state = ModuleState::Starting;
                    temperature += RESTART_MC;
                }
                EventConfig::Eavesdropper {
                    part, unnoticed: u, ..
                } => {
                    disturbed.intercepted = disturbed.intercepted.max(part);
                    unnoticed &= u;
                }
                EventConfig::ClockStep { .. } => {}
            }
        }
        conditions.temperature_milli_celsius = whole_i32(temperature);
        self.add_optics(&mut conditions, &disturbed, unnoticed);
        conditions
    }

    fn add_optics(&self, conditions: &mut Conditions, disturbed: &Disturbance, unnoticed: bool) {
        if !conditions.is_running() {
            // No light, or nobody who looks at it.
            conditions.qber_ppm = None;
            conditions.rate = self.link.map(|_| 0.0);
            conditions.visibility_ppm = self.link.map(|_| 0);
            return;
        }
        let qber = if let Some(link) = &self.link {
            let mut rates = link.rates(disturbed);
            if unnoticed && disturbed.intercepted > 0.0 {
                // A module that does not see what it reports delivers as before.
                let honest = Disturbance {
                    intercepted: 0.0,
                    ..*disturbed
                };
                rates.secret_bits_per_s = link.rates(&honest).secret_bits_per_s;
            }
            conditions.rate = Some(rates.secret_bits_per_s);
            conditions.visibility_ppm = Some(parts_per_million(rates.visibility));
            rates.qber
        } else {
            let honest = f64::from(self.qber_ppm) / 1e6;
            let made = disturbed.intercepted / 4.0;
            honest + made - 2.0 * honest * made
        };
        conditions.qber_ppm = Some(parts_per_million(qber));
        let has_key = match conditions.rate {
            Some(rate) => rate > 0.0,
            None => unnoticed || qber < QBER_LIMIT,
        };
        if !has_key {
            conditions.state = ModuleState::Fault;
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "clamped before")]
fn whole_i32(x: f64) -> i32 {
    x.clamp(-1e6, 1e6) as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::config;

    fn weather(events: Vec<EventConfig>) -> Weather {
        let mut config = config();
        config.link = toml::from_str(
            "preset = \"gys\"\nkm = 20\ndrift = { loss_db = 1.0, error_ppm = 6000, period_s = 600 }",
        )
        .unwrap();
        config.events = events;
        Weather::new(&config, [7; 48]).unwrap()
    }

    #[test]
    fn rate_and_errors_drift_within_their_bounds_and_against_each_other() {
        let weather = weather(Vec::new());
        let all: Vec<_> = (0..600).map(|t| weather.at(f64::from(t))).collect();
        let qber = |c: &Conditions| c.qber_ppm.unwrap();
        let (low, high) = (all.iter().map(qber).min(), all.iter().map(qber).max());
        let (low, high) = (low.unwrap(), high.unwrap());
        assert!(
            33_000 <= low && high <= 39_300 && high - low > 2_000,
            "{low} {high}"
        );
        let rates = || all.iter().map(|c| c.rate.unwrap());
        let (least, most) = (
            rates().fold(f64::MAX, f64::min),
            rates().fold(0.0, f64::max),
        );
        assert!(
            most <= 1816.0 && least > 1000.0 && most - least > 100.0,
            "{least} {most}"
        );
        let worst = all.iter().max_by_key(|c| qber(c)).unwrap();
        let best = all.iter().min_by_key(|c| qber(c)).unwrap();
        assert!(worst.visibility_ppm < best.visibility_ppm);
    }

    #[test]
    fn events_hold_while_they_last() {
        let weather = weather(vec![
            EventConfig::FibreCut {
                at_s: 10.0,
                for_s: 5.0,
            },
            EventConfig::Restart {
                at_s: 20.0,
                for_s: 5.0,
                renumber: false,
            },
            EventConfig::ClockStep {
                at_s: 30.0,
                by_s: -3600.0,
            },
        ]);
        assert!(weather.at(9.9).is_running());
        let cut = weather.at(12.0);
        assert_eq!(
            (cut.state, cut.qber_ppm, cut.rate),
            (ModuleState::Fault, None, Some(0.0))
        );
        assert_eq!(weather.calm_after(12.0), Some(15.0));
        assert!(weather.at(15.0).is_running());
        assert_eq!(weather.at(21.0).state, ModuleState::Starting);
        assert!((weather.at(31.0).clock_s + 3600.0).abs() < 1e-9);
        assert!(weather.at(29.0).clock_s.abs() < 1e-9);
    }

    #[test]
    fn an_eavesdropper_ends_the_key_of_an_honest_module_and_not_that_of_a_blind_one() {
        let spy = |unnoticed| {
            weather(vec![EventConfig::Eavesdropper {
                at_s: 5.0,
                for_s: 5.0,
                part: 0.4,
                unnoticed,
            }])
            .at(7.0)
        };
        let honest = spy(false);
        assert!(honest.qber_ppm.unwrap() > 120_000, "{honest:?}");
        assert_eq!((honest.state, honest.rate), (ModuleState::Fault, Some(0.0)));
        let blind = spy(true);
        assert_eq!(blind.qber_ppm, honest.qber_ppm);
        assert!(blind.is_running() && blind.rate.unwrap() > 1000.0);
    }

    #[test]
    fn a_link_without_key_is_refused() {
        let mut config = config();
        config.link = toml::from_str("preset = \"gys\"\nkm = 160").unwrap();
        assert_eq!(
            Weather::new(&config, [7; 48]).unwrap_err(),
            PairError::NoKey
        );
    }
}
