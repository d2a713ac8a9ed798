//! What the development authority leaves in its directory.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt, path::Path};

use common::{credentials, node, now};
use qkd_net::{
    Identity,
    pki::{self, PkiError, Request, file_name},
};

fn request<'a>(nodes: &'a [qkd_keyfile::NodeId], apps: &'a [qkd_keyfile::AppId]) -> Request<'a> {
    Request {
        nodes,
        apps,
        extra_hosts: &[],
        now: now(),
        valid_days: 30,
    }
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn keys_are_their_owners_only() {
    let outer = tempfile::tempdir().unwrap();
    let dir = outer.path().join("deep/pki");
    let (nodes, apps) = ([node("a")], ["a".parse().unwrap()]);
    let paths = pki::init(&dir, &request(&nodes, &apps)).unwrap();
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join("ca.key")), 0o600);
    assert_eq!(paths.issued.len(), 2);
    for issued in &paths.issued {
        assert_eq!(mode(&issued.key), 0o600);
        assert!(issued.certificate.exists());
    }
    assert_eq!(
        paths.issued[1].identity,
        Identity::App("a".parse().unwrap())
    );
}

#[test]
fn ids_that_are_no_file_names_are_escaped_and_load() {
    let dir = tempfile::tempdir().unwrap();
    let id = "../urn:x/%2e?[y]";
    pki::init(dir.path(), &request(&[node(id)], &[])).unwrap();
    let stem = "node-%2e%2e%2furn%3ax%2f%252e%3f%5by%5d";
    let expected = [
        "ca.key",
        "ca.pem",
        &format!("{stem}.key"),
        &format!("{stem}.pem"),
    ];
    assert_eq!(names(dir.path()), expected.map(str::to_owned).into());
    let loaded = credentials(dir.path(), stem);
    assert_eq!(loaded.identity(), Ok(&Identity::Node(node(id))));
}

#[test]
fn the_longest_id_makes_a_file_name_that_systems_take() {
    assert!("node-.pem".len() + file_name(&"/".repeat(64)).len() <= 255);
}

#[test]
fn nothing_is_overwritten_and_nothing_written_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("app-x.key"), "mine").unwrap();
    let (nodes, apps) = ([node("a")], ["x".parse().unwrap()]);
    let refused = pki::init(dir.path(), &request(&nodes, &apps));
    assert!(matches!(refused, Err(PkiError::Exists { path }) if path.ends_with("app-x.key")));
    assert_eq!(names(dir.path()).len(), 1);

    pki::init(dir.path(), &request(&nodes, &[])).unwrap();
    let refused = pki::init(dir.path(), &request(&[node("b")], &[]));
    assert!(matches!(refused, Err(PkiError::Exists { path }) if path.ends_with("ca.pem")));
    let refused = pki::add(dir.path(), &request(&nodes, &[]));
    assert!(matches!(refused, Err(PkiError::Exists { path }) if path.ends_with("node-a.pem")));
}

#[test]
fn a_name_asked_for_twice_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = pki::init(dir.path(), &request(&[node("a"), node("a")], &[]));
    assert!(matches!(refused, Err(PkiError::Twice { .. })));
    assert!(names(dir.path()).is_empty());
}

#[test]
fn only_to_our_own_authority_is_added() {
    let (ours, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    pki::init(ours.path(), &request(&[node("a")], &[])).unwrap();
    pki::init(other.path(), &request(&[node("a")], &[])).unwrap();
    fs::copy(other.path().join("ca.key"), ours.path().join("ca.key")).unwrap();
    let refused = pki::add(ours.path(), &request(&[node("b")], &[]));
    assert!(matches!(refused, Err(PkiError::Foreign { .. })));
    fs::copy(ours.path().join("node-a.pem"), other.path().join("ca.pem")).unwrap();
    let refused = pki::add(other.path(), &request(&[node("b")], &[]));
    assert!(matches!(refused, Err(PkiError::Foreign { .. })));
}

#[test]
fn a_host_name_that_cannot_be_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = ["h\u{f6}st".to_owned()];
    let bad = Request {
        extra_hosts: &hosts,
        ..request(&[], &[])
    };
    let nodes = [node("a")];
    let refused = pki::init(
        dir.path(),
        &Request {
            nodes: &nodes,
            ..bad
        },
    );
    assert!(
        matches!(refused, Err(PkiError::Certificate { subject, .. }) if subject == "qkd-node:a")
    );
}
