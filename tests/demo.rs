//! The demonstration as a user starts it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader, Lines, Read},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use support::{program, qkd_bridge, stderr, stdout};
use tempfile::TempDir;

#[test]
fn every_key_arrives_at_both_ends_and_demo_json_says_where_everything_is() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("new");
    let dir_text = dir.to_str().unwrap();
    let output = qkd_bridge(["demo", "--seconds", "2", "--dir", dir_text]);
    let (out, err) = (stdout(&output), stderr(&output));
    assert!(output.status.success(), "{out}\n{err}");

    assert!(out.contains("app-c, at relay, asked for a key of app-a and app-b and was refused"));
    assert!(
        out.contains("equal, 0 different, 0 at one end only"),
        "{out}"
    );
    for row in [
        "alice--relay   alice",
        "bob--relay     relay",
        "alice->bob     bob",
    ] {
        assert!(out.contains(row), "{row}: {out}");
    }
    let row = out.lines().find(|line| line.starts_with("app-b ")).unwrap();
    let keys: u64 = row.split_whitespace().nth(2).unwrap().parse().unwrap();
    assert!(keys > 0 && keys.is_multiple_of(128), "{row}");

    let json = fs::read(dir.join("demo.json")).unwrap();
    check_json(&serde_json::from_slice(&json).unwrap());
}

/// The form that the documentation promises.
fn check_json(json: &Value) {
    let address = |value: &Value| value.as_str().unwrap().parse::<SocketAddr>().unwrap();
    let pem = |value: &Value| {
        let path = Path::new(value.as_str().unwrap());
        assert!(path.is_absolute());
        assert!(fs::read_to_string(path).unwrap().starts_with("-----BEGIN"));
    };
    pem(&json["ca"]);
    let nodes = json["nodes"].as_array().unwrap();
    for (node, id) in nodes.iter().zip(["alice", "relay", "bob"]) {
        assert_eq!(node["id"], id);
        assert!(address(&node["https"]).ip().is_loopback());
        assert!(address(&node["kx"]).ip().is_loopback());
        for absent in ["ak", "ck", "metrics"] {
            assert!(node.as_object().unwrap()[absent].is_null());
        }
        assert!(Path::new(node["config"].as_str().unwrap()).is_absolute());
        let checked = qkd_bridge(["config", "check", node["config"].as_str().unwrap()]);
        assert!(checked.status.success());
    }
    address(&json["controller"]["ck"]);
    assert!(json["manager"].as_object().unwrap()["https"].is_null());
    let apps = json["apps"].as_array().unwrap();
    for (app, (id, node)) in
        apps.iter()
            .zip([("app-a", "alice"), ("app-b", "bob"), ("app-c", "relay")])
    {
        assert_eq!((&app["id"], &app["node"]), (&id.into(), &node.into()));
        pem(&app["cert"]);
        pem(&app["key"]);
    }
    assert_eq!((nodes.len(), apps.len()), (3, 3));
}

#[test]
fn a_folder_in_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("mine"), "").unwrap();
    let output = qkd_bridge(["demo", "--dir", folder.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is not empty; give a new folder"));
}

/// A demonstration that goes on, and the processes that it has started.
struct Running {
    demo: Child,
    /// Name and ID of each.
    processes: Vec<(String, String)>,
    lines: Lines<BufReader<ChildStdout>>,
    _folder: TempDir,
}

impl Running {
    fn start(args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut demo = Command::new(program())
            .args(["demo", "--dir"])
            .arg(folder.path())
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
        let list = lines
            .find_map(|line| Some(line.unwrap().strip_prefix("processes: ")?.to_owned()))
            .unwrap();
        let split = |entry: &str| {
            let (name, id) = entry.split_once(" (").unwrap();
            (name.to_owned(), id.trim_end_matches(')').to_owned())
        };
        Self {
            demo,
            processes: list.split(", ").map(split).collect(),
            lines,
            _folder: folder,
        }
    }

    fn wait_for_line(&mut self, part: &str) {
        let mut lines = self.lines.by_ref().map(Result::unwrap);
        assert!(lines.any(|line| line.contains(part)), "no line with {part}");
    }

    fn all_end(&self, within: Duration) {
        let start = Instant::now();
        // One that has ended, and that nobody has waited for yet, has no command line any more.
        let runs = |(_, id): &(String, String)| {
            fs::read(format!("/proc/{id}/cmdline"))
                .is_ok_and(|line| line.starts_with(program().as_os_str().as_encoded_bytes()))
        };
        assert_eq!(self.processes.len(), 7);
        while self.processes.iter().any(runs) {
            assert!(start.elapsed() < within, "some go on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn signal(id: &str, signal: Signal) {
    kill(Pid::from_raw(id.parse().unwrap()), signal).unwrap();
}

#[test]
fn a_demonstration_that_is_killed_leaves_no_process_behind() {
    let mut running = Running::start(&["--keep"]);
    running.demo.kill().unwrap();
    running.demo.wait().unwrap();
    running.all_end(Duration::from_secs(10));
}

#[test]
fn a_node_that_dies_early_fails_the_demonstration_with_its_last_words() {
    let mut running = Running::start(&["--seconds", "60"]);
    let (_, relay) = running
        .processes
        .iter()
        .find(|(name, _)| name == "relay")
        .unwrap();
    signal(relay, Signal::SIGKILL);
    running.wait_for_line("stopping");
    assert_eq!(running.demo.wait().unwrap().code(), Some(1));
    let mut err = String::new();
    running
        .demo
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut err)
        .unwrap();
    assert!(
        err.contains("relay has ended; the end of its log:"),
        "{err}"
    );
    running.all_end(Duration::ZERO);
}

#[test]
fn a_network_that_is_kept_says_how_to_use_it_and_stops_in_good_order() {
    let mut running = Running::start(&["--seconds", "1", "--keep"]);
    running.wait_for_line("curl --cacert ");
    running.wait_for_line("/api/v1/keys/app-a/dec_keys");
    // The load is over: a node may die now, and is only told of.
    let (_, bob) = running
        .processes
        .iter()
        .find(|(name, _)| name == "bob")
        .unwrap();
    signal(bob, Signal::SIGKILL);
    running.wait_for_line("bob has ended");
    let asked = Instant::now();
    signal(&running.demo.id().to_string(), Signal::SIGTERM);
    assert!(running.demo.wait().unwrap().success());
    assert!(asked.elapsed() < Duration::from_secs(5));
    running.all_end(Duration::ZERO);
}
