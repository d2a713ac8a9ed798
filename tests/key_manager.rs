//! Two nodes whose modules are vendors' key managers: one end pulls keys, the other fetches the same
//! keys by their IDs, over ETSI GS QKD 014 and real TLS.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    future::poll_fn,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, SystemTime},
};

use qkd_bridge::demo::{LinkPlan, PairPlan, Plan, Transport, application};
use qkd_drivers::{
    AlarmCode, DriverConfig, Etsi014Config, Event, KeySource, Settlement, etsi014::Role, next_event,
};
use qkd_keyfile::{AppId, KeyBits, KsaKeyId, QkdKeyId, UnixTime};
use qkd_ksa::{
    Config, Counters, KeySupply, Profile, StockStatus, SuppliedKey, SupplyByIdRequest, SupplyError,
    SupplyRequest, serve,
};
use qkd_net::{Reloadable, pki};
use qkd_secmem::{Locking, Pool, PoolConfig};
use serde_json::Value;
use subtle::ConstantTimeEq;
use support::Net;
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::watch};

const PATIENCE: Duration = Duration::from_secs(60);

/// What two key managers of a vendor share: what one gave, the other has.
struct Vendor {
    pool: Pool,
    keys: Mutex<BTreeMap<KsaKeyId, Vec<u8>>>,
    drawn: AtomicU32,
    /// Keys reach the second key manager only from now on.
    synchronised: AtomicBool,
    most: u32,
}

impl Vendor {
    fn new(most: u32) -> Arc<Self> {
        let pool = PoolConfig {
            capacity_bytes: 4 << 20,
            locking: Locking::Unlocked,
        };
        Arc::new(Self {
            pool: Pool::new(pool).unwrap(),
            keys: Mutex::default(),
            drawn: AtomicU32::new(0),
            synchronised: AtomicBool::new(true),
            most,
        })
    }

    fn draw(&self, len_bytes: usize) -> SuppliedKey {
        let number = self.drawn.fetch_add(1, Ordering::Relaxed);
        let mut state = u64::from(number) << 32;
        let mut byte = || {
            // SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)).to_le_bytes()[0]
        };
        let id = KsaKeyId::from_random(std::array::from_fn(|_| byte()));
        let bytes: Vec<u8> = (0..len_bytes).map(|_| byte()).collect();
        let key = self.pool.copy_of(&bytes).unwrap();
        self.keys.lock().unwrap().insert(id, bytes);
        SuppliedKey { id, key }
    }
}

impl KeySupply for Vendor {
    async fn status(&self, _: &AppId, _: &AppId) -> Result<StockStatus, SupplyError> {
        unimplemented!("nobody asks")
    }

    async fn supply(&self, request: SupplyRequest) -> Result<Vec<SuppliedKey>, SupplyError> {
        assert_eq!(request.caller.as_str(), "sae-alice");
        assert_eq!(request.destinations[0].as_str(), "sae-bob");
        if self.drawn.load(Ordering::Relaxed) + request.number > self.most {
            return Err(SupplyError::NotEnoughKey {
                asked_bits: 256,
                have_bits: 0,
            });
        }
        let len_bytes = request.size.bytes();
        Ok((0..request.number).map(|_| self.draw(len_bytes)).collect())
    }

    async fn supply_by_id(
        &self,
        request: SupplyByIdRequest,
    ) -> Result<Vec<SuppliedKey>, SupplyError> {
        assert_eq!(request.caller.as_str(), "sae-bob");
        assert_eq!(request.master.as_str(), "sae-alice");
        let mut keys = self.keys.lock().unwrap();
        let here =
            |id: &KsaKeyId| self.synchronised.load(Ordering::Relaxed) && keys.contains_key(id);
        let missing = request.ids.iter().filter(|id| !here(id)).count();
        if missing > 0 {
            return Err(SupplyError::UnknownKeys { missing });
        }
        // Once: then it is forgotten.
        let take = |id: KsaKeyId| {
            let bytes = keys.remove(&id).unwrap();
            let key = self.pool.copy_of(&bytes).unwrap();
            SuppliedKey { id, key }
        };
        Ok(request.ids.into_iter().map(take).collect())
    }
}

/// One key manager.
struct KeyManager {
    address: SocketAddr,
    stop: watch::Sender<bool>,
}

impl KeyManager {
    async fn start(vendor: &Arc<Vendor>, pki: &TempDir) -> Self {
        let path = |name: &str| pki.path().join(name);
        let (certificate, key) = (path("node-kme.pem"), path("node-kme.key"));
        let credentials = Reloadable::load(&path("ca.pem"), &certificate, &key).unwrap();
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let bits = |bits: u32| KeyBits::try_from(bits).unwrap();
        let profile = Profile::new(bits(256), bits(256), bits(8192), 16, 0).unwrap();
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(serve(
            listener,
            Arc::new(credentials),
            Arc::clone(vendor),
            Config::new(profile),
            Arc::new(Counters::default()),
            stopped,
        ));
        Self { address, stop }
    }
}

