//! What a module says of itself decides whether its key is taken.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

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
use support::proxy::Random;
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

/// A node with these modules, and a peer that is not there.
fn configured(dir: &Path, modules: &[(&str, &str)]) -> Config {
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
    for (name, driver) in modules {
        text.push_str(&format!(
            "[[link.module_pair]]\nname = \"{name}\"\ndriver = {driver}\n"
        ));
    }
    let path = dir.join("alice.toml");
    fs::write(&path, text).unwrap();
    Config::read(&path).unwrap()
}

fn certificates(dir: &Path) {
    let ids: [NodeId; 1] = ["alice".parse().unwrap()];
    let request = pki::Request {
        nodes: &ids,
        apps: &[],
        extra_hosts: &[],
        now: SystemClock::start().now().unix,
        valid_days: 1,
    };
    pki::init(&dir.join("pki"), &request).unwrap();
}

/// What the node says of itself.
async fn report(dir: &Path) -> Value {
    let socket = dir.join("alice/status.sock");
    let text = tokio::task::spawn_blocking(move || ask(&socket).unwrap());
    serde_json::from_str(&text.await.unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_says_it_runs_at_a_qber_of_12_percent_delivers_no_key() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let bad = Device::start(dir.path(), "bad", 120_000);
    let good = Device::start(dir.path(), "good", 20_000);
    let serial =
        |name: &str| format!("{{ kind = \"serial\", path = \"{name}\", rts_cts = false }}");
    let [bad_port, good_port] = ["bad", "good"].map(serial);
    let modules = [("bad", &*bad_port), ("good", &*good_port)];
    let node = Node::start(configured(dir.path(), &modules)).await.unwrap();

    let started = Instant::now();
    let (at_bad, at_good) = loop {
        assert!(started.elapsed() < PATIENCE, "no blocks");
        sleep(Duration::from_millis(20)).await;
        let report = report(dir.path()).await;
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

/// A raw file of a vendor's, with so many ones in a thousand bits.
fn raw_file(ones_per_mille: u64) -> Vec<u8> {
    let mut random = Random(ones_per_mille);
    let mut byte = || {
        let bits = (0..8).map(|_| u8::from(random.next() % 1000 < ones_per_mille));
        bits.fold(0, |byte, bit| byte << 1 | bit)
    };
    (0..RAW_BYTES).map(|_| byte()).collect()
}

/// As key managers of one kind write them.
const RAW_BYTES: usize = 204_800;

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_file_with_44_percent_of_ones_goes_to_quarantine_and_a_good_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let folder = dir.path().join("raw");
    fs::create_dir(&folder).unwrap();
    let [bad, good] = ["261201_0000_0000aaaa.cor", "261201_0002_0000bbbb.cor"];
    fs::write(folder.join(bad), raw_file(442)).unwrap();
    fs::write(folder.join(good), raw_file(500)).unwrap();
    let raw = r#"{ kind = "directory", path = "raw", format = "cor" }"#;
    let node = Node::start(configured(dir.path(), &[("raw", raw)]));
    let node = node.await.unwrap();
    let started = Instant::now();
    loop {
        assert!(started.elapsed() < PATIENCE, "it is not set aside");
        sleep(Duration::from_millis(20)).await;
        // Both have come to the node, and one of them has been found wanting.
        let report = report(dir.path()).await;
        if report["modules"]["raw"]["blocks"] == 2 && folder.join("quarantine").join(bad).exists() {
            break;
        }
    }
    assert!(!folder.join(bad).exists());
    assert!(
        folder.join(good).exists(),
        "not settled: the peer is not there"
    );
    node.stop().await.unwrap();
}
