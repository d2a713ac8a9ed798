//! Who a certificate is for.

use std::fmt;

use qkd_keyfile::{AppId, IdError, NodeId};
use rustls::pki_types::CertificateDer;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

/// Scheme of a node's URI in a certificate.
pub const NODE_SCHEME: &str = "qkd-node:";
/// Scheme of an application's URI in a certificate.
pub const APP_SCHEME: &str = "qkd-app:";

/// A peer, as its certificate names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// A node: a key manager, a controller or a manager.
    Node(NodeId),
    /// An application.
    App(AppId),
}

/// Why a certificate names nobody. The peer is not talked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The peer presented no certificate.
    #[error("the peer has no certificate")]
    NoCertificate,
    /// The certificate cannot be read.
    #[error("the certificate is malformed")]
    Malformed,
    /// There must be exactly one URI of ours in the certificate.
    #[error("the certificate holds {found} qkd-node:/qkd-app: URIs, exactly one is needed")]
    NotOne {
        /// How many there are.
        found: usize,
    },
    /// What follows the scheme is not an ID.
    #[error("the certificate's URI holds no ID")]
    Id(#[from] IdError),
}

impl Identity {
    /// Reads the identity from a certificate's subject alternative names (RFC 5280, 4.2.1.6).
    ///
    /// Says nothing about who signed the certificate: verify the chain first.
    ///
    /// # Errors
    ///
    /// The certificate has not exactly one URI of the two schemes, or it holds no valid ID.
    pub fn from_certificate(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (_, certificate) =
            X509Certificate::from_der(certificate).map_err(|_| IdentityError::Malformed)?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| IdentityError::Malformed)?;
        let ours: Vec<&str> = names
            .iter()
            .flat_map(|extension| &extension.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .filter(|uri| uri.starts_with(NODE_SCHEME) || uri.starts_with(APP_SCHEME))
            .collect();
        let [uri] = ours[..] else {
            return Err(IdentityError::NotOne { found: ours.len() });
        };
        if let Some(id) = uri.strip_prefix(NODE_SCHEME) {
            return Ok(Self::Node(id.parse()?));
        }
        let id = uri.strip_prefix(APP_SCHEME).unwrap_or_default();
        Ok(Self::App(id.parse()?))
    }

    /// The URI that stands for this identity in a certificate.
    #[must_use]
    pub fn uri(&self) -> String {
        match self {
            Self::Node(id) => format!("{NODE_SCHEME}{id}"),
            Self::App(id) => format!("{APP_SCHEME}{id}"),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(id) => write!(f, "node {id}"),
            Self::App(id) => write!(f, "application {id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn certificate(uris: &[&str]) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    fn read(uris: &[&str]) -> Result<Identity, IdentityError> {
        Identity::from_certificate(&certificate(uris))
    }

    #[test]
    fn the_one_uri_of_ours_is_the_identity() {
        let node = Identity::Node("alice/km?x=%20#1".parse().unwrap());
        assert_eq!(read(&[&node.uri()]), Ok(node));
        let app = Identity::App("video".parse().unwrap());
        assert_eq!(read(&["https://example.org/", &app.uri()]), Ok(app));
    }

    #[test]
    fn none_two_or_a_bad_id_is_nobody() {
        assert_eq!(read(&[]), Err(IdentityError::NotOne { found: 0 }));
        assert_eq!(
            read(&["qkd-node:a", "qkd-app:a"]),
            Err(IdentityError::NotOne { found: 2 })
        );
        assert_eq!(
            read(&["qkd-node:a", "qkd-node:a"]),
            Err(IdentityError::NotOne { found: 2 })
        );
        assert_eq!(read(&["qkd-node:"]), Err(IdentityError::Id(IdError::Empty)));
        assert_eq!(
            read(&["qkd-node:a\nb"]),
            Err(IdentityError::Id(IdError::Character { found: '\n' }))
        );
    }

    #[test]
    fn noise_is_malformed() {
        assert_eq!(
            Identity::from_certificate(&vec![0x30, 0x03, 1].into()),
            Err(IdentityError::Malformed)
        );
    }
}
