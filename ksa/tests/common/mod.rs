//! A listener with a stock of its own, and a client with a certificate.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode, client::conn, header, http::HeaderMap};
use hyper_util::rt::{TokioExecutor, TokioIo};
use qkd_keyfile::{AppId, KeyBits, KsaKeyId, UnixTime, metadata::SecurityLevel};
use qkd_ksa::{
    Config, Counters, KeySupply, Profile, StockStatus, SuppliedKey, SupplyByIdRequest, SupplyError,
    SupplyRequest, serve,
};
use qkd_net::{
    Credentials, Reloadable, pki,
    tls::{self, HandshakeError},
};
use qkd_secmem::{Locking, Pool, PoolConfig};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};
use tokio_rustls::client::TlsStream;

pub(crate) const LONG: Duration = Duration::from_secs(30);
/// Applications that have a certificate; `nobody` has one too, but no right.
const APPS: [&str; 4] = ["app-a", "app-b", "app/c", "nobody"];

pub(crate) fn app(text: &str) -> AppId {
    text.parse().unwrap()
}

/// A stock without end. Where a request goes decides what becomes of it.
pub(crate) struct Stock {
    pool: Pool,
    inner: Mutex<Inner>,
    /// Turns to `true` once an answer that goes to `late` is being waited for.
    late_is_asked: watch::Sender<bool>,
    /// Turns to `true` when it may come.
    late_may_come: watch::Sender<bool>,
}

#[derive(Default)]
struct Inner {
    drawn: u8,
    /// For each key: who may still fetch it, who asked first, its bytes.
    keys: HashMap<KsaKeyId, (Vec<AppId>, AppId, Vec<u8>)>,
    requests: Vec<SupplyRequest>,
}

impl Stock {
    fn new() -> Self {
        let pool = Pool::new(PoolConfig {
            capacity_bytes: 16 << 20,
            locking: Locking::Unlocked,
        })
        .unwrap();
        Self {
            pool,
            inner: Mutex::default(),
            late_is_asked: watch::channel(false).0,
            late_may_come: watch::channel(false).0,
        }
    }

    /// Waits until a request that goes to `late` is in progress.
    pub(crate) async fn late_is_asked(&self) {
        let mut asked = self.late_is_asked.subscribe();
        asked.wait_for(|asked| *asked).await.unwrap();
    }

    /// Lets requests that go to `late` have their answer.
    pub(crate) fn release_late(&self) {
        self.late_may_come.send_replace(true);
    }

    /// The requests for new keys so far.
    pub(crate) fn requests(&self) -> Vec<SupplyRequest> {
        self.inner.lock().unwrap().requests.clone()
    }

    /// How many keys wait for a second application.
    pub(crate) fn waiting(&self) -> usize {
        self.inner.lock().unwrap().keys.len()
    }

