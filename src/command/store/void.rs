//! `store void`: at a node that runs, which is asked to do it, or in the store of one that does not.

use std::{collections::BTreeSet, os::unix::net::UnixStream, path::PathBuf};

use qkd_keyfile::{KmaKeyId, QkdKeyName, SegmentNumber, StreamId};
use qkd_kma::{
    OperatorAct, OperatorAnswer,
    store::{KeyRef, Store},
    vault::{LmdbOptions, Vault, open_lmdb, open_memory},
};
use qkd_secmem::{Locking, Pool, PoolConfig};
use serde_json::json;

use super::{
    StoreError,
    trace::{find, list, names},
};
use crate::{
    config::{Config, StoreConfig},
    env::random_16,
    kek::kek_source,
    node,
};

/// Keys in one order to a running node.
const ORDER_MAX: usize = 8192;

/// How often a running node is asked before what it makes of suspected keys must have come to an end.
const ROUNDS_MAX: usize = 16;

/// What is suspected.
#[derive(Debug, Clone, Copy)]
pub(super) struct Suspicion<'a> {
    pub(super) id: &'a str,
    /// What the key was made of too.
    pub(super) with_origins: bool,
}

/// What a suspicion concerns.
struct Suspects {
    keys: BTreeSet<KeyRef>,
    /// Segments that may be in stock, here or elsewhere.
    segments: BTreeSet<(StreamId, SegmentNumber)>,
}

impl Suspects {
    fn of(config: &Config, suspicion: Suspicion<'_>) -> Result<Self, StoreError> {
        let found = find(config, suspicion.id)?;
        let mut keys = &found.keys | &found.derived;
        if suspicion.with_origins {
            for origin in &found.origins {
                if let KeyRef::QkdKey(name) = origin {
                    let more = find(config, &name.to_string())?;
                    keys = &keys | &(&more.keys | &more.derived);
                }
            }
            keys = &keys | &found.origins;
        }
        // A KSA-key lies in the segment that it was cut from: that goes with it.
        let supplied = |key: &KeyRef| matches!(key, KeyRef::KsaKey(_));
        let only_supplied = found.keys.iter().all(supplied);
        let cut_from = found.parents.iter().filter(|_| only_supplied);
        let segment = |key: &KeyRef| match key {
            KeyRef::KmaKey(stream, number) => Some((stream.clone(), *number)),
            _ => None,
        };
        let segments = keys.iter().chain(cut_from).filter_map(segment).collect();
        Ok(Self { keys, segments })
    }

    fn qkd_keys(&self) -> BTreeSet<QkdKeyName> {
        let name = |key: &KeyRef| match key {
            KeyRef::QkdKey(name) => Some(name.clone()),
            _ => None,
        };
        self.keys.iter().filter_map(name).collect()
    }

    fn units(&self) -> BTreeSet<KmaKeyId> {
        let unit = |key: &KeyRef| match key {
            KeyRef::Unit(id) => Some(*id),
            _ => None,
        };
        self.keys.iter().filter_map(unit).collect()
    }

    /// Those segments that this node has a part in, and those that it has none in.
    fn ours_and_others(&self, config: &Config) -> [BTreeSet<(StreamId, SegmentNumber)>; 2] {
        let all = self.segments.iter().cloned();
        let (ours, others) = all.partition(|(stream, _)| stream.peer_of(&config.node.id).is_some());
        [ours, others]
    }
}

/// What was done.
struct Voided {
    suspects: Suspects,
    segments: Vec<(StreamId, SegmentNumber)>,
    at_running_node: bool,
}

pub(super) fn run(
    config: &Config,
    suspicion: Suspicion<'_>,
    yes: bool,
    json: bool,
) -> Result<(), StoreError> {
    let voided = if yes {
        // One that was killed leaves its socket, and nobody listens.
        let socket = config.order_socket();
        match UnixStream::connect(&socket) {
            Ok(_) => at_running_node(config, suspicion, socket)?,
            Err(_) => in_store(config, suspicion)?,
        }
    } else {
        Voided {
            suspects: Suspects::of(config, suspicion)?,
            segments: Vec::new(),
            at_running_node: false,
        }
    };
    report(config, &voided, yes, json);
    Ok(())
}

