//! `qkd-bridge store`: what it says of stores, sound and damaged, and what it does to them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../kma/tests/common/mod.rs"]
mod common;
mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use common::{Network, chain, node};
use qkd_keyfile::KsaKeyId;
use serde_json::Value;
use support::{qkd_bridge, stderr, stdout};
use tempfile::TempDir;

/// The store of `alice`, filled with a link's key; two keys for applications were cut, none fetched.
struct Filled {
    dir: TempDir,
    /// While it is there, a node has the store.
    net: Option<Network>,
    keys: Vec<KsaKeyId>,
}

impl Filled {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let mut net = Network::new(chain(&["alice", "bob"], 0), 3);
        fs::create_dir_all(dir.path().join("data")).unwrap();
        net.nodes.get_mut(&node("alice")).unwrap().dir = Some(dir.path().join("data/store"));
        net.start_all();
        for id in 0..12 {
            net.deliver_both("alice", "bob", id, 4096);
        }
        net.run(20);
        let keys = net.supply("alice", "bob", 2, 256).unwrap();
        let keys = keys.iter().map(|key| key.key_id).collect();
        let node = r#"
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
        fs::write(dir.path().join("alice.toml"), node).unwrap();
        Self {
            dir,
            net: Some(net),
            keys,
        }
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("alice.toml")
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("data/store")
    }

    fn run(&self, args: &[&str]) -> Output {
        let config = self.config();
        let config = config.to_str().unwrap();
        let (what, rest) = args.split_first().unwrap();
        let head = ["store", what, "--config", config];
        qkd_bridge(head.iter().chain(rest))
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(&[args, &["--json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", stderr(&output)))
    }
}

/// Every file of a folder, with its bytes and the time of its last change.
fn image(dir: &Path) -> Vec<(PathBuf, Vec<u8>, std::time::SystemTime)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(image(&path));
        } else {
            let changed = fs::metadata(&path).unwrap().modified().unwrap();
            files.push((path.clone(), fs::read(&path).unwrap(), changed));
        }
    }
    files.sort();
    files
}

