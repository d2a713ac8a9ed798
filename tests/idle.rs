//! A node with many slow links that has nothing to do: what it takes of the machine.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use support::{program, qkd_bridge};

/// Module pairs of the node; each has a folder that it watches.
const PAIRS: usize = 48;

/// Threads of a node, however many links it has: the runtime's two, the stage, the agent, the main
/// one, and what the runtime lends to the file system for a moment.
const MOST_THREADS: usize = 12;

/// How long is looked.
const LOOK: Duration = Duration::from_secs(3);

fn node_with_pairs(dir: &Path, pairs: usize) {
    let pki = dir.join("pki");
    let made = qkd_bridge([
        "pki",
        "init",
        "--node",
        "alice",
        "--node",
        "bob",
        "--dir",
        pki.to_str().unwrap(),
    ]);
    assert!(made.status.success());
    let mut config = String::from(
        "[node]\nid = \"alice\"\ndata = \"data\"\nkey_memory_mib = 16\nallow_unlocked_memory = true\n\
         [tls]\nca = \"pki/ca.pem\"\ncertificate = \"pki/node-alice.pem\"\nkey = \"pki/node-alice.key\"\n\
         [kx]\nlisten = \"127.0.0.1:0\"\n\
         [store]\nkind = \"memory\"\n\
         [[peer]]\nid = \"bob\"\naddress = \"127.0.0.1:9\"\n\
         [[link]]\npeer = \"bob\"\n",
    );
    for number in 0..pairs {
        let folder = dir.join(format!("keys-{number}"));
        fs::create_dir(&folder).unwrap();
        config += &format!(
            "[[link.module_pair]]\nname = \"pair-{number}\"\n\
             driver = {{ kind = \"directory\", path = {:?} }}\n",
            folder.to_str().unwrap()
        );
    }
    fs::write(dir.join("alice.toml"), config).unwrap();
}

/// Clock ticks of CPU that a process has used, by its user and by the kernel for it (`proc(5)`).
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit_once(')').unwrap().1;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn threads(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().count()
}

/// Killed when the test ends, however it ends.
struct Node(Child);

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_idle_node_with_many_module_pairs_sleeps_and_they_share_its_threads() {
    let dir = tempfile::tempdir().unwrap();
    node_with_pairs(dir.path(), PAIRS);
    let log = fs::File::create(dir.path().join("alice.log")).unwrap();
    let config = dir.path().join("alice.toml");
    let child = Command::new(program())
        .args(["run", "--config", config.to_str().unwrap()])
        .env_remove("QKD_LOG")
        .stdin(Stdio::null())
        .stderr(log)
        .spawn();
    let node = Node(child.unwrap());
    let started = Instant::now();
    while !qkd_bridge(["status", "--config", config.to_str().unwrap()])
        .status
        .success()
    {
        let log = fs::read_to_string(dir.path().join("alice.log")).unwrap();
        assert!(started.elapsed() < Duration::from_secs(20), "{log}");
        std::thread::sleep(Duration::from_millis(20));
    }
    // What it spins before it sleeps is over.
    std::thread::sleep(Duration::from_millis(500));

    let pid = node.0.id();
    let before = cpu_ticks(pid);
    std::thread::sleep(LOOK);
    let ticks = cpu_ticks(pid) - before;
    // A tick is 10 ms on every Linux that this runs on. 1 % of a core is the promise; 3 % leaves room
    // for ticks that are counted whole. A thread that spins would use a hundred times as much.
    let used = Duration::from_millis(10 * ticks);
    println!("{used:?} of processor time in {LOOK:?}");
    assert!(used < LOOK * 3 / 100, "{used:?} of CPU in {LOOK:?}");
    assert!(threads(pid) <= MOST_THREADS, "{} threads", threads(pid));
}
