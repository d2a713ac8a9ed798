//! TLS 1.3 with certificates on both sides.
//!
//! X25519MLKEM768 comes first among the key exchanges, so that traffic recorded today stays closed to
//! a quantum computer later; X25519 and the NIST curves follow for peers that lack it. There is no
//! resumption, no ticket and no 0-RTT: every connection proves anew who is there. A certificate that
//! the authority, its revocation list or its dates do not accept opens no connection, and loses the
//! one that it has when the files are read again ([`Reloadable::until_refused`]).

use std::{
    fmt, fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use qkd_keyfile::{NodeId, UnixTime};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, pem::PemObject,
    },
    server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier},
    version::TLS13,
};
use tokio::{net::TcpStream, sync::watch};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};
use zeroize::Zeroizing;

use crate::{Identity, IdentityError};

mod revocation;
mod verify;

pub use revocation::Shown;
use revocation::{Judges, Lists};

/// Whom to trust and who to be: one certificate authority, one certificate with its key.
#[derive(Clone)]
pub struct Credentials {
    server: Arc<ServerConfig>,
    client: ClientMaterial,
    judges: Judges,
    identity: Result<Identity, IdentityError>,
    not_after: UnixTime,
}

/// What every client configuration is built from.
#[derive(Clone)]
struct ClientMaterial {
    provider: Arc<CryptoProvider>,
    servers: Arc<WebPkiServerVerifier>,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
}

/// Why credentials cannot be used. Whatever was in use before still is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not PEM, or holds nothing of the kind that is needed.
    #[error("{} holds no {wanted} in PEM", path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// "certificate", "private key" or "revocation list".
        wanted: &'static str,
    },
    /// Everyone on this machine can read the private key.
    #[error("{} can be read by everyone (mode {mode:03o}); chmod 600 it", path.display())]
    Exposed {
        /// The key's file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A certificate of the authority cannot serve as one.
    #[error("{} holds a certificate that cannot be a trust anchor", path.display())]
    Authority {
        /// The authority's file.
        path: PathBuf,
        /// What TLS says.
        source: rustls::Error,
    },
    /// A revocation list cannot be used.
    #[error("{} holds a revocation list that cannot be used", path.display())]
    RevocationList {
        /// The list's file.
        path: PathBuf,
        /// What TLS says.
        source: rustls::Error,
    },
    /// Certificate and key cannot be used, or not together.
    #[error("certificate {} and key {} do not work together", certificate.display(), key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What TLS says.
        source: rustls::Error,
    },
    /// The certificate cannot be read.
    #[error("{} holds a malformed certificate", path.display())]
    Malformed {
        /// The certificate's file.
        path: PathBuf,
    },
}

impl Credentials {
    /// Reads the authority's certificates, our certificate (with intermediates after it, if any) and
    /// our private key, all PEM.
    ///
    /// Dates are not judged here: the peer refuses an expired certificate. See
    /// [`not_after`](Self::not_after).
    ///
    /// # Errors
    ///
    /// [`CredentialsError`] names the file at fault. Nothing is kept.
    pub fn load(ca: &Path, certificate: &Path, key: &Path) -> Result<Self, CredentialsError> {
        Self::load_with_crl(ca, certificate, key, None)
    }

