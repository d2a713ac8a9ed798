//! A module's status: lines of `name=value`, which serial status frames and ring records carry.
//!
//! | name | value |
//! |---|---|
//! | `state` | `starting`, `running`, `fault` or `stopped` |
//! | `qber_ppm` | quantum bit error rate, parts per million |
//! | `key_rate_bps` | key made, bits per second |
//! | `visibility_ppm` | visibility of the interference, parts per million |
//! | `temperature_mc` | temperature, thousandths of a degree Celsius |
//! | `metric.NAME` | any other value: a decimal number, with its unit in NAME |
//! | `band.NAME` | where the module itself sees NAME (a name above): `ok`, `operation`, `absolute` |
//! | `alarm.CODE` | something that an operator should know: `info`, `warning`, `error`, `security` |
//!
//! NAME of a metric and CODE are 1 to 32 of `a-z`, `0-9`, `_`, `-`. An alarm lasts while statuses name
//! it. Every line is optional. A name that is not known is skipped, so that a module may say more; a
//! known name with a value that cannot be read makes the whole text invalid.

use std::fmt::Write as _;

/// Longest status text, in bytes.
pub const MAX_STATUS_BYTES: usize = 1024;

/// Longest name of a metric or code of an alarm, in bytes.
pub const MAX_NAME_BYTES: usize = 32;

/// What a module is doing, by its own word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleState {
    /// Aligning, calibrating, authenticating: no key yet.
    Starting,
    /// Making key.
    Running,
    /// Not making key because something is wrong.
    Fault,
    /// Switched off on purpose.
    Stopped,
}

/// Where a value lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Band {
    /// As it should be.
    Ok,
    /// Outside the range of normal operation: a warning.
    OperationOutOfRange,
    /// Outside the range in which the module's keys can be trusted.
    AbsoluteOutOfRange,
}

/// How bad an alarm is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Good to know.
    Info,
    /// Keys still flow.
    Warning,
    /// Keys are lost or do not flow.
    Error,
    /// The security of keys is in question.
    Security,
}

/// Status of a module; `None` is what it did not say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// What it is doing.
    pub state: Option<ModuleState>,
    /// Quantum bit error rate, in parts per million.
    pub qber_ppm: Option<u32>,
    /// Key made, in bits per second.
    pub key_rate_bits_per_s: Option<u64>,
    /// Visibility of the interference, in parts per million.
    pub visibility_ppm: Option<u32>,
    /// Temperature, in thousandths of a degree Celsius.
    pub temperature_milli_celsius: Option<i32>,
    /// Other values: name without `metric.`, and the decimal number as it was written.
    pub metrics: Vec<(String, String)>,
    /// Names of values (`qber_ppm`, `metric.laser_ma`) and where the module itself sees them.
    pub bands: Vec<(String, Band)>,
    /// Codes of the alarms that there are, and how bad they are.
    pub alarms: Vec<(String, Severity)>,
}

/// Why bytes are not a status. Nothing was taken from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StatusError {
    /// More than [`MAX_STATUS_BYTES`].
    #[error("status of {bytes} bytes, {MAX_STATUS_BYTES} at most")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Not UTF-8.
    #[error("status is not text")]
    NotText,
    /// A line without `=`, or a known name with a value that cannot be read.
    #[error("status line {line} cannot be read")]
    Line {
        /// The line, counted from 1.
        line: usize,
    },
}

impl Status {
    /// Reads a status text.
    ///
    /// # Errors
    ///
    /// See [`StatusError`]: drop the text.
    pub fn decode(text: &[u8]) -> Result<Self, StatusError> {
        if text.len() > MAX_STATUS_BYTES {
            return Err(StatusError::TooLong { bytes: text.len() });
        }
        let text = str::from_utf8(text).map_err(|_| StatusError::NotText)?;
        let mut status = Self::default();
        for (i, line) in text.lines().enumerate() {
            status.set(line).ok_or(StatusError::Line { line: i + 1 })?;
        }
        Ok(status)
    }

