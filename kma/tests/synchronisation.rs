//! Two KMAs that agree on what their modules deliver, however it comes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "numbers of blocks become bytes of keys here"
)]

mod common;

use std::{collections::BTreeMap, time::Duration};

use common::{Network, chain, node, qkd_key};
use qkd_keyfile::{Generation, ModulePairId, QkdKeyName, StreamId};
use qkd_kma::{
    Alarm, Input, KmaConfig, ModulePairStatus, OperatorAct, OperatorAnswer, QuarantineReason,
    Record, Settlement, StopReason, Suspects,
};

const PAIR: &str = "alice-bob";

fn two_with(change: impl Fn(&mut qkd_kma::LinkConfig)) -> Network {
    let mut configs: Vec<KmaConfig> = chain(&["alice", "bob"], 0);
    for link in configs.iter_mut().flat_map(|c| c.neighbours.values_mut()) {
        link.segment_bytes = 512;
        change(link);
    }
    let mut net = Network::new(configs, 1);
    net.start_all();
    net
}

fn two() -> Network {
    two_with(|_| ())
}

fn bits(net: &mut Network, id: &str, key_bits: u32) {
    let mut key = vec![0; key_bits.div_ceil(8) as usize];
    qkd_keyfile::Entropy::fill(&mut net.random, &mut key);
    for end in ["alice", "bob"] {
        net.deliver_bits(&node(end), &qkd_key(PAIR, id), &key, key_bits);
    }
}

fn received(net: &Network, at: &str) -> u64 {
    let status = net.kma(at).status();
    status.streams[0].accounts.received_bits
}

fn pair(net: &Network, at: &str) -> ModulePairStatus {
    net.kma(at).status().module_pairs[&PAIR.parse::<ModulePairId>().unwrap()].clone()
}

fn generation(net: &Network, at: &str) -> Generation {
    net.kma(at).store().generation(&PAIR.parse().unwrap())
}

fn session(net: &mut Network, at: &str, session: u64) {
    let module_pair = PAIR.parse().unwrap();
    let told = Input::Session {
        module_pair,
        session,
    };
    net.input(&node(at), told);
}

#[test]
fn qkd_keys_of_256_bits_are_gathered_and_come_out_as_equal_keys() {
    let mut net = two();
    for id in 0..64 {
        bits(&mut net, &format!("uuid-{id}"), 256);
    }
    net.run(20);
    assert_eq!(received(&net, "alice"), 64 * 256);
    assert_eq!(received(&net, "bob"), 64 * 256);
    let confirmed = net.kma("alice").status().streams[0]
        .accounts
        .confirmed_segments;
    assert!(confirmed <= 8, "{confirmed} segments, of 512 bytes each");
    for (from, to) in [("alice", "bob"), ("bob", "alice")] {
        let keys = net.supply(from, to, 8, 256).unwrap();
        let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
        let fetched = net.fetch(to, from, &ids).unwrap();
        assert!(keys.iter().zip(&fetched).all(|(a, b)| a.key.ct_eq(&b.key)));
    }
    net.check_books();
    check_compositions(&net);
}

#[test]
fn of_odd_bit_counts_no_bit_is_lost() {
    let mut net = two();
    for id in 0..100_u32 {
        bits(&mut net, &id.to_string(), 7636 + id % 9);
        if id % 7 == 0 {
            net.run(1);
        }
    }
    net.run(20);
    let all: u64 = (0..100_u64).map(|id| 7636 + id % 9).sum();
    for end in ["alice", "bob"] {
        assert_eq!(received(&net, end), all / 8 * 8, "{end}");
        assert_eq!(pair(&net, end).waiting_bits, all % 8, "{end}");
        let unsettled = pair(&net, end).waiting_qkd_keys;
        assert!(unsettled <= 1, "{end}: {unsettled}");
    }
    assert!(net.nodes.values().all(|node| node.alarms.is_empty()));
    check_compositions(&net);
}

