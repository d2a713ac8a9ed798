//! Two KMAs that agree on keys and supply them, in one process and in no time.

mod common;

use std::collections::BTreeSet;

use common::{Network, app, bytes, chain, node, pair_name, qkd_key, two};
use qkd_kma::{Alarm, Settlement, SupplyError};

#[test]
fn qkd_keys_that_both_ends_hold_become_segments_owned_half_and_half() {
    let mut net = two();
    for id in 0..10 {
        net.deliver_both("alice", "bob", id, 1032);
    }
    net.run(20);
    assert_eq!(net.link_stock("alice", "bob"), 5 * 1000);
    assert_eq!(net.link_stock("bob", "alice"), 5 * 1000);
    for end in ["alice", "bob"] {
        let settled = &net.nodes[&node(end)].settled;
        assert_eq!(settled.len(), 10);
        assert!(settled.values().all(|s| *s == Settlement::Stored));
        assert!(net.nodes[&node(end)].alarms.is_empty());
    }
    net.check_books();
}

#[test]
fn a_share_that_nobody_uses_does_not_starve_the_other() {
    let mut configs = chain(&["alice", "bob"], 0);
    let capacity_bytes = 16 * 1024;
    for link in configs.iter_mut().flat_map(|c| c.neighbours.values_mut()) {
        link.capacity_bytes = capacity_bytes;
    }
    let mut net = Network::new(configs, 1);
    net.start_all();
    // Only alice takes keys, many times what the link holds; bob's half stays.
    let (mut id, mut taken_bytes) = (0, 0);
    while taken_bytes < 4 * capacity_bytes {
        for _ in 0..8 {
            net.deliver_both("alice", "bob", id, 1056);
            id += 1;
        }
        net.run(20);
        assert!(
            net.supply("alice", "bob", 16, 1024).is_ok(),
            "{taken_bytes}"
        );
        taken_bytes += 16 * 128;
    }
    assert!(net.link_stock("bob", "alice") <= capacity_bytes / 2 + 2048);
    net.check_books();
}

#[test]
fn a_qkd_key_that_differs_is_discarded_at_both_ends_with_an_alarm() {
    let mut net = two();
    let name = qkd_key("alice-bob", "5");
    let mut key = vec![7; 1024];
    net.deliver(&node("alice"), &name, &key);
    key[1000] ^= 1;
    net.deliver(&node("bob"), &name, &key);
    net.deliver_both("alice", "bob", 6, 1024);
    net.run(20);
    for (end, peer) in [("alice", "bob"), ("bob", "alice")] {
        let state = &net.nodes[&node(end)];
        assert_eq!(state.settled[&name], Settlement::Dropped);
        let alarm = Alarm::Mismatch {
            peer: node(peer),
            module_pair: "alice-bob".parse().unwrap(),
            qkd_keys: vec![name.id.clone()],
        };
        assert_eq!(state.alarms, [alarm]);
    }
    let stock = net.link_stock("alice", "bob") + net.link_stock("bob", "alice");
    assert_eq!(stock, 1024 - 32);
    net.check_books();
}

#[test]
fn a_qkd_key_that_one_end_lacks_yields_nothing_and_is_dropped() {
    let mut net = two();
    let orphan = qkd_key("alice-bob", "0");
    net.deliver(&node("alice"), &orphan, &[1; 512]);
    net.run(5);
    for id in 1..80 {
        net.deliver_both("alice", "bob", id, 64);
    }
    net.run(30);
    assert_eq!(
        net.nodes[&node("alice")].settled.get(&orphan),
        Some(&Settlement::Dropped)
    );
    net.check_books();
}

#[test]
fn a_qkd_key_that_comes_to_one_end_after_many_later_ones_is_agreed_all_the_same() {
    let mut net = two();
    let late = qkd_key("alice-bob", "0");
    net.deliver(&node("alice"), &late, &[1; 512]);
    for id in 1..80 {
        net.deliver_both("alice", "bob", id, 64);
    }
    net.run(10);
    net.deliver(&node("bob"), &late, &[1; 512]);
    net.run(60);
    for end in ["alice", "bob"] {
        let settled = net.nodes[&node(end)].settled.get(&late);
        assert_eq!(settled, Some(&Settlement::Stored), "{end}");
    }
    net.check_books();
}

