//! `[relay]`: how keys are relayed, per pair of nodes.

use std::path::PathBuf;

use qkd_keyfile::{NodeId, metadata::SecurityLevel};
use qkd_kma::{HOPS_MAX, RandomSource, RelayPolicies, RelayPolicy, RelayScheme};
use serde::Deserialize;
use toml::Spanned;

/// The table. Every node has its own; the source's decides how its units travel, each other node's
/// whether they pass it.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelayConfig {
    /// A physical generator, such as `/dev/hwrng`, whose bits count as level `qkd`. Registering it is
    /// the operator's word that it is one; its output is tested for what a broken one shows.
    pub device: Option<PathBuf>,
    /// The policy of every pair that has none of its own.
    #[serde(default)]
    pub default: PolicyEntry,
    /// Policies of pairs.
    #[serde(default, rename = "pair")]
    pub pairs: Vec<PairEntry>,
}

/// The policy of a pair.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairEntry {
    /// The two nodes; the policy holds in both directions.
    pub nodes: Spanned<[NodeId; 2]>,
    /// The policy; what it leaves out is as built in, not as in `[relay.default]`.
    pub policy: PolicyEntry,
}

/// A policy.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyEntry {
    /// The scheme.
    pub scheme: SchemeEntry,
    /// Where random bits come from: `system` for the scheme `random` unless said otherwise; none for
    /// the others.
    pub random: Option<RandomEntry>,
    /// The centre, for the scheme `centre-xor` and no other.
    pub centre: Option<NodeId>,
    /// Whether AES-256-GCM stands in while a link is short of pad. Never with level `qkd`.
    pub aes_fallback: bool,
    /// The weakest level that is kept.
    pub level: SecurityLevel,
    /// Links of one route, at most.
    pub hop_limit: usize,
    /// Whether units of the pair may pass this node.
    pub transit: bool,
}

impl Default for PolicyEntry {
    fn default() -> Self {
        Self {
            scheme: SchemeEntry::Random,
            random: None,
            centre: None,
            aes_fallback: false,
            level: SecurityLevel::Any,
            hop_limit: HOPS_MAX,
            transit: true,
        }
    }
}

/// The schemes of Y.3803 clause 9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SchemeEntry {
    /// Case 1.
    LinkKey,
    /// Case 2.
    Random,
    /// Fig. 7.
    DestinationXor,
    /// Fig. 8.
    CentreXor,
}

/// Sources of random bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RandomEntry {
    /// The operating system's generator.
    System,
    /// The generator that `device` names.
    Device,
    /// QKD bits of the first link.
    Qkd,
}

impl From<RandomEntry> for RandomSource {
    fn from(entry: RandomEntry) -> Self {
        match entry {
            RandomEntry::System => Self::System,
            RandomEntry::Device => Self::Physical,
            RandomEntry::Qkd => Self::Qkd,
        }
    }
}

impl PolicyEntry {
    /// The policy, or what contradicts itself in it.
    fn policy(&self, device: bool) -> Result<RelayPolicy, String> {
        let random = self.random.map(RandomSource::from);
        if random == Some(RandomSource::Physical) && !device {
            return Err("random = \"device\" needs device = \"/dev/...\" in [relay]".to_owned());
        }
        if !(1..=HOPS_MAX).contains(&self.hop_limit) {
            return Err(format!("hop_limit is not within 1 to {HOPS_MAX}"));
        }
        if self.centre.is_some() != (self.scheme == SchemeEntry::CentreXor) {
            return Err("a centre belongs to scheme = \"centre-xor\", and to no other".to_owned());
        }
        let scheme = match (self.scheme, &self.centre) {
            (SchemeEntry::LinkKey, _) if random.is_some() => {
                return Err("scheme = \"link-key\" has no random bits".to_owned());
            }
            (SchemeEntry::LinkKey, _) => RelayScheme::LinkKey,
            (SchemeEntry::Random, _) => RelayScheme::Random(random.unwrap_or(RandomSource::System)),
            (SchemeEntry::CentreXor, Some(centre)) => RelayScheme::AtCentre {
                centre: centre.clone(),
                random,
            },
            (SchemeEntry::DestinationXor | SchemeEntry::CentreXor, _) => {
                RelayScheme::AtDestination(random)
            }
        };
        if self.level == SecurityLevel::Qkd && scheme.random() == Some(RandomSource::System) {
            let what =
                "level = \"qkd\" needs random bits of a device or of QKD, or a scheme without";
            return Err(what.to_owned());
        }
        if self.level == SecurityLevel::Qkd && self.aes_fallback {
            return Err("level = \"qkd\" excludes aes_fallback".to_owned());
        }
        Ok(RelayPolicy {
            scheme,
            aes_fallback: self.aes_fallback,
            level: self.level,
            hop_limit: self.hop_limit,
            transit: self.transit,
        })
    }
}

