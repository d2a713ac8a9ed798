//! The blocks of one half, in order and at their pace.

use std::{
    num::NonZeroU64,
    sync::atomic::AtomicBool,
    time::{Duration, Instant, SystemTime},
};

use qkd_handover::status::Status;
use qkd_keyfile::UnixTime;

use crate::{
    dynamics::Moment,
    is_stopped,
    pair::Block,
    script::Script,
    stats::{Note, NoteKind, Stats},
};

/// The longest sleep, so that a stop is noticed.
const NAP: Duration = Duration::from_millis(20);

/// How far a half that was held up may run to catch up.
const CATCH_UP: Duration = Duration::from_secs(1);

pub(crate) struct Feed<'a> {
    script: Box<dyn Script>,
    stats: &'a Stats,
    next: Option<Moment>,
    /// The newest block that was made or withheld.
    newest: Option<Moment>,
    /// Blocks before this index have been made: they come again without waiting, and without faults
    /// on their way.
    fresh: u64,
    /// When simulated time was 0.
    origin: Instant,
    scale: f64,
    noted_events: usize,
}

impl<'a> Feed<'a> {
    pub(crate) fn new(mut script: Box<dyn Script>, stats: &'a Stats) -> Self {
        let next = script.next();
        let mut feed = Self {
            scale: script.time_scale(),
            script,
            stats,
            next,
            newest: None,
            fresh: 0,
            origin: Instant::now(),
            noted_events: 0,
        };
        feed.status();
        feed
    }

    /// The next block that this half delivers, if it is time for it.
    pub(crate) fn poll_next(&mut self) -> Option<Block> {
        self.note_events();
        while let Some(moment) = self.next {
            let is_fresh = moment.index >= self.fresh;
            if is_fresh && !self.is_due(&moment) {
                return None;
            }
            self.advance();
            let block = self.script.make(&moment);
            if !is_fresh {
                if let Some(mut block) = block {
                    block.fault = None;
                    self.stats.add_sent_again(1);
                    return Some(block);
                }
                continue;
            }
            self.note_fault(&moment);
            match block {
                Some(block) => {
                    self.stats.add_made();
                    return Some(block);
                }
                None => self.stats.add_withheld(),
            }
        }
        None
    }

    /// Whether it is time; a half that was held up for long has its time stand still meanwhile.
    fn is_due(&mut self, moment: &Moment) -> bool {
        let now = Instant::now();
        let due = self.origin + self.real(moment.due_s);
        if now < due {
            return false;
        }
        let late = now - due;
        if late > CATCH_UP {
            self.origin += late - CATCH_UP;
        }
        true
    }

    fn advance(&mut self) {
        if self.next.is_some_and(|moment| moment.index >= self.fresh) {
            self.newest = self.next;
            self.fresh = self.newest.map_or(0, |newest| newest.index + 1);
        }
        self.next = self.script.next();
    }

    fn note_fault(&self, moment: &Moment) {
        if let Some(fault) = self.script.fault(moment) {
            self.stats.add_note(Note {
                at_s: moment.due_s,
                what: NoteKind::Fault {
                    number: moment.number,
                    name: fault.name(),
                },
            });
        }
    }

    fn note_events(&mut self) {
        let now_s = self.now_s();
        while let Some(event) = self.script.events().get(self.noted_events)
            && event.at_s() <= now_s
        {
            self.stats.add_note(Note {
                at_s: event.at_s(),
                what: NoteKind::Event { name: event.name() },
            });
            self.noted_events += 1;
        }
    }

    /// The numbering that the module is in.
    pub(crate) fn session(&self) -> NonZeroU64 {
        self.script
            .session(self.newest.map_or(0, |newest| newest.generation))
    }

    /// Goes back, or ahead, to the first block above the one that is durable, within the numbering that
    /// the module is in.
    pub(crate) fn seek_after(&mut self, durable: Option<u64>) {
        let generation = self.newest.map_or(0, |newest| newest.generation);
        // A number that this numbering has not come to yet is of the one before.
        let is_known = |number| self.newest.is_some_and(|newest| number <= newest.number);
        let durable = durable.filter(|&number| generation == 0 || is_known(number));
        self.script.rewind();
        if let Some(number) = durable.filter(|_| generation == 0) {
            self.script.skip_to(number.saturating_add(1));
        }
        self.next = self.script.next();
        while let Some(moment) = self.next
            && (moment.generation < generation
                || (moment.generation == generation
                    && durable.is_some_and(|number| moment.number <= number)))
        {
            self.next = self.script.next();
        }
        if let Some(moment) = self.next
            && moment.index > self.fresh
        {
            // It was made in an earlier life, which took the time until then.
            self.fresh = moment.index;
            let ahead = self.real(moment.due_s);
            self.origin = Instant::now().checked_sub(ahead).unwrap_or(self.origin);
        }
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.next.is_none()
    }

