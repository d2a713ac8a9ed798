//! What applications ask for, and the stock that meets it.
//!
//! The idea is that of QuIKS (arXiv 2604.09144) and of every store-keeper: a stock that is filled up
//! as it is used need hold what is asked for until new units have come, and a margin for how much
//! that varies. Rate and variance are estimated over the last quarter of a minute, so a target rises
//! within seconds and falls within a minute; nothing is thrown away when it falls.

use std::time::Duration;

use qkd_keyfile::Mono;

/// Orders are added up over this time.
const PERIOD: Duration = Duration::from_secs(1);

/// Weight of the newest period in the estimates.
const WEIGHT: f64 = 1.0 / 16.0;

/// Time that a stock is to last without a new unit, beside twice the time that a unit takes: what a
/// link may be down.
const LASTS: Duration = Duration::from_secs(20);

/// Standard deviations of the demand that a stock is to bear beyond its mean.
const MARGIN: f64 = 3.0;

/// After so many periods without an order nothing is left of the estimates.
const FORGOTTEN_AFTER: u32 = 400;

/// The demand for keys shared with one node.
#[derive(Debug, Default)]
pub(super) struct Demand {
    period_ends: Option<Mono>,
    /// Bytes supplied in this period.
    supplied_bytes: u64,
    /// The largest order refused in this period: whoever was refused asks again and again.
    largest_refused_bytes: u64,
    /// Bytes per period, and their square's deviation.
    mean: f64,
    variance: f64,
    /// Time from a unit's departure to its release.
    lead_seconds: f64,
    refused_bytes: u64,
}

impl Demand {
    pub(super) fn supplied(&mut self, now: Mono, bytes: u64) {
        self.tick(now);
        self.supplied_bytes = self.supplied_bytes.saturating_add(bytes);
    }

    pub(super) fn refused(&mut self, now: Mono, bytes: u64) {
        self.tick(now);
        self.largest_refused_bytes = self.largest_refused_bytes.max(bytes);
        self.refused_bytes = self.refused_bytes.saturating_add(bytes);
    }

    pub(super) fn arrived(&mut self, took: Duration) {
        self.lead_seconds += (took.as_secs_f64() - self.lead_seconds) * WEIGHT;
    }

    /// Ends every period that is over.
    pub(super) fn tick(&mut self, now: Mono) {
        let ends = *self.period_ends.get_or_insert(now.after(PERIOD));
        if now < ends {
            return;
        }
        let over = now.since(ends).as_secs() + 1;
        let asked = self
            .supplied_bytes
            .saturating_add(self.largest_refused_bytes);
        (self.supplied_bytes, self.largest_refused_bytes) = (0, 0);
        self.period(asked as f64);
        for _ in 1..over.min(FORGOTTEN_AFTER.into()) {
            self.period(0.0);
        }
        self.period_ends = Some(Mono(
            ends.0 + PERIOD * u32::try_from(over).unwrap_or(u32::MAX),
        ));
    }

    /// The usual recurrence of an exponentially weighted mean and variance.
    fn period(&mut self, asked: f64) {
        let off = asked - self.mean;
        self.mean += WEIGHT * off;
        self.variance = (1.0 - WEIGHT) * (self.variance + WEIGHT * off * off);
    }

    /// The stock that lasts as long as it should, without regard to any limit.
    pub(super) fn wanted_bytes(&self) -> u64 {
        let periods = LASTS.as_secs_f64() + 2.0 * self.lead_seconds;
        let bytes = self.mean * periods + MARGIN * (self.variance * periods).sqrt();
        whole(bytes)
    }

    pub(super) fn bytes_per_second(&self) -> u64 {
        whole(self.mean / PERIOD.as_secs_f64())
    }

    pub(super) fn refused_bytes(&self) -> u64 {
        self.refused_bytes
    }
}

/// Whole bytes; less than half a byte is none.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast to an integer saturates"
)]
fn whole(bytes: f64) -> u64 {
    bytes.round() as u64
}
