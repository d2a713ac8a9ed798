//! Requests of ETSI GS QKD 014, put to the real listener (TLS, HTTP/1.1) in this process, for the
//! functions that read them are private to `qkd-ksa`.
//!
//! - Every request is answered: 200 with a container or a status, 400 and 503 with a message, 404.
//! - What reaches the supply is within the profile: number, size, destinations, IDs; nobody twice.
//! - A body that is no JSON object never reaches it; a refused request reaches it never.
//! - An answer has as many keys as were asked for, each of its size.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode, Uri, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use qkd_keyfile::{AppId, KeyBits, KsaKeyId, UnixTime};
use qkd_ksa::{
    Config, Counters, KeySupply, Profile, StockStatus, SuppliedKey, SupplyByIdRequest, SupplyError,
    SupplyRequest, serve,
};
use qkd_net::{Credentials, Reloadable, pki, tls};
use qkd_secmem::{Locking, Pool, PoolConfig};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    sync::watch,
};

use super::input::Input;

/// See the module.
pub fn run(input: &[u8]) {
    thread_local! {
        static SERVER: RefCell<Server> = RefCell::new(Server::start());
    }
    let mut input = Input::new(input);
    let (kind, sae, query) = (input.byte() % 6, input.short(), input.short());
    let body = input.take(60_000);
    let (method, resource) = match kind {
        0 => (Method::POST, "enc_keys"),
        1 => (Method::POST, "dec_keys"),
        2 => (Method::GET, "enc_keys"),
        3 => (Method::GET, "dec_keys"),
        4 => (Method::GET, "status"),
        _ => (Method::PUT, "enc_keys"),
    };
    let sae = if sae.is_empty() {
        "app-b".to_owned()
    } else {
        encoded(sae)
    };
    let query = if query.is_empty() {
        String::new()
    } else {
        format!("?{}", encoded(query))
    };
    let Ok(uri) = format!("/api/v1/keys/{sae}/{resource}{query}").parse::<Uri>() else {
        return;
    };
    SERVER.with_borrow_mut(|server| server.ask(&method, uri, body));
}

/// Percent-encodes what cannot stand in a URI; a percent sign stays, so that inputs can encode too.
fn encoded(bytes: &[u8]) -> String {
    let one = |&byte: &u8| match byte {
        b'a'..=b'z'
        | b'A'..=b'Z'
        | b'0'..=b'9'
        | b'%'
        | b'='
        | b'&'
        | b'-'
        | b'_'
        | b'.'
        | b'+' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    bytes.iter().map(one).collect()
}

const MAX_KEYS: u32 = 8;
const MIN_BITS: u32 = 64;
const MAX_BITS: u32 = 4096;
const MAX_ADDITIONAL: u32 = 2;
const LONG: Duration = Duration::from_secs(60);

/// Gives what is asked for, and checks that it may be.
struct Stock {
    pool: Pool,
    asked: AtomicU64,
}

impl Stock {
    fn key(&self, id: KsaKeyId, len_bytes: usize) -> SuppliedKey {
        let key = self.pool.copy_of(&vec![7; len_bytes]).unwrap();
        SuppliedKey { id, key }
    }
}

impl KeySupply for Stock {
    async fn status(&self, _: &AppId, _: &AppId) -> Result<StockStatus, SupplyError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(StockStatus {
            source: "node-a".parse().unwrap(),
            target: "node-b".parse().unwrap(),
            stored_keys: 1,
            max_keys: 2,
        })
    }

    async fn supply(&self, request: SupplyRequest) -> Result<Vec<SuppliedKey>, SupplyError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        assert!((1..=MAX_KEYS).contains(&request.number));
        assert!(
            (MIN_BITS..=MAX_BITS).contains(&request.size.get())
                && request.size.get().is_multiple_of(8)
        );
        let destinations: BTreeSet<_> = request.destinations.iter().collect();
        assert_eq!(destinations.len(), request.destinations.len());
        assert!((1..=1 + MAX_ADDITIONAL as usize).contains(&destinations.len()));
        let id = |n: u32| KsaKeyId::from_random([u8::try_from(n).unwrap(); 16]);
        let size = request.size.bytes();
        Ok((0..request.number).map(|n| self.key(id(n), size)).collect())
    }

    async fn supply_by_id(
        &self,
        request: SupplyByIdRequest,
    ) -> Result<Vec<SuppliedKey>, SupplyError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let ids: BTreeSet<_> = request.ids.iter().collect();
        assert!(
            ids.len() == request.ids.len() && !ids.is_empty() && ids.len() <= MAX_KEYS as usize
        );
        Ok(request.ids.into_iter().map(|id| self.key(id, 32)).collect())
    }
}

