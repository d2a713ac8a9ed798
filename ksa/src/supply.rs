//! What a key supply agent needs from the rest of the node.

use std::borrow::Cow;

use qkd_keyfile::{AppId, KeyBits, KsaKeyId, NodeId, metadata::SecurityLevel};
use qkd_secmem::KeyBuf;

/// Where keys for applications come from; the program implements it over its stores.
///
/// A key counts as supplied before the answer returns: what an answer holds is never given to the
/// same application again, also when the connection breaks before the reply has been written. A
/// future may be dropped at any of its awaits (the client went away, the time is over); what it
/// has committed by then stays burned.
pub trait KeySupply: Send + Sync + 'static {
    /// The stock that `caller` can draw on towards `peer` (ETSI GS QKD 014, "Get status").
    fn status(
        &self,
        caller: &AppId,
        peer: &AppId,
    ) -> impl Future<Output = Result<StockStatus, SupplyError>> + Send;

    /// Exactly [`SupplyRequest::number`] new keys ("Get key").
    ///
    /// An error has consumed no key that could still be supplied.
    fn supply(
        &self,
        request: SupplyRequest,
    ) -> impl Future<Output = Result<Vec<SuppliedKey>, SupplyError>> + Send;

    /// The keys that another application was given, in the order of
    /// [`SupplyByIdRequest::ids`] ("Get key with key IDs"): all of them, or an error that has
    /// consumed none.
    fn supply_by_id(
        &self,
        request: SupplyByIdRequest,
    ) -> impl Future<Output = Result<Vec<SuppliedKey>, SupplyError>> + Send;
}

/// A stock, as "Get status" tells it; limits come from the [`Profile`](crate::Profile).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StockStatus {
    /// The caller's node.
    pub source: NodeId,
    /// The node of the other application.
    pub target: NodeId,
    /// Keys of the default size that could be supplied now.
    pub stored_keys: u64,
    /// Keys of the default size that the stock can hold.
    pub max_keys: u64,
}

/// A request for new keys, within the limits of the [`Profile`](crate::Profile).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SupplyRequest {
    /// Who asks, by its certificate.
    pub caller: AppId,
    /// Who else gets the same keys: the slave application first, then the additional ones; no two
    /// are equal.
    pub destinations: Vec<AppId>,
    /// How many keys; at least one.
    pub number: u32,
    /// The length of each.
    pub size: KeyBits,
    /// The lowest security level that will do.
    pub level: SecurityLevel,
}

/// A request for keys that another application has asked for first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SupplyByIdRequest {
    /// Who asks, by its certificate.
    pub caller: AppId,
    /// The application that asked first.
    pub master: AppId,
    /// The keys; at least one, no two are equal.
    pub ids: Vec<KsaKeyId>,
}

/// A key on its way to an application.
#[derive(Debug)]
pub struct SuppliedKey {
    /// Its ID, equal at all applications that get it.
    pub id: KsaKeyId,
    /// Its bytes.
    pub key: KeyBuf,
}

/// Why no key was supplied. Nothing has been consumed, but for [`SupplyError::TimedOut`].
///
/// `Display` is for our log. The application sees only [`SupplyError::status`] and
/// [`SupplyError::public_message`], which never name another application, a node or a stock level.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SupplyError {
    /// The caller has no right to these keys: unknown here, or not among the applications that
    /// they were made for.
    #[error("{caller} has no right to this")]
    Unauthorised {
        /// Who asked.
        caller: AppId,
    },
    /// No route is known to an application.
    #[error("destination {destination} is unknown")]
    UnknownDestination {
        /// The application.
        destination: AppId,
    },
    /// The stock does not suffice; ask again later.
    #[error("{asked_bits} bits asked for, {have_bits} in stock")]
    NotEnoughKey {
        /// What the request needs.
        asked_bits: u64,
        /// What there is.
        have_bits: u64,
    },
    /// A node that must take part does not answer; ask again later.
    #[error("node {node} cannot be reached")]
    Unreachable {
        /// The node.
        node: NodeId,
    },
    /// Some of the IDs are unknown, consumed or expired.
    #[error("{missing} of the keys asked for are not here")]
    UnknownKeys {
        /// How many.
        missing: usize,
    },
    /// No key of the level asked for can be had between these applications.
    #[error("no key of level {asked:?} can be had")]
    LevelUnavailable {
        /// The lowest level that would do.
        asked: SecurityLevel,
    },
    /// The caller has had all that it may have for now.
    #[error("{caller} has used up its quota")]
    QuotaExceeded {
        /// Who asked.
        caller: AppId,
    },
    /// More keys than one request may ask for.
    #[error("{asked} keys asked for, {most} at most")]
    TooManyKeys {
        /// How many were asked for.
        asked: u64,
        /// The limit.
        most: u32,
    },
    /// The size is not a whole number of bytes.
    #[error("key size {bits} bits is not a multiple of 8")]
    SizeNotWholeBytes {
        /// The size asked for, in bits.
        bits: u32,
    },
    /// The size is outside the limits.
    #[error("key size {bits} bits is not within {} to {}", least.get(), most.get())]
    SizeOutOfRange {
        /// The size asked for, in bits.
        bits: u32,
        /// The shortest key.
        least: KeyBits,
        /// The longest key.
        most: KeyBits,
    },
    /// More additional applications than one request may name.
    #[error("{asked} additional applications, {most} at most")]
    TooManyApplications {
        /// How many were named.
        asked: usize,
        /// The limit; 0 where a key goes to one application only.
        most: u32,
    },
    /// The supply took too long. What it had committed by then stays burned.
    #[error("no answer in time")]
    TimedOut,
    /// This node cannot supply until someone mends it; its log says why.
    #[error("the node cannot supply")]
    Faulty,
}