/// The node goes on meanwhile: what it made of a suspected key before it was told is found when its
/// ledger is read again.
fn at_running_node(
    config: &Config,
    suspicion: Suspicion<'_>,
    socket: PathBuf,
) -> Result<Voided, StoreError> {
    let (mut told_keys, mut told_segments, mut told_units) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let mut segments = Vec::new();
    for _ in 0..ROUNDS_MAX {
        let suspects = Suspects::of(config, suspicion)?;
        let [ours, _] = suspects.ours_and_others(config);
        let mut orders = Vec::new();
        for part in news(suspects.qkd_keys(), &mut told_keys) {
            orders.push(qkd_kma::Suspects {
                qkd_keys: part,
                ..qkd_kma::Suspects::default()
            });
        }
        for part in news(ours, &mut told_segments) {
            orders.push(qkd_kma::Suspects {
                segments: part,
                ..qkd_kma::Suspects::default()
            });
        }
        for part in news(suspects.units(), &mut told_units) {
            orders.push(qkd_kma::Suspects {
                units: part,
                ..qkd_kma::Suspects::default()
            });
        }
        if orders.is_empty() {
            return Ok(Voided {
                suspects,
                segments,
                at_running_node: true,
            });
        }
        for order in orders {
            let answer = node::order(&socket, &OperatorAct::Suspect(order));
            let answer = answer.map_err(|source| {
                let socket = socket.clone();
                StoreError::NoAnswer { socket, source }
            })?;
            if let OperatorAnswer::Suspected { segments: void } = answer {
                segments.extend(void);
            }
        }
    }
    Err(StoreError::Unsettled)
}

/// What was not told before, in parts; it counts as told.
fn news<T: Ord + Clone>(found: BTreeSet<T>, told: &mut BTreeSet<T>) -> Vec<Vec<T>> {
    let fresh: Vec<T> = found.difference(told).cloned().collect();
    told.extend(found);
    fresh.chunks(ORDER_MAX).map(<[T]>::to_vec).collect()
}

fn in_store(config: &Config, suspicion: Suspicion<'_>) -> Result<Voided, StoreError> {
    let suspects = Suspects::of(config, suspicion)?;
    let mut store = open(config)?;
    store.suspect_qkd_keys(suspects.qkd_keys());
    let [ours, _] = suspects.ours_and_others(config);
    let segments = ours
        .into_iter()
        .filter(|(stream, number)| store.suspect(stream, *number))
        .collect();
    store
        .commit()
        .map_err(|source| StoreError::of(config, source))?;
    Ok(Voided {
        suspects,
        segments,
        at_running_node: false,
    })
}

fn report(config: &Config, voided: &Voided, yes: bool, json: bool) {
    let suspects = &voided.suspects;
    let [ours, others] = suspects.ours_and_others(config);
    let elsewhere: Vec<String> = others
        .iter()
        .flat_map(|(stream, number)| ends(stream).map(move |node| (node, stream, number)))
        .map(|(node, stream, number)| {
            format!(
                "at {node}: qkd-bridge store void --config {node}.toml '{stream}/{number}' --yes"
            )
        })
        .collect();
    let supplied: Vec<String> = suspects
        .keys
        .iter()
        .filter(|key| matches!(key, KeyRef::KsaKey(_)))
        .map(ToString::to_string)
        .collect();
    if json {
        let named = |(stream, number): &(StreamId, SegmentNumber)| format!("{stream}/{number}");
        let report = json!({
            "done": yes,
            "at_running_node": voided.at_running_node,
            "correlated": names(&suspects.keys),
            "voided": voided.segments.iter().map(named).collect::<Vec<_>>(),
            "segments": suspects.segments.iter().map(named).collect::<Vec<_>>(),
            "supplied": supplied,
            "elsewhere": elsewhere,
        });
        println!("{report:#}");
        return;
    }
    list("correlated", &suspects.keys);
    if yes {
        let count = voided.segments.len();
        println!("\nvoided here: {count} segments that were in stock");
        let when = if voided.at_running_node {
            "now, or as soon as they are connected"
        } else {
            "when this node is started again"
        };
        println!("The matching nodes are told {when}.");
    } else {
        println!(
            "\nnothing was changed; with --yes {} segments are voided here",
            ours.len()
        );
    }
    if !supplied.is_empty() {
        println!(
            "\n{} keys were given to applications: tell them.",
            supplied.len()
        );
    }
    if !elsewhere.is_empty() {
        println!("\nto be done at nodes that share no stream with this one:");
        elsewhere.iter().for_each(|line| println!("  {line}"));
    }
}

fn ends(stream: &StreamId) -> impl Iterator<Item = String> {
    let (one, other) = match stream {
        StreamId::Link(link) => (link.proposer(), link.answerer()),
        StreamId::EndToEnd {
            source,
            destination,
        } => (source, destination),
    };
    [one.to_string(), other.to_string()].into_iter()
}

/// Opens a store to change it, as a node does.
fn open(config: &Config) -> Result<Store, StoreError> {
    let failed = |source| StoreError::of(config, source);
    let pool = Pool::new(PoolConfig {
        capacity_bytes: 4 << 20,
        locking: Locking::Preferred,
    })
    .map_err(std::io::Error::other)?;
    let dir = config.store_dir();
    let vault: Box<dyn Vault> = match &config.store {
        StoreConfig::Memory => Box::new(open_memory(&dir, pool.clone()).map_err(failed)?),
        StoreConfig::Lmdb { kek, max_gib, .. } => {
            let options = LmdbOptions {
                max_bytes: max_gib << 30,
            };
            Box::new(open_lmdb(&dir, &kek_source(kek, false)?, options).map_err(failed)?)
        }
    };
    Store::open(vault, pool, random_16()).map_err(failed)
}
