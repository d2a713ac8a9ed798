//! `status`: what a running node says of itself.

use std::{io, path::Path};

use serde_json::Value;

use super::Failure;
use crate::{config::Config, node};

pub(super) fn run(path: &Path, json: bool) -> Result<(), Failure> {
    let config = Config::read(path)?;
    let socket = config.status_socket();
    let text = node::ask(&socket).map_err(|source| Failure::NotRunning { socket, source })?;
    let report: Value = serde_json::from_str(&text).map_err(io::Error::from)?;
    if json {
        println!("{report:#}");
    } else {
        print_table(&report);
    }
    Ok(())
}

fn print_table(report: &Value) {
    println!(
        "node {}  version {}",
        text(&report["node"]),
        text(&report["version"])
    );
    println!(
        "\n{:<32} {:>12} {:>12} {:>10} {:>10} {:>10} {:>10}",
        "stream", "own KiB", "peer KiB", "confirmed", "mismatch", "pad KiB", "supplied KiB"
    );
    for (name, s) in entries(&report["streams"]) {
        let kib = |value: &Value, divisor: u64| number(value) / divisor;
        println!(
            "{name:<32} {:>12} {:>12} {:>10} {:>10} {:>10} {:>12}",
            kib(&s["encrypting_bytes"], 1024),
            kib(&s["decrypting_bytes"], 1024),
            number(&s["confirmed_segments"]),
            number(&s["mismatched_segments"]),
            kib(&s["pad_bits"], 8192),
            kib(&s["supplied_bits"], 8192),
        );
        if s["imbalance_bits"] != 0 {
            println!(
                "  IMBALANCE of {} bits: the books do not add up",
                s["imbalance_bits"]
            );
        }
    }
    println!(
        "\n{:<32} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "end-to-end stock with", "KiB", "coming KiB", "target KiB", "asked KiB/s", "refused KiB"
    );
    for (with, s) in entries(&report["stocks"]) {
        let kib = |name: &str| number(&s[name]) / 1024;
        println!(
            "{with:<32} {:>12} {:>12} {:>12} {:>12} {:>12}",
            kib("stock_bytes"),
            kib("coming_bytes"),
            kib("target_bytes"),
            kib("demand_bytes_per_second"),
            kib("refused_bytes"),
        );
    }
    println!(
        "\n{:<32} {:>9} {:>12} {:>8} {:>8} {:>9} {:>10} {:>8}",
        "module pair", "state", "blocks", "refused", "gaps", "corrupt", "QBER %", "°C"
    );
    for (name, m) in entries(&report["modules"]) {
        let scaled = |name: &str, by: f64, digits: usize| {
            let value = m[name].as_f64();
            value.map_or("-".to_owned(), |value| format!("{:.digits$}", value / by))
        };
        println!(
            "{name:<32} {:>9} {:>12} {:>8} {:>8} {:>9} {:>10} {:>8}",
            match (m["attached"] == true, m["state"].as_str()) {
                (false, _) => "away",
                (true, state) => state.unwrap_or("attached"),
            },
            number(&m["blocks"]),
            number(&m["refused_blocks"]),
            number(&m["gap_blocks"]),
            number(&m["corrupt_blocks"]),
            scaled("qber_ppm", 1e4, 2),
            scaled("temperature_milli_celsius", 1e3, 1),
        );
        if let Some(values) = m["refusing"].as_str() {
            println!("  NO KEY is taken: out of the absolute range: {values}");
        }
        for (value, told) in entries(&m["metrics"]) {
            if told["band"] == "operation" {
                println!(
                    "  out of the range of operation: {value} = {}",
                    text(&told["value"])
                );
            }
        }
        for (code, alarm) in entries(&m["alarms"]) {
            println!(
                "  alarm {code} ({}), {} times",
                text(&alarm["severity"]),
                number(&alarm["count"])
            );
        }
        if let Some(error) = m["error"].as_str() {
            println!("  cannot be read: {error}");
        }
        if number(&m["restarts"]) > 0 {
            println!("  its driver was started again {} times", m["restarts"]);
        }
        print_stops(&report["module_pairs"][name]);
    }
    println!();
    for (peer, up) in entries(&report["peers"]) {
        let state = if up == true {
            "connected"
        } else {
            "not connected"
        };
        println!("peer {peer}: {state}");
    }
    let memory = &report["key_memory"];
    println!(
        "key memory: {} of {} bytes used, {}",
        memory["used_bytes"],
        memory["capacity_bytes"],
        if memory["locked"] == true {
            "locked"
        } else {
            "NOT locked"
        },
    );
}

/// Who has stopped a module pair, and why.
fn print_stops(pair: &Value) {
    let ends = [
        ("this end", "stopped_here"),
        (text(&pair["peer"]), "stopped_there"),
    ];
    for (end, stop) in ends {
        let why = match pair[stop].as_str() {
            Some("mismatches") => "too many QKD-keys differed",
            Some(_) => "by an operator",
            None => continue,
        };
        println!(
            "  STOPPED at {end}: {why}; `qkd-bridge pair start` there, once the cause is found"
        );
    }
}

/// A number, to be aligned as one (a JSON value does not heed a width).
fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}
