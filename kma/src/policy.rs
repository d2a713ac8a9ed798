//! How keys for a pair of nodes are relayed: what its configuration says, whoever asks.

use std::collections::BTreeMap;

use qkd_keyfile::{NodeId, metadata::SecurityLevel};

/// Links of one route, at most, whatever a policy says.
pub const HOPS_MAX: usize = 15;

/// Which of the schemes of Y.3803 clause 9 carries the units of a pair of nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelayScheme {
    /// Case 1 (Fig. 5): the key of the first link, relayed hop by hop from its far end on. Every node
    /// of the route knows the unit.
    LinkKey,
    /// Case 2 (Fig. 6): random bits of the source, relayed hop by hop. Every node of the route knows
    /// the unit.
    Random(RandomSource),
    /// Fig. 7: every node between the ends sends the XOR of its two link keys to the destination,
    /// which XORs all of them. The unit is the key of the first link, or random bits of the source
    /// under it (then only the two ends know it).
    AtDestination(Option<RandomSource>),
    /// Fig. 8: the same XORs go to a centre, which sends their XOR to the destination, and learns
    /// nothing.
    AtCentre {
        /// The centre: a node that both the destination and all nodes of the route talk to.
        centre: NodeId,
        /// As for [`RelayScheme::AtDestination`].
        random: Option<RandomSource>,
    },
}

impl RelayScheme {
    /// Where the source's own random bits come from, if it adds any.
    #[must_use]
    pub const fn random(&self) -> Option<RandomSource> {
        match self {
            Self::LinkKey => None,
            Self::Random(random) => Some(*random),
            Self::AtDestination(random) | Self::AtCentre { random, .. } => *random,
        }
    }
}

/// Where random bits of the source come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RandomSource {
    /// The operating system's generator. It is computational: units are of level `any`.
    System,
    /// A registered physical generator ([`Output::WantRandom`](crate::Output::WantRandom)).
    Physical,
    /// Bits of the first link that no other use takes. They are QKD bits; the link pays twice.
    Qkd,
}

/// How units between two nodes are relayed. The source's policy decides scheme, method and level;
/// every node's own decides whether, and over how many links, units pass it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayPolicy {
    /// The scheme, where this node is the source.
    pub scheme: RelayScheme,
    /// Whether a hop may be encrypted by AES-256-GCM while its link is short of pad. As source: for
    /// its units; as way station: for units whose source allows it. The level of such a unit is
    /// `any`.
    pub aes_fallback: bool,
    /// The weakest level that is worth keeping in stock. With `qkd`, AES is never used.
    pub level: SecurityLevel,
    /// Links of one route, at most.
    pub hop_limit: usize,
    /// Whether units of this pair may pass this node, as way station or as centre.
    pub transit: bool,
}

impl Default for RelayPolicy {
    /// Case 2 with the system's bits under one-time pad, over any number of links; units of others
    /// pass.
    fn default() -> Self {
        Self {
            scheme: RelayScheme::Random(RandomSource::System),
            aes_fallback: false,
            level: SecurityLevel::Any,
            hop_limit: HOPS_MAX,
            transit: true,
        }
    }
}

impl RelayPolicy {
    /// Whether units may be encrypted by AES on the way.
    #[must_use]
    pub fn allows_aes(&self) -> bool {
        self.aes_fallback && self.level == SecurityLevel::Any
    }
}

/// The policies of a node: one for each pair of nodes that has its own, one for all others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RelayPolicies {
    default: RelayPolicy,
    pairs: BTreeMap<(NodeId, NodeId), RelayPolicy>,
}

impl RelayPolicies {
    /// One policy for all pairs.
    #[must_use]
    pub const fn new(default: RelayPolicy) -> Self {
        Self {
            default,
            pairs: BTreeMap::new(),
        }
    }

    /// Sets the policy of a pair, whichever of the two is the source.
    pub fn set(&mut self, a: NodeId, b: NodeId, policy: RelayPolicy) {
        let pair = if a < b { (a, b) } else { (b, a) };
        self.pairs.insert(pair, policy);
    }

    /// The policy of a pair.
    #[must_use]
    pub fn of(&self, a: &NodeId, b: &NodeId) -> &RelayPolicy {
        let pair = if a < b { (a, b) } else { (b, a) };
        let own = self.pairs.get(&(pair.0.clone(), pair.1.clone()));
        own.unwrap_or(&self.default)
    }

    /// Whether any policy draws from the registered generator.
    #[must_use]
    pub fn want_physical(&self) -> bool {
        let mut all = self.pairs.values().chain([&self.default]);
        all.any(|policy| policy.scheme.random() == Some(RandomSource::Physical))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_has_one_policy_whichever_end_is_named_first() {
        let [a, b, c]: [NodeId; 3] = ["a", "b", "c"].map(|name| name.parse().unwrap());
        let mut policies = RelayPolicies::default();
        let own = RelayPolicy {
            hop_limit: 2,
            ..RelayPolicy::default()
        };
        policies.set(b.clone(), a.clone(), own.clone());
        assert_eq!((policies.of(&a, &b), policies.of(&b, &a)), (&own, &own));
        assert_eq!(policies.of(&a, &c), &RelayPolicy::default());
    }

    #[test]
    fn a_pair_that_wants_level_qkd_never_allows_aes() {
        let mut policy = RelayPolicy {
            aes_fallback: true,
            ..RelayPolicy::default()
        };
        assert!(policy.allows_aes());
        policy.level = SecurityLevel::Qkd;
        assert!(!policy.allows_aes());
    }
}
