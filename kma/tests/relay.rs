//! Units that travel over chains of KMAs.

mod common;

use std::collections::BTreeSet;

use common::{
    Network, app, bytes, chain, check_ledgers, feed, feed_chain, hop_on_the_wire, node, three,
};
use qkd_keyfile::StreamId;
use qkd_kma::{Alarm, Purpose, Record, RelayPolicies, RelayPolicy, SupplyError};

#[test]
fn end_to_end_stock_is_relayed_ahead_of_demand_and_serves_both_directions() {
    let mut net = three(2);
    feed(&mut net, 0, 24);
    net.run(40);
    assert_eq!(net.stock("alice", "bob"), 4096);
    assert_eq!(net.stock("bob", "alice"), 4096);
    for (from, to) in [("alice", "bob"), ("bob", "alice")] {
        let keys = net.supply(from, to, 20, 256).unwrap();
        let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
        let fetched = net.fetch(to, from, &ids).unwrap();
        for (one, other) in keys.iter().zip(&fetched) {
            assert!(one.key.ct_eq(&other.key));
        }
    }
    net.check_books();
}

#[test]
fn a_relayed_key_needs_the_level_any_for_its_bits_are_the_systems() {
    let mut net = three(3);
    feed(&mut net, 0, 16);
    net.run(40);
    let order = qkd_kma::SupplyOrder {
        order: 77,
        master: app("app-alice"),
        destination: node("bob"),
        applications: vec![app("app-bob")],
        number: 1,
        size: 256.try_into().unwrap(),
        level: qkd_keyfile::metadata::SecurityLevel::Qkd,
    };
    net.input(&node("alice"), qkd_kma::Input::Supply(order));
    assert!(matches!(
        net.answer("alice", 77),
        Some(Err(SupplyError::NotEnoughKey { .. }))
    ));
}

#[test]
fn without_pad_no_unit_leaves_and_with_pad_again_stock_grows_again() {
    let mut net = three(4);
    for id in 0..6 {
        net.deliver_both("alice", "relay", id, 2048);
    }
    net.run(60);
    assert_eq!(net.stock("alice", "bob"), 0);
    for id in 0..24 {
        net.deliver_both("relay", "bob", id, 2048);
        net.deliver_both("alice", "relay", 100 + id, 2048);
    }
    net.run(300);
    assert_eq!(net.stock("alice", "bob"), 4096);
    net.check_books();
}

#[test]
fn with_the_relay_gone_supply_goes_on_until_the_stock_ends() {
    let mut net = three(5);
    feed(&mut net, 0, 24);
    net.run(40);
    net.crash(&node("relay"));
    let mut served = 0;
    while let Ok(keys) = net.supply("alice", "bob", 8, 256) {
        let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
        served += net.fetch("bob", "alice", &ids).unwrap().len();
    }
    assert_eq!(served, 4096 / 32);
    assert!(matches!(
        net.supply("alice", "bob", 1, 256),
        Err(SupplyError::NotEnoughKey { .. })
    ));
}

#[test]
fn longer_chains_serve_both_ends_with_the_same_keys() {
    for names in [
        &["alice", "r1", "r2", "bob"][..],
        &["alice", "r1", "r2", "r3", "bob"][..],
    ] {
        let mut net = Network::new(chain(names, 4096), 20);
        net.start_all();
        feed_chain(&mut net, names, 0, 24);
        net.run(60);
        for (from, to) in [("alice", "bob"), ("bob", "alice")] {
            assert_eq!(net.stock(from, to), 4096);
            let keys = net.supply(from, to, 20, 256).unwrap();
            let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
            let fetched = net.fetch(to, from, &ids).unwrap();
            for (one, other) in keys.iter().zip(&fetched) {
                assert!(one.key.ct_eq(&other.key));
            }
        }
        net.run(40);
        net.check_books();
        check_ledgers(&net, names);
        assert!(names.iter().all(|n| net.nodes[&node(n)].alarms.is_empty()));
    }
}

#[test]
fn a_node_that_relays_for_nobody_carries_nothing_and_says_so() {
    let mut configs = chain(&["alice", "relay", "bob"], 4096);
    configs[1].relay = RelayPolicies::new(RelayPolicy {
        transit: false,
        ..RelayPolicy::default()
    });
    let mut net = Network::new(configs, 21);
    net.start_all();
    feed(&mut net, 0, 16);
    net.run(100);
    assert_eq!(
        (net.stock("alice", "bob"), net.stock("bob", "alice")),
        (0, 0)
    );
    let discarded = |net: &Network| {
        let books = net.kma("alice").status().streams;
        books
            .iter()
            .map(|s| s.accounts.discarded_segments)
            .sum::<u64>()
    };
    let after = discarded(&net);
    assert!(
        (1..60).contains(&after),
        "{after} units, with pauses between them"
    );
    for end in ["alice", "bob"] {
        let link = qkd_keyfile::LinkId::between(&node("relay"), &node(end)).unwrap();
        let stream = StreamId::Link(link);
        let books = net.kma("relay").store().accounts();
        let books = books.iter().find(|b| b.stream == stream).unwrap();
        let own = books.accounts.pad_bits;
        // What came in was followed; nothing of its own left.
        let taken = net
            .ledger("relay")
            .into_iter()
            .any(|record| matches!(record, Record::Taken { stream: s, .. } if s == stream));
        assert!(own > 0 && !taken);
    }
    net.check_books();
}