#[test]
fn the_last_bits_that_make_no_byte_do_not_hold_up_their_qkd_key_for_ever() {
    let mut net = two();
    bits(&mut net, "1", 1023);
    net.run(20);
    assert_eq!(pair(&net, "alice").waiting_bits, 7);
    net.step = Duration::from_secs(10);
    net.run(20);
    for end in ["alice", "bob"] {
        let settled = &net.nodes[&node(end)].settled;
        assert_eq!(settled[&qkd_key(PAIR, "1")], Settlement::Stored, "{end}");
        assert_eq!(pair(&net, end).waiting_qkd_keys, 0);
    }
    net.check_books();
}

#[test]
fn a_slow_module_pair_waits_as_long_as_it_was_told_and_no_longer() {
    let mut net = two_with(|link| {
        link.segment_bytes = 64 << 10;
        link.gather = Duration::from_secs(1);
    });
    let segments = |net: &Network| {
        net.kma("alice").status().streams[0]
            .accounts
            .confirmed_segments
    };
    // More than a kilobyte: a second. Ticks are 50 ms.
    bits(&mut net, "1", 12_000);
    net.run(17);
    assert_eq!(net.kma("alice").status().streams.len(), 0);
    net.run(6);
    assert_eq!(segments(&net), 1);
    // Less: ten seconds.
    bits(&mut net, "2", 1000);
    net.run(190);
    assert_eq!(segments(&net), 1);
    net.run(16);
    assert_eq!(segments(&net), 2);
    // Enough: at once.
    bits(&mut net, "3", 8 * (64 << 10));
    net.run(2);
    assert_eq!(segments(&net), 3);
}

#[test]
fn among_many_qkd_keys_the_one_that_differs_is_found_and_the_others_are_agreed() {
    for bad in [0, 1, 17, 62, 63] {
        for key_bits in [256, 1000] {
            let mut net = two_with(|link| link.segment_bytes = 64 << 10);
            net.disconnect(&node("alice"), &node("bob"));
            for id in 0..64 {
                let mut key = vec![id as u8 ^ 0x5a; 125];
                let name = qkd_key(PAIR, &format!("k{id:02}"));
                net.deliver_bits(&node("alice"), &name, &key, key_bits);
                if id == bad {
                    key[3] ^= 2;
                }
                net.deliver_bits(&node("bob"), &name, &key, key_bits);
            }
            net.connect(&node("alice"), &node("bob"));
            net.run(40);
            let name = qkd_key(PAIR, &format!("k{bad:02}"));
            for (end, peer) in [("alice", "bob"), ("bob", "alice")] {
                let state = &net.nodes[&node(end)];
                let [
                    Alarm::Mismatch {
                        peer: at, qkd_keys, ..
                    },
                ] = &state.alarms[..]
                else {
                    panic!("{end} {bad} {key_bits}: {:?}", state.alarms);
                };
                assert_eq!(*at, node(peer));
                assert!(
                    qkd_keys.contains(&name.id) && qkd_keys.len() <= 8,
                    "{end} {bad}: {qkd_keys:?}"
                );
                // A path from the whole to one: 256 bits of each, and what was too short to compare.
                let all = 64 * u64::from(key_bits);
                let lost = all - received(&net, end);
                assert!(
                    lost <= 14 * 256 + 2000,
                    "{end} {bad} {key_bits}: {lost} bits lost"
                );
                assert_eq!(pair(&net, end).mismatches, 1);
                assert!(pair(&net, end).waiting_bits < 8);
            }
            net.check_books();
            check_compositions(&net);
        }
    }
}

#[test]
fn a_difference_in_the_answers_mask_alone_is_alarmed_at_both_ends_and_nothing_is_stored() {
    let mut net = two();
    let mut key = vec![3; 2048];
    net.deliver(&node("alice"), &qkd_key(PAIR, "1"), &key);
    key[20] ^= 1;
    net.deliver(&node("bob"), &qkd_key(PAIR, "1"), &key);
    net.run(20);
    for end in ["alice", "bob"] {
        let alarms = &net.nodes[&node(end)].alarms;
        assert!(
            matches!(&alarms[..], [Alarm::Mismatch { .. }]),
            "{end}: {alarms:?}"
        );
        assert_eq!(
            net.link_stock(end, if end == "alice" { "bob" } else { "alice" }),
            0
        );
        let streams = net.kma(end).status().streams;
        assert_eq!(streams[0].encrypting_bytes + streams[0].decrypting_bytes, 0);
    }
    net.check_books();
}

