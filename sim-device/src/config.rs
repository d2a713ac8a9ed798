//! What to play, as read from a configuration file.

use std::str::FromStr;

use serde::Deserialize;
use zeroize::Zeroizing;

use crate::{
    clavis2::Clavis2Config,
    dynamics::{EventConfig, LinkConfig},
    faults::FaultConfig,
    files::FilesConfig,
    pair::Role,
    ring::RingConfig,
    serial::SerialConfig,
};

/// One half of a module pair on one transport.
///
/// ```toml
/// role = "transmitter"       # the other half: "receiver", with an equal [pair]
///
/// [pair]
/// seed = "1f1e1d1c1b1a191817161514131211100f0e0d0c0b0a09080706050403020100"
/// block_bits = 7636
/// pace = 2.0                 # blocks per second, "max", or "link": as the link below makes key
/// qber_ppm = 23000
/// first_number = 1
/// blocks = 1000              # then end; without it, go on
/// faults = { one_sided_per_million = 8000, differing_per_million = 4000 }
///
/// [transport]
/// kind = "files"             # or "serial", "ring" (with `socket` or `file`)
/// directory = "/run/qkd/handover"
/// ```
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimConfig {
    /// Which half to play.
    pub role: Role,
    /// The pair; equal at both halves.
    pub pair: PairConfig,
    /// How the half hands its blocks over.
    pub transport: TransportConfig,
}

/// A module pair.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairConfig {
    /// What all bits are drawn from.
    pub seed: Seed,
    /// Length of a block, in bits; need not be a multiple of 8.
    pub block_bits: u32,
    /// Time that a block is collected for, in seconds: it then has what the link made meanwhile,
    /// `block_bits` at most, or no bits. Without it, a block is there when it is full.
    #[serde(default)]
    pub block_seconds: Option<f64>,
    /// How fast blocks are made.
    pub pace: Pace,
    /// Simulated seconds in a second.
    #[serde(default = "one")]
    pub time_scale: f64,
    /// The optics, which give key rate and error rate; without it, both are as said here.
    #[serde(default)]
    pub link: Option<LinkConfig>,
    /// What happens, and when.
    #[serde(default, rename = "event")]
    pub events: Vec<EventConfig>,
    /// Error rate to report, in parts per million.
    #[serde(default)]
    pub qber_ppm: u32,
    /// Number of the first block.
    #[serde(default)]
    pub first_number: u64,
    /// How many numbers to go through; without end if left out.
    #[serde(default)]
    pub blocks: Option<u64>,
    /// What goes wrong, and how often.
    #[serde(default)]
    pub faults: FaultConfig,
}

const fn one() -> f64 {
    1.0
}

impl PairConfig {
    /// A pair without faults, events or optics, that goes on without end.
    #[must_use]
    pub fn new(seed: Seed, block_bits: u32, pace: Pace) -> Self {
        Self {
            seed,
            block_bits,
            block_seconds: None,
            pace,
            time_scale: 1.0,
            link: None,
            events: Vec::new(),
            qber_ppm: 0,
            first_number: 0,
            blocks: None,
            faults: FaultConfig::default(),
        }
    }
}

/// How a half hands its blocks over.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum TransportConfig {
    /// Hand-over files in a directory.
    Files(FilesConfig),
    /// A serial line.
    Serial(SerialConfig),
    /// Shared memory.
    Ring(RingConfig),
    /// Datagrams, as a Clavis2's daemon has them.
    Clavis2(Clavis2Config),
}

/// How fast blocks are made.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "PaceText")]
pub enum Pace {
    /// So many blocks a second, more than 0.
    PerSecond(f64),
    /// As fast as they are taken.
    Max,
    /// As fast as the link makes key.
    Link,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum PaceText {
    Number(f64),
    Integer(u32),
    Word(String),
}

/// Not a pace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a pace is a number of blocks per second above 0, \"max\" or \"link\"")]
pub struct PaceError;

impl TryFrom<PaceText> for Pace {
    type Error = PaceError;

