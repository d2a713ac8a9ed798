//! The crates of the workspace depend on each other only as `ARCHITECTURE.md` allows.

use std::{collections::BTreeMap, process::Command};

use serde_json::Value;

/// Who may use whom; `qkd-bridge` may use all.
const ALLOWED: &[(&str, &[&str])] = &[
    ("qkd-keyfile", &[]),
    ("qkd-kernels", &[]),
    ("qkd-secmem", &["qkd-kernels"]),
    ("qkd-net", &["qkd-keyfile"]),
    ("qkd-handover", &["qkd-keyfile"]),
    ("qkd-sim-device", &["qkd-keyfile", "qkd-handover"]),
    (
        "qkd-drivers",
        &["qkd-keyfile", "qkd-secmem", "qkd-handover", "qkd-net"],
    ),
    (
        "qkd-pipeline",
        &["qkd-keyfile", "qkd-secmem", "qkd-kernels"],
    ),
    ("qkd-kma", &["qkd-keyfile", "qkd-secmem", "qkd-kernels"]),
    ("qkd-ksa", &["qkd-keyfile", "qkd-secmem", "qkd-net"]),
    ("qkd-control", &["qkd-keyfile", "qkd-net"]),
];

/// Every crate of the workspace, with the crates that its library depends on.
fn dependencies() -> BTreeMap<String, Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo metadata failed");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let package = |package: &Value| {
        let names = package["dependencies"].as_array().into_iter().flatten();
        let normal = names.filter(|dependency| dependency["kind"].is_null());
        let names = normal.map(|dependency| text(&dependency["name"])).collect();
        (text(&package["name"]), names)
    };
    let packages = metadata["packages"].as_array().into_iter().flatten();
    packages.map(package).collect()
}

fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

#[test]
fn no_crate_uses_another_that_the_architecture_does_not_allow() {
    let all = dependencies();
    for (name, uses) in &all {
        let ours = uses.iter().filter(|used| used.starts_with("qkd-"));
        let Some((_, allowed)) = ALLOWED.iter().find(|(crate_name, _)| crate_name == name) else {
            assert_eq!(name, "qkd-bridge", "{name} has no entry in the table");
            continue;
        };
        for used in ours {
            assert!(allowed.contains(&used.as_str()), "{name} uses {used}");
        }
    }
    assert_eq!(all.len(), ALLOWED.len() + 1, "a crate of the table is gone");
}

#[test]
fn the_key_management_agent_has_no_asynchronous_runtime() {
    let all = dependencies();
    for name in ["qkd-kma", "qkd-pipeline", "qkd-keyfile", "qkd-kernels"] {
        assert!(!all[name].iter().any(|used| used == "tokio"), "{name}");
    }
}

#[test]
fn the_controller_cannot_name_key_memory() {
    let all = dependencies();
    assert!(!all["qkd-control"].iter().any(|used| used == "qkd-secmem"));
}
