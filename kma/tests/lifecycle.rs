//! The life of keys: their history, what policy does with them, and what a suspicion deletes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{fs, path::Path, time::Duration};

use common::{Network, chain, check_ledgers, feed, hop_on_the_wire, node, three, with_policy};
use qkd_keyfile::{KeyMetadata, LinkId, SegmentNumber, StreamId, UnixTime, metadata::KeyType};
use qkd_kma::{
    BurnReason, Input, OperatorAct, OperatorAnswer, Purpose, Record, RelayPolicy, RelayScheme,
    Stage, SupplyError, Suspects,
    store::{KeyRef, Retention, Store, Trace, trace},
    vault::{JournalView, KekSource, LmdbOptions, StoreView, VaultError, open_lmdb},
};
use qkd_secmem::{Locking, Pool, PoolConfig};
use tempfile::TempDir;

const NAMES: [&str; 3] = ["alice", "relay", "bob"];

/// Nodes whose stores lie in folders of `dir`, named as they are.
fn on_disk(mut net: Network, dir: &Path, names: &[&str]) -> Network {
    for name in names {
        net.crash(&node(name));
        fs::create_dir_all(dir.join(name)).unwrap();
        net.nodes.get_mut(&node(name)).unwrap().dir = Some(dir.join(name).join("store"));
    }
    for name in names {
        net.start(&node(name));
    }
    net
}

fn two_on_disk(dir: &Path) -> Network {
    let mut net = Network::new(chain(&["alice", "bob"], 0), 5);
    net.start_all();
    let mut net = on_disk(net, dir, &["alice", "bob"]);
    for id in 0..8 {
        net.deliver_both("alice", "bob", id, 1024);
    }
    net.run(20);
    net
}

fn traced(dir: &Path, name: &str, id: &str) -> Trace {
    let journal = JournalView::read(&dir.join(name).join("store")).unwrap();
    trace(&journal, &node(name), id).unwrap()
}

fn link(a: &str, b: &str) -> StreamId {
    StreamId::Link(LinkId::between(&node(a), &node(b)).unwrap())
}

#[test]
fn a_key_is_traced_over_a_relay_to_qkd_keys_and_back_also_through_archives() {
    let dir = TempDir::new().unwrap();
    let mut net = three(31);
    for state in net.nodes.values_mut() {
        state.journal_limit_bytes = 8 << 10;
    }
    let mut net = on_disk(net, dir.path(), &NAMES);
    let mut given = Vec::new();
    for round in 0..12 {
        feed(&mut net, round * 4, 4);
        net.run(10);
        if let Ok(keys) = net.supply("alice", "bob", 4, 256) {
            let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
            net.fetch("bob", "alice", &ids).unwrap();
            given.extend(ids);
        }
    }
    let archives = fs::read_dir(dir.path().join("alice/store")).unwrap();
    let archives = archives.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_str().unwrap().starts_with("archive-")
    });
    assert!(archives.count() >= 2, "the journal was compacted");
    let first = given[0].to_string();
    let mut suspects = Vec::new();
    for (name, other) in [("alice", "relay"), ("bob", "relay")] {
        let story = traced(dir.path(), name, &first);
        assert_eq!(story.keys, [KeyRef::KsaKey(given[0])].into());
        let unit = |key: &&KeyRef| matches!(key, KeyRef::KmaKey(StreamId::EndToEnd { source, .. }, _) if *source == node("alice"));
        assert_eq!(story.origins.iter().filter(unit).count(), 1, "{name}");
        let pads = |key: &&KeyRef| matches!(key, KeyRef::KmaKey(stream, _) if *stream == link(name, other));
        assert!(
            story.origins.iter().any(|key| pads(&key)),
            "{name}: {story:?}"
        );
        let qkd_key = story
            .origins
            .iter()
            .find(|k| matches!(k, KeyRef::QkdKey(_)));
        let Some(KeyRef::QkdKey(qkd_key)) = qkd_key else {
            panic!("{name}: no QKD-key");
        };
        suspects.push((name, qkd_key.to_string()));
        for transition in ["received", "stored", "used as pad", "relayed", "cut"] {
            let happened = story
                .events
                .iter()
                .any(|event| event.transition == transition);
            let taken_elsewhere = transition == "used as pad" || transition == "received";
            assert!(
                happened || (taken_elsewhere && name == "bob"),
                "{name}: {transition}"
            );
        }
    }
    // From the QKD-key to all that came of it.
    for (name, qkd_key) in suspects {
        let story = traced(dir.path(), name, &qkd_key);
        assert_eq!(story.keys.len(), 1);
        assert!(
            story.derived.contains(&KeyRef::KsaKey(given[0])),
            "{name} {qkd_key}"
        );
        assert!(story.origins.is_empty());
    }
    // The way station knows the unit by its address, and what it was carried under on both sides.
    let unit = traced(dir.path(), "alice", &first).parents;
    let Some(KeyRef::KmaKey(stream, number)) = unit.first() else {
        panic!("{unit:?}");
    };
    let story = traced(dir.path(), "relay", &format!("{stream}/{number}"));
    for other in ["alice", "bob"] {
        let under = |key: &KeyRef| matches!(key, KeyRef::KmaKey(stream, _) if *stream == link("relay", other));
        assert!(story.origins.iter().any(under), "{other}");
    }
    assert!(traced(dir.path(), "alice", "no-such-key").keys.is_empty());
}

