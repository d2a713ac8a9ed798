//! A node's configuration: one TOML file, read into the types that the rest of the program uses.
//!
//! A [`Config`] that exists is consistent. Whatever is wrong is reported with the file, the line and
//! the entry. Relative paths are taken from the file's own folder.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    ops::Range,
    path::{Path, PathBuf},
};

use qkd_drivers::DriverConfig;
use qkd_keyfile::{AppId, KeyBits, ModulePairId, NodeId};
use qkd_ksa::Profile;
use serde::Deserialize;
use toml::Spanned;

/// A node, as its file describes it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The node itself.
    pub node: NodeConfig,
    /// Its certificate.
    pub tls: TlsConfig,
    /// Where keys are kept.
    #[serde(default)]
    pub store: StoreConfig,
    /// Where other nodes connect.
    pub kx: ListenConfig,
    /// Where applications connect; without it the node only relays.
    pub supply: Option<SupplyConfig>,
    /// Who gives routes, where none is set by hand.
    pub controller: Option<ControllerLink>,
    /// The other nodes.
    #[serde(default, rename = "peer")]
    pub peers: Vec<PeerConfig>,
    /// Links to matching KMAs.
    #[serde(default, rename = "link")]
    pub links: Vec<LinkEntry>,
    /// End-to-end stock to be kept with nodes that are no neighbours.
    #[serde(default, rename = "stock")]
    pub stocks: Vec<StockEntry>,
    /// Applications, and the nodes where they fetch keys.
    #[serde(default, rename = "app")]
    pub apps: Vec<AppEntry>,
    /// Levels of the log, as `--log` takes them; `--log` and `QKD_LOG` come first.
    pub log: Option<String>,
}

/// The node itself.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Its ID, which is the one in its certificate.
    pub id: NodeId,
    /// Its data directory, made if it is not there.
    pub data: PathBuf,
    /// Key memory, in MiB: at least 4; half of it is for what comes from hardware. It is locked, so
    /// the limit on locked memory must allow it.
    #[serde(default = "default_key_memory_mib")]
    pub key_memory_mib: Spanned<usize>,
    /// Whether key memory that cannot be locked may be used all the same.
    #[serde(default)]
    pub allow_unlocked_memory: bool,
    /// Whether units of other nodes are relayed here.
    #[serde(default = "yes")]
    pub relay_for_others: bool,
}

/// A certificate and whom it trusts; PEM files.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// This node's certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Where keys are kept.
#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum StoreConfig {
    /// Sealed, in LMDB.
    Lmdb {
        /// The key-encryption key.
        #[serde(default)]
        kek: KekConfig,
        /// Most bytes of the database, in GiB.
        #[serde(default = "default_max_gib")]
        max_gib: usize,
    },
    /// In key memory only; a restart begins with an empty stock.
    Memory,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self::Lmdb {
            kek: KekConfig::default(),
            max_gib: default_max_gib(),
        }
    }
}

/// Where the key-encryption key comes from.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum KekConfig {
    /// A file of 32 random bytes, mode 0400 or 0600. Made with a new store if it is not there.
    File(PathBuf),
    /// A credential that systemd hands over (`LoadCredentialEncrypted=`).
    Credential(String),
}

impl Default for KekConfig {
    /// `kek` in the data directory: keep it elsewhere where the disk may be taken away.
    fn default() -> Self {
        Self::File(PathBuf::from("kek"))
    }
}

/// Where a port is.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConfig {
    /// `host:port`; loopback unless you say otherwise.
    pub listen: String,
}

/// Where applications fetch keys (ETSI GS QKD 014), and what they may ask for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SupplyConfig {
    /// `host:port`.
    pub listen: String,
    /// Size of a key that is asked for without a size, in bits.
    #[serde(default = "default_key_bits")]
    pub key_bits: KeyBits,
    /// Longest key, in bits.
    #[serde(default = "default_max_key_bits")]
    pub max_key_bits: KeyBits,
    /// Most keys in one request.
    #[serde(default = "default_max_keys")]
    pub max_keys_per_request: u32,
    /// Whether HTTP/2 is offered beside HTTP/1.1.
    #[serde(default)]
    pub http2: bool,
}

