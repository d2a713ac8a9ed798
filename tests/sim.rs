//! `sim`: runs that repeat, events, and key rates over distance.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use qkd_drivers::{Band, Event, ModuleState, Settlement, Value as Measured, next_event};
use serde_json::Value;
use support::{
    devices::{SEED, Transport},
    qkd_bridge, stderr, stdout,
};

/// A pair whose optics drift, which is cut off and restarted, with faults of every kind.
const STORY: &str = r#"
[[module_pair]]
name = "mp"
block_bits = 4001
first_number = 1
blocks = 150
time_scale = 200.0
[module_pair.link]
preset = "gys"
km = 20
drift = { loss_db = 1.0, error_ppm = 8000, temperature_c = 3.0, period_s = 120 }
[[module_pair.event]]
kind = "fibre-cut"
at_s = 40
for_s = 20
[[module_pair.event]]
kind = "restart"
at_s = 90
for_s = 10
[[module_pair.event]]
kind = "eavesdropper"
at_s = 150
for_s = 30
part = 0.3
[module_pair.faults]
one_sided_per_million = 60000
differing_per_million = 60000
empty_per_million = 60000
drop_per_million = 60000
duplicate_per_million = 60000
flip_per_million = 60000
stall_per_million = 20000
reorder_per_million = 60000
stall_ms = 10
[[module_pair.half]]
role = "transmitter"
transport = { kind = "files", directory = "tx" }
[[module_pair.half]]
role = "receiver"
transport = { kind = "files", directory = "rx" }
"#;