#[test]
fn a_unit_that_is_a_link_key_is_traced_to_the_bits_that_were_reserved_for_it() {
    let dir = TempDir::new().unwrap();
    let policy = RelayPolicy {
        scheme: RelayScheme::LinkKey,
        ..RelayPolicy::default()
    };
    let mut net = Network::new(with_policy(chain(&NAMES, 4096), &policy), 17);
    net.start_all();
    let mut net = on_disk(net, dir.path(), &NAMES);
    feed(&mut net, 0, 24);
    net.run(40);
    let keys = net.supply("alice", "bob", 1, 256).unwrap();
    net.fetch("bob", "alice", &[keys[0].key_id]).unwrap();
    let story = traced(dir.path(), "alice", &keys[0].key_id.to_string());
    let reserved = |key: &KeyRef| matches!(key, KeyRef::KmaKey(stream, _) if *stream == link("alice", "relay"));
    assert!(story.origins.iter().any(reserved), "{story:?}");
    let of = |kind: fn(&KeyRef) -> bool| story.origins.iter().find(|key| kind(key));
    let Some(KeyRef::QkdKey(qkd_key)) = of(|key| matches!(key, KeyRef::QkdKey(_))) else {
        panic!("no QKD-key");
    };
    let Some(KeyRef::Unit(unit)) = of(|key| matches!(key, KeyRef::Unit(_))) else {
        panic!("no unit");
    };
    let below = traced(dir.path(), "alice", &qkd_key.to_string());
    assert!(below.derived.contains(&KeyRef::KsaKey(keys[0].key_id)));
    // The way station never stored the unit, and knows what was reserved for it.
    let story = traced(dir.path(), "relay", &unit.to_string());
    assert_eq!(story.keys, [KeyRef::Unit(*unit)].into());
    assert!(story.origins.iter().any(reserved));
}

