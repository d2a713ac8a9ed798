//! All 26 metadata items of ITU-T Y.3803, Table 1, through a restart.

use std::collections::BTreeMap;

use qkd_keyfile::{
    AppId, Composition, Generation, KeyMetadata, KeySpan, KmaKeyId, KsaKeyId, LinkId, ModuleId,
    Mono, NodeId, Now, Piece, QkdKeyId, QkdKeyName, StreamId, UnixTime,
    metadata::{
        HashAlgorithm, HashValue, KeyType, KmaKeyMetadata, KsaKeyMetadata, QkdKeyMetadata,
        RelayEncryption, RelayHop, RelayedKeyMetadata, SecurityLevel,
    },
};
use qkd_secmem::{Locking, Pool, PoolConfig};
use sha2::{Digest, Sha256};

use super::{NewSegment, Store, trace};
use crate::{
    record::{Binding, Purpose, Stage},
    vault::{JournalView, KekSource, LmdbOptions, open_lmdb},
};

fn id<T: std::str::FromStr<Err = qkd_keyfile::IdError>>(text: &str) -> T {
    text.parse().unwrap()
}

fn open(dir: &std::path::Path) -> Store {
    let kek = KekSource::File {
        path: dir.join("kek"),
        create: true,
    };
    let options = LmdbOptions {
        max_bytes: 16 << 20,
    };
    let vault = open_lmdb(&dir.join("store"), &kek, options).unwrap();
    let pool = Pool::new(PoolConfig {
        capacity_bytes: 1 << 20,
        locking: Locking::Unlocked,
    });
    Store::open(Box::new(vault), pool.unwrap(), [1; 16]).unwrap()
}

fn at(seconds: i64) -> Now {
    Now {
        mono: Mono::default(),
        unix: UnixTime(seconds * 1_000_000_000 + 7),
    }
}

fn hash() -> HashValue {
    HashValue {
        algorithm: HashAlgorithm::Sha256,
        digest: vec![0xD1; 32],
    }
}

fn qkd_key() -> QkdKeyMetadata {
    QkdKeyMetadata {
        qkd_key_id: id("0000be38"),
        key_bits: Some(512),
        module: Some(id::<ModuleId>("tx-1")),
        matching_module: Some(id::<ModuleId>("rx-1")),
        generated_at: Some(UnixTime(-5)),
        hash: Some(hash()),
    }
}

fn relayed(me: &NodeId, peer: &NodeId) -> RelayedKeyMetadata {
    RelayedKeyMetadata {
        source_kma: Some(id("relay")),
        destination_kma: Some(me.clone()),
        relayed_at: Some(UnixTime(99)),
        encryption: Some(RelayEncryption::OneTimePad),
        kma_key: KmaKeyMetadata {
            key_bits: Some(512),
            key_type: Some(KeyType::Encrypting),
            kma: Some(peer.clone()),
            generated_at: Some(UnixTime(98)),
            ..KmaKeyMetadata::new(KmaKeyId([8; 16]), me.clone())
        },
        level: SecurityLevel::Any,
        hops: vec![RelayHop {
            from: peer.clone(),
            to: id("relay"),
            at: UnixTime(98),
            encryption: RelayEncryption::OneTimePad,
        }],
    }
}

/// A link segment with a key for applications, and a unit that was relayed here.
fn fill(store: &mut Store, me: &NodeId, peer: &NodeId) -> (StreamId, StreamId) {
    let name = QkdKeyName {
        module_pair: id("mp1"),
        generation: Generation(0),
        id: id("0000be38"),
    };
    store.set_time(at(1_000));
    store.receive(&name, 512, qkd_key());
    let link = StreamId::Link(LinkId::between(me, peer).unwrap());
    let number = store.propose(&link, None);
    store.set_time(at(1_001));
    let new = NewSegment {
        stream: link.clone(),
        number,
        stage: Stage::Confirmed,
        key_type: KeyType::Encrypting,
        total_bits: 512,
        head_bytes: 32,
        level: SecurityLevel::Qkd,
        kma_key_id: KmaKeyId([7; 16]),
        composition: Some(Composition {
            module_pair: id("mp1"),
            generation: Generation(0),
            pieces: vec![Piece {
                qkd_key: id("0000be38"),
                offset_bits: 0,
                len_bits: 512,
            }],
        }),
        key: store.pool().copy_of(&[0xA5; 64]).unwrap(),
        relayed: None,
    };
    store.store(new).unwrap();
    store.use_qkd_keys([name]);
    store.set_time(at(1_002));
    let names: BTreeMap<AppId, String> = [(id("app-a"), "the ledger of a bank".to_owned())].into();
    store.name_applications(&names);
    let spans = store.plan_pad(&link, 16, 0).unwrap();
    store.take(&link, &spans, Purpose::Supply);
    let binding = Binding {
        key_id: KsaKeyId::from_random([3; 16]),
        stream: link.clone(),
        span: spans[0],
        master: id("app-a"),
        applications: vec![id("app-b")],
    };
    store.bind(peer, binding);
    let units = StreamId::EndToEnd {
        source: peer.clone(),
        destination: me.clone(),
    };
    let relayed = relayed(me, peer);
    let new = NewSegment {
        stream: units.clone(),
        number: qkd_keyfile::SegmentNumber(4),
        stage: Stage::Answered,
        key_type: KeyType::Decrypting,
        total_bits: 512,
        head_bytes: 48,
        level: SecurityLevel::Any,
        kma_key_id: KmaKeyId([8; 16]),
        composition: None,
        key: store.pool().copy_of(&[0x5A; 64]).unwrap(),
        relayed: Some(&relayed),
    };
    store.store(new).unwrap();
    store.commit().unwrap();
    (link, units)
}

