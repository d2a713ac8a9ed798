//! A small certificate authority, to try a network without one.
//!
//! Everything lies in one directory: `ca.pem`, `ca.key`, and `node-<id>.pem`/`.key` and
//! `app-<id>.pem`/`.key` for each name. Whoever can read `ca.key` can be any node; in a real network
//! the authority is kept elsewhere, and issues certificates with the same URIs ([`Identity`]).

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs::{DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use qkd_keyfile::{AppId, NodeId, UnixTime};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use x509_parser::{
    certificate::X509Certificate, prelude::FromDer,
    revocation_list::CertificateRevocationList as X509List,
};
use zeroize::Zeroizing;

use crate::Identity;

/// Name of the authority in its certificates.
const AUTHORITY: &str = "QKD Bridge development CA";
/// Clocks may differ by this much.
const BACKDATED: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

/// Certificates to issue.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// Nodes, also controllers and managers.
    pub nodes: &'a [NodeId],
    /// Applications.
    pub apps: &'a [AppId],
    /// Host names and addresses of the nodes besides `localhost`, `127.0.0.1` and `::1`, for clients
    /// that check them.
    pub extra_hosts: &'a [String],
    /// The time now; certificates count from here.
    pub now: UnixTime,
    /// How long the nodes' and applications' certificates hold. The authority's holds ten years.
    pub valid_days: u32,
}

/// What has been written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// Certificate and key of each name, nodes first, in the order asked for.
    pub issued: Vec<Issued>,
}

/// One certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// Who it is for.
    pub identity: Identity,
    /// The certificate's file.
    pub certificate: PathBuf,
    /// The private key's file, readable by its owner only.
    pub key: PathBuf,
}

/// Why no certificates were issued, or not all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PkiError {
    /// A file is there already. Nothing was written.
    #[error("{} exists; nothing is overwritten", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A name was asked for twice. Nothing was written.
    #[error("{identity} is named twice")]
    Twice {
        /// The name.
        identity: Identity,
    },
    /// The directory's authority was not made here, so no certificate can be added to it. Nothing was
    /// written.
    #[error("{} is not a {AUTHORITY}", path.display())]
    Foreign {
        /// The authority's certificate.
        path: PathBuf,
    },
    /// A file is no certificate, or no revocation list. Nothing was written.
    #[error("{} is malformed", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read or written. What was written before stays.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A certificate cannot be made, for example because a host name has characters that none can
    /// have. What was written before stays.
    #[error("certificate for {subject}")]
    Certificate {
        /// Who it was to be for.
        subject: String,
        /// Why not.
        source: rcgen::Error,
    },
}

/// Makes an authority in `dir` (created if need be, mode 0700) and certificates under it.
///
/// # Errors
///
/// [`PkiError`]; each variant says what was written.
pub fn init(dir: &Path, request: &Request<'_>) -> Result<Paths, PkiError> {
    let (ca, ca_key) = (dir.join("ca.pem"), dir.join("ca.key"));
    let wanted = wanted(dir, request)?;
    check_absent([&ca, &ca_key])?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io_error(dir))?;

    let failed = certificate_error(AUTHORITY);
    let key = KeyPair::generate().map_err(&failed)?;
    let params = authority(request.now);
    let certificate = params.self_signed(&key).map_err(&failed)?;
    write_new(&ca_key, 0o600, key.serialize_pem())?;
    write_new(&ca, 0o644, certificate.pem())?;
    issue(&wanted, &Issuer::new(params, key), request)?;
    Ok(Paths { ca, issued: wanted })
}

/// Makes further certificates under the authority that [`init`] left in `dir`.
///
/// # Errors
///
/// [`PkiError`]; each variant says what was written.
pub fn add(dir: &Path, request: &Request<'_>) -> Result<Paths, PkiError> {
    let wanted = wanted(dir, request)?;
    let (ca, issuer) = our_authority(dir, request.now)?;
    issue(&wanted, &issuer, request)?;
    Ok(Paths { ca, issued: wanted })
}

