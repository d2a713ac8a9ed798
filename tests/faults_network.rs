//! Two nodes whose three module pairs go wrong in every way at once: no application ever gets a key
//! that the other end has not, bit for bit.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    time::{Duration, Instant},
};

use qkd_bridge::demo::{
    LinkPlan, Network, PairPlan, Plan, Transport, application,
    load::{self, Tally},
    statuses,
};
use serde_json::Value;
use support::Net;

/// Alice and bob, with a module pair on each transport and an application at each end.
fn plan() -> Plan {
    let [a, b]: [qkd_keyfile::NodeId; 2] = ["alice", "bob"].map(|id| id.parse().unwrap());
    let pairs = [
        ("serial", Transport::Serial),
        ("files", Transport::Files),
        ("ring", Transport::SharedMemory),
    ];
    let pairs = pairs.map(|(name, transport)| PairPlan {
        name: name.to_owned(),
        transport,
        block_bits: 16_384,
        pace: 60.0,
    });
    Plan {
        nodes: vec![a.clone(), b.clone()],
        links: vec![LinkPlan {
            a: a.clone(),
            b: b.clone(),
            pairs: pairs.to_vec(),
        }],
        stock: None,
        apps: vec![("app-a".parse().unwrap(), a), ("app-b".parse().unwrap(), b)],
        key_memory_mib: 8,
    }
}

const FAULTS: &str = "\n[module_pair.faults]\none_sided_per_million = 20000\n\
    differing_per_million = 15000\nempty_per_million = 20000\nreplayed_per_million = 20000\n\
    biased_per_million = 20000\ndrop_per_million = 20000\nduplicate_per_million = 20000\n\
    flip_per_million = 20000\nsplit_per_million = 10000\nreorder_per_million = 20000\n\
    stall_per_million = 5000\nhang_up_per_million = 10000\nstall_ms = 100\n";

/// Gives every module pair all faults, and no end of patience with pairs that differ.
fn plan_faults(network: &Network) {
    let text = fs::read_to_string(&network.sim).unwrap();
    let mut pairs = text.split("[[module_pair]]");
    let mut faulty = pairs.next().unwrap().to_owned();
    for pair in pairs {
        // Before the first half, which is a table of its own.
        let (settings, halves) = pair.split_once("\n[[module_pair.half]]").unwrap();
        faulty += &format!("[[module_pair]]{settings}{FAULTS}\n[[module_pair.half]]{halves}");
    }
    fs::write(&network.sim, faulty).unwrap();
    for node in &network.nodes {
        let text = fs::read_to_string(&node.config).unwrap();
        let patient = text.replace("[[link]]\n", "[[link]]\nmismatch_limit = 0\n");
        assert_ne!(patient, text);
        fs::write(&node.config, patient).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_every_fault_on_every_transport_both_ends_get_the_same_keys_or_none() {
    let mut net = Net::start_without_devices(plan(), plan_faults);
    net.running.start_devices(&net.network).await.unwrap();
    let has_key = |statuses: &[(String, Value)]| {
        statuses.iter().all(|(_, status)| {
            let bytes = &status["streams"]["alice--bob"]["encrypting_bytes"];
            bytes.as_u64().unwrap_or(0) > 64 << 10
        })
    };
    net.wait_until("key", Duration::from_secs(60), has_key)
        .await;
    let [a, b] = ["app-a", "app-b"].map(|id| application(&net.network, id).unwrap());
    let tally = Tally::default();
    let until = Instant::now() + Duration::from_secs(6);
    let every = Duration::from_millis(20);
    load::run(a, b, until, every, &tally).await.unwrap();
    let counts = tally.counts();
    assert_eq!(counts.different, 0, "{counts:?}");
    assert!(counts.equal > 100, "{counts:?}");
    for (node, status) in statuses(&net.network).await {
        let stream = &status["streams"]["alice--bob"];
        assert_eq!(stream["imbalance_bits"], 0, "{node}");
        // Blocks that differ were found, and so was damage on each transport.
        assert!(
            stream["mismatched_segments"].as_u64().unwrap() >= 1,
            "{node}: {stream:#}"
        );
        for pair in ["serial", "files", "ring"] {
            let module = &status["modules"][pair];
            assert!(
                module["blocks"].as_u64().unwrap() > 50,
                "{node} {pair}: {module:#}"
            );
            // Of a file a bit that is flipped is most likely key, and half of one is waited for.
            let corrupt = module["corrupt_blocks"].as_u64().unwrap();
            assert!(corrupt >= 1 || pair == "files", "{node} {pair}: {module:#}");
        }
    }
    net.running.stop().await.unwrap();
}
