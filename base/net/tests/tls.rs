//! Handshakes over loopback: who gets in, and with which key exchange.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::{fs, io, os::unix::fs::PermissionsExt, sync::Arc, time::Duration};

use common::{
    PATIENCE, authority, credentials, heedful, listener, mixed, node, now, reloadable, revoke,
};
use qkd_keyfile::UnixTime;
use qkd_net::{
    Credentials, CredentialsError, Identity, IdentityError,
    pki::{self, Request},
    tls::{HandshakeError, accept, connect},
};
use rustls::{NamedGroup, ProtocolVersion, pki_types::pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

type ServerEnd = Result<(ProtocolVersion, Option<NamedGroup>, Identity), HandshakeError>;

/// One handshake; the server sends a byte, which the client must get: only then was it accepted.
async fn meet(
    server: &Credentials,
    client: &Credentials,
    expect: &str,
) -> (ServerEnd, io::Result<u8>) {
    let (listener, address) = listener().await;
    let serving = async {
        let (tcp, _) = listener.accept().await.unwrap();
        let (mut stream, peer) = accept(tcp, server.server_config(&[]), PATIENCE).await?;
        stream.write_u8(7).await.map_err(HandshakeError::Tls)?;
        stream.flush().await.map_err(HandshakeError::Tls)?;
        let connection = stream.get_ref().1;
        let group = connection.negotiated_key_exchange_group();
        let version = connection.protocol_version().unwrap();
        Ok((version, group.map(|group| group.name()), peer))
    };
    let dialling = async {
        let tcp = TcpStream::connect(address).await?;
        let config = client.client_config(&node(expect), &[]);
        let mut stream = connect(tcp, config, PATIENCE)
            .await
            .map_err(io::Error::other)?;
        stream.read_u8().await
    };
    tokio::join!(serving, dialling)
}

#[tokio::test]
async fn two_nodes_meet_over_tls13_with_the_hybrid_key_exchange() {
    let dir = authority();
    let (a, b) = (
        credentials(dir.path(), "node-a"),
        credentials(dir.path(), "node-b"),
    );
    let (server, client) = meet(&b, &a, "b").await;
    let (version, group, peer) = server.unwrap();
    assert_eq!(version, ProtocolVersion::TLSv1_3);
    assert_eq!(group, Some(NamedGroup::X25519MLKEM768));
    assert_eq!(peer, Identity::Node(node("a")));
    assert_eq!(client.unwrap(), 7);
}

#[tokio::test]
async fn an_application_gets_in_under_its_own_name() {
    let dir = authority();
    let (app, b) = (
        credentials(dir.path(), "app-app"),
        credentials(dir.path(), "node-b"),
    );
    let (server, client) = meet(&b, &app, "b").await;
    assert_eq!(server.unwrap().2, Identity::App("app".parse().unwrap()));
    assert_eq!(client.unwrap(), 7);
}

#[tokio::test]
async fn another_node_than_the_one_dialled_is_refused() {
    let dir = authority();
    let (a, b) = (
        credentials(dir.path(), "node-a"),
        credentials(dir.path(), "node-b"),
    );
    let (server, client) = meet(&b, &a, "c").await;
    assert!(matches!(server, Err(HandshakeError::Tls(_))));
    let error = client.unwrap_err().to_string();
    assert!(
        error.contains("node c was dialled, node b answered"),
        "{error}"
    );
}

#[tokio::test]
async fn an_application_cannot_play_a_server() {
    let dir = authority();
    let (a, app) = (
        credentials(dir.path(), "node-a"),
        credentials(dir.path(), "app-app"),
    );
    let (server, client) = meet(&app, &a, "app").await;
    assert!(server.is_err() && client.is_err());
}

#[tokio::test]
async fn the_wrong_authority_is_refused_on_either_side() {
    let (ours, theirs) = (authority(), authority());
    let a = credentials(ours.path(), "node-a");
    let stranger = credentials(theirs.path(), "node-b");
    let (server, client) = meet(&stranger, &a, "b").await;
    assert!(server.is_err());
    let error = client.unwrap_err().to_string();
    assert!(
        error.contains("UnknownIssuer") || error.contains("BadSignature"),
        "{error}"
    );

    // A client that trusts the server but that the server does not trust.
    let b = credentials(ours.path(), "node-b");
    let stranger = mixed(ours.path(), theirs.path(), "node-a");
    let (server, client) = meet(&b, &stranger, "b").await;
    assert!(matches!(server, Err(HandshakeError::Tls(_))));
    assert!(client.is_err());
}

#[tokio::test]
async fn an_expired_certificate_is_refused_on_either_side() {
    let dir = tempfile::tempdir().unwrap();
    let fresh = Request {
        nodes: &["a", "b"].map(node),
        apps: &[],
        extra_hosts: &[],
        now: now(),
        valid_days: 30,
    };
    pki::init(dir.path(), &fresh).unwrap();
    let stale = Request {
        nodes: &[node("old")],
        now: UnixTime(now().0 - 40 * 86_400 * 1_000_000_000),
        ..fresh
    };
    pki::add(dir.path(), &stale).unwrap();
    let (a, old) = (
        credentials(dir.path(), "node-a"),
        credentials(dir.path(), "node-old"),
    );
    assert!(old.not_after() < now() && a.not_after() > now());

    let (_, client) = meet(&old, &a, "old").await;
    assert!(client.unwrap_err().to_string().contains("xpired"));
    let (server, client) = meet(&a, &old, "a").await;
    let HandshakeError::Tls(error) = server.unwrap_err() else {
        panic!("refused for another reason");
    };
    assert!(error.to_string().contains("xpired"), "{error}");
    assert!(client.is_err());
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let dir = authority();
    let b = credentials(dir.path(), "node-b");
    let mut roots = rustls::RootCertStore::empty();
    let ca = fs::read(dir.path().join("ca.pem")).unwrap();
    roots
        .add(rustls::pki_types::CertificateDer::from_pem_slice(&ca).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let anonymous = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();

    let (listener, address) = listener().await;
    let serving = async {
        let (tcp, _) = listener.accept().await.unwrap();
        accept(tcp, b.server_config(&[]), PATIENCE).await
    };
    let dialling = async {
        // Also shows that node certificates satisfy clients that check host names.
        let name = "localhost".try_into().unwrap();
        let tcp = TcpStream::connect(address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(anonymous));
        let mut stream = connector.connect(name, tcp).await.unwrap();
        stream.read_u8().await
    };
    let (server, client) = tokio::join!(serving, dialling);
    assert!(matches!(server, Err(HandshakeError::Tls(_))));
    assert!(client.is_err());
}

#[tokio::test]
async fn garbage_and_silence_are_no_handshake() {
    let dir = authority();
    let b = credentials(dir.path(), "node-b");
    for (sent, within) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], PATIENCE),
        (b"", Duration::from_millis(50)),
    ] {
        let (listener, address) = listener().await;
        let mut stranger = TcpStream::connect(address).await.unwrap();
        stranger.write_all(sent).await.unwrap();
        let (tcp, _) = listener.accept().await.unwrap();
        let end = accept(tcp, b.server_config(&[]), within).await;
        match end {
            Err(HandshakeError::Tls(_)) => assert!(!sent.is_empty()),
            Err(HandshakeError::TimedOut { .. }) => assert!(sent.is_empty()),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_reload_counts_from_the_next_connection_and_a_bad_one_not_at_all() {
    let (ours, theirs) = (authority(), authority());
    let b = reloadable(ours.path(), "node-b");
    let stranger = credentials(theirs.path(), "node-a");
    let (server, _) = meet(&b.current(), &stranger, "b").await;
    assert!(server.is_err());

    fs::write(ours.path().join("ca.pem"), "no certificate").unwrap();
    let error = b.reload().unwrap_err();
    assert!(
        error.to_string().contains("ca.pem holds no certificate"),
        "{error}"
    );
    let a = mixed(theirs.path(), ours.path(), "node-a");
    let (server, _) = meet(&b.current(), &a, "b").await;
    assert!(
        server.is_err(),
        "a does not trust b, but b still has its certificate"
    );

    for name in ["ca.pem", "node-b.pem", "node-b.key"] {
        fs::copy(theirs.path().join(name), ours.path().join(name)).unwrap();
    }
    b.reload().unwrap();
    let (server, client) = meet(&b.current(), &stranger, "b").await;
    assert_eq!(server.unwrap().2, Identity::Node(node("a")));
    assert_eq!(client.unwrap(), 7);
}

#[test]
fn errors_name_the_file_at_fault() {
    let dir = authority();
    let path = |name: &str| dir.path().join(name);
    let load = |ca: &str, certificate: &str, key: &str| {
        let error = Credentials::load(&path(ca), &path(certificate), &path(key)).unwrap_err();
        let text = error.to_string();
        (error, text)
    };
    let (error, text) = load("none.pem", "node-a.pem", "node-a.key");
    assert!(matches!(error, CredentialsError::Read { .. }) && text.contains("none.pem"));
    let (error, text) = load("ca.pem", "node-a.pem", "node-a.pem");
    assert!(matches!(error, CredentialsError::Exposed { .. }) && text.contains("chmod 600"));
    fs::set_permissions(path("node-a.pem"), fs::Permissions::from_mode(0o600)).unwrap();
    let (_, text) = load("ca.pem", "node-a.pem", "node-a.pem");
    assert!(
        text.ends_with("node-a.pem holds no private key in PEM"),
        "{text}"
    );
    let (_, text) = load("ca.pem", "node-a.key", "node-a.key");
    assert!(
        text.ends_with("node-a.key holds no certificate in PEM"),
        "{text}"
    );
    let (error, text) = load("ca.pem", "node-a.pem", "node-b.key");
    assert!(matches!(error, CredentialsError::Pair { .. }), "{error:?}");
    assert!(text.contains("node-a.pem") && text.contains("node-b.key"));
}

#[test]
fn a_certificate_without_our_uri_is_known_as_nobody() {
    let dir = authority();
    let ca = mixed_ca(dir.path());
    assert_eq!(ca.identity(), Err(&IdentityError::NotOne { found: 0 }));
    assert_eq!(
        credentials(dir.path(), "node-a").identity(),
        Ok(&Identity::Node(node("a")))
    );
}

/// The authority's own certificate, used as if it were a node's.
fn mixed_ca(dir: &std::path::Path) -> Credentials {
    Credentials::load(
        &dir.join("ca.pem"),
        &dir.join("ca.pem"),
        &dir.join("ca.key"),
    )
    .unwrap()
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_on_either_side_once_the_list_was_read() {
    let dir = authority();
    let (a, b) = (
        credentials(dir.path(), "node-a"),
        credentials(dir.path(), "node-b"),
    );
    revoke(dir.path(), &["c"], now(), 30);
    let (heedful_a, heedful_b) = (heedful(dir.path(), "node-a"), heedful(dir.path(), "node-b"));
    let (server, client) = meet(&heedful_b.current(), &heedful_a.current(), "b").await;
    assert!(server.is_ok() && client.is_ok());

    // What was revoked before stays revoked.
    revoke(dir.path(), &["a"], now(), 30);
    revoke(dir.path(), &["b"], now(), 30);
    assert!(meet(&heedful_b.current(), &a, "b").await.0.is_ok());
    heedful_a.reload().unwrap();
    heedful_b.reload().unwrap();
    let (server, client) = meet(&heedful_b.current(), &a, "b").await;
    assert!(matches!(server, Err(HandshakeError::Tls(_))) && client.is_err());
    let (server, client) = meet(&b, &heedful_a.current(), "b").await;
    assert!(server.is_err() && client.is_err());
    assert!(!heedful_b.current().accept(&shown_by(&a, &b).await));
    assert!(b.accept(&shown_by(&a, &b).await));
}

/// What `a` shows `b`.
async fn shown_by(a: &Credentials, b: &Credentials) -> qkd_net::tls::Shown {
    let (listener, address) = listener().await;
    let serving = async {
        let (tcp, _) = listener.accept().await.unwrap();
        accept(tcp, b.server_config(&[]), PATIENCE).await.unwrap()
    };
    let dialling = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        connect(tcp, a.client_config(&node("b"), &[]), PATIENCE).await
    };
    let ((server, _), client) = tokio::join!(serving, dialling);
    let _open = client.unwrap();
    (&server).into()
}

#[tokio::test]
async fn a_list_out_of_date_refuses_everybody_and_one_that_is_none_is_not_taken() {
    let dir = authority();
    let a = credentials(dir.path(), "node-a");
    let two_days_ago = UnixTime(now().0 - 2 * 86_400_000_000_000);
    revoke(dir.path(), &[], two_days_ago, 1);
    let b = heedful(dir.path(), "node-b");
    assert!(meet(&b.current(), &a, "b").await.0.is_err());
    revoke(dir.path(), &[], now(), 1);
    b.reload().unwrap();
    assert!(meet(&b.current(), &a, "b").await.0.is_ok());

    for (text, wanted) in [
        ("no list", "no revocation list in PEM"),
        ("", "no revocation list"),
    ] {
        fs::write(dir.path().join("crl.pem"), text).unwrap();
        let error = b.reload().unwrap_err().to_string();
        assert!(
            error.contains("crl.pem") && error.contains(wanted),
            "{error}"
        );
    }
    assert!(
        meet(&b.current(), &a, "b").await.0.is_ok(),
        "the list before is still in use"
    );
}

#[tokio::test]
async fn a_peer_without_the_hybrid_exchange_is_met_with_x25519() {
    let dir = authority();
    let b = credentials(dir.path(), "node-b");
    let ca = rustls::pki_types::CertificateDer::from_pem_file(dir.path().join("ca.pem")).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca).unwrap();
    let provider = rustls::crypto::CryptoProvider {
        kx_groups: vec![rustls::crypto::aws_lc_rs::kx_group::X25519],
        ..rustls::crypto::aws_lc_rs::default_provider()
    };
    let path = |name: &str| dir.path().join(name);
    let own = rustls::pki_types::CertificateDer::from_pem_file(path("node-a.pem")).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::from_pem_file(path("node-a.key")).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![own], key)
        .unwrap();
    let (listener, address) = listener().await;
    let serving = async {
        let (tcp, _) = listener.accept().await.unwrap();
        accept(tcp, b.server_config(&[]), PATIENCE).await
    };
    let dialling = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = "localhost".try_into().unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        connector.connect(name, tcp).await
    };
    let (server, client) = tokio::join!(serving, dialling);
    let _open = client.unwrap();
    let (stream, peer) = server.unwrap();
    let group = stream.get_ref().1.negotiated_key_exchange_group();
    assert_eq!(group.map(|group| group.name()), Some(NamedGroup::X25519));
    assert_eq!(peer, Identity::Node(node("a")));
}
