//! What a module says of itself decides whether its key is taken.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    net::TcpListener,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use qkd_bridge::{
    config::Config,
    env::SystemClock,
    node::{Node, ask},
};
use qkd_keyfile::{Clock, NodeId};
use qkd_net::pki;
use qkd_sim_device::{SimConfig, Stats};
use serde_json::Value;
use tokio::time::sleep;

const PATIENCE: Duration = Duration::from_secs(30);

/// A simulated device on a pseudo-terminal of its own, until it is dropped.
struct Device {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Device {
    fn start(dir: &Path, name: &str, qber_ppm: u32) -> Self {
        let text = format!(
            r#"
role = "transmitter"
[pair]
seed = "{}"
block_bits = 8192
pace = 50.0
qber_ppm = {qber_ppm}
first_number = 1
[transport]
kind = "serial"
path = "{}"
make_pty = true
device = "{name}"
"#,
            "ab".repeat(32),
            dir.join(name).display(),
        );
        let config: SimConfig = toml::from_str(&text).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            qkd_sim_device::run(&config, &stopped, &Stats::default()).unwrap();
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// A node with two modules on serial lines, and a peer that is not there.
fn configured(dir: &Path) -> Config {
    let mut text = format!(
        r#"
[node]
id = "alice"
data = "alice"
key_memory_mib = 8
allow_unlocked_memory = true
[tls]
ca = "pki/ca.pem"
certificate = "pki/node-alice.pem"
key = "pki/node-alice.key"
[store]
kind = "memory"
[kx]
listen = "127.0.0.1:{}"
[[peer]]
id = "bob"
address = "127.0.0.1:{}"
[[link]]
peer = "bob"
"#,
        free_port(),
        free_port()
    );
    for name in ["bad", "good"] {
        text.push_str(&format!(
            "[[link.module_pair]]\nname = \"{name}\"\ndriver = {{ kind = \"serial\", path = \"{name}\", rts_cts = false }}\n"
        ));
    }
    let path = dir.join("alice.toml");
    fs::write(&path, text).unwrap();
    Config::read(&path).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_says_it_runs_at_a_qber_of_12_percent_delivers_no_key() {
    let dir = tempfile::tempdir().unwrap();
    let ids: [NodeId; 1] = ["alice".parse().unwrap()];
    let request = pki::Request {
        nodes: &ids,
        apps: &[],
        extra_hosts: &[],
        now: SystemClock::start().now().unix,
        valid_days: 1,
    };
    pki::init(&dir.path().join("pki"), &request).unwrap();
    let bad = Device::start(dir.path(), "bad", 120_000);
    let good = Device::start(dir.path(), "good", 20_000);
    let node = Node::start(configured(dir.path())).await.unwrap();

    let started = Instant::now();
    let (at_bad, at_good) = loop {
        assert!(started.elapsed() < PATIENCE, "no blocks");
        sleep(Duration::from_millis(20)).await;
        let socket = dir.path().join("alice/status.sock");
        let text = tokio::task::spawn_blocking(move || ask(&socket).unwrap());
        let report: Value = serde_json::from_str(&text.await.unwrap()).unwrap();
        let [bad, good] = ["bad", "good"].map(|name| report["modules"][name].clone());
        let number = |value: &Value| value.as_u64().unwrap();
        if number(&bad["refused_blocks"]) >= 5 && number(&good["blocks"]) >= 5 {
            break (bad, good);
        }
    };
    assert_eq!(at_bad["state"], "running");
    assert_eq!(
        (&at_bad["blocks"], &at_bad["key_bits"]),
        (&0.into(), &0.into())
    );
    assert_eq!(at_bad["refusing"], "qber_ppm");
    assert_eq!(at_bad["metrics"]["qber_ppm"]["band"], "absolute");
    assert_eq!(at_bad["metrics"]["temperature_mc"]["band"], "ok");
    assert_eq!(at_good["refused_blocks"], 0);
    assert_eq!(at_good["refusing"], Value::Null);
    assert_eq!(at_good["metrics"]["qber_ppm"]["value"], "20000");
    node.stop().await.unwrap();
    drop((bad, good));
}
