//! What crashes, restored copies and compactions leave behind.

mod common;

use common::{CopyableDisk, Faults, Network, chain, check_ledgers, feed, node, three, two};
use qkd_kma::{Alarm, Input, Record, SupplyError};

#[test]
fn a_memory_store_starts_empty_and_its_peers_void_what_they_shared() {
    let mut net = Network::new(chain(&["alice", "bob"], 0), 8);
    net.nodes.get_mut(&node("alice")).unwrap().volatile = true;
    net.start_all();
    for id in 0..6 {
        net.deliver_both("alice", "bob", id, 1032);
    }
    net.run(20);
    assert!(net.link_stock("bob", "alice") > 0);
    net.crash(&node("alice"));
    net.start(&node("alice"));
    net.run(20);
    assert_eq!(
        (
            net.link_stock("alice", "bob"),
            net.link_stock("bob", "alice")
        ),
        (0, 0)
    );
    for id in 10..16 {
        net.deliver_both("alice", "bob", id, 1032);
    }
    net.run(20);
    let keys = net.supply("bob", "alice", 2, 256).unwrap();
    assert!(net.fetch("alice", "bob", &[keys[0].key_id]).is_ok());
    net.check_books();
}

#[test]
fn a_node_restored_from_a_copy_uses_nothing_and_is_alarmed_at_both_ends() {
    // What happened between the copy and its return: keys given out, or pad used, or a segment
    // used up and closed.
    for (case, keys) in [("keys", 4), ("closed", 31 * 2)] {
        for (victim, other) in [("alice", "bob"), ("bob", "alice")] {
            let mut net = Network::new(chain(&["alice", "bob"], 0), 26);
            let disk = CopyableDisk::default();
            net.nodes.get_mut(&node(victim)).unwrap().copyable = Some(disk.clone());
            net.start_all();
            for id in 0..8 {
                net.deliver_both("alice", "bob", id, 1024);
            }
            net.run(20);
            let backup = disk.backup();
            for _ in 0..2 {
                let given = net.supply(victim, other, keys / 2, 256).unwrap();
                let ids: Vec<_> = given.iter().map(|k| k.key_id).collect();
                net.fetch(other, victim, &ids).unwrap();
            }
            net.run(40);
            net.crash(&node(victim));
            disk.restore(&backup);
            net.nodes.get_mut(&node(victim)).unwrap().alarms.clear();
            // Not even before the other end had a chance to see it.
            net.crash(&node(other));
            net.start(&node(victim));
            let first = net.supply(victim, other, 1, 256);
            assert_eq!(
                first.unwrap_err(),
                SupplyError::Unreachable,
                "{case} {victim}"
            );
            net.nodes.get_mut(&node(other)).unwrap().alarms.clear();
            net.start(&node(other));
            net.run(20);
            for (here, there) in [(victim, other), (other, victim)] {
                let alarm = Alarm::PeerRolledBack { peer: node(there) };
                assert_eq!(net.nodes[&node(here)].alarms, [alarm], "{case} {victim}");
                let refused = net.supply(here, there, 1, 256);
                assert_eq!(
                    refused.unwrap_err(),
                    SupplyError::Unreachable,
                    "{case} {victim}"
                );
            }
        }
    }
}

#[test]
fn a_destination_restored_from_a_copy_is_found_too() {
    let mut net = two();
    let disk = CopyableDisk::default();
    net.crash(&node("bob"));
    net.nodes.get_mut(&node("bob")).unwrap().copyable = Some(disk.clone());
    net.start(&node("bob"));
    for id in 0..8 {
        net.deliver_both("alice", "bob", id, 1024);
    }
    net.run(20);
    let backup = disk.backup();
    let given = net.supply("alice", "bob", 2, 256).unwrap();
    let ids: Vec<_> = given.iter().map(|k| k.key_id).collect();
    net.fetch("bob", "alice", &ids).unwrap();
    net.run(20);
    net.nodes.get_mut(&node("alice")).unwrap().alarms.clear();
    net.crash(&node("bob"));
    disk.restore(&backup);
    net.start(&node("bob"));
    net.run(20);
    // It would give out the same keys again to whom asks with their IDs.
    assert!(net.fetch("bob", "alice", &ids).is_err());
    let alarm = Alarm::PeerRolledBack { peer: node("bob") };
    assert_eq!(net.nodes[&node("alice")].alarms, [alarm]);
}