impl RelayConfig {
    /// The policies.
    ///
    /// # Errors
    ///
    /// What contradicts itself, and the entry, if it is a pair's.
    pub fn policies(&self) -> Result<RelayPolicies, (Option<std::ops::Range<usize>>, String)> {
        let device = self.device.is_some();
        let default = self.default.policy(device);
        let mut policies = RelayPolicies::new(default.map_err(|what| (None, what))?);
        for pair in &self.pairs {
            let [a, b] = pair.nodes.get_ref();
            let at = Some(pair.nodes.span());
            if a == b {
                return Err((at, format!("{a} is no pair of nodes")));
            }
            let policy = pair.policy.policy(device).map_err(|what| (at, what))?;
            policies.set(a.clone(), b.clone(), policy);
        }
        Ok(policies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<RelayPolicies, String> {
        let config: RelayConfig = toml::from_str(text).map_err(|e| e.to_string())?;
        config.policies().map_err(|(_, what)| what)
    }

    #[test]
    fn a_table_that_says_nothing_is_case_2_with_the_systems_bits() {
        assert_eq!(read("").unwrap(), RelayPolicies::default());
    }

    #[test]
    fn every_pair_has_the_scheme_that_it_names() {
        let text = r#"
            device = "/dev/hwrng"
            [default]
            transit = false
            [[pair]]
            nodes = ["a", "b"]
            policy = { scheme = "link-key", level = "qkd", hop_limit = 3 }
            [[pair]]
            nodes = ["a", "c"]
            policy = { scheme = "random", random = "device", level = "qkd" }
            [[pair]]
            nodes = ["a", "d"]
            policy = { scheme = "destination-xor", random = "qkd" }
            [[pair]]
            nodes = ["e", "a"]
            policy = { scheme = "centre-xor", centre = "z", aes_fallback = true }
        "#;
        let policies = read(text).unwrap();
        let node = |name: &str| name.parse::<NodeId>().unwrap();
        let of = |peer| policies.of(&node("a"), &node(peer));
        assert_eq!(
            (&of("b").scheme, of("b").hop_limit),
            (&RelayScheme::LinkKey, 3)
        );
        assert_eq!(of("c").scheme, RelayScheme::Random(RandomSource::Physical));
        let at_destination = RelayScheme::AtDestination(Some(RandomSource::Qkd));
        assert_eq!(of("d").scheme, at_destination);
        let (centre, random) = (node("z"), None);
        assert_eq!(of("e").scheme, RelayScheme::AtCentre { centre, random });
        assert!(!of("f").transit && of("e").transit);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for (policy, said) in [
            ("random = \"device\"", "needs device"),
            ("hop_limit = 0", "hop_limit"),
            ("hop_limit = 16", "hop_limit"),
            ("scheme = \"centre-xor\"", "a centre belongs"),
            ("centre = \"z\"", "a centre belongs"),
            ("scheme = \"link-key\", random = \"qkd\"", "no random bits"),
            ("level = \"qkd\"", "needs random bits of a device"),
            (
                "scheme = \"link-key\", level = \"qkd\", aes_fallback = true",
                "excludes",
            ),
            ("sheme = \"random\"", "unknown field"),
        ] {
            let error = read(&format!("default = {{ {policy} }}")).unwrap_err();
            assert!(error.contains(said), "{policy}: {error}");
        }
    }
}
