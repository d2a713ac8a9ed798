//! Which halves there are: the file, the seed, and the halves that the command line names.

use std::{collections::BTreeSet, fmt, io, path::Path, str::FromStr};

use qkd_keyfile::{Entropy, ModulePairId};
use qkd_sim_device::{
    EventConfig, FaultConfig, LinkConfig, ModulePair, Pace, PairConfig, Role, Seed, SimConfig,
    TransportConfig,
};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use crate::{config::ConfigError, env::SystemEntropy};

/// A half, as the command line names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HalfName {
    pair: ModulePairId,
    role: Role,
}

impl FromStr for HalfName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let (pair, role) = text.rsplit_once(':').ok_or("a half is NAME:ROLE")?;
        let role = match role {
            "transmitter" => Role::Transmitter,
            "receiver" => Role::Receiver,
            _ => return Err("a role is transmitter or receiver"),
        };
        let pair = pair.parse().map_err(|_| "not the name of a module pair")?;
        Ok(Self { pair, role })
    }
}

impl fmt::Display for HalfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Transmitter => "transmitter",
            Role::Receiver => "receiver",
        };
        write!(f, "{}:{role}", self.pair)
    }
}

/// Module pairs, as their file describes them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SimFile {
    /// For runs that are to be repeated; without it a fresh one is drawn.
    pub(super) seed: Option<MasterSeed>,
    #[serde(rename = "module_pair")]
    pairs: Vec<PairEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PairEntry {
    name: ModulePairId,
    /// Length of a block, in bits.
    block_bits: u32,
    /// Time that a block is collected for, in seconds.
    block_seconds: Option<f64>,
    /// Blocks per second, "max" or "link"; if left out, the link's, where there is one.
    pace: Option<Pace>,
    /// Simulated seconds in a second.
    time_scale: Option<f64>,
    link: Option<LinkConfig>,
    #[serde(default, rename = "event")]
    events: Vec<EventConfig>,
    /// Error rate to report, in parts per million.
    #[serde(default)]
    qber_ppm: u32,
    #[serde(default)]
    first_number: u64,
    blocks: Option<u64>,
    #[serde(default)]
    faults: FaultConfig,
    #[serde(rename = "half")]
    halves: Vec<HalfEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HalfEntry {
    role: Role,
    transport: TransportConfig,
}

/// The seed of all module pairs of a file.
#[derive(Clone, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct MasterSeed(Zeroizing<String>);

impl fmt::Debug for MasterSeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterSeed(withheld)")
    }
}

impl TryFrom<String> for MasterSeed {
    type Error = qkd_sim_device::SeedError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut text = Zeroizing::new(text);
        Seed::from_str(&text)?;
        text.make_ascii_lowercase();
        Ok(Self(text))
    }
}

impl FromStr for MasterSeed {
    type Err = qkd_sim_device::SeedError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::try_from(text.to_owned())
    }
}

impl MasterSeed {
    /// Its 64 digits, to be shown to whoever wants the run again.
    pub(super) fn text(&self) -> &str {
        &self.0
    }

    /// 256 bits of the operating system's.
    pub(super) fn fresh() -> Self {
        let mut bytes = Zeroizing::new([0; 32]);
        SystemEntropy.fill(&mut *bytes);
        Self(hex(&*bytes))
    }

    /// The first line of standard input; past the library's buffer, which nobody wipes.
    pub(super) fn from_stdin() -> io::Result<Self> {
        let mut text = String::with_capacity(80);
        let mut byte = [0];
        while nix::unistd::read(io::stdin(), &mut byte)? == 1 && byte != *b"\n" && text.len() < 80 {
            text.push(char::from(byte[0]));
        }
        Self::try_from(text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Its 64 digits.
    pub(super) fn digits(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// A module pair's own: pairs of one file share no bit.
    fn of_pair(&self, name: &ModulePairId) -> Seed {
        let mut digest: [u8; 32] = Sha256::new()
            .chain_update(b"qkd-bridge/sim-seed/1")
            .chain_update(self.digits())
            .chain_update(name.as_str())
            .finalize()
            .into();
        let text = hex(&digest);
        digest.zeroize();
        match text.parse() {
            Ok(seed) => seed,
            Err(_) => unreachable!("32 bytes are 64 digits"),
        }
    }
}

fn hex(bytes: &[u8]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(2 * bytes.len()));
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.extend(char::from_digit(u32::from(digit), 16));
        }
    }
    text
}