#[test]
fn an_id_that_came_in_once_never_comes_in_again_also_after_a_restart() {
    let mut net = two();
    net.deliver_both("alice", "bob", 1, 1024);
    net.run(10);
    let before = net.link_stock("alice", "bob") + net.link_stock("bob", "alice");
    for victim in ["alice", "bob"] {
        net.crash(&node(victim));
        net.start(&node(victim));
    }
    net.deliver_both("alice", "bob", 1, 1024);
    net.run(30);
    let after = net.link_stock("alice", "bob") + net.link_stock("bob", "alice");
    assert_eq!(before, after);
    net.check_books();
}

#[test]
fn neighbours_share_keys_cut_from_their_link_and_both_get_the_same_bytes() {
    let mut net = two();
    net.deliver_both("alice", "bob", 1, 2048);
    net.deliver_both("alice", "bob", 2, 2048);
    net.run(10);
    let keys = net.supply("alice", "bob", 5, 256).unwrap();
    let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
    let fetched = net.fetch("bob", "alice", &ids).unwrap();
    let left: Vec<_> = keys.iter().map(|k| (k.key_id, bytes(&k.key))).collect();
    let right: Vec<_> = fetched.iter().map(|k| (k.key_id, bytes(&k.key))).collect();
    assert_eq!(left, right);
    let distinct: BTreeSet<_> = left.iter().map(|(_, k)| k.clone()).collect();
    assert_eq!(distinct.len(), 5);
    net.check_books();
}

#[test]
fn a_key_is_given_to_each_application_once_and_to_no_other() {
    let mut net = two();
    net.deliver_both("alice", "bob", 1, 2048);
    net.run(10);
    let ids: Vec<_> = net
        .supply("alice", "bob", 1, 256)
        .unwrap()
        .iter()
        .map(|k| k.key_id)
        .collect();
    net.run(2);
    let order = net.ask_by_id("bob", "app-c", "alice", &ids);
    assert_eq!(
        net.answer("bob", order).unwrap().unwrap_err(),
        SupplyError::NotForYou
    );
    assert!(net.fetch("bob", "alice", &ids).is_ok());
    assert_eq!(
        net.fetch("bob", "alice", &ids).unwrap_err(),
        SupplyError::UnknownKeyId
    );
}

#[test]
fn keys_asked_for_by_id_are_all_given_or_none() {
    let mut net = two();
    net.deliver_both("alice", "bob", 1, 2048);
    net.run(10);
    let keys = net.supply("alice", "bob", 1, 256).unwrap();
    let unknown = qkd_keyfile::KsaKeyId::from_random([9; 16]);
    let both = [keys[0].key_id, unknown];
    assert_eq!(
        net.fetch("bob", "alice", &both).unwrap_err(),
        SupplyError::UnknownKeyId
    );
    let twice = [keys[0].key_id, keys[0].key_id];
    assert_eq!(
        net.fetch("bob", "alice", &twice).unwrap_err(),
        SupplyError::UnknownKeyId
    );
    assert!(net.fetch("bob", "alice", &both[..1]).is_ok());
}

#[test]
fn a_destination_out_of_reach_of_the_source_says_so_and_consumes_nothing() {
    let mut net = two();
    net.deliver_both("alice", "bob", 1, 2048);
    net.run(10);
    net.disconnect(&node("alice"), &node("bob"));
    let keys = net.supply("alice", "bob", 1, 256).unwrap();
    let ids = [keys[0].key_id];
    assert_eq!(
        net.fetch("bob", "alice", &ids).unwrap_err(),
        SupplyError::Unreachable
    );
    net.connect(&node("alice"), &node("bob"));
    net.run(10);
    assert_eq!(
        bytes(&net.fetch("bob", "alice", &ids).unwrap()[0].key),
        bytes(&keys[0].key)
    );
}

