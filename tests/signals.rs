//! A node as a process: it starts alone, answers, heeds signals, and keeps its store to itself.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    io::Read,
    net::TcpListener,
    os::unix::net::UnixDatagram,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A stop must not take longer.
const STOP_WITHIN: Duration = Duration::from_secs(5);

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qkd-bridge"));
    command.env_remove("QKD_LOG").stdin(Stdio::null());
    command
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Certificates and configuration of a node that has no peer.
fn lonely_node(dir: &Path) {
    let made = program()
        .args(["pki", "init", "--node", "alice", "--dir"])
        .arg(dir.join("pki"))
        .output()
        .unwrap();
    assert!(made.status.success());
    let config = format!(
        r#"
log = "info"
[node]
id = "alice"
data = "data"
key_memory_mib = 4
allow_unlocked_memory = true
[tls]
ca = "pki/ca.pem"
certificate = "pki/node-alice.pem"
key = "pki/node-alice.key"
[kx]
listen = "127.0.0.1:{}"
"#,
        free_port()
    );
    fs::write(dir.join("alice.toml"), config).unwrap();
}

/// A running node that is killed if the test fails.
struct Node(Child);

impl Node {
    fn start(dir: &Path) -> Self {
        Self::start_under(dir, &[])
    }

    /// Starts it with more in its environment, as a service manager does.
    fn start_under(dir: &Path, environment: &[(&str, &str)]) -> Self {
        let log = fs::File::create(dir.join("alice.log")).unwrap();
        let child = program()
            .args(["run", "--config"])
            .arg(dir.join("alice.toml"))
            .envs(environment.iter().copied())
            .stderr(log)
            .spawn()
            .unwrap();
        let node = Self(child);
        wait_until("the node answers", || status(dir).is_some());
        node
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        kill(pid, signal).unwrap();
    }

    fn stop(mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        let asked = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(asked.elapsed() < STOP_WITHIN, "the node does not stop");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn status(dir: &Path) -> Option<serde_json::Value> {
    let output = program()
        .args(["status", "--json", "--config"])
        .arg(dir.join("alice.toml"))
        .output()
        .unwrap();
    output
        .status
        .success()
        .then(|| serde_json::from_slice(&output.stdout).unwrap())
}

fn log(dir: &Path) -> String {
    fs::read_to_string(dir.join("alice.log")).unwrap()
}

fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let started = Instant::now();
    while !happened() {
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "not in 20 s: {what}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_node_starts_answers_and_stops_in_good_order_and_starts_again() {
    let dir = tempfile::tempdir().unwrap();
    lonely_node(dir.path());
    for _ in 0..2 {
        let node = Node::start(dir.path());
        let report = status(dir.path()).unwrap();
        assert_eq!(report["node"], "alice");
        assert_eq!(report["inconsistencies"], 0);
        assert!(node.stop().success());
        assert!(status(dir.path()).is_none(), "a stopped node answers");
    }
}

#[test]
fn a_hang_up_makes_a_node_read_its_certificates_and_log_levels_again() {
    let dir = tempfile::tempdir().unwrap();
    lonely_node(dir.path());
    let node = Node::start(dir.path());
    let path = dir.path().join("alice.toml");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, config.replace("log = \"info\"", "log = \"warn\"")).unwrap();
    node.signal(Signal::SIGHUP);
    // What is on disk now cannot be used: the node says so, at the new level, and goes on.
    wait_until("the levels changed", || {
        fs::write(dir.path().join("pki/node-alice.pem"), "no certificate").unwrap();
        node.signal(Signal::SIGHUP);
        std::thread::sleep(Duration::from_millis(50));
        log(dir.path()).contains("certificates stay as they were")
    });
    assert!(status(dir.path()).is_some());
    assert!(node.stop().success());
    assert!(
        !log(dir.path()).contains("node stops"),
        "that is said at level info"
    );
}

#[test]
fn a_hang_up_adds_changes_and_removes_module_pairs_and_names_what_needs_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    lonely_node(dir.path());
    let path = dir.path().join("alice.toml");
    let base = fs::read_to_string(&path).unwrap()
        + "[[peer]]\nid = \"bob\"\naddress = \"127.0.0.1:9\"\n[[link]]\npeer = \"bob\"\n";
    let pair = |name: &str, folder: &str| {
        format!(
            "[[link.module_pair]]\nname = \"{name}\"\n\
             driver = {{ kind = \"directory\", path = \"{folder}\" }}\n"
        )
    };
    for folder in ["one", "two"] {
        fs::create_dir(dir.path().join(folder)).unwrap();
    }
    fs::write(&path, format!("{base}{}", pair("mp1", "one"))).unwrap();
    let node = Node::start(dir.path());
    let module = |name: &str| status(dir.path()).unwrap()["modules"][name].clone();
    let device = |name: &str| module(name)["device"].as_str().unwrap_or("").to_owned();
    wait_until("mp1 is read", || device("mp1").ends_with("one"));

