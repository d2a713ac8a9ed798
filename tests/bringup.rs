//! `probe`, `record` and `replay` over a pseudo-terminal, a ring and a folder: what they tell, and that
//! no key bit is in it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};
use qkd_drivers::{Event, Settlement, next_event};
use serde_json::Value;
use support::{
    devices::{BLOCKS, Transport, datagram_address, sim_toml, truth},
    qkd_bridge, stderr, stdout,
};

/// A program that is ended with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(support::program());
        command.args(args).stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

/// Starts a half with faults of a kind; returns once there is something to open.
fn start_device(dir: &Path, transport: Transport, fault: &str) -> Running {
    let device = dir.join("device");
    let file = dir.join("sim.toml");
    let text = sim_toml(&transport.played(&device), fault, 200_000);
    fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let running = Running::start(&["sim", "--config", file, "--half", "mp:transmitter"]);
    if !matches!(transport, Transport::Ring | Transport::RingFile) {
        wait_for(|| device.exists());
    }
    running
}

fn wait_for(mut is_so: impl FnMut() -> bool) {
    let patience = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < patience);
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kind(transport: Transport) -> &'static str {
    match transport {
        Transport::Serial => "serial",
        Transport::Ring => "shared-memory",
        Transport::RingFile => "shared-memory-file",
        Transport::Files => "directory",
    }
}

/// Runs `probe` or `record` on a device that plays, for all of its blocks.
fn look(dir: &Path, transport: Transport, command: &str, fault: &str, more: &[&str]) -> Output {
    let device = dir.join("device");
    let _playing = start_device(dir, transport, fault);
    let blocks = (BLOCKS - 20).to_string();
    let mut args = vec![command, device.to_str().unwrap(), "--kind", kind(transport)];
    args.extend(["--blocks", &blocks, "--seconds", "30", "--consume"]);
    args.extend(more);
    qkd_bridge(args)
}

/// No six bytes of any key are in a text, neither as they are nor in hexadecimal.
fn assert_no_key(text: &[u8], truth: &BTreeMap<u64, Vec<u8>>) {
    let lower = text.to_ascii_lowercase();
    let hex: HashSet<&[u8]> = lower.windows(12).collect();
    let plain: HashSet<&[u8]> = text.windows(6).collect();
    for key in truth.values() {
        for window in key.windows(6) {
            let digits: String = window.iter().map(|byte| format!("{byte:02x}")).collect();
            assert!(!hex.contains(digits.as_bytes()) && !plain.contains(window));
        }
    }
}

#[test]
fn a_probe_tells_what_a_module_does_and_never_its_key() {
    let truth = truth();
    std::thread::scope(|scope| {
        for transport in Transport::ALL {
            let truth = &truth;
            scope.spawn(move || {
                let dir = transport.folder();
                let output = look(dir.path(), transport, "probe", "biased", &["--json"]);
                assert!(
                    output.status.success(),
                    "{transport:?}: {}",
                    stderr(&output)
                );
                assert_no_key(&output.stdout, truth);
                let report: Value = serde_json::from_slice(&output.stdout).unwrap();
                assert_eq!(report["kind"], kind(transport));
                assert_eq!(report["key_blocks"], BLOCKS - 20);
                assert_eq!(report["longest_block_bits"], 8001);
                assert_eq!(report["gap_blocks"], 0);
                assert!(report["biased_blocks"].as_u64().unwrap() >= 1, "{report:#}");
                assert!(report["randomness"]["ones_sigma"].as_f64().unwrap() < -8.0);
                if transport != Transport::Files {
                    assert_eq!(report["values"]["qber_ppm"]["band"], "ok");
                }
            });
        }
    });
}

#[test]
fn a_probe_leaves_the_keys_where_they_are_unless_it_is_told_to_take_them() {
    let dir = tempfile::tempdir().unwrap();
    let device = dir.path().join("device");
    let mut playing = start_device(dir.path(), Transport::Files, "");
    assert!(playing.0.wait().unwrap().success());
    let count = || {
        let entries = fs::read_dir(&device).unwrap().map(|entry| entry.unwrap());
        // Beside the driver's own notes.
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        let is_key = |name: &String| u32::from_str_radix(name, 16).is_ok();
        names.filter(is_key).count() as u64
    };
    let device = device.to_str().unwrap();
    let output = qkd_bridge(["probe", device, "--blocks", "10", "--seconds", "20"]);
    let text = stdout(&output);
    assert!(
        output.status.success() && text.contains("10 blocks"),
        "{text}"
    );
    assert!(
        text.contains("stay with the module") && text.contains("ones"),
        "{text}"
    );
    assert_eq!(count(), BLOCKS);
    let output = qkd_bridge([
        "probe",
        device,
        "--blocks",
        "10",
        "--seconds",
        "20",
        "--consume",
    ]);
    assert!(stdout(&output).contains("were taken and wiped"));
    assert_eq!(count(), BLOCKS - 10);
}

