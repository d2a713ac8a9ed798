//! Whole networks, a process per node: what happens when one is killed, and real key from hardware.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use qkd_bridge::demo::{
    Application, LinkPlan, Network, PairPlan, Plan, RequestError, Transport, application,
    load::{self, Tally},
    stock_bytes,
};
use serde_json::Value;
use subtle::ConstantTimeEq;
use support::{Net, ledgers};

/// For what takes a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Before something is tried again.
const PAUSE: Duration = Duration::from_millis(20);

/// How fast keys flow again after a node came back.
const BACK_WITHIN: Duration = Duration::from_secs(10);

/// The demonstration's network with a small stock, running and filled.
async fn filled() -> Net {
    let mut plan = Plan::demo();
    let stock = plan.stock.as_mut().unwrap();
    (stock.min_kib, stock.unit_bytes) = (64, 4096);
    let mut net = Net::start(plan).await;
    let filled = |statuses: &[(String, Value)]| {
        [("alice", "bob"), ("bob", "alice")]
            .into_iter()
            .all(|(from, to)| stock_bytes(statuses, from, to) >= 60 << 10)
    };
    net.wait_until("stock", PATIENCE, filled).await;
    net
}

fn two_ends(network: &Network) -> [Application; 2] {
    ["app-a", "app-b"].map(|id| application(network, id).unwrap())
}