#[test]
fn a_route_with_a_loop_or_a_stranger_carries_nothing() {
    let ways = [
        (&["alice", "relay", "alice", "relay", "bob"][..], false),
        (&["alice", "bob"], false),
        (&["relay", "bob"], false),
        (&["alice", "stranger", "bob"], false),
        (&["alice", "relay", "stranger", "bob"], true),
        (&["alice", "relay", "relay", "bob"], false),
    ];
    for (way, leaves) in ways {
        let mut configs = chain(&["alice", "relay", "bob"], 4096);
        let remote = configs[0].remotes.get_mut(&node("bob")).unwrap();
        remote.route = Some(way.iter().map(|n| node(n)).collect());
        let mut net = Network::new(configs, 22);
        net.start_all();
        feed(&mut net, 0, 8);
        net.run(60);
        assert_eq!(net.stock("alice", "bob"), 0, "{way:?}");
        let pad = |r: &Record| {
            matches!(
                r,
                Record::Taken {
                    purpose: Purpose::Pad,
                    ..
                }
            )
        };
        assert_eq!(net.ledger("alice").iter().any(pad), leaves, "{way:?}");
        net.check_books();
    }
}

#[test]
fn a_hop_that_is_altered_anywhere_burns_no_pad_and_is_alarmed() {
    let mut net = three(23);
    feed(&mut net, 0, 8);
    let hop = hop_on_the_wire(&mut net, "alice", "relay");
    net.run(0);
    let relay = node("relay");
    let before = net.kma("relay").status().streams;
    let mut alarms = 0;
    for at in 0..hop.len() {
        for bit in [0x01, 0x80] {
            let mut bytes = hop.clone();
            bytes[at] ^= bit;
            let peer = node("alice");
            net.input(&relay, qkd_kma::Input::Message { peer, bytes });
            let raised = std::mem::take(&mut net.nodes.get_mut(&relay).unwrap().alarms);
            let expected = raised
                .iter()
                .all(|alarm| matches!(alarm, Alarm::BadTag { .. } | Alarm::PadMisuse { .. }));
            assert!(expected, "byte {at}: {raised:?}");
            alarms += raised.len();
            assert_eq!(net.kma("relay").status().streams, before, "byte {at}");
        }
    }
    // Ciphertext and tag, at least: whatever is altered in them is found by the tag.
    assert!(alarms > 2 * 560, "{alarms} alarms");
    let peer = node("alice");
    net.input(&relay, qkd_kma::Input::Message { peer, bytes: hop });
    assert_ne!(
        net.kma("relay").status().streams,
        before,
        "the hop itself is taken"
    );
    net.run(40);
    net.check_books();
}

#[test]
fn a_hop_comes_again_byte_for_byte_in_its_session_and_never_in_another() {
    let mut net = three(24);
    feed(&mut net, 0, 8);
    let lost = hop_on_the_wire(&mut net, "alice", "relay");
    let count = |net: &Network, lost: &Vec<u8>| {
        let heard = net.heard.as_ref().unwrap();
        heard.iter().filter(|(_, _, bytes)| bytes == lost).count()
    };
    net.heard = Some(Vec::new());
    net.run(30);
    assert_eq!(count(&net, &lost), 1, "said again, and acknowledged");

    let mut net = three(25);
    feed(&mut net, 0, 8);
    let lost = hop_on_the_wire(&mut net, "bob", "relay");
    net.disconnect(&node("bob"), &node("relay"));
    net.heard = Some(Vec::new());
    net.run(30);
    net.connect(&node("bob"), &node("relay"));
    let again = hop_on_the_wire(&mut net, "bob", "relay");
    assert_eq!(again, lost, "a connection ends, the session goes on");

    net.heard = Some(Vec::new());
    net.crash(&node("relay"));
    net.start(&node("relay"));
    net.run(60);
    assert_eq!(count(&net, &lost), 0, "another session");
    net.check_books();
    check_ledgers(&net, &["alice", "relay", "bob"]);
}

#[test]
fn no_message_shows_a_key() {
    let mut net = three(25);
    net.heard = Some(Vec::new());
    feed(&mut net, 0, 24);
    net.run(40);
    let mut windows = BTreeSet::new();
    for (from, to) in [
        ("alice", "bob"),
        ("bob", "alice"),
        ("alice", "relay"),
        ("relay", "bob"),
    ] {
        let keys = net.supply(from, to, 30, 256).unwrap();
        let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
        net.fetch(to, from, &ids).unwrap();
        for key in keys {
            windows.extend(bytes(&key.key).windows(16).map(<[u8]>::to_vec));
        }
    }
    assert_eq!(windows.len(), 4 * 30 * 17);
    let heard = net.heard.take().unwrap();
    assert!(heard.iter().map(|(_, _, bytes)| bytes.len()).sum::<usize>() > 20_000);
    for (from, to, bytes) in &heard {
        let shown = bytes.windows(16).any(|window| windows.contains(window));
        assert!(!shown, "{from} to {to}");
    }
}
