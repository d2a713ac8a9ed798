//! What a half plays: a module pair's own story, or a trace.

use std::num::NonZeroU64;

use qkd_handover::status::Status;

use crate::{
    dynamics::{EventConfig, Moment, Timeline},
    faults::Fault,
    pair::{Block, Half},
};

/// Blocks in order, with what there is to tell in between.
pub(crate) trait Script: Send {
    /// The next block that is to be made; `None` when there are no more.
    fn next(&mut self) -> Option<Moment>;

    /// To the beginning.
    fn rewind(&mut self);

    /// On to this number, if that takes no counting.
    fn skip_to(&mut self, _number: u64) {}

    /// Names the numbering of this generation.
    fn session(&self, generation: u32) -> NonZeroU64;

    /// The block; `None` if this half does not deliver it.
    fn make(&self, moment: &Moment) -> Option<Block>;

    /// What goes wrong with it at this half.
    fn fault(&self, moment: &Moment) -> Option<Fault>;

    /// What the module says of itself at a simulated time.
    fn status(&self, at_s: f64) -> Status;

    /// What happens, in order.
    fn events(&self) -> &[EventConfig];

    /// Simulated seconds in a second.
    fn time_scale(&self) -> f64;
}

/// A half of a module pair.
pub(crate) struct HalfScript {
    half: Half,
    timeline: Timeline,
}

impl HalfScript {
    pub(crate) fn new(half: Half) -> Self {
        Self {
            timeline: half.timeline(),
            half,
        }
    }
}

impl Script for HalfScript {
    fn next(&mut self) -> Option<Moment> {
        self.timeline.next()
    }

    fn rewind(&mut self) {
        self.timeline.rewind();
    }

    fn session(&self, generation: u32) -> NonZeroU64 {
        self.half.session(generation)
    }

    fn skip_to(&mut self, number: u64) {
        self.timeline.skip_to(number);
    }

    fn make(&self, moment: &Moment) -> Option<Block> {
        self.half.make(moment)
    }

    fn fault(&self, moment: &Moment) -> Option<Fault> {
        self.half.fault_here(moment)
    }

    fn status(&self, at_s: f64) -> Status {
        let now = self.timeline.weather().at(at_s);
        Status {
            state: Some(now.state),
            qber_ppm: now.qber_ppm,
            key_rate_bits_per_s: self.timeline.rate(&now).map(whole),
            visibility_ppm: now.visibility_ppm,
            temperature_milli_celsius: Some(now.temperature_milli_celsius),
            ..Status::default()
        }
    }

    fn events(&self) -> &[EventConfig] {
        self.half.events()
    }

    fn time_scale(&self) -> f64 {
        self.half.config().time_scale
    }
}

/// The whole part of a rate.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped before"
)]
fn whole(rate: f64) -> u64 {
    rate.clamp(0.0, 9e15) as u64
}
