//! The example of a driver of one's own: it keeps the contract, and a node runs with it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[allow(
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    reason = "an example"
)]
#[path = "../examples/custom_driver.rs"]
mod custom_driver;

use std::{
    collections::BTreeMap,
    fs, io,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use qkd_bridge::{
    config::Config,
    env::SystemClock,
    node::{Node, ask},
};
use qkd_drivers::{
    Event, KeySource, Openers, ReadError, Settlement,
    conformance::{Bench, Offered, check},
};
use qkd_keyfile::{Clock, NodeId, QkdKeyId};
use qkd_net::pki;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    sync::Notify,
    time::sleep,
};

/// A module: keeps its blocks and serves them on a socket.
struct Module {
    folder: tempfile::TempDir,
    kept: Arc<Mutex<BTreeMap<u64, Vec<u8>>>>,
    hang_up: Arc<Notify>,
    next: u64,
}

impl Module {
    fn start() -> Self {
        let module = Self {
            folder: tempfile::tempdir().unwrap(),
            kept: Arc::default(),
            hang_up: Arc::default(),
            next: 1,
        };
        let listener = UnixListener::bind(module.socket()).unwrap();
        let (kept, hang_up) = (module.kept.clone(), module.hang_up.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (mut read, mut write) = stream.split();
                tokio::select! {
                    _ = send_blocks(&mut write, &kept) => {}
                    _ = take_answers(&mut read, &kept) => {}
                    () = hang_up.notified() => {}
                }
            }
        });
        module
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("module.sock")
    }

    fn kept_blocks(&self) -> usize {
        self.kept.lock().unwrap().len()
    }
}

async fn send_blocks(
    stream: &mut (impl AsyncWriteExt + Unpin),
    kept: &Mutex<BTreeMap<u64, Vec<u8>>>,
) -> io::Result<()> {
    let mut sent = 0;
    loop {
        let next = {
            let kept = kept.lock().unwrap();
            let mut later = kept.range(sent + 1..);
            later.next().map(|(&number, key)| (number, key.clone()))
        };
        let Some((number, key)) = next else {
            sleep(Duration::from_millis(5)).await;
            continue;
        };
        stream
            .write_u32_le(u32::try_from(key.len()).unwrap())
            .await?;
        stream.write_u64_le(number).await?;
        stream.write_all(&key).await?;
        sent = number;
    }
}

async fn take_answers(
    stream: &mut (impl AsyncReadExt + Unpin),
    kept: &Mutex<BTreeMap<u64, Vec<u8>>>,
) -> io::Result<()> {
    loop {
        let number = stream.read_u64_le().await?;
        kept.lock().unwrap().remove(&number);
    }
}

/// The key of a block, the same at both modules of a pair.
fn key_of(number: u64, len_bytes: usize) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[4]
    };
    std::iter::repeat_with(byte).take(len_bytes).collect()
}

impl Bench for Module {
    fn open(&mut self) -> Box<dyn KeySource> {
        Box::new(custom_driver::RecordSource::open(&self.socket()))
    }

    fn offer(&mut self, blocks: u32) -> Vec<Offered> {
        let numbers = self.next..self.next + u64::from(blocks);
        self.next = numbers.end;
        let offered = numbers.map(|number| {
            let key = key_of(number, 16 + usize::try_from(number % 100).unwrap());
            self.kept.lock().unwrap().insert(number, key.clone());
            Offered {
                id: number.to_string().parse().unwrap(),
                key_bits: u32::try_from(8 * key.len()).unwrap(),
                key,
            }
        });
        offered.collect()
    }

    fn replug(&mut self) -> bool {
        self.hang_up.notify_one();
        true
    }
}

#[tokio::test]
async fn the_example_driver_keeps_the_contract() {
    check(&mut Module::start()).await.unwrap();
}

/// A driver that ends after some blocks, as one may whose transport cannot be mended from inside.
struct Mortal {
    inner: Box<dyn KeySource>,
    blocks_left: u32,
}

