//! The driver for key managers through the conformance kit; and with the key managers in a process of their
//! own behind a bad network, real TLS all the way: no key is lost without being counted, none comes twice,
//! and none is altered.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use qkd_drivers::{
    Etsi014Config, Event, KeySource, Settlement,
    conformance::{Bench, Checked, Offered, check},
    etsi014::Role,
    next_event,
};
use qkd_keyfile::QkdKeyId;
use support::{
    proxy::{Proxy, Random, Weather},
    vendor::{KeyManager, Vendor, config, drawn_key, open, qkd_key_id, vendor_pki},
};
use tempfile::TempDir;

/// A key manager behind a proxy.
struct Desk {
    vendor: Arc<Vendor>,
    pki: TempDir,
    proxy: Proxy,
    role: Role,
    offered: u32,
    _manager: KeyManager,
}

impl Desk {
    async fn start(role: Role) -> Self {
        let (vendor, pki) = (Vendor::new(0), vendor_pki());
        let manager = KeyManager::start(&vendor, pki.path()).await;
        Self {
            vendor,
            pki,
            proxy: Proxy::start(manager.address, Weather::FAIR, 1).await,
            role,
            offered: 0,
            _manager: manager,
        }
    }
}

impl Bench for Desk {
    fn open(&mut self) -> Box<dyn KeySource> {
        open(Etsi014Config {
            poll_interval_ms: 150,
            ..config(self.pki.path(), self.proxy.address, self.role)
        })
    }

    fn offer(&mut self, blocks: u32) -> Vec<Offered> {
        let numbers = self.offered..self.offered + blocks;
        self.offered = numbers.end;
        self.vendor.most.store(self.offered, Ordering::Relaxed);
        if self.role == Role::Fetch {
            // The other end has pulled them.
            numbers.clone().for_each(|_| drop(self.vendor.draw()));
        }
        let offered = numbers.map(|number| {
            let (id, key) = drawn_key(number);
            Offered {
                id: qkd_key_id(id),
                key_bits: 256,
                key,
            }
        });
        offered.collect()
    }

    fn hands_out_once(&self) -> bool {
        true
    }

    fn replug(&mut self) -> bool {
        self.proxy.reset();
        true
    }
}

const REPLUGGED: Checked = Checked {
    replugged: true,
    ruined: false,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_pulls_keys_of_a_key_manager_keeps_the_contract() {
    let mut desk = Desk::start(Role::Pull).await;
    assert_eq!(check(&mut desk).await.unwrap(), REPLUGGED);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_fetches_keys_of_a_key_manager_by_id_keeps_the_contract() {
    let mut desk = Desk::start(Role::Fetch).await;
    assert_eq!(check(&mut desk).await.unwrap(), REPLUGGED);
}

/// Keys that the vendor makes in one run.
const KEYS: u32 = 600;

const PATIENCE: Duration = Duration::from_secs(60);

/// Names the folder of certificates to the process that [`Managers::start`] makes.
const PKI: &str = "QKD_TEST_KEY_MANAGER_PKI";

/// Two key managers of a vendor, in a process of their own.
struct Managers {
    process: Child,
    addresses: Vec<SocketAddr>,
    /// It says how it went, at its end.
    _out: BufReader<ChildStdout>,
}

impl Managers {
    fn start(pki: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "key_managers_in_this_process",
                "--ignored",
                "--nocapture",
            ])
            .env(PKI, pki)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(process.stdout.take().unwrap());
        let mut addresses = Vec::new();
        while addresses.len() < 2 {
            let mut line = String::new();
            assert!(out.read_line(&mut line).unwrap() > 0, "no key managers");
            addresses.extend(
                line.strip_prefix("at ")
                    .and_then(|at| at.trim().parse::<SocketAddr>().ok()),
            );
        }
        Self {
            process,
            addresses,
            _out: out,
        }
    }
}

impl Drop for Managers {
    fn drop(&mut self) {
        // They end with their standard input.
        drop(self.process.stdin.take());
        assert!(
            self.process.wait().is_ok_and(|status| status.success()) || std::thread::panicking()
        );
    }
}

