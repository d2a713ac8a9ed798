//! What a driver tells, in words for a report or a trace.

use std::collections::HashMap;

use qkd_drivers::{Band, CorruptReason, DetachReason, Event, KeyBlock, Severity, Value};
use qkd_handover::serial::FrameError;
use qkd_keyfile::Entropy;
use qkd_sim_device::trace::What;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::{command::randomness::Randomness, env::SystemEntropy};

/// Keys of which it is remembered that they have been there.
const MAX_REMEMBERED: usize = 1 << 20;

/// Deviation from which a key is told to be biased, in standard deviations.
const BIASED_SIGMA: f64 = 8.0;

/// Finds keys that come again, by a keyed hash that leaves with the process.
pub(super) struct Memory {
    secret: Zeroizing<[u8; 32]>,
    ids: HashMap<[u8; 32], String>,
}

impl Memory {
    pub(super) fn new() -> Self {
        let mut secret = Zeroizing::new([0; 32]);
        SystemEntropy.fill(&mut *secret);
        Self {
            secret,
            ids: HashMap::new(),
        }
    }

    /// The ID under which these bits were there before.
    pub(super) fn seen(&mut self, id: &str, key: &[u8]) -> Option<String> {
        let hash = Sha256::new().chain_update(*self.secret).chain_update(key);
        let hash = hash.finalize().into();
        if let Some(before) = self.ids.get(&hash) {
            return Some(before.clone());
        }
        if self.ids.len() < MAX_REMEMBERED {
            self.ids.insert(hash, id.to_owned());
        }
        None
    }
}

/// Whether a key has far too many ones or zeros, or changes far too often or seldom.
pub(super) fn is_biased(key: &[u8], bits: u32) -> bool {
    Randomness::of(key, bits).is_some_and(|random| {
        random.ones_sigma.abs() > BIASED_SIGMA || random.changes_sigma.abs() > BIASED_SIGMA
    })
}

/// An event without its key.
pub(super) fn what(event: &Event, key: &[u8], memory: &mut Memory) -> What {
    match event {
        Event::Key(block) => key_block(block, key, memory),
        Event::Empty { id } => What::Empty { id: id.to_string() },
        Event::Metric(metric) => {
            let (name, value) = value(&metric.value);
            What::Metric {
                name,
                value,
                band: band(metric.band).to_owned(),
            }
        }
        Event::State(state) => What::State {
            state: state.name().to_owned(),
        },
        Event::Alarm(alarm) => What::Alarm {
            code: first_word(&format!("{:?}", alarm.code)),
            severity: severity(alarm.severity).to_owned(),
        },
        Event::Gap { blocks } => What::Gap { blocks: *blocks },
        Event::Corrupt { id, reason } => What::Corrupt {
            class: class(reason).to_owned(),
            id: id.as_ref().map(ToString::to_string),
        },
        Event::Detached { reason } => What::Detached {
            reason: detach(reason).to_owned(),
        },
        Event::Attached { device, session } => What::Attached {
            device: device.clone(),
            session: *session,
        },
        _ => What::Unknown,
    }
}

fn key_block(block: &KeyBlock, key: &[u8], memory: &mut Memory) -> What {
    let id = block.metadata.qkd_key_id.to_string();
    What::Key {
        bits: block.key_bits,
        qber_ppm: block.qber_ppm,
        generated_at_unix_ns: block.metadata.generated_at.map(|at| at.0),
        defect: is_biased(key, block.key_bits).then(|| "biased".to_owned()),
        repeats: memory.seen(&id, key),
        id,
    }
}

/// Which check a block failed. Never with the values that were found: a check sequence is computed from
/// the key.
pub(super) const fn class(reason: &CorruptReason) -> &'static str {
    match reason {
        CorruptReason::Frame(FrameError::Checksum { .. }) => "checksum",
        CorruptReason::Ring(_) => "ring",
        CorruptReason::Incomplete { .. } => "incomplete",
        CorruptReason::NotRegular
        | CorruptReason::Owner { .. }
        | CorruptReason::Mode { .. }
        | CorruptReason::Unreadable { .. } => "rights",
        CorruptReason::EndedNumbering
        | CorruptReason::Disordered { .. }
        | CorruptReason::Durable { .. } => "order",
        _ => "format",
    }
}

/// Why a module is out of reach.
pub(super) const fn detach(reason: &DetachReason) -> &'static str {
    match reason {
        DetachReason::FolderGone => "folder-gone",
        DetachReason::CannotOpen { .. } => "cannot-open",
        DetachReason::HungUp => "hung-up",
        DetachReason::Closed => "closed",
        DetachReason::Silent => "silent",
        DetachReason::BrokeRules => "broke-rules",
        DetachReason::OtherDevice { .. } => "other-device",
        _ => "io",
    }
}

/// Where a value lies.
pub(super) const fn band(band: Band) -> &'static str {
    match band {
        Band::Ok => "ok",
        Band::OperationOutOfRange => "operation-out-of-range",
        Band::AbsoluteOutOfRange => "absolute-out-of-range",
    }
}

pub(super) const fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Error => "error",
        Severity::Security => "security",
    }
}

/// A value's name, with its unit as in a status text, and the value, rounded.
pub(super) fn value(value: &Value) -> (String, i64) {
    let number = match value {
        Value::QberPpm(ppm) | Value::VisibilityPpm(ppm) => i64::from(*ppm),
        Value::KeyRateBitsPerS(rate) => i64::try_from(*rate).unwrap_or(i64::MAX),
        Value::TemperatureMilliCelsius(t) => i64::from(*t),
        Value::Other { value, .. } => rounded(value),
        _ => 0,
    };
    (value.name().to_owned(), number)
}

#[expect(clippy::cast_possible_truncation, reason = "clamped before")]
fn rounded(decimal: &str) -> i64 {
    let number: f64 = decimal.parse().unwrap_or(0.0);
    number.clamp(-9e15, 9e15).round() as i64
}

/// The first word of how a value is shown to programmers: its variant.
pub(super) fn first_word(text: &str) -> String {
    let is_word = |c: char| c.is_ascii_alphanumeric();
    text.chars().take_while(|c| is_word(*c)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_comes_again_is_known_by_its_first_id() {
        let mut memory = Memory::new();
        assert_eq!(memory.seen("a", b"one"), None);
        assert_eq!(memory.seen("b", b"two"), None);
        assert_eq!(memory.seen("c", b"one"), Some("a".to_owned()));
    }

    #[test]
    fn a_damaged_frame_is_told_without_its_check_sequences() {
        let reason = CorruptReason::Frame(FrameError::Checksum {
            got: 0x1234_5678,
            want: 0x9abc_def0,
        });
        let event = Event::Corrupt { id: None, reason };
        let what = what(&event, &[], &mut Memory::new());
        assert_eq!(
            what,
            What::Corrupt {
                class: "checksum".to_owned(),
                id: None
            }
        );
    }
}