    /// The status as text. A name that no reader would take makes its line one that is skipped.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: &dyn std::fmt::Display| {
            writeln!(text, "{name}={value}").expect("a string takes all");
        };
        if let Some(state) = self.state {
            line("state", &state.name());
        }
        if let Some(ppm) = self.qber_ppm {
            line(QBER, &ppm);
        }
        if let Some(rate) = self.key_rate_bits_per_s {
            line(KEY_RATE, &rate);
        }
        if let Some(ppm) = self.visibility_ppm {
            line(VISIBILITY, &ppm);
        }
        if let Some(temperature) = self.temperature_milli_celsius {
            line(TEMPERATURE, &temperature);
        }
        for (name, value) in &self.metrics {
            line(&format!("metric.{name}"), value);
        }
        for (name, band) in &self.bands {
            line(&format!("band.{name}"), &band.name());
        }
        for (code, severity) in &self.alarms {
            line(&format!("alarm.{code}"), &severity.name());
        }
        text
    }

    /// Where the module itself sees a value; what it does not judge is as it should be.
    #[must_use]
    pub fn band(&self, name: &str) -> Band {
        let band = self.bands.iter().find(|(of, _)| of == name);
        band.map_or(Band::Ok, |(_, band)| *band)
    }

    fn set(&mut self, line: &str) -> Option<()> {
        let (name, value) = line.split_once('=')?;
        match name.split_once('.') {
            Some(("metric", name)) => {
                let number: f64 = value.parse().ok()?;
                (is_name(name) && number.is_finite()).then_some(())?;
                self.metrics.push((name.to_owned(), value.to_owned()));
            }
            Some(("band", of)) => {
                is_name(of.strip_prefix("metric.").unwrap_or(of)).then_some(())?;
                self.bands.push((of.to_owned(), Band::from_name(value)?));
            }
            Some(("alarm", code)) => {
                is_name(code).then_some(())?;
                self.alarms
                    .push((code.to_owned(), Severity::from_name(value)?));
            }
            _ => match name {
                "state" => self.state = Some(ModuleState::from_name(value)?),
                QBER => self.qber_ppm = Some(value.parse().ok()?),
                KEY_RATE => self.key_rate_bits_per_s = Some(value.parse().ok()?),
                VISIBILITY => self.visibility_ppm = Some(value.parse().ok()?),
                TEMPERATURE => self.temperature_milli_celsius = Some(value.parse().ok()?),
                _ => {}
            },
        }
        Some(())
    }
}

/// Name of [`Status::qber_ppm`] in a text.
pub const QBER: &str = "qber_ppm";
/// Name of [`Status::key_rate_bits_per_s`] in a text.
pub const KEY_RATE: &str = "key_rate_bps";
/// Name of [`Status::visibility_ppm`] in a text.
pub const VISIBILITY: &str = "visibility_ppm";
/// Name of [`Status::temperature_milli_celsius`] in a text.
pub const TEMPERATURE: &str = "temperature_mc";

fn is_name(name: &str) -> bool {
    let fits = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(fits)
}

impl Band {
    const ALL: [Self; 3] = [
        Self::Ok,
        Self::OperationOutOfRange,
        Self::AbsoluteOutOfRange,
    ];

    /// The band's name in a status text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::OperationOutOfRange => "operation",
            Self::AbsoluteOutOfRange => "absolute",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|band| band.name() == name)
    }
}

impl Severity {
    const ALL: [Self; 4] = [Self::Info, Self::Warning, Self::Error, Self::Security];

    /// The severity's name in a status text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
            Self::Security => "security",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|severity| severity.name() == name)
    }
}

impl ModuleState {
    const ALL: [Self; 4] = [Self::Starting, Self::Running, Self::Fault, Self::Stopped];

    /// The state's name in a status text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Fault => "fault",
            Self::Stopped => "stopped",
        }
    }

    /// The state of a name in a status text.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_status_reads_back() {
        for state in ModuleState::ALL {
            let status = Status {
                state: Some(state),
                qber_ppm: Some(25_000),
                key_rate_bits_per_s: Some(13_720_000),
                visibility_ppm: Some(985_000),
                temperature_milli_celsius: Some(-40_500),
                metrics: vec![("laser_ma".to_owned(), "31.5".to_owned())],
                bands: vec![
                    (QBER.to_owned(), Band::Ok),
                    ("metric.laser_ma".to_owned(), Band::OperationOutOfRange),
                ],
                alarms: vec![("fpga-failure".to_owned(), Severity::Error)],
            };
            assert_eq!(status.band("metric.laser_ma"), Band::OperationOutOfRange);
            assert_eq!(status.band(TEMPERATURE), Band::Ok);
            assert_eq!(Status::decode(status.encode().as_bytes()), Ok(status));
        }
    }

    #[test]
    fn what_a_module_does_not_say_is_none_and_what_is_unknown_is_skipped() {
        assert_eq!(Status::decode(b""), Ok(Status::default()));
        let status = Status::decode(b"laser_ma=31.5\nqber_ppm=7\n").unwrap();
        assert_eq!(
            status,
            Status {
                qber_ppm: Some(7),
                ..Status::default()
            }
        );
        assert_eq!(status.encode(), "qber_ppm=7\n");
    }

    #[test]
    fn an_unreadable_line_is_named() {
        for text in [
            "qber_ppm=7\nstate=melting",
            "\nstate",
            "a=b\nqber_ppm=-1",
            "a=b\nmetric.laser=warm",
            "a=b\nmetric.laser=nan",
            "a=b\nmetric.=1",
            "a=b\nband.qber_ppm=bad",
            "a=b\nalarm.Over Heat=error",
            "a=b\nalarm.heat=mild",
        ] {
            let error = Status::decode(text.as_bytes()).unwrap_err();
            let line = if text.starts_with('\n') { 1 } else { 2 };
            assert_eq!(error, StatusError::Line { line });
        }
        assert_eq!(Status::decode(&[0xff]), Err(StatusError::NotText));
        assert_eq!(
            Status::decode(&[b'a'; 1025]),
            Err(StatusError::TooLong { bytes: 1025 })
        );
    }
}