    /// How long to sleep when there was nothing to do.
    pub(crate) fn nap(&self) -> Duration {
        let Some(moment) = self.next.filter(|moment| moment.index >= self.fresh) else {
            return NAP;
        };
        let due = self.origin + self.real(moment.due_s);
        let nap = due.saturating_duration_since(Instant::now()).min(NAP);
        // A block that is due waits for something else than the time.
        if nap.is_zero() { NAP } else { nap }
    }

    /// What the module says of itself now.
    pub(crate) fn status(&mut self) -> Status {
        let status = self.script.status(self.now_s());
        self.stats.set_status(status.clone());
        status
    }

    /// Simulated seconds since the start; not beyond the next block, for which the half may be waiting.
    fn now_s(&self) -> f64 {
        let now_s = self.origin.elapsed().as_secs_f64() * self.scale;
        match self.next {
            Some(next) => now_s.min(next.due_s),
            None => now_s,
        }
    }

    fn real(&self, simulated_s: f64) -> Duration {
        Duration::try_from_secs_f64(simulated_s / self.scale).unwrap_or(Duration::MAX / 4)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Pace,
        config::tests::config,
        dynamics::EventConfig,
        pair::{ModulePair, Role},
        script::HalfScript,
    };

    fn half(config: &crate::PairConfig) -> Box<HalfScript> {
        let half = ModulePair::new(config).unwrap().half(Role::Transmitter);
        Box::new(HalfScript::new(half))
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
        feed.seek_after(None);
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
        feed.seek_after(None);
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

    #[test]
    fn what_is_durable_is_skipped_though_it_was_made_in_an_earlier_life() {
        let mut config = config();
        (config.first_number, config.blocks) = (5, Some(u64::MAX / 2));
        for pace in [Pace::Max, Pace::PerSecond(1e6)] {
            config.pace = pace;
            let stats = Stats::default();
            let mut feed = Feed::new(half(&config), &stats);
            feed.seek_after(Some(1 << 40));
            let block = loop {
                if let Some(block) = feed.poll_next() {
                    break block;
                }
            };
            assert_eq!(block.number, (1 << 40) + 1);
            assert_eq!(stats.snapshot().made, 1);
        }
    }

    #[test]
    fn a_module_that_numbers_anew_goes_back_within_its_new_numbers_only() {
        let mut config = config();
        (config.pace, config.blocks, config.time_scale) = (Pace::PerSecond(10.0), Some(30), 1e4);
        config.events = vec![EventConfig::Restart {
            at_s: 1.0,
            for_s: 1.0,
            renumber: true,
        }];
        let stats = Stats::default();
        let mut feed = Feed::new(half(&config), &stats);
        let mut numbers = Vec::new();
        while numbers.len() < 15 {
            numbers.extend(feed.poll_next().map(|block| block.number));
        }
        assert_eq!(numbers[8..13], [8, 9, 0, 1, 2]);
        feed.seek_after(Some(9));
        assert_eq!(feed.poll_next().unwrap().number, 0);
        feed.seek_after(Some(2));
        assert_eq!(feed.poll_next().unwrap().number, 3);
        let notes = stats.take_notes();
        assert_eq!(notes.len(), 1);
        assert_eq!(notes[0].what, NoteKind::Event { name: "restart" });
    }

    #[test]
    fn faults_are_noted_once_and_do_not_happen_again() {
        let mut config = config();
        config.blocks = Some(50);
        config.faults.drop_per_million = 1_000_000;
        let stats = Stats::default();
        let mut feed = Feed::new(half(&config), &stats);
        let first = std::iter::from_fn(|| feed.poll_next()).filter(|block| block.fault.is_some());
        let first = first.count();
        feed.seek_after(None);
        while let Some(block) = feed.poll_next() {
            assert_eq!(block.fault, None);
        }
        assert_eq!(stats.take_notes().len(), first);
        assert!((10..40).contains(&first));
    }
}
