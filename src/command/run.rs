//! `run`: a node until it is told to stop.

use std::path::Path;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{Failure, chain, log, runtime};
use crate::{config::Config, node::Node};

pub(super) fn run(path: &Path, levels: Option<&str>) -> Result<(), Failure> {
    let config = Config::read(path)?;
    let levels = log::start(levels, config.log.as_deref())?;
    if let Err(error) = qkd_secmem::harden_process() {
        tracing::warn!(%error, "core dumps and debuggers are not shut out");
    }
    runtime()?.block_on(async {
        let mut signals = Signals::new()?;
        let node = Node::start(config).await?;
        let result = until_stopped(&node, &mut signals, path, &levels).await;
        tracing::info!("node stops");
        node.stop().await?;
        result
    })
}

async fn until_stopped(
    node: &Node,
    signals: &mut Signals,
    path: &Path,
    levels: &log::Levels,
) -> Result<(), Failure> {
    loop {
        tokio::select! {
            () = node.failed() => return Err(Failure::StoreFailed),
            signal = signals.next() => match signal {
                Order::Stop => return Ok(()),
                Order::Reload => reload(node, path, levels),
            },
        }
    }
}

/// Reads again what can change while the node runs. What cannot be used is not taken.
fn reload(node: &Node, path: &Path, levels: &log::Levels) {
    let report = |what: &str, error: &dyn std::error::Error| {
        tracing::error!(error = chain(error), "{what} stay as they were");
    };
    match Config::read(path) {
        Ok(config) => {
            if let Err(error) = levels.reload(config.log.as_deref()) {
                report("log levels", &error);
            }
        }
        Err(error) => report("log levels", &error),
    }
    match node.reload() {
        Ok(()) => {
            tracing::info!("certificates and log levels were read again; all else needs a restart")
        }
        Err(error) => report("certificates", &error),
    }
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
