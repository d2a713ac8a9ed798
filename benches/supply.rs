//! `supply`: keys for applications over ETSI GS QKD 014, from a node whose store is durable.
//!
//! Question: what does a request cost beyond HTTP and TLS? `floor` is a server of the same axum,
//! hyper and rustls that answers every request with the same container, made beforehand. `enc_keys`
//! cuts keys and binds them, durable before the answer; `dec_keys` fetches them at the other node,
//! where the bindings came over the link. Every key of every round is compared, outside the timing.
//!
//! Nodes, floor and client share the machine; the client does the same work for all three. Beside
//! criterion's output lies `latency.json`: percentiles of the time of a request.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

mod support;

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Router, extract::State, routing::post};
use bytes::Bytes;
use criterion::{Criterion, Throughput};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use qkd_bridge::demo::{Network, Plan};
use qkd_net::{Reloadable, tls};
use serde_json::{Value, json};
use subtle::ConstantTimeEq;
use support::{
    client::{Client, Connection},
    fixed_amounts, is_trial,
    latency::Latency,
    net::{BLOCK_BYTES, Net, Sizing, Store, link, of_link},
    noise,
    ring::Module,
};

/// One application, and as many as a small site has.
const CONNECTIONS: [usize; 2] = [1, 16];

/// One key, which is how latency is judged, and as many as one request may ask for.
const NUMBERS: [usize; 2] = [1, 128];

/// For a 256-bit cipher.
const KEY_BYTES: usize = 32;

/// Where the floor answers with so many keys.
const FLOOR: &str = "--floor";

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let [_, floor, ca, certificate, key] = &args[..]
        && floor == FLOOR
    {
        return serve_floor([ca, certificate, key].map(Path::new));
    }
    let mut criterion = Criterion::default().configure_from_args();
    supply(&mut criterion);
    criterion.final_summary();
}

fn supply(c: &mut Criterion) {
    let mut pair = Pair::start();
    let floor = Floor::start(&pair.net.network);
    let mut group = c.benchmark_group("supply");
    fixed_amounts(&mut group);
    for connections in CONNECTIONS {
        for number in NUMBERS {
            let load = Load::new(connections, number);
            group.throughput(Throughput::Elements(load.keys() as u64));
            for case in [Case::Floor, Case::EncKeys, Case::DecKeys] {
                let id = format!("{}_c{connections}_n{number}", case.name());
                let mut latency = Latency::new();
                group.bench_function(&id, |b| {
                    b.iter_custom(|rounds| {
                        let round = |_| pair.round(case, load, &floor, &mut latency);
                        (0..rounds).map(round).sum()
                    });
                });
                latency.write("supply", &id);
            }
        }
    }
    group.finish();
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    Floor,
    EncKeys,
    DecKeys,
}

impl Case {
    fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::EncKeys => "enc_keys",
            Self::DecKeys => "dec_keys",
        }
    }
}

/// What is asked for in one round.
#[derive(Debug, Clone, Copy)]
struct Load {
    connections: usize,
    /// Of each connection.
    requests: usize,
    /// Keys in each request.
    number: usize,
}

impl Load {
    /// Some tenths of a second for a node, and enough requests for a 99th percentile.
    fn new(connections: usize, number: usize) -> Self {
        let requests = match (is_trial(), connections, number) {
            (true, ..) => 4,
            (_, 1, 1) => 400,
            (_, 1, _) => 200,
            (_, _, 1) => 100,
            _ => 25,
        };
        Self {
            connections,
            requests,
            number,
        }
    }

    fn keys(self) -> usize {
        self.connections * self.requests * self.number
    }
}

/// Two nodes that share a link, an application at each.
struct Pair {
    net: Net,
    modules: [Module; 2],
    /// Blocks differ from one filling to the next, as key does.
    fillings: u64,
    app_a: Client,
    app_b: Client,
}

