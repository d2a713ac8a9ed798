//! The modules of a node: which there are, and how that changes while it runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use qkd_drivers::{DriverConfig, KeySource, OpenError, Openers};
use qkd_keyfile::{ModulePairId, NodeId};
use qkd_pipeline::Pusher;
use qkd_secmem::Pool;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use super::{
    NodeError,
    agent::{ModuleTask, Request},
    intake::{Closed, Intake, ModuleReport, Trust, fits_key_memory},
    naming::Naming,
};
use crate::config::Config;

/// What every module said last, and the matching KMA of its link.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reports(Arc<Mutex<BTreeMap<ModulePairId, (NodeId, Report)>>>);

type Report = watch::Receiver<ModuleReport>;

impl Reports {
    pub(crate) fn get(&self) -> BTreeMap<String, ModuleReport> {
        let reports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let report = |(name, (_, report)): (&ModulePairId, &(NodeId, Report))| {
            (name.to_string(), report.borrow().clone())
        };
        reports.iter().map(report).collect()
    }

    /// The links none of whose modules can be trusted just now, by matching KMA.
    pub(crate) fn untrusted_links(&self) -> BTreeSet<NodeId> {
        let reports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let peers = |refusing: bool| -> BTreeSet<NodeId> {
            let of = |(peer, report): &(NodeId, Report)| {
                (report.borrow().refusing.is_some() == refusing).then(|| peer.clone())
            };
            reports.values().filter_map(of).collect()
        };
        &peers(true) - &peers(false)
    }

    fn set(&self, name: &ModulePairId, report: Option<(NodeId, Report)>) {
        let mut reports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match report {
            Some(report) => drop(reports.insert(name.clone(), report)),
            None => drop(reports.remove(name)),
        }
    }
}

/// How a module pair is configured.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    peer: NodeId,
    driver: DriverConfig,
}

/// A module that is read.
#[derive(Debug)]
struct Running {
    entry: Entry,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// What was changed by `Modules::reload`.
#[derive(Debug, Default)]
pub struct ModuleChanges {
    /// Module pairs that are new.
    pub added: Vec<ModulePairId>,
    /// Module pairs that are read no more.
    pub removed: Vec<ModulePairId>,
    /// Module pairs whose driver was started again with other settings.
    pub changed: Vec<ModulePairId>,
    /// Module pairs that stay as they were, because their link is not what this node runs with.
    pub restart_needed: Vec<ModulePairId>,
}

/// Starts, changes and ends the tasks that read modules.
#[derive(Debug)]
pub(crate) struct Modules {
    openers: Openers,
    pool: Pool,
    pusher: Pusher,
    /// Key memory for blocks that wait, in bytes; modules share it evenly.
    waiting_bytes: usize,
    share_bytes: Arc<AtomicUsize>,
    /// Every link, and whether its store is full.
    full: BTreeMap<NodeId, watch::Receiver<bool>>,
    requests: mpsc::Sender<Request>,
    reports: Reports,
    running: BTreeMap<ModulePairId, Running>,
}

/// What [`Modules`] work with.
pub(crate) struct Means {
    pub(crate) openers: Openers,
    pub(crate) pool: Pool,
    pub(crate) pusher: Pusher,
    pub(crate) waiting_bytes: usize,
    pub(crate) full: BTreeMap<NodeId, watch::Receiver<bool>>,
    pub(crate) requests: mpsc::Sender<Request>,
}

impl Modules {
    pub(crate) fn new(means: Means) -> Self {
        Self {
            openers: means.openers,
            pool: means.pool,
            pusher: means.pusher,
            waiting_bytes: means.waiting_bytes,
            share_bytes: Arc::new(AtomicUsize::new(means.waiting_bytes)),
            full: means.full,
            requests: means.requests,
            reports: Reports::default(),
            running: BTreeMap::new(),
        }
    }

    pub(crate) fn reports(&self) -> Reports {
        self.reports.clone()
    }

    /// Opens every module of the configuration and reads it from now on; returns where their keys are
    /// settled.
    pub(crate) fn start(
        &mut self,
        config: &Config,
    ) -> Result<BTreeMap<ModulePairId, ModuleTask>, NodeError> {
        let entries = entries(config);
        self.share(entries.len());
        let mut settle = BTreeMap::new();
        for (name, entry) in entries {
            let source = self
                .open(&entry.driver)
                .map_err(|source| NodeError::Module {
                    module_pair: name.to_string(),
                    source,
                })?;
            settle.insert(name.clone(), self.read(name, entry, Some(source)));
        }
        Ok(settle)
    }