#[test]
fn when_the_stock_is_short_an_order_gets_nothing_and_takes_nothing() {
    let mut net = two();
    net.deliver_both("alice", "bob", 1, 1024);
    net.run(10);
    let owner = if net.link_stock("alice", "bob") > 0 {
        ("alice", "bob")
    } else {
        ("bob", "alice")
    };
    let before = net.link_stock(owner.0, owner.1);
    assert!(matches!(
        net.supply(owner.0, owner.1, 31, 256),
        Err(SupplyError::NotEnoughKey { .. })
    ));
    assert_eq!(net.link_stock(owner.0, owner.1), before);
    // The floor stays: 992 bytes are 31 keys, but 64 bytes serve only tags.
    assert!(net.supply(owner.0, owner.1, 29, 256).is_ok());
    assert!(net.supply(owner.0, owner.1, 1, 256).is_err());
    net.check_books();
}

#[test]
fn a_key_longer_than_what_is_left_of_a_segment_burns_the_rest_at_both_ends() {
    let mut net = two();
    for id in 0..4 {
        net.deliver_both("alice", "bob", id, 132);
    }
    net.run(10);
    // 100 bytes a segment, two segments each end.
    let first = net.supply("alice", "bob", 1, 80 * 8).unwrap();
    let ids = [first[0].key_id];
    net.fetch("bob", "alice", &ids).unwrap();
    let second = net.supply("alice", "bob", 1, 32 * 8).unwrap();
    net.fetch("bob", "alice", &[second[0].key_id]).unwrap();
    net.run(40);
    net.check_books();
    let status = net.kma("bob").status();
    assert_eq!(status.streams[0].accounts.burned_bits, 20 * 8);
    assert_eq!(status.streams[0].accounts.supplied_bits, 112 * 8);
}

#[test]
fn a_long_key_does_not_burn_the_stock_that_is_too_short_for_it() {
    let mut net = two();
    for id in 0..40 {
        net.deliver_both("alice", "bob", id, 132);
    }
    net.deliver_both("alice", "bob", 90, 4096);
    net.deliver_both("alice", "bob", 91, 4096);
    net.run(30);
    let owner = |net: &Network, at: &str, with: &str| {
        let before = net.link_stock(at, with);
        (before > 4000).then_some(before)
    };
    let (at, with) = if owner(&net, "alice", "bob").is_some() {
        ("alice", "bob")
    } else {
        ("bob", "alice")
    };
    let before = net.link_stock(at, with);
    net.supply(at, with, 1, 2048 * 8).unwrap();
    assert_eq!(net.link_stock(at, with), before - 2048);
    net.check_books();
}

#[test]
fn an_order_for_nobody_or_for_too_many_is_refused_and_takes_nothing() {
    let mut net = two();
    net.deliver_both("alice", "bob", 1, 2048);
    net.deliver_both("alice", "bob", 2, 2048);
    net.run(10);
    let before = net.link_stock("alice", "bob");
    let ask = |net: &mut Network, number, applications: usize| {
        let names = (0..applications).map(|n| app(&format!("app-{n}")));
        let order = qkd_kma::SupplyOrder {
            order: 500,
            master: app("app-alice"),
            destination: node("bob"),
            applications: names.collect(),
            number,
            size: 64.try_into().unwrap(),
            level: qkd_keyfile::metadata::SecurityLevel::Qkd,
        };
        net.input(&node("alice"), qkd_kma::Input::Supply(order));
        net.answer("alice", 500).unwrap().map(|keys| keys.len())
    };
    for (number, applications) in [(1, 0), (0, 1), (1, 65), (100_000, 1), (u32::MAX, 1)] {
        let answer = ask(&mut net, number, applications);
        assert_eq!(
            answer,
            Err(SupplyError::BadOrder),
            "{number} {applications}"
        );
    }
    assert_eq!(net.link_stock("alice", "bob"), before);
    assert_eq!(ask(&mut net, 2, 64), Ok(2));
    net.run(20);
    assert_eq!(net.kma("alice").status().outbox_bindings, 0);
    assert_eq!(net.kma("bob").status().waiting_bindings, 2);
}

#[test]
fn an_application_named_twice_gets_its_key_once_and_the_key_is_done_with() {
    let mut net = two();
    net.deliver_both("alice", "bob", 1, 2048);
    net.run(10);
    let order = qkd_kma::SupplyOrder {
        order: 501,
        master: app("app-alice"),
        destination: node("bob"),
        applications: vec![app("app-bob"), app("app-bob")],
        number: 1,
        size: 256.try_into().unwrap(),
        level: qkd_keyfile::metadata::SecurityLevel::Qkd,
    };
    net.input(&node("alice"), qkd_kma::Input::Supply(order));
    let keys = net.answer("alice", 501).unwrap().unwrap();
    assert!(net.fetch("bob", "alice", &[keys[0].key_id]).is_ok());
    assert_eq!(net.kma("bob").status().waiting_bindings, 0);
}

