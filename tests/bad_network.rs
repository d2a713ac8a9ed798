//! Whole networks, a process per node, over connections that are late, silent, broken or lossy.
//!
//! However bad the network: every key that the source was given reaches the destination, equal; when
//! it heals, both ends agree about every stream; and their ledgers show no bit used twice.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    time::{Duration, Instant},
};

use qkd_bridge::demo::{
    Network, Plan, application,
    load::{self, Counts, Tally},
    stock_bytes,
};
use serde_json::Value;
use support::{
    Net, ledgers,
    namespaces::{self, Namespaces},
    proxy::{Proxy, Random, Weather},
};
use tokio::{
    task::JoinHandle,
    time::{sleep, sleep_until},
};

/// For what takes seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// When the network is bad, a peer counts as gone soon, so that the test sees it.
const DEAD_AFTER_MS: u64 = 1500;

/// Alice and bob keep 64 KiB with each other in each direction, over the relay.
fn plan() -> Plan {
    let mut plan = Plan::demo();
    let stock = plan.stock.as_mut().unwrap();
    (stock.min_kib, stock.unit_bytes) = (64, 4096);
    plan
}

fn filled(statuses: &[(String, Value)]) -> bool {
    let stocks = [("alice", "bob"), ("bob", "alice")];
    let full = |&(from, to): &(_, _)| stock_bytes(statuses, from, to) >= 60 << 10;
    stocks.iter().all(full)
}

/// Changes the configuration of a node.
fn edit(network: &Network, node: &str, change: impl FnOnce(String) -> String) {
    let path = &network.node(node).unwrap().config;
    let text = fs::read_to_string(path).unwrap();
    let changed = change(text.clone());
    assert_ne!(text, changed, "{node}: nothing was changed");
    fs::write(path, changed).unwrap();
}

/// Lets nodes notice soon that a peer is gone.
fn notice_soon(network: &Network) {
    for node in &network.nodes {
        edit(network, node.id.as_str(), |text| {
            text.replace(
                "[kx]\n",
                &format!("[kx]\ndead_after_ms = {DEAD_AFTER_MS}\n"),
            )
        });
    }
}

/// Lets one node dial another at another address.
fn dial_instead(network: &Network, dialler: &str, listener: &str, address: &str) {
    let kx = network.node(listener).unwrap().kx;
    edit(network, dialler, |text| {
        text.replace(
            &format!("id = \"{listener}\"\naddress = \"{kx}\""),
            &format!("id = \"{listener}\"\naddress = \"{address}\""),
        )
    });
}

type Loading = JoinHandle<(Result<(), String>, Counts)>;

/// The applications at alice and bob fetch keys for a time, as fast as the nodes give them but for
/// a pause.
fn load_for(network: &Network, time: Duration) -> Loading {
    let [a, b] = ["app-a", "app-b"].map(|id| application(network, id).unwrap());
    tokio::spawn(async move {
        let tally = Tally::default();
        let every = Duration::from_millis(100);
        let result = load::run(a, b, Instant::now() + time, every, &tally).await;
        (result.map_err(|error| error.to_string()), tally.counts())
    })
}

/// What must hold after any load: all that the source was given, the destination was given.
async fn all_equal(loading: Loading, at_least: u64) {
    let (result, counts) = loading.await.unwrap();
    println!("{counts:?}");
    assert_eq!(result, Ok(()));
    assert_eq!((counts.different, counts.missing), (0, 0), "{counts:?}");
    assert!(counts.equal >= at_least, "{counts:?}");
}

/// What must hold in the end: without new key both ends of every stream come to the same stock, no
/// bit is unaccounted for, nobody raised an alarm, and the ledgers show no bit used twice.
async fn ends_consistent(mut net: Net, uses_at_least: usize) {
    net.wait_until("stock after the storm", PATIENCE, filled)
        .await;
    for node in ["alice", "relay", "bob"] {
        net.running.kill(&format!("sim-{node}")).await.unwrap();
    }
    net.wait_until("both ends equal", PATIENCE, both_ends_equal)
        .await;
    net.running.stop().await.unwrap();
    for node in &net.network.nodes {
        let log = fs::read_to_string(net.network.dir.join(format!("{}.log", node.id))).unwrap();
        let alarms: Vec<_> = log.lines().filter(|line| line.contains("alarm=")).collect();
        assert!(alarms.is_empty(), "{}: {alarms:#?}", node.id);
    }
    let (boots, uses) = ledgers::check_all(&net.network);
    assert_eq!(boots, 3, "each node started once");
    assert!(
        uses >= uses_at_least,
        "{uses} uses only: the ledgers prove nothing"
    );
}

fn both_ends_equal(statuses: &[(String, Value)]) -> bool {
    let of = |node: &str, stream: &str, what: &str| {
        let status = statuses.iter().find(|(id, _)| id == node);
        status.map(|(_, status)| status["streams"][stream][what].as_u64())
    };
    let streams = [
        ("alice--relay", "alice", "relay"),
        ("bob--relay", "bob", "relay"),
        ("alice->bob", "alice", "bob"),
        ("bob->alice", "bob", "alice"),
    ];
    let balanced = statuses.iter().all(|(_, status)| {
        let mut streams = status["streams"].as_object().unwrap().values();
        status["inconsistencies"] == 0 && streams.all(|stream| stream["imbalance_bits"] == 0)
    });
    balanced
        && streams.into_iter().all(|(stream, a, b)| {
            let [enc, dec] = ["encrypting_bytes", "decrypting_bytes"];
            of(a, stream, enc) == of(b, stream, dec) && of(b, stream, enc) == of(a, stream, dec)
        })
}