#[test]
fn a_sound_store_is_called_sound_and_is_not_changed() {
    let mut filled = Filled::new();
    let output = filled.run(&["check"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("a node runs on the store"),
        "{}",
        stderr(&output)
    );
    let stats = filled.json(&["stats"]);
    assert_eq!(stats["kind"], "lmdb", "stats work beside a node");
    filled.net = None;
    let before = image(&filled.store());
    let report = filled.json(&["check"]);
    assert_eq!(report["sound"], true, "{report:#}");
    assert!(report["rows"].as_u64().unwrap() >= 10);
    let stats = filled.json(&["stats"]);
    let stock = stats["stock"].as_array().unwrap();
    assert_eq!(stock.len(), 2);
    for entry in stock {
        assert_eq!(
            (&entry["peer"], &entry["level"]),
            (&"bob".into(), &"qkd".into())
        );
        assert!(entry["usable_bytes"].as_u64().unwrap() > 10_000);
    }
    assert!(stats["ram_bytes"].as_u64().unwrap() > 0);
    assert!(stdout(&filled.run(&["stats"])).contains("keys of 256 bits"));
    assert_eq!(image(&filled.store()), before, "nothing was changed");
    assert!(stdout(&filled.run(&["check"])).ends_with("sound\n"));
}

#[test]
fn damage_is_found_and_told_with_exit_status_3() {
    let mut filled = Filled::new();
    filled.net = None;
    let database = filled.store().join("rows/data.mdb");
    let whole = fs::read(&database).unwrap();
    let mut bytes = whole.clone();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 4096]
        .iter_mut()
        .for_each(|byte| *byte ^= 0x33);
    fs::write(&database, bytes).unwrap();
    let output = filled.run(&["check"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(
        stdout(&output).to_uppercase().contains("DAMAGED"),
        "{}",
        stdout(&output)
    );
    // A database that is no longer one, and one whose reader runs off its end.
    for bytes in [vec![7; whole.len()], whole[..9000].to_vec()] {
        fs::write(&database, bytes).unwrap();
        let output = filled.run(&["check", "--json"]);
        assert!(matches!(output.status.code(), Some(1 | 3)), "{output:?}");
    }
    fs::write(&database, whole).unwrap();
    assert_eq!(filled.json(&["check"])["sound"], true);
    // A journal with a flipped byte cannot be compared with: not checked, and not sound.
    let journal = filled.store().join("journal");
    let mut bytes = fs::read(&journal).unwrap();
    bytes[5000] ^= 1;
    fs::write(&journal, bytes).unwrap();
    let output = filled.run(&["check"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("journal is damaged at byte"),
        "{}",
        stderr(&output)
    );
    fs::remove_dir_all(filled.store()).unwrap();
    assert!(stderr(&filled.run(&["check"])).contains("there is no store in"));
}

#[test]
fn a_store_gets_another_key_and_opens_with_that_alone() {
    let mut filled = Filled::new();
    filled.net = None;
    let phrase = filled.dir.path().join("phrase");
    fs::write(&phrase, "correct horse battery staple\n").unwrap();
    let source = format!("passphrase:file:{}", phrase.display());
    let output = filled.run(&["rekey", "--to", &source]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("chmod 600"), "{}", stderr(&output));
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&phrase, fs::Permissions::from_mode(0o600)).unwrap();
    let output = filled.run(&["rekey", "--to", &source]);
    assert!(output.status.success(), "{}", stderr(&output));
    let entry = stdout(&output);
    let entry = entry.lines().last().unwrap().trim();
    let output = filled.run(&["check"]);
    assert!(stderr(&output).contains("is a pass-phrase, and a key is given"));
    let config = fs::read_to_string(filled.config()).unwrap();
    let config = format!("{config}\n[store]\nkind = \"lmdb\"\n{entry}\n");
    fs::write(filled.config(), config).unwrap();
    assert_eq!(filled.json(&["check"])["sound"], true);
    assert_eq!(filled.json(&["rekey"])["epoch"], 2);
    assert_eq!(filled.json(&["check"])["sound"], true);
    fs::write(&phrase, "another\n").unwrap();
    let output = filled.run(&["check"]);
    assert!(
        stderr(&output).contains("is not the one of this store"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_key_is_followed_both_ways_and_what_is_correlated_is_voided() {
    let mut filled = Filled::new();
    let key = filled.keys[0].to_string();
    let story = filled.json(&["trace", &key]);
    assert_eq!(story["keys"][0], format!("KSA-key {key}"));
    let origins: Vec<&str> = story["origins"]
        .as_array()
        .unwrap()
        .iter()
        .map(|k| k.as_str().unwrap())
        .collect();
    let qkd_key = origins
        .iter()
        .find_map(|key| key.strip_prefix("QKD-key "))
        .unwrap();
    let below = filled.json(&["trace", qkd_key]);
    let derived = below["derived"].to_string();
    assert!(derived.contains(&key), "{derived}");
    let text = stdout(&filled.run(&["trace", qkd_key]));
    for transition in ["received", "stored", "cut for supply"] {
        assert!(text.contains(transition), "{transition}: {text}");
    }
    assert!(stderr(&filled.run(&["trace", "no-such-key"])).contains("know no-such-key"));
    let output = filled.run(&["void", qkd_key, "--yes"]);
    assert!(
        stderr(&output).contains("stop it first"),
        "{}",
        stderr(&output)
    );
    filled.net = None;
    let would = filled.json(&["void", qkd_key]);
    assert_eq!(
        (
            would["done"].clone(),
            would["voided"].as_array().unwrap().len()
        ),
        (false.into(), 0)
    );
    let done = filled.json(&["void", qkd_key, "--yes"]);
    assert_eq!(done["voided"].as_array().unwrap().len(), 1, "{done:#}");
    assert_eq!(done["supplied"].as_array().unwrap().len(), 2);
    assert_eq!(
        filled.json(&["void", qkd_key, "--yes"])["voided"]
            .as_array()
            .unwrap()
            .len(),
        0
    );
    assert_eq!(filled.json(&["check"])["sound"], true);
    let text = stdout(&filled.run(&["trace", qkd_key]));
    assert!(!text.contains("hash"), "{text}");
}
