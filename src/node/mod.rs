//! A running node: drivers, pipeline, KMA and KSA, joined.
//!
//! Everything is started here and nowhere else; the stages know nothing of one another. A node stops
//! in the other direction: first nobody new is let in, then the agent commits what it has, then key
//! memory is wiped as its last owner goes.

mod agent;
mod cores;
mod generator;
mod intake;
mod modules;
mod naming;
mod orders;
mod routes;
mod status;
mod supply;

use std::{collections::BTreeMap, io, sync::Arc, thread, time::Duration};

use qkd_drivers::Openers;
use qkd_kernels::Backend;
use qkd_kma::{
    Kma, KmaConfig, LinkConfig, RemoteConfig,
    store::Store,
    vault::{self, LmdbOptions, Vault, VaultError},
};
use qkd_ksa::Counters;
use qkd_net::{
    CredentialsError, Links, LinksConfig, Reloadable,
    links::{LinkTiming, LinksError},
};
use qkd_pipeline::{Stage, StageEvent, WaitingBound, handoff, spawn_prepared};
use qkd_secmem::{Locking, Pool, PoolConfig, PoolError};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
};

use crate::kek::{KekSourceError, has_data_keys, kek_source};
use crate::{
    config::{Config, StoreConfig},
    env::{SystemClock, random_16},
};
use agent::{Agent, Request, STOP_WITHIN, Sources, Surroundings};
pub use cores::NoSuchCore;
pub use intake::{AlarmReport, MetricReport, ModuleReport};
pub use modules::ModuleChanges;
use modules::{Means, Modules};
pub use orders::order;
use routes::Routes;
pub use status::{MemoryReport, Report, StockReport, StreamReport, ask};
use supply::NodeSupply;

/// Descriptors between drivers and stage.
const HANDOFF_CAPACITY: usize = 1024;

/// QKD-keys that wait for the other end.
const WAITING_KEYS: usize = 16_384;

/// Length over which unit digests are taken, in bytes.
const DIGEST_UNIT_BYTES: u32 = 4096;

