//! A node's configuration: one TOML file, read into the types that the rest of the program uses.
//!
//! A [`Config`] that exists is consistent. Whatever is wrong is reported with the file, the line and
//! the entry. Relative paths are taken from the file's own folder.

mod check;
mod entries;
mod file;
mod relay;
mod store;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use qkd_drivers::DriverConfig;
use qkd_keyfile::{AppId, NodeId};
use serde::Deserialize;

pub use entries::{
    AppEntry, ControllerLink, KxConfig, LinkEntry, ListenConfig, ModulePairEntry, NodeConfig,
    PeerConfig, StockEntry, SupplyConfig, TlsConfig,
};
pub use file::ConfigError;
pub(crate) use file::read_toml;
pub use relay::{PairEntry, PolicyEntry, RandomEntry, RelayConfig, SchemeEntry};
pub use store::{KekConfig, PassPhraseFrom, RetentionConfig, StoreConfig};

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
    /// How long keys and their history are kept.
    #[serde(default)]
    pub retention: RetentionConfig,
    /// Where other nodes connect.
    pub kx: KxConfig,
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
    /// How keys are relayed.
    #[serde(default)]
    pub relay: RelayConfig,
    /// End-to-end stock to be kept with nodes that are no neighbours.
    #[serde(default, rename = "stock")]
    pub stocks: Vec<StockEntry>,
    /// Applications, and the nodes where they fetch keys.
    #[serde(default, rename = "app")]
    pub apps: Vec<AppEntry>,
    /// Levels of the log, as `--log` takes them; `--log` and `QKD_LOG` come first.
    pub log: Option<String>,
    /// The file, to compare with a later one.
    #[serde(skip)]
    file: toml::Table,
}

impl Config {
    /// Reads and checks a node's file.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] names the file, the line and the entry.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let (mut config, text) = read_toml::<Self>(path)?;
        check::check(&config)
            .map_err(|wrong| ConfigError::at(path, &text, wrong.span, wrong.what))?;
        config.file = toml::from_str(&text).unwrap_or_default();
        config.resolve(path.parent().unwrap_or(Path::new(".")));
        Ok(config)
    }

    fn resolve(&mut self, base: &Path) {
        let data = base.join(&self.node.data);
        self.tls.resolve(base);
        self.store.resolve(base, &data);
        self.node.data = data;
        if let Some(device) = &mut self.relay.device {
            *device = base.join(&*device);
        }
        for link in &mut self.links {
            for pair in &mut link.module_pairs {
                resolve_driver(&mut pair.driver, base);
            }
        }
    }

    /// The sections in which another version of this file differs, without those that a running node
    /// takes over: module pairs and the log's levels.
    #[must_use]
    pub fn differing_sections(&self, other: &Self) -> Vec<String> {
        let (mine, theirs) = (sections(&self.file), sections(&other.file));
        let mut names: Vec<_> = mine.keys().chain(theirs.keys()).cloned().collect();
        names.sort();
        names.dedup();
        names.retain(|name| mine.get(name) != theirs.get(name));
        names
    }

    /// The node of every application.
    #[must_use]
    pub fn app_nodes(&self) -> BTreeMap<AppId, NodeId> {
        let entry = |app: &AppEntry| (app.id.get_ref().clone(), app.node.get_ref().clone());
        self.apps.iter().map(entry).collect()
    }

    /// Where the store is.
    #[must_use]
    pub fn store_dir(&self) -> PathBuf {
        self.node.data.join("store")
    }

    /// What people call applications.
    #[must_use]
    pub fn app_names(&self) -> BTreeMap<AppId, String> {
        let named = |app: &AppEntry| Some((app.id.get_ref().clone(), app.name.clone()?));
        self.apps.iter().filter_map(named).collect()
    }

    /// Where the running node answers `status`.
    #[must_use]
    pub fn status_socket(&self) -> PathBuf {
        self.node.data.join("status.sock")
    }

    /// Where the running node takes orders.
    #[must_use]
    pub fn order_socket(&self) -> PathBuf {
        self.node.data.join("orders.sock")
    }
}

/// A file's sections, by the names that they have in it.
fn sections(file: &toml::Table) -> BTreeMap<String, toml::Value> {
    let mut sections = BTreeMap::new();
    for (name, value) in file {
        let mut value = value.clone();
        match (name.as_str(), &mut value) {
            ("log", _) => continue,
            ("link", toml::Value::Array(links)) => links
                .iter_mut()
                .filter_map(toml::Value::as_table_mut)
                .for_each(|link| drop(link.remove("module_pair"))),
            _ => {}
        }
        let name = match value {
            toml::Value::Array(_) => format!("[[{name}]]"),
            _ => format!("[{name}]"),
        };
        sections.insert(name, value);
    }
    sections
}

/// Paths of a driver, taken from the configuration's folder.
pub(crate) fn resolve_driver(driver: &mut DriverConfig, base: &Path) {
    for path in driver.paths_mut() {
        *path = base.join(&*path);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