#[test]
fn a_copy_of_before_the_last_session_is_found_although_nothing_was_used_since() {
    for (victim, other) in [("alice", "bob"), ("bob", "alice")] {
        for restarted in [victim, other] {
            let mut net = Network::new(chain(&["alice", "bob"], 0), 28);
            let disk = CopyableDisk::default();
            net.nodes.get_mut(&node(victim)).unwrap().copyable = Some(disk.clone());
            net.start_all();
            for id in 0..8 {
                net.deliver_both("alice", "bob", id, 1024);
            }
            net.run(20);
            let backup = disk.backup();
            // A copy of the session that goes on lacks nothing, and is taken.
            net.crash(&node(victim));
            disk.restore(&backup);
            net.start(&node(victim));
            net.run(20);
            assert!(net.nodes.values().all(|node| node.alarms.is_empty()));
            let backup = disk.backup();
            net.crash(&node(restarted));
            net.start(&node(restarted));
            net.run(20);
            assert!(net.nodes.values().all(|node| node.alarms.is_empty()));
            net.crash(&node(victim));
            disk.restore(&backup);
            net.start(&node(victim));
            net.run(20);
            for (here, there) in [(victim, other), (other, victim)] {
                let alarm = Alarm::SessionsApart { peer: node(there) };
                assert_eq!(net.nodes[&node(here)].alarms, [alarm], "{victim} {here}");
                let refused = net.supply(here, there, 1, 256);
                assert_eq!(refused.unwrap_err(), SupplyError::Unreachable);
            }
            // Nor is it believed later: it has not learnt the sessions that it lacks.
            net.crash(&node(victim));
            net.start(&node(victim));
            net.run(20);
            let alarm = Alarm::SessionsApart { peer: node(victim) };
            assert_eq!(net.nodes[&node(other)].alarms, [alarm.clone(), alarm]);
            // An empty store mends it.
            net.crash(&node(victim));
            net.nodes.get_mut(&node(victim)).unwrap().copyable = None;
            net.start(&node(victim));
            for id in 10..18 {
                net.deliver_both("alice", "bob", id, 1024);
            }
            net.run(20);
            assert!(net.supply(victim, other, 1, 256).is_ok());
            assert!(net.supply(other, victim, 1, 256).is_ok());
            net.check_books();
        }
    }
}

#[test]
fn however_often_sessions_begin_and_end_unheard_no_end_takes_the_other_for_a_copy() {
    let seeds = std::env::var("QKD_SEEDS").map_or(40, |n| n.parse().unwrap());
    for seed in 0..seeds {
        let mut net = two();
        net.random = common::Random(9_000 + seed);
        let names = ["alice", "bob"];
        net.deliver_both("alice", "bob", 0, 1024);
        for step in 0..400_u64 {
            let victim = node(net.random.pick(&names));
            match net.random.below(12) {
                0 | 1 => {
                    net.crash(&victim);
                    net.start(&victim);
                }
                2 => {
                    net.disconnect(&node("alice"), &node("bob"));
                    net.connect(&node("alice"), &node("bob"));
                }
                3 => net.tick(),
                4 => drop(net.wires.pop_front()),
                5 if step % 50 == 0 => net.run(10),
                _ => {
                    if let Some((peer, to, bytes)) = net.wires.pop_front() {
                        net.input(&to, Input::Message { peer, bytes });
                    }
                }
            }
        }
        net.connect(&node("alice"), &node("bob"));
        net.deliver_both("alice", "bob", 1, 1024);
        net.deliver_both("alice", "bob", 2, 1024);
        net.run(40);
        for (from, to) in [("alice", "bob"), ("bob", "alice")] {
            let alarms = &net.nodes[&node(from)].alarms;
            assert!(alarms.is_empty(), "seed {seed}: {from}: {alarms:?}");
            assert!(net.supply(from, to, 1, 256).is_ok(), "seed {seed}: {from}");
        }
        check_ledgers(&net, &names);
    }
}

#[test]
fn a_journal_is_compacted_while_keys_flow_and_crashes_happen() {
    let mut net = three(27);
    for state in net.nodes.values_mut() {
        state.journal_limit_bytes = 8 << 10;
    }
    for name in ["alice", "relay", "bob"] {
        net.crash(&node(name));
        net.start(&node(name));
    }
    let mut served = 0;
    for round in 0..20_u64 {
        feed(&mut net, round * 4, 4);
        net.run(10);
        if let Ok(keys) = net.supply("alice", "bob", 8, 256) {
            let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
            let fetched = net.fetch("bob", "alice", &ids).unwrap();
            served += fetched.len();
            assert!(keys.iter().zip(&fetched).all(|(a, b)| a.key.ct_eq(&b.key)));
        }
        if round % 5 == 4 {
            net.crash(&node("relay"));
            net.start(&node("relay"));
        }
        net.check_books();
    }
    assert!(served > 100, "{served}");
    for name in ["alice", "relay", "bob"] {
        assert!(
            matches!(net.ledger(name)[1], Record::Snapshot { .. }),
            "{name}"
        );
        assert!(net.nodes[&node(name)].alarms.is_empty());
    }
}

