//! The four relay schemes, their levels and their policies, over chains of two to six nodes.

mod common;

use common::{Faults, Network, bytes, chain_and_centre, check_ledgers, feed_chain, node};
use qkd_keyfile::metadata::{RelayEncryption, SecurityLevel};
use qkd_kma::{RandomSource, Record, RelayPolicies, RelayPolicy, RelayScheme, SupplyError};

const NAMES: [&str; 6] = ["alice", "r1", "r2", "r3", "r4", "zoe"];
const CENTRE: &str = "middle";

fn chain_of(nodes: usize) -> Vec<&'static str> {
    let mut names = NAMES[..nodes - 1].to_vec();
    names.push(NAMES[5]);
    names
}

fn policy(scheme: RelayScheme) -> RelayPolicy {
    RelayPolicy {
        scheme,
        ..RelayPolicy::default()
    }
}

/// All schemes, with every source of random bits, and the level that their units have.
fn schemes() -> Vec<(RelayScheme, SecurityLevel)> {
    let centre = node(CENTRE);
    let mut all = vec![(RelayScheme::LinkKey, SecurityLevel::Qkd)];
    for (random, level) in [
        (None, SecurityLevel::Qkd),
        (Some(RandomSource::System), SecurityLevel::Any),
        (Some(RandomSource::Physical), SecurityLevel::Qkd),
        (Some(RandomSource::Qkd), SecurityLevel::Qkd),
    ] {
        if let Some(random) = random {
            all.push((RelayScheme::Random(random), level));
        }
        all.push((RelayScheme::AtDestination(random), level));
        let centre = centre.clone();
        all.push((RelayScheme::AtCentre { centre, random }, level));
    }
    all
}

/// Lets a fed network run until both ends have their stock.
fn run(net: &mut Network, ends: [&str; 2]) {
    for _ in 0..40 {
        net.run(2);
        ends.iter().for_each(|end| net.deliver_random(end));
    }
}

#[test]
fn every_scheme_gives_both_ends_the_same_keys_of_its_level_over_two_to_six_nodes() {
    for (scheme, level) in schemes() {
        // Other sources of random bits change nothing in the way.
        let random = scheme.random();
        let usual = random.is_none() || random == Some(RandomSource::System);
        for nodes in if usual { 2..=6 } else { 3..=4 } {
            let names = chain_of(nodes);
            let configs = chain_and_centre(&names, CENTRE, &policy(scheme.clone()));
            let mut net = Network::new(configs, 40 + nodes as u64);
            net.start_all();
            feed_chain(&mut net, &names, 0, 24);
            run(&mut net, ["alice", "zoe"]);
            let case = format!("{scheme:?} over {nodes}");
            for (from, to) in [("alice", "zoe"), ("zoe", "alice")] {
                assert_eq!(net.stock(from, to), 4096, "{case}");
                if level == SecurityLevel::Any && nodes > 2 {
                    assert!(
                        net.supply_at(from, to, (1, 256), SecurityLevel::Qkd)
                            .is_err()
                    );
                }
                let keys = net.supply_at(from, to, (20, 256), level).unwrap();
                let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
                let fetched = net.fetch(to, from, &ids).unwrap();
                for (one, other) in keys.iter().zip(&fetched) {
                    assert_eq!(bytes(&one.key), bytes(&other.key), "{case}");
                }
            }
            net.run(40);
            net.check_books();
            let all: Vec<&str> = names.iter().copied().chain([CENTRE]).collect();
            check_ledgers(&net, &all);
            for name in all {
                assert!(net.nodes[&node(name)].alarms.is_empty(), "{case}: {name}");
            }
        }
    }
}

/// The methods of all hops that the ledger of a destination shows.
fn methods(net: &Network, at: &str) -> Vec<Vec<RelayEncryption>> {
    let records = net.ledger(at).into_iter();
    let described = records.filter_map(|record| match record {
        Record::Described {
            relayed: Some(relayed),
            ..
        } => Some(relayed.hops.iter().map(|hop| hop.encryption).collect()),
        _ => None,
    });
    described.collect()
}

