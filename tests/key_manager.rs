//! Two nodes whose modules are vendors' key managers: one end pulls keys, the other fetches the same
//! keys by their IDs, over ETSI GS QKD 014 and real TLS.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{fs, future::poll_fn, sync::atomic::Ordering, time::Duration};

use qkd_bridge::demo::{LinkPlan, PairPlan, Plan, Transport, application};
use qkd_drivers::{
    AlarmCode, Etsi014Config, Event, KeySource, Settlement, etsi014::Role, next_event,
};
use qkd_keyfile::{KsaKeyId, QkdKeyId};
use serde_json::Value;
use subtle::ConstantTimeEq;
use support::{
    Net,
    vendor::{KeyManager, Vendor, config, open, qkd_key_id, vendor_pki},
};

const PATIENCE: Duration = Duration::from_secs(60);

async fn event(source: &mut dyn KeySource) -> (Event, Vec<u8>) {
    let mut out = vec![0; source.max_block_bytes()];
    let event = tokio::time::timeout(PATIENCE, next_event(source, &mut out));
    (event.await.unwrap().unwrap(), out)
}

async fn key(source: &mut dyn KeySource) -> (QkdKeyId, Vec<u8>) {
    loop {
        match event(source).await {
            (Event::Key(block), key) => {
                assert_eq!(block.key_bits as usize, key.len() * 8);
                return (block.metadata.qkd_key_id, key);
            }
            (Event::Attached { .. }, _) => {}
            (other, _) => panic!("a key was expected, not {other:?}"),
        }
    }
}

async fn quiet(source: &mut dyn KeySource) {
    let mut out = vec![0; source.max_block_bytes()];
    let event = next_event(source, &mut out);
    if let Ok(event) = tokio::time::timeout(Duration::from_millis(150), event).await {
        panic!("nothing was expected, not {event:?}");
    }
}