impl SupplyConfig {
    /// The limits that applications are told.
    ///
    /// # Errors
    ///
    /// They contradict each other.
    pub fn profile(&self) -> Result<Profile, qkd_ksa::ProfileError> {
        let least = KeyBits::try_from(8).unwrap_or(self.key_bits);
        Profile::new(
            self.key_bits,
            least.min(self.key_bits),
            self.max_key_bits,
            self.max_keys_per_request,
            0,
        )
    }
}

/// The controller that this node asks for routes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControllerLink {
    /// Its ID, which is the one in its certificate.
    pub id: NodeId,
    /// `host:port` of its Ck.
    pub address: String,
}

/// Another node.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Its ID.
    pub id: Spanned<NodeId>,
    /// `host:port` of its Kx.
    pub address: String,
}

/// A link to a matching KMA.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkEntry {
    /// The node at the other end.
    pub peer: Spanned<NodeId>,
    /// Pad per direction that serves only tags and hash keys, in bytes.
    #[serde(default = "default_floor_bytes")]
    pub floor_bytes: u64,
    /// Most bytes in stock; a full store takes no new segment.
    #[serde(default = "default_capacity_bytes")]
    pub capacity_bytes: u64,
    /// The module pairs that feed the link.
    #[serde(default, rename = "module_pair")]
    pub module_pairs: Vec<ModulePairEntry>,
}

/// A module pair; both ends give it the same name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModulePairEntry {
    /// Its name.
    pub name: Spanned<ModulePairId>,
    /// How this node's module hands over its keys.
    pub driver: DriverConfig,
}

/// End-to-end stock with a node.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StockEntry {
    /// The node.
    pub with: Spanned<NodeId>,
    /// Stock to keep, in KiB.
    #[serde(default = "default_target_kib")]
    pub target_kib: u64,
    /// Key data of one relayed unit, in bytes.
    #[serde(default = "default_unit_bytes")]
    pub unit_bytes: u32,
    /// All nodes from here to there; without it the controller is asked.
    pub route: Option<Spanned<Vec<NodeId>>>,
}

/// An application.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppEntry {
    /// Its ID, which is the one in its certificate.
    pub id: Spanned<AppId>,
    /// The node where it fetches keys.
    pub node: Spanned<NodeId>,
}

fn yes() -> bool {
    true
}

fn default_key_memory_mib() -> Spanned<usize> {
    Spanned::new(0..0, 64)
}

fn default_max_gib() -> usize {
    16
}

fn default_key_bits() -> KeyBits {
    KeyBits::try_from(256).unwrap_or_else(|_| unreachable!("256 bits are 32 bytes"))
}

fn default_max_key_bits() -> KeyBits {
    KeyBits::try_from(8192).unwrap_or_else(|_| unreachable!("8192 bits are 1024 bytes"))
}

fn default_max_keys() -> u32 {
    128
}

/// 64 Kibit.
fn default_floor_bytes() -> u64 {
    8192
}

fn default_capacity_bytes() -> u64 {
    256 << 20
}

fn default_target_kib() -> u64 {
    1024
}

fn default_unit_bytes() -> u32 {
    4096
}

/// What is wrong with a configuration: where, and what to do.
#[derive(Debug)]
pub struct ConfigError {
    path: PathBuf,
    /// Line and column, from 1.
    place: Option<(usize, usize)>,
    what: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.what)
    }
}

impl std::error::Error for ConfigError {}

impl ConfigError {
    /// Something that concerns the file as a whole.
    pub(crate) fn whole(path: &Path, what: String) -> Self {
        Self {
            path: path.to_owned(),
            place: None,
            what,
        }
    }
}

/// Reads any of the program's TOML files.
pub(crate) fn read_toml<T: serde::de::DeserializeOwned>(
    path: &Path,
) -> Result<(T, String), ConfigError> {
    let error = |place, what| ConfigError {
        path: path.to_owned(),
        place,
        what,
    };
    let text = fs::read_to_string(path).map_err(|source| error(None, unreadable(&source)))?;
    match toml::from_str(&text) {
        Ok(value) => Ok((value, text)),
        Err(source) => {
            let place = source.span().map(|span| place_of(&text, &span));
            Err(error(place, source.message().to_owned()))
        }
    }
}

