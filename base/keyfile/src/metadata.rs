//! The 26 metadata items of ITU-T Y.3803 (12/2020), Table 1, in its four groups.
//!
//! Mandatory items are plain fields, optional ones are `Option`. Lengths are in bits, times in
//! nanoseconds since 1970 UTC. An item that the standard makes optional but that pad accounting
//! rests on (key type) is checked where it is used.

use serde::{Deserialize, Serialize};

use crate::{
    env::UnixTime,
    id::{AppId, KmaKeyId, KsaKeyId, ModuleId, NodeId, QkdKeyId},
};

/// A digest of key data together with the name of its function; which one is left to others by
/// Table 1.
///
/// Never leaves the node: a bare hash of key bits tells an eavesdropper something about them.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashValue {
    /// The hash function.
    pub algorithm: HashAlgorithm,
    /// The digest.
    pub digest: Vec<u8>,
}

impl std::fmt::Debug for HashValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HashValue({:?}, withheld)", self.algorithm)
    }
}

/// Hash functions that a [`HashValue`] may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum HashAlgorithm {
    /// FIPS 180-4.
    Sha256,
}

/// Whether this node's copy of a KMA-key encrypts or decrypts (Y.3803 Table 1 (2), "key type").
///
/// The two ends of a key always hold opposite types; the encrypting end owns the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum KeyType {
    /// This end encrypts with it, supplies from it, expires and cedes it.
    Encrypting,
    /// This end follows.
    Decrypting,
}

impl KeyType {
    /// What the matching KMA holds.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Encrypting => Self::Decrypting,
            Self::Decrypting => Self::Encrypting,
        }
    }
}

/// How a hop of a relay was encrypted (Y.3803 Table 1 (3); recording it is Req_KMA1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum RelayEncryption {
    /// One-time pad with one-time authentication.
    OneTimePad,
    /// AES-256-GCM under a key that a link supplied.
    Aes256Gcm,
}

impl RelayEncryption {
    /// The level that a hop under this method leaves a key at.
    #[must_use]
    pub const fn level(self) -> SecurityLevel {
        match self {
            Self::OneTimePad => SecurityLevel::Qkd,
            Self::Aes256Gcm => SecurityLevel::Any,
        }
    }
}

/// The security level of a key: the weakest over the origin of its bits and all that was done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SecurityLevel {
    /// Rests on a computational assumption somewhere.
    Any,
    /// QKD or a registered physical generator, one-time pad on every hop.
    Qkd,
}

/// Table 1 (1): metadata of a QKD-key, given by the QKD module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QkdKeyMetadata {
    /// QKD-key ID.
    pub qkd_key_id: QkdKeyId,
    /// Key length, in bits.
    pub key_bits: Option<u32>,
    /// QKD module ID: the module that generated the key.
    pub module: Option<ModuleId>,
    /// Matching QKD module ID.
    pub matching_module: Option<ModuleId>,
    /// Generation time stamp at the module pair.
    pub generated_at: Option<UnixTime>,
    /// Hash value of the key data.
    pub hash: Option<HashValue>,
}

impl QkdKeyMetadata {
    /// Metadata that says no more than the mandatory ID.
    #[must_use]
    pub const fn new(qkd_key_id: QkdKeyId) -> Self {
        Self {
            qkd_key_id,
            key_bits: None,
            module: None,
            matching_module: None,
            generated_at: None,
            hash: None,
        }
    }
}

/// Table 1 (2): metadata of a KMA-key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KmaKeyMetadata {
    /// KMA-key ID, equal at both ends and unique in the QKDN.
    pub kma_key_id: KmaKeyId,
    /// Key length, in bits.
    pub key_bits: Option<u32>,
    /// Key type.
    pub key_type: Option<KeyType>,
    /// KMA ID: the KMA that stores the key.
    pub kma: Option<NodeId>,
    /// Matching KMA ID.
    pub matching_kma: NodeId,
    /// Generation time stamp at the KMA.
    pub generated_at: Option<UnixTime>,
    /// QKD module IDs of the underlying QKD-keys: several when they were combined.
    pub modules: Vec<ModuleId>,
    /// Matching QKD module IDs, in the same order.
    pub matching_modules: Vec<ModuleId>,
    /// Hash value of the key data.
    pub hash: Option<HashValue>,
}

impl KmaKeyMetadata {
    /// Metadata that says no more than the mandatory items.
    #[must_use]
    pub const fn new(kma_key_id: KmaKeyId, matching_kma: NodeId) -> Self {
        Self {
            kma_key_id,
            key_bits: None,
            key_type: None,
            kma: None,
            matching_kma,
            generated_at: None,
            modules: Vec::new(),
            matching_modules: Vec::new(),
            hash: None,
        }
    }
}

