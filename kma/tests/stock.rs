//! End-to-end stock as whole agents keep it: it follows what is asked for, and a link that is short is
//! shared fairly.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::collections::BTreeMap;

use common::{Network, chain, feed, node, pair_name};
use qkd_kma::{KmaConfig, LinkConfig, RemoteConfig, StockLimits, StockStatus};

const LIMITS: StockLimits = StockLimits {
    min_bytes: 1024,
    max_bytes: 32 << 10,
};

fn stock(net: &Network, at: &str, with: &str) -> StockStatus {
    let stocks = net.kma(at).status().stocks;
    stocks.into_iter().find(|s| s.with == node(with)).unwrap()
}

#[test]
fn a_stock_rises_with_what_is_asked_for_and_keeps_to_its_limits() {
    let mut configs = chain(&["alice", "relay", "bob"], 0);
    for config in &mut configs {
        for remote in config.remotes.values_mut() {
            remote.stock = LIMITS;
        }
    }
    let mut net = Network::new(configs, 41);
    net.start_all();
    feed(&mut net, 0, 60);
    net.run(40);
    let idle = stock(&net, "alice", "bob");
    assert_eq!((idle.target_bytes, idle.demand_bytes_per_second), (1024, 0));
    assert_eq!(idle.stock_bytes, 1024);

    let mut id = 60;
    for _ in 0..40 {
        // One kilobyte a second.
        feed(&mut net, id, 4);
        id += 4;
        let keys = net.supply("alice", "bob", 32, 256).unwrap_or_default();
        net.run(20);
        let ids: Vec<_> = keys.iter().map(|key| key.key_id).collect();
        assert!(ids.is_empty() || net.fetch("bob", "alice", &ids).is_ok());
    }
    let busy = stock(&net, "alice", "bob");
    assert!(
        (900..=1024).contains(&busy.demand_bytes_per_second),
        "{busy:?}"
    );
    assert!((16_000..=30_000).contains(&busy.target_bytes), "{busy:?}");
    assert!(busy.stock_bytes + 1024 >= busy.target_bytes, "{busy:?}");
    // The other direction was not asked for.
    assert_eq!(stock(&net, "bob", "alice").target_bytes, 1024);

    let refused = net.supply("alice", "bob", 1024, 512);
    assert!(refused.is_err());
    assert_eq!(stock(&net, "alice", "bob").refused_bytes, 65_536);
    net.run(60);
    assert_eq!(stock(&net, "alice", "bob").target_bytes, LIMITS.max_bytes);
    net.check_books();
}

/// Alice and carol keep stock with bob, both over the relay.
fn fork() -> Vec<KmaConfig> {
    let ends = ["alice", "bob", "carol"];
    let link = |a: &str, b: &str| LinkConfig {
        module_pairs: vec![pair_name(a, b).parse().unwrap()],
        floor_bytes: 64,
        capacity_bytes: 1 << 20,
        segment_bytes: 1,
        gather: std::time::Duration::ZERO,
        mismatch_limit: 8,
    };
    let mut configs: Vec<KmaConfig> = ends
        .iter()
        .map(|end| KmaConfig {
            node: node(end),
            neighbours: BTreeMap::from([(node("relay"), link(end, "relay"))]),
            remotes: BTreeMap::new(),
            relay: qkd_kma::RelayPolicies::default(),
            digest_unit_bytes: 32,
        })
        .collect();
    for (at, unit_bytes) in [(0, 512), (2, 1024)] {
        let route = [ends[at], "relay", "bob"].map(node).to_vec();
        let remote = RemoteConfig {
            stock: StockLimits::fixed(512 << 10),
            unit_bytes,
            route: Some(route),
        };
        configs[at].remotes.insert(node("bob"), remote);
    }
    let links = ends.iter().map(|end| (node(end), link(end, "relay")));
    configs.push(KmaConfig {
        node: node("relay"),
        neighbours: links.collect(),
        remotes: BTreeMap::new(),
        relay: qkd_kma::RelayPolicies::default(),
        digest_unit_bytes: 32,
    });
    configs
}

#[test]
fn a_way_station_shares_a_short_link_fairly_between_the_pairs_behind_it() {
    let mut net = Network::new(fork(), 42);
    net.start_all();
    // Both ways to the relay have plenty, the one from it to bob has little.
    for id in 0..100 {
        net.deliver_both("alice", "relay", id, 8192);
        net.deliver_both("carol", "relay", id, 8192);
    }
    net.run(10);
    for id in 100..400 {
        net.deliver_both("relay", "bob", id, 2048);
        net.run(4);
    }
    let [alice, carol] = ["alice", "carol"].map(|from| stock(&net, from, "bob").stock_bytes);
    let all = alice + carol;
    assert!(all > 100 << 10, "{all} only");
    // Units of twice the length make no greater share.
    assert!(
        alice * 100 >= all * 40 && carol * 100 >= all * 40,
        "{alice} and {carol}"
    );
    net.check_books();
}
