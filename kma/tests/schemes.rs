//! The four relay schemes, their levels and their policies, over chains of two to six nodes.

mod common;

use common::{Network, bytes, chain_and_centre, check_ledgers, feed_chain, node};
use qkd_keyfile::metadata::SecurityLevel;
use qkd_kma::{RandomSource, RelayPolicy, RelayScheme};

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
    for _ in 0..60 {
        net.run(2);
        ends.iter().for_each(|end| net.deliver_random(end));
    }
}

#[test]
fn every_scheme_gives_both_ends_the_same_keys_of_its_level_over_two_to_six_nodes() {
    for (scheme, level) in schemes() {
        for nodes in 2..=6 {
            let names = chain_of(nodes);
            let configs = chain_and_centre(&names, CENTRE, &policy(scheme.clone()));
            let mut net = Network::new(configs, 40 + nodes as u64);
            net.start_all();
            feed_chain(&mut net, &names, 0, 32);
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