#[test]
fn aes_stands_in_while_pad_is_short_the_level_falls_and_one_time_pad_returns() {
    let names = ["alice", "r1", "zoe"];
    let mut policy = policy(RelayScheme::Random(RandomSource::Physical));
    policy.aes_fallback = true;
    let mut configs = chain_and_centre(&names, CENTRE, &policy);
    configs[2].remotes.clear();
    let mut net = Network::new(configs, 90);
    net.start_all();
    // The first link has plenty; the second has little more than its floor.
    for id in 0..24 {
        net.deliver_both("alice", "r1", id, 2048);
    }
    for id in 0..4 {
        net.deliver_both("r1", "zoe", id, 512);
    }
    run(&mut net, ["alice", "zoe"]);
    assert_eq!(net.stock("alice", "zoe"), 4096);
    let (padded, aes) = (RelayEncryption::OneTimePad, RelayEncryption::Aes256Gcm);
    let fallen = methods(&net, "zoe");
    assert!(
        fallen.iter().all(|hops| *hops == [padded, aes]),
        "{fallen:?}"
    );
    // Both ends know the level, and a request for level qkd gets nothing of it (Req_KMA2).
    let at_qkd = net.supply_at("alice", "zoe", (1, 256), SecurityLevel::Qkd);
    assert!(matches!(at_qkd, Err(SupplyError::NotEnoughKey { .. })));
    let keys = net.supply("alice", "zoe", 60, 256).unwrap();
    let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
    let fetched = net.fetch("zoe", "alice", &ids).unwrap();
    assert!(keys.iter().zip(&fetched).all(|(a, b)| a.key.ct_eq(&b.key)));
    // Pad returns, and with it one-time pad and level qkd.
    for id in 100..124 {
        net.deliver_both("r1", "zoe", id, 2048);
    }
    run(&mut net, ["alice", "zoe"]);
    let before = methods(&net, "zoe").len();
    net.supply("alice", "zoe", 60, 256).unwrap();
    run(&mut net, ["alice", "zoe"]);
    let after = methods(&net, "zoe").split_off(before);
    assert!(!after.is_empty() && after.iter().all(|hops| *hops == [padded, padded]));
    // Served from units of level qkd only, though older ones of level any are there.
    let keys = net.supply_at("alice", "zoe", (8, 256), SecurityLevel::Qkd);
    let ids: Vec<_> = keys.unwrap().iter().map(|k| k.key_id).collect();
    assert_eq!(net.fetch("zoe", "alice", &ids).unwrap().len(), 8);
    net.run(40);
    net.check_books();
    check_ledgers(&net, &names);
}

#[test]
fn without_leave_of_source_and_way_station_nothing_goes_under_aes() {
    for (source, station, level) in [
        (true, false, SecurityLevel::Any),
        (false, true, SecurityLevel::Any),
        (true, true, SecurityLevel::Qkd),
    ] {
        let names = ["alice", "r1", "zoe"];
        let mut own = policy(RelayScheme::Random(RandomSource::Physical));
        (own.aes_fallback, own.level) = (source, level);
        let mut configs = chain_and_centre(&names, CENTRE, &own);
        own.aes_fallback = station;
        configs[1].relay = RelayPolicies::new(own);
        configs[2].remotes.clear();
        let mut net = Network::new(configs, 91);
        net.start_all();
        for id in 0..24 {
            net.deliver_both("alice", "r1", id, 2048);
        }
        net.deliver_both("r1", "zoe", 0, 512);
        net.deliver_both("r1", "zoe", 1, 512);
        run(&mut net, ["alice", "zoe"]);
        assert_eq!(net.stock("alice", "zoe"), 0, "{source} {station} {level:?}");
        net.check_books();
    }
}

#[test]
fn hop_limit_and_transit_hold_at_every_node_for_every_scheme() {
    let names = ["alice", "r1", "r2", "zoe"];
    let ends = (node("alice"), node("zoe"));
    for (scheme, _) in schemes() {
        for (at, change) in [
            (
                0,
                RelayPolicy {
                    hop_limit: 2,
                    ..policy(scheme.clone())
                },
            ),
            (
                2,
                RelayPolicy {
                    hop_limit: 2,
                    ..policy(scheme.clone())
                },
            ),
            (
                1,
                RelayPolicy {
                    transit: false,
                    ..policy(scheme.clone())
                },
            ),
            (
                2,
                RelayPolicy {
                    transit: false,
                    ..policy(scheme.clone())
                },
            ),
        ] {
            let mut configs = chain_and_centre(&names, CENTRE, &policy(scheme.clone()));
            configs[3].remotes.clear();
            configs[at]
                .relay
                .set(ends.1.clone(), ends.0.clone(), change.clone());
            let mut net = Network::new(configs, 92);
            net.start_all();
            feed_chain(&mut net, &names, 0, 16);
            for _ in 0..20 {
                net.run(2);
                net.deliver_random("alice");
            }
            let case = format!("{scheme:?} at {at}: {change:?}");
            assert_eq!(net.stock("alice", "zoe"), 0, "{case}");
            // What the destination holds, if anything, is never released, and goes.
            net.run(300);
            let books = net.kma("zoe").status().streams;
            let held = books
                .iter()
                .filter(|s| s.stream.to_string() == "alice->zoe");
            let held: u64 = held.map(|s| s.encrypting_bytes + s.decrypting_bytes).sum();
            assert_eq!(held, 0, "{case}");
            net.check_books();
            check_ledgers(&net, &names);
        }
    }
}