/// Takes the certificates of nodes and applications back: adds them to the revocation list `crl.pem`
/// in `dir`, which is made if it is not there, and holds for `request.valid_days` from now. Without a
/// name the list is only made anew.
///
/// # Errors
///
/// [`PkiError`]: the list is as it was.
pub fn revoke(dir: &Path, request: &Request<'_>) -> Result<PathBuf, PkiError> {
    let (_, issuer) = our_authority(dir, request.now)?;
    let path = dir.join("crl.pem");
    let mut serials = revoked(&path)?;
    for issued in names(dir, request)? {
        let pem = std::fs::read(&issued.certificate).map_err(io_error(&issued.certificate))?;
        let malformed = || PkiError::Malformed {
            path: issued.certificate.clone(),
        };
        let der = CertificateDer::from_pem_slice(&pem).map_err(|_| malformed())?;
        let (_, certificate) = X509Certificate::from_der(&der).map_err(|_| malformed())?;
        serials.insert(certificate.raw_serial().to_vec());
    }
    let since_epoch = Duration::from_nanos(u64::try_from(request.now.0).unwrap_or(0));
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let entry = |serial: &Vec<u8>| RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial),
        revocation_time: epoch + since_epoch,
        reason_code: None,
        invalidity_date: None,
    };
    let list = CertificateRevocationListParams {
        this_update: epoch + since_epoch.saturating_sub(BACKDATED),
        next_update: epoch + since_epoch + DAY * request.valid_days,
        crl_number: SerialNumber::from(since_epoch.as_secs()),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(entry).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let signed = list.signed_by(&issuer).and_then(|list| list.pem());
    let pem = signed.map_err(certificate_error("revocation list"))?;
    // Whoever reads it meanwhile finds the one before.
    let passing = dir.join("crl.pem.new");
    std::fs::write(&passing, pem)
        .and_then(|()| std::fs::rename(&passing, &path))
        .map_err(io_error(&path))?;
    Ok(path)
}

/// Serial numbers on the list that is there.
fn revoked(path: &Path) -> Result<BTreeSet<Vec<u8>>, PkiError> {
    let pem = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        read => read.map_err(io_error(path))?,
    };
    let malformed = || PkiError::Malformed {
        path: path.to_owned(),
    };
    let der = CertificateRevocationListDer::from_pem_slice(&pem).map_err(|_| malformed())?;
    let (_, list) = X509List::from_der(&der).map_err(|_| malformed())?;
    let serials = list.iter_revoked_certificates();
    Ok(serials.map(|entry| entry.raw_serial().to_vec()).collect())
}

/// The authority that [`init`] left in `dir`.
fn our_authority(
    dir: &Path,
    now: UnixTime,
) -> Result<(PathBuf, Issuer<'static, KeyPair>), PkiError> {
    let (ca, ca_key) = (dir.join("ca.pem"), dir.join("ca.key"));
    let foreign = || PkiError::Foreign { path: ca.clone() };

    let pem = std::fs::read(&ca).map_err(io_error(&ca))?;
    let der = CertificateDer::from_pem_slice(&pem).map_err(|_| foreign())?;
    let (_, certificate) = X509Certificate::from_der(&der).map_err(|_| foreign())?;
    let names: Vec<_> = certificate.subject().iter_common_name().collect();
    let key_pem = std::fs::read_to_string(&ca_key).map_err(io_error(&ca_key))?;
    let key = KeyPair::from_pem(&Zeroizing::new(key_pem)).map_err(|_| foreign())?;
    let ours = matches!(names[..], [name] if name.as_str() == Ok(AUTHORITY))
        && certificate.subject().iter().count() == 1
        && certificate.public_key().subject_public_key.data == key.public_key_raw();
    if !ours {
        return Err(foreign());
    }
    Ok((ca, Issuer::new(authority(now), key)))
}

/// An ID as part of a file name: what is not a letter, a digit, `-` or `_` becomes `%` and two
/// hexadecimal digits, so that no ID leaves the directory and no two share a file.
#[must_use]
pub fn file_name(id: &str) -> String {
    let mut name = String::with_capacity(id.len());
    for byte in id.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(byte.into()),
            _ => {
                let _ = write!(name, "%{byte:02x}");
            }
        }
    }
    name
}

