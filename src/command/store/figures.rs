//! `store stats`.

use qkd_keyfile::metadata::KeyType;
use qkd_kma::{
    store::{RAM_BYTES_PER_SEGMENT, Survey},
    vault::JournalView,
};
use serde_json::{Value, json};

use super::StoreError;
use crate::config::Config;

pub(super) fn run(config: &Config, json: bool) -> Result<(), StoreError> {
    let failed = |source| StoreError::of(config, source);
    let journal = JournalView::read(&config.store_dir()).map_err(failed)?;
    let survey = Survey::of(&journal).map_err(failed)?;
    let (archived_bytes, archives) = journal.archived_bytes().map_err(failed)?;
    let (slot_bytes, row_bytes) = journal.file_bytes();
    let (preserved, preserved_bytes) = survey.preserved();
    let stock: Vec<Value> = survey
        .stock()
        .into_iter()
        .map(|((stream, key_type, level), figures)| {
            let peer = stream.peer_of(&config.node.id);
            json!({
                "peer": peer.map(ToString::to_string),
                "stream": stream.to_string(),
                "owner": if key_type == KeyType::Encrypting { "this" } else { "peer" },
                "level": level,
                "segments": figures.segments,
                "usable_bytes": figures.usable_bytes,
                "unconfirmed_bytes": figures.unconfirmed_bytes,
                "stored_bytes": figures.stored_bytes,
                "oldest_seconds": figures.oldest_seconds,
            })
        })
        .collect();
    let bindings: Vec<Value> = survey
        .bindings()
        .into_iter()
        .map(|(node, (outbox, waiting))| {
            json!({ "node": node.to_string(), "unacknowledged": outbox, "waiting": waiting })
        })
        .collect();
    let ram_bytes = survey.ram_bytes();
    let usable: u64 = survey.stock().values().map(|f| f.usable_bytes).sum();
    let keys = usable / 32;
    let report = json!({
        "node": config.node.id.to_string(),
        "kind": if journal.is_sealed() { "lmdb" } else { "memory" },
        "stock": stock,
        "bindings": bindings,
        "preserved_segments": preserved,
        "preserved_bytes": preserved_bytes,
        "journal_bytes": journal.len_bytes(),
        "journal_records": survey.records,
        "archives": archives,
        "archived_bytes": archived_bytes,
        "slot_file_bytes": slot_bytes,
        "row_file_bytes": row_bytes,
        "ram_bytes": ram_bytes,
        "ram_bytes_per_segment": RAM_BYTES_PER_SEGMENT,
        "keys_of_256_bits": keys,
    });
    if json {
        println!("{report:#}");
    } else {
        print(&report);
    }
    Ok(())
}

fn print(report: &Value) {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    println!(
        "node {}  store {}",
        text(&report["node"]),
        text(&report["kind"])
    );
    println!(
        "\n{:<16} {:<28} {:>6} {:>6} {:>9} {:>14} {:>12} {:>10}",
        "peer", "stream", "owner", "level", "segments", "usable bytes", "unconfirmed", "oldest"
    );
    for stock in report["stock"].as_array().into_iter().flatten() {
        println!(
            "{:<16} {:<28} {:>6} {:>6} {:>9} {:>14} {:>12} {:>10}",
            text(&stock["peer"]),
            text(&stock["stream"]),
            text(&stock["owner"]),
            text(&stock["level"]),
            number(&stock["segments"]),
            number(&stock["usable_bytes"]),
            number(&stock["unconfirmed_bytes"]),
            age(number(&stock["oldest_seconds"])),
        );
    }
    for peer in report["bindings"].as_array().into_iter().flatten() {
        println!(
            "node {}: {} bindings not acknowledged, {} keys wait for applications here",
            text(&peer["node"]),
            number(&peer["unacknowledged"]),
            number(&peer["waiting"])
        );
    }
    println!(
        "\njournal   {:>12} bytes, {} records; {} archives with {} bytes",
        number(&report["journal_bytes"]),
        number(&report["journal_records"]),
        number(&report["archives"]),
        number(&report["archived_bytes"])
    );
    println!(
        "slots     {:>12} bytes on disk",
        number(&report["slot_file_bytes"])
    );
    println!(
        "rows      {:>12} bytes on disk",
        number(&report["row_file_bytes"])
    );
    println!(
        "preserved {:>12} bytes in {} segments",
        number(&report["preserved_bytes"]),
        number(&report["preserved_segments"])
    );
    println!(
        "RAM       {:>12} bytes for what is stored ({} per segment): {} keys of 256 bits",
        number(&report["ram_bytes"]),
        number(&report["ram_bytes_per_segment"]),
        number(&report["keys_of_256_bits"])
    );
}

fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}
