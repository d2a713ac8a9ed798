//! The blocks of one half, in order and at their pace.

use std::{
    sync::atomic::AtomicBool,
    time::{Duration, Instant, SystemTime},
};

use qkd_handover::status::{ModuleState, Status};
use qkd_keyfile::UnixTime;

use crate::{
    config::Pace,
    is_stopped,
    pair::{Block, Half},
    stats::Stats,
};

/// The longest sleep, so that a stop is noticed.
const NAP: Duration = Duration::from_millis(20);

/// How far a half that was held up may run to catch up.
const CATCH_UP: Duration = Duration::from_secs(1);

pub(crate) struct Feed<'a> {
    half: Half,
    stats: &'a Stats,
    next: u64,
    end: u64,
    /// One past the last number made: up to here numbers come again without waiting.
    fresh: u64,
    due: Instant,
    interval: Duration,
}

impl<'a> Feed<'a> {
    pub(crate) fn new(half: Half, stats: &'a Stats) -> Self {
        let config = half.config();
        let first = config.first_number;
        let end = config
            .blocks
            .map_or(u64::MAX, |blocks| first.saturating_add(blocks));
        let interval = match config.pace {
            Pace::Max => Duration::ZERO,
            Pace::PerSecond(rate) => Duration::from_secs_f64(1.0 / rate),
        };
        Self {
            half,
            stats,
            next: first,
            end,
            fresh: first,
            due: Instant::now(),
            interval,
        }
    }

    /// The next block that this half delivers, if it is time for it.
    pub(crate) fn poll_next(&mut self) -> Option<Block> {
        while self.next < self.end {
            let is_fresh = self.next == self.fresh;
            if is_fresh && !self.interval.is_zero() {
                let now = Instant::now();
                if now < self.due {
                    return None;
                }
                let earliest = now.checked_sub(CATCH_UP).unwrap_or(now);
                self.due = (self.due + self.interval).max(earliest);
            }
            let number = self.next;
            self.next += 1;
            self.fresh = self.fresh.max(self.next);
            match self.half.block(number) {
                Some(block) if is_fresh => {
                    self.stats.add_made();
                    return Some(block);
                }
                Some(block) => {
                    self.stats.add_sent_again(1);
                    return Some(block);
                }
                None if is_fresh => self.stats.add_withheld(),
                None => {}
            }
        }
        None
    }

    /// Goes back, or ahead, to this number, but not before the first.
    pub(crate) fn seek(&mut self, number: u64) {
        self.next = number.max(self.half.config().first_number).min(self.end);
        self.fresh = self.fresh.max(self.next);
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.next >= self.end
    }

    /// How long to sleep when there was nothing to do.
    pub(crate) fn nap(&self) -> Duration {
        if self.is_finished() || self.interval.is_zero() {
            return NAP;
        }
        self.due.saturating_duration_since(Instant::now()).min(NAP)
    }

    /// What a module that works says of itself.
    pub(crate) fn status(&self) -> Status {
        let config = self.half.config();
        let rate = match config.pace {
            Pace::Max => None,
            Pace::PerSecond(rate) => whole(rate * f64::from(config.block_bits)),
        };
        Status {
            state: Some(ModuleState::Running),
            qber_ppm: Some(config.qber_ppm),
            key_rate_bits_per_s: rate,
            temperature_milli_celsius: Some(21_500),
        }
    }
}

/// Sleeps up to `time`; returns early, with `false`, when asked to stop.
pub(crate) fn sleep(time: Duration, stop: &AtomicBool) -> bool {
    let until = Instant::now() + time;
    while !is_stopped(stop) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(NAP));
    }
    false
}

pub(crate) fn unix_now() -> Option<UnixTime> {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .ok()?;
    i64::try_from(since.as_nanos()).ok().map(UnixTime)
}

/// The whole part of a rate, which the pace's bounds keep below 2^53.
#[expect(clippy::cast_possible_truncation, reason = "bounded by the pace")]
fn whole(rate: f64) -> Option<u64> {
    u64::try_from(rate as i64).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::tests::config,
        pair::{ModulePair, Role},
    };

    fn half(config: &crate::PairConfig) -> Half {
        ModulePair::new(config).unwrap().half(Role::Transmitter)
    }

    #[test]
    fn numbers_come_in_order_and_end() {
        let mut config = config();
        (config.first_number, config.blocks) = (5, Some(3));
        let stats = Stats::default();
        let mut feed = Feed::new(half(&config), &stats);
        let numbers: Vec<u64> = std::iter::from_fn(|| feed.poll_next())
            .map(|block| block.number)
            .collect();
        assert_eq!(numbers, [5, 6, 7]);
        assert!(feed.is_finished());
        feed.seek(0);
        assert_eq!(feed.poll_next().unwrap().number, 5);
        assert_eq!((stats.snapshot().made, stats.snapshot().sent_again), (3, 1));
    }

    #[test]
    fn withheld_blocks_are_counted_once() {
        let mut config = config();
        config.blocks = Some(100);
        config.faults.one_sided_per_million = 1_000_000;
        let stats = Stats::default();
        let mut feed = Feed::new(half(&config), &stats);
        let first = std::iter::from_fn(|| feed.poll_next()).count() as u64;
        feed.seek(0);
        while feed.poll_next().is_some() {}
        assert_eq!(stats.snapshot().withheld, 100 - first);
        assert!((20..80).contains(&first), "{first}");
    }

    #[test]
    fn the_pace_is_kept() {
        let mut config = config();
        config.pace = Pace::PerSecond(200.0);
        let stats = Stats::default();
        let mut feed = Feed::new(half(&config), &stats);
        let start = Instant::now();
        while stats.snapshot().made < 21 {
            if feed.poll_next().is_none() {
                std::thread::sleep(feed.nap());
            }
        }
        // Twenty intervals of 5 ms; a busy machine may take longer, never less.
        assert!(start.elapsed() >= Duration::from_millis(100));
    }
}
