//! `controller`: routes for nodes, over Ck.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use qkd_control::{Controller, NetworkLink, Topology, serve};
use qkd_keyfile::{AppId, NodeId};
use serde::Deserialize;
use tokio::net::TcpListener;

use super::{
    Failure, chain, log,
    run::{Order, Signals},
    runtime,
};
use crate::{
    config::{ConfigError, ListenConfig, TlsConfig, read_toml},
    env::{SystemClock, SystemEntropy},
};

/// A controller, as its file describes it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ControllerConfig {
    /// Its certificate.
    pub(super) tls: TlsConfig,
    /// Where nodes connect.
    ck: ListenConfig,
    /// The network's links.
    #[serde(rename = "link")]
    links: Vec<LinkEntry>,
    /// Applications, and the nodes where they fetch keys.
    #[serde(default, rename = "app")]
    apps: Vec<AppEntry>,
    /// Whether codes that no document assigns are refused.
    #[serde(default)]
    strict: bool,
    /// Below this much pad, in bits, a link is avoided where there is another way.
    #[serde(default = "default_low_stock_bits")]
    low_stock_bits: u64,
    /// Levels of the log.
    log: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LinkEntry {
    a: NodeId,
    b: NodeId,
    #[serde(default = "default_weight")]
    weight: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AppEntry {
    id: AppId,
    node: NodeId,
}

fn default_weight() -> u32 {
    1
}

fn default_low_stock_bits() -> u64 {
    1 << 20
}

impl ControllerConfig {
    pub(super) fn read(path: &Path) -> Result<(Self, Topology), ConfigError> {
        let (mut config, _) = read_toml::<Self>(path)?;
        let base = path.parent().unwrap_or(Path::new("."));
        config.tls.resolve(base);
        let link = |link: &LinkEntry| NetworkLink {
            a: link.a.clone(),
            b: link.b.clone(),
            weight: link.weight,
        };
        let links = config.links.iter().map(link).collect();
        let apps: BTreeMap<AppId, NodeId> = config
            .apps
            .iter()
            .map(|app| (app.id.clone(), app.node.clone()))
            .collect();
        let topology = Topology::new(links, apps, config.low_stock_bits)
            .map_err(|error| ConfigError::whole(path, error.to_string()))?;
        Ok((config, topology))
    }
}

pub(super) fn run(path: &Path, levels: Option<&str>) -> Result<(), Failure> {
    let (config, topology) = ControllerConfig::read(path)?;
    let levels = log::start(levels, config.log.as_deref())?;
    let credentials = Arc::new(config.tls.load()?);
    let controller = Controller::new(topology, Box::new(SystemEntropy), config.strict);
    runtime()?.block_on(async {
        let mut signals = Signals::new()?;
        let address = &config.ck.listen;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| Failure::Listen {
                address: address.clone(),
                source,
            })?;
        tracing::info!(%address, "controller starts");
        let clock = Arc::new(SystemClock::start());
        let serving = tokio::spawn(serve(listener, credentials.clone(), controller, clock));
        while signals.next().await == Order::Reload {
            if let Err(error) = credentials.reload() {
                tracing::error!(error = chain(&error), "certificates stay as they were");
            }
            if let Ok((config, _)) = ControllerConfig::read(path) {
                levels.reload(config.log.as_deref())?;
            }
        }
        tracing::info!("controller stops");
        serving.abort();
        Ok(())
    })
}