#[test]
fn a_suspected_segment_is_void_at_both_ends_and_no_key_of_it_is_given_out() {
    for (victim, other) in [("alice", "bob"), ("bob", "alice")] {
        let dir = TempDir::new().unwrap();
        let mut net = two_on_disk(dir.path());
        // Keys of both directions, of which none is fetched.
        let from_victim = net.supply(victim, other, 2, 256).unwrap();
        let from_other = net.supply(other, victim, 2, 256).unwrap();
        net.run(5);
        net.crash(&node(victim));
        let before = net.link_stock(other, victim);
        let store_dir = dir.path().join(victim).join("store");
        let suspects: Vec<(StreamId, SegmentNumber)> = [&from_victim[0], &from_other[0]]
            .iter()
            .flat_map(|key| traced(dir.path(), victim, &key.key_id.to_string()).parents)
            .map(|key| match key {
                KeyRef::KmaKey(stream, number) => (stream, number),
                other => panic!("{other}"),
            })
            .collect();
        assert_eq!(suspects.len(), 2);
        let kek = KekSource::File {
            path: dir.path().join(victim).join("kek"),
            create: false,
        };
        let pool = Pool::new(PoolConfig {
            capacity_bytes: 1 << 20,
            locking: Locking::Unlocked,
        });
        let vault = open_lmdb(
            &store_dir,
            &kek,
            LmdbOptions {
                max_bytes: 64 << 20,
            },
        )
        .unwrap();
        let mut store = Store::open(Box::new(vault), pool.unwrap(), [9; 16]).unwrap();
        for (stream, number) in &suspects {
            assert!(store.suspect(stream, *number));
            assert!(!store.suspect(stream, *number), "once is enough");
        }
        store.commit().unwrap();
        drop(store);
        // Its bytes are gone here and now, and the ledger knows that they ought to be.
        let mut view = StoreView::open(&store_dir, || Ok::<_, VaultError>(kek)).unwrap();
        let report = qkd_kma::store::check(&mut view, &mut |_, _| ()).unwrap();
        assert!(report.faults.is_empty(), "{:?}", report.faults);
        drop(view);
        net.start(&node(victim));
        net.run(60);
        for (at, from, keys) in [(other, victim, &from_victim), (victim, other, &from_other)] {
            let refused = net.fetch(at, from, &[keys[0].key_id]);
            assert_eq!(
                refused.unwrap_err(),
                SupplyError::UnknownKeyId,
                "{victim} {at}"
            );
        }
        assert!(net.link_stock(other, victim) < before);
        // The rest goes on, and nothing was used twice.
        let keys = net.supply(victim, other, 2, 256).unwrap();
        assert!(net.fetch(other, victim, &[keys[0].key_id]).is_ok());
        net.check_books();
        for name in [victim, other] {
            let journal = fs::read(dir.path().join(name).join("store/journal")).unwrap();
            let ledger = qkd_kma::store::read_ledger(&journal).unwrap();
            let ended = |record: &Record| matches!(record, Record::Closed { stream, segment } if suspects.contains(&(stream.clone(), *segment)));
            assert_eq!(ledger.iter().filter(|r| ended(r)).count(), 2, "{name}");
            assert!(net.nodes[&node(name)].alarms.is_empty());
        }
    }
}

#[test]
fn what_is_on_its_way_when_it_is_suspected_never_comes_into_stock() {
    let mut net = three(77);
    feed(&mut net, 0, 6);
    // A unit that has left alice, and is not with bob.
    let hop = hop_on_the_wire(&mut net, "alice", "relay");
    let units = StreamId::EndToEnd {
        source: node("alice"),
        destination: node("bob"),
    };
    let carried = net
        .ledger("alice")
        .into_iter()
        .rev()
        .find_map(|record| match record {
            Record::Carried {
                unit_stream,
                unit,
                pad,
                stream,
                ..
            } if unit_stream == units => Some((unit, stream, pad[0].segment)),
            _ => None,
        });
    let (unit, stream, pad) = carried.unwrap();
    let suspects = Suspects {
        segments: vec![(units.clone(), unit), (stream.clone(), pad)],
        ..Suspects::default()
    };
    let answer = net.order("alice", OperatorAct::Suspect(suspects));
    let void = vec![(stream.clone(), pad)];
    assert_eq!(
        answer,
        OperatorAnswer::Suspected { segments: void },
        "the unit was not in stock"
    );
    let (peer, bytes) = (node("alice"), hop);
    net.input(&node("relay"), Input::Message { peer, bytes });
    net.run(60);
    feed(&mut net, 6, 6);
    net.run(60);
    assert!(net.stock("alice", "bob") > 0, "other units come");
    for name in ["alice", "bob"] {
        let live = net
            .ledger(name)
            .into_iter()
            .fold(false, |live, record| match record {
                Record::Confirmed { stream, segment } if (&stream, segment) == (&units, unit) => {
                    true
                }
                Record::Stored {
                    stream,
                    segment,
                    body,
                } if (&stream, segment) == (&units, unit) && body.stage == Stage::Confirmed => true,
                _ => live,
            });
        assert!(!live, "{name}: the unit was confirmed");
    }
    // What was drawn for more than one hop is drawn anew: no later hop rests on the suspected pad.
    let ledger = net.ledger("alice");
    let at = ledger
        .iter()
        .position(|record| matches!(record, Record::Suspected { segment, .. } if *segment == pad));
    for record in &ledger[at.unwrap()..] {
        if let Record::Carried {
            stream: link,
            pad: spans,
            ..
        } = record
        {
            assert!(
                link != &stream || spans.iter().all(|span| span.segment != pad),
                "{spans:?}"
            );
        }
    }
    net.check_books();
    check_ledgers(&net, &NAMES);
}

