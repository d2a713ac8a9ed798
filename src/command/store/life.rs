//! `store trace` and `store void`.

use std::collections::BTreeSet;

use qkd_keyfile::{SegmentNumber, StreamId};
use qkd_kma::{
    store::{KeyRef, Store, Trace, trace as trace_key},
    vault::{JournalView, LmdbOptions, Vault, open_lmdb, open_memory},
};
use qkd_secmem::{Locking, Pool, PoolConfig};
use serde_json::{Value, json};

use super::StoreError;
use crate::{
    config::{Config, StoreConfig},
    env::random_16,
    kek::kek_source,
};

/// Derived keys that are named on a terminal; JSON has all.
const LISTED_MAX: usize = 50;

fn find(config: &Config, id: &str) -> Result<Trace, StoreError> {
    let failed = |source| StoreError::of(config, source);
    let journal = JournalView::read(&config.store_dir()).map_err(failed)?;
    let found = trace_key(&journal, &config.node.id, id).map_err(failed)?;
    if found.keys.is_empty() {
        let id = id.to_owned();
        return Err(StoreError::Unknown { id });
    }
    Ok(found)
}

pub(super) fn trace(config: &Config, id: &str, json: bool) -> Result<(), StoreError> {
    let found = find(config, id)?;
    if json {
        let report = json!({
            "keys": names(&found.keys),
            "origins": names(&found.origins),
            "derived": names(&found.derived),
            "events": found.events.iter().map(|event| json!({
                "at": event.at.to_string(),
                "key": event.key.to_string(),
                "transition": event.transition,
                "detail": event.detail,
            })).collect::<Vec<Value>>(),
            "metadata": serde_json::to_value(&found.metadata)?,
        });
        println!("{report:#}");
        return Ok(());
    }
    println!(
        "{:<22} {:<34} {:<14} detail",
        "time (s since 1970)", "key", "transition"
    );
    for event in &found.events {
        let key = event.key.to_string();
        println!(
            "{:<22} {key:<34} {:<14} {}",
            event.at.to_string(),
            event.transition,
            event.detail
        );
    }
    list("made of, or carried under", &found.origins);
    list("cut from it, or carried under it", &found.derived);
    Ok(())
}

fn names(keys: &BTreeSet<KeyRef>) -> Vec<String> {
    keys.iter().map(ToString::to_string).collect()
}

fn list(what: &str, keys: &BTreeSet<KeyRef>) {
    println!("\n{what}: {}", keys.len());
    for key in keys.iter().take(LISTED_MAX) {
        println!("  {key}");
    }
    if keys.len() > LISTED_MAX {
        println!("  ... (all with --json)");
    }
}

/// What a suspicion concerns.
struct Suspects {
    keys: BTreeSet<KeyRef>,
    /// Segments that may be in stock here.
    here: Vec<(StreamId, SegmentNumber)>,
}

fn suspects(config: &Config, id: &str, with_origins: bool) -> Result<Suspects, StoreError> {
    let found = find(config, id)?;
    let mut keys = &found.keys | &found.derived;
    if with_origins {
        for origin in &found.origins {
            let KeyRef::QkdKey(name) = origin else {
                continue;
            };
            let more = find(config, &name.to_string())?;
            keys = &keys | &(&more.keys | &more.derived);
        }
        keys = &keys | &found.origins;
    }
    let segment = |key: &KeyRef| match key {
        KeyRef::KmaKey(stream, number) => Some((stream.clone(), *number)),
        _ => None,
    };
    // A KSA-key lies in the segment that it was cut from: that goes with it.
    let supplied = |key: &KeyRef| matches!(key, KeyRef::KsaKey(_));
    let only_supplied = found.keys.iter().all(supplied);
    let cut_from = found.parents.iter().filter(|_| only_supplied);
    let segments: BTreeSet<_> = keys.iter().chain(cut_from).filter_map(segment).collect();
    Ok(Suspects {
        keys,
        here: segments.into_iter().collect(),
    })
}

pub(super) fn void(
    config: &Config,
    id: &str,
    with_origins: bool,
    yes: bool,
    json: bool,
) -> Result<(), StoreError> {
    let suspects = suspects(config, id, with_origins)?;
    let me = &config.node.id;
    let (ours, others): (Vec<_>, Vec<_>) = suspects
        .here
        .iter()
        .partition(|(stream, _)| stream.peer_of(me).is_some());
    let voided = if yes {
        let mut store = open(config)?;
        let voided: Vec<String> = ours
            .iter()
            .filter(|(stream, number)| store.suspect(stream, *number))
            .map(|(stream, number)| format!("{stream}/{number}"))
            .collect();
        store
            .commit()
            .map_err(|source| StoreError::of(config, source))?;
        voided
    } else {
        Vec::new()
    };
    let instructions: Vec<String> = others
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
        let report = json!({
            "done": yes,
            "correlated": names(&suspects.keys),
            "voided": voided,
            "segments": suspects.here.iter().map(|(s, n)| format!("{s}/{n}")).collect::<Vec<_>>(),
            "supplied": supplied,
            "elsewhere": instructions,
        });
        println!("{report:#}");
        return Ok(());
    }
    list("correlated", &suspects.keys);
    if yes {
        println!(
            "\nvoided here: {} segments that were in stock",
            voided.len()
        );
        println!("The matching nodes are told when this node is started again.");
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
    if !instructions.is_empty() {
        println!("\nto be done at nodes that share no stream with this one:");
        instructions.iter().for_each(|line| println!("  {line}"));
    }
    Ok(())
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
