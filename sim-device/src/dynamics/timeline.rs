//! Which block is made when.

use super::{Conditions, EventConfig, Weather};
use crate::config::{Pace, PairConfig};

/// A block that is to be made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Moment {
    /// Blocks before it, in this run.
    pub(crate) index: u64,
    /// Its number.
    pub(crate) number: u64,
    /// How often the pair has begun to number anew before.
    pub(crate) generation: u32,
    /// How often the pair has been switched on before.
    pub(crate) restarts: u32,
    /// When it is whole, in simulated seconds.
    pub(crate) due_s: f64,
    pub(crate) key_bits: u32,
    pub(crate) qber_ppm: u32,
    /// What the module's clock is ahead by, in seconds.
    pub(crate) clock_s: f64,
}

/// The blocks of a pair, in their order. Both halves have the same.
#[derive(Debug, Clone)]
pub(crate) struct Timeline {
    weather: Weather,
    pace: Pace,
    block_bits: u32,
    block_seconds: Option<f64>,
    first_number: u64,
    blocks: u64,
    at_s: f64,
    index: u64,
    number: u64,
    generation: u32,
    restarts: u32,
    /// Events of `weather` before this one are over or have begun.
    next_event: usize,
    conditions: Conditions,
    /// Until when `conditions` hold.
    hold_until_s: f64,
}

/// Optics are looked at this often, in simulated seconds.
const TICK_S: f64 = 0.25;

/// Ticks without key after which no more is expected: a month.
const MAX_TICKS: u32 = 10_000_000;

impl Timeline {
    pub(crate) fn new(config: &PairConfig, weather: Weather) -> Self {
        Self {
            pace: config.pace,
            block_bits: config.block_bits,
            block_seconds: config.block_seconds,
            first_number: config.first_number,
            blocks: config.blocks.unwrap_or(u64::MAX),
            at_s: 0.0,
            index: 0,
            number: config.first_number,
            generation: 0,
            restarts: 0,
            next_event: 0,
            conditions: weather.at(0.0),
            hold_until_s: 0.0,
            weather,
        }
    }

    /// To the beginning.
    pub(crate) fn rewind(&mut self) {
        self.at_s = 0.0;
        self.index = 0;
        self.number = self.first_number;
        (self.generation, self.restarts, self.next_event) = (0, 0, 0);
        self.hold_until_s = 0.0;
    }