impl Pair {
    fn start() -> Self {
        let [alice, bob] = ["alice", "bob"].map(|id| id.parse().unwrap());
        let app = |id: &str, node| (id.parse().unwrap(), node);
        let plan = Plan {
            links: vec![link("alice", "bob")],
            stock: None,
            apps: vec![app("app-a", alice), app("app-b", bob)],
            nodes: ["alice", "bob"].map(|id| id.parse().unwrap()).into(),
            key_memory_mib: 0,
        };
        let sizing = Sizing {
            store: Store::Lmdb,
            key_memory_mib: 128,
            capacity_mib: 4096,
        };
        let net = Net::start(plan, sizing);
        let client = |id: &str| {
            let app = net.network.app(id).unwrap();
            let node = net.network.node(app.node.as_str()).unwrap();
            Client::new(node.https, &net.network.ca, &app.certificate, &app.key)
        };
        Self {
            app_a: client("app-a"),
            app_b: client("app-b"),
            modules: net.modules("alice", "bob"),
            fillings: 0,
            net,
        }
    }

    /// One round of `load`; returns the time of the part that is to be measured.
    fn round(&mut self, case: Case, load: Load, floor: &Floor, latency: &mut Latency) -> Duration {
        let body = Bytes::from(json!({"number": load.number, "size": KEY_BYTES * 8}).to_string());
        let same = vec![vec![body; load.requests]; load.connections];
        if case == Case::Floor {
            let path = format!("/api/v1/keys/{}/floor", load.number);
            let (time, _) = self.exchange(&floor.client, &path, same, latency);
            return time;
        }
        self.have_in_stock(load.keys());
        let mut unmeasured = Latency::new();
        let (enc_latency, dec_latency) = match case {
            Case::EncKeys => (latency, &mut unmeasured),
            _ => (&mut unmeasured, latency),
        };
        let path = "/api/v1/keys/app-b/enc_keys";
        let (enc_time, given) = self.exchange(&self.app_a, path, same, enc_latency);
        let given: Vec<_> = given.iter().map(|one| keys_of(one)).collect();
        let ids = given.iter().map(|one| one.iter().map(ids_body));
        let bodies = ids.map(Iterator::collect).collect();
        // Bindings follow at once; an application needs longer than that to tell the other.
        std::thread::sleep(Duration::from_millis(50));
        let path = "/api/v1/keys/app-a/dec_keys";
        let (dec_time, fetched) = self.exchange(&self.app_b, path, bodies, dec_latency);
        for (given, fetched) in given.iter().zip(&fetched) {
            compare(given, &keys_of(fetched), load);
        }
        match case {
            Case::EncKeys => enc_time,
            _ => dec_time,
        }
    }

    /// Sends the bodies of each connection one after another, those of all connections at a time.
    fn exchange(
        &self,
        client: &Client,
        path: &str,
        bodies: Vec<Vec<Bytes>>,
        latency: &mut Latency,
    ) -> (Duration, Vec<Vec<Bytes>>) {
        self.net.runtime.block_on(async {
            let mut open = Vec::new();
            for _ in 0..bodies.len() {
                open.push(client.connect().await);
            }
            let start = Instant::now();
            let tasks: Vec<_> = open
                .into_iter()
                .zip(bodies)
                .map(|(connection, bodies)| tokio::spawn(ask(connection, path.to_owned(), bodies)))
                .collect();
            let mut answers = Vec::new();
            for task in tasks {
                let (each, theirs) = task.await.unwrap();
                latency.add(&theirs);
                answers.push(each);
            }
            (start.elapsed(), answers)
        })
    }

    /// Sees to it that alice can give so many keys out.
    fn have_in_stock(&mut self, keys: usize) {
        let stock = |statuses: &[(String, Value)]| {
            let bytes = of_link(statuses, "alice", "alice", "bob", "encrypting_bytes");
            usize::try_from(bytes).unwrap()
        };
        let wanted = keys * KEY_BYTES + (1 << 20);
        if stock(&self.net.wait_until("status", |_| true)) >= wanted {
            return;
        }
        // Half of it goes to the other direction; the rest is for the rounds that follow.
        let fed = (if is_trial() { 8 << 20 } else { 64 << 20 }) / BLOCK_BYTES * BLOCK_BYTES;
        self.fillings += 1;
        let key = noise(fed, self.fillings);
        self.net.fill("alice", "bob", &mut self.modules, &key);
        self.have_in_stock(keys);
    }
}

