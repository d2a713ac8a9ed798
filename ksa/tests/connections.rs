//! Connections: who may have one, for how long, and how they end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use common::{Client, LONG, Server, config};
use hyper::StatusCode;
use qkd_ksa::Counts;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

const SOON: Duration = Duration::from_millis(300);

/// Waits until the counts are as wanted.
async fn until(server: &Server, wanted: impl Fn(&Counts) -> bool) {
    let start = Instant::now();
    while !wanted(&server.counters.read()) {
        assert!(start.elapsed() < LONG, "{:?}", server.counters.read());
        sleep(Duration::from_millis(5)).await;
    }
}

/// What comes until the server closes the connection.
async fn rest(stream: &mut (impl AsyncReadExt + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset is a close, too.
    let _ = timeout(LONG, stream.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

#[tokio::test]
async fn one_connection_serves_many_requests() {
    let server = Server::start(config()).await;
    let mut a = server.client("app-a").await;
    for _ in 0..20 {
        assert_eq!(a.get("app-b/enc_keys").await.keys().len(), 1);
        assert_eq!(
            a.get("app-b/enc_keys?size=1").await.status,
            StatusCode::BAD_REQUEST
        );
    }
    let counts = server.counters.read();
    assert_eq!(
        (counts.connections, counts.answered, counts.refused),
        (1, 20, 20)
    );
}

#[tokio::test]
async fn http2_is_served_where_it_is_allowed() {
    let server = Server::start(qkd_ksa::Config {
        http2: true,
        ..config()
    })
    .await;
    let (mut a, mut b) = (server.client2("app-a").await, server.client2("app-b").await);
    let keys = a.get("app-b/enc_keys?number=8&size=4096").await.keys();
    assert_eq!(keys.len(), 8);
    let path = format!("app-a/dec_keys?key_ID={}", keys[7].0);
    assert_eq!(b.get(&path).await.keys(), keys[7..]);
    assert_eq!(b.get(&path).await.status, StatusCode::BAD_REQUEST);
    let mut old = server.client("app-a").await;
    assert_eq!(old.get("app-b/status").await.status, StatusCode::OK);
}

#[tokio::test]
async fn http2_is_not_offered_by_default() {
    let server = Server::start(config()).await;
    let stream = server.tls("app-app-a", &[b"h2", b"http/1.1"]).await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
}

#[tokio::test]
async fn a_node_is_no_application() {
    let server = Server::start(config()).await;
    let mut node = server.tls("node-node-b", &[b"http/1.1"]).await;
    // The server may have closed already.
    let _ = node
        .write_all(b"GET /api/v1/keys/app-b/enc_keys HTTP/1.1\r\nHost: x\r\n\r\n")
        .await;
    assert!(rest(&mut node).await.is_empty());
    until(&server, |counts| counts.handshakes_failed == 1).await;
    assert!(server.stock.requests().is_empty());
}

#[tokio::test]
async fn a_client_without_certificate_or_of_another_authority_gets_nothing() {
    let server = Server::start(config()).await;
    let stranger = Server::start(config()).await;
    let file = |name: &str| stranger.file(name);
    let chain = CertificateDer::pem_file_iter(file("app-app-a.pem")).unwrap();
    let chain = chain.collect::<Result<_, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(file("app-app-a.key")).unwrap();
    let mut roots = RootCertStore::empty();
    let authority = CertificateDer::from_pem_file(server.file("ca.pem")).unwrap();
    roots.add(authority).unwrap();
    let client = || ClientConfig::builder().with_root_certificates(roots.clone());
    let without = client().with_no_client_auth();
    let foreign = client().with_client_auth_cert(chain, key).unwrap();

    for (refused, config) in (1..).zip([without, foreign]) {
        let tcp = TcpStream::connect(server.address).await.unwrap();
        let name = "localhost".try_into().unwrap();
        // In TLS 1.3 a client learns only after its handshake that it was refused.
        let mut stream = TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await
            .unwrap();
        let request = b"GET /api/v1/keys/app-b/enc_keys HTTP/1.1\r\nHost: x\r\n\r\n";
        let _ = stream.write_all(request).await;
        assert!(rest(&mut stream).await.is_empty());
        until(&server, |counts| counts.handshakes_failed == refused).await;
    }
    assert!(server.stock.requests().is_empty());
}

#[tokio::test]
async fn a_client_without_tls_gets_nothing() {
    let server = Server::start(config()).await;
    let mut plain = TcpStream::connect(server.address).await.unwrap();
    plain
        .write_all(b"GET /api/v1/keys/app-b/status HTTP/1.1\r\n\r\n")
        .await
        .unwrap();
    let answer = rest(&mut plain).await;
    assert!(!answer.starts_with(b"HTTP"), "a TLS alert at most");
    until(&server, |counts| counts.handshakes_failed == 1).await;
}

#[tokio::test]
async fn a_handshake_that_does_not_come_ends_the_connection() {
    let mut config = config();
    config.limits.handshake_within = SOON;
    let server = Server::start(config).await;
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    assert!(rest(&mut silent).await.is_empty());
    until(&server, |counts| counts.handshakes_failed == 1).await;
}

#[tokio::test]
async fn a_head_that_trickles_in_ends_the_connection() {
    let mut config = config();
    config.limits.head_within = SOON;
    let server = Server::start(config).await;
    let start = Instant::now();
    let (mut reader, mut writer) = tokio::io::split(server.tls("app-app-a", &[b"http/1.1"]).await);
    let trickle = tokio::spawn(async move {
        let head = b"GET /api/v1/keys/app-b/enc_keys HTTP/1.1\r\nX-Slow: ";
        for byte in head.iter().chain(std::iter::repeat(&b'x')) {
            if writer.write_all(&[*byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
    });
    rest(&mut reader).await;
    assert!(start.elapsed() >= SOON);
    until(&server, |counts| counts.connections_failed == 1).await;
    assert!(server.stock.requests().is_empty());
    trickle.abort();
}

#[tokio::test]
async fn a_head_too_long_is_refused() {
    let server = Server::start(config()).await;
    let mut stream = server.tls("app-app-a", &[b"http/1.1"]).await;
    let head = format!("GET / HTTP/1.1\r\nX-Long: {}\r\n", "x".repeat(40_000));
    // The server may close before it has read all.
    let _ = stream.write_all(head.as_bytes()).await;
    let answer = rest(&mut stream).await;
    assert!(
        answer.starts_with(b"HTTP/1.1 431"),
        "{}",
        answer.escape_ascii()
    );
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let mut config = config();
    config.limits.head_within = SOON;
    let server = Server::start(config).await;
    let start = Instant::now();
    let mut stream = server.tls("app-app-a", &[b"http/1.1"]).await;
    rest(&mut stream).await;
    assert!(start.elapsed() >= SOON && start.elapsed() < LONG);
}

#[tokio::test]
async fn a_body_too_long_or_too_slow_is_400() {
    let mut config = config();
    config.limits.body_bytes = 1000;
    config.limits.body_within = SOON;
    let server = Server::start(config).await;
    let mut a = server.client("app-a").await;
    let long = format!("{{}}{}", " ".repeat(1000));
    let (status, message) = a.post("app-b/enc_keys", &long).await.refusal();
    assert_eq!(status, 400);
    assert!(message.ends_with("more than 1000 bytes"), "{message}");

    let mut stream = server.tls("app-app-a", &[b"http/1.1"]).await;
    let head =
        b"POST /api/v1/keys/app-b/enc_keys HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{";
    stream.write_all(head).await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(
        answer.starts_with(b"HTTP/1.1 400"),
        "{}",
        answer.escape_ascii()
    );
    assert!(server.stock.requests().is_empty());
}

#[tokio::test]
async fn a_client_that_does_not_read_its_keys_loses_them() {
    let mut config = config();
    config.limits.write_within = SOON;
    let bits = |bits: u32| bits.try_into().unwrap();
    // 14 MB of reply, more than the system's buffers take.
    let longest = bits(256 << 13);
    config.profile = qkd_ksa::Profile::new(longest, bits(64), longest, 40, 0).unwrap();
    let server = Server::start(config).await;
    let mut stream = server.tls("app-app-a", &[b"http/1.1"]).await;
    let head = b"GET /api/v1/keys/app-b/enc_keys?number=40 HTTP/1.1\r\nHost: x\r\n\r\n";
    stream.write_all(head).await.unwrap();
    until(&server, |counts| counts.connections_failed == 1).await;
    assert_eq!(server.counters.read().keys, 40, "they count as supplied");
}

#[tokio::test]
async fn a_supply_that_does_not_answer_in_time_is_503() {
    let mut config = config();
    config.limits.answer_within = SOON;
    let server = Server::start(config).await;
    let reply = server.client("app-a").await.get("never/enc_keys").await;
    assert_eq!(reply.refusal().0, 503);
}

#[tokio::test]
async fn connections_over_the_limits_are_refused_and_counted() {
    let mut config = config();
    config.limits.connections = 3;
    config.limits.connections_per_application = 2;
    let server = Server::start(config).await;
    let mut open: Vec<Client> = Vec::new();
    for _ in 0..2 {
        open.push(server.client("app-a").await);
        assert_eq!(
            open.last_mut().unwrap().get("app-b/status").await.status,
            StatusCode::OK
        );
    }
    // One more of the same application ends after its handshake.
    let mut third = server.tls("app-app-a", &[b"http/1.1"]).await;
    assert!(rest(&mut third).await.is_empty());
    until(&server, |counts| counts.connections_over_limit == 1).await;

    let mut other = server.client("app-b").await;
    assert_eq!(other.get("app-a/status").await.status, StatusCode::OK);
    let mut fourth = TcpStream::connect(server.address).await.unwrap();
    assert!(rest(&mut fourth).await.is_empty());
    assert_eq!(server.counters.read().connections_over_limit, 2);

    drop(open);
    let start = Instant::now();
    while !is_served(&server).await {
        assert!(start.elapsed() < LONG, "a closed connection makes room");
    }
}

/// Whether one more connection of `app-a` gets an answer.
async fn is_served(server: &Server) -> bool {
    let Ok(stream) = server.try_tls("app-app-a", &[b"http/1.1"]).await else {
        return false;
    };
    let mut client = Client::http1(stream).await;
    let path = "/api/v1/keys/app-b/status";
    client.try_send(hyper::Method::GET, path, "").await.is_ok()
}

#[tokio::test]
async fn shutdown_finishes_what_is_in_progress_and_takes_nothing_new() {
    let server = Server::start(config()).await;
    let (mut busy, mut idle) = (server.client("app-a").await, server.client("app-b").await);
    assert_eq!(idle.get("app-a/status").await.status, StatusCode::OK);
    let late = tokio::spawn(async move { busy.get("late/enc_keys").await });
    server.stock.late_is_asked().await;
    server.shutdown.send(true).unwrap();
    // All that can be closed is closed before the answer comes.
    sleep(SOON).await;
    server.stock.release_late();
    assert_eq!(late.await.unwrap().keys().len(), 1);
    timeout(LONG, server.serving).await.unwrap().unwrap();
    let path = "/api/v1/keys/app-a/status";
    assert!(idle.try_send(hyper::Method::GET, path, "").await.is_err());
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test]
async fn shutdown_does_not_wait_for_ever() {
    let mut config = config();
    config.limits.drain_within = SOON;
    let server = Server::start(config).await;
    let mut stuck = server.client("app-a").await;
    let stuck = tokio::spawn(async move {
        let path = "/api/v1/keys/never/enc_keys";
        stuck.try_send(hyper::Method::GET, path, "").await.is_err()
    });
    sleep(Duration::from_millis(100)).await;
    server.shutdown.send(true).unwrap();
    timeout(LONG, server.serving).await.unwrap().unwrap();
    assert!(stuck.await.unwrap(), "the request came to nothing");
}

#[tokio::test]
async fn an_old_connection_is_ended_in_good_order() {
    let mut config = config();
    config.limits.connection_age = Duration::from_secs(2);
    let server = Server::start(config).await;
    let mut a = server.client("app-a").await;
    let late = tokio::spawn(async move {
        let keys = a.get("late/enc_keys").await.keys();
        let path = "/api/v1/keys/app-b/status";
        (
            keys.len(),
            a.try_send(hyper::Method::GET, path, "").await.is_err(),
        )
    });
    server.stock.late_is_asked().await;
    sleep(Duration::from_secs(2) + SOON).await;
    server.stock.release_late();
    assert_eq!(
        late.await.unwrap(),
        (1, true),
        "the answer came, then the end"
    );
    assert_eq!(server.counters.read().connections_failed, 0);
}

/// A client that many people try first. Checked only where it is installed; the other tests cover
/// the same ground.
#[tokio::test(flavor = "multi_thread")]
async fn curl_can_fetch_a_key() {
    if Command::new("curl").arg("--version").output().is_err() {
        eprintln!("curl is not installed: nothing to check");
        return;
    }
    let server = Server::start(config()).await;
    let url = format!(
        "https://localhost:{}/api/v1/keys/app-b/enc_keys",
        server.address.port()
    );
    let mut curl = Command::new("curl");
    curl.args([
        "--silent",
        "--show-error",
        "--max-time",
        "20",
        "--noproxy",
        "*",
        "--ipv4",
    ])
    .arg("--cacert")
    .arg(server.file("ca.pem"))
    .arg("--cert")
    .arg(server.file("app-app-a.pem"))
    .arg("--key")
    .arg(server.file("app-app-a.key"))
    .args(["--json", r#"{"number":2,"size":128}"#, &url]);
    let done = tokio::task::spawn_blocking(move || curl.output())
        .await
        .unwrap()
        .unwrap();
    let error = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{error}");
    let container: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(container["keys"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_revoked_application_loses_its_open_connection_and_gets_no_other() {
    let server = Server::start(config()).await;
    let (mut a, mut b) = (server.client("app-a").await, server.client("app-b").await);
    assert_eq!(a.get("app-b/enc_keys").await.keys().len(), 1);
    let mut idle = server.tls("app-app-a", &[b"http/1.1"]).await;
    server.revoke("app-a");
    assert!(rest(&mut idle).await.is_empty());
    until(&server, |counts| counts.connections_failed == 2).await;
    let mut again = server.tls("app-app-a", &[b"http/1.1"]).await;
    let _ = again.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(rest(&mut again).await.is_empty());
    assert_eq!(b.get("app-a/enc_keys").await.keys().len(), 1);
}
