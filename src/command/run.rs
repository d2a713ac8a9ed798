//! `run`: a node until it is told to stop.

use std::path::Path;

use qkd_drivers::Openers;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::MissedTickBehavior,
};

use super::{Failure, chain, log, runtime};
use crate::{config::Config, node::Node, service::ServiceManager};

pub(super) fn run(path: &Path, levels: Option<&str>, openers: Openers) -> Result<(), Failure> {
    let config = Config::read(path)?;
    let levels = log::start(levels, config.log.as_deref())?;
    if let Err(error) = qkd_secmem::harden_process() {
        tracing::warn!(%error, "core dumps and debuggers are not shut out");
    }
    runtime()?.block_on(async {
        let mut signals = Signals::new()?;
        let manager = ServiceManager::from_environment();
        let mut node = Node::start_with(config, openers).await?;
        manager.ready();
        let result = until_stopped(&mut node, &mut signals, &manager, path, &levels).await;
        tracing::info!("node stops");
        manager.stopping();
        node.stop().await?;
        result
    })
}

async fn until_stopped(
    node: &mut Node,
    signals: &mut Signals,
    manager: &ServiceManager,
    path: &Path,
    levels: &log::Levels,
) -> Result<(), Failure> {
    let mut tick = tokio::time::interval(manager.alive_every());
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // One that does not answer is not alive: the service manager starts it again.
            _ = tick.tick() => if let Some(summary) = node.summary(manager.alive_every()).await {
                manager.alive(&summary);
            },
            () = node.failed() => return Err(Failure::StoreFailed),
            signal = signals.next() => match signal {
                Order::Stop => return Ok(()),
                Order::Reload => {
                    manager.reloading();
                    reload(node, path, levels).await;
                    manager.ready();
                }
            },
        }
    }
}

/// Reads again what can change while the node runs. What cannot be used is not taken.
async fn reload(node: &mut Node, path: &Path, levels: &log::Levels) {
    let config = match Config::read(path) {
        Ok(config) => config,
        Err(error) => {
            let error = chain(&error);
            return tracing::error!(error, "everything stays as it was");
        }
    };
    if let Err(error) = levels.reload(config.log.as_deref()) {
        tracing::error!(error = chain(&error), "log levels stay as they were");
    }
    let reloaded = node.reload(&config).await;
    if let Some(error) = &reloaded.credentials {
        tracing::error!(error = chain(error), "certificates stay as they were");
    }
    let modules = &reloaded.modules;
    for (what, names) in [
        ("added", &modules.added),
        ("removed", &modules.removed),
        ("changed", &modules.changed),
    ] {
        for module_pair in names {
            tracing::info!(%module_pair, "module pair {what}");
        }
    }
    for module_pair in &modules.restart_needed {
        tracing::warn!(%module_pair, "module pair stays as it was: its link needs a restart");
    }
    for section in &reloaded.restart_needed {
        tracing::warn!("{section} differs from what this node runs with: that needs a restart");
    }
    tracing::info!("read again: module pairs, certificates, log levels");
}

/// The signals that a long-running command heeds.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Stop,
    Reload,
}

impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    pub(super) async fn next(&mut self) -> Order {
        tokio::select! {
            _ = self.interrupt.recv() => Order::Stop,
            _ = self.terminate.recv() => Order::Stop,
            _ = self.hang_up.recv() => Order::Reload,
        }
    }
}
