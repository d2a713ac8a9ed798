//! Every fault on every transport, against the real drivers: the device is a process of its own, on a
//! pseudo-terminal, in shared memory or a folder. No key is lost without being counted, none comes
//! twice, and none is altered without being caught.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::BufReader,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use qkd_drivers::{Event, KeySource, Settlement, next_event};
use qkd_kernels::Backend;
use qkd_keyfile::{Generation, QkdKeyId, QkdKeyName, metadata::QkdKeyMetadata};
use qkd_pipeline::{Descriptor, Hold, Stage, WaitingBound};
use qkd_secmem::{Locking, Pool, PoolConfig};
use serde_json::Value;
use support::devices::{BLOCKS, Transport, sim_toml, truth};

/// What a bridge had of a device, and what the device says that it did to it.
#[derive(Default)]
struct Outcome {
    /// Every block that came, in order.
    keys: Vec<(u64, Vec<u8>)>,
    gap_blocks: u64,
    empty: BTreeSet<u64>,
    corrupt: u64,
    detached: u64,
    /// Faults by number.
    planned: BTreeMap<u64, String>,
}

/// Plays the transmitter of a pair with one kind of fault, at one block in five or so.
async fn play(transport: Transport, fault: &str) -> Outcome {
    let dir = transport.folder();
    let device = dir.path().join("device");
    let played = transport.played(&device);
    let config = transport.driver(&device);
    if transport == Transport::Files {
        fs::create_dir(&device).unwrap();
    }
    let file = dir.path().join("sim.toml");
    fs::write(&file, sim_toml(&played, fault, 200_000)).unwrap();
    let mut source = match transport {
        // The port comes with the device.
        Transport::Serial => None,
        _ => Some(config.open().unwrap()),
    };
    let mut sim = Command::new(support::program())
        .args(["sim", "--json", "--half", "mp:transmitter", "--config"])
        .arg(&file)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let notes = BufReader::new(sim.stdout.take().unwrap());
    let reader = std::thread::spawn(move || faults_in(notes));
    if source.is_none() {
        let patience = Instant::now() + Duration::from_secs(60);
        while !device.exists() {
            assert!(Instant::now() < patience, "the device makes no port");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        source = Some(config.open().unwrap());
    }
    let mut outcome = Outcome::default();
    let is_over = || reader.is_finished();
    outcome
        .take(&mut *source.unwrap(), transport, is_over)
        .await;
    assert!(sim.wait().unwrap().success());
    outcome.planned = reader.join().unwrap();
    outcome
}

/// The faults that a device tells of.
fn faults_in(notes: impl std::io::BufRead) -> BTreeMap<u64, String> {
    let lines = notes.lines().map(|line| line.unwrap());
    let documents = lines.map(|line| serde_json::from_str::<Value>(&line).unwrap());
    documents
        .filter_map(|note| {
            let fault = note["fault"].as_str()?.to_owned();
            Some((note["number"].as_u64()?, fault))
        })
        .collect()
}

impl Outcome {
    /// Takes and settles all that comes, until the device has ended and nothing has come for a while.
    async fn take(
        &mut self,
        source: &mut dyn KeySource,
        transport: Transport,
        is_over: impl Fn() -> bool,
    ) {
        let mut buffer = vec![0; source.max_block_bytes()];
        source.grant(1000);
        let patience = Instant::now() + Duration::from_secs(60);
        let mut over = false;
        loop {
            assert!(
                Instant::now() < patience,
                "no end: {} blocks",
                self.keys.len()
            );
            let event = next_event(source, &mut buffer);
            let quiet = Duration::from_millis(if over { 600 } else { 100 });
            let event = match tokio::time::timeout(quiet, event).await {
                Ok(event) => event.unwrap(),
                Err(_) if over => return,
                Err(_) => {
                    over = is_over();
                    continue;
                }
            };
            match event {
                Event::Key(block) => {
                    let id = &block.metadata.qkd_key_id;
                    let number = transport.number(id);
                    self.keys
                        .push((number, buffer[..block.len_bytes()].to_vec()));
                    source.settle(id, Settlement::Stored);
                    source.grant(1);
                }
                Event::Empty { id } => {
                    self.empty.insert(transport.number(&id));
                }
                Event::Gap { blocks } => self.gap_blocks += blocks,
                Event::Corrupt { .. } => self.corrupt += 1,
                Event::Detached { .. } => self.detached += 1,
                _ => {}
            }
        }
    }

    fn faulty(&self) -> BTreeSet<u64> {
        self.planned.keys().copied().collect()
    }
}

/// Checks what every outcome must fulfil, and returns the numbers that did not come and those that
/// came with other bits than the device made.
fn lost_and_altered(
    case: &str,
    truth: &BTreeMap<u64, Vec<u8>>,
    outcome: &Outcome,
) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let mut came = BTreeSet::new();
    let mut altered = BTreeSet::new();
    for (number, key) in &outcome.keys {
        assert!(came.insert(*number), "{case}: block {number} came twice");
        if truth[number] != *key {
            altered.insert(*number);
        }
    }
    let lost = truth
        .keys()
        .filter(|number| !came.contains(number))
        .copied()
        .collect();
    assert!(!outcome.planned.is_empty(), "{case}: nothing went wrong");
    (lost, altered)
}