#[test]
fn what_keeps_a_probe_from_a_device_is_told_with_the_command_that_mends_it() {
    let dir = tempfile::tempdir().unwrap();
    let told = |args: &[&str], parts: &[&str]| {
        let output = qkd_bridge([&["probe", "--seconds", "1"], args].concat());
        assert_eq!(output.status.code(), Some(1));
        let text = stderr(&output);
        for part in parts {
            assert!(text.contains(part), "{part}: {text}");
        }
    };
    told(
        &["/dev/ttyNONE"],
        &["nothing at this path", "ls -l /dev/serial/by-id/"],
    );
    let folder = dir.path().join("keys");
    let folder = folder.to_str().unwrap();
    told(
        &[folder, "--kind", "directory"],
        &["does not exist", "sudo install -d -m 750"],
    );
    told(&[folder], &["cannot tell what", "--kind serial"]);
    // A port that another program holds: this one.
    let _playing = start_device(dir.path(), Transport::Serial, "");
    let device = dir.path().join("device");
    let port = fs::File::options()
        .read(true)
        .write(true)
        .open(&device)
        .unwrap();
    let lock = Flock::lock(port, FlockArg::LockExclusiveNonblock).unwrap();
    let process = format!("process {}", std::process::id());
    told(&[device.to_str().unwrap()], &[&process, "kill "]);
    drop(lock);
}

#[test]
fn a_module_that_says_nothing_is_no_success() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("ring.sock");
    let output = qkd_bridge(["probe", socket.to_str().unwrap(), "--seconds", "1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("nothing was heard of the module in 1 s"));
}

/// What a driver has of a replay.
#[derive(Debug, Default)]
struct Played {
    keys: Vec<(u64, Vec<u8>)>,
    corrupt: u64,
}

/// Plays a trace, and reads it with the real driver up to its end.
async fn replay(trace: &Path, transport: Transport, blocks: usize) -> Played {
    let dir = tempfile::tempdir().unwrap();
    let device = dir.path().join("device");
    let config = transport.driver(&device);
    if transport == Transport::Files {
        fs::create_dir(&device).unwrap();
    }
    let opened = (transport != Transport::Serial).then(|| config.open().unwrap());
    let to = device.to_str().unwrap();
    let trace = trace.to_str().unwrap();
    let _playing = Running::start(&["replay", trace, "--to", to, "--speed", "5"]);
    let mut source = opened.unwrap_or_else(|| {
        wait_for(|| device.exists());
        config.open().unwrap()
    });
    let mut buffer = vec![0; source.max_block_bytes()];
    let mut played = Played::default();
    source.grant(1000);
    while played.keys.len() < blocks {
        let event = next_event(&mut *source, &mut buffer);
        let event = tokio::time::timeout(Duration::from_secs(30), event).await;
        match event.expect("the replay stops early").unwrap() {
            Event::Key(block) => {
                let id = &block.metadata.qkd_key_id;
                let key = buffer[..block.len_bytes()].to_vec();
                played.keys.push((transport.number(id), key));
                source.settle(id, Settlement::Stored);
            }
            Event::Corrupt { .. } => played.corrupt += 1,
            _ => {}
        }
    }
    played
}

/// Fields that a line of a trace may have.
const FIELDS: [&str; 19] = [
    "t_us",
    "event",
    "id",
    "bits",
    "qber_ppm",
    "generated_at_unix_ns",
    "defect",
    "repeats",
    "class",
    "blocks",
    "device",
    "session",
    "reason",
    "state",
    "name",
    "value",
    "band",
    "code",
    "severity",
];

fn recorded(trace: &Path) -> Vec<Value> {
    let text = fs::read_to_string(trace).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines[0]["format"], "qkd-bridge-trace");
    for line in &lines[1..] {
        for field in line.as_object().unwrap().keys() {
            assert!(FIELDS.contains(&field.as_str()), "{field}");
        }
    }
    lines[1..].to_vec()
}