    /// Takes over the module pairs of a changed configuration. A module that cannot be opened is tried
    /// again and again, and `status` says why it cannot.
    pub(crate) async fn reload(&mut self, config: &Config) -> ModuleChanges {
        let mut wanted = entries(config);
        let mut changes = ModuleChanges::default();
        // A pair of a link that this process does not have, or that was another link's, cannot be
        // taken: the agent knows links and whose keys they are for as long as it runs.
        wanted.retain(|name, entry| {
            let was = self.running.get(name).map(|running| &running.entry.peer);
            let possible =
                self.full.contains_key(&entry.peer) && was.is_none_or(|was| *was == entry.peer);
            if !possible {
                changes.restart_needed.push(name.clone());
            }
            possible
        });
        let running: Vec<_> = self.running.keys().cloned().collect();
        for name in running {
            if !wanted.contains_key(&name) && !changes.restart_needed.contains(&name) {
                self.end(&name).await;
                self.reports.set(&name, None);
                let _ = self
                    .requests
                    .send(Request::RemoveModule(name.clone()))
                    .await;
                changes.removed.push(name);
            }
        }
        self.share(wanted.len());
        for (name, entry) in wanted {
            match self.running.get(&name) {
                Some(running) if running.entry == entry => continue,
                Some(_) => {
                    // The old driver holds the port, folder or socket that the new one may want.
                    self.end(&name).await;
                    changes.changed.push(name.clone());
                }
                None => changes.added.push(name.clone()),
            }
            let peer = entry.peer.clone();
            let task = self.read(name.clone(), entry, None);
            let request = Request::AddModule {
                peer,
                module_pair: name,
                task,
            };
            let _ = self.requests.send(request).await;
        }
        changes
    }

    /// Ends all of them.
    pub(crate) async fn stop(&mut self) {
        for running in self.running.values() {
            let _ = running.stop.send(true);
        }
        for running in std::mem::take(&mut self.running).into_values() {
            let _ = running.task.await;
        }
    }

    fn open(&self, driver: &DriverConfig) -> Result<Box<dyn KeySource>, OpenError> {
        let source = self.openers.open(driver)?;
        fits_key_memory(&*source)?;
        Ok(source)
    }

    fn share(&self, modules: usize) {
        let share_bytes = self.waiting_bytes / modules.max(1);
        self.share_bytes.store(share_bytes, Ordering::Relaxed);
    }

    fn read(
        &mut self,
        name: ModulePairId,
        entry: Entry,
        source: Option<Box<dyn KeySource>>,
    ) -> ModuleTask {
        let (settle, settled) = mpsc::unbounded_channel();
        let (named, naming) = watch::channel(None);
        let (fetch, wanted) = mpsc::channel(WANTED_MAX);
        let (state, report) = watch::channel(ModuleReport::default());
        let (stop, stopped) = watch::channel(false);
        // Links that this process lacks were sorted out before.
        let full = self.full.get(&entry.peer).cloned();
        let intake = Intake {
            module_pair: name.clone(),
            is_open: source.is_some(),
            source: source.unwrap_or_else(|| Box::new(Closed)),
            driver: entry.driver.clone(),
            openers: self.openers.clone(),
            pool: self.pool.clone(),
            share_bytes: self.share_bytes.clone(),
            pusher: self.pusher.clone(),
            settled,
            wanted,
            naming: Naming::new(naming, self.requests.clone()),
            full: full.unwrap_or_else(|| watch::channel(false).1),
            state,
            trust: Trust::default(),
        };
        let task = tokio::spawn(intake.run(stopped));
        self.reports.set(&name, Some((entry.peer.clone(), report)));
        let wanted = entry.driver.fetches_by_id().then_some(fetch);
        self.running.insert(name, Running { entry, stop, task });
        ModuleTask {
            settle,
            named,
            wanted,
        }
    }

    async fn end(&mut self, name: &ModulePairId) {
        if let Some(running) = self.running.remove(name) {
            let _ = running.stop.send(true);
            let _ = running.task.await;
        }
    }
}

/// Announcements of the other end that wait for a driver which fetches keys; more are said again.
const WANTED_MAX: usize = 16;

fn entries(config: &Config) -> BTreeMap<ModulePairId, Entry> {
    let pairs = config.links.iter().flat_map(|link| {
        link.module_pairs.iter().map(|pair| {
            let entry = Entry {
                peer: link.peer.get_ref().clone(),
                driver: pair.driver.clone(),
            };
            (pair.name.get_ref().clone(), entry)
        })
    });
    pairs.collect()
}
