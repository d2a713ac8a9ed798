//! A server certificate is judged by its chain and its URI, not by a host name.

use std::{fmt, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, Error, OtherError, PeerIncompatible, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use super::revocation::verify_server;
use crate::{Identity, IdentityError};

/// Accepts one identity only.
#[derive(Debug)]
pub(super) struct NodeVerifier {
    expected: Identity,
    servers: Arc<WebPkiServerVerifier>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// The certificate is of the authority, but not that of the node that was dialled.
#[derive(thiserror::Error)]
enum WrongPeer {
    #[error("{expected} was dialled, {found} answered")]
    Other { expected: Identity, found: Identity },
    #[error(transparent)]
    Nobody(#[from] IdentityError),
}

impl fmt::Debug for WrongPeer {
    /// What `rustls` prints of a verifier's error is its `Debug`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl NodeVerifier {
    pub(super) fn new(
        expected: Identity,
        servers: Arc<WebPkiServerVerifier>,
        provider: &CryptoProvider,
    ) -> Self {
        Self {
            expected,
            servers,
            algorithms: provider.signature_verification_algorithms,
        }
    }

    fn check_identity(&self, certificate: &CertificateDer<'_>) -> Result<(), WrongPeer> {
        let found = Identity::from_certificate(certificate)?;
        if found == self.expected {
            return Ok(());
        }
        Err(WrongPeer::Other {
            expected: self.expected.clone(),
            found,
        })
    }
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_server(&self.servers, end_entity, intermediates, now)?;
        self.check_identity(end_entity).map_err(|wrong| {
            Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(wrong))))
        })?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::ServerDoesNotSupportTls12Or13.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
