//! What a module said last; for `status`.

use std::collections::BTreeMap;

use qkd_drivers::{Alarm, Event, Metric, ModuleState, Value};
use qkd_keyfile::UnixTime;
use serde::Serialize;

use crate::env::unix_now;

/// Values or alarms that are kept of one module, at most; later ones of other names are not shown.
const MAX_KEPT: usize = 64;

/// What a module said last; for `status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ModuleReport {
    /// Within reach.
    pub attached: bool,
    /// Who it says it is.
    pub device: Option<String>,
    /// Why it cannot be opened, and what mends that; nothing where it is open.
    pub error: Option<String>,
    /// How often its driver has ended and was started again.
    pub restarts: u64,
    /// What it says of itself, such as `running`; nothing where it is not within reach.
    pub state: Option<&'static str>,
    /// The values that are out of their absolute range: no key is taken for as long.
    pub refusing: Option<String>,
    /// Key blocks taken.
    pub blocks: u64,
    /// Bits in them.
    pub key_bits: u64,
    /// Key blocks that were not taken because the module could not be trusted.
    pub refused_blocks: u64,
    /// Bits in them.
    pub refused_bits: u64,
    /// Blocks that were lost on the way here, as far as numbers tell.
    pub gap_blocks: u64,
    /// Blocks that failed a check.
    pub corrupt_blocks: u64,
    /// Blocks without key.
    pub empty_blocks: u64,
    /// The last quantum bit error rate, in parts per million.
    pub qber_ppm: Option<u32>,
    /// The last key rate that the module told, in bits per second.
    pub key_rate_bits_per_s: Option<u64>,
    /// The last visibility that the module told, in parts per million.
    pub visibility_ppm: Option<u32>,
    /// The last temperature that the module told, in thousandths of a degree Celsius.
    pub temperature_milli_celsius: Option<i32>,
    /// Everything that it measures, by name, with the band.
    pub metrics: BTreeMap<String, MetricReport>,
    /// Alarms, by code.
    pub alarms: BTreeMap<String, AlarmReport>,
}

/// A value that a module told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MetricReport {
    /// The number, as decimal text: values come in many ranges.
    pub value: String,
    /// `ok`, `operation` or `absolute`.
    pub band: &'static str,
}

/// An alarm of a module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AlarmReport {
    /// `info`, `warning`, `error` or `security`.
    pub severity: &'static str,
    /// How often it came. A module repeats an alarm for as long as it lasts.
    pub count: u64,
    /// When it came last, in nanoseconds since 1970.
    pub last_unix_ns: i64,
}

impl ModuleReport {
    pub(super) fn is_in(&self, state: ModuleState) -> bool {
        self.state == Some(state.name())
    }

    pub(super) fn has(&self, alarm: &Alarm) -> bool {
        self.alarms.contains_key(alarm.code.name())
    }

    /// Takes in everything that is neither key nor a value.
    pub(super) fn heard(&mut self, event: &Event) {
        match event {
            Event::Attached { device, .. } => {
                self.attached = true;
                self.device = Some(device.clone());
            }
            Event::Detached { .. } => {
                self.attached = false;
                self.state = None;
            }
            Event::State(now) => self.state = Some(now.name()),
            Event::Gap { blocks } => self.gap_blocks += blocks,
            Event::Corrupt { .. } => self.corrupt_blocks += 1,
            Event::Empty { .. } => self.empty_blocks += 1,
            Event::Alarm(alarm) => self.alarmed(alarm, unix_now()),
            _ => {}
        }
    }

    pub(super) fn measured(&mut self, metric: &Metric) {
        let value = match &metric.value {
            Value::QberPpm(ppm) => {
                self.qber_ppm = Some(*ppm);
                ppm.to_string()
            }
            Value::KeyRateBitsPerS(rate) => {
                self.key_rate_bits_per_s = Some(*rate);
                rate.to_string()
            }
            Value::VisibilityPpm(ppm) => {
                self.visibility_ppm = Some(*ppm);
                ppm.to_string()
            }
            Value::TemperatureMilliCelsius(t) => {
                self.temperature_milli_celsius = Some(*t);
                t.to_string()
            }
            Value::Other { value, .. } => value.clone(),
            _ => return,
        };
        let name = metric.value.name();
        let band = metric.band.name();
        if self.metrics.len() < MAX_KEPT || self.metrics.contains_key(name) {
            self.metrics
                .insert(name.to_owned(), MetricReport { value, band });
        }
    }

    fn alarmed(&mut self, alarm: &Alarm, now: UnixTime) {
        let code = alarm.code.name();
        if self.alarms.len() >= MAX_KEPT && !self.alarms.contains_key(code) {
            return;
        }
        let report = self.alarms.entry(code.to_owned()).or_insert(AlarmReport {
            severity: alarm.severity.name(),
            count: 0,
            last_unix_ns: 0,
        });
        report.severity = alarm.severity.name();
        report.count += 1;
        report.last_unix_ns = now.0;
    }
}

#[cfg(test)]
mod tests {
    use qkd_drivers::{AlarmCode, Band, Severity};

    use super::*;

    #[test]
    fn a_repeated_alarm_is_one_and_their_number_is_bounded() {
        let mut report = ModuleReport::default();
        let alarm = |code: &str| Alarm {
            code: AlarmCode::Module {
                code: code.to_owned(),
            },
            severity: Severity::Error,
        };
        for at in 1..=3 {
            report.alarmed(&alarm("heat"), UnixTime(at));
        }
        let heat = &report.alarms["heat"];
        assert_eq!(
            (heat.count, heat.last_unix_ns, heat.severity),
            (3, 3, "error")
        );
        for number in 0..1000 {
            report.alarmed(&alarm(&number.to_string()), UnixTime(9));
        }
        assert_eq!(report.alarms.len(), MAX_KEPT);
    }

    #[test]
    fn a_value_is_shown_with_its_band() {
        let mut report = ModuleReport::default();
        report.measured(&Metric {
            value: Value::VisibilityPpm(985_000),
            band: Band::OperationOutOfRange,
        });
        assert_eq!(report.visibility_ppm, Some(985_000));
        let shown = &report.metrics["visibility_ppm"];
        assert_eq!((&*shown.value, shown.band), ("985000", "operation"));
    }
}
