//! What an operator orders of nodes that run: module pairs stopped and started, suspected keys voided.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    time::{Duration, Instant},
};

use qkd_bridge::demo::{LinkPlan, Network, PairPlan, Plan, Transport, application};
use qkd_keyfile::{AppId, NodeId};
use serde_json::Value;
use support::{Net, qkd_bridge, stderr, stdout};

/// For what takes a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn two_nodes() -> Plan {
    let [a, b]: [NodeId; 2] = ["alice", "bob"].map(|id| id.parse().unwrap());
    let [app_a, app_b]: [AppId; 2] = ["app-a", "app-b"].map(|id| id.parse().unwrap());
    let pair = PairPlan {
        name: "pair".to_owned(),
        transport: Transport::Serial,
        block_bits: 8192,
        pace: 20.0,
    };
    Plan {
        links: vec![LinkPlan {
            a: a.clone(),
            b: b.clone(),
            pairs: vec![pair],
        }],
        stock: None,
        apps: vec![(app_a, a.clone()), (app_b, b.clone())],
        nodes: vec![a, b],
        key_memory_mib: 8,
    }
}

/// Runs a command for a node.
fn at(network: &Network, node: &str, args: &[&str]) -> std::process::Output {
    let config = network.node(node).unwrap().config.clone();
    let (what, rest) = args.split_at(2);
    let config = ["--config", config.to_str().unwrap()];
    qkd_bridge(what.iter().chain(&config).chain(rest))
}

fn json(output: &std::process::Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", stderr(output)))
}

fn pair_of<'s>(statuses: &'s [(String, Value)], node: &str) -> &'s Value {
    let status = statuses.iter().find(|(name, _)| name == node);
    status.map_or(&Value::Null, |(_, status)| &status["module_pairs"]["pair"])
}

fn received(statuses: &[(String, Value)]) -> u64 {
    let bits = |(_, status): &(String, Value)| {
        status["streams"]["alice--bob"]["received_bits"]
            .as_u64()
            .unwrap_or(0)
    };
    statuses.iter().map(bits).min().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_pair_that_was_stopped_by_hand_stays_so_over_a_restart_until_it_is_started() {
    let mut net = Net::start(two_nodes()).await;
    let flows = |beyond: u64| move |s: &[(String, Value)]| s.len() == 2 && received(s) > beyond;
    net.wait_until("key", PATIENCE, flows(0)).await;
    let stopped = json(&at(
        &net.network,
        "alice",
        &["pair", "stop", "pair", "--json"],
    ));
    assert_eq!(stopped["changed"], true);
    let both = |s: &[(String, Value)]| {
        pair_of(s, "alice")["stopped_here"] == "operator"
            && pair_of(s, "bob")["stopped_there"] == "operator"
    };
    net.wait_until("both stopped", PATIENCE, both).await;
    let bob = net.network.node("bob").unwrap().config.clone();
    let shown = stdout(&qkd_bridge(["status", "--config", bob.to_str().unwrap()]));
    assert!(
        shown.contains("STOPPED at alice: by an operator"),
        "{shown}"
    );
    net.running.kill("alice").await.unwrap();
    net.start_again("alice");
    net.wait_until("still stopped", PATIENCE, both).await;
    let again = stdout(&at(&net.network, "alice", &["pair", "stop", "pair"]));
    assert!(again.contains("stopped here already"), "{again}");
    // Bob has no stop of its own to lift.
    let bob = json(&at(
        &net.network,
        "bob",
        &["pair", "start", "pair", "--json"],
    ));
    assert_eq!(bob["changed"], false);
    let before = received(&qkd_bridge::demo::statuses(&net.network).await);
    let started = json(&at(
        &net.network,
        "alice",
        &["pair", "start", "pair", "--json"],
    ));
    assert_eq!(started["status"]["stopped"], false, "{started:#}");
    net.wait_until("key again", PATIENCE, flows(before)).await;
    let unknown = at(&net.network, "alice", &["pair", "start", "no-pair"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(
        stderr(&unknown).contains("there are: pair"),
        "{}",
        stderr(&unknown)
    );
    let log = fs::read_to_string(net.network.dir.join("alice.log")).unwrap();
    for line in [
        "stop module pair pair",
        "ModulePairStopped",
        "ModulePairStarted",
    ] {
        assert!(log.contains(line), "{line}: {log}");
    }
    net.running.stop().await.unwrap();
    let away = at(&net.network, "alice", &["pair", "stop", "pair"]);
    assert!(
        stderr(&away).contains("is it running?"),
        "{}",
        stderr(&away)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspected_key_is_void_at_both_ends_while_their_nodes_run() {
    let mut net = Net::start(two_nodes()).await;
    let [mut a, mut b] = ["app-a", "app-b"].map(|id| application(&net.network, id).unwrap());
    let began = Instant::now();
    let keys = loop {
        match a.enc_keys(b.id(), 1, 256).await {
            Ok(keys) => break keys,
            Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
        }
        net.running.check().unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let id = keys[0].id.as_str();
    let story = json(&at(
        &net.network,
        "alice",
        &["store", "trace", id, "--json"],
    ));
    let origins = story["origins"].to_string();
    let dry = json(&at(&net.network, "alice", &["store", "void", id, "--json"]));
    assert_eq!(
        (&dry["done"], &dry["voided"]),
        (&false.into(), &Value::Array(Vec::new()))
    );
    let void = at(
        &net.network,
        "alice",
        &["store", "void", id, "--with-origins", "--yes", "--json"],
    );
    let void = json(&void);
    assert_eq!(
        (&void["done"], &void["at_running_node"]),
        (&true.into(), &true.into())
    );
    let segments = void["voided"].as_array().unwrap();
    assert!(!segments.is_empty(), "{void:#} {origins}");
    // Bob hears of it, and gives the key to nobody.
    let segment = segments[0].as_str().unwrap();
    loop {
        let bob = json(&at(
            &net.network,
            "bob",
            &["store", "trace", segment, "--json"],
        ));
        if bob["events"].to_string().contains("suspected") {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{bob:#}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let refused = b.dec_keys(a.id(), &[id]).await;
    let status = refused.as_ref().err().and_then(|error| error.status());
    assert_eq!(status, Some(400), "{:?}", refused.map(|keys| keys.len()));
    let again = at(
        &net.network,
        "alice",
        &["store", "void", id, "--with-origins", "--yes", "--json"],
    );
    assert_eq!(
        json(&again)["voided"],
        Value::Array(Vec::new()),
        "once is enough"
    );
    for (node, status) in qkd_bridge::demo::statuses(&net.network).await {
        assert_eq!(
            status["streams"]["alice--bob"]["imbalance_bits"], 0,
            "{node}"
        );
    }
    net.running.stop().await.unwrap();
    let report = json(&at(&net.network, "alice", &["store", "check", "--json"]));
    assert_eq!(report["sound"], true, "{report:#}");
}