/// Table 1 (3): metadata of a relayed KMA-key. The standard fields describe the last hop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayedKeyMetadata {
    /// Source KMA ID of the hop.
    pub source_kma: Option<NodeId>,
    /// Destination KMA ID of the hop.
    pub destination_kma: Option<NodeId>,
    /// Key relay time stamp.
    pub relayed_at: Option<UnixTime>,
    /// Key relay encryption method.
    pub encryption: Option<RelayEncryption>,
    /// KMA-key metadata of the source KMA.
    pub kma_key: KmaKeyMetadata,
    /// Beyond Table 1 (which says it may be extended): the weakest level over all hops so far.
    pub level: SecurityLevel,
    /// Beyond Table 1: the hops so far, oldest first.
    pub hops: Vec<RelayHop>,
}

/// One hop of a relay, kept so that a suspected key can be traced (Y.3803 clause 8.2.6).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayHop {
    /// The KMA that encrypted.
    pub from: NodeId,
    /// The KMA that decrypted.
    pub to: NodeId,
    /// When it was sent.
    pub at: UnixTime,
    /// How it was encrypted.
    pub encryption: RelayEncryption,
}

/// Table 1 (4): metadata of a KSA-key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KsaKeyMetadata {
    /// KSA-key ID, unique across the QKDN.
    pub ksa_key_id: KsaKeyId,
    /// Key length, in bits.
    pub key_bits: Option<u32>,
    /// Supply time stamp.
    pub supplied_at: Option<UnixTime>,
    /// Application name.
    pub application_name: Option<String>,
    /// Application source ID.
    pub source_application: Option<AppId>,
    /// Application destination ID.
    pub destination_application: Option<AppId>,
}

impl KsaKeyMetadata {
    /// Metadata that says no more than the mandatory ID.
    #[must_use]
    pub const fn new(ksa_key_id: KsaKeyId) -> Self {
        Self {
            ksa_key_id,
            key_bits: None,
            supplied_at: None,
            application_name: None,
            source_application: None,
            destination_application: None,
        }
    }
}

/// What a key file says about its key data: one of the four groups of Table 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum KeyMetadata {
    /// Group (1).
    Qkd(QkdKeyMetadata),
    /// Group (2).
    Kma(KmaKeyMetadata),
    /// Group (3).
    Relayed(RelayedKeyMetadata),
    /// Group (4).
    Ksa(KsaKeyMetadata),
}

/// Every item of every group set, for tests that carry metadata through something.
#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    fn id<T: std::str::FromStr<Err = crate::id::IdError>>(text: &str) -> T {
        text.parse().unwrap()
    }

    fn hash(byte: u8) -> Option<HashValue> {
        Some(HashValue {
            algorithm: HashAlgorithm::Sha256,
            digest: vec![byte; 32],
        })
    }

    fn kma() -> KmaKeyMetadata {
        KmaKeyMetadata {
            kma_key_id: KmaKeyId([7; 16]),
            key_bits: Some(4096),
            key_type: Some(KeyType::Decrypting),
            kma: Some(id("alice")),
            matching_kma: id("relay"),
            generated_at: Some(UnixTime(-5)),
            modules: vec![id("tx-1"), id("tx-2")],
            matching_modules: vec![id("rx-1"), id("rx-2")],
            hash: hash(2),
        }
    }

    pub(crate) fn all() -> [KeyMetadata; 4] {
        [
            KeyMetadata::Qkd(QkdKeyMetadata {
                qkd_key_id: id("c74ebf47"),
                key_bits: Some(7636),
                module: Some(id("tx-1")),
                matching_module: Some(id("rx-1")),
                generated_at: Some(UnixTime(i64::MAX)),
                hash: hash(1),
            }),
            KeyMetadata::Kma(kma()),
            KeyMetadata::Relayed(RelayedKeyMetadata {
                source_kma: Some(id("alice")),
                destination_kma: Some(id("relay")),
                relayed_at: Some(UnixTime(9)),
                encryption: Some(RelayEncryption::OneTimePad),
                kma_key: kma(),
                level: SecurityLevel::Any,
                hops: vec![RelayHop {
                    from: id("alice"),
                    to: id("relay"),
                    at: UnixTime(9),
                    encryption: RelayEncryption::Aes256Gcm,
                }],
            }),
            KeyMetadata::Ksa(KsaKeyMetadata {
                ksa_key_id: KsaKeyId([3; 16]),
                key_bits: Some(256),
                supplied_at: Some(UnixTime(1)),
                application_name: Some("router".to_owned()),
                source_application: Some(id("app-a")),
                destination_application: Some(id("app-b")),
            }),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_of_a_hash_value_withholds_the_digest() {
        let hash = HashValue {
            algorithm: HashAlgorithm::Sha256,
            digest: vec![0xab; 32],
        };
        assert_eq!(format!("{hash:?}"), "HashValue(Sha256, withheld)");
    }

    #[test]
    fn the_weaker_level_is_the_smaller() {
        assert_eq!(
            SecurityLevel::Qkd.min(SecurityLevel::Any),
            SecurityLevel::Any
        );
    }
}