/// Keys from end to end: all that the source is given, unless there are none to be had just now.
async fn carry([a, b]: &mut [Application; 2], number: usize) -> Result<usize, RequestError> {
    let ours = a.enc_keys(b.id(), number, 256).await?;
    let ids: Vec<&str> = ours.iter().map(|key| key.id.as_str()).collect();
    let theirs = loop {
        match b.dec_keys(a.id(), &ids).await {
            Ok(theirs) => break theirs,
            Err(RequestError::Connect(_) | RequestError::Refused { status: 503, .. }) => {
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => panic!("destination: {error}"),
        }
    };
    assert_eq!(theirs.len(), number);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours.id, theirs.id);
        assert!(bool::from(ours.key.ct_eq(&theirs.key)), "{}", ours.id);
    }
    Ok(number)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_relay_supply_goes_on_until_the_stock_ends_and_then_answers_503() {
    let mut net = filled().await;
    net.running.kill("relay").await.unwrap();
    let (mut ends, mut keys) = (two_ends(&net.network), 0);
    let refusal = loop {
        match carry(&mut ends, 64).await {
            Ok(number) => keys += number,
            Err(error) => break error,
        }
    };
    assert_eq!(refusal.status(), Some(503), "{refusal}");
    // 60 KiB are 1920 keys. Sixteen units more may have been past the relay.
    assert!((1856..=4160).contains(&keys), "{keys}");
    net.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_killed_under_load_comes_back_and_no_pad_is_used_twice() {
    let mut net = filled().await;
    for victim in ["alice", "relay", "bob"] {
        let [a, b] = two_ends(&net.network);
        let until = Instant::now() + Duration::from_secs(2);
        let loading = tokio::spawn(async move {
            let tally = Tally::default();
            let every = Duration::from_millis(20);
            let result = load::run(a, b, until, every, &tally).await;
            (result.map_err(|error| error.to_string()), tally.counts())
        });
        tokio::time::sleep(Duration::from_millis(700)).await;
        net.running.kill(victim).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        net.start_again(victim);
        let back = Instant::now();
        // Twice the stock, so that units must have been relayed anew.
        let (mut ends, mut keys) = (two_ends(&net.network), 0);
        while keys < 4096 {
            match carry(&mut ends, 128).await {
                Ok(number) => keys += number,
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
            net.running.check().unwrap();
            assert!(back.elapsed() < BACK_WITHIN, "{victim}: {keys} keys only");
        }
        let (result, counts) = loading.await.unwrap();
        assert_eq!(result, Ok(()), "{victim}");
        assert_eq!(counts.different, 0, "{victim}");
        assert!(counts.equal > 0, "{victim}");
    }
    net.running.stop().await.unwrap();
    let (boots, used) = ledgers::check_all(&net.network);
    assert_eq!(boots, 6, "three nodes, and each started twice");
    assert!(used > 1000, "{used} uses only: the ledgers prove nothing");
}

const SETS: [&str; 4] = ["ext_q2", "q12", "q4_1epoch", "s4_1"];

/// Two nodes that read a folder of qcrypto's files per set of real key.
fn two_nodes() -> Plan {
    let [a, b]: [qkd_keyfile::NodeId; 2] = ["alice", "bob"].map(|id| id.parse().unwrap());
    let pairs = SETS.map(|set| PairPlan {
        name: set.to_owned(),
        transport: Transport::Files,
        block_bits: 8192,
        pace: 1.0,
    });
    Plan {
        nodes: vec![a.clone(), b.clone()],
        links: vec![LinkPlan {
            a,
            b,
            pairs: pairs.to_vec(),
        }],
        stock: None,
        apps: Vec::new(),
        key_memory_mib: 8,
    }
}

/// Bits of the key files that are the same at both ends, without the one that is taken away.
fn equal_bits(data: &Path) -> u64 {
    let mut bits = 0;
    for file in SETS
        .iter()
        .flat_map(|set| fs::read_dir(data.join(set).join("alice")).unwrap())
        .map(|entry| entry.unwrap().path())
    {
        let peer = file.parent().unwrap().with_file_name("bob");
        let bytes = fs::read(&file).unwrap();
        let same = fs::read(peer.join(file.file_name().unwrap())).unwrap() == bytes;
        if same && !file.ends_with("s4_1/alice/0000cb00") {
            bits += u64::from(u32::from_le_bytes(bytes[12..16].try_into().unwrap()));
        }
    }
    bits
}

fn copy_files(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn real_key_files_are_confirmed_where_equal_and_discarded_where_they_differ() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/qcrypto");
    if !data.exists() {
        println!("no real key files beside this workspace");
        return;
    }
    let mut net = Net::start_without_devices(two_nodes(), |network| {
        for set in SETS {
            for node in &network.nodes {
                let from = data.join(set).join(node.id.as_str());
                copy_files(&from, &network.module(set, &node.id));
            }
        }
        // One that alice alone has.
        let bob = &network.nodes[1].id;
        fs::remove_file(network.module("s4_1", bob).join("0000cb00")).unwrap();
    });

    // 26 pairs in every set: one of q4_1epoch differs, one of s4_1 is one-sided now, q12 has no key.
    // Every bit of the others is agreed, but for the masks of the comparisons that failed on the way
    // to the one that differs, and fewer than 8 bits of each set, which wait for more.
    let bits = equal_bits(&data);
    let agreed = bits - 6 * 256 - 3 * 8..=bits;
    let all_done = |statuses: &[(String, Value)]| {
        statuses.len() == 2
            && statuses.iter().all(|(_, status)| {
                let received = &status["streams"]["alice--bob"]["received_bits"];
                agreed.contains(&received.as_u64().unwrap_or(0))
                    && status["modules"]["q12"]["empty_blocks"] == 26
            })
    };
    net.wait_until("all pairs", PATIENCE, all_done).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    net.wait_until("no more", Duration::ZERO, all_done).await;
    for (node, status) in qkd_bridge::demo::statuses(&net.network).await {
        let stream = &status["streams"]["alice--bob"];
        assert_eq!(stream["mismatched_segments"], 1, "{node}");
        assert_eq!(stream["imbalance_bits"], 0, "{node}");
        assert_eq!(status["modules"]["q12"]["blocks"], 0, "{node}");
        let log = fs::read_to_string(net.network.dir.join(format!("{node}.log"))).unwrap();
        let alarms: Vec<&str> = log.lines().filter(|line| line.contains("alarm=")).collect();
        let named = |line: &&str| line.contains("Mismatch") && line.contains("0000be38");
        assert!(alarms.len() == 1 && alarms.iter().all(named), "{alarms:#?}");
    }
    net.running.stop().await.unwrap();
}
