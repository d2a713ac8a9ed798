//! Every fault on the way of a Clavis2's datagrams, against the real driver at both ends: the daemons are a
//! process of their own. No key is lost without being counted, none comes twice, and none is altered.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use qkd_drivers::{
    Clavis2Config, DriverConfig, Event, KeySource, Settlement, clavis2::Role, next_event,
};
use qkd_keyfile::QkdKeyId;
use support::devices::{BLOCKS, SEED, datagram_address, truth};

const PATIENCE: Duration = Duration::from_secs(60);

/// Whole keys of a block of 8001 bits.
const KEYS: u64 = BLOCKS * 31;

/// What one end had.
#[derive(Default)]
struct End {
    keys: BTreeMap<QkdKeyId, Vec<u8>>,
    lost: u64,
    empty: u64,
    corrupt: u64,
    detached: u64,
}

impl End {
    /// Takes all that comes until nothing has come for a while.
    async fn drain(source: &mut dyn KeySource) -> Self {
        let (mut end, start) = (Self::default(), Instant::now());
        let mut out = [0; 32];
        source.grant(64);
        let quiet = Duration::from_millis(1500);
        while let Ok(event) = tokio::time::timeout(quiet, next_event(source, &mut out)).await {
            assert!(start.elapsed() < PATIENCE, "no end");
            match event.unwrap() {
                Event::Key(block) => {
                    let id = block.metadata.qkd_key_id;
                    source.settle(&id, Settlement::Stored);
                    source.grant(1);
                    let before = end.keys.insert(id.clone(), out.to_vec());
                    assert!(before.is_none(), "{id} came twice");
                }
                Event::Gap { blocks } => end.lost += blocks,
                Event::Empty { .. } => end.empty += 1,
                Event::Corrupt { .. } => end.corrupt += 1,
                Event::Detached { .. } => end.detached += 1,
                Event::Attached { .. } => {}
                other => panic!("{other:?} was not expected"),
            }
        }
        end
    }
}

/// Ends with the test, whatever becomes of it.
struct Daemons(Child);

impl Drop for Daemons {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn open(address: SocketAddr, role: Role) -> Box<dyn KeySource> {
    DriverConfig::Clavis2(Clavis2Config {
        address,
        role,
        device: 1,
        key_bytes: 32,
        poll_interval_ms: 20,
        timeout_ms: 100,
        module: None,
        matching_module: None,
    })
    .open()
    .unwrap()
}

/// What the two ends had of daemons with one kind of fault, at one block in five or so.
async fn play(fault: &str, host: u8) -> [End; 2] {
    let dir = tempfile::tempdir().unwrap();
    let listen = [host, host + 1].map(datagram_address);
    let half = |role: &str, listen: SocketAddr| {
        format!(
            "[[module_pair.half]]\nrole = '{role}'\n\
             transport = {{ kind = 'clavis2', listen = '{listen}' }}\n"
        )
    };
    let text = format!(
        "seed = '{SEED}'\n[[module_pair]]\nname = 'mp'\nblock_bits = 8001\npace = 'max'\n\
         first_number = 16\nblocks = {BLOCKS}\n\
         [module_pair.faults]\n{fault}_per_million = 400000\nstall_ms = 150\n{}{}",
        half("transmitter", listen[0]),
        half("receiver", listen[1])
    );
    let file = dir.path().join("sim.toml");
    fs::write(&file, text).unwrap();
    let daemons = Command::new(support::program())
        .args(["sim", "--json", "--config"])
        .arg(&file)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let _daemons = Daemons(daemons);
    let ours = End::drain(&mut *open(listen[0], Role::Pull)).await;
    let mut bob = open(listen[1], Role::Fetch);
    bob.request(&ours.keys.keys().cloned().collect::<Vec<_>>());
    let theirs = End::drain(&mut *bob).await;
    [ours, theirs]
}

/// The key of an ID, from what the device makes when nothing goes wrong.
fn made(truth: &BTreeMap<u64, Vec<u8>>, id: &QkdKeyId) -> Vec<u8> {
    let id: u64 = id.as_str().parse().unwrap();
    let (number, index) = (id >> 16, usize::try_from(id & 0xffff).unwrap());
    truth[&number][(index - 1) * 32..][..32].to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_the_way_of_datagrams_no_fault_goes_unnoticed() {
    let truth = truth();
    let mut cases = tokio::task::JoinSet::new();
    let faults = [
        "drop",
        "duplicate",
        "flip",
        "split",
        "reorder",
        "stall",
        "hang_up",
    ];
    for (fault, host) in faults.into_iter().zip((1..).step_by(2)) {
        cases.spawn(async move { (fault, play(fault, host).await) });
    }
    while let Some(case) = cases.join_next().await {
        let (fault, [ours, theirs]) = case.unwrap();
        for (id, key) in &ours.keys {
            assert!(made(&truth, id) == *key, "{fault}: {id} was altered");
        }
        let lost = KEYS - ours.keys.len() as u64;
        assert!(
            lost <= ours.lost,
            "{fault}: {lost} lost, {} told",
            ours.lost
        );
        // What comes by its ID is asked for until it has come.
        assert!(theirs.keys == ours.keys, "{fault}: the ends differ");
        assert_eq!((theirs.lost, theirs.empty), (0, 0), "{fault}");
        // What comes twice costs nothing; everything else is waited for.
        let costs = fault != "duplicate";
        assert_eq!((lost > 0, theirs.detached > 0), (costs, costs), "{fault}");
        if matches!(fault, "duplicate" | "flip" | "split") {
            assert!(ours.corrupt > 0 && theirs.corrupt > 0, "{fault}: not told");
        }
    }
}