    // One changes its folder, one is new, and one is new and cannot be opened yet.
    let changed = [pair("mp1", "two"), pair("mp2", "one"), pair("mp3", "three")].concat();
    fs::write(&path, base.clone() + &changed).unwrap();
    node.signal(Signal::SIGHUP);
    wait_until("mp1 is read elsewhere", || device("mp1").ends_with("two"));
    wait_until("mp2 is read", || device("mp2").ends_with("one"));
    wait_until("status says why mp3 is not read", || {
        module("mp3")["error"]
            .as_str()
            .is_some_and(|error| error.contains("does not exist; to mend it: sudo install -d"))
    });
    fs::create_dir(dir.path().join("three")).unwrap();
    wait_until("mp3 is read", || device("mp3").ends_with("three"));
    assert!(module("mp3")["error"].is_null());

    // One goes, and what a running node cannot take over is named.
    let removed = format!("{base}{}", pair("mp2", "one"))
        .replace("key_memory_mib = 4", "key_memory_mib = 8")
        + "[[link]]\npeer = \"carol\"\n[[link.module_pair]]\nname = \"mp4\"\n\
           driver = { kind = \"directory\", path = \"one\" }\n\
           [[peer]]\nid = \"carol\"\naddress = \"127.0.0.1:9\"\n";
    fs::write(&path, removed).unwrap();
    node.signal(Signal::SIGHUP);
    wait_until("mp1 and mp3 are gone", || {
        module("mp1").is_null() && module("mp3").is_null()
    });
    wait_until("what needs a restart is named", || {
        log(dir.path()).matches("read again: module pairs").count() == 2
    });
    let said = log(dir.path());
    for section in ["[node]", "[[link]]", "[[peer]]"] {
        let line = format!("{section} differs from what this node runs with: that needs a restart");
        assert!(said.contains(&line), "{said}");
    }
    assert!(!said.contains("[tls] differs"), "{said}");
    assert!(
        said.contains("its link needs a restart module_pair=mp4"),
        "{said}"
    );
    assert!(
        module("mp2")["attached"].as_bool().unwrap(),
        "mp2 was left alone"
    );
    assert!(module("mp4").is_null());
    assert!(node.stop().success());
}

#[test]
fn a_service_manager_is_told_of_readiness_life_reloading_and_the_end() {
    let dir = tempfile::tempdir().unwrap();
    lonely_node(dir.path());
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let next = || {
        let mut bytes = [0; 512];
        let len = manager
            .recv(&mut bytes)
            .expect("the manager is told something");
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    };
    let is_life = |said: &str| said.starts_with("WATCHDOG=1");
    // Signs of life may come in between.
    let next_but_life = || loop {
        let said = next();
        if !is_life(&said) {
            break said;
        }
    };
    let socket = path.to_str().unwrap();
    let environment = [("NOTIFY_SOCKET", socket), ("WATCHDOG_USEC", "200000")];
    let node = Node::start_under(dir.path(), &environment);
    assert_eq!(next(), "READY=1");
    for _ in 0..3 {
        let said = next();
        let expected = "WATCHDOG=1\nSTATUS=0 of 0 modules attached, 0 of 0 nodes connected";
        assert_eq!(said, expected);
    }
    node.signal(Signal::SIGHUP);
    let said = next_but_life();
    assert!(said.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{said}");
    assert_eq!(next_but_life(), "READY=1");
    assert!(node.stop().success());
    assert_eq!(next_but_life(), "STOPPING=1");
}

#[test]
fn a_store_in_use_is_refused_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    lonely_node(dir.path());
    let node = Node::start(dir.path());
    let path = dir.path().join("alice.toml");
    let config = fs::read_to_string(&path).unwrap();
    let old = config
        .lines()
        .find(|line| line.starts_with("listen"))
        .unwrap();
    let moved = format!("listen = \"127.0.0.1:{}\"", free_port());
    fs::write(&path, config.replace(old, &moved)).unwrap();
    let mut second = program()
        .args(["run", "--config"])
        .arg(&path)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(second.wait().unwrap().code(), Some(1));
    let mut said = String::new();
    second
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(
        said.contains("in use by another process") && said.contains("data/store"),
        "{said}"
    );
    assert!(node.stop().success());
}