fn unreadable(source: &io::Error) -> String {
    format!("cannot be read: {source}")
}

fn place_of(text: &str, span: &Range<usize>) -> (usize, usize) {
    let before = &text[..span.start.min(text.len())];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (
        before.matches('\n').count() + 1,
        before[line_start..].chars().count() + 1,
    )
}

impl Config {
    /// Reads and checks a node's file.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] names the file, the line and the entry.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let (mut config, text) = read_toml::<Self>(path)?;
        config.check().map_err(|(span, what)| ConfigError {
            path: path.to_owned(),
            place: span.map(|span| place_of(&text, &span)),
            what,
        })?;
        config.resolve(path.parent().unwrap_or(Path::new(".")));
        Ok(config)
    }

    /// What names must refer to, and which may occur once.
    fn check(&self) -> Result<(), (Option<Range<usize>>, String)> {
        let me = &self.node.id;
        let key_memory_mib = *self.node.key_memory_mib.get_ref();
        if !(4..=1 << 20).contains(&key_memory_mib) {
            let what = format!(
                "key_memory_mib = {key_memory_mib} is not within 4 to {}",
                1 << 20
            );
            return refuse(&self.node.key_memory_mib, what);
        }
        let mut peers = BTreeSet::new();
        for peer in &self.peers {
            let id = peer.id.get_ref();
            if id == me {
                return refuse(&peer.id, format!("peer {id} is this node"));
            }
            if !peers.insert(id) {
                return refuse(&peer.id, format!("peer {id} is listed twice"));
            }
        }
        let known = |id: &Spanned<NodeId>, entry: &str| {
            if peers.contains(id.get_ref()) {
                return Ok(());
            }
            let id_text = id.get_ref();
            refuse(id, format!("{entry} {id_text} has no [[peer]] entry"))
        };
        let (mut links, mut pairs) = (BTreeSet::new(), BTreeSet::new());
        for link in &self.links {
            known(&link.peer, "link to")?;
            if !links.insert(link.peer.get_ref()) {
                let peer = link.peer.get_ref();
                return refuse(&link.peer, format!("link to {peer} is listed twice"));
            }
            for pair in &link.module_pairs {
                if !pairs.insert(pair.name.get_ref()) {
                    let name = pair.name.get_ref();
                    return refuse(&pair.name, format!("module pair {name} is listed twice"));
                }
            }
        }
        for stock in &self.stocks {
            known(&stock.with, "stock with")?;
            let (with, most) = (stock.with.get_ref(), 128 << 10);
            if !(64..=most).contains(&stock.unit_bytes) {
                let what = format!("unit_bytes of {with} is not within 64 to {most}");
                return refuse(&stock.with, what);
            }
            match &stock.route {
                None if self.controller.is_none() => {
                    let what = format!("stock with {with} needs a route or a [controller]");
                    return refuse(&stock.with, what);
                }
                Some(route) => {
                    let ends = (route.get_ref().first(), route.get_ref().last());
                    if ends != (Some(me), Some(with)) {
                        let what = format!("route must lead from {me} to {with}");
                        return refuse(route, what);
                    }
                }
                None => {}
            }
        }
        let mut apps = BTreeSet::new();
        for app in &self.apps {
            if app.node.get_ref() != me {
                known(&app.node, "application at")?;
            }
            if !apps.insert(app.id.get_ref()) {
                let id = app.id.get_ref();
                return refuse(&app.id, format!("application {id} is listed twice"));
            }
        }
        let most = self.supply.as_ref().map_or(0, |s| s.max_keys_per_request);
        if most > qkd_kma::KEYS_MAX {
            let limit = qkd_kma::KEYS_MAX;
            let what = format!("[supply]: max_keys_per_request = {most} is more than {limit}");
            return Err((None, what));
        }
        match self.supply.as_ref().map(SupplyConfig::profile) {
            Some(Err(error)) => Err((None, format!("[supply]: {error}"))),
            _ => Ok(()),
        }
    }

    fn resolve(&mut self, base: &Path) {
        let data = base.join(&self.node.data);
        for path in [
            &mut self.tls.ca,
            &mut self.tls.certificate,
            &mut self.tls.key,
        ] {
            *path = base.join(&*path);
        }
        if let StoreConfig::Lmdb {
            kek: KekConfig::File(path),
            ..
        } = &mut self.store
        {
            // The default lies beside the store, any other path is taken as all paths are.
            let default = path.as_path() == Path::new("kek");
            *path = if default { &data } else { base }.join(&*path);
        }
        self.node.data = data;
        for link in &mut self.links {
            for pair in &mut link.module_pairs {
                resolve_driver(&mut pair.driver, base);
            }
        }
    }

    /// The node of every application.
    #[must_use]
    pub fn app_nodes(&self) -> BTreeMap<AppId, NodeId> {
        let entry = |app: &AppEntry| (app.id.get_ref().clone(), app.node.get_ref().clone());
        self.apps.iter().map(entry).collect()
    }

    /// Where the running node answers `status`.
    #[must_use]
    pub fn status_socket(&self) -> PathBuf {
        self.node.data.join("status.sock")
    }
}