#[test]
#[ignore = "the other process of the tests below"]
fn key_managers_in_this_process() {
    let Some(pki) = std::env::var_os(PKI) else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let vendor = Vendor::new(KEYS);
    let managers = [(); 2].map(|()| runtime.block_on(KeyManager::start(&vendor, Path::new(&pki))));
    let mut out = std::io::stdout();
    for KeyManager { address, .. } in &managers {
        // A line of its own: the test's name may stand before it.
        write!(out, "\nat {address}\n").unwrap();
    }
    out.flush().unwrap();
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

/// What one end had.
#[derive(Default)]
struct End {
    keys: BTreeMap<QkdKeyId, Vec<u8>>,
    lost: u64,
    empty: BTreeSet<QkdKeyId>,
    detached: u32,
}

impl End {
    /// Keys of which it is known what became of them, or more.
    fn told(&self) -> usize {
        self.keys.len() + self.empty.len() + usize::try_from(self.lost).unwrap()
    }

    /// Takes what comes within `quiet`.
    async fn take(&mut self, source: &mut dyn KeySource, quiet: Duration) -> bool {
        let mut out = [0; 32];
        let Ok(event) = tokio::time::timeout(quiet, next_event(source, &mut out)).await else {
            return false;
        };
        match event.unwrap() {
            Event::Key(block) => {
                let id = block.metadata.qkd_key_id;
                source.settle(&id, Settlement::Stored);
                source.grant(1);
                let before = self.keys.insert(id.clone(), out.to_vec());
                assert!(before.is_none(), "{id} came twice");
            }
            Event::Gap { blocks } => self.lost += blocks,
            Event::Empty { id } => assert!(self.empty.insert(id), "given up twice"),
            Event::Detached { .. } => self.detached += 1,
            Event::Attached { .. } => {}
            other => panic!("{other:?} was not expected"),
        }
        true
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Split,
    Stall,
    HangUp,
    HalfOpen,
}

impl Fault {
    fn weather(self) -> Weather {
        Weather {
            latency: Duration::from_millis(3),
            slices: (self == Self::Split).then_some(1..=40),
            ..Weather::FAIR
        }
    }

    /// Does it once.
    async fn strike(self, proxy: &Proxy, random: &mut Random) {
        let least_ms = if self == Self::HalfOpen { 300 } else { 10 };
        tokio::time::sleep(Duration::from_millis(least_ms + random.next() % 30)).await;
        match self {
            Self::Split => {}
            Self::HangUp => proxy.reset(),
            Self::HalfOpen => proxy.leave_the_dialler_alone(),
            Self::Stall => {
                let partition = true;
                proxy.set(Weather {
                    partition,
                    ..self.weather()
                });
                // Longer than the driver waits for an answer.
                tokio::time::sleep(Duration::from_millis(600)).await;
                proxy.set(self.weather());
            }
        }
    }
}

/// Takes until so many keys have come or are told as lost, with a fault that strikes `strikes` times
/// meanwhile; then what still comes.
async fn drain(
    source: &mut dyn KeySource,
    proxy: &Proxy,
    (fault, strikes): (Fault, u32),
    keys: usize,
) -> End {
    let (mut end, start) = (End::default(), Instant::now());
    source.grant(64);
    let mut random = Random(u64::from(strikes));
    {
        let storm = async {
            for _ in 0..strikes {
                fault.strike(proxy, &mut random).await;
            }
        };
        tokio::pin!(storm);
        loop {
            tokio::select! {
                () = &mut storm => break,
                _ = end.take(source, PATIENCE) => {}
            }
        }
    }
    proxy.set(fault.weather());
    while end.told() < keys {
        assert!(start.elapsed() < PATIENCE, "{} of {keys} keys", end.told());
        end.take(source, Duration::from_secs(1)).await;
    }
    while end.take(source, Duration::from_secs(1)).await {}
    end
}

async fn nothing_goes_unnoticed(fault: Fault, strikes: u32) {
    let pki = vendor_pki();
    let managers = Managers::start(pki.path());
    let mut proxies = Vec::new();
    for &address in &managers.addresses {
        proxies.push(Proxy::start(address, fault.weather(), 7).await);
    }
    let patient = |role, proxy: &Proxy| Etsi014Config {
        timeout_ms: if fault == Fault::Split { 10_000 } else { 400 },
        ..config(pki.path(), proxy.address, role)
    };
    let truth: BTreeMap<_, _> = (0..KEYS)
        .map(drawn_key)
        .map(|(id, key)| (qkd_key_id(id), key))
        .collect();
    let mut alice = open(patient(Role::Pull, &proxies[0]));
    let ours = drain(&mut *alice, &proxies[0], (fault, strikes), truth.len()).await;
    for (id, key) in &ours.keys {
        assert!(truth[id] == *key, "{id} was altered");
    }
    let lost = truth.len() - ours.keys.len();
    assert!(lost as u64 <= ours.lost, "{lost} lost, {} told", ours.lost);

    let mut bob = open(patient(Role::Fetch, &proxies[1]));
    let ids: Vec<_> = ours.keys.keys().cloned().collect();
    bob.request(&ids);
    let theirs = drain(&mut *bob, &proxies[1], (fault, strikes), ids.len()).await;
    for (id, key) in &theirs.keys {
        assert!(ours.keys[id] == *key, "{id} differs");
        assert!(!theirs.empty.contains(id), "{id} came and was given up");
    }
    assert_eq!(
        theirs.keys.len() + theirs.empty.len(),
        ids.len(),
        "some are neither"
    );
    if fault == Fault::Split {
        assert_eq!((lost, ours.detached, theirs.empty.len()), (0, 0, 0));
    } else {
        assert!(
            ours.detached > 0 && theirs.detached > 0,
            "nothing went wrong"
        );
        assert!(
            !ours.keys.is_empty() && !theirs.keys.is_empty(),
            "nothing came"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_in_small_pieces_lose_nothing() {
    nothing_goes_unnoticed(Fault::Split, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stall_costs_is_counted_at_both_ends() {
    nothing_goes_unnoticed(Fault::Stall, 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_connections_that_break_cost_is_counted_at_both_ends() {
    nothing_goes_unnoticed(Fault::HangUp, 30).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_connections_that_fall_silent_cost_is_counted_at_both_ends() {
    nothing_goes_unnoticed(Fault::HalfOpen, 8).await;
}
