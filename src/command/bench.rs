//! `bench`: what this machine can do, for whoever plans a node on it.

use std::{
    num::NonZeroUsize,
    thread::available_parallelism,
    time::{Duration, Instant},
};

use clap::Args;
use indicatif::ProgressBar;
use qkd_kernels::Backend;
use serde_json::json;

use super::Failure;
use crate::bench::{
    groups::{self, Group, Speed},
    pipeline::{Bridge, Device, PAYLOAD_BYTES},
};

/// Key rate of the fastest module pair that has been published, over 10 km of fibre, in bits per
/// second (W. Li et al., Nature Photonics 17, 2023).
const RECORD_BITS_PER_S: f64 = 115.8e6;

/// The length of units in a node.
const UNIT_BYTES: usize = 4 << 10;

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// How long to measure, about.
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// A group that has been measured: ours beside the rival.
struct Row {
    name: &'static str,
    size_bytes: usize,
    /// What the program uses here.
    ours: Speed,
    /// What one would write first.
    rival: Speed,
    all: Vec<Speed>,
}

impl BenchArgs {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let cores = available_parallelism().map_or(1, NonZeroUsize::get);
        let groups = groups::all();
        // One share more: the stage on all cores.
        let shares = u32::try_from(groups.len() + 1).unwrap_or(u32::MAX);
        let budget = Duration::from_secs(self.seconds) / shares;
        let progress = ProgressBar::new(u64::from(shares));
        let mut rows = Vec::new();
        for make in groups {
            let mut group = make();
            progress.set_message(group.name);
            rows.push(row(&mut group, budget));
            progress.inc(1);
        }
        let one_core = stages(1, budget / 2)?;
        let all_cores = stages(cores, budget / 2)?;
        progress.finish_and_clear();
        let served = Served {
            cores,
            one_core,
            all_cores,
        };
        if self.json {
            println!("{:#}", document(&rows, &served));
        } else {
            print_table(&rows, &served);
        }
        Ok(())
    }
}

/// What the stages of a key's way take, in GB/s.
struct Served {
    cores: usize,
    one_core: f64,
    all_cores: f64,
}

impl Served {
    /// Record-rate modules whose key arrives no faster than it is taken.
    fn modules(gb_per_s: f64) -> u64 {
        #[expect(clippy::cast_possible_truncation, reason = "a few thousand")]
        #[expect(clippy::cast_sign_loss, reason = "a rate is not negative")]
        let modules = (gb_per_s * 8e9 / RECORD_BITS_PER_S) as u64;
        modules
    }
}

fn row(group: &mut Group, budget: Duration) -> Row {
    let speeds = group.measure(budget);
    let name = match group.name {
        "xor" => "best",
        "otp_relay" => "fused",
        "pipeline" => "stage",
        _ => Backend::detect().name(),
    };
    let of = |name| speeds.iter().find(|speed| speed.name == name).copied();
    let rival = speeds[0];
    Row {
        name: group.name,
        size_bytes: group.size_bytes,
        ours: of(name).unwrap_or(rival),
        rival,
        all: speeds,
    }
}

/// Bytes that so many stages, a thread each, take from driver to hashed segment, in GB/s together.
fn stages(threads: usize, time: Duration) -> Result<f64, Failure> {
    let run = move || {
        let mut device = Device::new();
        let mut bridge = Bridge::new(Backend::detect(), UNIT_BYTES);
        let (start, mut segments) = (Instant::now(), 0_u32);
        while start.elapsed() < time || segments == 0 {
            drop(bridge.segment(device.next_key()));
            segments += 1;
        }
        f64::from(segments) * PAYLOAD_BYTES as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    let threads: Vec<_> = (0..threads)
        .map(|_| std::thread::Builder::new().spawn(run))
        .collect::<Result<_, _>>()?;
    let sum = threads
        .into_iter()
        .map(|thread| match thread.join() {
            Ok(gb_per_s) => gb_per_s,
            Err(panic) => std::panic::resume_unwind(panic),
        })
        .sum();
    Ok(sum)
}

fn document(rows: &[Row], served: &Served) -> serde_json::Value {
    let groups: Vec<_> = rows
        .iter()
        .map(|row| {
            let cases: serde_json::Map<_, _> = row
                .all
                .iter()
                .map(|speed| (speed.name.to_owned(), json!(speed.gb_per_s)))
                .collect();
            json!({
                "group": row.name,
                "size_bytes": row.size_bytes,
                "gb_per_s": row.ours.gb_per_s,
                "rival": row.rival.name,
                "ratio": row.ours.gb_per_s / row.rival.gb_per_s,
                "cases_gb_per_s": cases,
            })
        })
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "backend": Backend::detect().name(),
        "backends": Backend::all().map(Backend::name).collect::<Vec<_>>(),
        "cores": served.cores,
        "groups": groups,
        "pipeline_gb_per_s": { "one_core": served.one_core, "all_cores": served.all_cores },
        "record_modules": {
            "bits_per_s": RECORD_BITS_PER_S,
            "one_core": Served::modules(served.one_core),
            "all_cores": Served::modules(served.all_cores),
        },
    })
}

fn print_table(rows: &[Row], served: &Served) {
    let backends: Vec<_> = Backend::all().map(Backend::name).collect();
    println!(
        "backend {} (this CPU has: {})  cores {}\n",
        Backend::detect().name(),
        backends.join(", "),
        served.cores
    );
    println!(
        "{:<36} {:>9} {:>8}   {:<12} {:>8} {:>8}",
        "what, one core", "size", "GB/s", "rival", "GB/s", "ratio"
    );
    for row in rows {
        println!(
            "{:<36} {:>9} {:>8.2}   {:<12} {:>8.2} {:>7.1}x",
            what(row.name),
            size(row.size_bytes),
            row.ours.gb_per_s,
            row.rival.name,
            row.rival.gb_per_s,
            row.ours.gb_per_s / row.rival.gb_per_s,
        );
    }
    println!(
        "\nfrom driver to hashed segment: {:.2} GB/s on one core, {:.2} GB/s on {}",
        served.one_core, served.all_cores, served.cores
    );
    println!(
        "record-rate module pairs ({} Mb/s each) that this part can serve: {} on one core, {} on {}",
        RECORD_BITS_PER_S / 1e6,
        Served::modules(served.one_core),
        Served::modules(served.all_cores),
        served.cores
    );
    println!(
        "Agreement with the other end and the store come on top: \
         `cargo bench --bench bridge_end_to_end` measures whole nodes."
    );
}

fn what(group: &str) -> &str {
    match group {
        "health" => "health tests of incoming key",
        "sha256_units" => "SHA-256 of units",
        "pipeline" => "stage: tests, cut, hash, hand-off",
        "xor" => "XOR (rival: copying)",
        "otp_relay" => "relay hop: XOR, tag, wipe",
        other => other,
    }
}

fn size(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}