    fn try_from(text: PaceText) -> Result<Self, PaceError> {
        let rate = match text {
            PaceText::Word(word) if word == "max" => return Ok(Self::Max),
            PaceText::Word(word) if word == "link" => return Ok(Self::Link),
            PaceText::Word(_) => return Err(PaceError),
            PaceText::Number(rate) => rate,
            PaceText::Integer(rate) => f64::from(rate),
        };
        // Slower than one block in eleven days is a mistake; faster than this cannot be timed.
        if (1e-6..=1e9).contains(&rate) {
            Ok(Self::PerSecond(rate))
        } else {
            Err(PaceError)
        }
    }
}

/// The 256 bits that both halves draw from: 64 hexadecimal digits.
#[derive(Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct Seed(Zeroizing<[u8; 32]>);

/// Not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a seed is 64 hexadecimal digits")]
pub struct SeedError;

impl Seed {
    /// The bytes themselves.
    pub(crate) fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl FromStr for Seed {
    type Err = SeedError;

    fn from_str(text: &str) -> Result<Self, SeedError> {
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return Err(SeedError);
        }
        let mut seed = Zeroizing::new([0; 32]);
        for (byte, pair) in seed.iter_mut().zip(digits.chunks(2)) {
            for &digit in pair {
                let value = char::from(digit).to_digit(16).ok_or(SeedError)?;
                *byte = *byte << 4 | value.to_le_bytes()[0];
            }
        }
        Ok(Self(seed))
    }
}

impl TryFrom<String> for Seed {
    type Error = SeedError;

    fn try_from(text: String) -> Result<Self, SeedError> {
        Zeroizing::new(text).parse()
    }
}

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed(withheld)")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn config() -> PairConfig {
        PairConfig {
            qber_ppm: 20_000,
            ..PairConfig::new("07".repeat(32).parse().unwrap(), 1001, Pace::Max)
        }
    }

    const TOML: &str = r#"
        role = "receiver"
        [pair]
        seed = "1f1e1d1c1b1a191817161514131211100f0e0d0c0b0a0908070605040302010F"
        block_bits = 7636
        pace = 2
        faults = { one_sided_per_million = 8000 }
        [transport]
        kind = "files"
        directory = "/run/qkd"
    "#;

    #[test]
    fn a_configuration_reads_with_its_defaults() {
        let config: SimConfig = toml::from_str(TOML).unwrap();
        assert_eq!(config.role, Role::Receiver);
        assert_eq!(config.pair.pace, Pace::PerSecond(2.0));
        assert_eq!(config.pair.seed.expose()[31], 0x0f);
        assert_eq!((config.pair.first_number, config.pair.blocks), (0, None));
        assert_eq!(config.pair.faults.one_sided_per_million, 8000);
        assert!(matches!(config.transport, TransportConfig::Files(_)));
    }

    #[test]
    fn a_ring_is_behind_a_socket_or_in_a_file() {
        let files = "kind = \"files\"\n        directory = \"/run/qkd\"";
        let read = |place: &str| {
            let text = TOML.replace(files, &format!("kind = \"ring\"\n{place}"));
            toml::from_str::<SimConfig>(&text).map(|config| config.transport)
        };
        let socket = RingConfig::Socket("/s".into());
        assert_eq!(read("socket = '/s'"), Ok(TransportConfig::Ring(socket)));
        let file = RingConfig::File("/f".into());
        assert_eq!(read("file = '/f'"), Ok(TransportConfig::Ring(file)));
        assert!(read("").is_err());
        assert!(read("socket = '/s'\nfile = '/f'").is_err());
        assert!(read("socket = '/s'\ntrusted = true").is_err());
    }

    #[test]
    fn a_mistake_is_refused() {
        for (from, to) in [
            ("receiver", "sender"),
            ("010F", "010G"),
            ("010F", "01"),
            ("pace = 2", "pace = 0"),
            ("pace = 2", "pace = \"fast\""),
            ("pace = 2", "pace = nan"),
            ("pace = 2", "pace = 2\nspeed = 3"),
            ("one_sided_per_million", "onesided"),
            ("\"files\"", "\"usb\""),
            ("directory", "folder"),
            ("directory", "extra = 1\ndirectory"),
        ] {
            let text = TOML.replace(from, to);
            assert_ne!(text, TOML);
            assert!(toml::from_str::<SimConfig>(&text).is_err(), "{to}");
        }
        let max = TOML.replace("pace = 2", "pace = \"max\"");
        let config: SimConfig = toml::from_str(&max).unwrap();
        assert_eq!(config.pair.pace, Pace::Max);
    }

    #[test]
    fn a_seed_is_not_shown() {
        assert_eq!(format!("{:?}", config().seed), "Seed(withheld)");
        let error = "xyz".parse::<Seed>().unwrap_err();
        assert!(!error.to_string().contains("xyz"));
    }
}