impl KeySource for Mortal {
    fn max_block_bytes(&self) -> usize {
        self.inner.max_block_bytes()
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<Result<Event, ReadError>> {
        if self.blocks_left == 0 {
            return Poll::Ready(Err(ReadError::Gone(io::ErrorKind::BrokenPipe.into())));
        }
        let polled = self.inner.poll(cx, out);
        if matches!(polled, Poll::Ready(Ok(Event::Key(_)))) {
            self.blocks_left -= 1;
        }
        polled
    }

    fn grant(&mut self, blocks: u32) {
        self.inner.grant(blocks);
    }

    fn settle(&mut self, id: &QkdKeyId, outcome: Settlement) {
        self.inner.settle(id, outcome);
    }
}

/// A node with one link, fed by the example's driver.
fn configured(
    dir: &Path,
    node: &str,
    peer: &str,
    [kx, peer_kx]: [u16; 2],
    socket: &Path,
) -> Config {
    let text = format!(
        r#"
[node]
id = "{node}"
data = "{node}"
key_memory_mib = 8
allow_unlocked_memory = true
[tls]
ca = "pki/ca.pem"
certificate = "pki/node-{node}.pem"
key = "pki/node-{node}.key"
[store]
kind = "memory"
[kx]
listen = "127.0.0.1:{kx}"
[[peer]]
id = "{peer}"
address = "127.0.0.1:{peer_kx}"
[[link]]
peer = "{peer}"
[[link.module_pair]]
name = "mp1"
driver = {{ kind = "custom", driver = "records", socket = "{}" }}
"#,
        socket.display()
    );
    let path = dir.join(format!("{node}.toml"));
    fs::write(&path, text).unwrap();
    Config::read(&path).unwrap()
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

async fn status(dir: &Path, node: &str) -> Value {
    let socket = dir.join(node).join("status.sock");
    let text = tokio::task::spawn_blocking(move || ask(&socket))
        .await
        .unwrap();
    serde_json::from_str(&text.unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_agree_on_the_keys_of_a_driver_that_ends_and_is_started_again() {
    const BLOCKS: u32 = 60;
    const BLOCK_BYTES: usize = 1000;
    let dir = tempfile::tempdir().unwrap();
    let ids: Vec<NodeId> = ["alice", "bob"].map(|id| id.parse().unwrap()).to_vec();
    let request = pki::Request {
        nodes: &ids,
        apps: &[],
        extra_hosts: &[],
        now: SystemClock::start().now().unix,
        valid_days: 1,
    };
    pki::init(&dir.path().join("pki"), &request).unwrap();
    let modules = [Module::start(), Module::start()];
    for number in 1..=u64::from(BLOCKS) {
        let key = key_of(number, BLOCK_BYTES);
        for module in &modules {
            module.kept.lock().unwrap().insert(number, key.clone());
        }
    }

    let [a, b] = [free_port(), free_port()];
    let alice = configured(dir.path(), "alice", "bob", [a, b], &modules[0].socket());
    let bob = configured(dir.path(), "bob", "alice", [b, a], &modules[1].socket());
    // Alice's driver ends after 20 blocks, and once more after 20 others.
    let opened = Arc::new(AtomicU32::new(0));
    let mortal = custom_driver::openers();
    let counted = opened.clone();
    let mortal = Openers::new().with("records", move |entry| {
        let immortal = counted.fetch_add(1, Ordering::Relaxed) >= 2;
        let entry = qkd_drivers::DriverConfig::Custom(entry.clone());
        Ok(Box::new(Mortal {
            inner: mortal.open(&entry)?,
            blocks_left: if immortal { u32::MAX } else { 20 },
        }))
    });
    let alice = Node::start_with(alice, mortal).await.unwrap();
    let bob = Node::start_with(bob, custom_driver::openers())
        .await
        .unwrap();

    let started = Instant::now();
    while modules.iter().any(|module| module.kept_blocks() > 0) {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "{:#}",
            status(dir.path(), "alice").await["modules"]
        );
        sleep(Duration::from_millis(20)).await;
    }
    let (at_alice, at_bob) = (
        status(dir.path(), "alice").await,
        status(dir.path(), "bob").await,
    );
    assert_eq!(at_alice["modules"]["mp1"]["restarts"], 2);
    assert_eq!(at_alice["modules"]["mp1"]["error"], Value::Null);
    assert_eq!(at_bob["modules"]["mp1"]["restarts"], 0);
    assert_eq!(at_bob["modules"]["mp1"]["blocks"], BLOCKS);
    for report in [&at_alice, &at_bob] {
        let stream = &report["streams"]["alice--bob"];
        // Whatever came twice after a restart was used once.
        let bits = u64::from(BLOCKS) * 8 * BLOCK_BYTES as u64;
        assert_eq!(stream["received_bits"], bits, "{stream:#}");
        assert_eq!(stream["imbalance_bits"], 0);
    }
    alice.stop().await.unwrap();
    bob.stop().await.unwrap();
}