impl SupplyError {
    /// The HTTP status: one of those that ETSI GS QKD 014 V1.1.1, clause 5, names.
    ///
    /// That a shortage of key is a 503 is our reading; the clause speaks of errors on the server
    /// side.
    #[must_use]
    pub const fn status(&self) -> u16 {
        match self {
            Self::Unauthorised { .. } => 401,
            Self::UnknownDestination { .. }
            | Self::UnknownKeys { .. }
            | Self::LevelUnavailable { .. }
            | Self::TooManyKeys { .. }
            | Self::SizeNotWholeBytes { .. }
            | Self::SizeOutOfRange { .. }
            | Self::TooManyApplications { .. } => 400,
            Self::NotEnoughKey { .. }
            | Self::Unreachable { .. }
            | Self::QuotaExceeded { .. }
            | Self::TimedOut
            | Self::Faulty => 503,
        }
    }

    /// What the application is told; `None` where the standard has no body (401).
    #[must_use]
    pub fn public_message(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::Unauthorised { .. } => return None,
            Self::UnknownDestination { .. } => "unknown SAE ID".into(),
            Self::NotEnoughKey { .. } => "not enough key, try again later".into(),
            Self::Unreachable { .. } => "the other KME cannot be reached, try again later".into(),
            Self::UnknownKeys { .. } => KEYS_NOT_FOUND.into(),
            Self::LevelUnavailable { .. } => EXTENSION_NOT_MET.into(),
            Self::QuotaExceeded { .. } => "quota exceeded, try again later".into(),
            Self::TooManyKeys { most, .. } => {
                format!("at most {most} keys can be asked for at once").into()
            }
            Self::SizeNotWholeBytes { .. } => SIZE_NOT_WHOLE_BYTES.into(),
            Self::SizeOutOfRange { least, most, .. } => {
                format!("size shall be from {} to {} bits", least.get(), most.get()).into()
            }
            Self::TooManyApplications { most: 0, .. } => {
                "additional_slave_SAE_IDs are not supported".into()
            }
            Self::TooManyApplications { most, .. } => {
                format!("at most {most} additional_slave_SAE_IDs are supported").into()
            }
            Self::TimedOut => "no answer in time, try again later".into(),
            Self::Faulty => "the KME cannot supply keys".into(),
        })
    }
}

/// ETSI GS QKD 014 V1.1.1, clause 6.2, fixes this text.
const SIZE_NOT_WHOLE_BYTES: &str = "size shall be a multiple of 8";
/// ETSI GS QKD 014 V1.1.1, clause 6.2, fixes this text.
pub(crate) const EXTENSION_NOT_MET: &str =
    "not all extension_mandatory request options could be met";
/// ETSI GS QKD 014 V1.1.1, clause 5 (Get key with key IDs), fixes this text.
const KEYS_NOT_FOUND: &str = "one or more keys specified are not found on KME";

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<SupplyError> {
        let app: AppId = "secret-app".parse().unwrap();
        let (least, most) = (64.try_into().unwrap(), 1024.try_into().unwrap());
        vec![
            SupplyError::Unauthorised {
                caller: app.clone(),
            },
            SupplyError::UnknownDestination {
                destination: app.clone(),
            },
            SupplyError::NotEnoughKey {
                asked_bits: 77_777,
                have_bits: 66_666,
            },
            SupplyError::Unreachable {
                node: "secret-node".parse().unwrap(),
            },
            SupplyError::UnknownKeys { missing: 1 },
            SupplyError::LevelUnavailable {
                asked: SecurityLevel::Qkd,
            },
            SupplyError::QuotaExceeded { caller: app },
            SupplyError::TooManyKeys { asked: 9, most: 8 },
            SupplyError::SizeNotWholeBytes { bits: 9 },
            SupplyError::SizeOutOfRange {
                bits: 8,
                least,
                most,
            },
            SupplyError::TooManyApplications { asked: 1, most: 0 },
            SupplyError::TooManyApplications { asked: 3, most: 2 },
            SupplyError::TimedOut,
            SupplyError::Faulty,
        ]
    }

    #[test]
    fn only_the_statuses_of_the_standard_are_used_and_only_401_has_no_body() {
        for error in all() {
            assert!(matches!(error.status(), 400 | 401 | 503), "{error:?}");
            let silent = error.public_message().is_none();
            assert_eq!(silent, error.status() == 401, "{error:?}");
        }
    }

    #[test]
    fn public_messages_name_no_application_no_node_and_no_stock_level() {
        for message in all().iter().filter_map(SupplyError::public_message) {
            for secret in ["secret", "77777", "66666"] {
                assert!(!message.contains(secret), "{message}");
            }
        }
    }

    #[test]
    fn texts_that_the_standard_fixes_are_exact() {
        let message = |error: SupplyError| error.public_message().unwrap();
        assert_eq!(
            message(SupplyError::SizeNotWholeBytes { bits: 9 }),
            "size shall be a multiple of 8"
        );
        assert_eq!(
            message(SupplyError::UnknownKeys { missing: 1 }),
            "one or more keys specified are not found on KME"
        );
        assert_eq!(
            message(SupplyError::LevelUnavailable {
                asked: SecurityLevel::Qkd
            }),
            "not all extension_mandatory request options could be met"
        );
    }
}
