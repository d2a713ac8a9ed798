//! `store trace`.

use std::collections::BTreeSet;

use qkd_kma::{
    store::{KeyRef, Trace, trace as trace_key},
    vault::JournalView,
};
use serde_json::{Value, json};

use super::StoreError;
use crate::config::Config;

/// Derived keys that are named on a terminal; JSON has all.
const LISTED_MAX: usize = 50;

pub(super) fn find(config: &Config, id: &str) -> Result<Trace, StoreError> {
    let failed = |source| StoreError::of(config, source);
    let journal = JournalView::read(&config.store_dir()).map_err(failed)?;
    let found = trace_key(&journal, &config.node.id, id).map_err(failed)?;
    if found.keys.is_empty() {
        let id = id.to_owned();
        return Err(StoreError::Unknown { id });
    }
    Ok(found)
}

pub(super) fn run(config: &Config, id: &str, json: bool) -> Result<(), StoreError> {
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

pub(super) fn names(keys: &BTreeSet<KeyRef>) -> Vec<String> {
    keys.iter().map(ToString::to_string).collect()
}

pub(super) fn list(what: &str, keys: &BTreeSet<KeyRef>) {
    println!("\n{what}: {}", keys.len());
    for key in keys.iter().take(LISTED_MAX) {
        println!("  {key}");
    }
    if keys.len() > LISTED_MAX {
        println!("  ... (all with --json)");
    }
}
