//! Whole nodes whose modules deliver short and odd QKD-keys: key for applications comes out of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::time::{Duration, Instant};

use qkd_bridge::demo::{LinkPlan, PairPlan, Plan, Transport, application, statuses};
use qkd_keyfile::{AppId, NodeId};
use subtle::ConstantTimeEq;
use support::Net;

/// For what takes a few seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn plan(transport: Transport, block_bits: u32, pace: f64) -> Plan {
    let [a, b]: [NodeId; 2] = ["alice", "bob"].map(|id| id.parse().unwrap());
    let [app_a, app_b]: [AppId; 2] = ["app-a", "app-b"].map(|id| id.parse().unwrap());
    let pair = PairPlan {
        name: "pair".to_owned(),
        transport,
        block_bits,
        pace,
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

/// Applications at both ends get the same keys, from modules that deliver nothing longer than this.
async fn keys_come_out(transport: Transport, block_bits: u32, pace: f64) {
    let mut net = Net::start(plan(transport, block_bits, pace)).await;
    let [mut a, mut b] = ["app-a", "app-b"].map(|id| application(&net.network, id).unwrap());
    let began = Instant::now();
    let ours = loop {
        match a.enc_keys(b.id(), 16, 256).await {
            Ok(keys) => break keys,
            Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
        }
        net.running.check().unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let ids: Vec<&str> = ours.iter().map(|key| key.id.as_str()).collect();
    let theirs = b.dec_keys(a.id(), &ids).await.unwrap();
    assert_eq!((ours.len(), theirs.len()), (16, 16));
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!(bool::from(ours.key.ct_eq(&theirs.key)), "{}", ours.id);
    }
    for (node, status) in statuses(&net.network).await {
        let stream = &status["streams"]["alice--bob"];
        assert_eq!(stream["mismatched_segments"], 0, "{node}");
        assert_eq!(stream["imbalance_bits"], 0, "{node}");
        assert_eq!(status["module_pairs"]["pair"]["stopped"], false, "{node}");
    }
    net.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn modules_that_deliver_256_bits_at_a_time_give_key() {
    keys_come_out(Transport::Serial, 256, 500.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn modules_that_deliver_odd_bit_counts_give_key() {
    keys_come_out(Transport::Files, 7636, 40.0).await;
}
