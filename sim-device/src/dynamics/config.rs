//! Optics and events, as read from a configuration file.

use serde::Deserialize;

use crate::physics::{
    link::{Link, Model},
    preset::Preset,
};

/// The optics of a module pair.
///
/// ```toml
/// preset = "gys"       # see `qkd-bridge sim rate --list`
/// km = 25.0            # or: loss_db = 5.25
/// clock_hz = 2e6       # these four in place of the preset's
/// dead_ns = 40.0
/// pixels = 8
/// detections = 1e7     # finite-size models: per block
/// drift = { loss_db = 0.5, error_ppm = 4000, temperature_c = 2.0, period_s = 3600 }
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "LinkText")]
pub struct LinkConfig {
    link: Link,
    /// How it changes.
    pub drift: DriftConfig,
}

impl LinkConfig {
    pub(crate) fn link(&self) -> Link {
        self.link
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LinkText {
    preset: PresetName,
    km: Option<f64>,
    loss_db: Option<f64>,
    clock_hz: Option<f64>,
    dead_ns: Option<f64>,
    pixels: Option<u32>,
    detections: Option<f64>,
    #[serde(default)]
    drift: DriftConfig,
}

impl TryFrom<LinkText> for LinkConfig {
    type Error = &'static str;

    fn try_from(text: LinkText) -> Result<Self, &'static str> {
        let mut system = text.preset.0.system;
        let loss_db = match (text.km, text.loss_db) {
            (Some(km), None) => system.loss_db(km),
            (None, Some(loss_db)) => loss_db,
            _ => return Err("a link has either km or loss_db"),
        };
        if !(0.0..=100.0).contains(&loss_db) {
            return Err("a loss is 0 to 100 dB");
        }
        system.clock_hz = text.clock_hz.unwrap_or(system.clock_hz);
        system.dead_time.dead_ns = text.dead_ns.unwrap_or(system.dead_time.dead_ns);
        system.dead_time.pixels = text.pixels.unwrap_or(system.dead_time.pixels);
        if !(1.0..=1e12).contains(&system.clock_hz) {
            return Err("clock_hz is 1 to 1e12");
        }
        if !(0.0..=1e9).contains(&system.dead_time.dead_ns) || system.dead_time.pixels == 0 {
            return Err("dead_ns is 0 to 1e9, pixels at least 1");
        }
        match (&mut system.model, text.detections) {
            (_, None) => {}
            (Model::Finite { block, .. }, Some(detections)) if detections >= 1.0 => {
                block.detections = detections;
            }
            _ => return Err("detections (at least 1) are of finite-size models"),
        }
        text.drift.check()?;
        Ok(Self {
            link: system.over(loss_db),
            drift: text.drift,
        })
    }
}

/// One of the presets.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct PresetName(&'static Preset);

impl TryFrom<String> for PresetName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Preset::named(&name).map(Self).ok_or_else(|| {
            let names: Vec<_> = Preset::ALL.iter().map(|preset| preset.name).collect();
            format!("no preset {name}: there are {}", names.join(", "))
        })
    }
}

/// How optics change: in slow waves whose phases come from the seed.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DriftConfig {
    /// Most loss on top, in dB.
    pub loss_db: f64,
    /// Most errors on top, in parts per million of the detections of light.
    pub error_ppm: u32,
    /// How far the temperature goes up and down, in degrees.
    pub temperature_c: f64,
    /// The longest wave, in seconds.
    pub period_s: f64,
}

impl Default for DriftConfig {
    fn default() -> Self {
        Self {
            loss_db: 0.0,
            error_ppm: 0,
            temperature_c: 0.0,
            period_s: 3600.0,
        }
    }
}

impl DriftConfig {
    fn check(&self) -> Result<(), &'static str> {
        let is_small = |x: f64| (0.0..=100.0).contains(&x);
        if !is_small(self.loss_db) || !is_small(self.temperature_c) || self.error_ppm > 500_000 {
            return Err("a drift is 0 to 100 dB or degrees, and at most 500000 ppm of errors");
        }
        if !(1.0..=1e9).contains(&self.period_s) {
            return Err("the period of a drift is 1 to 1e9 s");
        }
        Ok(())
    }
}

/// Something that happens, at a simulated time in seconds.
///
/// ```toml
/// [[event]]
/// kind = "fibre-cut"
/// at_s = 60
/// for_s = 10
///
/// [[event]]
/// kind = "eavesdropper"
/// at_s = 90
/// for_s = 30
/// part = 0.4           # of the pulses that is measured and sent again; 0.4 adds 10 % of errors
/// unnoticed = true     # the module reports the errors and delivers all the same
///
/// [[event]]
/// kind = "restart"
/// at_s = 150
/// for_s = 5
/// renumber = true      # it begins at `first_number` again, with other bits
///
/// [[event]]
/// kind = "clock-step"
/// at_s = 200
/// by_s = -3600
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum EventConfig {
    /// No light arrives.
    FibreCut {
        /// When.
        at_s: f64,
        /// For how long.
        for_s: f64,
    },
    /// Someone measures pulses and sends them again.
    Eavesdropper {
        /// When.
        at_s: f64,
        /// For how long.
        for_s: f64,
        /// What part of the pulses.
        part: f64,
        /// Whether the module goes on as if nothing were.
        #[serde(default)]
        unnoticed: bool,
    },
    /// Both modules are switched off and on.
    Restart {
        /// When.
        at_s: f64,
        /// For how long they are not running.
        for_s: f64,
        /// Whether blocks are numbered anew.
        #[serde(default)]
        renumber: bool,
    },
    /// The modules' clocks are set.
    ClockStep {
        /// When.
        at_s: f64,
        /// By how much, in seconds.
        by_s: f64,
    },
}

impl EventConfig {
    /// When it begins.
    #[must_use]
    pub const fn at_s(&self) -> f64 {
        match *self {
            Self::FibreCut { at_s, .. }
            | Self::Eavesdropper { at_s, .. }
            | Self::Restart { at_s, .. }
            | Self::ClockStep { at_s, .. } => at_s,
        }
    }

    /// When it ends.
    #[must_use]
    pub const fn end_s(&self) -> f64 {
        match *self {
            Self::FibreCut { at_s, for_s }
            | Self::Eavesdropper { at_s, for_s, .. }
            | Self::Restart { at_s, for_s, .. } => at_s + for_s,
            Self::ClockStep { at_s, .. } => at_s,
        }
    }

    /// As it is told.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::FibreCut { .. } => "fibre-cut",
            Self::Eavesdropper { .. } => "eavesdropper",
            Self::Restart { .. } => "restart",
            Self::ClockStep { .. } => "clock-step",
        }
    }

    pub(crate) fn is_on(&self, at_s: f64) -> bool {
        self.at_s() <= at_s && at_s < self.end_s()
    }

    pub(crate) fn is_valid(&self) -> bool {
        let is_time = |t: f64| (0.0..=1e9).contains(&t);
        let fits = match *self {
            Self::Eavesdropper { part, .. } => (0.0..=1.0).contains(&part),
            Self::ClockStep { by_s, .. } => by_s.abs() <= 1e9,
            Self::FibreCut { .. } | Self::Restart { .. } => true,
        };
        fits && is_time(self.at_s()) && is_time(self.end_s()) && self.end_s() >= self.at_s()
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped before"
)]
pub(crate) fn parts_per_million(part: f64) -> u32 {
    (part.clamp(0.0, 1.0) * 1e6).round() as u32
}