    /// What the name of the other application asks this stock to do.
    async fn fate(&self, caller: &AppId, other: &AppId) -> Result<(), SupplyError> {
        if caller.as_str() == "nobody" {
            let caller = caller.clone();
            return Err(SupplyError::Unauthorised { caller });
        }
        match other.as_str() {
            "mystery" => Err(SupplyError::UnknownDestination {
                destination: other.clone(),
            }),
            "starved" => Err(SupplyError::NotEnoughKey {
                asked_bits: 256,
                have_bits: 8,
            }),
            "far" => Err(SupplyError::Unreachable {
                node: "node-far".parse().unwrap(),
            }),
            "computational" => Err(SupplyError::LevelUnavailable {
                asked: SecurityLevel::Qkd,
            }),
            "never" => std::future::pending().await,
            "late" => {
                self.late_is_asked.send_replace(true);
                let mut may_come = self.late_may_come.subscribe();
                may_come.wait_for(|come| *come).await.unwrap();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn draw(&self, request: &SupplyRequest, len_bytes: usize) -> SuppliedKey {
        let mut inner = self.inner.lock().unwrap();
        inner.drawn += 1;
        let seed = inner.drawn;
        let id = KsaKeyId::from_random([seed; 16]);
        let bytes: Vec<u8> = (0..len_bytes)
            .map(|i| seed.wrapping_mul(31) ^ i.to_le_bytes()[0])
            .collect();
        let key = self.pool.copy_of(&bytes).unwrap();
        let entry = (request.destinations.clone(), request.caller.clone(), bytes);
        inner.keys.insert(id, entry);
        SuppliedKey { id, key }
    }
}

impl KeySupply for Stock {
    async fn status(&self, caller: &AppId, peer: &AppId) -> Result<StockStatus, SupplyError> {
        self.fate(caller, peer).await?;
        Ok(StockStatus {
            source: "node-a".parse().unwrap(),
            target: "node-b".parse().unwrap(),
            stored_keys: 25_000,
            max_keys: 100_000,
        })
    }

    async fn supply(&self, request: SupplyRequest) -> Result<Vec<SuppliedKey>, SupplyError> {
        let slave = request.destinations[0].clone();
        self.fate(&request.caller, &slave).await?;
        let (mut number, mut len_bytes) = (request.number, request.size.bytes());
        match slave.as_str() {
            "one-less" => number -= 1,
            "one-byte-less" => len_bytes -= 1,
            _ => {}
        }
        self.inner.lock().unwrap().requests.push(request.clone());
        Ok((0..number)
            .map(|_| self.draw(&request, len_bytes))
            .collect())
    }

    async fn supply_by_id(
        &self,
        request: SupplyByIdRequest,
    ) -> Result<Vec<SuppliedKey>, SupplyError> {
        self.fate(&request.caller, &request.master).await?;
        let mut inner = self.inner.lock().unwrap();
        let here = |id: &KsaKeyId| {
            let entry = inner.keys.get(id);
            entry.is_some_and(|(_, master, _)| *master == request.master)
        };
        let missing = request.ids.iter().filter(|id| !here(id)).count();
        if missing > 0 {
            return Err(SupplyError::UnknownKeys { missing });
        }
        let caller = &request.caller;
        if request
            .ids
            .iter()
            .any(|id| !inner.keys[id].0.contains(caller))
        {
            let caller = caller.clone();
            return Err(SupplyError::Unauthorised { caller });
        }
        let mut keys = Vec::new();
        for id in request.ids {
            let (left, _, bytes) = inner.keys.get_mut(&id).unwrap();
            left.retain(|app| app != caller);
            let key = self.pool.copy_of(bytes).unwrap();
            if left.is_empty() {
                inner.keys.remove(&id);
            }
            keys.push(SuppliedKey { id, key });
        }
        Ok(keys)
    }
}

/// 64 to 4096 bits, 256 by default; 8 keys at once; two additional applications.
pub(crate) fn config() -> Config {
    let bits = |bits: u32| KeyBits::try_from(bits).unwrap();
    Config::new(Profile::new(bits(256), bits(64), bits(4096), 8, 2).unwrap())
}

/// A listener on a port of its own.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) stock: Arc<Stock>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) shutdown: watch::Sender<bool>,
    pub(crate) serving: JoinHandle<()>,
    pub(crate) credentials: Arc<Reloadable>,
    pki: TempDir,
}

impl Server {
    pub(crate) async fn start(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let since_1970 = SystemTime::UNIX_EPOCH.elapsed().unwrap();
        let request = pki::Request {
            nodes: &["node-a".parse().unwrap(), "node-b".parse().unwrap()],
            apps: &APPS.map(app),
            extra_hosts: &[],
            now: UnixTime(since_1970.as_nanos().try_into().unwrap()),
            valid_days: 1,
        };
        pki::init(dir.path(), &request).unwrap();
        let path = |name: &str| dir.path().join(name);
        let nobody = pki::Request {
            nodes: &[],
            apps: &[],
            ..request
        };
        let credentials = Arc::new(
            Reloadable::load_with_crl(
                &path("ca.pem"),
                &path("node-node-a.pem"),
                &path("node-node-a.key"),
                Some(&pki::revoke(dir.path(), &nobody).unwrap()),
            )
            .unwrap(),
        );
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stock, counters) = (Arc::new(Stock::new()), Arc::new(Counters::default()));
        let (shutdown, seen) = watch::channel(false);
        let serving = tokio::spawn(serve(
            listener,
            Arc::clone(&credentials),
            Arc::clone(&stock),
            config,
            Arc::clone(&counters),
            seen,
        ));
        Self {
            address,
            stock,
            counters,
            shutdown,
            serving,
            credentials,
            pki: dir,
        }
    }

    /// Takes an application's certificate back, and lets the listener hear of it.
    pub(crate) fn revoke(&self, name: &str) {
        let since_1970 = SystemTime::UNIX_EPOCH.elapsed().unwrap();
        let request = pki::Request {
            nodes: &[],
            apps: &[app(name)],
            extra_hosts: &[],
            now: UnixTime(since_1970.as_nanos().try_into().unwrap()),
            valid_days: 1,
        };
        pki::revoke(self.pki.path(), &request).unwrap();
        self.credentials.reload().unwrap();
    }

    /// A file of the test's certificate authority.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.pki.path().join(name)
    }