/// The listener and a connection to it, on one thread.
struct Server {
    runtime: Runtime,
    stock: Arc<Stock>,
    client: http1::SendRequest<Full<Bytes>>,
    connection: (std::net::SocketAddr, Credentials),
    _shutdown: watch::Sender<bool>,
    _pki: TempDir,
}

impl Server {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let since_1970 = SystemTime::UNIX_EPOCH.elapsed().unwrap();
        let request = pki::Request {
            nodes: &["node-a".parse().unwrap()],
            apps: &["app-a".parse().unwrap()],
            extra_hosts: &[],
            now: UnixTime(since_1970.as_nanos().try_into().unwrap()),
            valid_days: 30,
        };
        pki::init(dir.path(), &request).unwrap();
        let path = |name: &str| dir.path().join(name);
        let (ca, node) = (
            path("ca.pem"),
            (path("node-node-a.pem"), path("node-node-a.key")),
        );
        let credentials = Arc::new(Reloadable::load(&ca, &node.0, &node.1).unwrap());
        let pool = Pool::new(PoolConfig {
            capacity_bytes: 1 << 20,
            locking: Locking::Unlocked,
        });
        let stock = Arc::new(Stock {
            pool: pool.unwrap(),
            asked: AtomicU64::new(0),
        });
        let bits = |bits: u32| KeyBits::try_from(bits).unwrap();
        let profile = Profile::new(
            bits(256),
            bits(MIN_BITS),
            bits(MAX_BITS),
            MAX_KEYS,
            MAX_ADDITIONAL,
        );
        let (shutdown, seen) = watch::channel(false);
        let listener = runtime
            .block_on(TcpListener::bind(("127.0.0.1", 0)))
            .unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(serve(
            listener,
            credentials,
            Arc::clone(&stock),
            Config::new(profile.unwrap()),
            Arc::new(Counters::default()),
            seen,
        ));
        let app = Credentials::load(&ca, &path("app-app-a.pem"), &path("app-app-a.key")).unwrap();
        let client = runtime.block_on(connect(address, &app));
        Self {
            runtime,
            stock,
            client,
            connection: (address, app),
            _shutdown: shutdown,
            _pki: dir,
        }
    }

    fn ask(&mut self, method: &Method, uri: Uri, body: &[u8]) {
        let before = self.stock.asked.load(Ordering::Relaxed);
        let (status, reply) = self.runtime.block_on(async {
            if self.client.ready().await.is_err() {
                let (address, credentials) = &self.connection;
                self.client = connect(*address, credentials).await;
                self.client.ready().await.unwrap();
            }
            let request = Request::builder()
                .method(method)
                .uri(uri)
                .header(header::HOST, "localhost")
                .body(Full::new(Bytes::copy_from_slice(body)))
                .unwrap();
            let reply = self.client.send_request(request).await.expect("an answer");
            let status = reply.status();
            (
                status,
                reply.into_body().collect().await.unwrap().to_bytes(),
            )
        });
        let asked = self.stock.asked.load(Ordering::Relaxed) - before;
        let json: Value = serde_json::from_slice(&reply).expect("an answer is JSON");
        assert_eq!(
            asked,
            u64::from(status == StatusCode::OK),
            "{status} {json}"
        );
        match status {
            StatusCode::OK if *method == Method::POST => check_keys(body, &json),
            StatusCode::OK => {}
            StatusCode::BAD_REQUEST
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::NOT_FOUND
            | StatusCode::METHOD_NOT_ALLOWED => assert!(json["message"].is_string()),
            other => panic!("{other} {json}"),
        }
    }
}

async fn connect(
    address: std::net::SocketAddr,
    credentials: &Credentials,
) -> http1::SendRequest<Full<Bytes>> {
    let config = credentials.client_config(&"node-a".parse().unwrap(), &[b"http/1.1"]);
    let tcp = TcpStream::connect(address).await.unwrap();
    let stream = tls::connect(tcp, config, LONG).await.unwrap();
    let (client, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    client
}

/// By `serde_json`'s word, the request asked for as many keys as came.
fn check_keys(body: &[u8], reply: &Value) {
    let Ok(Value::Object(request)) = serde_json::from_slice(body) else {
        panic!("a body that is no object was answered");
    };
    let keys = reply["keys"].as_array().unwrap();
    let asked = match request.get("key_IDs") {
        Some(ids) => ids.as_array().unwrap().len() as u64,
        None => request
            .get("number")
            .map_or(1, |number| number.as_u64().unwrap()),
    };
    assert_eq!(keys.len() as u64, asked);
    if request.get("key_IDs").is_none() {
        let bits = request
            .get("size")
            .map_or(256, |size| size.as_u64().unwrap());
        let base64_chars = (bits / 8).div_ceil(3) * 4;
        assert!(
            keys.iter()
                .all(|key| key["key"].as_str().unwrap().len() as u64 == base64_chars)
        );
    }
}