#[test]
fn a_module_pair_that_differs_again_and_again_is_stopped_until_both_ends_start_it() {
    let mut net = two_with(|link| link.mismatch_limit = 3);
    let differing = |net: &mut Network, from: u32| {
        for id in from..from + 6 {
            let name = qkd_key(PAIR, &id.to_string());
            net.deliver(&node("alice"), &name, &[7; 1024]);
            net.deliver(&node("bob"), &name, &[8; 1024]);
            net.run(5);
        }
    };
    differing(&mut net, 0);
    for end in ["alice", "bob"] {
        assert!(pair(&net, end).stopped, "{end}");
        let alarms = &net.nodes[&node(end)].alarms;
        let stops = alarms
            .iter()
            .filter(|alarm| matches!(alarm, Alarm::ModulePairStopped { .. }));
        assert!((1..=2).contains(&stops.count()), "{end}: {alarms:?}");
        let mismatches = alarms
            .iter()
            .filter(|alarm| matches!(alarm, Alarm::Mismatch { .. }));
        assert_eq!(mismatches.count(), 3, "{end}: {alarms:?}");
        // What comes now is given back, so that hardware does not wait for ever.
        assert_eq!(pair(&net, end).waiting_qkd_keys, 0, "{end}");
    }
    bits(&mut net, "50", 8192);
    net.run(20);
    assert_eq!(
        net.link_stock("alice", "bob") + net.link_stock("bob", "alice"),
        0
    );
    // A restart starts nothing; nor does one end alone.
    for victim in ["alice", "bob"] {
        net.crash(&node(victim));
    }
    for victim in ["alice", "bob"] {
        net.start(&node(victim));
    }
    for (id, end) in [("51", "alice"), ("52", "bob")] {
        bits(&mut net, id, 8192);
        net.run(20);
        assert_eq!(received(&net, "alice"), 0);
        let started = net.order(end, OperatorAct::StartModulePair(PAIR.parse().unwrap()));
        let OperatorAnswer::ModulePair { changed, status } = started else {
            panic!("{started:?}");
        };
        let there = (end == "alice").then_some(StopReason::Mismatches);
        assert_eq!((changed, status.stopped_here), (true, None));
        assert_eq!((status.stopped_there, status.mismatches), (there, 0));
    }
    net.run(5);
    bits(&mut net, "53", 8192);
    net.run(20);
    assert_eq!(
        net.link_stock("alice", "bob") + net.link_stock("bob", "alice"),
        992
    );
    // The count begins anew.
    differing(&mut net, 60);
    assert!(pair(&net, "alice").stopped && pair(&net, "bob").stopped);
}

#[test]
fn qkd_keys_that_differ_now_and_then_stop_nothing() {
    let mut net = two_with(|link| {
        link.mismatch_limit = 3;
        link.segment_bytes = 1;
    });
    for id in 0..1200_u32 {
        let name = qkd_key(PAIR, &id.to_string());
        let mut key = [id as u8; 64];
        net.deliver(&node("alice"), &name, &key);
        key[40] ^= u8::from(id % 100 == 50);
        net.deliver(&node("bob"), &name, &key);
        if id % 20 == 0 {
            net.run(2);
        }
    }
    net.run(10);
    assert!(!pair(&net, "alice").stopped);
    assert!(pair(&net, "alice").mismatches <= 1);
    assert_eq!(received(&net, "bob"), (1200 - 12) * 512);
}