    /// A TLS connection with the certificate in `<stem>.pem`.
    pub(crate) async fn tls(&self, stem: &str, alpn: &[&[u8]]) -> TlsStream<TcpStream> {
        self.try_tls(stem, alpn).await.unwrap()
    }

    pub(crate) async fn try_tls(
        &self,
        stem: &str,
        alpn: &[&[u8]],
    ) -> Result<TlsStream<TcpStream>, HandshakeError> {
        let credentials = Credentials::load(
            &self.file("ca.pem"),
            &self.file(&format!("{stem}.pem")),
            &self.file(&format!("{stem}.key")),
        )
        .unwrap();
        let config = credentials.client_config(&"node-a".parse().unwrap(), alpn);
        let tcp = TcpStream::connect(self.address).await.unwrap();
        tls::connect(tcp, config, LONG).await
    }

    /// An HTTP/1.1 connection of an application.
    pub(crate) async fn client(&self, app: &str) -> Client {
        let stem = format!("app-{}", pki::file_name(app));
        Client::http1(self.tls(&stem, &[b"http/1.1"]).await).await
    }

    /// An HTTP/2 connection of an application.
    pub(crate) async fn client2(&self, app: &str) -> Client {
        let stream = self.tls(&format!("app-{app}"), &[b"h2"]).await;
        let io = TokioIo::new(stream);
        let (sender, connection) = conn::http2::handshake(TokioExecutor::new(), io)
            .await
            .unwrap();
        tokio::spawn(connection);
        Client::Http2(sender)
    }
}

pub(crate) enum Client {
    Http1(conn::http1::SendRequest<Full<Bytes>>),
    Http2(conn::http2::SendRequest<Full<Bytes>>),
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.headers[header::CONTENT_TYPE], "application/json");
        assert_eq!(self.headers[header::CACHE_CONTROL], "no-store");
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Status and message of a refusal.
    pub(crate) fn refusal(&self) -> (u16, String) {
        let message = self.json()["message"].as_str().unwrap().to_owned();
        (self.status.as_u16(), message)
    }

    /// IDs and keys of a container.
    pub(crate) fn keys(&self) -> Vec<(String, String)> {
        assert_eq!(self.status, StatusCode::OK, "{self:?}");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let container = self.json();
        let keys = container["keys"].as_array().unwrap();
        keys.iter()
            .map(|key| (text(&key["key_ID"]), text(&key["key"])))
            .collect()
    }
}

impl Client {
    pub(crate) async fn http1(stream: TlsStream<TcpStream>) -> Self {
        let handshake = conn::http1::handshake(TokioIo::new(stream));
        let (sender, connection) = handshake.await.unwrap();
        tokio::spawn(connection);
        Self::Http1(sender)
    }

    pub(crate) async fn send(&mut self, method: Method, path: &str, body: &str) -> Reply {
        self.try_send(method, path, body).await.unwrap()
    }

    pub(crate) async fn try_send(
        &mut self,
        method: Method,
        path: &str,
        body: &str,
    ) -> hyper::Result<Reply> {
        let uri = match self {
            Self::Http1(_) => path.to_owned(),
            Self::Http2(_) => format!("https://localhost{path}"),
        };
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header(header::HOST, "localhost")
            .body(Full::new(Bytes::from(body.to_owned())))
            .unwrap();
        let response = match self {
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await?
            }
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await?
            }
        };
        let (parts, body) = response.into_parts();
        Ok(Reply {
            status: parts.status,
            headers: parts.headers,
            body: body.collect().await?.to_bytes(),
        })
    }

    pub(crate) async fn get(&mut self, path: &str) -> Reply {
        self.send(Method::GET, &format!("/api/v1/keys/{path}"), "")
            .await
    }

    pub(crate) async fn post(&mut self, path: &str, body: &str) -> Reply {
        self.send(Method::POST, &format!("/api/v1/keys/{path}"), body)
            .await
    }
}