#[test]
fn losses_crashes_and_cuts_leave_no_orphan_and_use_no_bit_twice_in_any_scheme() {
    // `QKD_SEEDS=200 cargo test -p qkd-kma --release --test schemes losses` is the run at full size.
    let seeds = std::env::var("QKD_SEEDS").map_or(1, |n| n.parse().unwrap());
    let names = ["alice", "r1", "r2", "zoe"];
    let all = ["alice", "r1", "r2", "zoe", CENTRE];
    for (scheme, level) in schemes() {
        for seed in 0..seeds {
            let case = format!("{scheme:?}, seed {seed}");
            let mut own = policy(scheme.clone());
            own.aes_fallback = seed % 2 == 1;
            let mut net = Network::new(chain_and_centre(&names, CENTRE, &own), 500 + seed);
            net.start_all();
            net.faults = Faults {
                lose: 20,
                repeat: 15,
                overtake: 10,
            };
            let (mut id, mut served) = (0, 0);
            for round in 0..16 {
                feed_chain(&mut net, &names, id, 4);
                id += 4;
                net.run(8);
                ["alice", "zoe"]
                    .iter()
                    .for_each(|end| net.deliver_random(end));
                net.run(2);
                let victim = node(net.random.pick(&all));
                let other = node(net.random.pick(&all));
                match net.random.below(5) {
                    0 => {
                        net.crash(&victim);
                        net.run(3);
                        net.start(&victim);
                    }
                    1 if other != victim => {
                        net.disconnect(&victim, &other);
                        net.run(5);
                        net.connect(&victim, &other);
                    }
                    _ => {}
                }
                let ends = [("alice", "zoe"), ("zoe", "alice")];
                let (from, to) = ends[usize::from(round % 2 == 0)];
                if let Ok(keys) = net.supply_at(from, to, (4, 256), level) {
                    let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
                    if let Ok(fetched) = net.fetch(to, from, &ids) {
                        served += fetched.len();
                        let same = keys.iter().zip(&fetched).all(|(a, b)| a.key.ct_eq(&b.key));
                        assert!(same, "{case}: keys differ");
                    }
                }
                net.check_books();
            }
            assert!(served > 0, "{case}: no key");
            check_ledgers(&net, &names);
            // Faults off: the stock is full again, and nothing waits for ever.
            net.faults = Faults::default();
            for (a, b) in all.iter().flat_map(|a| all.iter().map(move |b| (a, b))) {
                if a < b {
                    net.connect(&node(a), &node(b));
                }
            }
            feed_chain(&mut net, &names, id, 24);
            for _ in 0..120 {
                net.run(2);
                ["alice", "zoe"]
                    .iter()
                    .for_each(|end| net.deliver_random(end));
            }
            for (from, to) in [("alice", "zoe"), ("zoe", "alice")] {
                assert!(net.stock(from, to) >= 4096, "{case}: {from}");
                let of = |at: &str| {
                    let stream = format!("{from}->{to}");
                    let books = net.kma(at).status().streams.into_iter();
                    let mut books = books.filter(|s| s.stream.to_string() == stream);
                    books
                        .next()
                        .map_or((0, 0), |s| (s.encrypting_bytes, s.decrypting_bytes))
                };
                assert_eq!(of(from).0, of(to).1, "{case}: both ends hold the same");
            }
            for name in all {
                let alarms = &net.nodes[&node(name)].alarms;
                assert!(alarms.is_empty(), "{case}: {name}: {alarms:?}");
            }
        }
    }
}