async fn a_trace_is_the_module_without_its_key(
    transport: Transport,
    fault: &'static str,
    truth: &BTreeMap<u64, Vec<u8>>,
) {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("module.trace");
    let path = dir.path().to_owned();
    let output = tokio::task::spawn_blocking({
        let trace = trace.clone();
        move || {
            let more = ["-o", trace.to_str().unwrap()];
            look(&path, transport, "record", fault, &more)
        }
    });
    let output = output.await.unwrap();
    assert!(
        output.status.success(),
        "{transport:?}: {}",
        stderr(&output)
    );
    assert_no_key(&fs::read(&trace).unwrap(), truth);
    let lines = recorded(&trace);
    let of = |event: &str| lines.iter().filter(|line| line["event"] == event).count();
    assert_eq!(of("key") as u64, BLOCKS - 20, "{transport:?}");

    let played = replay(&trace, transport, of("key")).await;
    let again = replay(&trace, transport, of("key")).await;
    assert_eq!(played.keys, again.keys, "{transport:?}");
    let key_lines = || lines.iter().filter(|line| line["event"] == "key");
    let mut of_number = BTreeMap::new();
    for (line, (number, key)) in key_lines().zip(&played.keys) {
        let id: qkd_keyfile::QkdKeyId = line["id"].as_str().unwrap().parse().unwrap();
        assert_eq!(*number, transport.number(&id), "{transport:?}");
        assert_eq!(line["bits"].as_u64().unwrap().div_ceil(8), key.len() as u64);
        assert_ne!(*key, truth[number], "{transport:?}: the module's own key");
        of_number.insert(id.to_string(), key.clone());
    }
    match fault {
        "flip" => assert!(of("corrupt") >= 1 && played.corrupt >= 1, "{transport:?}"),
        "replayed" => {
            let repeats: Vec<_> = key_lines()
                .filter(|line| line["repeats"].is_string())
                .collect();
            assert!(!repeats.is_empty());
            for line in repeats {
                let (id, before) = (
                    line["id"].as_str().unwrap(),
                    line["repeats"].as_str().unwrap(),
                );
                assert_eq!(of_number[id], of_number[before]);
            }
        }
        _ => {
            let biased: BTreeSet<_> = key_lines()
                .filter(|line| line["defect"] == "biased")
                .map(|line| line["id"].as_str().unwrap())
                .collect();
            assert!(!biased.is_empty());
            for (id, key) in &of_number {
                let ones: u32 = key.iter().map(|byte| byte.count_ones()).sum();
                assert_eq!(
                    ones < 3600,
                    biased.contains(id.as_str()),
                    "{transport:?} {id}: {ones}"
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_recorded_has_no_key_and_replays_with_the_same_lengths_ids_and_defects() {
    let truth = std::sync::Arc::new(truth());
    let mut cases = tokio::task::JoinSet::new();
    for (transport, fault) in [
        (Transport::Serial, "flip"),
        (Transport::Serial, "replayed"),
        (Transport::Ring, "biased"),
        (Transport::Ring, "flip"),
        (Transport::Files, "replayed"),
    ] {
        let truth = truth.clone();
        cases.spawn(async move {
            a_trace_is_the_module_without_its_key(transport, fault, &truth).await;
        });
    }
    while let Some(case) = cases.join_next().await {
        case.unwrap();
    }
}

#[test]
fn a_trace_is_never_overwritten_and_a_bad_one_is_refused_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("a.trace");
    fs::write(&trace, "mine\n").unwrap();
    let (folder, trace) = (dir.path().to_str().unwrap(), trace.to_str().unwrap());
    let output = qkd_bridge(["record", folder, "-o", trace, "--seconds", "1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("exists"), "{}", stderr(&output));
    assert_eq!(fs::read_to_string(trace).unwrap(), "mine\n");
    let output = qkd_bridge(["replay", trace, "--to", folder]);
    assert!(
        stderr(&output).contains("not a trace"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_clavis2_is_looked_at_when_its_keys_may_be_taken_and_is_played_from_its_trace() {
    let dir = tempfile::tempdir().unwrap();
    let [device, replayed] = [101, 102].map(datagram_address);
    let file = dir.path().join("sim.toml");
    let played = format!("kind = 'clavis2', listen = '{device}'");
    fs::write(&file, sim_toml(&played, "", 0)).unwrap();
    let half = ["--half", "mp:transmitter"];
    let _playing =
        Running::start(&[&["sim", "--config", file.to_str().unwrap()], &half[..]].concat());
    let driver = |address, role| {
        format!(
            "{{ kind = 'clavis2', address = '{address}', role = '{role}', poll_interval_ms = 50 }}"
        )
    };
    for (role, word) in [("pull", "--consume"), ("fetch", "\"pull\"")] {
        let output = qkd_bridge(["probe", "--driver", &driver(device, role)]);
        assert_eq!(output.status.code(), Some(2), "{role}");
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
    let trace = dir.path().join("clavis.trace");
    let trace = trace.to_str().unwrap();
    let look = ["--consume", "--blocks", "30", "--seconds", "30"];
    let driven = driver(device, "pull");
    let output = qkd_bridge([&["record", "-o", trace, "--driver", &driven], &look[..]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert_no_key(&fs::read(trace).unwrap(), &truth());

    let wrong = qkd_bridge(["replay", trace, "--to", "here"]);
    assert_eq!(wrong.status.code(), Some(2));
    let to = replayed.to_string();
    let _replaying = Running::start(&["replay", trace, "--to", &to]);
    let driven = driver(replayed, "pull");
    let output = qkd_bridge([&["probe", "--json", "--driver", &driven], &look[..]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(report["key_blocks"], 30);
    assert_eq!(report["key_bits"], 30 * 256);
}

#[test]
fn a_driver_that_there_is_not_is_a_wrong_command_line() {
    for driver in ["{ kind = 'nonsense' }", "{ kind", "7"] {
        let output = qkd_bridge(["probe", "--driver", driver]);
        assert_eq!(output.status.code(), Some(2), "{driver}");
        let told = stderr(&output);
        assert!(told.contains("not the entry of a driver"), "{told}");
    }
}