#[test]
fn all_26_items_of_table_1_survive_restart_and_compaction() {
    let dir = tempfile::TempDir::new().unwrap();
    let (me, peer): (NodeId, NodeId) = (id("alice"), id("bob"));
    let (link, units) = fill(&mut open(dir.path()), &me, &peer);
    for compacted in [false, true] {
        let mut store = open(dir.path());
        if compacted {
            assert!(store.compact_if_large(0).unwrap());
            drop(store);
            for file in std::fs::read_dir(dir.path().join("store")).unwrap() {
                let path = file.unwrap().path();
                if path.to_string_lossy().contains("archive-") {
                    std::fs::remove_file(path).unwrap();
                }
            }
            store = open(dir.path());
        }
        // Hashes (items 6 and 15) are sealed, or made from the bits, and leave no trace in the ledger.
        let number = qkd_keyfile::SegmentNumber(0);
        let hashes = store.qkd_key_hashes(&link, number).unwrap();
        assert_eq!(hashes, [(id::<QkdKeyId>("0000be38"), hash())]);
        let made = store.kma_key_hash(&link, number).unwrap();
        assert_eq!(made.digest, Sha256::digest([0xA5; 64]).to_vec());
        drop(store);
        let journal = std::fs::read(dir.path().join("store/journal")).unwrap();
        assert!(!journal.windows(16).any(|bytes| bytes == [0xD1; 16]));
        assert!(!journal.windows(16).any(|bytes| bytes == [0xA5; 16]));

        let journal = JournalView::read(&dir.path().join("store")).unwrap();
        let metadata = |id: &str| trace(&journal, &me, id).unwrap().metadata;
        // Group (1), in the journal for as long as its archive is kept.
        if !compacted {
            let expected = QkdKeyMetadata {
                hash: None,
                ..qkd_key()
            };
            assert_eq!(metadata("0000be38"), [KeyMetadata::Qkd(expected)]);
        }
        // Group (2).
        let expected = KmaKeyMetadata {
            kma_key_id: KmaKeyId([7; 16]),
            key_bits: Some(512),
            key_type: Some(KeyType::Encrypting),
            kma: Some(me.clone()),
            matching_kma: peer.clone(),
            generated_at: Some(at(1_001).unix),
            modules: vec![id("tx-1")],
            matching_modules: vec![id("rx-1")],
            hash: None,
        };
        assert_eq!(
            metadata(&KmaKeyId([7; 16]).to_string()),
            [KeyMetadata::Kma(expected)]
        );
        // Group (3), with the source's group (2) inside.
        let found = metadata(&format!("{units}/4"));
        assert!(
            found.contains(&KeyMetadata::Relayed(relayed(&me, &peer))),
            "{found:?}"
        );
        // Group (4).
        if !compacted {
            let expected = KsaKeyMetadata {
                ksa_key_id: KsaKeyId::from_random([3; 16]),
                key_bits: Some(128),
                supplied_at: Some(at(1_002).unix),
                application_name: Some("the ledger of a bank".to_owned()),
                source_application: Some(id("app-a")),
                destination_application: Some(id("app-b")),
            };
            assert_eq!(
                metadata(&KsaKeyId::from_random([3; 16]).to_string()),
                [KeyMetadata::Ksa(expected)]
            );
        }
    }
}

#[test]
fn a_binding_that_comes_after_its_bits_were_suspected_waits_for_nobody() {
    let dir = tempfile::TempDir::new().unwrap();
    let (me, peer): (NodeId, NodeId) = (id("alice"), id("bob"));
    let mut store = open(dir.path());
    let (_, units) = fill(&mut store, &me, &peer);
    let segment = qkd_keyfile::SegmentNumber(4);
    assert!(store.confirm(&units, segment));
    assert!(store.suspect(&units, segment));
    let binding = Binding {
        key_id: KsaKeyId::from_random([9; 16]),
        stream: units.clone(),
        span: KeySpan {
            segment,
            offset_bytes: 48,
            len_bytes: 16,
        },
        master: id("app-a"),
        applications: vec![id("app-b")],
    };
    store.receive_binding(&peer, 0, binding).unwrap();
    assert!(store.state().received.is_empty());
    // So the segment is done with, and closed.
    assert_eq!(store.segment(&units, segment).unwrap().bindings, 0);
    assert!(store.stream(&units).unwrap().finished.contains(&segment));
    assert_eq!(store.inconsistencies(), 0);
}