    /// On to the block of this number, where every block is like the one before.
    pub(crate) fn skip_to(&mut self, number: u64) {
        let blocks = number
            .saturating_sub(self.number)
            .min(self.blocks - self.index);
        let interval_s = match self.pace {
            _ if !self.weather.events.is_empty() => return,
            Pace::Link => return,
            Pace::Max => 0.0,
            Pace::PerSecond(rate) => 1.0 / rate,
        };
        self.index += blocks;
        self.number += blocks;
        #[expect(
            clippy::cast_precision_loss,
            reason = "far below 2^53 blocks, or no time passes"
        )]
        let passed_s = interval_s * blocks as f64;
        self.at_s += passed_s;
        self.hold_until_s = self.at_s;
    }

    /// Key per second that is delivered under such conditions; `None` if nobody can say.
    pub(crate) fn rate(&self, conditions: &Conditions) -> Option<f64> {
        match self.pace {
            Pace::Link => conditions.rate,
            Pace::PerSecond(_) if !conditions.is_running() => Some(0.0),
            Pace::PerSecond(rate) => Some(rate * f64::from(self.block_bits)),
            Pace::Max => None,
        }
    }

    pub(crate) fn weather(&self) -> &Weather {
        &self.weather
    }

    /// The next block; `None` when there are no more.
    pub(crate) fn next(&mut self) -> Option<Moment> {
        if self.index >= self.blocks {
            return None;
        }
        let key_bits = match (self.pace, self.block_seconds) {
            (Pace::Max, _) => self.block_bits,
            (Pace::PerSecond(rate), _) => {
                self.wait(1.0 / rate)?;
                self.block_bits
            }
            (Pace::Link, None) => self.fill()?,
            (Pace::Link, Some(seconds)) => {
                self.wait(seconds)?;
                let made = self.conditions.rate.unwrap_or(0.0) * seconds;
                bits(made).min(self.block_bits)
            }
        };
        let moment = Moment {
            index: self.index,
            number: self.number,
            generation: self.generation,
            restarts: self.restarts,
            due_s: self.at_s,
            key_bits,
            qber_ppm: self.conditions.qber_ppm.unwrap_or(0),
            clock_s: self.conditions.clock_s,
        };
        self.index += 1;
        self.number += 1;
        Some(moment)
    }

    /// Lets time pass while the pair runs; what interrupts it does not count.
    fn wait(&mut self, seconds: f64) -> Option<()> {
        let mut left = seconds;
        for _ in 0..MAX_TICKS {
            self.look();
            // A block that is collected for a time has no bits where there is no key; others wait.
            if !self.conditions.is_running() && !self.is_collecting() {
                self.skip();
                continue;
            }
            let step = left.min(self.hold_until_s - self.at_s);
            self.at_s += step;
            left -= step;
            if left <= 0.0 {
                self.look();
                return Some(());
            }
        }
        None
    }

    /// Whether blocks come though there is no key in them.
    fn is_collecting(&self) -> bool {
        self.block_seconds.is_some() && self.conditions.qber_ppm.is_some()
    }

    /// Lets time pass until the link has made a block.
    fn fill(&mut self) -> Option<u32> {
        let mut left = f64::from(self.block_bits);
        for _ in 0..MAX_TICKS {
            self.look();
            let rate = self.conditions.rate.unwrap_or(0.0);
            if rate <= 0.0 {
                self.skip();
                continue;
            }
            let step = (left / rate).min(self.hold_until_s - self.at_s);
            self.at_s += step;
            left -= rate * step;
            if left <= 1e-6 {
                return Some(self.block_bits);
            }
        }
        None
    }

    /// To the end of what keeps the pair from running, or at least of these conditions.
    fn skip(&mut self) {
        let calm = self.weather.calm_after(self.at_s);
        self.at_s = calm
            .unwrap_or(self.hold_until_s)
            .max(self.hold_until_s.min(self.at_s + TICK_S));
        self.hold_until_s = self.at_s;
    }

    /// Takes note of what has begun, and of the conditions.
    fn look(&mut self) {
        if self.at_s < self.hold_until_s {
            return;
        }
        while let Some(event) = self.weather.events.get(self.next_event)
            && event.at_s() <= self.at_s
        {
            if let EventConfig::Restart { renumber, .. } = *event {
                self.restarts += 1;
                if renumber {
                    self.generation += 1;
                    self.number = self.first_number;
                }
            }
            self.next_event += 1;
        }
        self.conditions = self.weather.at(self.at_s);
        let next = self
            .weather
            .events
            .get(self.next_event)
            .map(EventConfig::at_s);
        let end = self.weather.calm_after(self.at_s);
        let borders = [next, end].into_iter().flatten();
        self.hold_until_s = borders.fold(self.at_s + TICK_S, f64::min);
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped before"
)]
fn bits(made: f64) -> u32 {
    made.clamp(0.0, f64::from(u32::MAX)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::config;

    fn timeline(change: impl FnOnce(&mut PairConfig)) -> Timeline {
        let mut config = config();
        change(&mut config);
        let weather = Weather::new(&config, [3; 48]).unwrap();
        Timeline::new(&config, weather)
    }

    fn all(timeline: &mut Timeline) -> Vec<Moment> {
        std::iter::from_fn(|| timeline.next())
            .take(10_000)
            .collect()
    }

    #[test]
    fn blocks_of_a_fixed_pace_stand_still_while_the_fibre_is_cut() {
        let mut timeline = timeline(|c| {
            (c.pace, c.blocks) = (Pace::PerSecond(10.0), Some(30));
            c.events = vec![EventConfig::FibreCut {
                at_s: 1.05,
                for_s: 5.0,
            }];
        });
        let moments = all(&mut timeline);
        assert_eq!(moments.len(), 30);
        assert!((moments[9].due_s - 1.0).abs() < 1e-9);
        // Half of the eleventh was made before.
        assert!(
            (moments[10].due_s - 6.1).abs() < 1e-6,
            "{}",
            moments[10].due_s
        );
        timeline.rewind();
        assert_eq!(all(&mut timeline), moments);
    }

    #[test]
    fn a_link_makes_blocks_at_the_rate_that_its_optics_give() {
        let mut timeline = timeline(|c| {
            (c.pace, c.block_bits, c.blocks) = (Pace::Link, 1816, Some(100));
            c.link = Some(toml::from_str("preset = \"gys\"\nkm = 20").unwrap());
        });
        let moments = all(&mut timeline);
        // 9.077677e-4 bits per pulse at 2 MHz.
        let expected = 100.0 * 1816.0 / (9.077_677e-4 * 2e6);
        assert!((moments[99].due_s / expected - 1.0).abs() < 1e-4);
        assert_eq!(moments[0].qber_ppm, 33_097);
    }

    #[test]
    fn blocks_that_are_collected_for_a_time_have_what_was_made_and_none_when_there_is_no_key() {
        let mut timeline = timeline(|c| {
            (c.pace, c.block_bits, c.blocks) = (Pace::Link, 65_536, Some(20));
            c.block_seconds = Some(0.5);
            c.link = Some(toml::from_str("preset = \"gys\"\nkm = 20").unwrap());
            c.events = vec![EventConfig::Eavesdropper {
                at_s: 3.0,
                for_s: 2.0,
                part: 0.5,
                unnoticed: false,
            }];
        });
        let moments = all(&mut timeline);
        assert_eq!((moments[0].key_bits, moments[7].key_bits), (907, 0));
        assert!(moments[7].qber_ppm > 120_000 && moments[19].key_bits == 907);
        assert!((moments[19].due_s - 10.0).abs() < 1e-6);
    }

    #[test]
    fn a_restart_numbers_anew_where_it_does() {
        let mut timeline = timeline(|c| {
            (c.pace, c.blocks, c.first_number) = (Pace::PerSecond(10.0), Some(40), 5);
            c.events = vec![
                EventConfig::Restart {
                    at_s: 1.0,
                    for_s: 1.0,
                    renumber: false,
                },
                EventConfig::Restart {
                    at_s: 3.0,
                    for_s: 1.0,
                    renumber: true,
                },
            ];
        });
        let moments = all(&mut timeline);
        let jumps: Vec<_> = moments
            .windows(2)
            .filter(|w| w[1].number != w[0].number + 1)
            .collect();
        assert_eq!(jumps.len(), 1);
        assert_eq!((jumps[0][1].number, jumps[0][1].generation), (5, 1));
        assert_eq!(moments[39].restarts, 2);
        assert!(jumps[0][1].due_s >= 4.0);
    }

    #[test]
    fn a_clock_that_is_set_is_ahead_from_then_on() {
        let mut timeline = timeline(|c| {
            (c.pace, c.blocks) = (Pace::PerSecond(10.0), Some(20));
            c.events = vec![EventConfig::ClockStep {
                at_s: 1.0,
                by_s: 7.5,
            }];
        });
        let moments = all(&mut timeline);
        assert!(moments[5].clock_s.abs() < 1e-9 && (moments[15].clock_s - 7.5).abs() < 1e-9);
    }
}
