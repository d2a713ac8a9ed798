//! A module's status: lines of `name=value`, which serial status frames and ring records carry.
//!
//! | name | value |
//! |---|---|
//! | `state` | `starting`, `running`, `fault` or `stopped` |
//! | `qber_ppm` | quantum bit error rate, parts per million |
//! | `key_rate_bps` | key made, bits per second |
//! | `temperature_mc` | temperature, thousandths of a degree Celsius |
//!
//! Every line is optional. A name that is not known is skipped, so that a module may say more; a
//! known name with a value that cannot be read makes the whole text invalid.

/// Longest status text, in bytes.
pub const MAX_STATUS_BYTES: usize = 1024;

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

/// Status of a module; `None` is what it did not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Status {
    /// What it is doing.
    pub state: Option<ModuleState>,
    /// Quantum bit error rate, in parts per million.
    pub qber_ppm: Option<u32>,
    /// Key made, in bits per second.
    pub key_rate_bits_per_s: Option<u64>,
    /// Temperature, in thousandths of a degree Celsius.
    pub temperature_milli_celsius: Option<i32>,
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

    /// The status as text.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                text.push_str(name);
                text.push('=');
                text.push_str(&value);
                text.push('\n');
            }
        };
        line("state", self.state.map(|state| state.name().to_owned()));
        line("qber_ppm", self.qber_ppm.map(|v| v.to_string()));
        line(
            "key_rate_bps",
            self.key_rate_bits_per_s.map(|v| v.to_string()),
        );
        line(
            "temperature_mc",
            self.temperature_milli_celsius.map(|v| v.to_string()),
        );
        text
    }

    fn set(&mut self, line: &str) -> Option<()> {
        let (name, value) = line.split_once('=')?;
        match name {
            "state" => self.state = Some(ModuleState::from_name(value)?),
            "qber_ppm" => self.qber_ppm = Some(value.parse().ok()?),
            "key_rate_bps" => self.key_rate_bits_per_s = Some(value.parse().ok()?),
            "temperature_mc" => self.temperature_milli_celsius = Some(value.parse().ok()?),
            _ => {}
        }
        Some(())
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
                temperature_milli_celsius: Some(-40_500),
            };
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
        for text in ["qber_ppm=7\nstate=melting", "\nstate", "a=b\nqber_ppm=-1"] {
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