#[test]
fn a_session_that_changes_raises_the_generation_at_both_ends_and_ids_may_come_again() {
    for who in [
        &["alice"][..],
        &["bob"],
        &["alice", "bob"],
        &["bob", "alice"],
    ] {
        let mut net = two();
        for end in ["alice", "bob"] {
            session(&mut net, end, 1);
        }
        net.run(2);
        for id in 0..4 {
            bits(&mut net, &id.to_string(), 4096);
        }
        net.run(10);
        assert_eq!(received(&net, "alice"), 4 * 4096);
        // One that only alice has, of the old numbering.
        net.deliver(&node("alice"), &qkd_key(PAIR, "9"), &[1; 512]);
        net.run(2);
        // They cross on the way: nothing is delivered between the two.
        for end in who {
            session(&mut net, end, 2);
        }
        net.run(4);
        assert_eq!(generation(&net, "alice"), Generation(1), "{who:?}");
        assert_eq!(generation(&net, "bob"), Generation(1), "{who:?}");
        let settled = &net.nodes[&node("alice")].settled;
        assert_eq!(settled[&qkd_key(PAIR, "9")], Settlement::Dropped);
        for id in 0..4 {
            bits(&mut net, &id.to_string(), 4096);
        }
        net.run(10);
        assert_eq!(received(&net, "alice"), 8 * 4096, "{who:?}");
        // Those of the ended generation never come in, also after a restart.
        for victim in ["alice", "bob"] {
            net.crash(&node(victim));
            net.start(&node(victim));
        }
        net.run(5);
        assert_eq!(generation(&net, "bob"), Generation(1));
        let old = QkdKeyName {
            generation: Generation(0),
            ..qkd_key(PAIR, "77")
        };
        for end in ["alice", "bob"] {
            let held = Input::Held {
                name: old.clone(),
                key_bits: 4096,
                metadata: qkd_keyfile::metadata::QkdKeyMetadata::new(old.id.clone()),
            };
            net.input(&node(end), held);
        }
        net.run(10);
        assert_eq!(received(&net, "alice"), 8 * 4096);
        assert_eq!(net.nodes[&node("bob")].settled[&old], Settlement::Dropped);
        // The same sessions again, after the restart: nothing changes.
        for end in ["alice", "bob"] {
            let last = if who.contains(&end) { 2 } else { 1 };
            session(&mut net, end, last);
        }
        net.run(10);
        assert_eq!(generation(&net, "alice"), Generation(1));
        assert!(net.nodes.values().all(|node| node.alarms.is_empty()));
        check_compositions(&net);
    }
}

#[test]
fn a_session_that_changes_while_the_other_node_is_away_is_agreed_when_it_is_back() {
    for (at, other) in [("alice", "bob"), ("bob", "alice")] {
        let mut net = two();
        for end in ["alice", "bob"] {
            session(&mut net, end, 1);
        }
        net.run(2);
        net.disconnect(&node("alice"), &node("bob"));
        session(&mut net, at, 2);
        net.run(4);
        if at == "bob" {
            // It has to ask; and would again after a restart, for its session is still the old one.
            assert_eq!(generation(&net, "bob"), Generation(0));
            net.crash(&node("bob"));
            net.start(&node("bob"));
            net.disconnect(&node("alice"), &node("bob"));
            session(&mut net, "bob", 2);
        }
        net.connect(&node("alice"), &node("bob"));
        net.run(30);
        assert_eq!(generation(&net, at), Generation(1), "{at}");
        assert_eq!(generation(&net, other), Generation(1), "{at}");
        bits(&mut net, "1", 4096);
        net.run(5);
        assert_eq!(received(&net, other), 4096);
    }
}

#[test]
fn numbers_that_step_back_without_a_session_raise_the_generation() {
    let mut net = two();
    for id in 100..200 {
        bits(&mut net, &id.to_string(), 1024);
    }
    net.run(10);
    let before = received(&net, "alice");
    // A new life of the device: other bits under the old numbers.
    for id in 100..200 {
        bits(&mut net, &id.to_string(), 1024);
        net.run(1);
    }
    net.run(10);
    assert_eq!(generation(&net, "alice"), generation(&net, "bob"));
    assert!(generation(&net, "alice") > Generation(0));
    let gained = received(&net, "alice") - before;
    assert!(gained > 90 * 1024, "{gained} bits of 100 QKD-keys");
    check_compositions(&net);
}