fn vendor_pki() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let since_1970 = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let request = pki::Request {
        nodes: &["kme".parse().unwrap()],
        apps: &["sae-alice", "sae-bob"].map(|id| id.parse().unwrap()),
        extra_hosts: &[],
        now: UnixTime(since_1970.as_nanos().try_into().unwrap()),
        valid_days: 1,
    };
    pki::init(dir.path(), &request).unwrap();
    dir
}

fn config(pki: &TempDir, address: SocketAddr, role: Role) -> Etsi014Config {
    let (me, peer, role) = match role {
        Role::Pull => ("alice", "bob", "pull"),
        Role::Fetch => ("bob", "alice", "fetch"),
    };
    let path = |name: String| -> PathBuf { pki.path().join(name) };
    let text = format!(
        "kind = \"etsi014\"\nhost = \"127.0.0.1\"\nport = {}\nrole = \"{role}\"\n\
         peer_sae = \"sae-{peer}\"\nca = {:?}\ncertificate = {:?}\nkey = {:?}\n\
         poll_interval_ms = 20",
        address.port(),
        path("ca.pem".to_owned()),
        path(format!("app-sae-{me}.pem")),
        path(format!("app-sae-{me}.key")),
    );
    match toml::from_str(&text).unwrap() {
        DriverConfig::Etsi014(config) => config,
        _ => unreachable!(),
    }
}

fn open(config: Etsi014Config) -> Box<dyn KeySource> {
    DriverConfig::Etsi014(config).open().unwrap()
}

async fn event(source: &mut dyn KeySource) -> (Event, Vec<u8>) {
    let mut out = vec![0; source.max_block_bytes()];
    let event = tokio::time::timeout(PATIENCE, next_event(source, &mut out));
    (event.await.unwrap().unwrap(), out)
}

async fn key(source: &mut dyn KeySource) -> (QkdKeyId, Vec<u8>) {
    loop {
        match event(source).await {
            (Event::Key(block), key) => {
                assert_eq!(block.key_bits as usize, key.len() * 8);
                return (block.metadata.qkd_key_id, key);
            }
            (Event::Attached { .. }, _) => {}
            (other, _) => panic!("a key was expected, not {other:?}"),
        }
    }
}

async fn quiet(source: &mut dyn KeySource) {
    let mut out = vec![0; source.max_block_bytes()];
    let event = next_event(source, &mut out);
    if let Ok(event) = tokio::time::timeout(Duration::from_millis(150), event).await {
        panic!("nothing was expected, not {event:?}");
    }
}