/// Everything that is to be made, checked before anything is.
fn wanted(dir: &Path, request: &Request<'_>) -> Result<Vec<Issued>, PkiError> {
    let wanted = names(dir, request)?;
    check_absent(wanted.iter().flat_map(|w| [&w.certificate, &w.key]))?;
    Ok(wanted)
}

/// All that are named, and their files.
fn names(dir: &Path, request: &Request<'_>) -> Result<Vec<Issued>, PkiError> {
    let nodes = request.nodes.iter().cloned().map(Identity::Node);
    let apps = request.apps.iter().cloned().map(Identity::App);
    let mut wanted: Vec<Issued> = Vec::new();
    for identity in nodes.chain(apps) {
        if wanted.iter().any(|issued| issued.identity == identity) {
            return Err(PkiError::Twice { identity });
        }
        let stem = match &identity {
            Identity::Node(id) => format!("node-{}", file_name(id.as_str())),
            Identity::App(id) => format!("app-{}", file_name(id.as_str())),
        };
        wanted.push(Issued {
            identity,
            certificate: dir.join(format!("{stem}.pem")),
            key: dir.join(format!("{stem}.key")),
        });
    }
    Ok(wanted)
}

fn check_absent<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Result<(), PkiError> {
    match paths
        .into_iter()
        .find(|path| path.symlink_metadata().is_ok())
    {
        Some(path) => Err(PkiError::Exists { path: path.clone() }),
        None => Ok(()),
    }
}

fn issue(
    wanted: &[Issued],
    issuer: &Issuer<'_, KeyPair>,
    request: &Request<'_>,
) -> Result<(), PkiError> {
    for Issued {
        identity,
        certificate,
        key,
    } in wanted
    {
        let failed = certificate_error(&identity.uri());
        let pair = KeyPair::generate().map_err(&failed)?;
        let params = end_entity(identity, request).map_err(&failed)?;
        let signed = params.signed_by(&pair, issuer).map_err(&failed)?;
        write_new(key, 0o600, pair.serialize_pem())?;
        write_new(certificate, 0o644, signed.pem())?;
    }
    Ok(())
}

fn authority(now: UnixTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(AUTHORITY);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_dates(&mut params, now, DAY * 3653);
    params
}

fn end_entity(
    identity: &Identity,
    request: &Request<'_>,
) -> Result<CertificateParams, rcgen::Error> {
    let (id, hosts) = match identity {
        Identity::Node(id) => {
            let mut hosts = ["localhost", "127.0.0.1", "::1"]
                .map(str::to_owned)
                .to_vec();
            hosts.extend_from_slice(request.extra_hosts);
            (id.as_str(), hosts)
        }
        Identity::App(id) => (id.as_str(), Vec::new()),
    };
    // Turns texts that are addresses into address entries.
    let mut params = CertificateParams::new(hosts)?;
    params
        .subject_alt_names
        .push(SanType::URI(identity.uri().try_into()?));
    params.distinguished_name = common_name(id);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if matches!(identity, Identity::Node(_)) {
        params
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.use_authority_key_identifier_extension = true;
    set_dates(&mut params, request.now, DAY * request.valid_days);
    Ok(params)
}

fn common_name(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

fn set_dates(params: &mut CertificateParams, now: UnixTime, valid: Duration) {
    let now = Duration::from_nanos(u64::try_from(now.0).unwrap_or(0));
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(BACKDATED);
    params.not_after = epoch + now + valid;
}

fn write_new(path: &Path, mode: u32, pem: String) -> Result<(), PkiError> {
    let pem = Zeroizing::new(pem);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(io_error(path))?;
    file.write_all(pem.as_bytes()).map_err(io_error(path))
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> PkiError + use<> {
    let path = path.to_owned();
    move |source| PkiError::Io {
        path: path.clone(),
        source,
    }
}

fn certificate_error(subject: &str) -> impl Fn(rcgen::Error) -> PkiError + use<> {
    let subject = subject.to_owned();
    move |source| PkiError::Certificate {
        subject: subject.clone(),
        source,
    }
}
