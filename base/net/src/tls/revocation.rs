//! Whether a peer's certificate is good still: at the handshake, and whenever files were read again.

use std::{fmt, sync::Arc};

use rustls::{
    CertificateError, Error,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime},
    server::danger::ClientCertVerifier,
};
use tokio::net::TcpStream;

use super::{ClientStream, ServerStream};

/// What a peer has shown at its handshake.
#[derive(Clone)]
pub struct Shown {
    chain: Vec<CertificateDer<'static>>,
    /// It dialled.
    as_client: bool,
}

impl From<&ServerStream> for Shown {
    fn from(stream: &ServerStream) -> Self {
        Self {
            chain: owned(stream.get_ref().1.peer_certificates()),
            as_client: true,
        }
    }
}

impl From<&ClientStream> for Shown {
    fn from(stream: &ClientStream) -> Self {
        Self {
            chain: owned(stream.get_ref().1.peer_certificates()),
            as_client: false,
        }
    }
}

impl From<&tokio_rustls::TlsStream<TcpStream>> for Shown {
    fn from(stream: &tokio_rustls::TlsStream<TcpStream>) -> Self {
        Self {
            chain: owned(stream.get_ref().1.peer_certificates()),
            as_client: matches!(stream, tokio_rustls::TlsStream::Server(_)),
        }
    }
}

fn owned(chain: Option<&[CertificateDer<'static>]>) -> Vec<CertificateDer<'static>> {
    chain.unwrap_or_default().to_vec()
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown")
            .field("as_client", &self.as_client)
            .finish_non_exhaustive()
    }
}

/// Judges certificates by authority, dates and revocation lists; not whose they are.
#[derive(Clone)]
pub(super) struct Judges {
    pub(super) clients: Arc<dyn ClientCertVerifier>,
    pub(super) servers: Arc<WebPkiServerVerifier>,
}

impl Judges {
    /// Whether what a peer has shown would be good for a handshake now.
    pub(super) fn accept(&self, shown: &Shown) -> bool {
        let Some((own, others)) = shown.chain.split_first() else {
            return false;
        };
        let now = UnixTime::now();
        if shown.as_client {
            self.clients.verify_client_cert(own, others, now).is_ok()
        } else {
            verify_server(&self.servers, own, others, now).is_ok()
        }
    }
}

/// Chain, dates and revocation of a server's certificate, whatever host it names.
pub(super) fn verify_server(
    servers: &WebPkiServerVerifier,
    own: &CertificateDer<'_>,
    others: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), Error> {
    let nobody = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    match servers.verify_server_cert(own, others, &nobody, &[], now) {
        // The name is looked at last, when all else is good.
        Ok(_)
        | Err(Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Lists that `rustls` takes; where there is one, it must be in date, and every certificate must be of
/// an authority that has one.
pub(super) type Lists = Vec<CertificateRevocationListDer<'static>>;