    /// As [`load`](Self::load), and reads the authority's revocation lists (CRLs, PEM). A list that is
    /// out of date refuses everybody, for it may lack the newest entry.
    ///
    /// # Errors
    ///
    /// [`CredentialsError`] names the file at fault. Nothing is kept.
    pub fn load_with_crl(
        ca: &Path,
        certificate: &Path,
        key: &Path,
        crl: Option<&Path>,
    ) -> Result<Self, CredentialsError> {
        let provider = Arc::new(provider());
        let roots = Arc::new(read_roots(ca)?);
        let chain = read_certificates(certificate)?;
        let private = read_key(key)?;
        let pair_error = |source| CredentialsError::Pair {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            source,
        };

        let judges = judges(&provider, &roots, crl)?.map_err(|error| {
            let source = rustls::Error::General(error.to_string());
            let path = crl.filter(|_| matches!(error, VerifierBuilderError::InvalidCrl(_)));
            match path.map(Path::to_owned) {
                Some(path) => CredentialsError::RevocationList { path, source },
                None => CredentialsError::Authority {
                    path: ca.to_owned(),
                    source,
                },
            }
        })?;
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(pair_error)?
            .with_client_cert_verifier(judges.clients.clone())
            .with_single_cert(chain.clone(), private.clone_key())
            .map_err(pair_error)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.max_early_data_size = 0;

        let malformed = || CredentialsError::Malformed {
            path: certificate.to_owned(),
        };
        let own = chain.first().ok_or_else(malformed)?;
        let (_, parsed) = X509Certificate::from_der(own).map_err(|_| malformed())?;
        let not_after = parsed.validity().not_after.timestamp();
        Ok(Self {
            server: Arc::new(server),
            identity: Identity::from_certificate(own),
            not_after: UnixTime(not_after.saturating_mul(1_000_000_000)),
            client: ClientMaterial {
                provider,
                servers: judges.servers.clone(),
                chain,
                key: Arc::new(private),
            },
            judges,
        })
    }

    /// Whether a peer's certificate would be accepted now, by authority, dates and revocation lists.
    #[must_use]
    pub fn accept(&self, shown: &Shown) -> bool {
        self.judges.accept(shown)
    }

    /// Who we are, by our own certificate.
    ///
    /// # Errors
    ///
    /// Our certificate names no node and no application: fine towards servers of others
    /// ([`web_client_config`](Self::web_client_config)), useless inside the network.
    pub fn identity(&self) -> Result<&Identity, &IdentityError> {
        self.identity.as_ref()
    }

    /// When our certificate expires; worth a warning some weeks before.
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }

    /// For listeners: every client must present a certificate of the authority.
    ///
    /// `alpn` lists the application protocols in order of preference (`h2`, `http/1.1`); empty for
    /// none.
    #[must_use]
    pub fn server_config(&self, alpn: &[&[u8]]) -> Arc<ServerConfig> {
        let mut config = (*self.server).clone();
        config.alpn_protocols = owned(alpn);
        Arc::new(config)
    }

    /// For connections to the node `expected`, and to nobody else: its certificate must be of the
    /// authority and name that node. Host names do not matter.
    ///
    /// # Panics
    ///
    /// Never: [`load`](Self::load) has used the same certificate and key.
    #[must_use]
    pub fn client_config(&self, expected: &NodeId, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        let verifier = verify::NodeVerifier::new(
            Identity::Node(expected.clone()),
            self.client.servers.clone(),
            &self.client.provider,
        );
        self.client.config(Arc::new(verifier), alpn)
    }

    /// For connections to servers of others, such as a vendor's key manager: its certificate must be
    /// of the authority and name the host that is dialled.
    ///
    /// # Panics
    ///
    /// Never: [`load`](Self::load) has used the same authority, certificate and key.
    #[must_use]
    pub fn web_client_config(&self, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        self.client.config(self.client.servers.clone(), alpn)
    }
}

impl ClientMaterial {
    fn config(
        &self,
        verifier: Arc<dyn rustls::client::danger::ServerCertVerifier>,
        alpn: &[&[u8]],
    ) -> Arc<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has suites of TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .expect("certificate and key matched when they were loaded");
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        config.alpn_protocols = owned(alpn);
        Arc::new(config)
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("identity", &self.identity)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// Credentials and the files they come from. Whoever opens or accepts a connection takes
/// [`current`](Self::current), so that a reload counts from the next connection on.
#[derive(Debug)]
pub struct Reloadable {
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
    crl: Option<PathBuf>,
    current: RwLock<Arc<Credentials>>,
    /// Tells that they were read again.
    read_again: watch::Sender<()>,
}

impl Reloadable {
    /// Loads the credentials for the first time; see [`Credentials::load`].
    ///
    /// # Errors
    ///
    /// As [`Credentials::load`].
    pub fn load(ca: &Path, certificate: &Path, key: &Path) -> Result<Self, CredentialsError> {
        Self::load_with_crl(ca, certificate, key, None)
    }

