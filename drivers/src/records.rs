//! From the records that serial lines and rings carry to events.

use std::collections::VecDeque;

use qkd_handover::{
    block::BlockHeader,
    status::{Band, KEY_RATE, QBER, Severity, Status, TEMPERATURE, VISIBILITY},
};
use qkd_keyfile::{ModuleId, metadata::QkdKeyMetadata};
use serde::Deserialize;

use crate::event::{Alarm, AlarmCode, Event, KeyBlock, Metric, Value};

/// Up to where a module's values are as they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Quantum bit error rate from which on operation is out of its normal range, in parts per million.
    pub qber_warning_ppm: u32,
    /// Quantum bit error rate from which on keys cannot be trusted, in parts per million: the node
    /// takes none from the module until it tells a lower one.
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
    /// Where a quantum bit error rate lies.
    #[must_use]
    pub const fn qber_band(&self, qber_ppm: u32) -> Band {
        if qber_ppm >= self.qber_absolute_ppm {
            Band::AbsoluteOutOfRange
        } else if qber_ppm >= self.qber_warning_ppm {
            Band::OperationOutOfRange
        } else {
            Band::Ok
        }
    }

    pub(crate) const fn qber(&self, qber_ppm: u32) -> Event {
        Event::Metric(Metric {
            value: Value::QberPpm(qber_ppm),
            band: self.qber_band(qber_ppm),
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

/// One event for each thing that a status says. The worse of the module's own judgement and of the
/// limits is a value's band.
pub(crate) fn tell_status(status: &Status, limits: &Limits, events: &mut VecDeque<Event>) {
    events.extend(status.state.map(Event::State));
    let mut tell = |name: &str, value: Value| {
        let own = match value {
            Value::QberPpm(ppm) => limits.qber_band(ppm),
            _ => Band::Ok,
        };
        let band = own.max(status.band(name));
        events.push_back(Event::Metric(Metric { value, band }));
    };
    if let Some(ppm) = status.qber_ppm {
        tell(QBER, Value::QberPpm(ppm));
    }
    if let Some(rate) = status.key_rate_bits_per_s {
        tell(KEY_RATE, Value::KeyRateBitsPerS(rate));
    }
    if let Some(ppm) = status.visibility_ppm {
        tell(VISIBILITY, Value::VisibilityPpm(ppm));
    }
    if let Some(temperature) = status.temperature_milli_celsius {
        tell(TEMPERATURE, Value::TemperatureMilliCelsius(temperature));
    }
    for (name, value) in &status.metrics {
        let (name, value) = (name.clone(), value.clone());
        tell(&format!("metric.{name}"), Value::Other { name, value });
    }
    let alarm = |(code, severity): &(String, Severity)| {
        let code = AlarmCode::Module { code: code.clone() };
        Event::Alarm(Alarm {
            code,
            severity: *severity,
        })
    };
    events.extend(status.alarms.iter().map(alarm));
}

#[cfg(test)]
mod tests {
    use qkd_handover::status::ModuleState;

    use super::*;

    #[test]
    fn a_status_becomes_an_event_for_each_thing_it_says() {
        let status = Status {
            state: Some(ModuleState::Running),
            qber_ppm: Some(120_000),
            key_rate_bits_per_s: Some(7),
            metrics: vec![("laser_ma".to_owned(), "31.5".to_owned())],
            bands: vec![
                (QBER.to_owned(), Band::Ok),
                ("metric.laser_ma".to_owned(), Band::OperationOutOfRange),
            ],
            alarms: vec![("heat".to_owned(), Severity::Warning)],
            ..Status::default()
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
                metric(
                    Value::Other {
                        name: "laser_ma".to_owned(),
                        value: "31.5".to_owned(),
                    },
                    Band::OperationOutOfRange
                ),
                Event::Alarm(Alarm {
                    code: AlarmCode::Module {
                        code: "heat".to_owned()
                    },
                    severity: Severity::Warning,
                }),
            ]
        );
    }

    #[test]
    fn bands_begin_at_their_limits() {
        let limits = Limits::default();
        let bands = [0, 79_999, 80_000, 109_999, 110_000].map(|ppm| limits.qber_band(ppm));
        let (warning, absolute) = (Band::OperationOutOfRange, Band::AbsoluteOutOfRange);
        assert_eq!(bands, [Band::Ok, Band::Ok, warning, warning, absolute]);
    }
}