async fn ask(
    mut connection: Connection,
    path: String,
    bodies: Vec<Bytes>,
) -> (Vec<Bytes>, Latency) {
    let mut latency = Latency::new();
    let mut answers = Vec::with_capacity(bodies.len());
    for body in bodies {
        let start = Instant::now();
        let (status, answer) = connection.post(&path, body).await;
        latency.record(start.elapsed());
        assert_eq!(status, 200, "{path}: {}", answer.escape_ascii());
        answers.push(answer);
    }
    (answers, latency)
}

/// Keys by ID, as each answer has them.
fn keys_of(answers: &[Bytes]) -> Vec<HashMap<String, String>> {
    let keys = |answer: &Bytes| {
        let value: Value = serde_json::from_slice(answer).unwrap();
        let text = |key: &Value, name: &str| key[name].as_str().unwrap().to_owned();
        let pair = |key: &Value| (text(key, "key_ID"), text(key, "key"));
        value["keys"].as_array().unwrap().iter().map(pair).collect()
    };
    answers.iter().map(keys).collect()
}

fn ids_body(keys: &HashMap<String, String>) -> Bytes {
    let ids: Vec<Value> = keys.keys().map(|id| json!({ "key_ID": id })).collect();
    json!({ "key_IDs": ids }).to_string().into()
}

fn compare(given: &[HashMap<String, String>], fetched: &[HashMap<String, String>], load: Load) {
    assert_eq!((given.len(), fetched.len()), (load.requests, load.requests));
    for (given, fetched) in given.iter().zip(fetched) {
        assert_eq!((given.len(), fetched.len()), (load.number, load.number));
        for (id, key) in given {
            let same = key.as_bytes().ct_eq(fetched[id].as_bytes());
            assert!(bool::from(same), "key {id} differs");
        }
    }
}

/// The floor in a process of its own, which ends with its standard input.
struct Floor {
    client: Client,
    child: Child,
}

impl Floor {
    fn start(network: &Network) -> Self {
        let node = network.dir.join("pki/node-alice");
        let app = network.app("app-a").unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg(FLOOR)
            .args([
                &network.ca,
                &node.with_extension("pem"),
                &node.with_extension("key"),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut address).unwrap();
        let address: SocketAddr = address.trim().parse().unwrap();
        Self {
            client: Client::new(address, &network.ca, &app.certificate, &app.key),
            child,
        }
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Answers with as many keys as the path says, as a node's listener would.
fn serve_floor([ca, certificate, key]: [&Path; 3]) {
    let answers: HashMap<usize, Bytes> = NUMBERS.map(|n| (n, container(n))).into();
    let router = Router::new()
        .route("/api/v1/keys/{number}/floor", post(answer))
        .with_state(Arc::new(answers));
    let credentials = Reloadable::load(ca, certificate, key).unwrap();
    // As many threads as a node has.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("{}", listener.local_addr().unwrap());
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let config = credentials.current().server_config(&[b"http/1.1"]);
            let router = router.clone();
            tokio::spawn(async move {
                let within = Duration::from_secs(10);
                let (stream, _) = tls::accept(tcp, config, within).await.unwrap();
                let service = TowerToHyperService::new(router);
                let _ = auto::Builder::new(TokioExecutor::new())
                    .http1_only()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
}

type Answers = State<Arc<HashMap<usize, Bytes>>>;

async fn answer(
    State(answers): Answers,
    axum::extract::Path(number): axum::extract::Path<usize>,
    _body: Bytes,
) -> ([(&'static str, &'static str); 1], Bytes) {
    let json = [("content-type", "application/json")];
    (json, answers[&number].clone())
}

/// A container of the length that a node's would have.
fn container(number: usize) -> Bytes {
    let key = json!({"key_ID": "0".repeat(36), "key": "A".repeat(44)});
    json!({ "keys": vec![key; number] }).to_string().into()
}