    /// Loads the credentials for the first time, with the authority's revocation lists; see
    /// [`Credentials::load_with_crl`].
    ///
    /// # Errors
    ///
    /// As [`Credentials::load_with_crl`].
    pub fn load_with_crl(
        ca: &Path,
        certificate: &Path,
        key: &Path,
        crl: Option<&Path>,
    ) -> Result<Self, CredentialsError> {
        let current = Credentials::load_with_crl(ca, certificate, key, crl)?;
        Ok(Self {
            ca: ca.to_owned(),
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            crl: crl.map(Path::to_owned),
            current: RwLock::new(Arc::new(current)),
            read_again: watch::Sender::default(),
        })
    }

    /// The credentials for the next connection.
    #[must_use]
    pub fn current(&self) -> Arc<Credentials> {
        self.current
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Reads the files again. Connections whose certificates are good still stay as they are.
    ///
    /// # Errors
    ///
    /// As [`Credentials::load`]; the credentials in use stay in use.
    pub fn reload(&self) -> Result<(), CredentialsError> {
        let crl = self.crl.as_deref();
        let fresh = Credentials::load_with_crl(&self.ca, &self.certificate, &self.key, crl)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
        self.read_again.send_replace(());
        Ok(())
    }

    /// Waits until a reload brings credentials that would not accept this peer any more: then its
    /// connection is to be closed.
    pub async fn until_refused(&self, shown: Shown) {
        let mut read_again = self.read_again.subscribe();
        // A reload between the handshake and now is not missed.
        while self.current().accept(&shown) {
            // The sender lives as long as this does.
            let _ = read_again.changed().await;
        }
    }
}

/// The server's end of a connection.
pub type ServerStream = server::TlsStream<TcpStream>;
/// The client's end of a connection.
pub type ClientStream = client::TlsStream<TcpStream>;

/// Why a handshake came to nothing. The connection is closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The peer took too long.
    #[error("no TLS handshake within {within:?}")]
    TimedOut {
        /// The time it had.
        within: Duration,
    },
    /// TLS or TCP refused: wrong authority, wrong node, expired, not TLS at all.
    #[error("TLS handshake: {0}")]
    Tls(#[source] io::Error),
    /// The peer's certificate is of the authority but names nobody.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Server side of a handshake; the peer's certificate is verified, and its identity told.
///
/// Take `config` from [`Credentials::server_config`].
///
/// # Errors
///
/// [`HandshakeError`]: the connection is closed.
pub async fn accept(
    tcp: TcpStream,
    config: Arc<ServerConfig>,
    within: Duration,
) -> Result<(ServerStream, Identity), HandshakeError> {
    let handshake = async {
        tcp.set_nodelay(true)?;
        TlsAcceptor::from(config).accept(tcp).await
    };
    let stream = tokio::time::timeout(within, handshake)
        .await
        .map_err(|_| HandshakeError::TimedOut { within })?
        .map_err(HandshakeError::Tls)?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let own = chain.first().ok_or(IdentityError::NoCertificate)?;
    let identity = Identity::from_certificate(own)?;
    Ok((stream, identity))
}

/// Client side of a handshake with the node that `config` expects
/// ([`Credentials::client_config`]).
///
/// The server may still refuse us: in TLS 1.3 a client learns that only with the server's first
/// bytes.
///
/// # Errors
///
/// [`HandshakeError`]: the connection is closed.
pub async fn connect(
    tcp: TcpStream,
    config: Arc<ClientConfig>,
    within: Duration,
) -> Result<ClientStream, HandshakeError> {
    // Never sent (the verifier asks for no server name); TLS wants one to be given.
    let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    let handshake = async {
        tcp.set_nodelay(true)?;
        TlsConnector::from(config).connect(name, tcp).await
    };
    tokio::time::timeout(within, handshake)
        .await
        .map_err(|_| HandshakeError::TimedOut { within })?
        .map_err(HandshakeError::Tls)
}

/// Client side of a handshake with a server of others, by its host name or address
/// ([`Credentials::web_client_config`]).
///
/// # Errors
///
/// [`HandshakeError`]: the connection is closed.
pub async fn connect_to_host(
    tcp: TcpStream,
    config: Arc<ClientConfig>,
    host: &str,
    within: Duration,
) -> Result<ClientStream, HandshakeError> {
    let name = ServerName::try_from(host.to_owned())
        .map_err(|error| HandshakeError::Tls(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
    let handshake = async {
        tcp.set_nodelay(true)?;
        TlsConnector::from(config).connect(name, tcp).await
    };
    tokio::time::timeout(within, handshake)
        .await
        .map_err(|_| HandshakeError::TimedOut { within })?
        .map_err(HandshakeError::Tls)
}

fn provider() -> CryptoProvider {
    CryptoProvider {
        kx_groups: vec![
            aws_lc_rs::kx_group::X25519MLKEM768,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP256R1,
            aws_lc_rs::kx_group::SECP384R1,
        ],
        ..aws_lc_rs::default_provider()
    }
}

/// Who decides about certificates; the inner error is the verifiers'.
fn judges(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    crl: Option<&Path>,
) -> Result<Result<Judges, VerifierBuilderError>, CredentialsError> {
    let lists: Lists = crl.map_or(Ok(Vec::new()), read_lists)?;
    let (roots, provider) = (|| roots.clone(), || provider.clone());
    let clients = WebPkiClientVerifier::builder_with_provider(roots(), provider())
        .with_crls(lists.clone())
        .enforce_revocation_expiration()
        .build();
    let servers = WebPkiServerVerifier::builder_with_provider(roots(), provider())
        .with_crls(lists)
        .enforce_revocation_expiration()
        .build();
    Ok(clients.and_then(|clients| {
        Ok(Judges {
            clients,
            servers: servers?,
        })
    }))
}

fn read_lists(path: &Path) -> Result<Lists, CredentialsError> {
    let not_pem = || CredentialsError::NotPem {
        path: path.to_owned(),
        wanted: "revocation list",
    };
    let text = read(path)?;
    let lists: Lists = CertificateRevocationListDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|_| not_pem())?;
    // Without a list nobody would be looked at.
    if lists.is_empty() {
        return Err(not_pem());
    }
    Ok(lists)
}

fn read_roots(path: &Path) -> Result<RootCertStore, CredentialsError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        roots
            .add(certificate)
            .map_err(|source| CredentialsError::Authority {
                path: path.to_owned(),
                source,
            })?;
    }
    Ok(roots)
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let not_pem = || CredentialsError::NotPem {
        path: path.to_owned(),
        wanted: "certificate",
    };
    let text = read(path)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|_| not_pem())?;
    if certificates.is_empty() {
        return Err(not_pem());
    }
    Ok(certificates)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, CredentialsError> {
    let text = read(path)?;
    let metadata = fs::metadata(path).map_err(|source| CredentialsError::Read {
        path: path.to_owned(),
        source,
    })?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o007 != 0 {
        return Err(CredentialsError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|_| CredentialsError::NotPem {
        path: path.to_owned(),
        wanted: "private key",
    })
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, CredentialsError> {
    let text = fs::read(path).map_err(|source| CredentialsError::Read {
        path: path.to_owned(),
        source,
    })?;
    Ok(Zeroizing::new(text))
}

fn owned(alpn: &[&[u8]]) -> Vec<Vec<u8>> {
    alpn.iter().map(|name| name.to_vec()).collect()
}