#[test]
fn key_that_is_too_old_is_burned_by_its_owner_and_a_clock_that_jumps_expires_nothing() {
    let mut net = Network::new(chain(&["alice", "bob"], 0), 9);
    for state in net.nodes.values_mut() {
        state.retention = Retention {
            expire_after: Some(Duration::from_secs(3600)),
            ..Retention::default()
        };
    }
    net.start_all();
    for id in 0..8 {
        net.deliver_both("alice", "bob", id, 1024);
    }
    net.run(20);
    let stock = |net: &Network| {
        (
            net.link_stock("alice", "bob"),
            net.link_stock("bob", "alice"),
        )
    };
    let full = stock(&net);
    assert!(full.0 > 0 && full.1 > 0);
    // Ten years forwards, a restart, and twenty back.
    for jump in [10, -20_i64] {
        net.now.unix = UnixTime(net.now.unix.0 + jump * 365 * 24 * 3600 * 1_000_000_000);
        net.run(20);
        assert_eq!(stock(&net), full);
    }
    net.step = Duration::from_secs(400);
    net.run(5);
    net.step = Duration::from_millis(50);
    net.run(20);
    assert_eq!(stock(&net), full, "not old enough");
    net.step = Duration::from_secs(400);
    net.run(5);
    net.step = Duration::from_millis(50);
    net.run(40);
    assert_eq!(stock(&net), (0, 0));
    for name in ["alice", "bob"] {
        let accounts = net.kma(name).status().streams[0].clone();
        assert_eq!(
            (accounts.encrypting_bytes, accounts.decrypting_bytes),
            (0, 0)
        );
        let expired = |record: &Record| {
            matches!(
                record,
                Record::Taken {
                    purpose: Purpose::Burn(BurnReason::Expired),
                    ..
                }
            )
        };
        assert!(
            net.ledger(name).iter().any(expired),
            "{name} owned some of it"
        );
    }
    net.check_books();
    check_ledgers(&net, &["alice", "bob"]);
    // New key is young.
    for id in 20..28 {
        net.deliver_both("alice", "bob", id, 1024);
    }
    net.run(20);
    let keys = net.supply("alice", "bob", 1, 256).unwrap();
    assert!(net.fetch("bob", "alice", &[keys[0].key_id]).is_ok());
}