#[test]
fn keys_that_both_ends_held_before_they_met_are_all_agreed() {
    let mut net = two();
    net.disconnect(&node("alice"), &node("bob"));
    // The IDs that only one end holds sort first: more than are waited for later.
    for id in 0..300 {
        net.deliver(
            &node("bob"),
            &qkd_key("alice-bob", &format!("a{id:05}")),
            &[7; 64],
        );
    }
    for id in 0..1500_u64 {
        let mut key = vec![0; 64];
        key[..8].copy_from_slice(&id.to_le_bytes());
        let name = qkd_key("alice-bob", &format!("b{id:05}"));
        net.deliver(&node("alice"), &name, &key);
        net.deliver(&node("bob"), &name, &key);
    }
    net.connect(&node("alice"), &node("bob"));
    net.run(20);
    let stored = net.nodes[&node("alice")].settled.values();
    assert_eq!(stored.filter(|s| **s == Settlement::Stored).count(), 1500);
    let stock = net.link_stock("alice", "bob") + net.link_stock("bob", "alice");
    assert_eq!(stock, 1500 * 32);
}

#[test]
fn more_bindings_than_one_window_arrive_and_more_marks_than_one_message() {
    let mut net = two();
    for id in 0..8600 {
        net.deliver_both("alice", "bob", id, 33);
    }
    net.deliver_both("alice", "bob", 8600, 8192);
    net.deliver_both("alice", "bob", 8601, 8192);
    net.run(20);
    // Marks of more than 4096 segments go out when a process of either end is new.
    for victim in ["alice", "bob"] {
        net.crash(&node(victim));
        net.start(&node(victim));
        net.run(2);
        assert!(net.supply("alice", "bob", 1, 8).is_ok(), "{victim}");
        assert!(net.supply("bob", "alice", 1, 8).is_ok(), "{victim}");
    }
    net.disconnect(&node("alice"), &node("bob"));
    let keys: Vec<_> = (0..5)
        .flat_map(|_| net.supply("alice", "bob", 1000, 8).unwrap())
        .collect();
    net.connect(&node("alice"), &node("bob"));
    net.run(20);
    assert_eq!(net.kma("alice").status().outbox_bindings, 0);
    assert_eq!(net.kma("bob").status().waiting_bindings, 5002);
    let last = keys.last().unwrap();
    let fetched = net.fetch("bob", "alice", &[last.key_id]).unwrap();
    assert!(fetched[0].key.ct_eq(&last.key));
    net.check_books();
}

#[test]
fn every_module_pair_of_a_link_has_its_turn() {
    let mut configs = chain(&["alice", "bob"], 0);
    for config in &mut configs {
        for link in config.neighbours.values_mut() {
            link.module_pairs.push("second".parse().unwrap());
            link.capacity_bytes = 150 * 992;
        }
    }
    let mut net = Network::new(configs, 31);
    net.start_all();
    net.disconnect(&node("alice"), &node("bob"));
    for id in 0..250_u64 {
        for pair in ["alice-bob", "second"] {
            let name = qkd_key(pair, &id.to_string());
            let key = [id.to_le_bytes(), [7; 8]].concat().repeat(64);
            net.deliver(&node("alice"), &name, &key);
            net.deliver(&node("bob"), &name, &key);
        }
    }
    net.connect(&node("alice"), &node("bob"));
    net.run(40);
    for pair in ["alice-bob", "second"] {
        let settled = &net.nodes[&node("alice")].settled;
        let stored = settled
            .iter()
            .filter(|(name, s)| name.module_pair.as_str() == pair && **s == Settlement::Stored);
        assert!(stored.count() >= 20, "{pair}");
    }
}

#[test]
fn the_name_of_a_module_pair_is_the_same_from_both_ends() {
    assert_eq!(pair_name("b", "a"), pair_name("a", "b"));
}
