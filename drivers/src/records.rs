//! From the records that serial lines and rings carry to events.

use std::collections::VecDeque;

use qkd_handover::{
    block::BlockHeader,
    status::{ModuleState, Status},
};
use qkd_keyfile::{ModuleId, metadata::QkdKeyMetadata};
use serde::Deserialize;

use crate::event::{Band, Event, KeyBlock, Metric, Value};

/// Up to where a module's values are as they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Quantum bit error rate above which operation is out of its normal range, in parts per million.
    pub qber_warning_ppm: u32,
    /// Quantum bit error rate above which keys cannot be trusted, in parts per million.
    pub qber_absolute_ppm: u32,
}

impl Default for Limits {
    /// 8 %, and 11 %: where BB84 with one-way post-processing stops giving key (Shor and Preskill,
    /// Phys. Rev. Lett. 85, 441 (2000)).
    fn default() -> Self {
        Self {
            qber_warning_ppm: 80_000,
            qber_absolute_ppm: 110_000,
        }
    }
}

impl Limits {
    const fn band(&self, qber_ppm: u32) -> Band {
        if qber_ppm > self.qber_absolute_ppm {
            Band::AbsoluteOutOfRange
        } else if qber_ppm > self.qber_warning_ppm {
            Band::OperationOutOfRange
        } else {
            Band::Ok
        }
    }

    pub(crate) const fn qber(&self, qber_ppm: u32) -> Event {
        Event::Metric(Metric {
            value: Value::QberPpm(qber_ppm),
            band: self.band(qber_ppm),
        })
    }
}

/// What a block's header says, in Y.3803's words. The device's own name is its module ID.
pub(crate) fn key_block(
    header: &BlockHeader,
    device: Option<&str>,
    matching_module: Option<&ModuleId>,
) -> KeyBlock {
    KeyBlock {
        metadata: QkdKeyMetadata {
            key_bits: Some(header.key_bits),
            module: device.and_then(|name| name.parse().ok()),
            matching_module: matching_module.cloned(),
            generated_at: header.generated_at,
            ..QkdKeyMetadata::new(header.qkd_key_id())
        },
        key_bits: header.key_bits,
        qber_ppm: header.qber_ppm,
    }
}

/// One event for every line of a status.
pub(crate) fn tell_status(status: &Status, limits: &Limits, events: &mut VecDeque<Event>) {
    let ok = |value| {
        Event::Metric(Metric {
            value,
            band: Band::Ok,
        })
    };
    let Status {
        state,
        qber_ppm,
        key_rate_bits_per_s,
        temperature_milli_celsius,
    } = *status;
    events.extend(state.map(|state: ModuleState| Event::State(state)));
    events.extend(qber_ppm.map(|ppm| limits.qber(ppm)));
    events.extend(key_rate_bits_per_s.map(|rate| ok(Value::KeyRateBitsPerS(rate))));
    events.extend(temperature_milli_celsius.map(|t| ok(Value::TemperatureMilliCelsius(t))));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_becomes_an_event_for_each_thing_it_says() {
        let status = Status {
            state: Some(ModuleState::Running),
            qber_ppm: Some(120_000),
            key_rate_bits_per_s: Some(7),
            temperature_milli_celsius: None,
        };
        let mut events = VecDeque::new();
        tell_status(&status, &Limits::default(), &mut events);
        let metric = |value, band| Event::Metric(Metric { value, band });
        assert_eq!(
            events,
            [
                Event::State(ModuleState::Running),
                metric(Value::QberPpm(120_000), Band::AbsoluteOutOfRange),
                metric(Value::KeyRateBitsPerS(7), Band::Ok),
            ]
        );
    }

    #[test]
    fn bands_begin_above_their_limits() {
        let limits = Limits::default();
        let bands = [0, 80_000, 80_001, 110_000, 110_001].map(|ppm| limits.band(ppm));
        let (warning, absolute) = (Band::OperationOutOfRange, Band::AbsoluteOutOfRange);
        assert_eq!(bands, [Band::Ok, Band::Ok, warning, warning, absolute]);
    }
}
