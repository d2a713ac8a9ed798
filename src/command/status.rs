//! `status`: what a running node says of itself.

use std::{
    io::{self, Read},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde_json::Value;

use super::Failure;
use crate::config::Config;

/// A node that does not answer in this time is not well.
const PATIENCE: Duration = Duration::from_secs(5);

pub(super) fn run(path: &Path, json: bool) -> Result<(), Failure> {
    let config = Config::read(path)?;
    let socket = config.status_socket();
    let text = ask(&socket).map_err(|source| Failure::NotRunning { socket, source })?;
    let report: Value = serde_json::from_str(&text).map_err(io::Error::from)?;
    if json {
        println!("{report:#}");
    } else {
        print_table(&report);
    }
    Ok(())
}

fn ask(socket: &Path) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn print_table(report: &Value) {
    println!(
        "node {}  version {}",
        text(&report["node"]),
        text(&report["version"])
    );
    println!(
        "\n{:<32} {:>12} {:>12} {:>10} {:>10} {:>10} {:>10}",
        "stream", "own KiB", "peer KiB", "confirmed", "mismatch", "pad KiB", "supplied"
    );
    for (name, s) in entries(&report["streams"]) {
        let kib = |value: &Value, divisor: u64| value.as_u64().unwrap_or(0) / divisor;
        println!(
            "{name:<32} {:>12} {:>12} {:>10} {:>10} {:>10} {:>10}",
            kib(&s["encrypting_bytes"], 1024),
            kib(&s["decrypting_bytes"], 1024),
            s["confirmed_segments"],
            s["mismatched_segments"],
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
        "\n{:<32} {:>9} {:>12} {:>8} {:>9} {:>10}",
        "module pair", "attached", "blocks", "gaps", "corrupt", "QBER %"
    );
    for (name, m) in entries(&report["modules"]) {
        let qber = m["qber_ppm"]
            .as_f64()
            .map_or("-".to_owned(), |ppm| format!("{:.2}", ppm / 1e4));
        println!(
            "{name:<32} {:>9} {:>12} {:>8} {:>9} {qber:>10}",
            m["attached"], m["blocks"], m["gap_blocks"], m["corrupt_blocks"]
        );
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

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}