/// Paths of a driver, taken from the configuration's folder.
pub(crate) fn resolve_driver(driver: &mut DriverConfig, base: &Path) {
    let path = driver.path_mut();
    *path = base.join(&*path);
}

fn refuse<T>(at: &Spanned<T>, what: String) -> Result<(), (Option<Range<usize>>, String)> {
    Err((Some(at.span()), what))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[node]
id = "alice"
data = "data"

[tls]
ca = "ca.pem"
certificate = "alice.pem"
key = "alice.key"

[kx]
listen = "127.0.0.1:7001"

[[peer]]
id = "bob"
address = "127.0.0.1:7002"

[[link]]
peer = "bob"

[[link.module_pair]]
name = "mp1"
driver = { kind = "directory", path = "keys" }

[[app]]
id = "app-a"
node = "alice"
"#;

    fn read(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        fs::write(&path, text).unwrap();
        Config::read(&path).map_err(|error| {
            let text = error.to_string();
            text.strip_prefix(&format!("{}/", dir.path().display()))
                .unwrap()
                .to_owned()
        })
    }

    #[test]
    fn paths_are_taken_from_the_files_folder() {
        let config = read(GOOD).unwrap();
        assert!(config.tls.ca.is_absolute() && config.node.data.is_absolute());
        assert!(config.tls.ca.ends_with("ca.pem"));
        let StoreConfig::Lmdb {
            kek: KekConfig::File(path),
            ..
        } = &config.store
        else {
            panic!("LMDB is the default");
        };
        assert!(path.ends_with("data/kek"));
    }

    #[test]
    fn what_is_wrong_is_named_with_file_line_and_entry() {
        let cases = [
            (
                "id = \"alice\"",
                "id = \"\"",
                "node.toml:3:6: an ID has at least one character",
            ),
            (
                "data = \"data\"",
                "dta = \"data\"",
                "node.toml:4:1: unknown field `dta`",
            ),
            (
                "[kx]\nlisten = \"127.0.0.1:7001\"",
                "",
                "missing field `kx`",
            ),
            (
                "peer = \"bob\"",
                "peer = \"bo\"",
                "node.toml:19:8: link to bo has no [[peer]] entry",
            ),
            (
                "node = \"alice\"",
                "node = \"carol\"",
                "node.toml:27:8: application at carol has no",
            ),
            (
                "id = \"bob\"",
                "id = \"alice\"",
                "node.toml:15:6: peer alice is this node",
            ),
        ];
        for (good, bad, expected) in cases {
            let text = GOOD.replacen(good, bad, 1);
            assert_ne!(text, GOOD);
            let error = read(&text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_stock_without_a_way_is_refused() {
        let text = format!("{GOOD}\n[[stock]]\nwith = \"bob\"\n");
        assert!(
            read(&text)
                .unwrap_err()
                .contains("needs a route or a [controller]")
        );
        let text = format!("{text}route = [\"alice\", \"relay\"]\n");
        assert!(
            read(&text)
                .unwrap_err()
                .contains("route must lead from alice to bob")
        );
    }
}