/// Why a node did not start, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// Certificates cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// A thread is to stay on a core that is not there.
    #[error(transparent)]
    Core(#[from] NoSuchCore),
    /// There is no key memory.
    #[error(transparent)]
    Memory(#[from] PoolError),
    /// The store cannot be opened, or failed.
    #[error("store")]
    Store(#[from] VaultError),
    /// An address cannot be bound.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The links cannot be started.
    #[error(transparent)]
    Links(#[from] LinksError),
    /// A module cannot be opened.
    #[error("module pair {module_pair}")]
    Module {
        /// The module pair.
        module_pair: String,
        /// Why, and what to do about it.
        source: qkd_drivers::OpenError,
    },
    /// The generator that `[relay]` registers cannot be opened.
    #[error("generator {path}")]
    Generator {
        /// The device.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// What applications may ask for contradicts itself.
    #[error(transparent)]
    Profile(#[from] qkd_ksa::ProfileError),
    /// There is no key-encryption key.
    #[error(transparent)]
    Kek(#[from] KekSourceError),
    /// The system gave no thread or socket.
    #[error("the system refused")]
    System(#[from] io::Error),
}

/// A node that runs.
#[derive(Debug)]
pub struct Node {
    /// What it was started with, but for the module pairs, which may have changed since.
    config: Config,
    modules: Modules,
    requests: mpsc::Sender<Request>,
    credentials: Arc<Reloadable>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
    links: qkd_net::LinksHandle,
    agent: Option<thread::JoinHandle<Result<(), VaultError>>>,
    /// Turns true when the agent has ended, whatever the reason.
    ended: watch::Receiver<bool>,
}

impl Node {
    /// Starts a node, with the drivers of this program. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`NodeError`]: nothing goes on running.
    pub async fn start(config: Config) -> Result<Self, NodeError> {
        Self::start_with(config, Openers::new()).await
    }

    /// Starts a node that knows more drivers. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`NodeError`]: nothing goes on running.
    pub async fn start_with(config: Config, openers: Openers) -> Result<Self, NodeError> {
        cores::check(&[config.node.stage_core, config.node.agent_core])?;
        let credentials = Arc::new(config.tls.load()?);
        let (intake_pool, pool) = key_memory(&config)?;
        let boot = random_16();
        let store = Store::open(open_vault(&config, &pool)?, pool.clone(), boot)?
            .with_retention(config.retention.policy());
        let clock = SystemClock::start();
        let kx = listen(&config.kx.listen).await?;
        let (links, link_events) = Links::start(LinksConfig {
            me: config.node.id.clone(),
            listen: Some(kx),
            peers: peers_of(&config),
            credentials: credentials.clone(),
            timing: LinkTiming::dead_after(Duration::from_millis(
                *config.kx.dead_after_ms.get_ref(),
            )),
            seed: random_u64(),
        })?;

        let (stop, shutdown) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let (requests, request_receiver) = agent::requests();
        let node_requests = requests.clone();
        let (pusher, popper) = handoff(HANDOFF_CAPACITY);
        let (stage_events, stage_receiver) = mpsc::unbounded_channel::<StageEvent>();
        let backend = Backend::detect();
        let bound = WaitingBound {
            keys: WAITING_KEYS,
            bytes: intake_pool.stats().capacity_bytes / 2,
        };
        let stage_core = config.node.stage_core;
        let stage = spawn_prepared(
            Stage::new(pool.clone(), bound, backend, random_32()),
            popper,
            move || cores::stay_on(stage_core, "qkd-stage"),
            move |event| {
                // Nobody listens only when the node is stopping.
                let _ = stage_events.send(event);
            },
        )?;

        let (full_senders, full): (Vec<_>, BTreeMap<_, _>) = config
            .links
            .iter()
            .map(|link| {
                let (sender, full) = watch::channel(false);
                let peer = link.peer.get_ref();
                ((peer.clone(), sender), (peer.clone(), full))
            })
            .unzip();
        let mut modules = Modules::new(Means {
            openers,
            pool: intake_pool.clone(),
            pusher,
            waiting_bytes: bound.bytes,
            full,
            requests: requests.clone(),
        });
        let module_tasks = modules.start(&config)?;

        let (alarms, alarm_receiver) = mpsc::unbounded_channel();
        let routes = Routes::start(
            &config,
            &credentials,
            clock,
            requests.clone(),
            alarm_receiver,
            modules.reports(),
        );
        let want_route = routes.map(|(routes, want_route)| {
            tasks.spawn(routes.run(shutdown.clone()));
            want_route
        });
        let device = config.relay.device.as_ref();
        let generator =
            device.map(|device| generator::start(device, backend, pool.clone(), requests.clone()));
        let around = Surroundings {
            links: links.clone(),
            stage,
            modules: module_tasks,
            full: full_senders,
            want_route,
            want_random: generator.transpose()?,
            alarms,
            clock,
        };
        let sources = Sources {
            links: link_events,
            stage: stage_receiver,
            requests: request_receiver,
            shutdown: shutdown.clone(),
        };
        tracing::info!(node = %config.node.id, backend = backend.name(), locked = pool.stats().locked, "node starts");
        let mut kma = Kma::new(kma_config(&config), store, boot, backend)
            .with_application_names(&config.app_names());
        if let Some(period) = config.store.epoch_period() {
            kma = kma.with_epoch_period(period);
        }
        let agent = Agent::new(kma, around);
        let agent_core = config.node.agent_core;
        let (ended_sender, ended) = watch::channel(false);
        let agent = thread::Builder::new()
            .name("qkd-kma".to_owned())
            .spawn(move || {
                cores::stay_on(agent_core, "qkd-kma");
                let result = agent.run(sources);
                let _ = ended_sender.send(true);
                result
            })?;

        let server = status::StatusServer {
            node: config.node.id.clone(),
            requests: requests.clone(),
            modules: modules.reports(),
            pools: [intake_pool, pool],
        };
        let socket = status::bind(&config.status_socket())?;
        tasks.spawn(server.run(socket, shutdown.clone()));
        let orders = status::bind(&config.order_socket())?;
        tasks.spawn(orders::run(orders, requests.clone(), shutdown.clone()));
        if let Some(supply_config) = &config.supply {
            let listener = listen(&supply_config.listen).await?;
            let mut ksa = qkd_ksa::Config::new(supply_config.profile()?);
            ksa.http2 = supply_config.http2;
            ksa.limits.drain_within = STOP_WITHIN / 2;
            let supply = Arc::new(node_supply(&config, requests));
            let counters = Arc::new(Counters::default());
            let (credentials, shutdown) = (credentials.clone(), shutdown.clone());
            tasks.spawn(qkd_ksa::serve(
                listener,
                credentials,
                supply,
                ksa,
                counters,
                shutdown,
            ));
        }
        Ok(Self {
            config,
            modules,
            requests: node_requests,
            credentials,
            stop,
            tasks,
            links,
            agent: Some(agent),
            ended,
        })
    }

    /// Takes over what a changed configuration says of module pairs, and reads certificates again;
    /// open connections whose certificates are refused now are closed. Says what it does not take over.
    pub async fn reload(&mut self, config: &Config) -> Reloaded {
        Reloaded {
            modules: self.modules.reload(config).await,
            credentials: self.credentials.reload().err(),
            restart_needed: self.config.differing_sections(config),
        }
    }

    /// The state of the node in one line; `None` if its agent does not answer in this time.
    pub async fn summary(&self, patience: Duration) -> Option<String> {
        let asking = async {
            let (reply, answer) = tokio::sync::oneshot::channel();
            self.requests.send(Request::Status(reply)).await.ok()?;
            answer.await.ok()
        };
        let status = tokio::time::timeout(patience, asking).await.ok()??;
        let modules = self.modules.reports().get();
        Some(format!(
            "{} of {} modules attached, {} of {} nodes connected",
            modules.values().filter(|module| module.attached).count(),
            modules.len(),
            status.peers.iter().filter(|(_, is_up)| *is_up).count(),
            status.peers.len(),
        ))
    }

    /// Waits until the agent ends by itself: its store failed.
    pub async fn failed(&self) {
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Stops in good order.
    ///
    /// # Errors
    ///
    /// The store failed while the node ran, or at the end; everything committed before is kept.
    ///
    /// # Panics
    ///
    /// If the agent's thread has panicked.
    pub async fn stop(mut self) -> Result<(), NodeError> {
        let _ = self.stop.send(true);
        let _ = tokio::time::timeout(STOP_WITHIN, async {
            self.modules.stop().await;
            while self.tasks.join_next().await.is_some() {}
        })
        .await;
        self.tasks.shutdown().await;
        self.links.shutdown().await;
        let Some(agent) = self.agent.take() else {
            return Ok(());
        };
        match tokio::task::spawn_blocking(move || agent.join()).await {
            Ok(Ok(result)) => Ok(result?),
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(error) => Err(NodeError::System(error.into())),
        }
    }
}

/// What [`Node::reload`] has done.
#[derive(Debug)]
pub struct Reloaded {
    /// Module pairs.
    pub modules: ModuleChanges,
    /// Why the certificates in use stay in use, if they do.
    pub credentials: Option<CredentialsError>,
    /// Parts of the file that differ from what this process was started with, and that only a restart
    /// takes over.
    pub restart_needed: Vec<String>,
}

/// Waits until the node stops.
async fn until_stop(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|down| *down).await;
}

fn random_32() -> [u8; 32] {
    let mut bytes = [0; 32];
    let (front, back) = bytes.split_at_mut(16);
    front.copy_from_slice(&random_16());
    back.copy_from_slice(&random_16());
    bytes
}

fn random_u64() -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = random_16();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

async fn listen(address: &str) -> Result<TcpListener, NodeError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|source| NodeError::Listen {
        address: address.to_owned(),
        source,
    })
}

/// Key memory in two halves: one for what comes from hardware, one for everything else, so that a
/// module that delivers without end never takes the memory in which keys are agreed and supplied.
fn key_memory(config: &Config) -> Result<(Pool, Pool), PoolError> {
    let half = || {
        let pool = Pool::new(PoolConfig {
            capacity_bytes: (config.node.key_memory_mib.get_ref() << 20) / 2,
            locking: if config.node.allow_unlocked_memory {
                Locking::Preferred
            } else {
                Locking::Required
            },
        })?;
        if config.node.populate_key_memory
            && let Err(error) = pool.populate()
        {
            tracing::warn!(%error, "key memory is not present from the start; it comes as it is used");
        }
        Ok(pool)
    };
    Ok((half()?, half()?))
}

fn open_vault(config: &Config, pool: &Pool) -> Result<Box<dyn Vault>, NodeError> {
    let dir = config.store_dir();
    std::fs::create_dir_all(&config.node.data)?;
    match &config.store {
        StoreConfig::Memory => Ok(Box::new(vault::open_memory(&dir, pool.clone())?)),
        StoreConfig::Lmdb { kek, max_gib, .. } => {
            let kek = kek_source(kek, !has_data_keys(&dir))?;
            let max_bytes = max_gib << 30;
            let options = LmdbOptions { max_bytes };
            Ok(Box::new(vault::open_lmdb(&dir, &kek, options)?))
        }
    }
}

fn peers_of(config: &Config) -> Vec<qkd_net::Peer> {
    let peer = |peer: &crate::config::PeerConfig| qkd_net::Peer {
        id: peer.id.get_ref().clone(),
        address: peer.address.clone(),
    };
    config.peers.iter().map(peer).collect()
}

fn kma_config(config: &Config) -> KmaConfig {
    let neighbours = config.links.iter().map(|link| {
        let pairs = link.module_pairs.iter();
        let entry = LinkConfig {
            module_pairs: pairs.map(|pair| pair.name.get_ref().clone()).collect(),
            floor_bytes: link.floor_bytes,
            capacity_bytes: link.capacity_bytes,
            segment_bytes: link.segment_kib.get_ref() << 10,
            gather: Duration::from_millis(link.gather_ms),
            mismatch_limit: link.mismatch_limit,
        };
        (link.peer.get_ref().clone(), entry)
    });
    let remotes = config.stocks.iter().map(|stock| {
        let entry = RemoteConfig {
            stock: qkd_kma::StockLimits {
                min_bytes: stock.min_kib << 10,
                max_bytes: stock.max_kib.get_ref() << 10,
            },
            unit_bytes: stock.unit_bytes,
            route: stock.route.as_ref().map(|route| route.get_ref().clone()),
        };
        (stock.with.get_ref().clone(), entry)
    });
    KmaConfig {
        node: config.node.id.clone(),
        neighbours: neighbours.collect(),
        remotes: remotes.collect(),
        // The configuration was checked when it was read.
        relay: config.relay.policies().unwrap_or_default(),
        digest_unit_bytes: DIGEST_UNIT_BYTES,
    }
}

fn node_supply(config: &Config, requests: mpsc::Sender<Request>) -> NodeSupply {
    let links = config
        .links
        .iter()
        .map(|link| (link.peer.get_ref().clone(), link.capacity_bytes));
    let stocks = config
        .stocks
        .iter()
        .map(|stock| (stock.with.get_ref().clone(), stock.max_kib.get_ref() << 10));
    NodeSupply {
        me: config.node.id.clone(),
        apps: config.app_nodes(),
        capacity_bytes: links.chain(stocks).collect(),
        key_bits: config
            .supply
            .as_ref()
            .map_or(256, |supply| supply.key_bits.get()),
        requests,
    }
}