/// Who dials whom: the node with the smaller ID.
const DIALS: [(&str, &str); 3] = [("alice", "bob"), ("alice", "relay"), ("bob", "relay")];

#[tokio::test(flavor = "multi_thread")]
async fn delay_jitter_resets_and_half_open_connections_lose_no_key_and_both_ends_stay_equal() {
    let seed = std::env::var("QKD_SEED").map_or(7, |seed| seed.parse().unwrap());
    println!("QKD_SEED={seed}");
    let mut random = Random(seed);
    let late = Weather {
        latency: Duration::from_millis(50),
        jitter: Duration::from_millis(20),
        slices: Some(512..=8192),
        ..Weather::FAIR
    };
    // The proxies must listen before the nodes' files name them, and the targets be known before.
    let mut proxies = Vec::new();
    let mut net = Net::prepare(plan());
    for (dialler, listener) in DIALS {
        let target = net.network.node(listener).unwrap().kx;
        let proxy = Proxy::start(target, late.clone(), random.next()).await;
        dial_instead(&net.network, dialler, listener, &proxy.address.to_string());
        proxies.push(proxy);
    }
    notice_soon(&net.network);
    net.start_nodes();
    net.running.start_devices(&net.network).await.unwrap();
    net.wait_until("stock", PATIENCE, filled).await;

    let storm = Duration::from_secs(10);
    let loading = load_for(&net.network, storm);
    let end = tokio::time::Instant::now() + storm;
    while tokio::time::Instant::now() < end {
        let proxy = &proxies[usize::try_from(random.next() % 3).unwrap()];
        match random.next() % 4 {
            0 => proxy.reset(),
            1 => proxy.leave_the_dialler_alone(),
            2 => proxy.leave_the_listener_alone(),
            _ => {
                proxy.set(Weather {
                    partition: true,
                    ..late.clone()
                });
                sleep(Duration::from_millis(random.next() % 1000)).await;
                proxy.set(late.clone());
            }
        }
        sleep(Duration::from_millis(200 + random.next() % 600)).await;
        net.running.check().unwrap();
    }
    // How much gets through depends on what broke; that little does is a hang.
    all_equal(loading, 1024).await;

    // Everybody is cut off from everybody, for longer than a silence is borne: what is in stock is
    // supplied, and fetched when the network is back (the load is three requests ahead at most).
    net.wait_until("stock", PATIENCE, filled).await;
    let loading = load_for(&net.network, Duration::from_secs(5));
    for proxy in &proxies {
        proxy.set(Weather {
            partition: true,
            ..late.clone()
        });
    }
    sleep(Duration::from_secs(5)).await;
    for proxy in &proxies {
        proxy.set(late.clone());
    }
    all_equal(loading, 3 * 128).await;
    ends_consistent(net, 1000).await;
}

/// Set where this test runs in a network namespace of its own.
const INSIDE: &str = "QKD_TEST_INSIDE_NAMESPACE";

#[test]
fn packets_lost_and_five_seconds_of_partition_lose_no_key_and_both_ends_stay_equal() {
    let name = "packets_lost_and_five_seconds_of_partition_lose_no_key_and_both_ends_stay_equal";
    if std::env::var_os(INSIDE).is_none() {
        return namespaces::run_inside(name, INSIDE);
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(lossy());
}

/// One in a hundred packets between the nodes gets lost, then all of them for five seconds.
async fn lossy() {
    let mut net = Net::prepare(plan());
    let names = ["alice", "relay", "bob"];
    let spaces = Namespaces::new(&net.network.dir, support::program(), &names);
    let mut proxies = Vec::new();
    for name in names {
        let (hub, own) = (spaces.hub_address(name), spaces.address(name));
        let controller = net.network.controller.as_ref().unwrap().1;
        let node = net.network.node(name).unwrap();
        let (https, kx) = (node.https, node.kx);
        edit(&net.network, name, |mut text| {
            for other in names {
                let kx = net.network.node(other).unwrap().kx;
                let there = format!("{}:{}", spaces.address(other), kx.port());
                text = text.replace(&kx.to_string(), &there);
            }
            text.replace(&https.to_string(), &format!("{own}:{}", https.port()))
                .replace(
                    &controller.to_string(),
                    &format!("{hub}:{}", controller.port()),
                )
        });
        println!("{name}: {own}, Kx at {kx}");
        // Certificates are for loopback, so applications go there.
        let target = format!("{own}:{}", https.port()).parse().unwrap();
        proxies.push(Proxy::start_at(https, target, Weather::FAIR, 0).await);
    }
    let (controller, address) = net.network.controller.as_ref().unwrap();
    let text = fs::read_to_string(controller).unwrap();
    let everywhere = format!("0.0.0.0:{}", address.port());
    fs::write(controller, text.replace(&address.to_string(), &everywhere)).unwrap();
    notice_soon(&net.network);
    net.start_nodes_with(&spaces.program);
    net.running.start_devices(&net.network).await.unwrap();
    net.wait_until("stock", PATIENCE, filled).await;

    spaces.lose_one_in(100);
    let start = tokio::time::Instant::now();
    let loading = load_for(&net.network, Duration::from_secs(6));
    sleep_until(start + Duration::from_secs(6)).await;
    all_equal(loading, 2048).await;
    let lost = spaces.packets_lost();
    assert!(lost > 0, "no packet was lost");

    let loading = load_for(&net.network, Duration::from_secs(5));
    spaces.lose_one_in(1);
    sleep(Duration::from_secs(5)).await;
    spaces.lose_one_in(100);
    all_equal(loading, 3 * 128).await;
    println!(
        "{lost} packets lost before the partition, {} in all",
        spaces.packets_lost()
    );
    spaces.lose_none();
    ends_consistent(net, 1000).await;
}
