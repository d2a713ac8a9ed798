//! The demonstration as a user starts it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use support::{program, qkd_bridge, stderr, stdout};

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

#[test]
fn a_demonstration_that_is_killed_leaves_no_process_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut demo = Command::new(program())
        .args(["demo", "--keep", "--dir"])
        .arg(folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    let line = lines
        .find_map(|line| Some(line.unwrap().strip_prefix("processes: ")?.to_owned()))
        .unwrap();
    let ids: Vec<String> = line
        .split(['(', ')'])
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect();
    assert_eq!(ids.len(), 7, "{line}");
    demo.kill().unwrap();
    demo.wait().unwrap();
    let killed = Instant::now();
    // A process that has ended and that nobody has waited for yet has no command line any more.
    let runs = |id: &String| {
        fs::read(format!("/proc/{id}/cmdline"))
            .is_ok_and(|line| line.starts_with(program().as_os_str().as_encoded_bytes()))
    };
    while ids.iter().any(runs) {
        assert!(killed.elapsed() < Duration::from_secs(10), "some go on");
        std::thread::sleep(Duration::from_millis(20));
    }
}