/// A half to be played.
pub(super) struct Job {
    pub(super) name: HalfName,
    pub(super) config: SimConfig,
}

/// The halves to be played, checked: those `wanted`, or all of the file at `path`.
pub(super) fn jobs(
    path: &Path,
    file: SimFile,
    seed: &MasterSeed,
    wanted: &[HalfName],
) -> Result<Vec<Job>, ConfigError> {
    let refuse = |what: String| ConfigError::whole(path, what);
    let base = path.parent().unwrap_or(Path::new("."));
    let mut names = BTreeSet::new();
    let mut jobs: Vec<Job> = Vec::new();
    for entry in file.pairs {
        let name = entry.name;
        if !names.insert(name.clone()) {
            return Err(refuse(format!("module pair {name} is listed twice")));
        }
        let pace = entry.pace.or(entry.link.as_ref().map(|_| Pace::Link));
        let Some(pace) = pace else {
            return Err(refuse(format!(
                "module pair {name} has neither pace nor link"
            )));
        };
        let pair = PairConfig {
            block_seconds: entry.block_seconds,
            time_scale: entry.time_scale.unwrap_or(1.0),
            link: entry.link,
            events: entry.events,
            qber_ppm: entry.qber_ppm,
            first_number: entry.first_number,
            blocks: entry.blocks,
            faults: entry.faults,
            ..PairConfig::new(seed.of_pair(&name), entry.block_bits, pace)
        };
        ModulePair::new(&pair).map_err(|error| refuse(format!("module pair {name}: {error}")))?;
        for half in entry.halves {
            let half_name = HalfName {
                pair: name.clone(),
                role: half.role,
            };
            if jobs.iter().any(|job| job.name == half_name) {
                return Err(refuse(format!("half {half_name} is listed twice")));
            }
            let config = SimConfig {
                role: half.role,
                pair: pair.clone(),
                transport: resolved(half.transport, base),
            };
            jobs.push(Job {
                name: half_name,
                config,
            });
        }
    }
    if let Some(unknown) = wanted
        .iter()
        .find(|name| jobs.iter().all(|job| job.name != **name))
    {
        return Err(refuse(format!("there is no half {unknown}")));
    }
    jobs.retain(|job| wanted.is_empty() || wanted.contains(&job.name));
    Ok(jobs)
}

fn resolved(mut transport: TransportConfig, base: &Path) -> TransportConfig {
    let path = match &mut transport {
        TransportConfig::Files(config) => &mut config.directory,
        TransportConfig::Serial(config) => &mut config.path,
        TransportConfig::Ring(config) => config.path_mut(),
        TransportConfig::Clavis2(_) => return transport,
    };
    *path = base.join(&*path);
    transport
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_is_named_as_it_prints() {
        for text in ["mp1:transmitter", "a:b:receiver"] {
            assert_eq!(text.parse::<HalfName>().unwrap().to_string(), text);
        }
        for text in ["mp1", "mp1:both", ":receiver"] {
            assert!(text.parse::<HalfName>().is_err(), "{text}");
        }
    }

    #[test]
    fn pairs_of_one_seed_share_no_bits() {
        let seed = MasterSeed::try_from("0aB1".repeat(16)).unwrap();
        let first_bits = |name: &str| {
            let seed = seed.of_pair(&name.parse().unwrap());
            let pair = PairConfig::new(seed, 128, Pace::Max);
            let half = ModulePair::new(&pair).unwrap().half(Role::Receiver);
            half.block(0).unwrap().key().to_vec()
        };
        assert_eq!(first_bits("mp1"), first_bits("mp1"));
        assert_ne!(first_bits("mp1"), first_bits("mp2"));
        assert_ne!(*MasterSeed::fresh().0, *MasterSeed::fresh().0);
    }
}