fn check(transport: Transport, fault: &str, truth: &BTreeMap<u64, Vec<u8>>, outcome: &Outcome) {
    let case = format!("{fault} on {transport:?}");
    // Sealed or not, a ring is a ring.
    let transport = match transport {
        Transport::RingFile => Transport::Ring,
        transport => transport,
    };
    let (lost, altered) = lost_and_altered(&case, truth, outcome);
    let faulty = outcome.faulty();
    let count = faulty.len() as u64;
    let nothing = BTreeSet::new();
    match (fault, transport) {
        // The other end has it, so that it is missed there; here it never was.
        ("one_sided", _) | ("drop", Transport::Files) => {
            assert_eq!((&lost, &altered), (&faulty, &nothing), "{case}");
        }
        ("empty", _) => {
            assert_eq!((&lost, &outcome.empty), (&faulty, &faulty), "{case}");
            assert_eq!(altered, nothing, "{case}");
        }
        // The bits are for the pipeline or the other end to find wrong; all of them must come.
        ("differing" | "replayed" | "biased", _) => {
            assert_eq!((&lost, &altered), (&nothing, &faulty), "{case}");
        }
        ("drop", Transport::Ring) => {
            assert_eq!((&lost, &altered), (&faulty, &nothing), "{case}");
            assert_eq!(outcome.gap_blocks, count, "{case}");
        }
        // What a ring has in the wrong order is not taken, and told.
        ("reorder", Transport::Ring) => {
            assert!(lost.is_subset(&faulty), "{case}: {lost:?} of {faulty:?}");
            assert!(
                altered.is_empty() && outcome.corrupt >= lost.len() as u64,
                "{case}"
            );
        }
        // Type 7 has no check sum: a bit of the key is for the other end to find.
        ("flip", Transport::Files) => {
            assert!(
                altered.is_subset(&faulty) && lost.is_subset(&faulty),
                "{case}"
            );
            assert!(outcome.corrupt >= lost.len() as u64, "{case}: {lost:?}");
            // A bit of what is no key, such as the count of epochs, changes no key.
            assert!(!lost.is_empty() || !altered.is_empty(), "{case}");
        }
        ("hang_up", Transport::Files) => {
            assert_eq!((&lost, &altered), (&faulty, &nothing), "{case}");
            assert_eq!(outcome.corrupt, count, "{case}");
        }
        // Everything else is mended: nothing is lost and nothing is altered.
        _ => {
            assert_eq!((&lost, &altered), (&nothing, &nothing), "{case}");
        }
    }
    if matches!(fault, "replayed" | "biased") {
        assert_eq!(refused(outcome), faulty, "{case}");
    }
    match (fault, transport) {
        ("flip" | "split" | "duplicate", Transport::Ring) | ("flip", Transport::Serial) => {
            assert!(outcome.corrupt >= 1, "{case}: not told");
        }
        ("hang_up", Transport::Serial | Transport::Ring) | ("stall", Transport::Ring) => {
            assert!(outcome.detached >= 1, "{case}: not told");
        }
        _ => {}
    }
}

/// What the node does with the blocks next: health tests, and a look at whether bits came before.
fn refused(outcome: &Outcome) -> BTreeSet<u64> {
    let pool = Pool::new(PoolConfig {
        capacity_bytes: 8 << 20,
        locking: Locking::Unlocked,
    })
    .unwrap();
    let bound = WaitingBound {
        keys: 1000,
        bytes: 4 << 20,
    };
    let mut stage = Stage::new(pool.clone(), bound, Backend::detect(), [7; 32]);
    let mut refused = BTreeSet::new();
    for (number, key) in &outcome.keys {
        let id: QkdKeyId = number.to_string().parse().unwrap();
        let descriptor = Descriptor {
            name: QkdKeyName {
                module_pair: "mp".parse().unwrap(),
                generation: Generation::default(),
                id: id.clone(),
            },
            key_bits: 8001,
            block: pool.copy_of(key).unwrap(),
            metadata: QkdKeyMetadata::new(id),
        };
        if let Hold::Refused { .. } = stage.hold(descriptor) {
            refused.insert(*number);
        }
    }
    refused
}

const FAULTS: [&str; 12] = [
    "one_sided",
    "differing",
    "empty",
    "replayed",
    "biased",
    "drop",
    "duplicate",
    "flip",
    "split",
    "reorder",
    "stall",
    "hang_up",
];

/// All faults on one transport, side by side.
async fn every_fault_is_caught(transport: Transport) {
    let truth = truth();
    assert_eq!(truth.len() as u64, BLOCKS);
    let mut cases = tokio::task::JoinSet::new();
    for fault in FAULTS {
        cases.spawn(async move { (fault, play(transport, fault).await) });
    }
    while let Some(case) = cases.join_next().await {
        let (fault, outcome) = case.unwrap();
        check(transport, fault, &truth, &outcome);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_serial_line_no_fault_goes_unnoticed() {
    every_fault_is_caught(Transport::Serial).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_ring_no_fault_goes_unnoticed() {
    every_fault_is_caught(Transport::Ring).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_ring_in_a_file_no_fault_goes_unnoticed() {
    every_fault_is_caught(Transport::RingFile).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_folder_no_fault_goes_unnoticed() {
    every_fault_is_caught(Transport::Files).await;
}