#[test]
fn a_qkd_key_that_one_pipeline_refuses_is_quarantined_at_both_ends_with_an_alarm() {
    for (at, other) in [("alice", "bob"), ("bob", "alice")] {
        let mut net = two();
        let name = qkd_key(PAIR, "5");
        // The other end holds it already, or gets it later.
        for late in [false, true] {
            let name = QkdKeyName {
                id: if late { "6" } else { "5" }.parse().unwrap(),
                ..name.clone()
            };
            if !late {
                net.deliver(&node(other), &name, &[7; 1024]);
                net.run(2);
            }
            let reason = QuarantineReason::Unhealthy;
            let refused = Input::Quarantined {
                name: name.clone(),
                reason,
            };
            net.input(&node(at), refused);
            net.run(4);
            if late {
                net.deliver(&node(other), &name, &[7; 1024]);
                net.run(4);
            }
            for end in [at, other] {
                let state = net.nodes.get_mut(&node(end)).unwrap();
                assert_eq!(
                    state.settled[&name],
                    Settlement::Quarantined,
                    "{end} {late}"
                );
                let alarms = std::mem::take(&mut state.alarms);
                let alarm = Alarm::Quarantined {
                    peer: node(if end == "alice" { "bob" } else { "alice" }),
                    module_pair: PAIR.parse().unwrap(),
                    qkd_key: name.id.clone(),
                    reason,
                    at_peer: end == other,
                };
                assert_eq!(alarms, [alarm], "{end} {late}");
            }
        }
        net.check_books();
    }
}

#[test]
fn a_segment_that_the_pipeline_makes_for_a_peer_that_was_replaced_raises_no_alarm() {
    let mut net = two();
    net.slow_formats = 1;
    bits(&mut net, "1", 8192);
    net.drain();
    // Bob's pipeline works on segment 0 of an alice whose store is lost now.
    while !net.late.iter().any(|(at, _)| *at == node("bob")) {
        net.tick();
        net.drain();
    }
    let late: Vec<_> = std::mem::take(&mut net.late);
    net.crash(&node("alice"));
    net.nodes.get_mut(&node("alice")).unwrap().disk = qkd_kma::vault::sim::SimDisk::new(99);
    net.start(&node("alice"));
    net.drain();
    bits(&mut net, "2", 8192);
    // Segment 0 of the new alice is under comparison when the old order is carried out.
    while !net.late.iter().any(|(at, _)| *at == node("bob")) {
        net.tick();
        net.drain();
    }
    for (at, formatted) in late.into_iter().filter(|(at, _)| *at == node("bob")) {
        net.input(&at, formatted);
    }
    net.slow_formats = 0;
    net.run(20);
    for (name, node) in &net.nodes {
        let false_alarm = |alarm: &&Alarm| !matches!(alarm, Alarm::PeerStoreReplaced { .. });
        assert_eq!(node.alarms.iter().find(false_alarm), None, "{name}");
    }
    assert_eq!(received(&net, "alice"), 8192);
}

/// No bit of a QKD-key is in two segments, and no bit that masked a comparison is in any other one.
fn check_compositions(net: &Network) {
    for end in ["alice", "bob"] {
        let mut stored: BTreeMap<(Generation, String), Vec<(u32, u32)>> = BTreeMap::new();
        let mut masked = stored.clone();
        let mut discarded = std::collections::BTreeSet::new();
        let ledger = net.ledger(end);
        for record in &ledger {
            if let Record::Discarded {
                stream: StreamId::Link(_),
                segment,
                ..
            } = record
            {
                discarded.insert(*segment);
            }
        }
        for record in &ledger {
            let (composition, into, most) = match record {
                Record::Stored { segment, body, .. } if !discarded.contains(segment) => {
                    (body.composition.as_ref(), &mut stored, u32::MAX)
                }
                Record::Proposed { composition, .. } => (composition.as_ref(), &mut masked, 256),
                _ => continue,
            };
            let Some(composition) = composition else {
                continue;
            };
            let mut left = most;
            for piece in &composition.pieces {
                let len = piece.len_bits.min(left);
                left -= len;
                let name = (composition.generation, piece.qkd_key.to_string());
                let span = (piece.offset_bits, piece.offset_bits + len);
                if len > 0 {
                    into.entry(name).or_default().push(span);
                }
            }
        }
        for spans in [stored, masked] {
            for (name, mut spans) in spans {
                spans.sort_unstable();
                let apart = spans.windows(2).all(|two| two[0].1 <= two[1].0);
                assert!(apart, "{end} {name:?}: {spans:?}");
            }
        }
    }
}

