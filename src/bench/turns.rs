//! Cases that take turns in short bursts.
//!
//! What else runs on the machine slows all cases of a round alike, and the fastest burst of each sees
//! through it: so ratios hold on a machine that is not idle.

use std::time::{Duration, Instant};

/// Long enough for the clock, short enough to fall between two time slices.
const BURST: Duration = Duration::from_micros(500);

/// Something to time, with its name.
pub struct Case {
    /// What it is called in a report.
    pub name: &'static str,
    run: Box<dyn FnMut()>,
}

impl Case {
    /// `run` does what is timed, once.
    pub fn new(name: &'static str, run: impl FnMut() + 'static) -> Self {
        Self {
            name,
            run: Box::new(run),
        }
    }

    /// Does it once.
    pub fn once(&mut self) {
        (self.run)();
    }
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Case({})", self.name)
    }
}

/// Seconds that each case takes, once: those of its fastest burst. All of them together take about
/// `budget`, or a hundred rounds if that is less.
#[must_use]
pub fn in_turns(cases: &mut [Case], budget: Duration) -> Vec<f64> {
    let start = Instant::now();
    let mut runs = Vec::new();
    for case in &mut *cases {
        case.once();
        let start = Instant::now();
        case.once();
        let once = start.elapsed().max(Duration::from_nanos(50));
        runs.push((BURST.as_nanos() / once.as_nanos()).max(1));
    }
    let mut best = vec![f64::MAX; cases.len()];
    let mut rounds = 0;
    while rounds < ROUNDS_LEAST || (start.elapsed() < budget && rounds < ROUNDS_MOST) {
        for ((case, runs), best) in cases.iter_mut().zip(&runs).zip(&mut best) {
            let start = Instant::now();
            for _ in 0..*runs {
                case.once();
            }
            *best = best.min(start.elapsed().as_secs_f64() / *runs as f64);
        }
        rounds += 1;
    }
    best
}

/// So that the answer is one, however short the time.
const ROUNDS_LEAST: u32 = 3;
/// More bursts find nothing faster.
const ROUNDS_MOST: u32 = 300;
