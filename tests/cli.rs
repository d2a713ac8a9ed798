//! The command line: what is refused, with which words and exit status.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use support::{qkd_bridge, stderr, stdout};

const NODE: &str = r#"
[node]
id = "alice"
data = "data"
[tls]
ca = "ca.pem"
certificate = "alice.pem"
key = "alice.key"
[kx]
listen = "127.0.0.1:7001"
"#;

const SIM: &str = r#"
seed = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
[[module_pair]]
name = "mp1"
block_bits = 1000
pace = "max"
first_number = 256
blocks = 20
[[module_pair.half]]
role = "transmitter"
transport = { kind = "files", directory = "tx" }
[[module_pair.half]]
role = "receiver"
transport = { kind = "files", directory = "rx" }
"#;

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn what_is_wrong_in_a_configuration_is_named_and_the_exit_status_is_2() {
    let dir = tempfile::tempdir().unwrap();
    let unknown = NODE.replace("data = \"data\"", "data = \"data\"\nspeed = 9");
    let unknown = write(dir.path(), "unknown.toml", &unknown);
    let missing = write(
        dir.path(),
        "missing.toml",
        &NODE.replace("id = \"alice\"", ""),
    );
    let sim = write(
        dir.path(),
        "sim.toml",
        &SIM.replace("pace = \"max\"", "pace = 0"),
    );
    let cases = [
        (
            ["config", "check", &unknown],
            "unknown.toml:5:1: unknown field `speed`",
        ),
        (
            ["run", "--config", &unknown],
            "unknown.toml:5:1: unknown field `speed`",
        ),
        (
            ["status", "--config", &unknown],
            "unknown.toml:5:1: unknown field `speed`",
        ),
        (
            ["run", "--config", &missing],
            "missing.toml:2:1: missing field `id`",
        ),
        (["controller", "--config", &unknown], "unknown.toml"),
        (
            ["sim", "--config", &sim],
            "sim.toml:6:8: a pace is a number",
        ),
        (
            ["run", "--config", "/nonexistent/a.toml"],
            "/nonexistent/a.toml: cannot be read",
        ),
    ];
    for (args, expected) in cases {
        let output = qkd_bridge(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(
            stderr(&output).contains(expected),
            "{args:?}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn a_good_configuration_is_summed_up() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "alice.toml", NODE);
    let output = qkd_bridge(["config", "check", &file]);
    assert!(output.status.success());
    assert!(
        stdout(&output).contains("node alice, 0 links"),
        "{}",
        stdout(&output)
    );
}

#[test]
fn log_levels_that_are_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "alice.toml", NODE);
    let output = qkd_bridge(["run", "--config", &file, "--log", "qkd_kma=loud"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("log levels \"qkd_kma=loud\""));
}

#[test]
fn certificates_are_made_once_and_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let pki = dir.path().join("pki");
    let args = |command: &'static str, node: &'static str| {
        let dir = pki.to_str().unwrap();
        qkd_bridge([
            "pki", command, "--dir", dir, "--node", node, "--app", "app-a",
        ])
    };
    assert!(args("init", "alice").status.success());
    let files = || -> BTreeMap<_, _> {
        let entries = fs::read_dir(&pki)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        entries
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .collect()
    };
    let before = files();
    for (command, node) in [("init", "bob"), ("add", "alice")] {
        let again = args(command, node);
        assert_eq!(again.status.code(), Some(1));
        assert!(stderr(&again).contains("exists; nothing is overwritten"));
    }
    assert_eq!(files(), before);
}

#[test]
fn a_node_with_another_nodes_certificate_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let pki = dir.path().join("pki");
    let made = qkd_bridge([
        "pki",
        "init",
        "--dir",
        pki.to_str().unwrap(),
        "--node",
        "mallory",
    ]);
    assert!(made.status.success());
    let text = NODE
        .replace("ca.pem", "pki/ca.pem")
        .replace("alice.pem", "pki/node-mallory.pem")
        .replace("alice.key", "pki/node-mallory.key")
        .replace("127.0.0.1:7001", "127.0.0.1:0")
        .replace(
            "data = \"data\"",
            "data = \"data\"\nkey_memory_mib = 4\nallow_unlocked_memory = true",
        );
    let file = write(dir.path(), "alice.toml", &text);
    let output = qkd_bridge(["run", "--config", &file]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("not that of node alice"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn every_command_has_an_example_in_its_help() {
    for command in [
        &["run"][..],
        &["controller"],
        &["demo"],
        &["sim"],
        &["inspect"],
        &["status"],
        &["completions"],
        &["pki", "init"],
        &["pki", "add"],
        &["config", "check"],
    ] {
        let output = qkd_bridge(command.iter().chain([&"--help"]));
        let text = stdout(&output);
        assert!(output.status.success());
        assert!(text.contains("Example"), "{command:?}");
        assert!(
            text.contains(&format!("qkd-bridge {}", command.join(" "))),
            "{command:?}"
        );
        assert!(
            !text.contains("stdin"),
            "{command:?} shows what is for the program itself"
        );
    }
    assert_eq!(qkd_bridge(["fly"]).status.code(), Some(2));
}

#[test]
fn completions_know_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let output = qkd_bridge(["completions", shell]);
        assert!(output.status.success());
        let text = stdout(&output);
        for command in [
            "run",
            "controller",
            "demo",
            "sim",
            "inspect",
            "pki",
            "status",
        ] {
            assert!(text.contains(command), "{shell}: {command}");
        }
    }
}

/// Names and contents of a folder's files.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    let read = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        (name, fs::read(entry.path()).unwrap())
    };
    entries.map(read).collect()
}

#[test]
fn both_halves_of_a_simulated_pair_deliver_the_same_keys() {
    let seedless = SIM.replace("seed = ", "# seed = ");
    let ways: [(&str, &[&str]); 3] = [(SIM, &[]), (&seedless, &[]), (&seedless, &["--processes"])];
    let mut deliveries = Vec::new();
    for (text, more) in ways {
        let dir = tempfile::tempdir().unwrap();
        let file = write(dir.path(), "sim.toml", text);
        let output = qkd_bridge(["sim", "--config", &file].iter().chain(more));
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(
            stdout(&output).contains("mp1:receiver"),
            "{}",
            stdout(&output)
        );
        let [tx, rx] = ["tx", "rx"].map(|half| contents(&dir.path().join(half)));
        assert_eq!(tx.len(), 20);
        assert_eq!(tx, rx);
        assert!(tx.contains_key("00000100"));
        deliveries.push(tx);
    }
    // A fresh seed each, where none is given.
    assert!(deliveries[0] != deliveries[1] && deliveries[1] != deliveries[2]);
}

#[test]
fn a_given_seed_makes_the_same_run_again_and_halves_can_run_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "sim.toml", SIM);
    for half in ["mp1:transmitter", "mp1:receiver"] {
        let output = qkd_bridge(["sim", "--config", &file, "--half", half]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let [tx, rx] = ["tx", "rx"].map(|half| contents(&dir.path().join(half)));
    assert_eq!((tx.len(), &tx), (20, &rx));

    for unknown in ["mp2:receiver", "mp1:both"] {
        let output = qkd_bridge(["sim", "--config", &file, "--half", unknown]);
        assert_eq!(output.status.code(), Some(2), "{unknown}");
    }
}

#[test]
fn a_reader_of_standard_output_that_goes_away_is_no_fault() {
    let mut command = Command::new(support::program());
    command.args(["sim", "rate", "--list"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // Nothing of it is read.
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &*stderr(&output)), (Some(0), ""));
}