#[tokio::test]
async fn what_one_end_pulls_the_other_fetches_by_id() {
    let (vendor, pki) = (Vendor::new(1000), vendor_pki());
    let [a, b] = [
        KeyManager::start(&vendor, &pki).await,
        KeyManager::start(&vendor, &pki).await,
    ];
    let mut alice = open(config(&pki, a.address, Role::Pull));
    let mut bob = open(config(&pki, b.address, Role::Fetch));
    bob.grant(1000);
    // Nothing is pulled without credit, and not more than there is credit for.
    let waiting = poll_fn(|cx| std::task::Poll::Ready(alice.poll(cx, &mut [0; 32]).is_pending()));
    assert!(waiting.await);
    assert_eq!(vendor.drawn.load(Ordering::Relaxed), 0);
    alice.grant(20);
    let mut pulled = Vec::new();
    for _ in 0..20 {
        pulled.push(key(&mut *alice).await);
    }
    quiet(&mut *alice).await;
    assert_eq!(vendor.drawn.load(Ordering::Relaxed), 20);
    let ids: Vec<_> = pulled.iter().map(|(id, _)| id.clone()).collect();
    bob.request(&ids);
    bob.request(&ids);
    for _ in 0..20 {
        let (id, bytes) = key(&mut *bob).await;
        let ours = pulled.iter().find(|(ours, _)| *ours == id).unwrap();
        assert!(bool::from(bytes.ct_eq(&ours.1)));
        bob.settle(&id, Settlement::Stored);
        bob.request(&[id]);
    }
    quiet(&mut *bob).await;
    assert!(vendor.keys.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_key_that_is_not_there_yet_is_asked_for_again_and_given_up_in_the_end() {
    let (vendor, pki) = (Vendor::new(1000), vendor_pki());
    let kme = KeyManager::start(&vendor, &pki).await;
    let mut bob = open(config(&pki, kme.address, Role::Fetch));
    bob.grant(10);
    let there = vendor.draw(32);
    let id = |id: KsaKeyId| id.to_string().parse::<QkdKeyId>().unwrap();
    let missing = id(KsaKeyId::from_random([9; 16]));
    vendor.synchronised.store(false, Ordering::Relaxed);
    bob.request(&[id(there.id), missing.clone()]);
    assert!(matches!(event(&mut *bob).await.0, Event::Attached { .. }));
    vendor.synchronised.store(true, Ordering::Relaxed);
    assert_eq!(key(&mut *bob).await.0, id(there.id));
    assert_eq!(event(&mut *bob).await.0, Event::Empty { id: missing });
    quiet(&mut *bob).await;
}

#[tokio::test]
async fn a_key_manager_that_goes_away_and_comes_back_is_attached_again() {
    let (vendor, pki) = (Vendor::new(3), vendor_pki());
    let kme = KeyManager::start(&vendor, &pki).await;
    let address = kme.address;
    let mut alice = open(Etsi014Config {
        keys_per_request: 1,
        ..config(&pki, address, Role::Pull)
    });
    alice.grant(10);
    for _ in 0..3 {
        key(&mut *alice).await;
    }
    // No key left: no alarm, and no loop.
    quiet(&mut *alice).await;
    kme.stop.send_replace(true);
    drop(kme);
    let (gone, _) = event(&mut *alice).await;
    assert!(matches!(gone, Event::Detached { .. }), "{gone:?}");
    quiet(&mut *alice).await;
}

#[tokio::test]
async fn a_length_of_key_that_the_key_manager_does_not_have_is_an_alarm_told_once() {
    let (vendor, pki) = (Vendor::new(1000), vendor_pki());
    let kme = KeyManager::start(&vendor, &pki).await;
    let mut alice = open(Etsi014Config {
        key_bits: 64,
        ..config(&pki, kme.address, Role::Pull)
    });
    alice.grant(1);
    assert!(matches!(event(&mut *alice).await.0, Event::Attached { .. }));
    let Event::Alarm(alarm) = event(&mut *alice).await.0 else {
        panic!("an alarm was expected");
    };
    assert_eq!(alarm.code, AlarmCode::KeyManagerRefuses { status: 400 });
    quiet(&mut *alice).await;
}

/// The link's counters of both ends.
fn confirmed(statuses: &[(String, Value)]) -> Vec<u64> {
    let of = |(_, status): &(String, Value)| {
        let streams = status["streams"].as_object().unwrap().values();
        streams
            .filter_map(|stream| stream["confirmed_segments"].as_u64())
            .sum()
    };
    statuses.iter().map(of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_two_key_managers_become_keys_of_applications_at_two_nodes() {
    let (vendor, pki) = (Vendor::new(100_000), vendor_pki());
    let managers = [
        KeyManager::start(&vendor, &pki).await,
        KeyManager::start(&vendor, &pki).await,
    ];
    let node = |id: &str| id.parse().unwrap();
    let plan = Plan {
        nodes: vec![node("alice"), node("bob")],
        links: vec![LinkPlan {
            a: node("alice"),
            b: node("bob"),
            pairs: vec![PairPlan {
                name: "vendor".to_owned(),
                transport: Transport::Files,
                block_bits: 4096,
                pace: 1.0,
            }],
        }],
        stock: None,
        apps: vec![
            ("app-a".parse().unwrap(), node("alice")),
            ("app-b".parse().unwrap(), node("bob")),
        ],
        key_memory_mib: 8,
    };
    let mut net = Net::start_without_devices(plan, |network| {
        for (id, manager, role) in [
            ("alice", &managers[0], Role::Pull),
            ("bob", &managers[1], Role::Fetch),
        ] {
            let file = &network.node(id).unwrap().config;
            let text = fs::read_to_string(file).unwrap();
            let Etsi014Config {
                peer_sae,
                ca,
                certificate,
                key,
                ..
            } = config(&pki, manager.address, role);
            let role = if role == Role::Pull { "pull" } else { "fetch" };
            let driver = format!(
                "driver = {{ kind = \"etsi014\", host = \"127.0.0.1\", port = {}, \
                 role = \"{role}\", peer_sae = \"{peer_sae}\", ca = {ca:?}, \
                 certificate = {certificate:?}, key = {key:?}, poll_interval_ms = 50 }}",
                manager.address.port()
            );
            let lines = text.lines().map(|line| {
                if line.starts_with("driver = ") {
                    driver.as_str()
                } else {
                    line
                }
            });
            let changed = lines.collect::<Vec<_>>().join("\n");
            assert_ne!(changed, text);
            fs::write(file, changed).unwrap();
        }
    });
    net.wait_until("confirmed keys", PATIENCE, |statuses| {
        statuses.len() == 2 && confirmed(statuses).iter().all(|&count| count > 8)
    })
    .await;
    let [mut a, mut b] = ["app-a", "app-b"].map(|id| application(&net.network, id).unwrap());
    let start = std::time::Instant::now();
    let ours = loop {
        match a.enc_keys(b.id(), 4, 256).await {
            Ok(keys) => break keys,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let ids: Vec<&str> = ours.iter().map(|key| key.id.as_str()).collect();
    let theirs = loop {
        match b.dec_keys(a.id(), &ids).await {
            Ok(keys) => break keys,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(ours.len(), 4);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours.id, theirs.id);
        assert!(bool::from(ours.key.ct_eq(&theirs.key)));
    }
}