/// Every file of a folder.
fn files(dir: &Path) -> Files {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// Name and content of every file of a folder.
type Files = BTreeMap<String, Vec<u8>>;

/// Both folders, and every fault and event that was told, in order of half, time and block.
fn tell(more: &[&str]) -> (Files, Files, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sim.toml");
    fs::write(&file, STORY).unwrap();
    let args = ["sim", "--json", "--config", file.to_str().unwrap()];
    let output = qkd_bridge([&args, more].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    let is_note = |line: &&str| line.contains("\"fault\":") || line.contains("\"event\":");
    let mut notes: Vec<_> = text.lines().filter(is_note).map(str::to_owned).collect();
    notes.sort();
    (
        files(&dir.path().join("tx")),
        files(&dir.path().join("rx")),
        notes,
    )
}

#[test]
fn a_seed_makes_the_same_blocks_faults_and_events_again() {
    let first = tell(&["--seed", SEED]);
    let second = tell(&["--seed", SEED, "--processes"]);
    assert!(first == second, "{:#?}\n{:#?}", first.2, second.2);
    for word in [
        "one_sided",
        "flip",
        "reorder",
        "fibre-cut",
        "restart",
        "eavesdropper",
    ] {
        assert!(
            first.2.iter().any(|note| note.contains(word)),
            "{word}: {:#?}",
            first.2
        );
    }
    let other = SEED.replace("5eed", "5eee");
    let other = tell(&["--seed", &other]);
    assert!(other.0 != first.0 && other.2 != first.2);
    // The halves of a pair have most blocks in common.
    let equal = first
        .0
        .iter()
        .filter(|(name, key)| first.1.get(*name) == Some(key));
    assert!((60..150).contains(&equal.count()));
}

#[test]
fn the_seed_that_is_printed_repeats_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sim.toml");
    fs::write(&file, STORY.replace("blocks = 150", "blocks = 20")).unwrap();
    let file = file.to_str().unwrap();
    let output = qkd_bridge(["sim", "--config", file]);
    let text = stdout(&output);
    let seed = text
        .strip_prefix("seed ")
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap();
    let made = files(&dir.path().join("tx"));
    fs::remove_dir_all(dir.path().join("tx")).unwrap();
    assert!(
        qkd_bridge(["sim", "--config", file, "--seed", seed])
            .status
            .success()
    );
    assert_eq!(files(&dir.path().join("tx")), made);
}

/// What a driver tells of a pair with an event from 1.51 s to 3.51 s: state, band of the error rate and
/// whether there was key, in order and without repetitions.
async fn told(transport: Transport, event: &str) -> Vec<(ModuleState, Band, bool)> {
    let dir = tempfile::tempdir().unwrap();
    let device = dir.path().join("device");
    let file = dir.path().join("sim.toml");
    let played = transport.played(&device);
    let text = format!(
        "[[module_pair]]\nname = \"mp\"\nblock_bits = 4096\npace = 40.0\nqber_ppm = 21000\n\
         blocks = 160\n[[module_pair.event]]\nat_s = 1.51\nfor_s = 2.0\n{event}\n\
         [[module_pair.half]]\nrole = \"receiver\"\ntransport = {{ {played} }}\n"
    );
    fs::write(&file, text).unwrap();
    let mut sim = Command::new(support::program())
        .args(["sim", "--config", file.to_str().unwrap()])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut source = match transport {
        Transport::Serial => {
            while !device.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            transport.driver(&device).open().unwrap()
        }
        _ => transport.driver(&device).open().unwrap(),
    };
    let mut buffer = vec![0; source.max_block_bytes()];
    source.grant(1000);
    let mut told: Vec<(ModuleState, Band, bool)> = Vec::new();
    let mut state = ModuleState::Running;
    let mut has_key = false;
    while let Ok(event) = tokio::time::timeout(
        Duration::from_secs(4),
        next_event(&mut *source, &mut buffer),
    )
    .await
    {
        match event.unwrap() {
            Event::State(now) => state = now,
            Event::Key(block) => {
                has_key = true;
                source.settle(&block.metadata.qkd_key_id, Settlement::Stored);
                source.grant(1);
            }
            Event::Metric(metric) => {
                if let Measured::QberPpm(_) = metric.value {
                    let now = (state, metric.band, has_key);
                    if told.last() != Some(&now) {
                        told.push(now);
                    }
                    has_key = false;
                }
            }
            _ => {}
        }
    }
    assert!(sim.wait().unwrap().success());
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_tells_of_an_eavesdropper_and_of_a_module_that_runs_in_spite_of_it() {
    let spy = "kind = \"eavesdropper\"\npart = 0.4\n";
    let honest = told(Transport::Serial, spy);
    let blind = format!("{spy}unnoticed = true");
    let blind = told(Transport::Ring, &blind);
    let (honest, blind) = tokio::join!(honest, blind);
    let absolute = Band::AbsoluteOutOfRange;
    // The honest one stops: its status says why.
    assert!(
        honest.contains(&(ModuleState::Running, Band::Ok, true)),
        "{honest:?}"
    );
    assert!(
        honest.contains(&(ModuleState::Fault, absolute, false)),
        "{honest:?}"
    );
    assert!(
        !honest.contains(&(ModuleState::Running, absolute, true)),
        "{honest:?}"
    );
    // The other says that it runs, and hands over keys of which nobody knows who has them.
    assert!(
        blind.contains(&(ModuleState::Running, absolute, true)),
        "{blind:?}"
    );
    assert!(
        blind
            .iter()
            .all(|(state, ..)| *state == ModuleState::Running),
        "{blind:?}"
    );
}

#[test]
fn the_example_is_a_file_that_plays() {
    let dir = tempfile::tempdir().unwrap();
    let example = qkd_bridge(["sim", "--example"]);
    assert!(example.status.success());
    let file = dir.path().join("sim.toml");
    fs::write(&file, &example.stdout).unwrap();
    let file = file.to_str().unwrap();
    let output = qkd_bridge(["sim", "--config", file, "--json", "--seconds", "1"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    let halves = [
        "field:transmitter",
        "field:receiver",
        "faulty:transmitter",
        "faulty:receiver",
    ];
    for half in halves {
        assert!(text.contains(half), "{half}: {text}");
    }
}

#[test]
fn what_is_wrong_in_a_file_of_module_pairs_is_named_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    for (from, to, expected) in [
        (
            "preset = \"gys\"",
            "preset = \"gyz\"",
            "no preset gyz: there are gys, lim2014",
        ),
        (
            "km = 20",
            "km = 20\nloss_db = 3",
            "a link has either km or loss_db",
        ),
        (
            "km = 20",
            "miles = 20",
            "sim.toml:10:1: unknown field `miles`",
        ),
        ("km = 20", "km = 160", "this link gives no secret key"),
        ("part = 0.3", "part = 1.3", "event at out of range: 150"),
        (
            "kind = \"restart\"",
            "kind = \"restrat\"",
            "unknown variant `restrat`",
        ),
        (
            "for_s = 10\n",
            "for_s = 10\nuntil = 3\n",
            "unknown field `until`",
        ),
        (
            "flip_per_million",
            "flips_per_million",
            "unknown field `flips_per_million`",
        ),
        ("time_scale = 200.0", "pace = \"max\"", "events need a pace"),
    ] {
        let text = STORY.replacen(from, to, 1);
        assert_ne!(text, STORY);
        let file = dir.path().join("sim.toml");
        fs::write(&file, text).unwrap();
        let output = qkd_bridge(["sim", "--config", file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(2), "{to}");
        assert!(
            stderr(&output).contains(expected),
            "{to}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn rates_over_distance_are_those_of_the_papers() {
    let dir = tempfile::tempdir().unwrap();
    let svg = dir.path().join("rate.svg");
    let args = [
        "sim", "rate", "--preset", "gys", "--json", "--to", "140", "--step", "20",
    ];
    let output = qkd_bridge([&args[..], &["--svg", svg.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["score"], "paper-locked");
    let points = json["points"].as_array().unwrap();
    assert_eq!(points.len(), 8);
    for (at, expected) in [(0, 2.414_245e-3), (1, 9.077_677e-4), (5, 1.602_005e-5)] {
        let rate = points[at]["secret_bits_per_pulse"].as_f64().unwrap();
        assert!((rate / expected - 1.0).abs() < 1e-4, "{rate:e}");
    }
    assert!(fs::read_to_string(&svg).unwrap().starts_with("<svg"));

    let table = stdout(&qkd_bridge([
        "sim", "rate", "--preset", "t12-2013", "--to", "60",
    ]));
    for part in ["fitted to the published rates: receiver", "QBER %", " * "] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let list = stdout(&qkd_bridge(["sim", "rate", "--list"]));
    assert!(
        list.contains("paper-locked: 2 of 4 published figures within 1 %"),
        "{list}"
    );
    assert!(list.contains("which says nothing of the model"), "{list}");
    let refused = qkd_bridge(["sim", "rate", "--preset", "gyz"]);
    assert!(stderr(&refused).contains("there are gys, lim2014"));
}
