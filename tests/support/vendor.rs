//! A vendor's two key managers, over real TLS: our own key supply agent before keys that are drawn by
//! their number.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::SystemTime,
};

use qkd_drivers::{DriverConfig, Etsi014Config, KeySource, etsi014::Role};
use qkd_keyfile::{AppId, KeyBits, KsaKeyId, QkdKeyId, UnixTime};
use qkd_ksa::{
    Config, Counters, KeySupply, Profile, StockStatus, SuppliedKey, SupplyByIdRequest, SupplyError,
    SupplyRequest, serve,
};
use qkd_net::{Reloadable, pki};
use qkd_secmem::{Locking, Pool, PoolConfig};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::watch};

use super::proxy::Random;

/// What two key managers of a vendor share: what one gave, the other has.
pub(crate) struct Vendor {
    pool: Pool,
    /// Given at one end, and not fetched at the other.
    pub(crate) keys: Mutex<BTreeMap<KsaKeyId, Vec<u8>>>,
    pub(crate) drawn: AtomicU32,
    /// Keys reach the second key manager only from now on.
    pub(crate) synchronised: AtomicBool,
    /// So many are drawn in all.
    pub(crate) most: AtomicU32,
}

/// The key with this number, of the vendor's default length.
pub(crate) fn drawn_key(number: u32) -> (KsaKeyId, Vec<u8>) {
    let mut random = Random(u64::from(number) << 32);
    let mut byte = || random.next().to_le_bytes()[0];
    let id = KsaKeyId::from_random(std::array::from_fn(|_| byte()));
    (id, std::iter::repeat_with(byte).take(32).collect())
}

pub(crate) fn qkd_key_id(id: KsaKeyId) -> QkdKeyId {
    id.to_string().parse().unwrap()
}

impl Vendor {
    pub(crate) fn new(most: u32) -> Arc<Self> {
        let pool = PoolConfig {
            capacity_bytes: 4 << 20,
            locking: Locking::Unlocked,
        };
        Arc::new(Self {
            pool: Pool::new(pool).unwrap(),
            keys: Mutex::default(),
            drawn: AtomicU32::new(0),
            synchronised: AtomicBool::new(true),
            most: AtomicU32::new(most),
        })
    }

    pub(crate) fn draw(&self) -> SuppliedKey {
        let (id, bytes) = drawn_key(self.drawn.fetch_add(1, Ordering::Relaxed));
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
        let most = self.most.load(Ordering::Relaxed);
        if self.drawn.load(Ordering::Relaxed) + request.number > most {
            return Err(SupplyError::NotEnoughKey {
                asked_bits: 256,
                have_bits: 0,
            });
        }
        assert_eq!(request.size.bytes(), 32);
        Ok((0..request.number).map(|_| self.draw()).collect())
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
pub(crate) struct KeyManager {
    pub(crate) address: SocketAddr,
    pub(crate) stop: watch::Sender<bool>,
}

impl KeyManager {
    pub(crate) async fn start(vendor: &Arc<Vendor>, pki: &Path) -> Self {
        let path = |name: &str| pki.join(name);
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

pub(crate) fn vendor_pki() -> TempDir {
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

/// Polls often; what else there is has its default.
pub(crate) fn config(pki: &Path, address: SocketAddr, role: Role) -> Etsi014Config {
    let (me, peer, role) = match role {
        Role::Pull => ("alice", "bob", "pull"),
        Role::Fetch => ("bob", "alice", "fetch"),
    };
    let path = |name: String| -> PathBuf { pki.join(name) };
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

pub(crate) fn open(config: Etsi014Config) -> Box<dyn KeySource> {
    DriverConfig::Etsi014(config).open().unwrap()
}