#[tokio::test]
async fn what_one_end_pulls_the_other_fetches_by_id() {
    let (vendor, pki) = (Vendor::new(1000), vendor_pki());
    let [a, b] = [
        KeyManager::start(&vendor, pki.path()).await,
        KeyManager::start(&vendor, pki.path()).await,
    ];
    let mut alice = open(config(pki.path(), a.address, Role::Pull));
    let mut bob = open(config(pki.path(), b.address, Role::Fetch));
    bob.grant(1000);
    // Nothing is pulled without credit, and not more than there is credit for.
    let waiting = poll_fn(|cx| std::task::Poll::Ready(alice.poll(cx, &mut [0; 32]).is_pending()));
    assert!(waiting.await);
    assert_eq!(vendor.drawn.load(Ordering::Relaxed), 0);
    alice.grant(20);
    let mut pulled = Vec::new();
    for _ in 0..20 {
        pulled.push(key(&mut *alice).await);
    }
    quiet(&mut *alice).await;
    assert_eq!(vendor.drawn.load(Ordering::Relaxed), 20);
    let ids: Vec<_> = pulled.iter().map(|(id, _)| id.clone()).collect();
    bob.request(&ids);
    bob.request(&ids);
    for _ in 0..20 {
        let (id, bytes) = key(&mut *bob).await;
        let ours = pulled.iter().find(|(ours, _)| *ours == id).unwrap();
        assert!(bool::from(bytes.ct_eq(&ours.1)));
        bob.settle(&id, Settlement::Stored);
        bob.request(&[id]);
    }
    quiet(&mut *bob).await;
    assert!(vendor.keys.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_key_that_is_not_there_yet_is_asked_for_again_and_given_up_in_the_end() {
    let (vendor, pki) = (Vendor::new(1000), vendor_pki());
    let kme = KeyManager::start(&vendor, pki.path()).await;
    let mut bob = open(config(pki.path(), kme.address, Role::Fetch));
    bob.grant(10);
    let there = vendor.draw();
    let missing = qkd_key_id(KsaKeyId::from_random([9; 16]));
    vendor.synchronised.store(false, Ordering::Relaxed);
    bob.request(&[qkd_key_id(there.id), missing.clone()]);
    assert!(matches!(event(&mut *bob).await.0, Event::Attached { .. }));
    vendor.synchronised.store(true, Ordering::Relaxed);
    assert_eq!(key(&mut *bob).await.0, qkd_key_id(there.id));
    assert_eq!(event(&mut *bob).await.0, Event::Empty { id: missing });
    quiet(&mut *bob).await;
}

#[tokio::test]
async fn a_key_manager_that_goes_away_and_comes_back_is_attached_again() {
    let (vendor, pki) = (Vendor::new(3), vendor_pki());
    let kme = KeyManager::start(&vendor, pki.path()).await;
    let address = kme.address;
    let mut alice = open(Etsi014Config {
        keys_per_request: 1,
        ..config(pki.path(), address, Role::Pull)
    });
    alice.grant(10);
    for _ in 0..3 {
        key(&mut *alice).await;
    }
    // No key left: no alarm, and no loop.
    quiet(&mut *alice).await;
    kme.stop.send_replace(true);
    drop(kme);
    let (gone, _) = event(&mut *alice).await;
    assert!(matches!(gone, Event::Detached { .. }), "{gone:?}");
    quiet(&mut *alice).await;
}

#[tokio::test]
async fn a_length_of_key_that_the_key_manager_does_not_have_is_an_alarm_told_once() {
    let (vendor, pki) = (Vendor::new(1000), vendor_pki());
    let kme = KeyManager::start(&vendor, pki.path()).await;
    let mut alice = open(Etsi014Config {
        key_bits: 64,
        ..config(pki.path(), kme.address, Role::Pull)
    });
    alice.grant(1);
    assert!(matches!(event(&mut *alice).await.0, Event::Attached { .. }));
    let Event::Alarm(alarm) = event(&mut *alice).await.0 else {
        panic!("an alarm was expected");
    };
    assert_eq!(alarm.code, AlarmCode::KeyManagerRefuses { status: 400 });
    quiet(&mut *alice).await;
}

/// The link's counters of both ends.
fn confirmed(statuses: &[(String, Value)]) -> Vec<u64> {
    let of = |(_, status): &(String, Value)| {
        let streams = status["streams"].as_object().unwrap().values();
        streams
            .filter_map(|stream| stream["confirmed_segments"].as_u64())
            .sum()
    };
    statuses.iter().map(of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_two_key_managers_become_keys_of_applications_at_two_nodes() {
    let (vendor, pki) = (Vendor::new(100_000), vendor_pki());
    let managers = [
        KeyManager::start(&vendor, pki.path()).await,
        KeyManager::start(&vendor, pki.path()).await,
    ];
    let node = |id: &str| id.parse().unwrap();
    let plan = Plan {
        nodes: vec![node("alice"), node("bob")],
        links: vec![LinkPlan {
            a: node("alice"),
            b: node("bob"),
            pairs: vec![PairPlan {
                name: "vendor".to_owned(),
                transport: Transport::Files,
                block_bits: 4096,
                pace: 1.0,
            }],
        }],
        stock: None,
        apps: vec![
            ("app-a".parse().unwrap(), node("alice")),
            ("app-b".parse().unwrap(), node("bob")),
        ],
        key_memory_mib: 8,
    };
    let mut net = Net::start_without_devices(plan, |network| {
        for (id, manager, role) in [
            ("alice", &managers[0], Role::Pull),
            ("bob", &managers[1], Role::Fetch),
        ] {
            let file = &network.node(id).unwrap().config;
            let text = fs::read_to_string(file).unwrap();
            let Etsi014Config {
                peer_sae,
                ca,
                certificate,
                key,
                ..
            } = config(pki.path(), manager.address, role);
            let role = if role == Role::Pull { "pull" } else { "fetch" };
            let driver = format!(
                "driver = {{ kind = \"etsi014\", host = \"127.0.0.1\", port = {}, \
                 role = \"{role}\", peer_sae = \"{peer_sae}\", ca = {ca:?}, \
                 certificate = {certificate:?}, key = {key:?}, poll_interval_ms = 50 }}",
                manager.address.port()
            );
            let lines = text.lines().map(|line| {
                if line.starts_with("driver = ") {
                    driver.as_str()
                } else {
                    line
                }
            });
            let changed = lines.collect::<Vec<_>>().join("\n");
            assert_ne!(changed, text);
            fs::write(file, changed).unwrap();
        }
    });
    net.wait_until("confirmed keys", PATIENCE, |statuses| {
        statuses.len() == 2 && confirmed(statuses).iter().all(|&count| count > 8)
    })
    .await;
    let [mut a, mut b] = ["app-a", "app-b"].map(|id| application(&net.network, id).unwrap());
    let start = std::time::Instant::now();
    let ours = loop {
        match a.enc_keys(b.id(), 4, 256).await {
            Ok(keys) => break keys,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let ids: Vec<&str> = ours.iter().map(|key| key.id.as_str()).collect();
    let theirs = loop {
        match b.dec_keys(a.id(), &ids).await {
            Ok(keys) => break keys,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(ours.len(), 4);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours.id, theirs.id);
        assert!(bool::from(ours.key.ct_eq(&theirs.key)));
    }
}