#[test]
fn crashes_losses_and_cuts_never_use_a_bit_twice_nor_give_two_ends_different_keys() {
    // `QKD_SEEDS=3000 cargo test -p qkd-kma --release --test recovery crashes` is the run at full
    // size.
    let seeds = std::env::var("QKD_SEEDS").map_or(12, |n| n.parse().unwrap());
    let mut served_over_all = 0;
    for seed in 0..seeds {
        let mut net = three(100 + seed);
        net.faults = Faults {
            lose: 20,
            repeat: 15,
            overtake: 10,
        };
        let names = ["alice", "relay", "bob"];
        let (mut served, mut id) = (0, 0);
        for round in 0..60 {
            feed(&mut net, id, 3);
            id += 3;
            net.run(10);
            let victim = node(net.random.pick(&names));
            match net.random.below(6) {
                0 => {
                    net.crash(&victim);
                    net.run(3);
                    net.start(&victim);
                }
                1 => {
                    let other = node(net.random.pick(&names));
                    if other != victim {
                        net.disconnect(&victim, &other);
                        net.run(5);
                        net.connect(&victim, &other);
                    }
                }
                _ => {}
            }
            let (from, to) = if round % 2 == 0 {
                ("alice", "bob")
            } else {
                ("bob", "alice")
            };
            if let Ok(keys) = net.supply(from, to, 4, 256) {
                let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
                if let Ok(fetched) = net.fetch(to, from, &ids) {
                    served += fetched.len();
                    for (one, other) in keys.iter().zip(&fetched) {
                        assert!(one.key.ct_eq(&other.key), "seed {seed}: keys differ");
                    }
                }
            }
            net.check_books();
        }
        // How many depends on how often a node was just started; that none is a hang.
        assert!(served > 0, "seed {seed}: no key");
        served_over_all += served as u64;
        check_ledgers(&net, &names);
        // Faults off: the network heals, and no segment waits for ever.
        net.faults = Faults::default();
        for (a, b) in [("alice", "relay"), ("relay", "bob"), ("alice", "bob")] {
            net.connect(&node(a), &node(b));
        }
        feed(&mut net, id, 12);
        net.run(300);
        assert!(
            (4096..4096 + 512).contains(&net.stock("alice", "bob")),
            "seed {seed}"
        );
        assert!(net.supply("alice", "bob", 4, 256).is_ok());
        for name in names {
            let alarms = &net.nodes[&node(name)].alarms;
            assert!(alarms.is_empty(), "seed {seed}: {name}: {alarms:?}");
        }
    }
    let average = served_over_all / seeds;
    assert!(average > 60, "only {average} keys a run");
}

#[test]
fn what_nothing_rests_on_is_made_durable_with_the_next_thing_that_leaves() {
    let mut net = two();
    for id in 0..8 {
        net.deliver_both("alice", "bob", id, 1024);
    }
    net.run(20);
    let operations =
        |net: &Network| ["alice", "bob"].map(|n| net.nodes[&node(n)].disk.operations());
    let [alice, bob] = operations(&net);
    let mut keys = Vec::new();
    for _ in 0..5 {
        keys.extend(net.supply("alice", "bob", 2, 256).unwrap());
        net.drain();
    }
    // Bob knows them all, and has made nothing durable for it; alice has, before each answer.
    let [alice_now, bob_now] = operations(&net);
    assert_eq!(bob_now, bob);
    assert!(alice_now >= alice + 5 * 2, "a write and a sync each");
    assert_eq!(net.kma("bob").status().waiting_bindings, 10);
    assert_eq!(net.kma("alice").status().outbox_bindings, 10);
    // One answer, one step: with it the acknowledgement leaves.
    let ids: Vec<_> = keys.iter().map(|key| key.key_id).collect();
    net.fetch("bob", "alice", &ids[..1]).unwrap();
    net.drain();
    assert_eq!(net.kma("alice").status().outbox_bindings, 0);
    // A crash before that would have lost nothing: alice says them again.
    keys.extend(net.supply("alice", "bob", 2, 256).unwrap());
    net.drain();
    net.crash(&node("bob"));
    net.start(&node("bob"));
    net.run(20);
    let ids: Vec<_> = keys.iter().map(|key| key.key_id).collect();
    let fetched = net.fetch("bob", "alice", &ids[1..]).unwrap();
    assert!(
        fetched
            .iter()
            .zip(&keys[1..])
            .all(|(a, b)| a.key.ct_eq(&b.key))
    );
    net.check_books();
    check_ledgers(&net, &["alice", "bob"]);
}