#[test]
fn a_segment_that_was_ceded_is_traced_at_both_ends_and_expired_by_its_new_owner() {
    let dir = TempDir::new().unwrap();
    let mut net = two_on_disk(dir.path());
    for name in ["alice", "bob"] {
        let state = net.nodes.get_mut(&node(name)).unwrap();
        state.retention.expire_after = Some(Duration::from_secs(3600));
        state.journal_limit_bytes = 4 << 10;
        net.crash(&node(name));
        net.start(&node(name));
    }
    net.run(20);
    // More than she has: bob cedes, and nothing is used.
    assert!(net.supply("alice", "bob", 500, 256).is_err());
    net.run(60);
    let stream = link("alice", "bob");
    let records = |name: &str| {
        let mut records = Vec::new();
        let mut each = |bytes: &[u8]| records.push(postcard::from_bytes(bytes).unwrap());
        let journal = JournalView::read(&dir.path().join(name).join("store")).unwrap();
        journal.each_archived_record(&mut each).unwrap();
        journal.each_record(&mut each);
        records
    };
    let ceded = |record: &Record| match record {
        Record::Ceded { segment, .. } => Some(*segment),
        _ => None,
    };
    let segment = records("bob").iter().find_map(ceded).expect("bob ceded");
    for (name, transition, key_type) in [
        ("alice", "acquired", KeyType::Encrypting),
        ("bob", "ceded", KeyType::Decrypting),
    ] {
        let story = traced(dir.path(), name, &format!("{stream}/{segment}"));
        let mut transitions = story.events.iter().map(|event| event.transition);
        assert!(transitions.any(|t| t == transition), "{name}: {story:?}");
        let kma = story.metadata.iter().find_map(|metadata| match metadata {
            KeyMetadata::Kma(kma) => kma.key_type,
            _ => None,
        });
        assert_eq!(kma, Some(key_type), "{name}");
    }
    net.step = Duration::from_secs(400);
    net.run(11);
    net.step = Duration::from_millis(50);
    net.run(40);
    let expired = |record: &Record| {
        let expired = Purpose::Burn(BurnReason::Expired);
        matches!(record, Record::Taken { span, purpose, .. } if span.segment == segment && *purpose == expired)
    };
    assert!(records("alice").iter().any(expired));
    assert!(!records("bob").iter().any(expired));
    assert_eq!(net.link_stock("alice", "bob"), 0);
    net.check_books();
}

#[test]
fn used_up_segments_are_preserved_for_as_long_as_policy_says() {
    let dir = TempDir::new().unwrap();
    let mut net = Network::new(chain(&["alice", "bob"], 0), 11);
    for state in net.nodes.values_mut() {
        state.retention.preserve_for = Some(Duration::from_secs(3600));
        let links = state.config.neighbours.values_mut();
        links.for_each(|link| link.floor_bytes = 0);
    }
    net.start_all();
    let mut net = on_disk(net, dir.path(), &["alice", "bob"]);
    for id in 0..4 {
        net.deliver_both("alice", "bob", id, 1024);
    }
    net.run(20);
    let keys = net.supply("alice", "bob", 31, 256).unwrap();
    let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
    net.fetch("bob", "alice", &ids).unwrap();
    net.run(60);
    let check = |name: &str| {
        let kek = || {
            Ok::<_, VaultError>(KekSource::File {
                path: dir.path().join(name).join("kek"),
                create: false,
            })
        };
        let mut view = StoreView::open(&dir.path().join(name).join("store"), kek).unwrap();
        let report = qkd_kma::store::check(&mut view, &mut |_, _| ()).unwrap();
        assert!(report.faults.is_empty(), "{:?}", report.faults);
        let survey = qkd_kma::store::Survey::of(&view.journal).unwrap();
        (survey.preserved().0, report.rows)
    };
    for name in ["alice", "bob"] {
        net.crash(&node(name));
        assert_eq!(check(name), (1, 4), "three in stock, one preserved");
        net.start(&node(name));
    }
    // It is in no stock, and cannot be had again.
    net.run(20);
    assert!(net.fetch("bob", "alice", &ids[..1]).is_err());
    net.step = Duration::from_secs(4000);
    net.run(2);
    net.step = Duration::from_millis(50);
    net.run(20);
    for name in ["alice", "bob"] {
        net.crash(&node(name));
        assert_eq!(check(name), (0, 3), "{name}");
        net.start(&node(name));
    }
    net.run(5);
    net.check_books();
}