/// What [`storm`] has delivered.
#[derive(Default)]
struct Delivered {
    next: u64,
    sessions: u64,
    differing: u64,
    /// QKD-keys that an operator suspected, where, and the records of that ledger before.
    suspected: Vec<(QkdKeyName, &'static str, usize)>,
}

fn storm_step(net: &mut Network, delivered: &mut Delivered) {
    let (alice, bob) = (node("alice"), node("bob"));
    let victim = if net.random.one_in(2) { &alice } else { &bob };
    let module_pair: ModulePairId = PAIR.parse().unwrap();
    match net.random.below(40) {
        0..18 => {
            let id = delivered.next.to_string();
            delivered.next += 1;
            let key_bits = u32::try_from(match net.random.below(4) {
                0 => 256,
                1 => 7636 + net.random.below(9),
                2 => 1 + net.random.below(600),
                _ => 8192,
            });
            bits(net, &id, key_bits.unwrap());
        }
        18..21 => {
            // At one end only.
            let name = qkd_key(PAIR, &delivered.next.to_string());
            delivered.next += 1;
            net.deliver(victim, &name, &[9; 512]);
        }
        21 => {
            let name = qkd_key(PAIR, &delivered.next.to_string());
            delivered.next += 1;
            delivered.differing += 1;
            let key: Vec<u8> = (0..200_u8).map(|n| n.wrapping_mul(3)).collect();
            net.deliver(&alice, &name, &key);
            let mut other = key.clone();
            other[delivered.next as usize % 200] ^= 0x10;
            net.deliver(&bob, &name, &other);
        }
        22 => {
            delivered.sessions += 1;
            session(net, victim.as_str(), 1000 + delivered.sessions);
        }
        23 => {
            net.crash(victim);
            net.run(1);
            net.start(victim);
        }
        24 => {
            net.disconnect(&alice, &bob);
            net.run(2);
            net.connect(&alice, &bob);
        }
        25 => {
            let years = Duration::from_secs(86_400 * 365 * net.random.below(5));
            net.now.mono = net.now.mono.after(years);
            net.now.unix.0 -= 86_400 * 365 * 1_000_000_000_i64;
        }
        26 => {
            let name = qkd_key(PAIR, &delivered.next.to_string());
            delivered.next += 1;
            let generation = generation(net, victim.as_str());
            let name = QkdKeyName { generation, ..name };
            let reason = QuarantineReason::Repeated;
            net.input(victim, Input::Quarantined { name, reason });
        }
        27 => drop(net.order(victim.as_str(), OperatorAct::StopModulePair(module_pair))),
        28 | 29 => drop(net.order(victim.as_str(), OperatorAct::StartModulePair(module_pair))),
        30 => {
            let at = if victim == &alice { "alice" } else { "bob" };
            let lately = delivered.next.saturating_sub(net.random.below(6));
            let generation = generation(net, at);
            let name = qkd_key(PAIR, &lately.to_string());
            let name = QkdKeyName { generation, ..name };
            let suspects = Suspects {
                qkd_keys: vec![name.clone()],
                ..Suspects::default()
            };
            net.order(at, OperatorAct::Suspect(suspects));
            let before = net.ledger(at).len();
            delivered.suspected.push((name, at, before));
        }
        _ => net.run(1),
    }
}

#[test]
fn a_storm_of_faults_never_stores_a_bit_twice_nor_two_ends_apart_and_passes() {
    // `QKD_SYNC_STEPS=2000000 cargo test -p qkd-kma --release --test synchronisation storm` is the
    // run at full size.
    let steps: u64 = std::env::var("QKD_SYNC_STEPS").map_or(3000, |n| n.parse().unwrap());
    let per_run = 500;
    for seed in 0..steps.div_ceil(per_run) {
        let mut net = two_with(|link| {
            link.segment_bytes = 2048;
            link.mismatch_limit = 0;
            link.capacity_bytes = u64::MAX;
        });
        net.random = common::Random(7_000_000 + seed);
        net.faults = common::Faults {
            lose: 12,
            repeat: 10,
            overtake: 8,
        };
        net.slow_formats = 3;
        let mut delivered = Delivered::default();
        for _ in 0..per_run {
            storm_step(&mut net, &mut delivered);
            net.check_books();
        }
        let differing = u64::min(delivered.differing, 1);
        for (name, node) in &net.nodes {
            for alarm in &node.alarms {
                match alarm {
                    Alarm::Mismatch { .. } => assert_eq!(differing, 1, "seed {seed}: {name}"),
                    Alarm::Quarantined { .. }
                    | Alarm::ModulePairStopped { .. }
                    | Alarm::ModulePairStarted { .. } => {}
                    other => panic!("seed {seed}: {name}: {other:?}"),
                }
            }
        }
        check_compositions(&net);
        check_suspected(&net, &delivered);
        calm(&mut net, &mut delivered, seed);
        common::check_ledgers(&net, &["alice", "bob"]);
    }
}

/// After a QKD-key was suspected nothing more of it was stored there.
fn check_suspected(net: &Network, delivered: &Delivered) {
    for (name, at, before) in &delivered.suspected {
        for record in &net.ledger(at)[*before..] {
            if let Record::Stored { body, .. } = record
                && let Some(composition) = &body.composition
                && composition.generation == name.generation
            {
                let mut pieces = composition.pieces.iter();
                assert!(pieces.all(|piece| piece.qkd_key != name.id), "{at}: {name}");
            }
        }
    }
}

/// Faults off: the link heals, everything new is agreed, and what was agreed is equal.
fn calm(net: &mut Network, delivered: &mut Delivered, seed: u64) {
    net.faults = common::Faults::default();
    net.slow_formats = 0;
    for end in ["alice", "bob"] {
        net.order(end, OperatorAct::StartModulePair(PAIR.parse().unwrap()));
    }
    net.connect(&node("alice"), &node("bob"));
    net.run(80);
    for end in ["alice", "bob"] {
        let pair = pair(net, end);
        assert_eq!(
            (pair.stopped_here, pair.stopped_there),
            (None, None),
            "{end}, seed {seed}"
        );
    }
    assert_eq!(
        generation(net, "alice"),
        generation(net, "bob"),
        "seed {seed}"
    );
    let before = received(net, "alice");
    let fresh = 20;
    for _ in 0..fresh {
        bits(net, &delivered.next.to_string(), 8192);
        delivered.next += 1;
    }
    net.run(80);
    let gained = received(net, "alice") - before;
    assert!(gained > fresh * 8192 - 8, "seed {seed}: {gained} bits");
    // What one end alone has is given up, and what cannot make a segment waits.
    net.step = Duration::from_secs(10);
    net.run(20);
    for end in ["alice", "bob"] {
        let waiting = pair(net, end);
        assert!(
            waiting.waiting_bits < 264,
            "seed {seed}: {end}: {waiting:?}"
        );
    }
    net.check_books();
    for (from, to) in [("alice", "bob"), ("bob", "alice")] {
        let number = u32::try_from(net.link_stock(from, to) / 64)
            .unwrap()
            .min(400);
        let Ok(keys) = net.supply(from, to, number.saturating_sub(8), 512) else {
            continue;
        };
        let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
        let fetched = net.fetch(to, from, &ids).unwrap();
        let equal = keys.iter().zip(&fetched).all(|(a, b)| a.key.ct_eq(&b.key));
        assert!(equal, "seed {seed}: keys differ");
    }
}
